//! Signalling an eventfd without ever waiting.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc::{self, c_long};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::pipe2;

/// Asynchronous requests (`io_submit`) whose only purpose is their end: the kernel signals an eventfd then, without waiting.
pub(super) struct Signals {
    context: libc::c_ulong,
    /// Always readable: to poll it ends at once.
    ready: EventFd,
    /// Cannot be read: to read it fails, once the kernel has looked at the eventfd.
    write_only: OwnedFd,
    /// Requests whose results were not fetched.
    ended: Mutex<usize>,
}

/// How many requests there is room for.
const REQUESTS: usize = 64;

/// A request (`struct iocb`).
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key: u64,
    operation: u16,
    priority: u16,
    file: u32,
    /// What to poll for.
    buffer: u64,
    bytes: u64,
    offset: u64,
    reserved: u64,
    flags: u32,
    /// What is signalled.
    event: u32,
}

impl Request {
    const READ: u16 = 0;
    const POLL: u16 = 5;
    /// In [`Request::flags`]: there is something to be signalled.
    const SIGNAL: u32 = 1;
}

impl Signals {
    /// Those of this process; none where the kernel has no such requests.
    pub(super) fn get() -> Option<&'static Self> {
        static SIGNALS: OnceLock<Option<Signals>> = OnceLock::new();
        let signals = SIGNALS.get_or_init(|| Self::new().inspect_err(|error| tracing::info!(%error, "io_setup")).ok());
        signals.as_ref()
    }

    fn new() -> Result<Self, Errno> {
        let ready = EventFd::from_value_and_flags(1, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let write_only = pipe2(OFlag::O_CLOEXEC)?.1;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one number.
        Errno::result(unsafe { libc::syscall(libc::SYS_io_setup, REQUESTS as c_long, &mut context) })?;
        Ok(Self { context, ready, write_only, ended: Mutex::new(0) })
    }

    /// Whether `fd` is an eventfd.
    pub(super) fn knows(&self, fd: BorrowedFd<'_>) -> Result<bool, Errno> {
        match self.submit(Request::READ, self.write_only.as_fd(), fd) {
            Err(Errno::EBADF) => Ok(true),
            Err(Errno::EINVAL) | Ok(()) => Ok(false),
            Err(reason) => Err(reason),
        }
    }

    pub(super) fn signal(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        self.submit(Request::POLL, self.ready.as_fd(), fd)?;
        *ended += 1;
        if *ended >= REQUESTS / 2 {
            // What ended, four words each: nobody wants to know.
            let mut results = [[0u64; 4]; REQUESTS];
            let most = REQUESTS as c_long;
            // SAFETY: there is room for as many as the kernel is told. It waits for none.
            let fetched = unsafe {
                let none = std::ptr::null::<libc::timespec>();
                libc::syscall(libc::SYS_io_getevents, self.context, 0 as c_long, most, results.as_mut_ptr(), none)
            };
            *ended -= usize::min(Errno::result(fetched)? as usize, *ended);
        }
        Ok(())
    }

    fn submit(&self, operation: u16, file: BorrowedFd<'_>, event: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut request = Request {
            operation,
            file: file.as_raw_fd() as u32,
            buffer: if operation == Request::POLL { libc::POLLIN as u64 } else { 0 },
            flags: Request::SIGNAL,
            event: event.as_raw_fd() as u32,
            ..Request::default()
        };
        let mut requests: [*mut Request; 1] = [&mut request];
        // SAFETY: the kernel reads one request, writes its key, and keeps nothing of it; no request has memory.
        let submitted = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1 as c_long, requests.as_mut_ptr()) };
        Errno::result(submitted).map(drop)
    }
}
