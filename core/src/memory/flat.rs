//! A flat map: guest memory as ranges of host memory (KVM's memory slots, lguest's base and offset, a shared file).

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::marker::PhantomData;

use super::{Access, GuestMemory, Lease, MemoryError, Owner, Pages, ResolveError, Segment};

/// Guest-physical ranges and the host memory behind each.
///
/// Handles to it resolve addresses: `&FlatMemory`, whose segments borrow the map and cost nothing;
/// `Arc<FlatMemory>`, whose segments own it and may go to another thread; and [`ByRegion`], whose segments own the region
/// that they are in, and nothing else of the map.
#[derive(Debug)]
pub struct FlatMemory {
    /// The first region, here where it is found without a further look; a map often has no other.
    first: Region,
    /// All others, by address.
    others: Box<[Region]>,
    /// For each 2^`shift` bytes of addresses, which of the others is the first that ends behind their start: however many
    /// regions there are, one of them is found as fast as another.
    index: Box<[u32]>,
    shift: u32,
}

/// The most entries of [`FlatMemory::index`].
const INDEX_LEN: u64 = 4096;

#[derive(Debug)]
struct Region {
    base: u64,
    pages: Pages,
}

impl Region {
    /// Whether a byte of it is at `address`.
    #[inline(always)]
    fn holds(&self, address: u64) -> bool {
        // One comparison for both ends: below the base the difference wraps to a large number.
        address.wrapping_sub(self.base) < self.pages.len() as u64
    }
}

impl FlatMemory {
    /// Makes a map of `regions`: guest-physical start and host memory of each.
    ///
    /// # Panics
    /// If regions overlap or reach beyond 2^64: that is a mistake of the host.
    pub fn new(regions: impl IntoIterator<Item = (u64, Pages)>) -> Self {
        let mut regions: Vec<_> = regions.into_iter().map(|(base, pages)| Region { base, pages }).collect();
        regions.sort_by_key(|region| region.base);
        let mut end = 0u128;
        for region in &regions {
            assert!(u128::from(region.base) >= end, "regions of guest memory overlap");
            end = u128::from(region.base) + region.pages.len() as u128;
        }
        assert!(end <= 1 << 64, "a region of guest memory reaches beyond 2^64");
        let mut regions = regions.into_iter();
        let first = regions.next().unwrap_or_else(|| Region { base: 0, pages: Pages::empty() });
        let others: Box<[Region]> = regions.collect();
        let last = u64::try_from(end.saturating_sub(1)).unwrap_or(u64::MAX);
        let shift = (u64::BITS - last.leading_zeros()).saturating_sub(INDEX_LEN.ilog2());
        let ends = |region: &Region| u128::from(region.base) + region.pages.len() as u128;
        let first_behind = |slot: u64| others.partition_point(|region| ends(region) <= u128::from(slot << shift));
        let slots = if others.is_empty() { 0 } else { (last >> shift) + 1 };
        let index = (0..slots).map(|slot| first_behind(slot) as u32).collect();
        Self { first, others, index, shift }
    }

    /// The host memory behind `address .. address + len`, if it lies in one region: for the side that owns it.
    pub fn pages(&self, address: u64, len: usize) -> Option<Pages> {
        let region = self.region(address)?;
        region.pages.slice((address - region.base) as usize, len)
    }

    #[inline(always)]
    fn region(&self, address: u64) -> Option<&Region> {
        if self.first.holds(address) {
            return Some(&self.first);
        }
        let from = *self.index.get(usize::try_from(address >> self.shift).ok()?)?;
        let region = self.others.get(from as usize)?;
        if region.holds(address) { Some(region) } else { self.region_from(from, address) }
    }

    /// Where several regions begin within 2^`shift` bytes: the one from `from` on that holds `address`.
    #[cold]
    fn region_from(&self, from: u32, address: u64) -> Option<&Region> {
        let candidates = self.others.get(from as usize..)?;
        let behind = candidates.partition_point(|region| region.base <= address);
        candidates[..behind].last().filter(|region| region.holds(address))
    }

    /// What lies in one region.
    #[inline(always)]
    fn resolve_at_once<L>(&self, address: u64, len: u64, lease: impl Fn(&Owner) -> L) -> Option<Segment<L>> {
        let region = self.region(address)?;
        let offset = address - region.base;
        // A `len` of 0 wraps to more than any region has.
        let inside = len.wrapping_sub(1) < region.pages.len() as u64 - offset;
        // SAFETY: the part is inside; `lease` borrows or owns the map, which owns the pages, or owns the pages.
        inside.then(|| unsafe { region.pages.part_inside(offset as usize, len as usize, lease(region.pages.lease())) })
    }

    fn resolve<L>(
        &self,
        address: u64,
        len: u64,
        lease: impl Fn(&Owner) -> L,
        mut segments: impl FnMut(Segment<L>),
    ) -> Result<(), ResolveError> {
        if len > 0 && address.checked_add(len - 1).is_none() {
            return Err(MemoryError::Wraps { address, len }.into());
        }
        let mut done = 0;
        while done < len {
            let at = address + done;
            let region = self.region(at).ok_or(MemoryError::NotMapped { address, len })?;
            let offset = (at - region.base) as usize;
            let here = (len - done).min((region.pages.len() - offset) as u64);
            // SAFETY: as in `resolve`.
            if let Some(part) = unsafe { region.pages.part(offset, here as usize, lease(region.pages.lease())) } {
                segments(part);
            }
            done += here;
        }
        Ok(())
    }
}

/// The lease of memory that a borrow keeps alive.
#[derive(Clone, Copy, Debug)]
pub struct Borrowed<'m>(PhantomData<&'m FlatMemory>);

impl Lease for Borrowed<'_> {}
impl Lease for Arc<FlatMemory> {}

impl<'m> GuestMemory for &'m FlatMemory {
    type Lease = Borrowed<'m>;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        _access: Access,
        segments: impl FnMut(Segment<Self::Lease>),
    ) -> Result<(), ResolveError> {
        FlatMemory::resolve(self, address, len, |_| Borrowed(PhantomData), segments)
    }

    #[inline(always)]
    fn resolve_at_once(&self, address: u64, len: u64, _access: Access) -> Option<Segment<Self::Lease>> {
        FlatMemory::resolve_at_once(self, address, len, |_| Borrowed(PhantomData))
    }
}

impl GuestMemory for Arc<FlatMemory> {
    type Lease = Arc<FlatMemory>;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        _access: Access,
        segments: impl FnMut(Segment<Self::Lease>),
    ) -> Result<(), ResolveError> {
        FlatMemory::resolve(self, address, len, |_| Arc::clone(self), segments)
    }

    #[inline(always)]
    fn resolve_at_once(&self, address: u64, len: u64, _access: Access) -> Option<Segment<Self::Lease>> {
        FlatMemory::resolve_at_once(self, address, len, |_| Arc::clone(self))
    }
}

/// A handle whose segments own the region that they are in: one that is taken out of the map is freed as soon as nothing
/// of it is in use.
#[derive(Clone, Copy, Debug)]
pub struct ByRegion<'m>(pub &'m FlatMemory);

impl GuestMemory for ByRegion<'_> {
    type Lease = Owner;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        _access: Access,
        segments: impl FnMut(Segment<Self::Lease>),
    ) -> Result<(), ResolveError> {
        self.0.resolve(address, len, Arc::clone, segments)
    }

    #[inline(always)]
    fn resolve_at_once(&self, address: u64, len: u64, _access: Access) -> Option<Segment<Self::Lease>> {
        self.0.resolve_at_once(address, len, Arc::clone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;

    fn resolve(memory: &FlatMemory, address: u64, len: u64) -> Result<Vec<usize>, ResolveError> {
        let mut lens = vec![];
        GuestMemory::resolve(&memory, address, len, Access::READ, |segment| lens.push(segment.len()))?;
        Ok(lens)
    }

    #[test]
    fn a_range_may_end_exactly_at_the_end_of_memory_but_not_one_byte_beyond() {
        let memory = FlatMemory::new([(0x1000, Pages::allocate(0x1000))]);
        assert_eq!(resolve(&memory, 0x1ff0, 0x10), Ok(vec![0x10]));
        assert_eq!(resolve(&memory, 0x1000, 0x1000), Ok(vec![0x1000]));
        assert!(matches!(resolve(&memory, 0x1ff0, 0x11), Err(ResolveError::Fault(MemoryError::NotMapped { .. }))));
        assert!(matches!(resolve(&memory, 0xfff, 2), Err(ResolveError::Fault(MemoryError::NotMapped { .. }))));
        assert!(matches!(resolve(&memory, 0x2000, 1), Err(ResolveError::Fault(MemoryError::NotMapped { .. }))));
    }

    #[test]
    fn a_range_that_wraps_is_an_error_even_if_memory_begins_at_zero_and_ends_at_the_top() {
        let top = 0u64.wrapping_sub(0x1000);
        let memory = FlatMemory::new([(0, Pages::allocate(0x1000)), (top, Pages::allocate(0x1000))]);
        assert_eq!(resolve(&memory, top, 0x1000), Ok(vec![0x1000]));
        assert!(matches!(resolve(&memory, top, 0x1001), Err(ResolveError::Fault(MemoryError::Wraps { .. }))));
        assert!(matches!(resolve(&memory, top + 1, u64::MAX), Err(ResolveError::Fault(MemoryError::Wraps { .. }))));
    }

    #[test]
    fn neighbours_give_several_segments_and_a_hole_gives_an_error() {
        let memory = FlatMemory::new([
            (0x4000, Pages::allocate(0x1000)),
            (0x1000, Pages::allocate(0x1000)),
            (0x2000, Pages::allocate(0x1000)),
        ]);
        assert_eq!(resolve(&memory, 0x1800, 0x1000), Ok(vec![0x800, 0x800]));
        assert!(matches!(resolve(&memory, 0x2800, 0x2000), Err(ResolveError::Fault(MemoryError::NotMapped { .. }))));
    }

    #[test]
    fn a_piece_keeps_its_region_and_no_other() {
        let regions = [0x1000, 0x2000].map(|base| (base, Pages::allocate(0x1000)));
        let owners = regions.clone().map(|(_, pages)| Arc::downgrade(&pages.into_lease()));
        let memory = FlatMemory::new(regions);
        let piece = ByRegion(&memory).resolve_at_once(0x1ff0, 0x10, Access::READ).unwrap();
        drop(memory);
        assert_eq!(owners.clone().map(|owner| owner.strong_count()), [1, 0]);
        drop(piece);
        assert_eq!(owners.map(|owner| owner.strong_count()), [0, 0]);
    }

    #[test]
    fn of_many_regions_that_lie_close_together_each_is_found() {
        // One far away, so that the others share an entry of the index.
        let close = (0..64).map(|page| 2 * page * 0x1000);
        let bases: Vec<u64> = close.chain([1 << 50]).collect();
        let memory = FlatMemory::new(bases.iter().map(|base| (*base, Pages::allocate(0x1000))));
        for base in bases {
            assert_eq!(resolve(&memory, base + 0xff0, 0x10), Ok(vec![0x10]));
            assert!(resolve(&memory, base + 0x1000, 1).is_err());
        }
    }

    #[test]
    fn an_empty_range_needs_no_memory() {
        let memory = FlatMemory::new([]);
        assert_eq!(resolve(&memory, 0x1234, 0), Ok(vec![]));
    }
}
