//! virtio over MMIO, version 2 and, for the legacy interface, version 1 (VIRTIO 1.4, 4.2).
//!
//! A device is a block of registers in guest-physical address space and one interrupt line. [`attach`] puts a device
//! onto a hypervisor's bus; [`Driver::connect`] meets it from the guest. The legacy interface has [`attach_legacy`] and
//! [`Driver::connect_legacy`].

#[cfg(feature = "std")]
mod device;
mod driver;
#[cfg(feature = "std")]
mod legacy;
pub mod registers;

#[cfg(feature = "std")]
pub use device::{Device, attach, attach_legacy};
pub use driver::Driver;
pub use registers::{Place, Registers};
