//! The four mechanisms of each hypervisor: memory, kick, interrupt, discovery.
//!
//! A port implements [`polyvirt_core::hypervisor`] for its hypervisor and nothing else: it names no device and touches
//! no ring. [`loopback`] is the smallest one there can be, and the one to read first. What only a port's own kind of
//! guest needs (a vCPU, a trapped process, a model of the hypervisor) stands below the shim, in the same folder.

pub mod absent;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod event_loop;
mod flat_share;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod mapping;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod kvm;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod lguest;
pub mod loopback;
pub use flat_share::FlatShare;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod xen;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod xen_hvm;

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
mod elsewhere {
    use polyvirt_transports::{lguest as page, mmio, xenbus};

    use crate::absent::absent;

    absent!(kvm: Kvm, "KVM", super::mmio::Place, super::mmio::Place);
    absent!(lguest: Lguest, "lguest", super::page::HostPlace, super::page::GuestPlace);
    absent!(xen: Xen, "Xen", super::xenbus::HostPlace, super::xenbus::GuestPlace);
}
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub use elsewhere::{kvm, lguest, xen};
