//! What both sides agree on: the guest-physical address space and the interrupt lines.

use polyvirt_transports::mmio::Place;
use polyvirt_transports::mmio::registers::BLOCK_SIZE;

/// RAM is from 0 up to here at most.
pub(super) const RAM_END: u64 = 0xc000_0000;

/// The hands' own memory: a slot that devices do not see, so no device can break what drives it.
pub(super) const HANDS: u64 = 0xc000_0000;

/// A store here ends the hands' command: no slot is behind it, so it exits.
pub(super) const DONE: u64 = 0xc010_0000;

/// What belongs to the hands ends here.
pub(super) const HANDS_END: u64 = 0xc020_0000;

/// Devices: the register block of line `n` is at `DEVICES + n * BLOCK_SIZE`.
pub(super) const DEVICES: u64 = 0xd000_0000;

/// Interrupt lines, as many as [`Guest::wait`](polyvirt_core::hypervisor::Guest::wait) has bits.
pub(super) const LINES: u32 = 64;

/// Where the device on `line` is.
pub(super) fn place(line: u32) -> Place {
    Place { base: DEVICES + u64::from(line) * BLOCK_SIZE, line }
}
