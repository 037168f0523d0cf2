//! Sharing where devices see all of guest memory as it is (KVM, lguest, UML): an allocation is at its guest-physical
//! address already, and sharing it is bookkeeping.
#![allow(unsafe_code)]

use std::any::Any;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polyvirt_core::hypervisor::{HypervisorError, Share};
use polyvirt_core::memory::{Access, Pages};

const PAGE: usize = 4096;

/// The part of guest RAM that drivers allocate from.
pub struct FlatShare {
    base: u64,
    ram: Pages,
    ranges: Arc<Mutex<Ranges>>,
}

/// What is free and what is not: offset in bytes from the start of the RAM, always whole pages.
struct Ranges {
    free: BTreeMap<usize, usize>,
    used: BTreeMap<usize, Used>,
}

struct Used {
    len: usize,
    shares: usize,
}

impl FlatShare {
    /// Allocations come out of `ram`, which is at guest-physical `base`.
    pub fn new(base: u64, ram: Pages) -> Self {
        let whole = ram.len() / PAGE * PAGE;
        let free = BTreeMap::from_iter((whole > 0).then_some((0, whole)));
        Self { base, ram, ranges: Arc::new(Mutex::new(Ranges { free, used: BTreeMap::new() })) }
    }
}

impl Share for FlatShare {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        let exhausted = HypervisorError::Exhausted("guest memory");
        let Some(len) = len.max(1).checked_next_multiple_of(PAGE) else { return Err(exhausted) };
        let Some(offset) = lock(&self.ranges).take(len) else { return Err(exhausted) };
        let owner = Allocation { ranges: Arc::clone(&self.ranges), offset, ram: self.ram.clone() };
        let pages = self.ram.slice(offset, len).expect("a free range is inside the RAM");
        pages.fill(0, len, 0).expect("the fill is as long as the range");
        let start = NonNull::new(pages.as_ptr()).expect("RAM is not at the null pointer");
        // SAFETY: the bytes are part of the RAM, which the owner keeps mapped; nobody has a reference to them.
        Ok(unsafe { Pages::new(start, len, Arc::new(owner) as Arc<dyn Any + Send + Sync>) })
    }

    fn share(&self, pages: &Pages, _access: Access) -> Result<u64, HypervisorError> {
        let offset = pages.as_ptr().addr().wrapping_sub(self.ram.as_ptr().addr());
        match lock(&self.ranges).used.get_mut(&offset) {
            Some(used) if used.len == pages.len() => {
                used.shares += 1;
                Ok(self.base + offset as u64)
            }
            _ => {
                let reason = format!("expected a whole allocation, got {:p}+{:#x}", pages.as_ptr(), pages.len());
                Err(HypervisorError::Refused { call: "share", reason })
            }
        }
    }

    fn unshare(&self, address: u64) -> Result<(), HypervisorError> {
        let offset = usize::try_from(address.wrapping_sub(self.base)).unwrap_or(usize::MAX);
        match lock(&self.ranges).used.get_mut(&offset) {
            Some(used) if used.shares > 0 => {
                used.shares -= 1;
                Ok(())
            }
            _ => {
                let reason = format!("nothing is shared at {address:#x}");
                Err(HypervisorError::Refused { call: "unshare", reason })
            }
        }
    }
}

impl Ranges {
    fn take(&mut self, len: usize) -> Option<usize> {
        let (&offset, &size) = self.free.iter().find(|&(_, &size)| size >= len)?;
        self.free.remove(&offset);
        if size > len {
            self.free.insert(offset + len, size - len);
        }
        self.used.insert(offset, Used { len, shares: 0 });
        Some(offset)
    }

    fn give_back(&mut self, mut offset: usize) {
        let Some(Used { mut len, .. }) = self.used.remove(&offset) else { return };
        if let Some(after) = self.free.remove(&(offset + len)) {
            len += after;
        }
        if let Some((&before, &size)) = self.free.range(..offset).next_back()
            && before + size == offset
        {
            offset = before;
            len += size;
        }
        self.free.insert(offset, len);
    }
}

/// What an allocation's handles own together.
struct Allocation {
    ranges: Arc<Mutex<Ranges>>,
    offset: usize,
    /// Keeps the RAM mapped.
    #[allow(dead_code)]
    ram: Pages,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        lock(&self.ranges).give_back(self.offset);
    }
}

fn lock(ranges: &Mutex<Ranges>) -> MutexGuard<'_, Ranges> {
    ranges.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share_of_four_pages() -> FlatShare {
        FlatShare::new(0x1000, Pages::allocate(4 * PAGE))
    }

    #[test]
    fn a_dropped_allocation_is_handed_out_again_and_zeroed() {
        let share = share_of_four_pages();
        let pages = share.allocate(4 * PAGE - 1).unwrap();
        assert_eq!(pages.len(), 4 * PAGE);
        pages.fill(0, pages.len(), 0xaa).unwrap();
        let part = pages.slice(PAGE, 16).unwrap();
        drop(pages);
        assert_eq!(share.allocate(1).unwrap_err(), HypervisorError::Exhausted("guest memory"), "a handle is left");
        drop(part);
        let again = share.allocate(4 * PAGE).unwrap();
        let mut bytes = vec![1; 4 * PAGE];
        again.read(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn neighbours_given_back_in_any_order_become_one_range() {
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
            let share = share_of_four_pages();
            let mut pages: Vec<_> = (0..4).map(|_| share.allocate(PAGE).ok()).collect();
            order.iter().for_each(|&index: &usize| pages[index] = None);
            assert!(share.allocate(4 * PAGE).is_ok(), "{order:?}");
        }
    }

    #[test]
    fn what_cannot_be_allocated_is_refused_and_changes_nothing() {
        let share = share_of_four_pages();
        for len in [4 * PAGE + 1, usize::MAX] {
            assert_eq!(share.allocate(len).unwrap_err(), HypervisorError::Exhausted("guest memory"));
        }
        assert!(share.allocate(4 * PAGE).is_ok());
    }

    #[test]
    fn only_a_whole_allocation_is_shared_and_only_what_is_shared_is_taken_back() {
        let share = share_of_four_pages();
        let _first = share.allocate(PAGE).unwrap();
        let pages = share.allocate(2 * PAGE).unwrap();
        assert_eq!(share.share(&pages, Access::READ), Ok(0x2000));
        assert!(share.share(&pages.slice(0, PAGE).unwrap(), Access::READ).is_err());
        assert!(share.share(&Pages::allocate(2 * PAGE), Access::READ).is_err());
        assert_eq!(share.unshare(0x2000), Ok(()));
        for address in [0, 0x1000, 0x2000, 0x3000, u64::MAX] {
            assert!(share.unshare(address).is_err(), "{address:#x}");
        }
    }
}
