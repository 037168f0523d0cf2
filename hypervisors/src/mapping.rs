//! Memory of this process that a guest shares.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::Pages;

/// Unmaps its memory when it is dropped: where it is, and bytes.
pub(crate) struct Mapping(pub(crate) NonNull<c_void>, pub(crate) usize);

// SAFETY: a mapping belongs to the process, not to a thread; all that is done with it is to unmap it once.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this length by whoever made this, and every handle to it is gone.
        if let Err(error) = unsafe { munmap(self.0, self.1) } {
            tracing::error!(%error, "guest memory stays mapped");
        }
    }
}

/// Maps `len` bytes (whole pages, not 0), zeroed. They are shared with children; they stay where they are until the
/// last handle is dropped.
pub(crate) fn anonymous(len: usize) -> Result<Pages, HypervisorError> {
    let size = NonZeroUsize::new(len).ok_or(HypervisorError::Exhausted("guest memory"))?;
    let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping wherever there is room harms nobody.
    let start = unsafe { mmap_anonymous(None, size, rights, MapFlags::MAP_SHARED) }
        .map_err(|error| HypervisorError::Refused { call: "mmap", reason: error.to_string() })?;
    // SAFETY: readable and writable until the owner is dropped; nobody has a reference to the bytes.
    Ok(unsafe { Pages::new(start.cast(), len, Arc::new(Mapping(start, len))) })
}
