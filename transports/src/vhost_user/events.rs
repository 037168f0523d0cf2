//! Events of the other side: what it is told by, and what it tells by.
//!
//! Whether a call on a file descriptor waits is a flag of the open file, which the other side has too: it can clear the
//! flag at any time, and fill a counter until a write has to wait for ever. So nothing here depends on the flag. An eventfd is
//! read by `preadv2`, which can be told not to wait (Linux 5.8), and signalled by the kernel itself at the end of an
//! asynchronous request: that adds to the counter as far as it goes. The pipes that User Mode Linux has in place of
//! eventfds are written by threads of their own, which may wait.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::relay::{RELAYS, Relay};
use super::signals::Signals;

/// Why a file descriptor was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum EventError {
    /// It is something else.
    #[error("a file descriptor that is no eventfd")]
    NotAnEvent,
    /// Too many pipes.
    #[error("more than {RELAYS} pipes to be signalled (an eventfd needs no thread)")]
    TooManyPipes,
    /// The system refused.
    #[error("{call}: {reason}")]
    System {
        /// The call.
        call: &'static str,
        /// What it said.
        reason: Errno,
    },
}

/// Something that is signalled.
pub(super) enum Bell {
    /// An eventfd.
    Event(OwnedFd),
    /// What may hold up whoever writes to it.
    Relayed(Relay),
}

impl Bell {
    /// One that rings by `fd`: an eventfd, or a pipe.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, EventError> {
        check_open(fd.as_fd())?;
        match (Signals::get().map(|signals| signals.knows(fd.as_fd())), kind(fd.as_fd())) {
            (Some(Ok(true)), _) => Ok(Self::Event(fd)),
            (Some(Ok(false)), libc::S_IFIFO) => Relay::spawn(fd).map(Self::Relayed),
            // Where the kernel has no asynchronous requests, nobody can tell what is an eventfd.
            (None | Some(Err(_)), libc::S_IFIFO | ANONYMOUS) => Relay::spawn(fd).map(Self::Relayed),
            _ => Err(EventError::NotAnEvent),
        }
    }

    /// Adds an event. Whoever has so many that one more cannot be counted does without.
    pub(super) fn ring(&self) {
        match self {
            Self::Event(fd) => {
                let rung = Signals::get().map(|signals| signals.signal(fd.as_fd()));
                if let Some(Err(error)) = rung {
                    tracing::error!(%error, "an event was not signalled");
                }
            }
            Self::Relayed(relay) => relay.ring(),
        }
    }
}

/// Gets what this needs of the kernel, while the process may still ask for it: a sandbox may come later.
pub(super) fn prepare() {
    let _ = Signals::get();
}

/// The eventfd `fd`, to be [taken](take).
pub(super) fn event(fd: OwnedFd) -> Result<OwnedFd, EventError> {
    check_open(fd.as_fd())?;
    let is_event = match Signals::get().map(|signals| signals.knows(fd.as_fd())) {
        Some(Ok(is_event)) => is_event,
        None | Some(Err(_)) => kind(fd.as_fd()) == ANONYMOUS,
    };
    if is_event { Ok(fd) } else { Err(EventError::NotAnEvent) }
}

/// Refuses what only names a file (O_PATH): it is good for nothing, and refused by the kernel as eventfds are.
fn check_open(fd: BorrowedFd<'_>) -> Result<(), EventError> {
    let flags = fcntl(fd, FcntlArg::F_GETFL).map_err(|reason| EventError::System { call: "fcntl", reason })?;
    if flags & libc::O_PATH == 0 { Ok(()) } else { Err(EventError::NotAnEvent) }
}

/// Takes all events of `fd`; whether there were some. Fails if it will never have any.
pub(super) fn take(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut count = [0u8; 8];
    let part = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
    // SAFETY: the kernel writes no more than there is room for.
    let read = unsafe { libc::preadv2(fd.as_raw_fd(), &part, 1, -1, libc::RWF_NOWAIT) };
    match Errno::result(read) {
        Ok(0) => Err(Errno::EPIPE),
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
        Err(reason) => Err(reason),
    }
}

/// The type in the mode of files that have none: eventfds are such.
const ANONYMOUS: libc::mode_t = 0;

/// The type of a file, as its mode has it, without a question to whoever serves its file system; nonsense if there is none.
fn kind(fd: BorrowedFd<'_>) -> libc::mode_t {
    // SAFETY: zeroes are a value of it, and the kernel writes no more than it.
    unsafe {
        let mut about: libc::statx = std::mem::zeroed();
        let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
        match libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, &mut about) {
            0 => libc::mode_t::from(about.stx_mode) & libc::S_IFMT,
            _ => libc::S_IFMT,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::OFlag;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use nix::unistd::{pipe2, write};

    use super::*;

    /// How many rings are more than there is room for at a time.
    const MANY: usize = 200;

    /// An eventfd that makes whoever reads or fills it wait.
    fn blocking(count: u64) -> EventFd {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
        if count > 0 {
            event.write(count).unwrap();
        }
        event
    }

    fn copy(fd: &impl AsFd) -> OwnedFd {
        fd.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn a_full_counter_that_waits_holds_nobody_up() {
        let event = blocking(u64::MAX - 1);
        let bell = Bell::new(copy(&event)).unwrap();
        (0..MANY).for_each(|_| bell.ring());
        assert!(event.read().unwrap() >= u64::MAX - 1);
    }

    #[test]
    fn every_ring_is_counted() {
        let event = blocking(0);
        let bell = Bell::new(copy(&event)).unwrap();
        (0..MANY).for_each(|_| bell.ring());
        if matches!(bell, Bell::Event(_)) {
            assert_eq!(event.read(), Ok(MANY as u64));
        } else {
            println!("skipped: this kernel has no asynchronous requests");
        }
    }

    #[test]
    fn an_empty_counter_that_waits_holds_nobody_up() {
        let event = blocking(0);
        assert_eq!(take(event.as_fd()), Ok(false));
        event.write(3).unwrap();
        assert_eq!(take(event.as_fd()), Ok(true));
        assert_eq!(take(event.as_fd()), Ok(false));
    }

    #[test]
    fn what_is_no_eventfd_is_told_from_one() {
        let (read_end, write_end) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let zero = std::fs::File::open("/dev/zero").unwrap();
        let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        for fd in [copy(&read_end), copy(&zero), copy(&epoll.0), copy(&socket)] {
            assert!(event(fd).is_err());
        }
        for fd in [copy(&zero), copy(&epoll.0), copy(&socket)] {
            assert!(matches!(Bell::new(fd), Err(EventError::NotAnEvent)));
        }
        let counter = blocking(0);
        assert!(event(copy(&counter)).is_ok());
        assert_eq!(take(counter.as_fd()), Ok(false), "to look changes nothing");
        assert!(matches!(Bell::new(write_end), Ok(Bell::Relayed(_))));
    }

    #[test]
    fn a_pipe_is_written_once_for_each_ring_and_one_that_is_full_holds_nobody_up() {
        let (read_end, write_end) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let bell = Bell::new(copy(&write_end)).unwrap();
        bell.ring();
        let mut bytes = [0; 8];
        assert_eq!(nix::unistd::read(&read_end, &mut bytes), Ok(8));
        assert_eq!(u64::from_ne_bytes(bytes), 1);
        nix::fcntl::fcntl(&write_end, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        while write(&write_end, &[0; 4096]).is_ok() {}
        nix::fcntl::fcntl(&write_end, nix::fcntl::FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        (0..100).for_each(|_| bell.ring());
        drop(bell);
    }
}
