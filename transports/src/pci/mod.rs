//! virtio over PCI, in both generations (VIRTIO 1.4, 4.1), and a small PCI host.
//!
//! A device is a function on a bus: a configuration space with capabilities, and registers behind base address registers.
//! [`attach`] puts a device onto the bus of a [`Host`], which answers for all functions and asks the hypervisor below it
//! for very little ([`Platform`], [`Wires`]). From the guest, [`Bus`] finds functions and places their registers;
//! [`Driver::connect`] meets a modern device and [`LegacyDriver::connect`] a legacy or transitional one.

mod bus;
#[cfg(feature = "std")]
mod configuration;
#[cfg(feature = "std")]
mod device;
mod driver;
mod function;
#[cfg(feature = "std")]
mod host;
#[cfg(feature = "std")]
mod interrupts;
#[cfg(feature = "std")]
mod legacy;
mod legacy_driver;
#[cfg(feature = "std")]
mod modern;
pub mod registers;
#[cfg(feature = "std")]
mod root;

pub use bus::{Bus, Functions, Machine};
#[cfg(feature = "std")]
pub use device::{Device, Generation, attach};
pub use driver::Driver;
pub use function::Signalling;
#[cfg(feature = "std")]
pub use host::{Doorbell, Host, HostPlace, Platform, SharedDevice, Wires};
pub use legacy_driver::LegacyDriver;
pub use registers::{AddressMap, GuestPlace, Message, Space};
#[cfg(feature = "std")]
pub use root::Root;
