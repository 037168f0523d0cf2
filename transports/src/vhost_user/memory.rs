//! Guest memory as the front end hands it over: regions of files, mapped.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polyvirt_core::memory::{Access, FlatMemory, GuestMemory, Lease, MemoryError, Pages, Segment};

use super::map::{MapError, map};
use super::messages::{MEM_SLOTS, Region};

/// Why a region was refused.
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
}

/// A handle to the memory of the session: sees every change of it. The device's segments keep what they were resolved
/// from mapped, so a change takes nothing away under a request that is in flight.
pub struct Memory {
    shared: Arc<Shared>,
    /// What this handle saw last, and when that was: so that looking takes no lock.
    seen: RefCell<Arc<Table>>,
    generation: Cell<u64>,
}

struct Shared {
    table: Mutex<Arc<Table>>,
    /// Counts tables.
    generation: AtomicU64,
}

/// The memory of the session at one time.
pub(super) struct Table {
    slots: Vec<Slot>,
    flat: FlatMemory,
}

#[derive(Clone)]
struct Slot {
    region: Region,
    pages: Pages,
}

/// Keeps a piece of guest memory mapped.
#[derive(Clone)]
pub struct Mapped {
    #[expect(dead_code, reason = "held and not read: what it owns stays mapped")]
    table: Arc<Table>,
}

impl Lease for Mapped {}

impl Memory {
    /// No memory at all.
    pub fn new() -> Self {
        let table = Arc::new(Table::new(Vec::new()));
        let shared = Shared { table: Mutex::new(table.clone()), generation: AtomicU64::new(0) };
        Self { shared: Arc::new(shared), seen: RefCell::new(table), generation: Cell::new(0) }
    }

    /// In place of all regions, `regions`.
    pub fn replace(&self, regions: Vec<(Region, OwnedFd)>) -> Result<(), RegionError> {
        let slots = regions.into_iter().map(|(region, file)| Slot::new(region, file)).collect::<Result<_, _>>()?;
        self.set(slots)
    }

    /// One more region.
    pub fn add(&self, region: Region, file: OwnedFd) -> Result<(), RegionError> {
        let mut slots = self.table().slots.clone();
        slots.push(Slot::new(region, file)?);
        self.set(slots)
    }

    /// Takes `region` away; where it starts in its file does not matter.
    pub fn remove(&self, region: Region) -> Result<(), RegionError> {
        let Region { guest, size, user, .. } = region;
        let mut slots = self.table().slots.clone();
        let same = |slot: &Slot| (slot.region.guest, slot.region.size, slot.region.user) == (guest, size, user);
        let at = slots.iter().position(same).ok_or(RegionError::NotThere { guest, size })?;
        slots.remove(at);
        self.set(slots)
    }

    /// No regions any more.
    pub fn clear(&self) {
        self.install(Table::new(Vec::new()));
    }

    /// The guest-physical address of what the front end has at `user`.
    pub fn guest_address(&self, user: u64) -> Option<u64> {
        let table = self.table();
        let slot = table.slots.iter().find(|slot| user.wrapping_sub(slot.region.user) < slot.region.size)?;
        Some(slot.region.guest + (user - slot.region.user))
    }

    fn table(&self) -> Arc<Table> {
        lock(&self.shared.table).clone()
    }

    fn set(&self, slots: Vec<Slot>) -> Result<(), RegionError> {
        if slots.len() as u64 > MEM_SLOTS {
            return Err(RegionError::TooMany);
        }
        let mut sorted: Vec<_> = slots.iter().map(|slot| slot.region).collect();
        sorted.sort_by_key(|region| region.guest);
        let mut end = 0;
        for Region { guest, size, .. } in sorted {
            if guest < end {
                return Err(RegionError::Overlaps { guest, size });
            }
            end = guest + size;
        }
        self.install(Table::new(slots));
        Ok(())
    }

    fn install(&self, table: Table) {
        let mut current = lock(&self.shared.table);
        *current = Arc::new(table);
        self.shared.generation.fetch_add(1, Ordering::Release);
    }

    /// Calls `look` with the table of now.
    #[inline(always)]
    fn with<T>(&self, look: impl FnOnce(&Arc<Table>) -> T) -> T {
        if self.shared.generation.load(Ordering::Acquire) != self.generation.get() {
            self.look_again();
        }
        look(&self.seen.borrow())
    }

    #[cold]
    fn look_again(&self) {
        let current = lock(&self.shared.table);
        self.generation.set(self.shared.generation.load(Ordering::Acquire));
        *self.seen.borrow_mut() = current.clone();
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Clone for Memory {
    fn clone(&self) -> Self {
        let (seen, generation) = (self.seen.clone(), self.generation.clone());
        Self { shared: self.shared.clone(), seen, generation }
    }
}

impl Slot {
    fn new(region: Region, file: OwnedFd) -> Result<Self, RegionError> {
        let Region { guest, size, user, offset } = region;
        if guest.checked_add(size).is_none() || user.checked_add(size).is_none() {
            return Err(RegionError::Wraps { guest, size, user });
        }
        let pages = map(file, offset, size).map_err(|reason| RegionError::Map { guest, size, reason })?;
        Ok(Self { region, pages })
    }
}

impl Table {
    /// The regions do not overlap: [`Memory::set`] has checked that.
    fn new(slots: Vec<Slot>) -> Self {
        let flat = FlatMemory::new(slots.iter().map(|slot| (slot.region.guest, slot.pages.clone())));
        Self { slots, flat }
    }
}

/// The same bytes, kept mapped by `table`.
#[inline(always)]
fn keep<L>(segment: &Segment<L>, table: &Arc<Table>) -> Option<Segment<Mapped>> {
    let start = NonNull::new(segment.as_ptr())?;
    // SAFETY: the segment was resolved from this table, which owns the mapping; nobody has a reference to the bytes.
    Some(unsafe { Segment::new(start, segment.len(), Mapped { table: table.clone() }) })
}

impl GuestMemory for Memory {
    type Lease = Mapped;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        access: Access,
        mut segments: impl FnMut(Segment<Mapped>),
    ) -> Result<(), MemoryError> {
        self.with(|table| {
            (&table.flat).resolve(address, len, access, |segment| {
                if let Some(segment) = keep(&segment, table) {
                    segments(segment);
                }
            })
        })
    }

    #[inline(always)]
    fn resolve_at_once(&self, address: u64, len: u64, access: Access) -> Option<Segment<Mapped>> {
        self.with(|table| keep(&(&table.flat).resolve_at_once(address, len, access)?, table))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
