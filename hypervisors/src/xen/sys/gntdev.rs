//! `/dev/xen/gntdev`: grants of other domains, mapped.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{Access, Pages};
use vmm_sys_util::ioctl::ioctl_with_mut_ptr;

use super::super::abi::PAGE_SIZE;
use super::abi::{GNTDEV_MAP_GRANT_REF, GrantRef, MapGrantRef};
use super::{open, refused};
use crate::mapping::Mapping;

const MAP: &str = "GNTTABOP_map_grant_ref";
/// The most grants that one handle maps, if nobody set the module's parameter otherwise (`gntdev.c`).
const LIMIT: u32 = 64 * 1024;

/// Maps `count` grants of domain `of` from `first` on, one after another.
///
/// Each mapping has a handle of its own: one whose `mmap` failed is of no more use, and closing it undoes the rest.
/// Xen's status does not come up to here: whatever it refuses is EINVAL.
pub(super) fn map(of: u16, first: u32, count: u32, access: Access) -> Result<Pages, HypervisorError> {
    /// Fields are dropped in this order.
    struct Mapped(#[allow(dead_code)] Mapping, #[allow(dead_code)] File);

    let refused = |error: io::Error| refused(MAP, error);
    let size = NonZeroUsize::new(count as usize * PAGE_SIZE).filter(|_| count <= LIMIT && first <= u32::MAX - count);
    let Some(size) = size else {
        return Err(super::refused(MAP, format!("expected 1 to {LIMIT} grants, got {count}")));
    };
    let file = open("gntdev")?;

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
    let offset = i64::try_from(call[0].index).map_err(|_| refused(io::ErrorKind::InvalidData.into()))?;

    let writing = access.contains(Access::WRITE);
    let rights = if writing { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
    // SAFETY: a new mapping wherever there is room harms nobody.
    let start = unsafe { mmap(None, size, rights, MapFlags::MAP_SHARED, &file, offset) }
        .map_err(|error| refused(error.into()))?;
    let mapping = Mapping(start, size.get());
    // SAFETY: mapped until the owner is dropped; where it is read-only, whoever gets it asked for reading only.
    Ok(unsafe { Pages::new(start.cast(), size.get(), Arc::new(Mapped(mapping, file))) })
}
