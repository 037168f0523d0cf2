//! What a device model asks of `/dev/xen/privcmd`, and the page that its requests come in.
//!
//! From `include/uapi/xen/privcmd.h` of Linux and `xen/include/public/hvm/{dm_op,ioreq}.h` of Xen.

use std::ffi::{c_int, c_ulong, c_void};
use std::mem::offset_of;

use super::super::abi::number;

/// IOCTL_PRIVCMD_MMAPBATCH_V2: maps frames of another domain into memory that was mapped from the device.
pub(super) const PRIVCMD_MMAPBATCH_V2: c_ulong = number::<MmapBatch>(b'P', 4);
/// IOCTL_PRIVCMD_DM_OP: HYPERVISOR_dm_op.
pub(super) const PRIVCMD_DM_OP: c_ulong = number::<DmOpCall>(b'P', 5);
/// IOCTL_PRIVCMD_MMAP_RESOURCE: maps frames that Xen keeps for another domain (XENMEM_acquire_resource).
pub(super) const PRIVCMD_MMAP_RESOURCE: c_ulong = number::<MmapResource>(b'P', 7);

/// `struct privcmd_mmapbatch_v2`.
#[repr(C)]
pub(super) struct MmapBatch {
    /// Frames.
    pub(super) num: u32,
    /// Whose.
    pub(super) dom: u16,
    /// Where to: the whole of a mapping of the device.
    pub(super) addr: u64,
    /// `num` frame numbers.
    pub(super) arr: *const u64,
    /// Out: for each 0, or a negative errno.
    pub(super) err: *mut c_int,
}

const _: () = assert!(size_of::<MmapBatch>() == 32);
const _: () = assert!(offset_of!(MmapBatch, num) == 0 && offset_of!(MmapBatch, dom) == 4);
const _: () = assert!(offset_of!(MmapBatch, addr) == 8);
const _: () = assert!(offset_of!(MmapBatch, arr) == 16 && offset_of!(MmapBatch, err) == 24);
const _: () = assert!(PRIVCMD_MMAPBATCH_V2 == 0x20_50_04);

/// `struct privcmd_dm_op`.
#[repr(C)]
pub(super) struct DmOpCall {
    /// The domain that it is about.
    pub(super) dom: u16,
    /// Buffers.
    pub(super) num: u16,
    /// Where they are.
    pub(super) ubufs: *const DmOpBuffer,
}

const _: () = assert!(size_of::<DmOpCall>() == 16);
const _: () = assert!(offset_of!(DmOpCall, dom) == 0 && offset_of!(DmOpCall, num) == 2);
const _: () = assert!(offset_of!(DmOpCall, ubufs) == 8);
const _: () = assert!(PRIVCMD_DM_OP == 0x10_50_05);

/// `struct privcmd_dm_op_buf`.
#[repr(C)]
pub(super) struct DmOpBuffer {
    /// Where it is.
    pub(super) uptr: *mut c_void,
    /// Bytes.
    pub(super) size: usize,
}

const _: () = assert!(size_of::<DmOpBuffer>() == 16);
const _: () = assert!(offset_of!(DmOpBuffer, uptr) == 0 && offset_of!(DmOpBuffer, size) == 8);

/// `struct privcmd_mmap_resource`.
#[repr(C)]
pub(super) struct MmapResource {
    /// Whose.
    pub(super) dom: u16,
    /// [`RESOURCE_IOREQ_SERVER`].
    pub(super) kind: u32,
    /// The server.
    pub(super) id: u32,
    /// The first frame.
    pub(super) idx: u32,
    /// Frames.
    pub(super) num: u64,
    /// Where to: a mapping of the device.
    pub(super) addr: u64,
}

const _: () = assert!(size_of::<MmapResource>() == 32);
const _: () = assert!(offset_of!(MmapResource, dom) == 0 && offset_of!(MmapResource, kind) == 4);
const _: () = assert!(offset_of!(MmapResource, id) == 8 && offset_of!(MmapResource, idx) == 12);
const _: () = assert!(offset_of!(MmapResource, num) == 16 && offset_of!(MmapResource, addr) == 24);
const _: () = assert!(PRIVCMD_MMAP_RESOURCE == 0x20_50_07);

/// `XENMEM_resource_ioreq_server`.
pub(super) const RESOURCE_IOREQ_SERVER: u32 = 0;
/// `XENMEM_resource_ioreq_server_frame_ioreq(0)`: the first page of requests.
pub(super) const FRAME_IOREQ: u32 = 1;

/// `struct xen_dm_op` with the one member of its union that the operation uses.
#[repr(C)]
pub(super) struct DmOp<T> {
    /// Which operation.
    pub(super) op: u32,
    /// Nothing.
    pub(super) pad: u32,
    /// Its argument.
    pub(super) u: T,
}

/// An operation: its number and its name.
pub(super) trait Operation: Copy {
    /// `XEN_DMOP_…`.
    const NUMBER: u32;
    /// As it is told.
    const NAME: &'static str;
}

macro_rules! operation {
    ($argument:ident, $number:literal, $name:literal, $size:literal) => {
        impl Operation for $argument {
            const NUMBER: u32 = $number;
            const NAME: &'static str = $name;
        }
        const _: () = assert!(size_of::<$argument>() == $size && offset_of!(DmOp<$argument>, u) == 8);
    };
}
operation!(CreateServer, 1, "XEN_DMOP_create_ioreq_server", 6);
operation!(ServerRange, 3, "XEN_DMOP_map_io_range_to_ioreq_server", 24);
operation!(ServerState, 5, "XEN_DMOP_set_ioreq_server_state", 4);
operation!(DestroyServer, 6, "XEN_DMOP_destroy_ioreq_server", 4);
operation!(InjectMsi, 14, "XEN_DMOP_inject_msi", 16);

/// `struct xen_dm_op_create_ioreq_server`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct CreateServer {
    /// 0: no buffered requests.
    pub(super) handle_bufioreq: u8,
    /// Nothing.
    pub(super) pad: [u8; 3],
    /// Out: the server.
    pub(super) id: u16,
}

const _: () = assert!(offset_of!(CreateServer, id) == 4);

/// `struct xen_dm_op_ioreq_server_range`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct ServerRange {
    /// The server.
    pub(super) id: u16,
    /// Nothing.
    pub(super) pad: u16,
    /// `XEN_DMOP_IO_RANGE_…`.
    pub(super) kind: u32,
    /// The first of the range.
    pub(super) start: u64,
    /// The last of it.
    pub(super) end: u64,
}

const _: () = assert!(offset_of!(ServerRange, id) == 0 && offset_of!(ServerRange, kind) == 4);
const _: () = assert!(offset_of!(ServerRange, start) == 8 && offset_of!(ServerRange, end) == 16);

/// `struct xen_dm_op_set_ioreq_server_state`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct ServerState {
    /// The server.
    pub(super) id: u16,
    /// Whether it is asked.
    pub(super) enabled: u8,
    /// Nothing.
    pub(super) pad: u8,
}

const _: () = assert!(offset_of!(ServerState, id) == 0 && offset_of!(ServerState, enabled) == 2);

/// `struct xen_dm_op_destroy_ioreq_server`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct DestroyServer {
    /// The server.
    pub(super) id: u16,
    /// Nothing.
    pub(super) pad: u16,
}

/// `struct xen_dm_op_inject_msi`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct InjectMsi {
    /// What would be written.
    pub(super) data: u32,
    /// Nothing.
    pub(super) pad: u32,
    /// Where to.
    pub(super) addr: u64,
}

const _: () = assert!(offset_of!(InjectMsi, data) == 0 && offset_of!(InjectMsi, addr) == 8);

// A slot of the page of requests, `struct ioreq`: one for each virtual processor, as words of 64 bits.

/// Words of a slot.
pub(super) const SLOT: usize = 4;
/// In it: the address, or a function's number × 2^32 + an offset.
pub(super) const SLOT_ADDR: usize = 0;
/// The data, or where in the guest's memory they are.
pub(super) const SLOT_DATA: usize = 1;
/// How often (bits 0 to 31), and how many bytes each time.
pub(super) const SLOT_SIZE: usize = 2;
/// The event channel of the processor (bits 0 to 31), the state and flags (bits 48 to 55), the kind (bits 56 to 63).
pub(super) const SLOT_STATE: usize = 3;

/// Where in [`SLOT_STATE`] the state is, four bits.
pub(super) const STATE_SHIFT: u32 = 48;
/// `STATE_IOREQ_READY`: Xen asks.
pub(super) const STATE_READY: u64 = 1;
/// `STATE_IOREQ_INPROCESS`: the server works.
pub(super) const STATE_INPROCESS: u64 = 2;
/// `STATE_IORESP_READY`: the server has answered.
pub(super) const STATE_ANSWERED: u64 = 3;
/// In [`SLOT_STATE`]: the data are in the guest's memory.
pub(super) const DATA_IS_PTR: u64 = 1 << 52;
/// In [`SLOT_STATE`]: the guest reads.
pub(super) const DIR_READ: u64 = 1 << 53;
/// In [`SLOT_STATE`]: addresses go down from one time to the next.
pub(super) const DOWNWARDS: u64 = 1 << 54;

/// `IOREQ_TYPE_PIO`.
pub(super) const TYPE_PIO: u8 = 0;
/// `IOREQ_TYPE_COPY`.
pub(super) const TYPE_COPY: u8 = 1;
/// `IOREQ_TYPE_PCI_CONFIG`.
pub(super) const TYPE_PCI_CONFIG: u8 = 2;
/// `IOREQ_TYPE_INVALIDATE`.
pub(super) const TYPE_INVALIDATE: u8 = 8;
