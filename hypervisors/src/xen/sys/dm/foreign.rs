//! The memory of another domain.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{Access, GuestMemory, Lease, MemoryError, ResolveError, Segment};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::super::{open, refused};
use super::abi::{MmapBatch, PRIVCMD_MMAPBATCH_V2};
use crate::mapping::Mapping;
use crate::xen::abi::{PAGE_SHIFT, PAGE_SIZE};
use crate::xen::lock;

/// Addresses from here on are nobody's: so much room is kept for the domain's memory.
const LIMIT: u64 = 1 << 40;
/// Pages that are mapped at a time.
const CHUNK: usize = 512;
const CHUNK_LEN: u64 = (CHUNK * PAGE_SIZE) as u64;

/// All memory of another domain: a device-visible address is a guest-physical one. What is accessed is mapped, with
/// what is around it, and stays mapped.
///
/// This is all that the domain has, and not what it granted: whoever holds this can do anything to it.
#[derive(Clone)]
pub struct Foreign {
    shared: Arc<Shared>,
}

struct Shared {
    privcmd: File,
    domain: u16,
    current: Mutex<Arc<Map>>,
}

impl Foreign {
    /// That of domain `domain`. Nothing is mapped yet.
    pub fn new(domain: u16) -> Result<Self, HypervisorError> {
        let (privcmd, map) = (open("privcmd")?, Arc::new(Map::new()?));
        Ok(Self { shared: Arc::new(Shared { privcmd, domain, current: Mutex::new(map) }) })
    }

    /// The domain has given pages back, or got new ones: what is accessed from now on is mapped anew. What was resolved
    /// before stays as it was.
    pub fn invalidate(&self) -> Result<(), HypervisorError> {
        let fresh = Arc::new(Map::new()?);
        *lock(&self.shared.current) = fresh;
        Ok(())
    }
}

impl GuestMemory for Foreign {
    type Lease = Held;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        _access: Access,
        mut segments: impl FnMut(Segment<Held>),
    ) -> Result<(), ResolveError> {
        let Some(last) = len.checked_sub(1) else { return Ok(()) };
        let last = address.checked_add(last).ok_or(MemoryError::Wraps { address, len })?;
        let map = Arc::clone(&lock(&self.shared.current));
        if last >= LIMIT || !map.has(&self.shared, address >> PAGE_SHIFT, last >> PAGE_SHIFT) {
            return Err(MemoryError::NotMapped { address, len }.into());
        }
        // SAFETY: the range is inside the room that the map keeps, and all its pages are mapped, for reading and writing,
        // until the map is dropped.
        segments(unsafe { Segment::new(map.room.0.cast::<u8>().add(address as usize), len as usize, Held(map)) });
        Ok(())
    }
}

/// Keeps memory of another domain mapped.
#[derive(Clone)]
pub struct Held(#[allow(dead_code)] Arc<Map>);

impl Lease for Held {}

/// Room for [`LIMIT`] bytes, where the domain's pages are mapped one behind the other.
struct Map {
    room: Mapping,
    /// By number: of the chunks that are mapped, which pages are there.
    chunks: Mutex<BTreeMap<u64, [bool; CHUNK]>>,
}

impl Map {
    fn new() -> Result<Self, HypervisorError> {
        let size = NonZeroUsize::new(LIMIT as usize).ok_or(HypervisorError::Exhausted("addresses"))?;
        // SAFETY: a new mapping wherever there is room harms nobody.
        let start = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE | NO_RESERVE) };
        let start = start.map_err(|error| refused("mmap", error))?;
        Ok(Self { room: Mapping(start, LIMIT as usize), chunks: Mutex::default() })
    }

    /// Whether the pages from `first` to `last` are mapped; maps what was not tried yet.
    fn has(&self, of: &Shared, first: u64, last: u64) -> bool {
        let mut chunks = lock(&self.chunks);
        let size = CHUNK as u64;
        (first / size..=last / size).all(|number| {
            let from = first.saturating_sub(number * size).min(size - 1) as usize;
            let to = (last - number * size).min(size - 1) as usize;
            let pages = match chunks.entry(number) {
                Entry::Occupied(mapped) => mapped.into_mut(),
                Entry::Vacant(place) => match self.map(of, number) {
                    Ok(pages) if pages.contains(&true) => place.insert(pages),
                    // Not remembered: a guest has many addresses.
                    Ok(_) => return false,
                    Err(error) => {
                        tracing::error!(%error, chunk = number, "memory of the domain cannot be mapped");
                        return false;
                    }
                },
            };
            pages[from..=to].iter().all(|there| *there)
        })
    }

    /// Maps the pages of chunk `number`: which of them are there.
    fn map(&self, of: &Shared, number: u64) -> Result<[bool; CHUNK], io::Error> {
        let at = (number * CHUNK_LEN) as usize;
        // SAFETY: chunks below LIMIT are inside the room.
        let start: NonNull<u8> = unsafe { self.room.0.cast().add(at) };
        let (addr, size) = (Some(start.addr()), NonZeroUsize::MIN.saturating_add(CHUNK_LEN as usize - 1));
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: this part of the room is nobody's yet: the chunk is not among those that are mapped.
        unsafe { mmap(addr, size, rights, MapFlags::MAP_SHARED | MapFlags::MAP_FIXED, &of.privcmd, 0) }?;
        let frames: Vec<u64> = (number * CHUNK as u64..).take(CHUNK).collect();
        let mut errors = [0; CHUNK];
        let mut batch = MmapBatch {
            num: CHUNK as u32,
            dom: of.domain,
            addr: start.addr().get() as u64,
            arr: frames.as_ptr(),
            err: errors.as_mut_ptr(),
        };
        // SAFETY: as many frames are read, and errors written, as there are; `addr` is the whole of the new mapping.
        let mapped = unsafe { ioctl_with_mut_ref(&of.privcmd, PRIVCMD_MMAPBATCH_V2, &mut batch) };
        let error = io::Error::last_os_error();
        // ENOENT: some of them are paged out, which counts as not there.
        let failed = mapped != 0 && error.raw_os_error() != Some(libc::ENOENT);
        let there = errors.map(|error| !failed && error == 0);
        if !there.contains(&true) {
            // SAFETY: as above; nobody was told of the new mapping.
            unsafe {
                let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | NO_RESERVE;
                mmap_anonymous(addr, size, ProtFlags::PROT_NONE, flags)?;
            }
        }
        if failed { Err(error) } else { Ok(there) }
    }
}

/// Room costs nothing.
const NO_RESERVE: MapFlags = MapFlags::MAP_NORESERVE;
