//! `/dev/xen/privcmd`: hypercalls. One of them: whether grants of this domain are in use.
//!
//! No device of Linux tells that: gntalloc lets go of a grant that is in use, and the kernel takes it back later. But
//! Xen does not exchange two entries of the grant table while one of them is mapped. Newer kernels let the processes of a
//! domain without privileges make no hypercall: there nobody can tell, and the kernel takes it back when it can.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Mutex;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use polyvirt_core::hypervisor::HypervisorError;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::super::abi::PAGE_SIZE;
use super::super::lock;
use super::abi::{GNTST_EAGAIN, GNTTABOP_SWAP_GRANT_REF, GRANT_TABLE_OP, Hypercall, PRIVCMD_HYPERCALL, SwapGrantRef};
use super::{open, refused};
use crate::mapping::Mapping;

const SWAP: &str = "GNTTABOP_swap_grant_ref";

/// The device, and a page for arguments that is where it is while Xen reads it.
pub(super) struct Privcmd {
    file: File,
    arguments: Mutex<Mapping>,
}

impl Privcmd {
    pub(super) fn open() -> Result<Self, HypervisorError> {
        let (file, buffers) = (open("privcmd")?, open("hypercall")?);
        let size = NonZeroUsize::new(PAGE_SIZE).ok_or(HypervisorError::Exhausted("memory"))?;
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping wherever there is room harms nobody.
        let start = unsafe { mmap(None, size, rights, MapFlags::MAP_SHARED, &buffers, 0) };
        let start = start.map_err(|error| refused("mmap of /dev/xen/hypercall", error))?;
        Ok(Self { file, arguments: Mutex::new(Mapping(start, PAGE_SIZE)) })
    }

    /// Whether the grant under `reference` is mapped by someone. `spare` is a reference whose grant nobody can map: the
    /// two are exchanged and exchanged back.
    pub(super) fn in_use(&self, reference: u32, spare: u32) -> Result<bool, HypervisorError> {
        let swap = SwapGrantRef { ref_a: reference, ref_b: spare, status: 0 };
        let statuses = match self.swap([swap; 2]) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(false),
            statuses => statuses.map_err(|error| refused(SWAP, error))?,
        };
        match statuses {
            [0, 0] => Ok(false),
            [GNTST_EAGAIN, GNTST_EAGAIN] => Ok(true),
            [there, back] => Err(refused(SWAP, format!("GNTST {there}, then {back}"))),
        }
    }

    /// Makes two exchanges, one after the other, in one hypercall: what Xen says of each.
    fn swap(&self, swaps: [SwapGrantRef; 2]) -> io::Result<[i16; 2]> {
        let page = lock(&self.arguments);
        let arguments = page.0.cast::<[SwapGrantRef; 2]>();
        // SAFETY: the page is mapped, large enough, aligned, and nobody else's while it is locked.
        unsafe { arguments.write(swaps) };
        let arg = [GNTTABOP_SWAP_GRANT_REF, arguments.addr().get() as u64, swaps.len() as u64, 0, 0];
        let call = Hypercall { op: GRANT_TABLE_OP, arg };
        // SAFETY: this call exchanges entries of the grant table twice, so that it ends as it was, and writes only to
        // the page.
        if unsafe { ioctl_with_ref(&self.file, PRIVCMD_HYPERCALL, &call) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        let done = unsafe { arguments.read() };
        Ok(done.map(|swap| swap.status))
    }
}
