//! The virtio core: rings in both roles, feature negotiation, the device state machine, and the seams to everything else.
//!
//! Nothing here knows a hypervisor, a transport or an operating system; the crate is `no_std` (with `alloc`).
//! The seams are the traits [`memory::GuestMemory`], [`device::Device`], [`transport::Transport`] and
//! [`hypervisor::Hypervisor`].
#![no_std]
#![deny(missing_docs)]

extern crate alloc;
#[cfg(any(test, loom))]
extern crate std;

pub mod device;
pub mod features;
pub mod hypervisor;
pub mod memory;
pub mod queue;
pub mod shared;
pub mod state;
pub mod status;
#[cfg(not(loom))]
mod sync;
#[cfg(loom)]
pub mod sync;
pub mod transport;

pub use features::Features;
pub use status::Status;
