//! A part of the address space for mappings that come and go.
//!
//! The page tables of a PV domain are Xen's to check: to make one, and to free it, takes hypercalls and flushes. A mapping
//! far from all others needs one for itself, each time. Here they are neighbours, and one page table stays: it has a page
//! that is always mapped. On the emulated machine of the lab a grant is mapped in a seventh of the time.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{LazyLock, Mutex};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

use super::super::abi::PAGE_SIZE;
use super::super::lock;
use crate::mapping::Mapping;

/// Pages of an arena: those of one page table.
const PAGES: usize = 512;
const BYTES: usize = PAGES * PAGE_SIZE;
const PRIVATE_FIXED: MapFlags = MapFlags::MAP_PRIVATE.union(MapFlags::MAP_FIXED);

/// Addresses that nothing else is mapped at. Arenas are there until the process ends.
pub(super) struct Arena(Option<Region>);

struct Region {
    /// Owns all addresses; it begins before the region does, for alignment.
    _addresses: Mapping,
    start: NonNull<c_void>,
    taken: Mutex<[bool; PAGES]>,
}

impl Arena {
    /// One that is made when it is first used.
    pub(super) const fn new() -> LazyLock<Self> {
        LazyLock::new(|| {
            let region = Region::new();
            // What would have been here is mapped elsewhere.
            Self(region.inspect_err(|error| tracing::warn!(%error, "no arena")).ok())
        })
    }

    /// Has `map` map `size` bytes in the arena, or anywhere if there is no room: where it did.
    pub(super) fn map(
        &'static self,
        size: NonZeroUsize,
        map: impl FnOnce(Option<NonZeroUsize>, MapFlags) -> nix::Result<NonNull<c_void>>,
    ) -> nix::Result<(NonNull<c_void>, Addresses)> {
        match self.take(size.get().div_ceil(PAGE_SIZE)) {
            Some(place) => Ok((map(Some(place.start().addr()), MapFlags::MAP_FIXED)?, Addresses::Arena(place))),
            None => map(None, MapFlags::empty()).map(|start| (start, Addresses::Any(Mapping(start, size.get())))),
        }
    }

    /// A place of `count` pages; none if there is no room.
    fn take(&'static self, count: usize) -> Option<Place> {
        let region = self.0.as_ref()?;
        let mut taken = lock(&region.taken);
        let first = taken.windows(count.max(1)).position(|pages| !pages.contains(&true))?;
        let pages = first..first + count.max(1);
        taken[pages.clone()].fill(true);
        Some(Place { region, pages })
    }
}

impl Region {
    fn new() -> nix::Result<Self> {
        let twice = NonZeroUsize::new(2 * BYTES).ok_or(nix::Error::EINVAL)?;
        // SAFETY: a new mapping wherever there is room harms nobody.
        let all = unsafe { mmap_anonymous(None, twice, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE)? };
        let addresses = Mapping(all, twice.get());
        // SAFETY: less than a region is skipped, and two are mapped.
        let start = unsafe { all.byte_add(all.addr().get().next_multiple_of(BYTES) - all.addr().get()) };
        let page = NonZeroUsize::new(PAGE_SIZE).ok_or(nix::Error::EINVAL)?;
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: in the middle of what was just mapped, and is nobody else's.
        let anchor = unsafe { mmap_anonymous(Some(start.addr()), page, rights, PRIVATE_FIXED)? };
        // SAFETY: mapped for writing. It is there only once it was touched.
        unsafe { anchor.cast::<u8>().write_volatile(1) };
        let mut taken = [false; PAGES];
        taken[0] = true;
        Ok(Self { _addresses: addresses, start, taken: Mutex::new(taken) })
    }
}

// SAFETY: the addresses belong to the process, not to a thread.
unsafe impl Send for Region {}
// SAFETY: as above; who has which is behind a lock.
unsafe impl Sync for Region {}

/// Where something is mapped, until this is dropped.
pub(super) enum Addresses {
    Arena(#[allow(dead_code)] Place),
    Any(#[allow(dead_code)] Mapping),
}

/// Addresses to map something at. Whatever is mapped there is unmapped when this is dropped.
pub(super) struct Place {
    region: &'static Region,
    pages: Range<usize>,
}

impl Place {
    /// Where it is.
    fn start(&self) -> NonNull<c_void> {
        // SAFETY: inside the region.
        unsafe { self.region.start.byte_add(self.pages.start * PAGE_SIZE) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(size) = NonZeroUsize::new(self.pages.len() * PAGE_SIZE) else { return };
        // SAFETY: the place is this one's until now. In one step, so that nobody else's mapping can come in between.
        match unsafe { mmap_anonymous(Some(self.start().addr()), size, ProtFlags::PROT_NONE, PRIVATE_FIXED) } {
            Ok(_) => lock(&self.region.taken)[self.pages.clone()].fill(false),
            // Nobody gets the place any more.
            Err(error) => tracing::error!(%error, "a mapping stays"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static ARENA: LazyLock<Arena> = Arena::new();

    #[test]
    fn places_are_apart_and_come_back_empty() {
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let fill = |place: &Place| {
            let size = NonZeroUsize::new(place.pages.len() * PAGE_SIZE).unwrap();
            // SAFETY: the place is the test's.
            let start = unsafe { mmap_anonymous(Some(place.start().addr()), size, rights, PRIVATE_FIXED) }.unwrap();
            // SAFETY: mapped just now.
            let was = unsafe { start.cast::<u8>().read_volatile() };
            // SAFETY: as above.
            unsafe { start.cast::<u8>().write_bytes(7, size.get()) };
            was
        };
        let [one, two] = [3, 5].map(|count| ARENA.take(count).unwrap());
        assert!(one.pages.end <= two.pages.start && one.pages.start > 0);
        assert_eq!((fill(&one), fill(&two)), (0, 0));
        let again = one.start();
        drop(one);
        let one = ARENA.take(2).unwrap();
        assert_eq!((one.start(), fill(&one)), (again, 0));
        assert!(ARENA.take(PAGES).is_none(), "one page is always mapped");
        drop((one, two));
        assert!(ARENA.take(PAGES - 1).is_some());
    }
}
