//! A socket that carries messages with file descriptors.
#![allow(unsafe_code)]

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::SockType;
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg};

use super::messages::{HEADER_LEN, Header, MEM_TABLE_MAX, PAYLOAD_MAX, Payload, VERSION, VERSION_MASK};

/// The most file descriptors that a message has: one for each region. There is room for no more, and what the kernel finds
/// no room for it closes.
const FDS_MAX: usize = MEM_TABLE_MAX;
// SAFETY: it only computes.
const CONTROL_LEN: usize = unsafe { libc::CMSG_SPACE((FDS_MAX * size_of::<RawFd>()) as u32) } as usize;
/// How long the other side may take to make room for a message of ours.
const SEND_WATCHDOG: Duration = Duration::from_secs(10);

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its payload.
    pub payload: Vec<u8>,
    /// The file descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// Why no message came, or none could be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionError {
    /// The socket failed.
    #[error("{call}: {reason}")]
    Socket {
        /// The call.
        call: &'static str,
        /// What it said.
        reason: Errno,
    },
    /// The other side is gone.
    #[error("the other side closed the connection")]
    Closed,
    /// The other side is gone in the middle of a message.
    #[error("the connection was closed {have} bytes into a message of {expected}")]
    Truncated {
        /// Bytes that came.
        have: usize,
        /// Bytes that were to come.
        expected: usize,
    },
    /// A header that no message has.
    #[error("request {request}: version {version} of the protocol, expected {VERSION}")]
    Version {
        /// The request.
        request: u32,
        /// What came.
        version: u32,
    },
    /// A payload that no message has.
    #[error("request {request}: {size} bytes of payload, expected at most {PAYLOAD_MAX}")]
    TooLong {
        /// The request.
        request: u32,
        /// What was announced.
        size: u32,
    },
    /// More file descriptors than any message has.
    #[error("more than {FDS_MAX} file descriptors came with a message")]
    TooManyDescriptors,
    /// File descriptors that this process may not have: it has as many as it is allowed to.
    #[error("of the file descriptors of a message this process had room for {got} only (RLIMIT_NOFILE)")]
    NoRoom {
        /// What came.
        got: usize,
    },
    /// A file descriptor that carries no messages.
    #[error("a file descriptor that is no stream socket of this machine")]
    NotASocket,
    /// The other side takes no messages.
    #[error("the other side took no message for {0:?}")]
    Stuck(Duration),
    /// The other side did not answer.
    #[error("the other side sent nothing for {0:?}")]
    Silent(Duration),
}

/// A connection. What came of the next message so far is kept, so nobody waits in the middle of one.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Connection {
    /// Takes over `socket`.
    ///
    /// Nothing here waits in the kernel, whatever the socket's flags say: they belong to the other side, too, if it was
    /// the one who made this end.
    pub fn new(socket: UnixStream) -> Result<Self, ConnectionError> {
        let stream = getsockopt(&socket, SockType).is_ok_and(|kind| kind == nix::sys::socket::SockType::Stream);
        if !stream || socket.local_addr().is_err() {
            return Err(ConnectionError::NotASocket);
        }
        Ok(Self { socket, bytes: Vec::new(), fds: Vec::new() })
    }

    /// The next message, if all of it is there.
    pub fn receive(&mut self) -> Result<Option<Message>, ConnectionError> {
        loop {
            let expected = match self.header()? {
                None => HEADER_LEN,
                Some(header) => {
                    let all = HEADER_LEN + header.size as usize;
                    if self.bytes.len() == all {
                        let payload = self.bytes.split_off(HEADER_LEN);
                        self.bytes.clear();
                        return Ok(Some(Message { header, payload, fds: std::mem::take(&mut self.fds) }));
                    }
                    all
                }
            };
            match self.read(expected - self.bytes.len())? {
                Ok(0) if self.bytes.is_empty() => return Err(ConnectionError::Closed),
                Ok(0) => return Err(ConnectionError::Truncated { have: self.bytes.len(), expected }),
                Ok(_) if self.fds.len() > FDS_MAX => return Err(ConnectionError::TooManyDescriptors),
                Ok(_) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Err(ConnectionError::Closed),
                Err(reason) => return Err(ConnectionError::Socket { call: "recvmsg", reason }),
            }
        }
    }

    /// Waits for a message for at most `watchdog`.
    pub fn wait(&mut self, watchdog: Duration) -> Result<Message, ConnectionError> {
        let begun = Instant::now();
        loop {
            if let Some(message) = self.receive()? {
                return Ok(message);
            }
            let left = watchdog.saturating_sub(begun.elapsed());
            if left.is_zero() || !ready(self.socket.as_fd(), PollFlags::POLLIN, left)? {
                return Err(ConnectionError::Silent(watchdog));
            }
        }
    }

    /// The header, if it is there and is one.
    fn header(&self) -> Result<Option<Header>, ConnectionError> {
        if self.bytes.len() < HEADER_LEN {
            return Ok(None);
        }
        let header = Header::from_bytes(&self.bytes);
        let Header { request, flags, size } = header;
        if flags & VERSION_MASK != VERSION {
            return Err(ConnectionError::Version { request, version: flags & VERSION_MASK });
        }
        if size as usize > PAYLOAD_MAX {
            return Err(ConnectionError::TooLong { request, size });
        }
        Ok(Some(header))
    }

    /// Reads at most `len` bytes, so never a part of the message after this one, and whatever comes with them.
    fn read(&mut self, len: usize) -> Result<Result<usize, Errno>, ConnectionError> {
        let mut piece = [0u8; HEADER_LEN + PAYLOAD_MAX];
        let mut part = libc::iovec { iov_base: piece.as_mut_ptr().cast(), iov_len: len.min(piece.len()) };
        let mut control = [0u64; CONTROL_LEN.div_ceil(size_of::<u64>())];
        // SAFETY: a header of zeroes says that there is nothing.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        (header.msg_iov, header.msg_iovlen) = (&mut part, 1);
        (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), CONTROL_LEN as _);
        let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
        // SAFETY: what the header names is there until the call returns, and as long as it says.
        let received = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut header, flags) };
        let count = match Errno::result(received) {
            Ok(count) => count as usize,
            Err(reason) => return Ok(Err(reason)),
        };
        let before = self.fds.len();
        // SAFETY: the kernel has filled the header in; these look at what it names, which is still there. It has just made
        // the descriptors for us, and nobody else knows them.
        unsafe {
            let mut next = libc::CMSG_FIRSTHDR(&header);
            while let Some(message) = next.as_ref() {
                if (message.cmsg_level, message.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                    #[allow(clippy::unnecessary_cast, reason = "its type is not the same with each C library")]
                    let len = message.cmsg_len as usize;
                    let bytes = len.saturating_sub(libc::CMSG_LEN(0) as usize);
                    let first = libc::CMSG_DATA(next).cast::<RawFd>();
                    let fds = (0..bytes / size_of::<RawFd>()).map(|at| first.add(at).read_unaligned());
                    self.fds.extend(fds.map(|fd| OwnedFd::from_raw_fd(fd)));
                }
                next = libc::CMSG_NXTHDR(&header, next);
            }
        }
        if header.msg_flags & libc::MSG_CTRUNC != 0 {
            return Err(match self.fds.len() - before {
                FDS_MAX => ConnectionError::TooManyDescriptors,
                _ => ConnectionError::NoRoom { got: self.fds.len() },
            });
        }
        self.bytes.extend_from_slice(&piece[..count]);
        Ok(Ok(count))
    }

    /// Sends a message with `fds`.
    pub fn send(
        &self,
        request: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        let begun = Instant::now();
        let header = Header { request, flags: flags | VERSION, size: payload.len() as u32 };
        let bytes = [&header.to_bytes(), payload].concat();
        let mut sent = 0;
        while sent < bytes.len() {
            match self.write(&bytes[sent..], if sent == 0 { fds } else { &[] }) {
                Ok(count) => sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let left = SEND_WATCHDOG.saturating_sub(begun.elapsed());
                    if left.is_zero() || !ready(self.socket.as_fd(), PollFlags::POLLOUT, left)? {
                        return Err(ConnectionError::Stuck(SEND_WATCHDOG));
                    }
                }
                Err(reason) => return Err(send_failed(reason)),
            }
        }
        Ok(())
    }

    /// Sends a message without file descriptors, if there is room for all of it now.
    pub fn try_send(&self, request: u32, flags: u32, payload: &[u8]) -> Result<bool, ConnectionError> {
        let header = Header { request, flags: flags | VERSION, size: payload.len() as u32 };
        // A stream socket takes all of so few bytes or nothing.
        match self.write(&[&header.to_bytes(), payload].concat(), &[]) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
            Err(reason) => Err(send_failed(reason)),
        }
    }

    fn write(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn send_failed(reason: Errno) -> ConnectionError {
    match reason {
        Errno::EPIPE | Errno::ECONNRESET => ConnectionError::Closed,
        reason => ConnectionError::Socket { call: "sendmsg", reason },
    }
}

/// Waits until `fd` is ready for `what`, at most `watchdog`.
fn ready(fd: BorrowedFd<'_>, what: PollFlags, watchdog: Duration) -> Result<bool, ConnectionError> {
    // Rounded up, so that waiting does not turn into spinning at the end.
    let milliseconds = watchdog.as_millis().saturating_add(1).min(i32::MAX as u128) as i32;
    let timeout = PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(fd, what)], timeout) {
        Ok(count) => Ok(count > 0),
        Err(Errno::EINTR) => Ok(true),
        Err(reason) => Err(ConnectionError::Socket { call: "poll", reason }),
    }
}
