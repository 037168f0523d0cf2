//! The guest's hands: a payload that carries out one access, or waits for an interrupt, as its mailbox says.
//!
//! It is flat long-mode code at CPL 3 with identity page tables: the one kind of guest code that also runs natively
//! on a KVM that shadows page tables in software. Only interrupts enter CPL 0, for three instructions, and port
//! accesses, for one command.
#![allow(unsafe_code)]

use polyvirt_core::memory::{MemoryError, Pages};

use super::abi::{DONE, FIRST_VECTOR, LINES};

// The layout of the hands' memory, relative to its start.
pub(super) const CODE: u64 = 0;
pub(super) const MAILBOX: u64 = 0x1000;
/// The top-level page table; then come one of the second level and four of the third, for 1 GiB each.
pub(super) const PAGE_TABLES: u64 = 0x2000;
pub(super) const GDT: u64 = 0x8000;
pub(super) const TSS: u64 = 0x8100;
pub(super) const IDT: u64 = 0x9000;
/// The stack on which interrupts arrive grows down from here.
pub(super) const STACK_TOP: u64 = 0xb000;

/// Bytes of the hands' memory.
pub(super) const LEN: usize = STACK_TOP as usize;

// The mailbox: indices of 8-byte words.
const ROUTINE: usize = 0;
const ADDRESS: usize = 1;
const VALUE: usize = 2;
const PENDING: usize = 3;
/// Another one for each command.
const NUMBER: usize = 4;

/// Bytes from one routine, or interrupt handler, to the next.
const STRIDE: u64 = 16;

pub(super) const CODE_CPL0: u16 = 0x08;
pub(super) const DATA_CPL3: u16 = 0x10 | 3;
pub(super) const CODE_CPL3: u16 = 0x18 | 3;
/// Not in the GDT: the task register is loaded from outside.
pub(super) const TSS_SELECTOR: u16 = 0x20;

pub(super) const GDT_LIMIT: u16 = 4 * 8 - 1;
pub(super) const IDT_LIMIT: u16 = 256 * 16 - 1;
pub(super) const TSS_LIMIT: u32 = 104 - 1;

// r14 is the mailbox and r15 the EOI register of the local APIC, always; r13 is the number of the command.
//
// An access that a device answers leaves the guest, and the host knows all about it then: it may give the next command at
// once. The hands find that when they go on, and do not leave the guest a second time to say that they are done.
core::arch::global_asm!(
    r#"
    .pushsection .rodata.polyvirt_kvm_hands, "a"
    .globl polyvirt_kvm_hands, polyvirt_kvm_routines, polyvirt_kvm_handlers, polyvirt_kvm_hands_end
    .hidden polyvirt_kvm_hands, polyvirt_kvm_routines, polyvirt_kvm_handlers, polyvirt_kvm_hands_end
    .balign {stride}
polyvirt_kvm_hands:
.Lpolyvirt_next:
    mov r13, [r14 + 8 * {NUMBER}]
    mov rcx, [r14 + 8 * {ROUTINE}]
    mov rsi, [r14 + 8 * {ADDRESS}]
    mov rax, [r14 + 8 * {VALUE}]
    jmp rcx

    .balign {stride}
polyvirt_kvm_routines:
    # load 1, 2, 4, 8 bytes
    movzx eax, byte ptr [rsi]
    jmp .Lpolyvirt_done
    .balign {stride}
    movzx eax, word ptr [rsi]
    jmp .Lpolyvirt_done
    .balign {stride}
    mov eax, dword ptr [rsi]
    jmp .Lpolyvirt_done
    .balign {stride}
    mov rax, qword ptr [rsi]
    jmp .Lpolyvirt_done

    # store 1, 2, 4, 8 bytes
    .balign {stride}
    mov byte ptr [rsi], al
    jmp .Lpolyvirt_done
    .balign {stride}
    mov word ptr [rsi], ax
    jmp .Lpolyvirt_done
    .balign {stride}
    mov dword ptr [rsi], eax
    jmp .Lpolyvirt_done
    .balign {stride}
    mov qword ptr [rsi], rax
    jmp .Lpolyvirt_done

    # read 1, 2, 4 bytes from a port
    .balign {stride}
    mov edx, esi
    in al, dx
    movzx eax, al
    jmp .Lpolyvirt_done
    .balign {stride}
    mov edx, esi
    in ax, dx
    movzx eax, ax
    jmp .Lpolyvirt_done
    .balign {stride}
    mov edx, esi
    in eax, dx
    jmp .Lpolyvirt_done

    # write 1, 2, 4 bytes to a port
    .balign {stride}
    mov edx, esi
    out dx, al
    jmp .Lpolyvirt_done
    .balign {stride}
    mov edx, esi
    out dx, ax
    jmp .Lpolyvirt_done
    .balign {stride}
    mov edx, esi
    out dx, eax
    jmp .Lpolyvirt_done

    # wait for one of the lines in rax, at most rsi rounds
    .balign {stride}
.Lpolyvirt_wait:
    test qword ptr [r14 + 8 * {PENDING}], rax
    jnz .Lpolyvirt_done
    pause
    dec rsi
    jnz .Lpolyvirt_wait

.Lpolyvirt_done:
    cmp r13, [r14 + 8 * {NUMBER}]
    jne .Lpolyvirt_next
    mov [r14 + 8 * {VALUE}], rax
    mov ecx, {done}
    mov dword ptr [rcx], eax
    jmp .Lpolyvirt_next

    # The interrupt handlers, one per line: note the line, tell the APIC, go back. No register is touched.
    .balign {stride}
polyvirt_kvm_handlers:
    .set polyvirt_line, 0
    .rept {lines}
    .balign {stride}
    bts qword ptr [r14 + 8 * {PENDING}], polyvirt_line
    mov dword ptr [r15], 0
    iretq
    .set polyvirt_line, polyvirt_line + 1
    .endr
polyvirt_kvm_hands_end:
    .popsection
    "#,
    ROUTINE = const ROUTINE,
    ADDRESS = const ADDRESS,
    VALUE = const VALUE,
    PENDING = const PENDING,
    NUMBER = const NUMBER,
    stride = const STRIDE,
    done = const DONE,
    lines = const LINES,
);

unsafe extern "C" {
    #[link_name = "polyvirt_kvm_hands"]
    static HANDS_START: u8;
    #[link_name = "polyvirt_kvm_routines"]
    static ROUTINES: u8;
    #[link_name = "polyvirt_kvm_handlers"]
    static HANDLERS: u8;
    #[link_name = "polyvirt_kvm_hands_end"]
    static HANDS_STOP: u8;
}

/// What the hands can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Loads 1 << n bytes.
    Load(u32),
    /// Stores 1 << n bytes.
    Store(u32),
    /// Reads 1 << n bytes from a port, at most 4.
    Input(u32),
    /// Writes 1 << n bytes to a port, at most 4.
    Output(u32),
    /// Spins until an interrupt is pending, for a bounded number of rounds.
    Wait,
}

impl Command {
    /// Where its routine is in the hands' memory.
    fn routine(self) -> u64 {
        let index = match self {
            Self::Load(width) => width,
            Self::Store(width) => 4 + width,
            Self::Input(width) => 8 + width,
            Self::Output(width) => 11 + width,
            Self::Wait => 14,
        };
        CODE + offset(&raw const ROUTINES) + u64::from(index) * STRIDE
    }
}

fn offset(symbol: *const u8) -> u64 {
    (symbol.addr() - (&raw const HANDS_START).addr()) as u64
}

/// The hands, as the host moves them.
pub(super) struct Hands {
    memory: Pages,
    /// Where the guest sees it.
    base: u64,
    /// Of the last command.
    number: u64,
}

impl Hands {
    /// Puts the payload and its tables into `memory`, which is [`LEN`] bytes at guest-physical `base`, below 4 GiB.
    pub(super) fn new(memory: Pages, base: u64) -> Result<Self, MemoryError> {
        let len = offset(&raw const HANDS_STOP) as usize;
        // SAFETY: the assembler laid these bytes out in read-only data, from the one symbol to the other.
        let code = unsafe { std::slice::from_raw_parts(&raw const HANDS_START, len) };
        memory.write(CODE as usize, code)?;
        write_page_tables(&memory, base)?;
        // No CPL 0 data segment: an interrupt leaves SS empty.
        for (index, descriptor) in
            [0, 0x00af_9b00_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff].into_iter().enumerate()
        {
            put(&memory, GDT, index, descriptor)?;
        }
        // RSP0, and an I/O bitmap beyond the limit: no ports.
        memory.write(TSS as usize + 4, &(base + STACK_TOP).to_le_bytes())?;
        memory.write(TSS as usize + 102, &(TSS_LIMIT as u16 + 1).to_le_bytes())?;
        for line in 0..LINES {
            let handler = base + CODE + offset(&raw const HANDLERS) + u64::from(line) * STRIDE;
            // A 64-bit interrupt gate for CPL 0 (the handler's address is below 4 GiB).
            let gate = handler & 0xffff | u64::from(CODE_CPL0) << 16 | 0x8e00 << 32 | handler >> 16 << 48;
            put(&memory, IDT, 2 * (FIRST_VECTOR + line) as usize, gate)?;
        }
        Ok(Self { memory, base, number: 0 })
    }

    /// Where the guest sees them.
    pub(super) const fn base(&self) -> u64 {
        self.base
    }

    /// Tells the hands what to do when they run next.
    pub(super) fn command(&mut self, command: Command, address: u64, value: u64) -> Result<(), MemoryError> {
        self.number += 1;
        put(&self.memory, MAILBOX, ADDRESS, address)?;
        put(&self.memory, MAILBOX, VALUE, value)?;
        put(&self.memory, MAILBOX, ROUTINE, self.base + command.routine())?;
        put(&self.memory, MAILBOX, NUMBER, self.number)
    }

    /// What they answered.
    pub(super) fn value(&self) -> Result<u64, MemoryError> {
        get(&self.memory, MAILBOX, VALUE)
    }

    /// The interrupts among `lines` that came. The vCPU must not run meanwhile.
    pub(super) fn pending(&self, lines: u64) -> Result<u64, MemoryError> {
        Ok(get(&self.memory, MAILBOX, PENDING)? & lines)
    }

    /// The interrupts among `lines` that came; they are taken out, the others stay. The vCPU must not run meanwhile.
    pub(super) fn take_pending(&self, lines: u64) -> Result<u64, MemoryError> {
        let pending = get(&self.memory, MAILBOX, PENDING)?;
        put(&self.memory, MAILBOX, PENDING, pending & !lines)?;
        Ok(pending & lines)
    }
}

/// The first 4 GiB at their own addresses, in pages of 2 MiB, for CPL 3 too.
fn write_page_tables(memory: &Pages, base: u64) -> Result<(), MemoryError> {
    const TABLE: u64 = 1 << 2 | 1 << 1 | 1; // user, writable, present
    const LARGE: u64 = 1 << 7 | TABLE;
    let second = PAGE_TABLES + 0x1000;
    let third = PAGE_TABLES + 0x2000;
    put(memory, PAGE_TABLES, 0, (base + second) | TABLE)?;
    (0..4).try_for_each(|i| put(memory, second, i, (base + third + i as u64 * 0x1000) | TABLE))?;
    (0..4 * 512).try_for_each(|i| put(memory, third, i, (i as u64) << 21 | LARGE))
}

fn put(memory: &Pages, table: u64, index: usize, value: u64) -> Result<(), MemoryError> {
    memory.write(table as usize + 8 * index, &value.to_le_bytes())
}

fn get(memory: &Pages, table: u64, index: usize) -> Result<u64, MemoryError> {
    let mut bytes = [0; 8];
    memory.read(table as usize + 8 * index, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_keeps_to_its_page_and_its_strides() {
        let (routines, handlers) = (offset(&raw const ROUTINES), offset(&raw const HANDLERS));
        assert!(offset(&raw const HANDS_STOP) <= MAILBOX - CODE);
        assert!(routines + 14 * STRIDE < handlers);
        let last = offset(&raw const HANDS_STOP) - handlers - u64::from(LINES - 1) * STRIDE;
        assert!(last <= STRIDE, "a handler of {last} bytes");
    }
}
