//! `/dev/xen/gntdev`: grants of other domains, mapped.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::{Arc, LazyLock, Mutex, Weak};

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{Access, Pages};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ref};

use super::super::abi::PAGE_SIZE;
use super::super::lock;
use super::abi::{GNTDEV_MAP_GRANT_REF, GNTDEV_UNMAP_GRANT_REF, GrantRef, MapGrantRef, UnmapGrantRef};
use super::arena::{Addresses, Arena};
use super::{open, refused};

const MAP: &str = "GNTTABOP_map_grant_ref";
/// The most grants that one handle maps, if nobody set the module's parameter otherwise (`gntdev.c`).
const LIMIT: u32 = 64 * 1024;

/// Where grants are mapped.
static ARENA: LazyLock<Arena> = Arena::new();
/// Handles with nothing mapped: to close one takes longer than to map a grant.
static HANDLES: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// What is mapped. Xen maps a grant only so many times at once, fewer than a chain may have buffers in one page: those
/// who want the same while it is mapped share it.
static MAPPED: Mutex<BTreeMap<Grants, Weak<Mapped>>> = Mutex::new(BTreeMap::new());

/// Domain, first reference, count, and whether they are mapped for writing.
type Grants = (u16, u32, u32, bool);

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
    let writing = access.contains(Access::WRITE);
    let grants = (of, first, count, writing);
    // Not under the lock: to drop the last handle takes it too.
    let shared = lock(&MAPPED).get(&grants).and_then(Weak::upgrade);
    if let Some(mapped) = shared {
        return Ok(mapped.pages());
    }
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

    let rights = if writing { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
    let (start, addresses) = ARENA
        // SAFETY: a new mapping, at a place that is this one's alone, or wherever there is room.
        .map(size, |at, fixed| unsafe { mmap(at, size, rights, MapFlags::MAP_SHARED | fixed, &file, offset) })
        .map_err(|error| refused(error.into()))?;
    let unmap = UnmapGrantRef { index, count, pad: 0 };
    let mapped = Mapped { start, size: size.get(), addresses: Some(addresses), file: Some(file), unmap, grants };
    let mapped = Arc::new(mapped);
    lock(&MAPPED).insert(grants, Arc::downgrade(&mapped));
    Ok(mapped.pages())
}

/// Grants that are mapped by a handle.
struct Mapped {
    start: NonNull<c_void>,
    size: usize,
    addresses: Option<Addresses>,
    file: Option<File>,
    unmap: UnmapGrantRef,
    grants: Grants,
}

// SAFETY: a mapping belongs to the process, not to a thread.
unsafe impl Send for Mapped {}
// SAFETY: as above; nobody changes it.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn pages(self: Arc<Self>) -> Pages {
        let (start, size) = (self.start.cast(), self.size);
        // SAFETY: mapped until the owner is dropped; where it is read-only, whoever gets it asked for reading only.
        unsafe { Pages::new(start, size, self) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let mut mapped = lock(&MAPPED);
        // Someone else's may be there already, who found this one gone.
        if mapped.get(&self.grants).is_some_and(|it| it.strong_count() == 0) {
            mapped.remove(&self.grants);
        }
        drop(mapped);
        drop(self.addresses.take());
        let Some(file) = self.file.take() else { return };
        // SAFETY: the kernel only reads the structure. Nothing is mapped there any more.
        if unsafe { ioctl_with_ref(&file, GNTDEV_UNMAP_GRANT_REF, &self.unmap) } == 0 {
            lock(&HANDLES).push(file);
        }
        // Else it is closed, which undoes what there is.
    }
}
