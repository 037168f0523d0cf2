//! Guest memory as the front end hands it over: regions of files, mapped, and translations in front of them.
#![allow(unsafe_code)]

use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use polyvirt_core::memory::{
    Access, ByRegion, FlatMemory, GuestMemory, Lease, MemoryError, Pages, Pending, ResolveError, Segment, Translated,
};

use super::log::DirtyLog;
use super::messages::{Iotlb, Region};
use super::misses::Misses;
use super::regions::{RegionError, Slot, check};

/// The most runs of pages that translations are kept of: then all are forgotten, and asked for again.
const TRANSLATIONS: usize = 1 << 14;

/// A handle to the memory of the session: sees every change of it. What was resolved keeps its region mapped, so a change
/// takes nothing away under a request that is in flight.
#[derive(Clone, Default)]
pub struct Memory {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    table: RwLock<Table>,
    log: Arc<DirtyLog>,
    /// Translations that are missing.
    misses: Mutex<Misses>,
}

/// The memory of the session at one time.
struct Table {
    slots: Vec<Arc<Slot>>,
    flat: FlatMemory,
    /// What device addresses mean; none if they are guest-physical.
    translated: Option<Translated<()>>,
}

/// Keeps a region of guest memory mapped, and logs what is written to a piece of it.
#[derive(Clone)]
pub struct Mapped {
    slot: Arc<Slot>,
    /// Where the piece is in our address space.
    start: usize,
}

impl Lease for Mapped {
    #[inline(always)]
    fn after_store(&self, offset: usize, len: usize) {
        if self.slot.log.is_active() {
            self.log_write(offset, len);
        }
    }
}

impl Mapped {
    #[cold]
    fn log_write(&self, offset: usize, len: usize) {
        self.slot.log.mark(self.log_address(offset), len as u64);
    }

    /// Where the byte at `offset` is for the guest.
    fn log_address(&self, offset: usize) -> u64 {
        self.slot.guest_of(self.start + offset)
    }
}

impl Memory {
    /// No memory at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// In place of all regions, `regions`. One that is there already stays as it is.
    pub fn replace(&self, regions: Vec<(Region, OwnedFd)>) -> Result<(), RegionError> {
        check(regions.iter().map(|(region, _)| region))?;
        let old = self.table().slots.clone();
        let slot = |(region, file)| match old.iter().find(|slot| slot.is(&region, &file)) {
            Some(slot) => Ok(Arc::clone(slot)),
            None => Slot::new(region, file, self.shared.log.clone()).map(Arc::new),
        };
        let slots = regions.into_iter().map(slot).collect::<Result<_, _>>()?;
        self.table_mut().set(slots);
        Ok(())
    }

    /// One more region.
    pub fn add(&self, region: Region, file: OwnedFd) -> Result<(), RegionError> {
        let mut slots = self.table().slots.clone();
        check(slots.iter().map(|slot| &slot.region).chain([&region]))?;
        slots.push(Arc::new(Slot::new(region, file, self.shared.log.clone())?));
        self.table_mut().set(slots);
        Ok(())
    }

    /// Takes `region` away; where it starts in its file does not matter. It is unmapped once nothing of it is in use.
    pub fn remove(&self, region: Region) -> Result<(), RegionError> {
        let Region { guest, size, user, .. } = region;
        let mut slots = self.table().slots.clone();
        let same = |slot: &Arc<Slot>| (slot.region.guest, slot.region.size, slot.region.user) == (guest, size, user);
        let at = slots.iter().position(same).ok_or(RegionError::NotThere { guest, size })?;
        slots.remove(at);
        self.table_mut().set(slots);
        Ok(())
    }

    /// No regions any more, no log, and device addresses are guest-physical.
    pub(super) fn clear(&self) {
        self.shared.log.reset();
        lock(&self.shared.misses).clear();
        *self.table_mut() = Table::default();
    }

    /// A region whose file became shorter than it was: guest-physical start, bytes.
    pub(super) fn lost(&self) -> Option<(u64, u64)> {
        let table = self.table();
        let lost = table.slots.iter().find(|slot| slot.is_lost())?;
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
        let mut table = self.table_mut();
        if wanted != table.translated.is_some() {
            lock(&self.shared.misses).clear();
            table.translated = wanted.then(|| Translated::new((), []));
        }
    }

    /// Learns a translation.
    pub(super) fn learn(&self, update: Iotlb) -> Result<(), RegionError> {
        let Iotlb { iova, size, user, access, .. } = update;
        let mut table = self.table_mut();
        let place = table.region(user);
        let Some(translated) = &mut table.translated else { return Ok(()) };
        let inside = place.filter(|(_, left)| size > 0 && size <= *left && iova.checked_add(size).is_some());
        let (guest, _) = inside.ok_or(RegionError::Nowhere { iova, size, user })?;
        if translated.len() >= TRANSLATIONS {
            *translated = Translated::new((), []);
        }
        translated.map(iova, size, guest, Access::from_bits_truncate(access));
        lock(&self.shared.misses).found(iova, size);
        Ok(())
    }

    /// Forgets translations.
    pub(super) fn forget(&self, iova: u64, size: u64) {
        if let Some(translated) = &mut self.table_mut().translated {
            translated.unmap(iova, size);
        }
    }

    /// What was asked for and not learnt is asked for again: the driver may have mapped it meanwhile.
    pub(super) fn ask_again(&self) {
        lock(&self.shared.misses).ask_again();
    }

    /// Translations that are to be asked for; each once.
    pub(super) fn misses(&self) -> Vec<Iotlb> {
        lock(&self.shared.misses).take()
    }

    /// Whether all of a range can be resolved by what is known.
    pub(super) fn knows(&self, address: u64, len: u64, access: Access) -> bool {
        self.table().resolve(address, len, access, |_| {}).is_ok()
    }

    /// Where a range is, if it is one piece by what is known.
    pub(super) fn place(&self, address: u64, len: u64, access: Access) -> Option<usize> {
        let mut only = None;
        let found = self.table().resolve(address, len, access, |piece| {
            only.get_or_insert((piece.as_ptr().addr(), piece.len() as u64));
        });
        found.ok().and(only).filter(|(_, all)| *all == len).map(|(start, _)| start)
    }

    /// The guest-physical address of a range, if it is one piece by what is known.
    pub(super) fn guest_place(&self, address: u64, len: u64, access: Access) -> Option<u64> {
        let mut only = None;
        self.resolve(address, len, access, |piece| only = Some((piece.lease().log_address(0), piece.len()))).ok()?;
        only.filter(|(_, all)| *all as u64 == len).map(|(guest, _)| guest)
    }

    /// As many bytes at a device address as one piece of host memory has, under its owner.
    pub(super) fn pages(&self, address: u64, len: u64) -> Option<Pages> {
        let mut only = None;
        self.table().resolve(address, len, Access::READ, |piece| only = Some(piece)).ok()?;
        only.filter(|piece| piece.len() as u64 == len)
    }

    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.shared.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.shared.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The translation of a range is missing: it is asked for. One that does not grant what is wanted is there.
    fn missing(&self, error: ResolveError, access: Access) -> ResolveError {
        let ResolveError::Fault(MemoryError::NotMapped { address, len }) = error else { return error };
        lock(&self.shared.misses).add(address, len, access);
        Pending { address, len }.into()
    }
}

impl Default for Table {
    fn default() -> Self {
        Self { slots: Vec::new(), flat: FlatMemory::new([]), translated: None }
    }
}

impl Table {
    /// In place of all regions, `slots`, which were checked.
    fn set(&mut self, slots: Vec<Arc<Slot>>) {
        let regions = slots.iter().filter_map(|slot| Some((slot.region.guest, slot.bytes()?)));
        self.flat = FlatMemory::new(regions);
        self.slots = slots;
    }

    /// The guest-physical address of what the front end has at `user`, and how many bytes are left of its region.
    fn region(&self, user: u64) -> Option<(u64, u64)> {
        let slot = self.slots.iter().find(|slot| user.wrapping_sub(slot.region.user) < slot.region.size)?;
        let offset = user - slot.region.user;
        Some((slot.region.guest + offset, slot.region.size - offset))
    }

    /// The pieces of a range, each of which keeps its region.
    fn resolve(&self, address: u64, len: u64, access: Access, pieces: impl FnMut(Pages)) -> Result<(), ResolveError> {
        let flat = ByRegion(&self.flat);
        match &self.translated {
            None => flat.resolve(address, len, access, pieces),
            Some(translated) => translated.over(flat).resolve(address, len, access, pieces),
        }
    }
}

/// The same bytes, kept mapped by their slot.
#[inline(always)]
fn keep(piece: Pages) -> Option<Segment<Mapped>> {
    let (start, len) = (NonNull::new(piece.as_ptr())?, piece.len());
    let slot = piece.into_lease().downcast::<Slot>().ok()?;
    let lease = Mapped { slot, start: start.as_ptr().addr() };
    // SAFETY: the slot is what kept them; nobody has a reference to the bytes.
    Some(unsafe { Segment::new(start, len, lease) })
}

impl GuestMemory for Memory {
    type Lease = Mapped;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        access: Access,
        mut segments: impl FnMut(Segment<Mapped>),
    ) -> Result<(), ResolveError> {
        let table = self.table();
        let each = |piece| keep(piece).into_iter().for_each(&mut segments);
        let resolved = table.resolve(address, len, access, each);
        match &table.translated {
            None => resolved,
            Some(_) => resolved.map_err(|error| self.missing(error, access)),
        }
    }

    #[inline(always)]
    fn resolve_at_once(&self, address: u64, len: u64, access: Access) -> Option<Segment<Mapped>> {
        let table = self.table();
        if table.translated.is_some() {
            return None;
        }
        keep(ByRegion(&table.flat).resolve_at_once(address, len, access)?)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
