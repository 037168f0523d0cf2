//! virtio over MMIO, version 2 (VIRTIO 1.4, 4.2).
//!
//! A device is a block of registers in guest-physical address space and one interrupt line. [`attach`] puts a device
//! onto a hypervisor's bus; [`Driver::connect`] meets it from the guest.

#[cfg(feature = "std")]
mod device;
mod driver;
pub mod registers;

#[cfg(feature = "std")]
pub use device::{Device, attach};
pub use driver::Driver;
pub use registers::{Place, Registers};
