//! Pipes in place of eventfds: whoever writes to one may have to wait.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::write;

use super::events::EventError;

/// The most pipes that are written at a time, those included whose other ends nobody reads.
pub(super) const RELAYS: usize = 256;

/// How many [`Relay`]s have a thread.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// A thread that writes events. One that waits for ever lasts as long as the other end of its pipe.
pub(super) struct Relay(Arc<EventFd>);

/// In the count of what a relay has to do: this was the last of it.
const OVER: u64 = 1 << 32;

/// A thread of a relay.
struct Running;

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Relay {
    pub(super) fn spawn(fd: OwnedFd) -> Result<Self, EventError> {
        let more = |count| (count < RELAYS).then_some(count + 1);
        if RUNNING.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_err() {
            return Err(EventError::TooManyPipes);
        }
        let running = Running;
        // Nobody else has this one.
        let due = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|reason| EventError::System { call: "eventfd", reason })?;
        let due = Arc::new(due);
        let theirs = Arc::clone(&due);
        let relay = move || {
            let _running = running;
            // Nobody reads the pipe: that is an error like others.
            let _ = SigSet::from(Signal::SIGPIPE).thread_block();
            loop {
                let count = match theirs.read() {
                    Ok(count) => count,
                    Err(Errno::EINTR) => continue,
                    Err(_) => return,
                };
                // If it is full, one more event would say nothing new.
                let written = if count == OVER { Ok(0) } else { write(&fd, &1u64.to_ne_bytes()) };
                match written {
                    Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) if count < OVER => {}
                    _ => return,
                }
            }
        };
        let reason = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
        let spawned = Builder::new().name("events".into()).spawn(relay);
        spawned.map_err(|error| EventError::System { call: "thread", reason: reason(error) })?;
        Ok(Self(due))
    }

    pub(super) fn ring(&self) {
        // Full after as many as nobody lives to see.
        let _ = self.0.write(1);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.write(OVER);
    }
}
