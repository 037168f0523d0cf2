//! virtio over xenstore and event channels: the bus of a hypervisor whose domains are peers.

pub mod registers;
