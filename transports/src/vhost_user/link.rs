//! The front end's end of the socket: requests, answers, acknowledgements.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::transport::TransportError;

use super::connection::{Connection, ConnectionError, Message};
use super::messages::{NEED_REPLY, Payload, REPLY, Request};

/// How long the back end may take for an answer.
const ANSWER_WATCHDOG: Duration = Duration::from_secs(5);

/// A connection to a back end, for several threads.
pub(super) struct Link {
    connection: Mutex<Connection>,
    /// The same socket, for looking at its state while somebody waits for an answer.
    socket: OwnedFd,
    /// Whether every message is acknowledged.
    acknowledged: AtomicBool,
    closed: AtomicBool,
}

impl Link {
    pub(super) fn new(connection: Connection) -> std::io::Result<Self> {
        Ok(Self {
            socket: connection.as_fd().try_clone_to_owned()?,
            connection: Mutex::new(connection),
            acknowledged: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        })
    }

    /// From now on every message is acknowledged.
    pub(super) fn acknowledge(&self) {
        self.acknowledged.store(true, Ordering::Relaxed);
    }

    /// Whether the back end has closed the connection.
    pub(super) fn is_closed(&self) -> bool {
        if !self.closed.load(Ordering::Relaxed) && poll(&mut [self.hang_up()], PollTimeout::ZERO).is_ok_and(|n| n > 0) {
            self.closed.store(true, Ordering::Relaxed);
        }
        self.closed.load(Ordering::Relaxed)
    }

    /// What is ready once the back end has closed the connection.
    pub(super) fn hang_up(&self) -> PollFd<'_> {
        // That is told without being asked for.
        PollFd::new(self.socket.as_fd(), PollFlags::empty())
    }

    /// Sends `request`, which the back end answers.
    pub(super) fn ask(
        &self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, TransportError> {
        let mut connection = self.lock();
        let done = connection.send(request as u32, 0, payload, fds).and_then(|()| connection.wait(ANSWER_WATCHDOG));
        let message = done.map_err(|error| self.failed(error))?;
        let expected = (request as u32, REPLY);
        if (message.header.request, message.header.flags & REPLY) != expected {
            return Err(refused(request, format!("answered by request {}", message.header.request)));
        }
        Ok(message)
    }

    /// Asks for something of known size.
    pub(super) fn ask_for<T: Payload>(&self, request: Request, payload: &[u8]) -> Result<T, TransportError> {
        let message = self.ask(request, payload, &[])?;
        if message.payload.len() < T::LEN {
            return Err(refused(request, format!("{} bytes, expected {}", message.payload.len(), T::LEN)));
        }
        Ok(T::from_bytes(&message.payload))
    }

    /// Sends `request`, and has it acknowledged if that was negotiated.
    pub(super) fn tell(&self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), TransportError> {
        let acknowledged = self.acknowledged.load(Ordering::Relaxed);
        let flags = if acknowledged { NEED_REPLY } else { 0 };
        let mut connection = self.lock();
        connection.send(request as u32, flags, payload, fds).map_err(|error| self.failed(error))?;
        if !acknowledged {
            return Ok(());
        }
        let message = connection.wait(ANSWER_WATCHDOG).map_err(|error| self.failed(error))?;
        match message.payload.as_slice() {
            [0, 0, 0, 0, 0, 0, 0, 0] if message.header.request == request as u32 => Ok(()),
            answer => Err(refused(request, format!("request {}: {answer:02x?}", message.header.request))),
        }
    }

    fn failed(&self, error: ConnectionError) -> TransportError {
        match error {
            ConnectionError::Closed | ConnectionError::Truncated { .. } => {
                self.closed.store(true, Ordering::Relaxed);
                TransportError::Closed
            }
            ConnectionError::Silent(watchdog) => TransportError::Watchdog(watchdog, "an answer of the back end"),
            error => HypervisorError::Refused { call: "vhost-user", reason: error.to_string() }.into(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn refused(request: Request, reason: String) -> TransportError {
    HypervisorError::Refused { call: request.name(), reason }.into()
}
