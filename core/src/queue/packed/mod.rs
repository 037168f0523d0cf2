//! The packed ring (VIRTIO 1.4, 2.8).

pub(super) mod device;
pub(super) mod driver;
pub mod layout;
