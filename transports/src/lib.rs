//! How the two sides of a virtio device find and configure each other.
//!
//! Every transport has three parts: what both sides agree on, the host's side and the guest's side. They follow one
//! pattern: `attach` puts a device onto a hypervisor's bus, `Driver::connect` meets it from the guest.
#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

mod areas;
pub mod lguest;
pub mod mmio;
pub mod pci;
#[cfg(all(feature = "std", target_os = "linux"))]
pub mod vhost_user;
pub mod xenbus;
