//! virtio over xenstore and event channels: the bus of a hypervisor whose domains are peers.
//!
//! Of all transports this is the one whose connection can be closed and opened again by either side while the other
//! lives on. To a driver a closed connection is a device that needs a reset; the reset opens it again.

#[cfg(feature = "std")]
mod device;
mod driver;
pub mod registers;

#[cfg(feature = "std")]
pub use device::{Backend, Device, attach};
pub use driver::Driver;
pub use registers::{Channel, Domain, GuestPlace, HostPlace, Ports, State, Store};
