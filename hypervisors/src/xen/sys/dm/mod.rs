//! What a device model does to another domain: `/dev/xen/privcmd` with HYPERVISOR_dm_op and the two ways to map.
//!
//! | here | ioctl | call of Xen's |
//! |---|---|---|
//! | [`Server`]: what the guest does at ports, in memory and to PCI functions comes here | PRIVCMD_DM_OP, PRIVCMD_MMAP_RESOURCE | `XEN_DMOP_…_ioreq_server`, XENMEM_acquire_resource |
//! | [`Server::next`], [`Server::answer`] | evtchn's | EVTCHNOP_bind_interdomain, EVTCHNOP_send |
//! | [`Server::inject_msi`] | PRIVCMD_DM_OP | XEN_DMOP_inject_msi |
//! | [`Foreign`]: all memory of the domain | PRIVCMD_MMAPBATCH_V2 | HYPERVISOR_mmu_update of a PV kernel, XENMEM_add_to_physmap_range of others |
//! | [`Server::wait_for_its_end`] | xenbus's | – (xenstored tells of domains that end) |

mod abi;
mod foreign;
mod ioreq;
mod releases;

pub use foreign::{Foreign, Held};
pub use ioreq::{Kind, Range, Request, Server};
