//! Xen: the grant table, event channels and xenstore.
//!
//! | mechanism | here |
//! |---|---|
//! | memory | the guest half grants pages, the host half maps them: a device-visible address is grant reference × 4096 + offset |
//! | kick, interrupt | events on one channel per queue, both ways |
//! | discovery | directories in xenstore |
//!
//! Both halves are domains: all that they do is a call of [`Calls`]. Below it are the [real calls](sys) where there is a
//! Xen, and a [`model`] of the hypervisor elsewhere.

pub mod abi;
mod guest;
mod host;
mod kernel;
mod machine;
pub mod model;
mod store;
pub mod sys;
pub mod wire;

use std::sync::{Mutex, MutexGuard, PoisonError};

use polyvirt_core::hypervisor::Hypervisor;

pub use abi::Calls;
pub use guest::Guest;
pub use host::{Host, Memory};
pub use machine::{HANDS, available, drive, hands, is_real, serve, start, wait_for_its_end};

/// Xen.
#[derive(Clone, Copy, Debug)]
pub struct Xen;

impl Hypervisor for Xen {
    type Host = Host;
    type Guest = Guest;
}

/// Locks even what a panic left behind: a broken device stays a device, and the driver has to notice.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
