//! virtio over MMIO, version 2 (VIRTIO 1.4, 4.2).

mod registers;

pub use registers::{Place, Registers};
