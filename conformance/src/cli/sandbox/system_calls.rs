//! The system calls of a served device. Any other is answered as by a kernel that does not have it (ENOSYS): nothing
//! happens, and libraries take another way. To end the process instead would take the guest's disk away for a call that a
//! new version of a library tries first.

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use nix::libc::*;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Calls that may have any arguments: most are about what the process holds already.
const ANY: &[c_long] = &[
    // Bytes of files, sockets, events.
    SYS_read,
    SYS_readv,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_write,
    SYS_writev,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_lseek,
    SYS_fsync,
    SYS_fdatasync,
    SYS_fallocate,
    SYS_ftruncate,
    SYS_close,
    SYS_dup,
    // The same without waiting, of what is held, too.
    SYS_io_setup,
    SYS_io_submit,
    SYS_io_getevents,
    SYS_io_destroy,
    // Front ends, and the descriptors that they hand over.
    SYS_accept4,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendto,
    SYS_sendmsg,
    SYS_shutdown,
    SYS_getsockname,
    SYS_getpeername,
    SYS_getsockopt,
    SYS_setsockopt,
    SYS_eventfd2,
    SYS_pipe2,
    SYS_memfd_create,
    // Waiting.
    SYS_ppoll,
    SYS_pselect6,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_epoll_pwait2,
    SYS_futex,
    SYS_nanosleep,
    SYS_clock_nanosleep,
    SYS_clock_gettime,
    SYS_clock_getres,
    SYS_gettimeofday,
    SYS_timerfd_create,
    SYS_timerfd_settime,
    SYS_restart_syscall,
    SYS_sched_yield,
    // Memory, threads, signals of its own.
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_membarrier,
    SYS_brk,
    SYS_set_robust_list,
    SYS_rseq,
    SYS_sigaltstack,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_getaffinity,
    SYS_getpid,
    SYS_gettid,
    SYS_getrandom,
    SYS_exit,
    SYS_exit_group,
];

/// The older names of some of them, which only this architecture still has.
#[cfg(target_arch = "x86_64")]
const OLDER: &[c_long] = &[SYS_fstat, SYS_poll, SYS_select, SYS_epoll_wait];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[c_long] = &[SYS_fstat];

/// What may be done to a descriptor: nothing that sends signals or leaves.
const FCNTL: &[c_int] =
    &[F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_ADD_SEALS, F_GET_SEALS, F_OFD_GETLK, F_OFD_SETLK];

/// Block devices (`linux/fs.h`) and sockets.
const IOCTL: &[u32] = &[
    0x1260,      // BLKGETSIZE
    0x1268,      // BLKSSZGET
    0x1277,      // BLKDISCARD
    0x1278,      // BLKIOMIN
    0x1279,      // BLKIOOPT
    0x127a,      // BLKALIGNOFF
    0x127b,      // BLKPBSZGET
    0x127f,      // BLKZEROOUT
    0x8008_1272, // BLKGETSIZE64
    FIONBIO as u32,
    FIONREAD as u32,
];

/// Puts the list on. If it cannot be, because there is no such thing here, a sentence says so.
pub(super) fn restrict() -> Result<Option<&'static str>, super::SandboxError> {
    let Ok(architecture) = TargetArch::try_from(ARCH) else {
        return Ok(Some("there is no list of system calls for this architecture: the sandbox goes without it"));
    };
    match seccompiler::apply_filter(&list(architecture)?) {
        Ok(()) => Ok(None),
        Err(seccompiler::Error::Seccomp(error)) if matches!(error.raw_os_error(), Some(EINVAL | ENOSYS)) => {
            Ok(Some("this kernel has no seccomp filters: the sandbox goes without them"))
        }
        Err(error) => Err(error.into()),
    }
}

fn list(architecture: TargetArch) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ANY.iter().chain(OLDER).map(|&call| (call, Vec::new())).collect();
    let mut only = |call: c_long, argument: u8, operator: SeccompCmpOp, value: u64| -> Result<(), BackendError> {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
        rules.entry(call).or_default().push(SeccompRule::new(vec![condition])?);
        Ok(())
    };
    for &command in FCNTL {
        only(SYS_fcntl, 1, SeccompCmpOp::Eq, command as u64)?;
    }
    for &command in IOCTL {
        only(SYS_ioctl, 1, SeccompCmpOp::Eq, command.into())?;
    }
    // Nothing that is written can be run.
    for call in [SYS_mmap, SYS_mprotect] {
        only(call, 2, SeccompCmpOp::MaskedEq(PROT_EXEC as u64), 0)?;
    }
    // Threads, not processes; the newer clone3 has its flags where no filter sees them.
    only(SYS_clone, 0, SeccompCmpOp::MaskedEq(CLONE_THREAD as u64), CLONE_THREAD as u64)?;
    only(SYS_prctl, 0, SeccompCmpOp::Eq, PR_SET_NAME as u64)?;
    // Of what is open, not of paths.
    let itself = AT_EMPTY_PATH as u64;
    only(SYS_newfstatat, 3, SeccompCmpOp::MaskedEq(itself), itself)?;
    only(SYS_statx, 2, SeccompCmpOp::MaskedEq(itself), itself)?;
    // Aborting.
    only(SYS_tgkill, 0, SeccompCmpOp::Eq, std::process::id().into())?;
    SeccompFilter::new(rules, SeccompAction::Errno(ENOSYS as u32), SeccompAction::Allow, architecture)?.try_into()
}
