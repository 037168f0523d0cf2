//! The memory that a domain's process shares: ordinary pages, in whose place granted ones are while they are shared.
//!
//! gntalloc grants only pages that it allocates itself, and each just once. So when an allocation is shared, its content
//! moves to granted pages, which are mapped in the same place; when it is taken back, the content moves back.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock, Mutex};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::Pages;

use super::super::abi::PAGE_SIZE;
use super::super::lock;
use super::arena::{Addresses, Arena};
use super::gntalloc::Run;
use super::refused;

const RIGHTS: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// Where allocations are, as long as there is room.
static ARENA: LazyLock<Arena> = Arena::new();

/// Allocations.
#[derive(Default)]
pub(super) struct Heap {
    /// Where each allocation starts, and its bytes.
    allocated: Arc<Mutex<BTreeMap<usize, usize>>>,
    /// By reference, the page that is granted under it.
    granted: Mutex<BTreeMap<u32, Pages>>,
}

/// Keeps an allocation mapped and known.
struct Owner {
    allocated: Arc<Mutex<BTreeMap<usize, usize>>>,
    start: usize,
    _addresses: Addresses,
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Before it is unmapped: afterwards the place may be someone else's.
        lock(&self.allocated).remove(&self.start);
    }
}

impl Heap {
    /// `len` bytes, rounded up to whole pages, zeroed.
    pub(super) fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        let len = len.max(1).checked_next_multiple_of(PAGE_SIZE).ok_or(HypervisorError::Exhausted("guest memory"))?;
        let size = NonZeroUsize::new(len).ok_or(HypervisorError::Exhausted("guest memory"))?;
        let (start, addresses) = ARENA
            // SAFETY: a new mapping, at a place that is this one's alone, or wherever there is room.
            .map(size, |at, fixed| unsafe { mmap_anonymous(at, size, RIGHTS, MapFlags::MAP_PRIVATE | fixed) })
            .map_err(|error| refused("mmap", error))?;
        lock(&self.allocated).insert(start.addr().get(), len);
        let owner = Owner { allocated: self.allocated.clone(), start: start.addr().get(), _addresses: addresses };
        // SAFETY: mapped until the owner is dropped; nobody has a reference to the bytes.
        Ok(unsafe { Pages::new(start.cast(), len, Arc::new(owner)) })
    }

    /// How many pages `pages` are, if they can be granted: whole, of one allocation, and not granted yet.
    pub(super) fn grantable(&self, pages: &Pages) -> Result<u32, HypervisorError> {
        let (start, len) = (pages.as_ptr().addr(), pages.len());
        let inside = |(at, size): (&usize, &usize)| start + len <= at + size;
        let whole = start.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) && len > 0;
        if !whole || !lock(&self.allocated).range(..=start).next_back().is_some_and(inside) {
            return Err(refused("grant", format!("expected pages of the domain, got {len} bytes elsewhere")));
        }
        let twice = |page: &Pages| (start..start + len).contains(&page.as_ptr().addr());
        if lock(&self.granted).values().any(twice) {
            return Err(refused("grant", "expected pages that are not granted: gntalloc grants a page once"));
        }
        Ok((len / PAGE_SIZE) as u32)
    }

    /// Puts the granted pages `run` of `file` in the place of `pages`, which are [grantable](Self::grantable).
    pub(super) fn cover(&self, pages: &Pages, file: &File, run: &Run) -> Result<(), HypervisorError> {
        for (number, (reference, &offset)) in (run.first..).zip(&run.offsets).enumerate() {
            let page = pages.slice(number * PAGE_SIZE, PAGE_SIZE).ok_or_else(|| refused("grant", "too many pages"))?;
            let offset = i64::try_from(offset).map_err(|error| refused("mmap of /dev/xen/gntalloc", error))?;
            // SAFETY: of the place `replace` says so.
            let map = |at, size| unsafe {
                mmap(Some(at), size, RIGHTS, MapFlags::MAP_SHARED | MapFlags::MAP_FIXED, file, offset)
            };
            if let Err(error) = replace(&page, map) {
                self.uncover(run.first..reference);
                return Err(refused("mmap of /dev/xen/gntalloc", error));
            }
            lock(&self.granted).insert(reference, page);
        }
        Ok(())
    }

    /// Puts ordinary pages back in the place of what is granted under `references`.
    pub(super) fn uncover(&self, references: std::ops::Range<u32>) {
        for reference in references {
            let Some(page) = lock(&self.granted).remove(&reference) else { continue };
            // SAFETY: of the place `replace` says so.
            let map = |at, size| unsafe { mmap_anonymous(Some(at), size, RIGHTS, PRIVATE_FIXED) };
            if let Err(error) = replace(&page, map) {
                // It stays what it was, which is memory all the same, and is unmapped with the rest.
                tracing::error!(%error, reference, "a page that was granted stays mapped");
            }
        }
    }
}

const PRIVATE_FIXED: MapFlags = MapFlags::MAP_PRIVATE.union(MapFlags::MAP_FIXED);

/// Has `map` map something else in the place of `page`, a page of an allocation, and moves its content there.
fn replace<T>(page: &Pages, map: impl FnOnce(NonZeroUsize, NonZeroUsize) -> nix::Result<T>) -> nix::Result<()> {
    let mut content = [0; PAGE_SIZE];
    let at = NonZeroUsize::new(page.as_ptr().addr()).ok_or(nix::Error::EFAULT)?;
    let size = NonZeroUsize::new(PAGE_SIZE).ok_or(nix::Error::EINVAL)?;
    let copied = page.read(0, &mut content);
    map(at, size)?;
    copied.and_then(|()| page.write(0, &content)).map_err(|_| nix::Error::EFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    fn bytes(pages: &Pages) -> Vec<u8> {
        let mut bytes = vec![0; pages.len()];
        pages.read(0, &mut bytes).unwrap();
        bytes
    }

    /// In the place of gntalloc: a file of four pages.
    fn device() -> File {
        let file = nix::sys::memfd::memfd_create(c"gntalloc", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, 4 * PAGE_SIZE as i64).unwrap();
        file.into()
    }

    #[test]
    fn content_goes_along_to_granted_pages_and_back() {
        let (heap, file) = (Heap::default(), device());
        let pages = heap.allocate(PAGE_SIZE + 1).unwrap();
        pages.write(0, b"one").unwrap();
        pages.write(PAGE_SIZE, b"two").unwrap();
        assert_eq!(heap.grantable(&pages), Ok(2));
        // The second page first.
        let run = Run { first: 40, offsets: vec![3 * PAGE_SIZE as u64, PAGE_SIZE as u64] };
        heap.cover(&pages, &file, &run).unwrap();
        let mut there = [0; 3];
        file.read_exact_at(&mut there, PAGE_SIZE as u64).unwrap();
        assert_eq!(&there, b"two");
        file.write_all_at(b"new", 3 * PAGE_SIZE as u64).unwrap();
        assert_eq!(&bytes(&pages)[..3], b"new");
        assert!(
            heap.grantable(&pages).is_err() && heap.grantable(&pages.slice(PAGE_SIZE, PAGE_SIZE).unwrap()).is_err()
        );

        heap.uncover(40..42);
        assert_eq!((&bytes(&pages)[..3], &bytes(&pages)[PAGE_SIZE..PAGE_SIZE + 3]), (&b"new"[..], &b"two"[..]));
        pages.write(0, b"own").unwrap();
        file.read_exact_at(&mut there, 3 * PAGE_SIZE as u64).unwrap();
        assert_eq!(&there, b"new", "nothing of the domain reaches the page any more");
        assert_eq!(heap.grantable(&pages), Ok(2));
    }

    #[test]
    fn only_whole_pages_of_an_allocation_can_be_granted() {
        let heap = Heap::default();
        let pages = heap.allocate(2 * PAGE_SIZE).unwrap();
        for other in [Pages::allocate(PAGE_SIZE), pages.slice(0, 100).unwrap(), pages.slice(1, PAGE_SIZE).unwrap()] {
            assert!(heap.grantable(&other).is_err());
        }
        assert_eq!(heap.grantable(&pages.slice(PAGE_SIZE, PAGE_SIZE).unwrap()), Ok(1));
        drop(pages);
        assert!(lock(&heap.allocated).is_empty());
    }
}
