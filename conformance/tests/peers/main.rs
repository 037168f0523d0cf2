//! Our rings with those of others, over the same memory: what one writes, the other reads as it was meant.
//!
//! `chains`, `malformed`: our device role beside rust-vmm's. `exchange`: our driver role with rust-vmm's device role.
//! `drivers`: the driver role of virtio-drivers with our device role.
#![allow(unsafe_code, reason = "the peers' interfaces are unsafe")]

mod chains;
mod drivers;
mod exchange;
mod malformed;
mod ring;
