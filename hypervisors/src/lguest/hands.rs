//! The guest: a child process that has nothing but the memory it shares with the launcher, and the payload that it
//! runs. It does what the mailbox tells it, takes interrupts, and halts.
//!
//! Its linear address of a guest-physical address is that plus the base of the mapping, the same as the launcher's.
#![allow(unsafe_code)]

use std::arch::global_asm;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc::{self, user_regs_struct};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid};
use polyvirt_core::memory::Pages;

use super::abi::{
    FIRST_EXTERNAL_VECTOR, LGUEST_IRQS, LHCALL_HALT, LHCALL_LGUEST_INIT, LHCALL_LOAD_IDT_ENTRY, X86_EFLAGS_IF,
};

/// Pages at the bottom of RAM that belong to the payload: its code, its data, its stack.
pub(super) const PAGES: u64 = 3;
/// Guest-physical address of the payload's `lguest_data`.
pub(super) const LGUEST_DATA: u64 = 0x1000;
/// Guest-physical address of the mailbox's command: a u32, 0 when there is nothing to do, [`CALL`] otherwise.
pub(super) const COMMAND: u64 = 0x1800;
/// Guest-physical address of the hypercall to make: eax, edx, ebx, ecx, a u64 each. Its result replaces eax.
pub(super) const CALL_REGISTERS: u64 = 0x1808;
/// Guest-physical address of a u32 for each line: how many of its interrupts were taken.
pub(super) const TAKEN: u64 = 0x1900;
/// The command: make the hypercall.
pub(super) const CALL: u32 = 1;

const STACK_TOP: u64 = PAGES * 0x1000;
/// `int $0x1f`.
const INT_1F: [u8; 2] = [0xcd, 0x1f];

global_asm!(
    // In read-only data: this process never runs it where it stands.
    ".pushsection .rodata",
    ".balign 16",
    "polyvirt_lguest_payload:",
    // For the launcher, while it takes everything else away: one system call.
    "syscall",
    "int3",
    // The entry.
    "2:",
    "lea r15, [rip + polyvirt_lguest_payload]",
    "mov eax, {init}",
    "mov edx, {lguest_data}",
    "int 0x1f",
    "xor ebp, ebp",
    "3:",
    "mov eax, {load_idt_entry}",
    "lea edx, [rbp + {first_vector}]",
    "lea rbx, [rip + 6f]",
    "sub rbx, r15",
    "lea ebx, [rbx + rbp * 8]",
    "mov ecx, 0x8e00",
    "int 0x1f",
    "inc ebp",
    "cmp ebp, {lines}",
    "jb 3b",
    "mov dword ptr [r15 + {lguest_data}], 512",
    // The idle loop: a command, then rest.
    "4:",
    "cmp dword ptr [r15 + {command}], {call}",
    "jne 5f",
    "mov rax, [r15 + {registers}]",
    "mov rdx, [r15 + {registers} + 8]",
    "mov rbx, [r15 + {registers} + 16]",
    "mov rcx, [r15 + {registers} + 24]",
    "int 0x1f",
    "mov [r15 + {registers}], rax",
    "mov dword ptr [r15 + {command}], 0",
    "5:",
    "mov eax, {halt}",
    "int 0x1f",
    "jmp 4b",
    // The interrupt handlers: one for each line, eight bytes long, which leaves its number on the stack.
    ".balign 8",
    "6:",
    ".set polyvirt_lguest_line, 0",
    ".rept {lines}",
    // push, in the encoding of two bytes
    ".byte 0x6a, polyvirt_lguest_line",
    "jmp 7f",
    ".balign 8",
    ".set polyvirt_lguest_line, polyvirt_lguest_line + 1",
    ".endr",
    "7:",
    "xchg rax, [rsp]",
    "inc dword ptr [r15 + rax * 4 + {taken}]",
    "pop rax",
    "mov dword ptr [r15 + {lguest_data}], 512",
    "iretq",
    "polyvirt_lguest_payload_end:",
    ".popsection",
    init = const LHCALL_LGUEST_INIT,
    load_idt_entry = const LHCALL_LOAD_IDT_ENTRY,
    halt = const LHCALL_HALT,
    first_vector = const FIRST_EXTERNAL_VECTOR,
    lines = const LGUEST_IRQS,
    lguest_data = const LGUEST_DATA,
    command = const COMMAND,
    registers = const CALL_REGISTERS,
    taken = const TAKEN,
    call = const CALL,
);

unsafe extern "C" {
    static polyvirt_lguest_payload: u8;
    static polyvirt_lguest_payload_end: u8;
}

/// Where the payload starts, after the three bytes `syscall; int3`.
const ENTRY: u64 = 3;

/// A hypercall: eax, and edx, ebx, ecx.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) number: u64,
    pub(super) arguments: [u64; 3],
}

/// The child, as the thread that traces it sees it. It is stopped unless [`Child::run`] is running, and dies with this.
pub(super) struct Child {
    pid: Pid,
    memory: Pages,
    registers: user_regs_struct,
    reaped: bool,
}

impl Child {
    /// Starts a guest in `memory` (from guest-physical 0, [`PAGES`] at least); it is stopped before its first
    /// instruction. Whoever calls this traces it: all methods are for the same thread.
    ///
    /// On an error, a sentence says what was refused.
    pub(super) fn spawn(memory: &Pages) -> Result<Self, String> {
        // SAFETY: both symbols are in one section, in this order, and delimit the payload.
        let payload = unsafe {
            let start = &raw const polyvirt_lguest_payload;
            let len = (&raw const polyvirt_lguest_payload_end).offset_from_unsigned(start);
            std::slice::from_raw_parts(start, len)
        };
        memory.write(0, payload).map_err(|error| format!("the payload does not fit the guest's memory: {error}"))?;
        let launcher = getpid();
        // SAFETY: the child makes system calls only, which are safe after a fork whatever other threads hold.
        let pid = match unsafe { fork() }.map_err(|error| format!("fork was refused: {error}"))? {
            ForkResult::Child => become_guest(launcher, memory),
            ForkResult::Parent { child } => child,
        };
        // SAFETY: all-zero registers are registers.
        let registers = unsafe { std::mem::zeroed() };
        let mut child = Self { pid, memory: memory.clone(), registers, reaped: false };
        match child.wait()? {
            WaitStatus::Stopped(_, Signal::SIGSTOP) => {}
            WaitStatus::Exited(_, code) => {
                child.reaped = true;
                return Err(format!("the child could not become a guest: {}", STEPS[code.clamp(0, 4) as usize]));
            }
            other => return Err(format!("expected the child to stop, got {other:?}")),
        }
        let options = Options::PTRACE_O_EXITKILL | Options::PTRACE_O_TRACESYSGOOD;
        ptrace::setoptions(pid, options).map_err(|error| format!("ptrace was refused: {error}"))?;
        child.strip()?;
        child.registers = user_regs_struct {
            rip: child.base() + ENTRY,
            rsp: child.base() + STACK_TOP,
            eflags: 0x202,
            cs: child.registers.cs,
            ss: child.registers.ss,
            orig_rax: u64::MAX,
            // SAFETY: all-zero registers are registers. Nothing of the launcher's is left in them.
            ..unsafe { std::mem::zeroed() }
        };
        Ok(child)
    }

    /// A descriptor that is readable once the child is dead, and by which it can be killed from any thread.
    pub(super) fn pidfd(&self) -> Result<OwnedFd, String> {
        // SAFETY: the call takes no pointer.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid.as_raw(), 0) };
        let fd = Errno::result(fd).map_err(|error| format!("pidfd_open was refused: {error}"))?;
        // SAFETY: the descriptor is new, and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// The process.
    pub(super) fn id(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Runs the guest until its next hypercall. On an error it did something else, and a sentence says what.
    pub(super) fn run(&mut self) -> Result<Call, String> {
        // A guest that is dead already shows in what `wait` returns.
        let resumed = ptrace::setregs(self.pid, self.registers).and_then(|()| ptrace::sysemu(self.pid, None));
        if let Err(error) = resumed
            && error != Errno::ESRCH
        {
            return Err(format!("it cannot be resumed: {error}"));
        }
        loop {
            let signal = match self.wait()? {
                WaitStatus::Stopped(_, signal) => signal,
                WaitStatus::PtraceSyscall(_) => {
                    let number = self.registers()?.orig_rax;
                    return Err(format!("it made system call {number}, which it must not"));
                }
                ended => return Err(self.ended(ended)),
            };
            match signal {
                Signal::SIGSEGV | Signal::SIGILL | Signal::SIGBUS | Signal::SIGFPE | Signal::SIGTRAP => {
                    self.registers = self.registers()?;
                    return self.call().ok_or_else(|| {
                        let at = self.registers.rip.wrapping_sub(self.base());
                        format!("it faulted at {at:#x} ({signal})")
                    });
                }
                // Signals from outside are not the guest's business.
                _ => ptrace::sysemu(self.pid, None).map_err(|error| format!("it cannot be resumed: {error}"))?,
            }
        }
    }

    /// What became of a child that is dead.
    pub(super) fn reap(&mut self) -> String {
        match self.wait() {
            Ok(status) => self.ended(status),
            Err(reason) => reason,
        }
    }

    /// Answers the hypercall that [`Child::run`] returned.
    pub(super) fn answer(&mut self, result: u64) {
        self.registers.rax = result;
    }

    /// Makes the guest enter `handler` (guest-physical) when it runs next, with a frame of the processor's kind on its
    /// stack: rip, cs, flags (with the interrupt flag as in `flags`), rsp, ss.
    pub(super) fn interrupt(&mut self, handler: u64, flags: u32) -> Result<(), String> {
        let registers = &mut self.registers;
        let flags = registers.eflags & !u64::from(X86_EFLAGS_IF) | u64::from(flags);
        let frame = [registers.rip, registers.cs, flags, registers.rsp, registers.ss];
        let stack = (registers.rsp & !15).wrapping_sub(size_of_val(&frame) as u64);
        let bytes: Vec<u8> = frame.iter().flat_map(|word| word.to_le_bytes()).collect();
        let base = self.memory.as_ptr().addr() as u64;
        (registers.rip, registers.rsp) = (base.wrapping_add(handler), stack);
        let written = usize::try_from(stack.wrapping_sub(base)).map(|offset| self.memory.write(offset, &bytes));
        match written {
            Ok(Ok(())) => Ok(()),
            _ => Err(format!("its stack pointer {stack:#x} leaves no room for an interrupt")),
        }
    }

    fn base(&self) -> u64 {
        self.memory.as_ptr().addr() as u64
    }

    /// The hypercall at which the guest stands, if it does; it goes on after it.
    fn call(&mut self) -> Option<Call> {
        let mut bytes = [0; INT_1F.len()];
        let offset = usize::try_from(self.registers.rip.wrapping_sub(self.base())).ok()?;
        self.memory.read(offset, &mut bytes).ok()?;
        if bytes != INT_1F {
            return None;
        }
        let registers = &mut self.registers;
        registers.rip += bytes.len() as u64;
        registers.orig_rax = u64::MAX;
        Some(Call { number: registers.rax, arguments: [registers.rdx, registers.rbx, registers.rcx] })
    }

    fn registers(&self) -> Result<user_regs_struct, String> {
        ptrace::getregs(self.pid).map_err(|error| format!("its registers cannot be read: {error}"))
    }

    fn wait(&self) -> Result<WaitStatus, String> {
        loop {
            match waitpid(self.pid, Some(WaitPidFlag::__WALL)) {
                Err(Errno::EINTR) => {}
                other => return other.map_err(|error| format!("it cannot be waited for: {error}")),
            }
        }
    }

    fn ended(&mut self, status: WaitStatus) -> String {
        self.reaped = matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..));
        match status {
            WaitStatus::Exited(_, code) => format!("it exited with code {code}"),
            WaitStatus::Signaled(_, signal, _) => format!("it was killed by {signal}"),
            other => format!("it stopped for an unknown reason: {other:?}"),
        }
    }

    /// Takes away all memory but the guest's. From here on the child has no code but the payload's.
    fn strip(&mut self) -> Result<(), String> {
        self.registers = self.registers()?;
        if let Some(rseq) = self.rseq()? {
            // The kernel writes to this area on its own, and kills a process that has lost it.
            let unregister = 1;
            let arguments = [rseq.pointer, rseq.size.into(), unregister, rseq.signature.into()];
            self.system_call("rseq", libc::SYS_rseq, arguments)?;
        }
        let (start, end) = (self.base(), self.base() + self.memory.len() as u64);
        self.system_call("munmap", libc::SYS_munmap, [0, start, 0, 0])?;
        self.system_call("munmap", libc::SYS_munmap, [end, END_OF_USER_MEMORY - end, 0, 0])
    }

    /// Has the child make a system call.
    fn system_call(&mut self, name: &str, number: i64, arguments: [u64; 4]) -> Result<(), String> {
        let [rdi, rsi, rdx, r10] = arguments;
        let (rip, rax, orig_rax) = (self.base(), number as u64, u64::MAX);
        let registers = user_regs_struct { rip, rax, orig_rax, rdi, rsi, rdx, r10, ..self.registers };
        ptrace::setregs(self.pid, registers)
            .and_then(|()| ptrace::cont(self.pid, None))
            .map_err(|error| format!("ptrace was refused: {error}"))?;
        let status = self.wait()?;
        if !matches!(status, WaitStatus::Stopped(_, Signal::SIGTRAP)) {
            return Err(format!("{name} in the child: {}", self.ended(status)));
        }
        match self.registers()?.rax as i64 {
            0 => Ok(()),
            error => Err(format!("{name} in the child: {}", Errno::from_raw(-error as i32))),
        }
    }

    fn rseq(&self) -> Result<Option<RseqConfiguration>, String> {
        let mut rseq = RseqConfiguration::default();
        let size = size_of_val(&rseq);
        // SAFETY: the kernel fills at most `size` bytes of `rseq`, which are all integers.
        let got = unsafe { libc::ptrace(PTRACE_GET_RSEQ_CONFIGURATION, self.pid.as_raw(), size, &raw mut rseq) };
        Errno::result(got).map_err(|error| format!("ptrace tells nothing about rseq (Linux 5.13 does): {error}"))?;
        Ok((rseq.pointer != 0).then_some(rseq))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        // SIGKILL ends a traced process in any state; until it is waited for, its id is nobody else's.
        let killed = nix::sys::signal::kill(self.pid, Signal::SIGKILL).is_ok();
        while killed && !matches!(self.wait(), Err(_) | Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..))) {}
    }
}

/// Kills the process of `pidfd`; one that is dead already stays so.
pub(super) fn kill(pidfd: &OwnedFd) {
    let (signal, info, flags) = (libc::SIGKILL, std::ptr::null::<libc::siginfo_t>(), 0);
    // SAFETY: no signal information is passed.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, info, flags) };
}

/// The end of what a process maps unless it asks for more (47 bits, less a guard page).
const END_OF_USER_MEMORY: u64 = 0x7fff_ffff_f000;

const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;

/// `struct ptrace_rseq_configuration` (include/uapi/linux/ptrace.h).
#[repr(C)]
#[derive(Default)]
struct RseqConfiguration {
    pointer: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

/// What [`become_guest`] did when it failed, by exit code.
const STEPS: [&str; 5] = [
    "it ended early",
    "its launcher died",
    "its descriptors could not be closed (close_range, Linux 5.9)",
    "its memory could not be made executable",
    "ptrace was refused",
];

/// The child's first steps, up to the stop in which the launcher takes over.
fn become_guest(launcher: Pid, memory: &Pages) -> ! {
    let access = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    // SAFETY: plain system calls, on nothing but the shared mapping; nothing here allocates or takes a lock.
    unsafe {
        let died = libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 || libc::getppid() != launcher.as_raw();
        let failed = if died {
            1
        } else if libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) != 0 {
            2
        } else if libc::mprotect(memory.as_ptr().cast(), memory.len(), access) != 0 {
            3
        } else if ptrace::traceme().is_err() {
            4
        } else {
            libc::raise(libc::SIGSTOP);
            0
        };
        libc::_exit(failed)
    }
}
