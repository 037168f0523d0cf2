//! polyvirt-hypervisors.

#[cfg(target_os = "linux")]
mod event_loop;
#[cfg(target_os = "linux")]
mod flat_share;
pub mod kvm;
