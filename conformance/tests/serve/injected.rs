//! System calls that a running server is made to do, as by somebody who has taken it over.

#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::Injected;

/// Calls that nobody who took the server over is to have.
pub(crate) const FORBIDDEN: &[(&str, i64)] = &[
    ("openat", nix::libc::SYS_openat),
    ("openat2", nix::libc::SYS_openat2),
    ("open_by_handle_at", nix::libc::SYS_open_by_handle_at),
    ("socket", nix::libc::SYS_socket),
    ("connect", nix::libc::SYS_connect),
    ("execve", nix::libc::SYS_execve),
    ("execveat", nix::libc::SYS_execveat),
    ("clone", nix::libc::SYS_clone),
    ("unshare", nix::libc::SYS_unshare),
    ("mount", nix::libc::SYS_mount),
    ("unlinkat", nix::libc::SYS_unlinkat),
    ("ptrace", nix::libc::SYS_ptrace),
    ("bpf", nix::libc::SYS_bpf),
    ("io_uring_setup", nix::libc::SYS_io_uring_setup),
    ("process_vm_readv", nix::libc::SYS_process_vm_readv),
    ("ioctl", nix::libc::SYS_ioctl),
];

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::ffi::CStr;

    use nix::errno::Errno;
    use nix::libc::{AT_FDCWD, SYS_openat, user_regs_struct};
    use nix::sys::ptrace;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::Pid;

    /// The bytes of the instruction `syscall`.
    const SYSCALL: u16 = 0x050f;

    /// A process that waits in a system call.
    pub(crate) struct Injected {
        pid: Pid,
        before: user_regs_struct,
    }

    impl Injected {
        /// Stops process `id` in the system call that it waits in; none, and why, if that is not allowed.
        pub(crate) fn into(id: u32) -> Option<Self> {
            let pid = Pid::from_raw(id as i32);
            if let Err(error) = ptrace::seize(pid, ptrace::Options::empty()) {
                println!("skipped: what a server that was taken over can do: ptrace: {error}");
                return None;
            }
            ptrace::interrupt(pid).unwrap();
            let stopped = waitpid(pid, None).unwrap();
            assert!(matches!(stopped, WaitStatus::PtraceEvent(..)), "{stopped:?}");
            let before = ptrace::getregs(pid).unwrap();
            let at = ptrace::read(pid, (before.rip - 2) as ptrace::AddressType).unwrap();
            assert_eq!(at as u16, SYSCALL, "it does not wait in a system call");
            Some(Self { pid, before })
        }

        /// Has it do `call`.
        pub(crate) fn call(&mut self, call: i64, arguments: [u64; 6]) -> Result<i64, Errno> {
            let [rdi, rsi, rdx, r10, r8, r9] = arguments;
            let rip = self.before.rip - 2;
            // No call is to be begun again.
            let orig_rax = u64::MAX;
            let rax = call as u64;
            let regs = user_regs_struct { rip, orig_rax, rax, rdi, rsi, rdx, r10, r8, r9, ..self.before };
            ptrace::setregs(self.pid, regs).unwrap();
            ptrace::step(self.pid, None).unwrap();
            let stopped = waitpid(self.pid, None).unwrap();
            assert!(matches!(stopped, WaitStatus::Stopped(_, Signal::SIGTRAP)), "{call}: {stopped:?}");
            match ptrace::getregs(self.pid).unwrap().rax as i64 {
                error @ -4095..0 => Err(Errno::from_raw(-error as i32)),
                value => Ok(value),
            }
        }

        /// Has it open `path`, at most seven bytes, for reading.
        pub(crate) fn open(&mut self, path: &CStr) -> Result<i64, Errno> {
            let mut bytes = [0; 8];
            let path = path.to_bytes_with_nul();
            bytes[..path.len()].copy_from_slice(path);
            // Below what a function may use without saying so.
            let place = self.before.rsp - 4096;
            ptrace::write(self.pid, place as ptrace::AddressType, i64::from_ne_bytes(bytes)).unwrap();
            self.call(SYS_openat, [AT_FDCWD as u64, place, 0, 0, 0, 0])
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) struct Injected;

#[cfg(not(target_arch = "x86_64"))]
impl Injected {
    pub(crate) fn into(_: u32) -> Option<Self> {
        println!("skipped: what a server that was taken over can do: the test knows the registers of x86_64 only");
        None
    }

    pub(crate) fn call(&mut self, _: i64, _: [u64; 6]) -> Result<i64, nix::errno::Errno> {
        Err(nix::errno::Errno::ENOSYS)
    }

    pub(crate) fn open(&mut self, _: &std::ffi::CStr) -> Result<i64, nix::errno::Errno> {
        Err(nix::errno::Errno::ENOSYS)
    }
}
