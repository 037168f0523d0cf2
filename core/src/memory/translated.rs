//! A page table in front of guest memory: an IOMMU, a TCE window, an IOTLB.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::ops::Range;

use super::{Access, GuestMemory, MemoryError, Segment};

/// Bytes of a page of [`Translated`].
pub const PAGE_SIZE: u64 = 4096;

/// Guest memory behind a page table: each page of the device's address space is mapped to a page of `inner`, with
/// rights, or not at all. A range that is contiguous for the device may come back in pieces.
///
/// The table is fixed; a change makes a new `Translated` (and its rings are resolved anew).
#[derive(Clone)]
pub struct Translated<M> {
    inner: M,
    pages: Arc<BTreeMap<u64, (u64, Access)>>,
}

impl<M> Translated<M> {
    /// Makes a table of `pages`: the page's device-visible address, its address in `inner`, and what the device may do
    /// with it. Addresses are rounded down to pages.
    pub fn new(inner: M, pages: impl IntoIterator<Item = (u64, u64, Access)>) -> Self {
        let pages = pages.into_iter().map(|(from, to, rights)| (from / PAGE_SIZE, (to / PAGE_SIZE, rights))).collect();
        Self { inner, pages: Arc::new(pages) }
    }

    /// Maps whole pages one after another: `device` onto addresses from `to` on.
    pub fn linear(inner: M, device: Range<u64>, to: u64, rights: Access) -> Self {
        let pages = device.clone().step_by(PAGE_SIZE as usize);
        Self::new(inner, pages.map(|page| (page, to + (page - device.start), rights)))
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
    ) -> Result<(), MemoryError> {
        if len > 0 && address.checked_add(len - 1).is_none() {
            return Err(MemoryError::Wraps { address, len });
        }
        // Neighbouring pages that are neighbours in `inner` too are resolved in one piece.
        let (mut done, mut run) = (0, None::<(u64, u64)>);
        while done < len {
            let at = address + done;
            let here = (PAGE_SIZE - at % PAGE_SIZE).min(len - done);
            let Some(&(page, rights)) = self.pages.get(&(at / PAGE_SIZE)) else {
                return Err(MemoryError::NotMapped { address: at, len: here });
            };
            if !rights.contains(access) {
                return Err(MemoryError::Forbidden { address: at, len: here, access });
            }
            let to = page * PAGE_SIZE + at % PAGE_SIZE;
            run = match run {
                Some((start, size)) if start + size == to => Some((start, size + here)),
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
            Ok::<Vec<_>, MemoryError>(parts)
        };
        let lens = |address, len| resolve(address, len, Access::WRITE).map(|p| p.iter().map(Segment::len).collect());
        assert_eq!(lens(0x10800, 0x1000), Ok(vec![0x1000]), "contiguous on both sides");
        assert_eq!(lens(0x11800, 0x1000), Ok(vec![0x800, 0x800]));
        assert!(matches!(lens(0x12800, 0x1000), Err(MemoryError::Forbidden { .. })));
        assert!(matches!(lens(0xf000, 1), Err(MemoryError::NotMapped { .. })));
        assert!(matches!(lens(0x10000, u64::MAX), Err(MemoryError::Wraps { .. })));
        let mut byte = [0];
        resolve(0x13000, 1, Access::READ).unwrap()[0].read(0, &mut byte).unwrap();
        assert_eq!(byte, [7]);
    }
}
