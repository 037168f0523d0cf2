//! The four mechanisms of each hypervisor: memory, kick, interrupt, discovery.
//!
//! Every port has a guest half and a host half over the numbers that both agree on; what only its own kind of guest
//! needs (a vCPU, a trapped process, a model of the hypervisor) stands below the shim, in the same folder.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod event_loop;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod flat_share;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod mapping;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod kvm;
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
#[path = "kvm/absent.rs"]
pub mod kvm;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod lguest;
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
#[path = "lguest/absent.rs"]
pub mod lguest;
