//! What both sides agree on: the register block (4.2.2).

use polyvirt_core::hypervisor::{Guest, HypervisorError};

/// Where a device is: its register block and its interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Guest-physical address of the register block.
    pub base: u64,
    /// The interrupt's bit in [`Guest::wait`].
    pub line: u32,
}

/// A guest that can access registers.
pub trait Registers: Guest<Place = Place> {
    /// Reads `data.len()` (1, 2, 4 or 8) bytes at guest-physical `address`, in one access.
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError>;

    /// Writes `data` (1, 2, 4 or 8 bytes) to guest-physical `address`, in one access.
    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError>;
}
