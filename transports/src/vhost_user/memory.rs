//! Guest memory as the front end hands it over: regions of files, mapped, and translations in front of them.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polyvirt_core::memory::{Access, FlatMemory, GuestMemory, Lease, MemoryError, Pages, Segment, Translated};

use super::inflight::{packed, split};
use super::log::{DirtyLog, UsedLog};
use super::map::{MapError, is_lost, map};
use super::messages::{Iotlb, MEM_SLOTS, Region};

/// The most runs of pages that translations are kept of: then all are forgotten, and asked for again.
const TRANSLATIONS: usize = 1 << 14;

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
    log: Arc<DirtyLog>,
    /// Translations that are missing: asked for by the device, not yet of the front end.
    misses: Mutex<Vec<Iotlb>>,
    /// Areas of a queue that is being started: where, and who wants to see accesses to it.
    watched: Mutex<Vec<(u64, Watch)>>,
}

/// The memory of the session at one time.
struct Table {
    slots: Vec<Slot>,
    flat: Arc<FlatMemory>,
    /// What device addresses mean; none if they are guest-physical.
    translated: Option<Translated<Arc<FlatMemory>>>,
    log: Arc<DirtyLog>,
}

#[derive(Clone)]
struct Slot {
    region: Region,
    pages: Pages,
}

/// Keeps a piece of guest memory mapped, and sees what is done to it.
#[derive(Clone)]
pub struct Mapped {
    table: Arc<Table>,
    /// Where the piece is in our address space.
    start: usize,
    watch: Option<Watch>,
}

/// Which area of a ring this is, and who wants to see accesses to it.
#[derive(Clone)]
pub(super) enum Watch {
    /// An available ring.
    Available(Arc<split::Tracker>),
    /// A used ring, which is logged at an address of its own.
    Used(Arc<UsedLog>, Option<Arc<split::Tracker>>),
    /// A packed ring.
    Packed(Arc<packed::Tracker>),
}

impl Lease for Mapped {
    #[inline(always)]
    fn after_load(&self, offset: usize, len: usize) {
        match &self.watch {
            None | Some(Watch::Used(..)) => {}
            Some(Watch::Available(tracker)) => tracker.read_available(offset, len),
            Some(Watch::Packed(tracker)) => tracker.read_ring(offset, len),
        }
    }

    #[inline(always)]
    fn before_store(&self, offset: usize, len: usize, word: u64) {
        if let Some(Watch::Packed(tracker)) = &self.watch {
            tracker.writes_ring(offset, len, word);
        }
    }

    #[inline(always)]
    fn after_store(&self, offset: usize, len: usize) {
        match &self.watch {
            None | Some(Watch::Available(_)) => {}
            Some(Watch::Used(_, tracker)) => tracker.iter().for_each(|tracker| tracker.wrote_used(offset, len)),
            Some(Watch::Packed(tracker)) => tracker.wrote_ring(),
        }
        if self.table.log.is_active() {
            self.table.log_write(self.start + offset, len);
            if let Some(Watch::Used(log, _)) = &self.watch {
                log.mark(&self.table.log, offset, len);
            }
        }
    }
}

impl Memory {
    /// No memory at all.
    pub fn new() -> Self {
        let log = Arc::<DirtyLog>::default();
        let table = Arc::new(Table::new(Vec::new(), None, log.clone()));
        let shared = Shared {
            table: Mutex::new(table.clone()),
            generation: AtomicU64::new(0),
            log,
            misses: Mutex::default(),
            watched: Mutex::default(),
        };
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

    /// No regions any more, no log, and device addresses are guest-physical.
    pub(super) fn clear(&self) {
        self.shared.log.reset();
        lock(&self.shared.misses).clear();
        self.install(Table::new(Vec::new(), None, self.shared.log.clone()));
    }

    /// A region whose file became shorter than it was: guest-physical start, bytes.
    pub(super) fn lost(&self) -> Option<(u64, u64)> {
        let table = self.table();
        let lost = table.slots.iter().find(|slot| is_lost(&slot.pages))?;
        Some((lost.region.guest, lost.region.size))
    }

    /// The log of writes.
    pub(super) fn log(&self) -> &DirtyLog {
        &self.shared.log
    }

    /// The guest-physical address of what the front end has at `user`.
    pub(super) fn guest_address(&self, user: u64) -> Option<u64> {
        Some(self.table().region(user)?.0)
    }

    /// From now on device addresses are translated, by translations that are still to come; or they are not.
    pub(super) fn translate(&self, wanted: bool) {
        let table = self.table();
        if wanted != table.translated.is_some() {
            lock(&self.shared.misses).clear();
            let translated = wanted.then(|| Translated::new(table.flat.clone(), []));
            self.install(Table::new(table.slots.clone(), translated, self.shared.log.clone()));
        }
    }

    /// Learns a translation.
    pub(super) fn learn(&self, update: Iotlb) -> Result<(), RegionError> {
        let Iotlb { iova, size, user, access, .. } = update;
        let table = self.table();
        let Some(mut translated) = table.translated.clone() else { return Ok(()) };
        let inside =
            table.region(user).filter(|(_, left)| size > 0 && size <= *left && iova.checked_add(size).is_some());
        let (guest, _) = inside.ok_or(RegionError::Nowhere { iova, size, user })?;
        if translated.len() >= TRANSLATIONS {
            translated = Translated::new(table.flat.clone(), []);
        }
        translated.map(iova, size, guest, Access::from_bits_truncate(access));
        lock(&self.shared.misses).retain(|miss| miss.iova.wrapping_sub(iova) >= size);
        self.install(Table::new(table.slots.clone(), Some(translated), self.shared.log.clone()));
        Ok(())
    }

    /// Forgets translations.
    pub(super) fn forget(&self, iova: u64, size: u64) {
        let table = self.table();
        let Some(mut translated) = table.translated.clone() else { return };
        translated.unmap(iova, size);
        self.install(Table::new(table.slots.clone(), Some(translated), self.shared.log.clone()));
    }

    /// What was asked for and not learnt is asked for again: the driver may have mapped it meanwhile.
    pub(super) fn ask_again(&self) {
        lock(&self.shared.misses).retain(|miss| miss.kind == 0);
    }

    /// Translations that are to be asked for; each once.
    pub(super) fn misses(&self) -> Vec<Iotlb> {
        let mut misses = lock(&self.shared.misses);
        let new =
            misses.iter().filter(|miss| miss.kind == 0).map(|miss| Iotlb { kind: Iotlb::MISS, ..*miss }).collect();
        misses.iter_mut().for_each(|miss| miss.kind = Iotlb::MISS);
        new
    }

    /// Whether all of a range can be resolved by what is known.
    pub(super) fn knows(&self, address: u64, len: u64, access: Access) -> bool {
        let table = self.table();
        match &table.translated {
            None => table.flat.resolve(address, len, access, |_| {}).is_ok(),
            Some(translated) => translated.resolve(address, len, access, |_| {}).is_ok(),
        }
    }

    /// The ring areas that are resolved next, at these addresses, are watched.
    pub(super) fn watch(&self, areas: Vec<(u64, Watch)>) {
        *lock(&self.shared.watched) = areas;
    }

    /// Nobody wants to see accesses to what is resolved from now on.
    pub(super) fn unwatch(&self) {
        lock(&self.shared.watched).clear();
    }

    /// As many bytes at a device address as one piece of host memory has, under its owner.
    pub(super) fn pages(&self, address: u64, len: u64) -> Option<Pages> {
        let table = self.table();
        let mut only = None;
        self.resolve(address, len, Access::READ, |segment| only = Some(segment)).ok()?;
        let segment = only.filter(|segment| segment.len() as u64 == len)?;
        let guest = table.guest_of(segment.as_ptr().addr())?;
        table.flat.pages(guest, segment.len())
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
        let translated = self.table().translated.clone();
        self.install(Table::new(slots, translated, self.shared.log.clone()));
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

    /// The translation of a range is missing: it is asked for. One that does not grant what is wanted is there.
    fn missing(&self, error: MemoryError, access: Access) -> MemoryError {
        let MemoryError::NotMapped { address, len } = error else { return error };
        let miss = Iotlb { iova: address, size: len, user: 0, access: access.bits(), kind: 0 };
        let mut misses = lock(&self.shared.misses);
        // As many as there are queues that can wait for one.
        if misses.len() < u16::MAX.into()
            && !misses.iter().any(|known| (known.iova, known.access) == (address, miss.access))
        {
            misses.push(miss);
        }
        MemoryError::NotYet { address, len }
    }

    /// Who wants to see accesses to the ring area at `address`; asked once.
    fn watch_of(&self, address: u64) -> Option<Watch> {
        let mut watched = lock(&self.shared.watched);
        let at = watched.iter().position(|(area, _)| *area == address)?;
        Some(watched.remove(at).1)
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
    fn new(slots: Vec<Slot>, translated: Option<Translated<Arc<FlatMemory>>>, log: Arc<DirtyLog>) -> Self {
        let flat = FlatMemory::new(slots.iter().map(|slot| (slot.region.guest, slot.pages.clone())));
        let flat = Arc::new(flat);
        let translated = translated.map(|table| table.over(flat.clone()));
        Self { slots, flat, translated, log }
    }

    /// The guest-physical address of what the front end has at `user`, and how many bytes are left of its region.
    fn region(&self, user: u64) -> Option<(u64, u64)> {
        let slot = self.slots.iter().find(|slot| user.wrapping_sub(slot.region.user) < slot.region.size)?;
        let offset = user - slot.region.user;
        Some((slot.region.guest + offset, slot.region.size - offset))
    }

    /// The guest-physical address of what we have at `host`.
    fn guest_of(&self, host: usize) -> Option<u64> {
        let offset = |slot: &Slot| host.wrapping_sub(slot.pages.as_ptr().addr());
        let slot = self.slots.iter().find(|slot| offset(slot) < slot.pages.len())?;
        Some(slot.region.guest + offset(slot) as u64)
    }

    #[cold]
    fn log_write(&self, host: usize, len: usize) {
        if let Some(guest) = self.guest_of(host) {
            self.log.mark(guest, len as u64);
        }
    }
}

/// The same bytes, kept mapped by `table`.
#[inline(always)]
fn keep<L>(segment: &Segment<L>, table: &Arc<Table>, watch: Option<Watch>) -> Option<Segment<Mapped>> {
    let start = NonNull::new(segment.as_ptr())?;
    let lease = Mapped { table: table.clone(), start: start.as_ptr().addr(), watch };
    // SAFETY: the segment was resolved from this table, which owns the mapping; nobody has a reference to the bytes.
    Some(unsafe { Segment::new(start, segment.len(), lease) })
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
        let watch = self.watch_of(address);
        self.with(|table| {
            let each = |segment: Segment<Arc<FlatMemory>>| {
                if let Some(segment) = keep(&segment, table, watch.clone()) {
                    segments(segment);
                }
            };
            match &table.translated {
                None => table.flat.resolve(address, len, access, each),
                Some(translated) => {
                    translated.resolve(address, len, access, each).map_err(|error| self.missing(error, access))
                }
            }
        })
    }

    #[inline(always)]
    fn resolve_at_once(&self, address: u64, len: u64, access: Access) -> Option<Segment<Mapped>> {
        self.with(|table| {
            if table.translated.is_some() {
                return None;
            }
            let flat = &*table.flat;
            keep(&flat.resolve_at_once(address, len, access)?, table, None)
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
