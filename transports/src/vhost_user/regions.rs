//! The regions of guest memory: what may be one, and its bytes.
#![allow(unsafe_code)]

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use polyvirt_core::memory::{Owner, Pages};

use super::log::DirtyLog;
use super::map::{FileId, MapError, file_id, is_lost, map};
use super::messages::{MEM_SLOTS, Region};

/// What the regions of everybody's guests are multiples of. In smaller ones a buffer would have more pieces than anybody can
/// serve in good time: so it has at most one for each page.
const PAGE: u64 = 4096;

/// Why a region or a translation was refused.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// It cannot be mapped.
    #[error("region {guest:#x}+{size:#x}: {reason}")]
    Map {
        /// Guest-physical start.
        guest: u64,
        /// Bytes.
        size: u64,
        /// Why.
        reason: MapError,
    },
    /// It reaches beyond the end of an address space.
    #[error("region {guest:#x}+{size:#x}, at {user:#x} in the front end, reaches beyond 2^64")]
    Wraps {
        /// Guest-physical start.
        guest: u64,
        /// Bytes.
        size: u64,
        /// Where it starts in the front end.
        user: u64,
    },
    /// It begins or ends in the middle of a page.
    #[error(
        "region {guest:#x}+{size:#x}, at {user:#x} in the front end and {offset:#x} in its file, is not whole pages"
    )]
    NotPages {
        /// Guest-physical start.
        guest: u64,
        /// Bytes.
        size: u64,
        /// Where it starts in the front end.
        user: u64,
        /// Where it starts in its file.
        offset: u64,
    },
    /// It overlaps another.
    #[error("region {guest:#x}+{size:#x} overlaps another")]
    Overlaps {
        /// Guest-physical start.
        guest: u64,
        /// Bytes.
        size: u64,
    },
    /// There are too many.
    #[error("more than {MEM_SLOTS} regions")]
    TooMany,
    /// There is no such region to take away.
    #[error("there is no region {guest:#x}+{size:#x}")]
    NotThere {
        /// Guest-physical start.
        guest: u64,
        /// Bytes.
        size: u64,
    },
    /// A translation leads to where no region is, or out of one.
    #[error("a translation of {iova:#x}+{size:#x} to {user:#x}, which is not inside a region")]
    Nowhere {
        /// Device address.
        iova: u64,
        /// Bytes.
        size: u64,
        /// Address of the front end.
        user: u64,
    },
}

/// A region that is mapped, for as long as somebody has this.
pub(super) struct Slot {
    pub(super) region: Region,
    /// Which file it is of.
    file: FileId,
    pages: Pages,
    pub(super) log: Arc<DirtyLog>,
}

impl Slot {
    pub(super) fn new(region: Region, file: OwnedFd, log: Arc<DirtyLog>) -> Result<Self, RegionError> {
        let Region { guest, size, offset, .. } = region;
        let failed = |reason| RegionError::Map { guest, size, reason };
        let id = file_id(&file).map_err(failed)?;
        Ok(Self { region, file: id, pages: map(file, offset, size).map_err(failed)?, log })
    }

    /// Whether this is `region` of `file`.
    pub(super) fn is(&self, region: &Region, file: &OwnedFd) -> bool {
        self.region == *region && !self.is_lost() && file_id(file).is_ok_and(|id| id == self.file)
    }

    /// Whether bytes of it went away.
    pub(super) fn is_lost(&self) -> bool {
        is_lost(&self.pages)
    }

    /// Its bytes, which keep all of it.
    pub(super) fn bytes(self: &Arc<Self>) -> Option<Pages> {
        let start = NonNull::new(self.pages.as_ptr())?;
        // SAFETY: they are mapped for as long as somebody has this; nobody has a reference to them.
        Some(unsafe { Pages::new(start, self.pages.len(), Arc::clone(self) as Owner) })
    }

    /// Where `host`, which is in it, is for the guest.
    pub(super) fn guest_of(&self, host: usize) -> u64 {
        self.region.guest + (host - self.pages.as_ptr().addr()) as u64
    }
}

/// Fails if these cannot be the regions of one guest.
pub(super) fn check<'r>(regions: impl IntoIterator<Item = &'r Region>) -> Result<(), RegionError> {
    let mut sorted: Vec<_> = regions.into_iter().copied().collect();
    if sorted.len() as u64 > MEM_SLOTS {
        return Err(RegionError::TooMany);
    }
    sorted.sort_by_key(|region| region.guest);
    let mut end = 0;
    for Region { guest, size, user, offset } in sorted {
        if ![guest, size, user, offset].iter().all(|place| place.is_multiple_of(PAGE)) {
            return Err(RegionError::NotPages { guest, size, user, offset });
        }
        if user.checked_add(size).is_none() {
            return Err(RegionError::Wraps { guest, size, user });
        }
        if guest < end {
            return Err(RegionError::Overlaps { guest, size });
        }
        end = guest.checked_add(size).ok_or(RegionError::Wraps { guest, size, user })?;
    }
    Ok(())
}
