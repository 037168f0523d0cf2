//! Entropy device (VIRTIO 1.4, 5.4).

#[cfg(feature = "std")]
mod device;
mod driver;
pub mod wire;

#[cfg(feature = "std")]
pub use device::{Device, HostEntropy, Source};
pub use driver::Driver;
