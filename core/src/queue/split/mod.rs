//! The split ring (VIRTIO 1.4, 2.7).

pub(super) mod device;
pub(super) mod driver;
pub mod layout;
