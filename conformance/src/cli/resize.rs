//! Notices that an image became longer or shorter.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::thread::{self, Builder};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::complain;

/// How long to leave be what was looked at: every write of the guest's is an event too.
const PAUSE: Duration = Duration::from_millis(100);

/// What tells that an image is to be looked at: the kernel, for a file; for everything, a block device too, SIGUSR1.
pub(super) struct Watch {
    changed: Option<Inotify>,
    asked: SignalFd,
}

impl Watch {
    /// Watches `image`. Before there are other threads: they inherit that SIGUSR1 is taken here.
    pub(super) fn new(image: &File) -> io::Result<Self> {
        let signals: SigSet = [Signal::SIGUSR1].into_iter().collect();
        signals.thread_block()?;
        let asked = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let changed = if image.metadata()?.is_file() { changes(image) } else { None };
        Ok(Self { changed, asked })
    }

    /// Has `look` called whenever something may have changed, as long as the process lives.
    pub(super) fn spawn(self, look: impl Fn() + Send + 'static) -> io::Result<()> {
        Builder::new().name("resize".into()).spawn(move || self.wait(look))?;
        Ok(())
    }

    fn wait(self, look: impl Fn()) {
        loop {
            let fds = [Some(self.asked.as_fd()), self.changed.as_ref().map(|changed| changed.as_fd())];
            let mut fds: Vec<_> = fds.into_iter().flatten().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return tracing::error!(%error, "the image's size is watched no more"),
            }
            // First taken, then looked at: what comes meanwhile is an event again.
            _ = self.asked.read_signal();
            _ = self.changed.as_ref().map(Inotify::read_events);
            look();
            thread::sleep(PAUSE);
        }
    }
}

/// The changes of a file, if the kernel can tell them.
fn changes(image: &File) -> Option<Inotify> {
    let watched = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).and_then(|inotify| {
        // By the descriptor: its name may be another file's by now.
        let path = format!("/proc/self/fd/{}", image.as_raw_fd());
        inotify.add_watch(path.as_str(), AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB)?;
        Ok(inotify)
    });
    watched
        .inspect_err(|error| complain(&format!("inotify: {error}: only SIGUSR1 tells that the image's size changed")))
        .ok()
}
