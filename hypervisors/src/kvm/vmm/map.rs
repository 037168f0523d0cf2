//! Where what is in the guest-physical memory and port space of the machine, besides what [`abi`](super::super::abi) says.

/// The global descriptor table that the kernel is entered with.
pub(super) const GDT: u64 = 0x500;
/// The page that tells the kernel of the machine (`struct boot_params`).
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// Where the stack is at the kernel's entry.
pub(super) const STACK_TOP: u64 = 0x8ff0;
/// Page tables for the first 4 GiB: one of the top level, one of the second, four of the third.
pub(super) const PAGE_TABLES: u64 = 0x9000;
/// The command line, and how long it may be with the zero at its end.
pub(super) const COMMAND_LINE: u64 = 0x2_0000;
pub(super) const COMMAND_LINE_MAX: usize = 0x1000;
/// Usable memory below 1 MiB ends here.
pub(super) const LOW_END: u64 = 0x9_fc00;
/// ACPI tables, where a PC has its firmware.
pub(super) const TABLES: u64 = 0xe_0000;
pub(super) const TABLES_END: u64 = 0x10_0000;
/// Usable memory goes on here; a bzImage is loaded to it.
pub(super) const HIGH: u64 = 0x10_0000;

/// KVM's I/O APIC.
pub(super) const IOAPIC: u32 = 0xfec0_0000;

/// The serial port COM1 and its interrupt line.
pub(super) const SERIAL: u16 = 0x3f8;
pub(super) const SERIAL_LINE: u32 = 4;
/// ACPI: the event registers, which never have an event, and the control register.
pub(super) const PM_EVENTS: u16 = 0x600;
pub(super) const PM_CONTROL: u16 = 0x604;
/// The line of ACPI's events.
pub(super) const PM_LINE: u16 = 9;
/// What the guest writes into SLP_TYP to be switched off.
pub(super) const SLEEP_OFF: u8 = 5;
/// The keyboard controller, of which there is only what resets a PC, and the command that does.
pub(super) const KEYBOARD: u16 = 0x64;
pub(super) const KEYBOARD_RESET: u8 = 0xfe;
