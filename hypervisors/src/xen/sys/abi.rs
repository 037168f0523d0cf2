//! What the devices of Linux in a Xen domain understand: ioctl numbers and structures.
//!
//! From `include/uapi/xen/{gntalloc,gntdev,evtchn,privcmd}.h` of Linux and `xen/include/public/grant_table.h` of Xen.
//! Every number has direction NONE, although data goes both ways.

use std::ffi::c_ulong;
use std::mem::offset_of;

use vmm_sys_util::ioctl::{_IOC_NONE, ioctl_expr};

/// The number of the ioctl that takes a `T`.
pub(super) const fn number<T>(device: u8, number: u32) -> c_ulong {
    ioctl_expr(_IOC_NONE, device as u32, number, size_of::<T>() as u32)
}

/// IOCTL_GNTALLOC_ALLOC_GREF: allocates pages of the kernel and grants each.
pub(super) const GNTALLOC_ALLOC_GREF: c_ulong = number::<AllocGref>(b'G', 5);
/// IOCTL_GNTALLOC_DEALLOC_GREF: frees such pages, which takes the grants back.
pub(super) const GNTALLOC_DEALLOC_GREF: c_ulong = number::<DeallocGref>(b'G', 6);
/// IOCTL_GNTDEV_MAP_GRANT_REF: says which grants the next `mmap` is to map; it asks Xen nothing yet.
pub(super) const GNTDEV_MAP_GRANT_REF: c_ulong = number::<MapGrantRef>(b'G', 0);
/// IOCTL_GNTDEV_UNMAP_GRANT_REF: forgets such grants.
pub(super) const GNTDEV_UNMAP_GRANT_REF: c_ulong = number::<UnmapGrantRef>(b'G', 1);
/// IOCTL_EVTCHN_BIND_INTERDOMAIN: EVTCHNOP_bind_interdomain; the result is the port on this side.
pub(super) const EVTCHN_BIND_INTERDOMAIN: c_ulong = number::<BindInterdomain>(b'E', 1);
/// IOCTL_EVTCHN_BIND_UNBOUND_PORT: EVTCHNOP_alloc_unbound; the result is the port.
pub(super) const EVTCHN_BIND_UNBOUND_PORT: c_ulong = number::<BindUnboundPort>(b'E', 2);
/// IOCTL_EVTCHN_UNBIND: EVTCHNOP_close.
pub(super) const EVTCHN_UNBIND: c_ulong = number::<Port>(b'E', 3);
/// IOCTL_EVTCHN_NOTIFY: EVTCHNOP_send.
pub(super) const EVTCHN_NOTIFY: c_ulong = number::<Port>(b'E', 4);
/// IOCTL_PRIVCMD_HYPERCALL: makes a hypercall; the result is its result.
pub(super) const PRIVCMD_HYPERCALL: c_ulong = number::<Hypercall>(b'P', 0);

/// `struct ioctl_gntalloc_alloc_gref`, before its references.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct AllocGref {
    /// The domain that is granted access.
    pub(super) domid: u16,
    /// [`GNTALLOC_FLAG_WRITABLE`] or 0.
    pub(super) flags: u16,
    /// Pages.
    pub(super) count: u32,
    /// Out: where `mmap` finds the first page; the others follow.
    pub(super) index: u64,
    /// Out: `count` references from here on.
    pub(super) gref_ids: [u32; 1],
}

/// The other domain may write too.
pub(super) const GNTALLOC_FLAG_WRITABLE: u16 = 1;

const _: () = assert!(size_of::<AllocGref>() == 24);
const _: () = assert!(offset_of!(AllocGref, domid) == 0 && offset_of!(AllocGref, flags) == 2);
const _: () = assert!(offset_of!(AllocGref, count) == 4 && offset_of!(AllocGref, index) == 8);
const _: () = assert!(offset_of!(AllocGref, gref_ids) == 16);
const _: () = assert!(GNTALLOC_ALLOC_GREF == 0x18_47_05);

/// `struct ioctl_gntalloc_dealloc_gref`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct DeallocGref {
    /// Where `mmap` finds the first page.
    pub(super) index: u64,
    /// Pages.
    pub(super) count: u32,
}

const _: () = assert!(size_of::<DeallocGref>() == 16);
const _: () = assert!(offset_of!(DeallocGref, index) == 0 && offset_of!(DeallocGref, count) == 8);
const _: () = assert!(GNTALLOC_DEALLOC_GREF == 0x10_47_06);

/// `struct ioctl_gntdev_map_grant_ref`, before its references.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct MapGrantRef {
    /// Grants.
    pub(super) count: u32,
    /// Nothing.
    pub(super) pad: u32,
    /// Out: where `mmap` finds the first.
    pub(super) index: u64,
    /// `count` of them from here on.
    pub(super) refs: [GrantRef; 1],
}

/// `struct ioctl_gntdev_grant_ref`: a grant.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct GrantRef {
    /// The domain that grants.
    pub(super) domid: u32,
    /// Its reference.
    pub(super) reference: u32,
}

const _: () = assert!(size_of::<MapGrantRef>() == 24 && size_of::<GrantRef>() == 8);
const _: () = assert!(offset_of!(MapGrantRef, count) == 0 && offset_of!(MapGrantRef, index) == 8);
const _: () = assert!(offset_of!(MapGrantRef, refs) == 16);
const _: () = assert!(offset_of!(GrantRef, domid) == 0 && offset_of!(GrantRef, reference) == 4);
const _: () = assert!(GNTDEV_MAP_GRANT_REF == 0x18_47_00);

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[repr(C)]
pub(super) struct UnmapGrantRef {
    /// Where `mmap` found the first.
    pub(super) index: u64,
    /// Grants.
    pub(super) count: u32,
    /// Nothing.
    pub(super) pad: u32,
}

const _: () = assert!(size_of::<UnmapGrantRef>() == 16);
const _: () = assert!(offset_of!(UnmapGrantRef, index) == 0 && offset_of!(UnmapGrantRef, count) == 8);
const _: () = assert!(GNTDEV_UNMAP_GRANT_REF == 0x10_47_01);

/// `struct ioctl_evtchn_bind_interdomain`.
#[repr(C)]
pub(super) struct BindInterdomain {
    /// The domain on the other side.
    pub(super) remote_domain: u32,
    /// Its port.
    pub(super) remote_port: u32,
}

const _: () = assert!(size_of::<BindInterdomain>() == 8);
const _: () = assert!(offset_of!(BindInterdomain, remote_domain) == 0 && offset_of!(BindInterdomain, remote_port) == 4);
const _: () = assert!(EVTCHN_BIND_INTERDOMAIN == 0x08_45_01);

/// `struct ioctl_evtchn_bind_unbound_port`.
#[repr(C)]
pub(super) struct BindUnboundPort {
    /// The domain that may bind it.
    pub(super) remote_domain: u32,
}

const _: () = assert!(size_of::<BindUnboundPort>() == 4);
const _: () = assert!(EVTCHN_BIND_UNBOUND_PORT == 0x04_45_02);

/// `struct ioctl_evtchn_unbind` and `struct ioctl_evtchn_notify`.
#[repr(C)]
pub(super) struct Port {
    /// The port on this side.
    pub(super) port: u32,
}

const _: () = assert!(size_of::<Port>() == 4);
const _: () = assert!(EVTCHN_UNBIND == 0x04_45_03 && EVTCHN_NOTIFY == 0x04_45_04);

/// `struct privcmd_hypercall`.
#[repr(C)]
pub(super) struct Hypercall {
    /// Its number.
    pub(super) op: u64,
    /// Its arguments.
    pub(super) arg: [u64; 5],
}

/// `__HYPERVISOR_grant_table_op`: an operation, an array of its arguments, how many.
pub(super) const GRANT_TABLE_OP: u64 = 20;
/// `GNTTABOP_swap_grant_ref`: exchanges two entries of this domain's grant table, unless one of them is in use.
pub(super) const GNTTABOP_SWAP_GRANT_REF: u64 = 11;
/// `GNTST_eagain`: in use.
pub(super) const GNTST_EAGAIN: i16 = -12;

const _: () = assert!(size_of::<Hypercall>() == 48);
const _: () = assert!(offset_of!(Hypercall, op) == 0 && offset_of!(Hypercall, arg) == 8);
const _: () = assert!(PRIVCMD_HYPERCALL == 0x30_50_00);

/// `struct gnttab_swap_grant_ref`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct SwapGrantRef {
    /// One reference.
    pub(super) ref_a: u32,
    /// The other.
    pub(super) ref_b: u32,
    /// Out: `GNTST_…`.
    pub(super) status: i16,
}

const _: () = assert!(size_of::<SwapGrantRef>() == 12);
const _: () = assert!(offset_of!(SwapGrantRef, ref_a) == 0 && offset_of!(SwapGrantRef, ref_b) == 4);
const _: () = assert!(offset_of!(SwapGrantRef, status) == 8);

/// `DOMID_INVALID`: never a domain's number.
pub(super) const DOMID_INVALID: u16 = 0x7ff4;
