//! Block device (VIRTIO 1.4, 5.2).

#[cfg(feature = "std")]
mod backend;
#[cfg(feature = "std")]
mod device;
mod driver;
#[cfg(feature = "std")]
mod file;
#[cfg(feature = "std")]
mod medium;
#[cfg(feature = "std")]
mod memory;
#[cfg(feature = "std")]
mod request;
pub mod wire;

#[cfg(feature = "std")]
pub use backend::{Backend, Completion, IN_FLIGHT, RANGE, Request, TRANSFER};
#[cfg(feature = "std")]
pub use device::{Device, Options};
pub use driver::{Answer, Driver, Geometry, Operation, RequestId};
#[cfg(feature = "std")]
pub use file::{FileBackend, FileHandle};
#[cfg(feature = "std")]
pub use memory::{MemoryBackend, MemoryHandle};
