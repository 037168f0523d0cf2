//! A page table in front of guest memory: an IOMMU, a TCE window, an IOTLB.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::ops::Range;

use super::{Access, GuestMemory, MemoryError, ResolveError, Segment};

/// Bytes of a page of [`Translated`].
pub const PAGE_SIZE: u64 = 4096;

/// Guest memory behind a page table: each page of the device's address space is mapped to a page of `inner`, with
/// rights, or not at all. A range that is contiguous for the device may come back in pieces.
///
/// The table is fixed; a change makes a new `Translated` (and its rings are resolved anew).
#[derive(Clone)]
pub struct Translated<M> {
    inner: M,
    /// Runs of pages, which do not overlap, by their first page.
    runs: Arc<BTreeMap<u64, Run>>,
}

/// Pages that are neighbours on both sides.
#[derive(Clone, Copy)]
struct Run {
    pages: u64,
    /// The first page's page in `inner`.
    to: u64,
    rights: Access,
}

impl<M> Translated<M> {
    /// Makes a table of `pages`: the page's device-visible address, its address in `inner`, and what the device may do
    /// with it. Addresses are rounded down to pages.
    pub fn new(inner: M, pages: impl IntoIterator<Item = (u64, u64, Access)>) -> Self {
        let run = |to: u64, rights| Run { pages: 1, to: to / PAGE_SIZE, rights };
        let runs = pages.into_iter().map(|(from, to, rights)| (from / PAGE_SIZE, run(to, rights))).collect();
        Self { inner, runs: Arc::new(runs) }
    }

    /// Maps whole pages one after another: `device` onto addresses from `to` on.
    pub fn linear(inner: M, device: Range<u64>, to: u64, rights: Access) -> Self {
        let mut table = Self::new(inner, []);
        table.map(device.start, device.end.saturating_sub(device.start), to, rights);
        table
    }

    /// The same table in front of other memory.
    pub fn over<N>(&self, inner: N) -> Translated<N> {
        Translated { inner, runs: self.runs.clone() }
    }

    /// How many runs of pages there are: what a bound can be put on.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Maps the pages of `len` bytes from `device` on onto those from `to` on, whatever was there before.
    pub fn map(&mut self, device: u64, len: u64, to: u64, rights: Access) {
        let (first, pages) = span(device, len);
        if pages > 0 {
            self.unmap(device, len);
            Arc::make_mut(&mut self.runs).insert(first, Run { pages, to: to / PAGE_SIZE, rights });
        }
    }

    /// Nothing is mapped at the pages of `len` bytes from `device` on any more.
    pub fn unmap(&mut self, device: u64, len: u64) {
        let (first, pages) = span(device, len);
        let end = first.saturating_add(pages);
        let runs = Arc::make_mut(&mut self.runs);
        while let Some((&start, &run)) = runs.range(..end).next_back() {
            let run_end = start.saturating_add(run.pages);
            if run_end <= first {
                break;
            }
            runs.remove(&start);
            if run_end > end {
                runs.insert(end, Run { pages: run_end - end, to: run.to + (end - start), ..run });
            }
            if start < first {
                runs.insert(start, Run { pages: first - start, ..run });
            }
        }
    }
}

/// The first page that `len` bytes from `address` on touch, and how many.
fn span(address: u64, len: u64) -> (u64, u64) {
    let first = address / PAGE_SIZE;
    match len.checked_sub(1) {
        None => (first, 0),
        Some(rest) => (first, address.saturating_add(rest) / PAGE_SIZE - first + 1),
    }
}

impl<M: GuestMemory> GuestMemory for Translated<M> {
    type Lease = M::Lease;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        access: Access,
        mut segments: impl FnMut(Segment<Self::Lease>),
    ) -> Result<(), ResolveError> {
        if len > 0 && address.checked_add(len - 1).is_none() {
            return Err(MemoryError::Wraps { address, len }.into());
        }
        // Neighbouring runs that are neighbours in `inner` too are resolved in one piece.
        let (mut done, mut run) = (0, None::<(u64, u64)>);
        while done < len {
            let at = address + done;
            let page = at / PAGE_SIZE;
            let found = self.runs.range(..=page).next_back().filter(|(start, run)| page - *start < run.pages);
            let Some((&start, &Run { pages, to, rights })) = found else {
                let len = (PAGE_SIZE - at % PAGE_SIZE).min(len - done);
                return Err(MemoryError::NotMapped { address: at, len }.into());
            };
            let left = (pages - (page - start)).saturating_mul(PAGE_SIZE) - at % PAGE_SIZE;
            let here = left.min(len - done);
            if !rights.contains(access) {
                return Err(MemoryError::Forbidden { address: at, len: here, access }.into());
            }
            let to = (to + (page - start)).saturating_mul(PAGE_SIZE).saturating_add(at % PAGE_SIZE);
            run = match run {
                Some((start, size)) if start.checked_add(size) == Some(to) => Some((start, size + here)),
                Some((start, size)) => {
                    self.inner.resolve(start, size, access, &mut segments)?;
                    Some((to, here))
                }
                None => Some((to, here)),
            };
            done += here;
        }
        match run {
            Some((start, size)) => self.inner.resolve(start, size, access, segments),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FlatMemory, Pages};
    use super::*;
    use std::vec;
    use std::vec::Vec;

    #[test]
    fn a_range_splits_where_the_table_does_and_rights_are_kept() {
        let flat = FlatMemory::new([(0, Pages::allocate(0x4000))]);
        flat.pages(0x3000, 1).unwrap().write(0, &[7]).unwrap();
        let rw = Access::READ | Access::WRITE;
        let memory = Translated::new(
            &flat,
            [(0x10000, 0x1000, rw), (0x11000, 0x2000, rw), (0x12000, 0, rw), (0x13000, 0x3000, Access::READ)],
        );
        let resolve = |address, len, access| {
            let mut parts = vec![];
            memory.resolve(address, len, access, |part| parts.push(part))?;
            Ok::<Vec<_>, ResolveError>(parts)
        };
        let lens = |address, len| resolve(address, len, Access::WRITE).map(|p| p.iter().map(Segment::len).collect());
        assert_eq!(lens(0x10800, 0x1000), Ok(vec![0x1000]), "contiguous on both sides");
        assert_eq!(lens(0x11800, 0x1000), Ok(vec![0x800, 0x800]));
        assert!(matches!(lens(0x12800, 0x1000), Err(ResolveError::Fault(MemoryError::Forbidden { .. }))));
        assert!(matches!(lens(0xf000, 1), Err(ResolveError::Fault(MemoryError::NotMapped { .. }))));
        assert!(matches!(lens(0x10000, u64::MAX), Err(ResolveError::Fault(MemoryError::Wraps { .. }))));
        let mut byte = [0];
        resolve(0x13000, 1, Access::READ).unwrap()[0].read(0, &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn what_is_mapped_over_or_unmapped_splits_what_was_there() {
        let flat = FlatMemory::new([(0, Pages::allocate(0x20000))]);
        let rw = Access::READ | Access::WRITE;
        let mut memory = Translated::linear(&flat, 0x100000..0x108000, 0x8000, rw);
        memory.unmap(0x102000, 0x1000);
        memory.map(0x105800, 0x1000, 0x1000, Access::READ);
        let place = |memory: &Translated<&FlatMemory>, address| {
            let mut at = None;
            memory.resolve(address, 1, Access::READ, |part| at = Some(part.as_ptr().addr()))?;
            let base = flat.pages(0, 1).unwrap().as_ptr().addr();
            Ok::<_, ResolveError>(at.unwrap() - base)
        };
        assert_eq!(place(&memory, 0x101fff), Ok(0x9fff));
        assert!(place(&memory, 0x102000).is_err());
        assert_eq!(place(&memory, 0x103000), Ok(0xb000));
        assert_eq!(place(&memory, 0x105000), Ok(0x1000), "whole pages");
        assert_eq!(place(&memory, 0x106000), Ok(0x2000));
        assert_eq!(place(&memory, 0x107000), Ok(0xf000));
        assert_eq!(memory.len(), 4);
        memory.unmap(0, u64::MAX);
        assert!(memory.is_empty());
        memory.map(u64::MAX, 1, 0, rw);
        assert_eq!(place(&memory, u64::MAX), Ok(0xfff));
    }
}
