//! One thread that serves a device: messages, kicks and the device's news, one after another.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::connection::{Connection, ConnectionError};
use super::device::Backend;
use super::error::ServeError;
use super::events::take;

/// How long to wait where the system has no room for one more connection: there is no event for that it has.
const ROOM: Duration = Duration::from_millis(100);

/// How often queues that are polled are looked at in vain before the thread rests between two looks, a millisecond each.
const LOOKS: u32 = 100;

/// Ends a server from another thread.
#[derive(Clone)]
pub struct Stop(Arc<EventFd>);

impl Stop {
    /// One that was not used yet.
    pub fn new() -> Result<Self, ServeError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        EventFd::from_flags(flags).map(|fd| Self(Arc::new(fd))).map_err(system("eventfd"))
    }

    /// Ends the session, and the server.
    pub fn stop(&self) {
        // Fails only when the counter is full: then it is used already.
        let _ = self.0.write(1);
    }
}

/// How a session came to its good end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The front end closed the connection.
    Closed,
    /// [`Stop`] was used.
    Stopped,
}

/// Takes in one connection after another, until `stop`; `ended` hears how each session ended.
pub fn listen(
    listener: &UnixListener,
    backend: &mut Backend,
    stop: &Stop,
    mut ended: impl FnMut(&Result<Ended, ServeError>),
) -> Result<(), ServeError> {
    // Whoever knocked may be gone, or with another process that has this socket too.
    listener.set_nonblocking(true).map_err(|error| system("fcntl")(errno(&error)))?;
    let mut crowded = false;
    loop {
        let mut fds = [input(stop.0.as_fd()), input(listener.as_fd())];
        // Who has no room looks again after a while, and not at the socket, which would say at once that somebody waits.
        let (fds, timeout) = match crowded {
            true => (&mut fds[..1], PollTimeout::try_from(ROOM).unwrap_or(PollTimeout::MAX)),
            false => (&mut fds[..], PollTimeout::NONE),
        };
        wait(fds, timeout)?;
        if fds[0].any().unwrap_or(true) {
            return Ok(());
        }
        let socket = match listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) => match errno(&error) {
                Errno::ECONNABORTED | Errno::EAGAIN | Errno::EINTR => continue,
                reason @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM) => {
                    if !crowded {
                        tracing::warn!(%reason, "no room for one more connection: the front end has to wait");
                    }
                    crowded = true;
                    continue;
                }
                reason => return Err(ServeError::System { call: "accept", reason }),
            },
        };
        crowded = false;
        tracing::info!("a front end connected");
        let how = backend.serve(socket, stop);
        match &how {
            Ok(how) => tracing::info!(?how, "the session ended"),
            Err(error) => tracing::warn!(%error, "the session was ended"),
        }
        ended(&how);
        if matches!(how, Ok(Ended::Stopped)) {
            return Ok(());
        }
    }
}

impl Backend {
    /// Serves one connection until its end. The device is as before afterwards, and can be served again.
    pub fn serve(&mut self, socket: UnixStream, stop: &Stop) -> Result<Ended, ServeError> {
        // The device is reset whatever it panicked about, which is all that has to hold then. If it cannot even be reset,
        // that panic goes on: there is nothing left to serve.
        let work = AssertUnwindSafe(|| {
            let done = self.session(socket, stop);
            self.gone |= matches!(done, Err(ServeError::Connection(ConnectionError::Closed)));
            self.end();
            done
        });
        let done = catch_unwind(work).unwrap_or_else(|panic| {
            self.give_up();
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let what = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("of a kind of its own");
            Err(ServeError::Panicked { what: what.into() })
        });
        match done {
            Err(ServeError::Connection(ConnectionError::Closed)) => Ok(Ended::Closed),
            done => done,
        }
    }

    fn session(&mut self, socket: UnixStream, stop: &Stop) -> Result<Ended, ServeError> {
        let mut connection = Connection::new(socket)?;
        // Whether the device has more to do, and which queue has the next turn.
        let (mut news, mut next) = (false, 0);
        // How often nothing was found in the queues that are looked at without kicks.
        let mut idle = 0;
        loop {
            self.check_memory()?;
            let room = self.flush();
            let polled = self.polled();
            let busy = news || self.rings.iter().any(|ring| ring.due);
            let timeout = match (busy, polled.is_empty()) {
                (true, _) => PollTimeout::ZERO,
                (false, true) => PollTimeout::NONE,
                (false, false) if idle < LOOKS => PollTimeout::ZERO,
                (false, false) => PollTimeout::from(1u8),
            };
            let ready = self.ready(&connection, stop, room.as_ref(), timeout)?;
            if ready.stop {
                return Ok(Ended::Stopped);
            }
            self.gone |= ready.gone;
            for index in ready.kicks {
                self.rings[index].due |= self.kicked(index);
            }
            polled.iter().for_each(|(index, _)| self.rings[*index].due = true);
            if ready.news {
                // Before the work, so that news during it are seen afterwards.
                let _ = self.news.read();
                news = true;
            }
            // What has more to do takes its next turn after everyone else had theirs.
            if news {
                news = self.poll();
            }
            next = self.take_turns(next, || interrupted(&connection, stop))?;
            idle = if self.polled() == polled { idle.saturating_add(1) } else { 0 };
            if ready.message
                && let Some(message) = connection.receive()?
            {
                self.handle(&connection, message)?;
            }
        }
    }

    /// A turn for each queue that has something to do, from `first` on; but no more than one if `interrupted`. Where to go on.
    fn take_turns(&mut self, first: usize, interrupted: impl Fn() -> bool) -> Result<usize, ServeError> {
        let count = self.rings.len();
        let mut taken = false;
        for index in (0..count).map(|step| (first + step) % count) {
            if !self.rings[index].due {
                continue;
            }
            // A turn may be long: the front end and whoever wants to stop do not wait for all of them.
            if taken && interrupted() {
                return Ok(index);
            }
            self.rings[index].due = self.kick(index)?;
            taken = true;
        }
        Ok(first)
    }

    /// Takes the event of queue `index`; whether there was one. What cannot be read again is not asked again.
    fn kicked(&mut self, index: usize) -> bool {
        let Some(kick) = &self.rings[index].kick else { return false };
        match take(kick.as_fd()) {
            Ok(false) => false,
            Ok(true) => {
                self.memory.ask_again();
                true
            }
            Err(reason) => {
                tracing::warn!(index, %reason, "kicks come no more");
                self.rings[index].kick = None;
                true
            }
        }
    }

    /// Waits until something is to be done, for `timeout` at most.
    fn ready(
        &self,
        connection: &Connection,
        stop: &Stop,
        room: Option<&Arc<Connection>>,
        timeout: PollTimeout,
    ) -> Result<Ready, ServeError> {
        let mut fds = vec![input(stop.0.as_fd()), input(connection.as_fd()), input(self.news.as_fd())];
        let kicks: Vec<_> =
            self.rings.iter().enumerate().filter_map(|(index, ring)| Some((index, ring.kick.as_ref()?))).collect();
        fds.extend(kicks.iter().map(|(_, kick)| input(kick.as_fd())));
        fds.extend(room.map(|room| PollFd::new(room.as_fd(), PollFlags::POLLOUT)));
        wait(&mut fds, timeout)?;
        let any = |at: usize| fds[at].any().unwrap_or(true);
        let first = 3;
        Ok(Ready {
            stop: any(0),
            message: any(1),
            gone: fds[1].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)),
            news: any(2),
            kicks: kicks.iter().enumerate().filter(|(at, _)| any(first + at)).map(|(_, (index, _))| *index).collect(),
        })
    }
}

/// What there is to do.
struct Ready {
    stop: bool,
    message: bool,
    /// Whether the front end has left. What it said before may still be there.
    gone: bool,
    news: bool,
    /// Queues that may have been kicked.
    kicks: Vec<usize>,
}

/// Whether somebody wants to stop, or the front end says something.
fn interrupted(connection: &Connection, stop: &Stop) -> bool {
    let mut fds = [input(stop.0.as_fd()), input(connection.as_fd())];
    // What fails here fails where it is waited for.
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

fn input(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

fn wait(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> Result<(), ServeError> {
    match poll(fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(reason) => Err(ServeError::System { call: "poll", reason }),
    }
}

fn system(call: &'static str) -> impl Fn(Errno) -> ServeError {
    move |reason| ServeError::System { call, reason }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}
