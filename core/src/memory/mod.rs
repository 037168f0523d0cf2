//! Guest memory: the only way to bytes that the other side can change at any time.
//!
//! [`GuestMemory::resolve`] turns a device-visible address into [`Segment`]s of host memory, or refuses. A segment is
//! accessed by copying and by single atomic words; no Rust reference to its bytes is ever made. Its [`Lease`] keeps it
//! accessible: a borrow for a flat map, a mapped grant on Xen.
//!
//! Wrappers compose: [`Watched`] records accesses, [`Faulty`] refuses on demand, [`Translated`] puts a page table in
//! front.
#![allow(unsafe_code)]

mod faulty;
mod flat;
mod segment;
mod translated;
mod watched;

pub use faulty::Faulty;
pub use flat::{Borrowed, ByRegion, FlatMemory};
pub use segment::{Lease, Owner, Pages, Segment, Word, Words};
pub use translated::{PAGE_SIZE, Translated};
pub use watched::{Accessed, Log, Watched, WatchedLease};

bitflags::bitflags! {
    /// What the device wants to do with a range of guest memory, or may do with it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Access: u8 {
        /// The device reads.
        const READ = 1;
        /// The device writes.
        const WRITE = 2;
    }
}

/// Why an access to guest memory was refused: a fault, and trying again does not help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The range, or a part of it, is not memory that the device may see.
    #[error("{address:#x}+{len:#x}: no memory there that the device may see")]
    NotMapped {
        /// Device-visible start.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// The range is there, but not for this use.
    #[error("{address:#x}+{len:#x}: {access:?} is not granted")]
    Forbidden {
        /// Device-visible start.
        address: u64,
        /// Bytes.
        len: u64,
        /// What was wanted.
        access: Access,
    },
    /// `address + len` exceeds 2^64.
    #[error("{address:#x}+{len:#x} wraps around the address space")]
    Wraps {
        /// Device-visible start.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// A ring area has to be one piece of host memory and is not.
    #[error("{address:#x}+{len:#x}: a ring area in several pieces")]
    Scattered {
        /// Device-visible start.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// A ring area's address is not a multiple of what its layout needs.
    #[error("{address:#x} is not aligned to {align}")]
    Misaligned {
        /// Device-visible or host address.
        address: u64,
        /// Required alignment, bytes.
        align: usize,
    },
    /// An offset reaches beyond the end of what was resolved.
    #[error("offset {offset} + {len} reaches beyond {size} bytes")]
    OutOfBounds {
        /// Offset, bytes.
        offset: usize,
        /// Bytes.
        len: usize,
        /// Size of what was resolved.
        size: usize,
    },
}

/// What the device may do with a range is not known yet, and asked for: nothing is wrong, and it is to be tried again when
/// whoever was asked has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{address:#x}+{len:#x}: not translated yet")]
pub struct Pending {
    /// Device-visible start.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// Why a range of guest memory was not resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// Not now: no fault of anyone's.
    #[error(transparent)]
    Pending(#[from] Pending),
    /// Not at all.
    #[error(transparent)]
    Fault(#[from] MemoryError),
}

impl ResolveError {
    /// The same of the range that the one it names is a part of.
    pub(crate) const fn of(self, address: u64, len: u64) -> Self {
        match self {
            Self::Fault(MemoryError::NotMapped { .. }) => Self::Fault(MemoryError::NotMapped { address, len }),
            Self::Fault(MemoryError::Forbidden { access, .. }) => {
                Self::Fault(MemoryError::Forbidden { address, len, access })
            }
            other => other,
        }
    }
}

/// Guest memory as a device sees it: addresses in descriptors are resolved here and nowhere else.
///
/// An implementation is a handle (a reference, an `Arc`), cheap to clone.
pub trait GuestMemory: Clone {
    /// What keeps a resolved segment accessible; dropped when the device is done with it.
    type Lease: Lease;

    /// Hands the host memory behind `address .. address + len` to `segments`, in order, in one or several pieces whose
    /// lengths add up to `len`.
    ///
    /// A `len` of 0 succeeds without a segment. On an error the caller discards what it was handed before.
    fn resolve(
        &self,
        address: u64,
        len: u64,
        access: Access,
        segments: impl FnMut(Segment<Self::Lease>),
    ) -> Result<(), ResolveError>;

    /// The host memory behind `address .. address + len`, if it is one piece that can be had at once; none says nothing,
    /// [`GuestMemory::resolve`] does. Small enough to be part of a device's innermost loop.
    #[inline(always)]
    fn resolve_at_once(&self, address: u64, len: u64, access: Access) -> Option<Segment<Self::Lease>> {
        let _ = (address, len, access);
        None
    }

    /// Resolves a ring area: one piece, aligned for words of type `W`.
    fn resolve_words<W: Word>(
        &self,
        address: u64,
        len: u64,
        access: Access,
    ) -> Result<Words<W, Self::Lease>, ResolveError> {
        let mut only = None;
        let mut pieces = 0;
        self.resolve(address, len, access, |segment| {
            pieces += 1;
            only = Some(segment);
        })?;
        match only {
            Some(segment) if pieces == 1 => Ok(Words::new(segment)?),
            _ => Err(MemoryError::Scattered { address, len }.into()),
        }
    }
}
