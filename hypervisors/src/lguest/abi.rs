//! What launcher and guest agree on: hypercalls, memory, `lguest_data` (Linux 2.6.25, `include/linux/lguest.h`,
//! `include/asm-x86/lguest_hcall.h`, `Documentation/lguest/lguest.c`).

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Pages above RAM: the device page, then the rings (`DEVICE_PAGES`).
pub const DEVICE_PAGES: u64 = 256;

/// Interrupt lines (`LGUEST_IRQS`); line 0 is the timer, devices count from 1.
pub const LGUEST_IRQS: u32 = 32;

/// The vector of line 0 (`FIRST_EXTERNAL_VECTOR`).
pub const FIRST_EXTERNAL_VECTOR: u64 = 32;

/// Hypercall: serves the ring of deferred hypercalls, which this guest does not use.
pub const LHCALL_FLUSH_ASYNC: u64 = 0;

/// Hypercall: edx is the guest-physical address of `struct lguest_data`.
pub const LHCALL_LGUEST_INIT: u64 = 1;

/// Hypercall: the guest ends; edx is the guest-physical address of a zero-terminated last word.
pub const LHCALL_SHUTDOWN: u64 = 2;

/// Hypercall: edx is a vector, ebx and ecx the low and high half of its gate.
pub const LHCALL_LOAD_IDT_ENTRY: u64 = 6;

/// Hypercall: wait for an interrupt.
pub const LHCALL_HALT: u64 = 10;

/// Hypercall: edx is a guest-physical address: a ring's first page, a descriptor, or a string to print.
pub const LHCALL_NOTIFY: u64 = 17;

/// What an unknown hypercall returns (-ENOSYS).
pub const UNKNOWN_CALL: u64 = -38i64 as u64;

/// The flag in [`IRQ_ENABLED`] and in the processor's flags.
pub const X86_EFLAGS_IF: u32 = 512;

/// In `struct lguest_data`, the offset of a u32: [`X86_EFLAGS_IF`] while the guest takes interrupts; delivery clears it.
pub const IRQ_ENABLED: u64 = 0;

/// In `struct lguest_data`, the offset of a u32: a bit for each line that the guest does not take now.
pub const BLOCKED_INTERRUPTS: u64 = 4;

/// Bytes of `struct lguest_data` that the launcher uses.
pub const LGUEST_DATA_SIZE: u64 = 8;
