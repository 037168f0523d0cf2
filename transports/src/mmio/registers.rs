//! What both sides agree on: the register block (4.2.2, and 4.2.4 for that of the legacy interface).
//!
//! Registers are 32 bits wide, little-endian, and accessed whole; the configuration behind them is accessed by the
//! width of its fields.

use polyvirt_core::hypervisor::{Guest, HypervisorError};

/// Where a device is: its register block and its interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Guest-physical address of the register block.
    pub base: u64,
    /// The interrupt's line, for [`Guest::take`].
    pub line: u32,
}

/// A guest that can access registers.
pub trait Registers: Guest<Place = Place> {
    /// Reads `data.len()` (1, 2, 4 or 8) bytes at guest-physical `address`, in one access.
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError>;

    /// Writes `data` (1, 2, 4 or 8 bytes) to guest-physical `address`, in one access.
    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError>;
}

/// Read: [`MAGIC`].
pub const MAGIC_VALUE: u64 = 0x000;
/// Read: [`VERSION_2`], or [`VERSION_1`].
pub const VERSION: u64 = 0x004;
/// Read: the device type (chapter 5); 0 where there is no device.
pub const DEVICE_ID: u64 = 0x008;
/// Read: [`VENDOR`].
pub const VENDOR_ID: u64 = 0x00c;
/// Read: the word of the offered features that [`DEVICE_FEATURES_SEL`] selects.
pub const DEVICE_FEATURES: u64 = 0x010;
/// Write: selects a word of the offered features.
pub const DEVICE_FEATURES_SEL: u64 = 0x014;
/// Write: the word of the accepted features that [`DRIVER_FEATURES_SEL`] selects.
pub const DRIVER_FEATURES: u64 = 0x020;
/// Write: selects a word of the accepted features.
pub const DRIVER_FEATURES_SEL: u64 = 0x024;
/// Legacy, write: bytes of a page in [`LEGACY_QUEUE_PAGE`].
pub const LEGACY_PAGE_SIZE: u64 = 0x028;
/// Write: selects the queue that the `QUEUE_` registers are about.
pub const QUEUE_SEL: u64 = 0x030;
/// Read: the most entries of the queue; 0 if there is no such queue.
pub const QUEUE_SIZE_MAX: u64 = 0x034;
/// Write: the entries of the queue.
pub const QUEUE_SIZE: u64 = 0x038;
/// Legacy, write: what the place of the used ring is a multiple of, bytes.
pub const LEGACY_QUEUE_ALIGN: u64 = 0x03c;
/// Legacy, read and write: the page where the queue begins; 0 if it is not in use.
pub const LEGACY_QUEUE_PAGE: u64 = 0x040;
/// Read and write: whether the queue is enabled.
pub const QUEUE_READY: u64 = 0x044;
/// Write: the doorbell; the value is the queue's index.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// Read: what the device interrupted for, [`USED_BUFFER`] and [`CONFIG_CHANGE`].
pub const INTERRUPT_STATUS: u64 = 0x060;
/// Write: the bits of [`INTERRUPT_STATUS`] that were handled.
pub const INTERRUPT_ACK: u64 = 0x064;
/// Read and write: the device status; writing 0 resets.
pub const STATUS: u64 = 0x070;
/// Write: the descriptor area's address, bits 0 to 31.
pub const QUEUE_DESC_LOW: u64 = 0x080;
/// Write: the descriptor area's address, bits 32 to 63.
pub const QUEUE_DESC_HIGH: u64 = 0x084;
/// Write: the driver area's address, bits 0 to 31.
pub const QUEUE_DRIVER_LOW: u64 = 0x090;
/// Write: the driver area's address, bits 32 to 63.
pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
/// Write: the device area's address, bits 0 to 31.
pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
/// Write: the device area's address, bits 32 to 63.
pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
/// Write: selects a shared memory region.
pub const SHM_SEL: u64 = 0x0ac;
/// Read: the region's length, bits 0 to 31; all ones if there is none.
pub const SHM_LEN_LOW: u64 = 0x0b0;
/// Read: the region's length, bits 32 to 63; all ones if there is none.
pub const SHM_LEN_HIGH: u64 = 0x0b4;
/// Read: the region's address, bits 0 to 31; all ones if there is none.
pub const SHM_BASE_LOW: u64 = 0x0b8;
/// Read: the region's address, bits 32 to 63; all ones if there is none.
pub const SHM_BASE_HIGH: u64 = 0x0bc;
/// Read and write: 1 resets the queue (VIRTIO_F_RING_RESET); reads 1 until that is done.
pub const QUEUE_RESET: u64 = 0x0c0;
/// Read: changes whenever the configuration does.
pub const CONFIG_GENERATION: u64 = 0x0fc;
/// From here on: the device configuration.
pub const CONFIG: u64 = 0x100;

/// Bytes of a register block: registers and 3840 bytes of configuration.
pub const BLOCK_SIZE: u64 = 0x1000;
/// Bytes that a device occupies on the bus: the register block, then its shared memory.
pub const PLACE_SIZE: u64 = 0x10_0000;

/// What [`MAGIC_VALUE`] reads: "virt".
pub const MAGIC: u32 = 0x7472_6976;
/// What [`VERSION`] reads on the legacy interface.
pub const VERSION_1: u32 = 1;
/// What [`VERSION`] reads.
pub const VERSION_2: u32 = 2;
/// What [`VENDOR_ID`] of our devices reads: "poly".
pub const VENDOR: u32 = u32::from_le_bytes(*b"poly");

/// Bit of [`INTERRUPT_STATUS`]: the device used a buffer in some queue.
pub const USED_BUFFER: u32 = 1;
/// Bit of [`INTERRUPT_STATUS`]: the configuration changed, or the device needs a reset.
pub const CONFIG_CHANGE: u32 = 2;
