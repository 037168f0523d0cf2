//! What both sides agree on: no features, no configuration, one queue of writable buffers.

/// The virtio device type.
pub const DEVICE_TYPE: u32 = 4;
