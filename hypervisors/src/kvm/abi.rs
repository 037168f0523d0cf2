//! What both sides agree on: the guest-physical address space and the interrupt lines.

use polyvirt_transports::mmio::Place;
use polyvirt_transports::mmio::registers::PLACE_SIZE;
use polyvirt_transports::pci::{AddressMap, Message};

/// RAM is from 0 up to here at most. Behind it, in the same slot but where no device sees it, is the hands' own memory:
/// no device can break what drives it.
pub(super) const RAM_END: u64 = 0xc000_0000;

/// A store here ends the hands' command: no slot is behind it, so it exits.
pub(super) const DONE: u64 = 0xc010_0000;

/// What belongs to the hands ends here.
pub(super) const HANDS_END: u64 = 0xc020_0000;

/// Devices: the registers of line `n` are at `DEVICES + n * PLACE_SIZE`.
pub(super) const DEVICES: u64 = 0xd000_0000;

/// Interrupt lines: a bit each in what tells which are pending.
pub(super) const LINES: u32 = 64;

/// Where the device on `line` is.
pub(super) fn place(line: u32) -> Place {
    Place { base: DEVICES + u64::from(line) * PLACE_SIZE, line }
}

/// The PCI bus: configuration memory, memory, ports. All of it is below 4 GiB, where the hands reach.
pub const PCI: AddressMap =
    AddressMap { ecam: Some(0xe000_0000), memory: 0xd800_0000..0xe000_0000, memory64: 0..0, io: 0x1000..0x1_0000 };

/// The local APIC, and where messages to it go.
pub(super) const APIC: u64 = 0xfee0_0000;

/// The vector of line 0; the others follow.
pub(super) const FIRST_VECTOR: u32 = 0x40;

/// The message that arrives as `line`.
pub(super) const fn message(line: u32) -> Message {
    Message { address: APIC, data: FIRST_VECTOR + line }
}
