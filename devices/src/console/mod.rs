//! Console device (VIRTIO 1.4, 5.3), with one port.

#[cfg(feature = "std")]
mod device;
mod driver;
pub mod wire;

#[cfg(feature = "std")]
pub use device::{Device, Handle};
pub use driver::Driver;
