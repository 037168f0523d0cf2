//! virtio devices, each with its driver, over any transport.
//!
//! A device has three parts: the bytes that both sides agree on, the host's side and the guest's side. The drivers are
//! `no_std`; the devices and their backends need the feature `std`.
#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

pub mod blk;
pub mod console;
mod driver;
pub mod rng;
#[cfg(feature = "std")]
mod without;

pub use driver::DriverError;
#[cfg(feature = "std")]
pub use without::Without;
