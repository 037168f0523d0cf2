//! A daemon's life: connections that come and go, rings that stop and go on, memory that moves, and a process that dies.
//!
//! The cases speak vhost-user themselves, message by message. What they judge is the protocol of QEMU's
//! `docs/interop/vhost-user.rst`, not VIRTIO; what a device does once its rings run is for the other cases.

mod book;
mod memory;
mod rings;

use crate::suite::{Applies, Case, Variant};

/// The cases, in the order in which they run.
pub fn cases() -> Vec<Case> {
    [rings::CASES, memory::CASES, book::CASES].concat()
}

/// A case against a daemon that nobody has connected to.
const fn case(
    name: &'static str,
    about: &'static str,
    run: fn(&mut crate::suite::Session) -> crate::suite::Verdict,
) -> Case {
    Case::new(name, about, run).on(Applies::VHOST_USER).with(Variant::Undriven)
}
