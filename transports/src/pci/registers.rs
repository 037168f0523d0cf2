//! What both sides agree on: configuration space, capabilities, registers (4.1; PCI Local Bus 3.0).
//!
//! All fields are little-endian, but for the device configuration of a legacy guest, which has the guest's order.

use core::ops::Range;

/// Which addresses an access goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Guest-physical memory.
    Memory,
    /// Ports.
    Io,
}

/// Where a PCI host answers: what firmware tells an operating system of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressMap {
    /// Guest-physical address of the memory-mapped configuration space of bus 0 (ECAM), [`ECAM_LEN`] bytes; none if
    /// there are only the ports.
    pub ecam: Option<u64>,
    /// Where memory of functions may be placed, below 4 GiB.
    pub memory: Range<u64>,
    /// Where memory behind 64-bit base address registers may be placed besides; may be empty.
    pub memory64: Range<u64>,
    /// Where ports of functions may be placed.
    pub io: Range<u64>,
}

/// Where a function is, to its driver: on bus 0, and what it may interrupt by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestPlace {
    /// Device number × 8 + function number.
    pub function: u8,
    /// The interrupt line of its pin, for [`Guest::take`](polyvirt_core::hypervisor::Guest::take).
    pub pin: u32,
    /// The first interrupt line that its messages may use.
    pub line: u32,
    /// How many lines they may use; 0 if the function cannot send messages.
    pub lines: u32,
}

/// A message-signalled interrupt: a write to memory that is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Where to.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// Interrupt lines from 0 up to here are for messages, if nothing else has them; then come those of the four pins.
pub const MESSAGE_LINES: u32 = 60;

/// The line of the interrupt pin of device `number`: four pins are shared out in turns.
pub const fn pin_line(number: u8) -> u32 {
    MESSAGE_LINES + (number % 4) as u32
}

// How a bus addresses the registers of one function: configuration space and base address registers in one space.

/// Where a function's base address register `bar` (0 to 5) begins in the offsets of its
/// [`BusDevice`](polyvirt_core::hypervisor::BusDevice); before the first is configuration space.
pub const fn region(bar: u8) -> u64 {
    (bar as u64 + 1) << REGION_SHIFT
}

/// Bits of an offset within a region.
pub const REGION_SHIFT: u32 = 60;

// Type-1 configuration access.

/// Port: which function and register the next data access is to; bit 31 enables.
pub const CONFIG_ADDRESS: u64 = 0xcf8;
/// Port: four bytes of the register.
pub const CONFIG_DATA: u64 = 0xcfc;

/// What [`CONFIG_ADDRESS`] is set to for the word at `offset` of `function` of bus 0.
pub const fn config_address(function: u8, offset: u16) -> u32 {
    1 << 31 | (function as u32) << 8 | (offset & 0xfc) as u32
}

/// Bytes of a function's configuration space.
pub const CONFIG_LEN: usize = 256;
/// Bytes from one function to the next in memory-mapped configuration space.
pub const ECAM_STRIDE: u64 = 4096;
/// Bytes of memory-mapped configuration space of a bus.
pub const ECAM_LEN: u64 = 256 * ECAM_STRIDE;

// The header.

/// 16 bits: who made it; all ones where there is no function.
pub const VENDOR_ID: u16 = 0x00;
/// 16 bits: what it is.
pub const DEVICE_ID: u16 = 0x02;
/// 16 bits: what it may do, see [`COMMAND_IO`] and those after it.
pub const COMMAND: u16 = 0x04;
/// 16 bits: what it says.
pub const STATUS: u16 = 0x06;
/// 8 bits.
pub const REVISION_ID: u16 = 0x08;
/// 24 bits.
pub const CLASS_CODE: u16 = 0x09;
/// 8 bits: bit 7 says that the device has more functions than 0.
pub const HEADER_TYPE: u16 = 0x0e;
/// Six registers of 32 bits.
pub const BARS: u16 = 0x10;
/// 16 bits.
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// 16 bits; a transitional device has its virtio device type there.
pub const SUBSYSTEM_ID: u16 = 0x2e;
/// 8 bits: where the list of capabilities begins.
pub const CAPABILITIES: u16 = 0x34;
/// 8 bits: for software.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// 8 bits: the interrupt pin, 1 to 4.
pub const INTERRUPT_PIN: u16 = 0x3d;
/// Capabilities are from here on.
pub const FIRST_CAPABILITY: u16 = 0x40;

/// In [`COMMAND`]: ports are decoded.
pub const COMMAND_IO: u16 = 1 << 0;
/// In [`COMMAND`]: memory is decoded.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// In [`COMMAND`]: the function may access memory on its own.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// In [`COMMAND`]: the function does not use its interrupt pin.
pub const COMMAND_NO_PIN: u16 = 1 << 10;
/// In [`STATUS`]: the function wants an interrupt by its pin.
pub const STATUS_INTERRUPT: u16 = 1 << 3;
/// In [`STATUS`]: there is a list of capabilities.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;

/// In a base address register: it is for ports.
pub const BAR_IO: u32 = 1;
/// In a base address register for memory: the next one holds the upper half of the address.
pub const BAR_64: u32 = 1 << 2;
/// In a base address register for memory: reading has no side effects.
pub const BAR_PREFETCHABLE: u32 = 1 << 3;
/// How many base address registers there are.
pub const BAR_COUNT: u8 = 6;

// MSI-X.

/// The capability.
pub const CAP_MSIX: u8 = 0x11;
/// In it, 16 bits: the table's length less 1, and [`MSIX_ENABLE`], [`MSIX_MASK`].
pub const MSIX_CONTROL: u16 = 2;
/// In it, 32 bits: where the table is; the lowest three bits name the base address register.
pub const MSIX_TABLE: u16 = 4;
/// In it, 32 bits: where the pending bits are, in the same form.
pub const MSIX_PENDING: u16 = 8;
/// The function interrupts by messages, and not by its pin.
pub const MSIX_ENABLE: u16 = 1 << 15;
/// All messages are held back.
pub const MSIX_MASK: u16 = 1 << 14;
/// Bits of the control word that hold the table's length less 1.
pub const MSIX_LEN: u16 = 0x7ff;
/// The most vectors of a function.
pub const MSIX_MAX: u16 = 0x800;
/// Bytes of a table entry: address (64 bits), data, control (32 bits each).
pub const MSIX_ENTRY: u64 = 16;
/// In an entry's control word: its message is held back.
pub const ENTRY_MASKED: u32 = 1;
/// The vector of an event that does not interrupt (4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

// Identities (4.1.2).

/// The vendor of every virtio device.
pub const VIRTIO_VENDOR: u16 = 0x1af4;
/// A modern device's id is its virtio device type added to this.
pub const MODERN_ID: u16 = 0x1040;
/// All ids of virtio devices.
pub const IDS: Range<u16> = 0x1000..0x1080;

/// The id of a transitional or legacy device of virtio type `device_type`; none if there can be none. Drivers for types that
/// the spec has no id for go by the subsystem id, so those get one of the range that is left.
pub const fn transitional_id(device_type: u32) -> Option<u16> {
    Some(match device_type {
        1 => 0x1000,
        2 => 0x1001,
        3 => 0x1003,
        4 => 0x1005,
        5 => 0x1002,
        8 => 0x1004,
        6 | 7 | 9..0x40 => 0x1000 + device_type as u16,
        _ => return None,
    })
}

// virtio's capabilities (4.1.4).

/// Vendor-specific, as all of virtio's are.
pub const CAP_VENDOR: u8 = 0x09;
/// Common configuration.
pub const CAP_COMMON: u8 = 1;
/// Notifications.
pub const CAP_NOTIFY: u8 = 2;
/// The interrupt status register.
pub const CAP_ISR: u8 = 3;
/// Device configuration.
pub const CAP_DEVICE: u8 = 4;
/// The window to the others, in configuration space.
pub const CAP_WINDOW: u8 = 5;
/// A shared memory region.
pub const CAP_SHARED_MEMORY: u8 = 8;

/// Offsets in such a capability, 8 bits each unless said otherwise: its length.
pub const CAP_LEN: u16 = 2;
/// Which structure it is about.
pub const CAP_TYPE: u16 = 3;
/// The base address register.
pub const CAP_BAR: u16 = 4;
/// Which of several (shared memory).
pub const CAP_ID: u16 = 5;
/// 32 bits: where the structure begins.
pub const CAP_OFFSET: u16 = 8;
/// 32 bits: its bytes.
pub const CAP_LENGTH: u16 = 12;
/// 32 bits, notifications only: the multiplier of a queue's place.
pub const CAP_MULTIPLIER: u16 = 16;
/// 32 bits, the window only: the data.
pub const CAP_DATA: u16 = 16;
/// 32 bits, shared memory only: bits 32 to 63 of the offset.
pub const CAP_OFFSET_HIGH: u16 = 16;
/// 32 bits, shared memory only: bits 32 to 63 of the length.
pub const CAP_LENGTH_HIGH: u16 = 20;

/// Common configuration (4.1.4.3).
pub mod common {
    /// 32 bits: selects a word of the offered features.
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    /// 32 bits, read: that word.
    pub const DEVICE_FEATURE: u64 = 0x04;
    /// 32 bits: selects a word of the accepted features.
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    /// 32 bits: that word.
    pub const DRIVER_FEATURE: u64 = 0x0c;
    /// 16 bits: the vector of configuration changes.
    pub const CONFIG_VECTOR: u64 = 0x10;
    /// 16 bits, read.
    pub const NUM_QUEUES: u64 = 0x12;
    /// 8 bits; writing 0 resets.
    pub const DEVICE_STATUS: u64 = 0x14;
    /// 8 bits, read.
    pub const CONFIG_GENERATION: u64 = 0x15;
    /// 16 bits: selects the queue that what follows is about.
    pub const QUEUE_SELECT: u64 = 0x16;
    /// 16 bits: its entries; 0 if there is no such queue.
    pub const QUEUE_SIZE: u64 = 0x18;
    /// 16 bits: its vector.
    pub const QUEUE_VECTOR: u64 = 0x1a;
    /// 16 bits: whether it is enabled.
    pub const QUEUE_ENABLE: u64 = 0x1c;
    /// 16 bits, read: its place among the notifications, to be multiplied.
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    /// 64 bits, in two halves: the descriptor area.
    pub const QUEUE_DESC: u64 = 0x20;
    /// 64 bits, in two halves: the driver area.
    pub const QUEUE_DRIVER: u64 = 0x28;
    /// 64 bits, in two halves: the device area.
    pub const QUEUE_DEVICE: u64 = 0x30;
    /// 16 bits, read: what to notify with (VIRTIO_F_NOTIF_CONFIG_DATA).
    pub const QUEUE_NOTIF_CONFIG_DATA: u64 = 0x38;
    /// 16 bits: 1 resets the queue (VIRTIO_F_RING_RESET).
    pub const QUEUE_RESET: u64 = 0x3a;
    /// 16 bits, read: the first administration queue.
    pub const ADMIN_QUEUE_INDEX: u64 = 0x3c;
    /// 16 bits, read: how many administration queues there are.
    pub const ADMIN_QUEUE_NUM: u64 = 0x3e;
    /// Bytes of all.
    pub const LEN: usize = 0x40;
}

/// The registers of the legacy interface, in ports (4.1.4.10).
pub mod legacy {
    /// 32 bits, read: the offered features, bits 0 to 31.
    pub const DEVICE_FEATURES: u64 = 0;
    /// 32 bits: the accepted ones.
    pub const DRIVER_FEATURES: u64 = 4;
    /// 32 bits: the ring's address divided by 4096; 0 if the queue is not in use.
    pub const QUEUE_ADDRESS: u64 = 8;
    /// 16 bits, read: the queue's entries; 0 if there is no such queue.
    pub const QUEUE_SIZE: u64 = 12;
    /// 16 bits: selects a queue.
    pub const QUEUE_SELECT: u64 = 14;
    /// 16 bits, write: the queue that is notified.
    pub const QUEUE_NOTIFY: u64 = 16;
    /// 8 bits; writing 0 resets.
    pub const DEVICE_STATUS: u64 = 18;
    /// 8 bits, read: what the device interrupted for; reading clears it.
    pub const ISR: u64 = 19;
    /// 16 bits, only while MSI-X is enabled: the vector of configuration changes.
    pub const CONFIG_VECTOR: u64 = 20;
    /// 16 bits, only while MSI-X is enabled: the queue's vector.
    pub const QUEUE_VECTOR: u64 = 22;
    /// Bytes of a page in [`QUEUE_ADDRESS`].
    pub const PAGE: u64 = 4096;

    /// Where the device configuration begins.
    pub const fn config(messages: bool) -> u64 {
        if messages { 24 } else { 20 }
    }
}

/// Bit of the interrupt status register: the device used a buffer in some queue.
pub const ISR_QUEUE: u8 = 1;
/// Bit of the interrupt status register: the configuration changed, or the device needs a reset.
pub const ISR_CONFIG: u8 = 2;
