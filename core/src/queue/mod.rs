//! Virtqueues in both roles.
//!
//! [`Queue`] is the device's role: it pops [`Chain`]s and completes them. [`DriverQueue`] is the driver's: the paper's
//! five operations. Both hide which ring format was negotiated.

mod assembly;
mod chain;
mod device;
mod driver;
mod observer;
mod order;
pub mod packed;
pub mod split;
mod table;

pub use chain::{Chain, ChainError};
pub use device::{BURST, Queue};
pub use driver::{AddError, Buffer, DriverQueue};
pub use observer::{Observer, Taken};

use alloc::vec::Vec;

use crate::memory::{MemoryError, Pending, ResolveError};

/// The largest queue that the spec allows (2.7: queue size is at most 32768).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Descriptors of an indirect table that a device serves even if its queue has fewer entries. A driver must not make
/// chains longer than the queue (2.7.5.3.1), but some do: Linux's block driver looks only at what the device says of
/// segments, and most devices serve so many.
pub const INDIRECT_MAX: u16 = 1024;

/// Byte order and placement of a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// Little-endian, three areas anywhere (VIRTIO 1.0 and later).
    #[default]
    Modern,
    /// Before VIRTIO 1.0: guest-native byte order, one contiguous piece, the used ring at the next multiple of 4096.
    Legacy(ByteOrder),
    /// Little-endian, one ring of descriptors and two event structures (VIRTIO_F_RING_PACKED).
    Packed,
}

/// The byte order of a legacy guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteOrder {
    /// Least significant byte first.
    Little,
    /// Most significant byte first.
    Big,
}

/// Where a queue is and how it behaves: what a transport's registers amount to when the queue is enabled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueConfig {
    /// Entries.
    pub size: u16,
    /// Device-visible address of the descriptor area (split: descriptor table).
    pub descriptors: u64,
    /// Device-visible address of the driver area (split: available ring).
    pub driver: u64,
    /// Device-visible address of the device area (split: used ring).
    pub device: u64,
    /// Byte order and placement.
    pub layout: Layout,
    /// Whether VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// Whether VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// Whether VIRTIO_F_IN_ORDER was negotiated: buffers are used in the order in which they were made available.
    pub in_order: bool,
}

impl QueueConfig {
    /// Whether the areas start at multiples of what the format demands.
    fn check_alignment(&self, descriptors: usize, driver: usize, device: usize) -> Result<(), MemoryError> {
        for (address, align) in [(self.descriptors, descriptors), (self.driver, driver), (self.device, device)] {
            if !address.is_multiple_of(align as u64) {
                return Err(MemoryError::Misaligned { address, align });
            }
        }
        Ok(())
    }
}

/// Where a device is in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// The next available entry to take. Split: the index as it grows; packed: place in the ring, and in bit 15 the wrap
    /// counter.
    pub available: u16,
    /// The next used entry to write, in the same form.
    pub used: u16,
}

/// A queue as a device leaves it to another device side, or to itself later ([`Queue::save`], [`Queue::restore`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedQueue {
    /// Where the device was.
    pub state: QueueState,
    /// Split: the heads of the chains that it had taken and not given back; they are taken again, in this order, before
    /// any other. Packed, or in order (VIRTIO_F_IN_ORDER): empty, because `state` goes back to before them.
    pub in_flight: Vec<u16>,
}

impl QueueState {
    /// Where a queue of `layout` begins.
    pub const fn start(layout: Layout) -> Self {
        let at = match layout {
            Layout::Packed => packed::layout::Position::START.pack(),
            Layout::Modern | Layout::Legacy(_) => 0,
        };
        Self { available: at, used: at }
    }
}

/// What keeps a queue from being taken into use, or a chain from being put together: two things that have nothing in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Blocked {
    /// Nothing is wrong: it has to be tried again once that memory is there.
    #[error("pending: {0}")]
    Pending(#[from] Pending),
    /// The driver, or the device, broke it.
    #[error(transparent)]
    Broken(#[from] QueueError),
}

impl From<MemoryError> for Blocked {
    fn from(error: MemoryError) -> Self {
        Self::Broken(error.into())
    }
}

impl From<ResolveError> for Blocked {
    fn from(error: ResolveError) -> Self {
        match error {
            ResolveError::Pending(pending) => Self::Pending(pending),
            ResolveError::Fault(fault) => fault.into(),
        }
    }
}

/// Why [`Queue::pop`] gives no chain. A device ends its turn whichever it is; what follows, the
/// [state machine](crate::state::VirtioDevice) knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PopError {
    /// The driver has made nothing more available.
    #[error("nothing is available")]
    Empty,
    /// This burst has taken or looked at all that it may, or the queue is held: there may be more.
    #[error("the burst is over")]
    Spent,
    /// The next chain cannot be taken before its memory is there. It stays the next.
    #[error("pending: {0}")]
    Pending(Pending),
    /// The queue is broken: it gives nothing any more, whatever is tried.
    #[error(transparent)]
    Broken(QueueError),
}

/// What is wrong with a queue. Any of these, once met in a running queue, breaks it: nothing is taken from it or put into
/// it until it is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is 0, above the maximum, or not a power of two where the format demands one.
    #[error("queue size {size} is not allowed (a power of two up to {max})")]
    Size {
        /// What the driver chose.
        size: u32,
        /// The largest that the device supports.
        max: u16,
    },
    /// A ring area or a buffer cannot be accessed.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
    /// The available index is further ahead than the queue is long.
    #[error("available index jumped from {last} to {index}, queue size {size}")]
    IndexJump {
        /// The last index that the device saw.
        last: u16,
        /// The index now.
        index: u16,
        /// Entries.
        size: u16,
    },
    /// More descriptors are in flight than the queue has entries.
    #[error("more descriptors are in flight than the queue's {size}")]
    Overrun {
        /// Entries.
        size: u16,
    },
    /// A head or a `next` field names a descriptor beyond the table.
    #[error("descriptor {index} is beyond the table of {size}")]
    Index {
        /// What the driver wrote.
        index: u16,
        /// Entries of the table.
        size: u32,
    },
    /// A head or buffer id that the device has not completed yet was made available again.
    #[error("{head} was made available again while in flight")]
    InFlight {
        /// The head.
        head: u16,
    },
    /// (Packed) a chain goes on with a descriptor that is not available.
    #[error("the chain at {head} goes on with a descriptor that is not available")]
    Unavailable {
        /// Where the chain begins.
        head: u16,
    },
    /// A chain has more descriptors than its table has entries, so it loops or is too long.
    #[error("the chain at {head} loops or has more than {limit} descriptors")]
    TooManyDescriptors {
        /// The head.
        head: u16,
        /// The most that are allowed.
        limit: u32,
    },
    /// A chain's buffers add up to more than 2^32 bytes.
    #[error("the chain at {head} is longer than 2^32 bytes")]
    TooLong {
        /// The head.
        head: u16,
    },
    /// A chain, or its table, is in more pieces of host memory than a device can be made to look up at once.
    #[error("the chain at {head} is in more than {limit} pieces of host memory")]
    Scattered {
        /// The head.
        head: u16,
        /// The most pieces that are allowed.
        limit: usize,
    },
    /// A device-readable descriptor follows a device-writable one.
    #[error("the chain at {head} has a readable descriptor after a writable one")]
    Order {
        /// The head.
        head: u16,
    },
    /// An indirect descriptor although the feature was not negotiated.
    #[error("the chain at {head} is indirect, which was not negotiated")]
    IndirectNotNegotiated {
        /// The head.
        head: u16,
    },
    /// An indirect descriptor inside an indirect table.
    #[error("the chain at {head} has an indirect table inside an indirect table")]
    IndirectNested {
        /// The head.
        head: u16,
    },
    /// An indirect descriptor that also has the NEXT flag.
    #[error("the chain at {head} has a descriptor with both INDIRECT and NEXT")]
    IndirectWithNext {
        /// The head.
        head: u16,
    },
    /// An indirect table whose length is 0, not a multiple of 16, or above what the queue allows.
    #[error("the chain at {head} has an indirect table of {len} bytes")]
    IndirectLength {
        /// The head.
        head: u16,
        /// Bytes.
        len: u32,
    },
    /// A chain that the device cannot work with: too small for the request, for example.
    #[error("the chain at {head} is not a request: {reason}")]
    Request {
        /// The head.
        head: u16,
        /// What is missing.
        reason: &'static str,
    },
    /// (Device role) chains are in flight whose descriptors were overwritten, because others were used before them: they
    /// cannot be taken again.
    #[error("descriptors of chains in flight are overwritten: they have to be finished first")]
    Overwritten,
    /// A saved state that no queue can be in.
    #[error("a state with {in_flight} chains in flight, available {available:#x}, used {used:#x}, queue size {size}")]
    State {
        /// Chains in flight.
        in_flight: usize,
        /// Where the device was in the available ring.
        available: u16,
        /// Where it was in the used ring.
        used: u16,
        /// Entries.
        size: u16,
    },
    /// (Device role) the transport cannot hand the queue over: its rings are in no memory, or what is said to be in flight
    /// is nonsense.
    #[error("the queue cannot be handed over")]
    HandOver,
    /// (Driver role) the device returned something that is not in flight.
    #[error("the device returned {id}, which is not in flight")]
    UsedId {
        /// What the device wrote.
        id: u32,
    },
    /// (Driver role) the device claims to have written more than the buffer holds.
    #[error("the device claims {len} bytes of a buffer that has {writable}")]
    UsedLength {
        /// What the device wrote.
        len: u32,
        /// Device-writable bytes of the buffer.
        writable: u32,
    },
    /// (Device role) a chain of another queue, or of this queue before its reset, was completed on it.
    #[error("the chain at {head} does not belong to this run of the queue")]
    Stale {
        /// The head.
        head: u16,
    },
}
