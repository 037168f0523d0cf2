//! polyvirt-hypervisors.

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
