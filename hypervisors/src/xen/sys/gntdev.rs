//! `/dev/xen/gntdev`: grants of other domains, mapped.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock, Mutex};

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{Access, Pages};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ref};

use super::super::abi::PAGE_SIZE;
use super::super::lock;
use super::abi::{GNTDEV_MAP_GRANT_REF, GNTDEV_UNMAP_GRANT_REF, GrantRef, MapGrantRef, UnmapGrantRef};
use super::arena::{Arena, Place};
use super::{open, refused};
use crate::mapping::Mapping;

const MAP: &str = "GNTTABOP_map_grant_ref";
/// The most grants that one handle maps, if nobody set the module's parameter otherwise (`gntdev.c`).
const LIMIT: u32 = 64 * 1024;

/// Where grants are mapped.
static ARENA: LazyLock<Arena> = Arena::new();
/// Handles with nothing mapped: to close one takes longer than to map a grant.
static HANDLES: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Maps `count` grants of domain `of` from `first` on, one after another.
///
/// Each mapping has a handle of its own while it is there: one whose `mmap` failed is of no more use, and closing it
/// undoes the rest. Xen's status does not come up to here: whatever it refuses is EINVAL.
pub(super) fn map(of: u16, first: u32, count: u32, access: Access) -> Result<Pages, HypervisorError> {
    let refused = |error: io::Error| refused(MAP, error);
    let size = NonZeroUsize::new(count as usize * PAGE_SIZE).filter(|_| count <= LIMIT && first <= u32::MAX - count);
    let Some(size) = size else {
        return Err(super::refused(MAP, format!("expected 1 to {LIMIT} grants, got {count}")));
    };
    let idle = lock(&HANDLES).pop();
    let file = idle.map_or_else(|| open("gntdev"), Ok)?;

    let refs = (first..first + count).map(|reference| GrantRef { domid: of.into(), reference });
    // The head has room for one reference.
    let mut call =
        vec![MapGrantRef::default(); 1 + (count as usize).div_ceil(size_of::<MapGrantRef>() / size_of::<GrantRef>())];
    let head = call.as_mut_ptr();
    // SAFETY: the head is there, and `count` references from its `refs` on lie inside the vector, which is as long.
    unsafe {
        (*head).count = count;
        let at = (&raw mut (*head).refs).cast::<GrantRef>();
        refs.enumerate().for_each(|(index, reference)| at.add(index).write(reference));
    }
    // SAFETY: the kernel reads the head and `count` references, and writes the head.
    if unsafe { ioctl_with_mut_ptr(&file, GNTDEV_MAP_GRANT_REF, head) } != 0 {
        return Err(refused(io::Error::last_os_error()));
    }
    let index = call[0].index;
    let offset = i64::try_from(index).map_err(|_| refused(io::ErrorKind::InvalidData.into()))?;

    let writing = access.contains(Access::WRITE);
    let rights = if writing { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
    let place = ARENA.take(count as usize);
    let (at, fixed) = match &place {
        Some(place) => (Some(place.start().addr()), MapFlags::MAP_SHARED | MapFlags::MAP_FIXED),
        None => (None, MapFlags::MAP_SHARED),
    };
    // SAFETY: a new mapping, at a place that is this one's alone, or wherever there is room.
    let start = unsafe { mmap(at, size, rights, fixed, &file, offset) }.map_err(|error| refused(error.into()))?;
    let addresses = place.map_or_else(|| Addresses::Any(Mapping(start, size.get())), Addresses::Arena);
    let mapped =
        Mapped { addresses: Some(addresses), file: Some(file), grants: UnmapGrantRef { index, count, pad: 0 } };
    // SAFETY: mapped until the owner is dropped; where it is read-only, whoever gets it asked for reading only.
    Ok(unsafe { Pages::new(start.cast(), size.get(), Arc::new(mapped)) })
}

/// Where something is mapped; until this is dropped.
enum Addresses {
    Arena(#[allow(dead_code)] Place),
    Any(#[allow(dead_code)] Mapping),
}

/// Grants that are mapped by a handle.
struct Mapped {
    addresses: Option<Addresses>,
    file: Option<File>,
    grants: UnmapGrantRef,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        drop(self.addresses.take());
        let Some(file) = self.file.take() else { return };
        // SAFETY: the kernel only reads the structure. Nothing is mapped there any more.
        if unsafe { ioctl_with_ref(&file, GNTDEV_UNMAP_GRANT_REF, &self.grants) } == 0 {
            lock(&HANDLES).push(file);
        }
        // Else it is closed, which undoes what there is.
    }
}
