//! Block device (VIRTIO 1.4, 5.2).

#[cfg(feature = "std")]
mod backend;
#[cfg(feature = "std")]
mod device;
mod driver;
pub mod wire;

#[cfg(feature = "std")]
pub use backend::{Backend, Completion, FileBackend, FileHandle, MemoryBackend, MemoryHandle, Request};
#[cfg(feature = "std")]
pub use device::{Device, Options};
pub use driver::{Driver, Geometry, Operation, RequestId};
