//! What the kernel module `lg` did below the launcher: hypercalls, interrupt gates, delivery of interrupts. The launcher
//! gets NOTIFYs out of it, and puts interrupts into it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use polyvirt_core::memory::{Pages, Words};

use super::abi::*;
use super::hands::{COMMAND, Call, Child};

pub(super) use super::hands::kill;

/// The longest string that the guest may point to, bytes.
const STRING_LIMIT: u64 = 4096;

/// What the guest did that is the launcher's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Nothing.
    Served,
    /// It waits for an interrupt.
    Halted,
    /// NOTIFY, with this guest-physical address.
    Notify(u64),
}

/// A guest and the state of its one processor. All methods are for the thread that started it.
pub(super) struct Kernel {
    child: Child,
    memory: Pages,
    /// The same.
    words: Words<u32, Arc<dyn std::any::Any + Send + Sync>>,
    ram_end: u64,
    /// Where the guest keeps its `struct lguest_data`, since LGUEST_INIT.
    lguest_data: Option<u64>,
    /// Guest-physical address of the handler of each line.
    gates: [Option<u64>; LGUEST_IRQS as usize],
    halted: bool,
}

impl Kernel {
    /// Starts the guest in `memory`; its RAM ends at `ram_end`.
    pub(super) fn start(memory: &Pages, ram_end: u64) -> Result<Self, String> {
        let words = Words::new(memory.clone()).map_err(|error| error.to_string())?;
        let child = Child::spawn(memory)?;
        let gates = [None; LGUEST_IRQS as usize];
        Ok(Self { child, memory: memory.clone(), words, ram_end, lguest_data: None, gates, halted: false })
    }

    /// The guest's process: its id, and a descriptor for [`kill`].
    pub(super) fn process(&self) -> Result<(i32, OwnedFd), String> {
        Ok((self.child.id(), self.child.pidfd()?))
    }

    pub(super) const fn is_halted(&self) -> bool {
        self.halted
    }

    /// Whether [`Kernel::run`] has something to do: the guest does not wait for an interrupt, or one can be delivered,
    /// or there is a `command` for it.
    pub(super) fn wants_to_run(&self, raised: &AtomicU32, command: bool) -> bool {
        !self.halted || command || self.deliverable(raised) != 0
    }

    /// Whether the mailbox still has a command.
    pub(super) fn has_command(&self) -> bool {
        self.word(COMMAND) != 0
    }

    /// Delivers an interrupt if there is one, runs the guest until its next hypercall, and serves that.
    ///
    /// On an error the guest did what it must not, and a sentence says what.
    pub(super) fn run(&mut self, raised: &AtomicU32) -> Result<Event, String> {
        self.deliver(raised)?;
        self.halted = false;
        let Call { number, arguments: [edx, ebx, ecx] } = self.child.run()?;
        self.child.answer(0);
        match number {
            LHCALL_FLUSH_ASYNC => {}
            LHCALL_LGUEST_INIT => {
                if !edx.is_multiple_of(4) || edx > self.ram_end - LGUEST_DATA_SIZE {
                    return Err(format!("its lguest_data at {edx:#x} is not aligned or not in RAM"));
                }
                self.lguest_data = Some(edx);
            }
            LHCALL_SHUTDOWN => return Err(format!("it shut down: {}", self.string(edx).unwrap_or_default())),
            LHCALL_LOAD_IDT_ENTRY => {
                let line = edx.checked_sub(FIRST_EXTERNAL_VECTOR).and_then(|line| usize::try_from(line).ok());
                if let Some(gate) = line.and_then(|line| self.gates.get_mut(line)) {
                    // Bit 15 of the high half: present (Intel SDM volume 3, 7.11).
                    *gate = (ecx & 0x8000 != 0).then_some(ecx & 0xffff_0000 | ebx & 0xffff);
                }
            }
            LHCALL_HALT => {
                self.halted = true;
                return Ok(Event::Halted);
            }
            LHCALL_NOTIFY => return Ok(Event::Notify(edx)),
            _ => {
                tracing::debug!(number, "the guest made an unknown hypercall");
                self.child.answer(UNKNOWN_CALL);
            }
        }
        Ok(Event::Served)
    }

    /// The zero-terminated string at `address`, at most 4096 bytes of it; none if that is beyond the guest's memory.
    pub(super) fn string(&self, address: u64) -> Option<String> {
        let left = (self.memory.len() as u64).checked_sub(address).filter(|&left| left > 0)?;
        let mut bytes = vec![0; left.min(STRING_LIMIT) as usize];
        self.memory.read(address as usize, &mut bytes).ok()?;
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    /// Why the guest's process is dead.
    pub(super) fn reap(&mut self) -> String {
        self.child.reap()
    }

    /// The lines that the guest takes now.
    fn deliverable(&self, raised: &AtomicU32) -> u32 {
        let Some(data) = self.lguest_data else { return 0 };
        // Whoever halts wants interrupts.
        if !self.halted && self.word(data + IRQ_ENABLED) & X86_EFLAGS_IF == 0 {
            return 0;
        }
        let gates = self.gates.iter().rev().fold(0, |bits, gate| bits << 1 | u32::from(gate.is_some()));
        raised.load(Ordering::SeqCst) & gates & !self.word(data + BLOCKED_INTERRUPTS)
    }

    fn deliver(&mut self, raised: &AtomicU32) -> Result<(), String> {
        let line = self.deliverable(raised).trailing_zeros();
        let (Some(data), Some(&Some(handler))) = (self.lguest_data, self.gates.get(line as usize)) else {
            return Ok(());
        };
        raised.fetch_and(!(1 << line), Ordering::SeqCst);
        let enabled = if self.halted { X86_EFLAGS_IF } else { self.word(data + IRQ_ENABLED) & X86_EFLAGS_IF };
        self.words.store((data + IRQ_ENABLED) as usize / 4, 0u32, Ordering::SeqCst);
        self.child.interrupt(handler, enabled)
    }

    fn word(&self, address: u64) -> u32 {
        self.words.load(address as usize / 4, Ordering::SeqCst)
    }
}
