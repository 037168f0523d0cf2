//! Xen: the grant table, event channels and xenstore.
//!
//! | mechanism | here |
//! |---|---|
//! | memory | the guest half grants pages, the host half maps them: a device-visible address is grant reference × 4096 + offset |
//! | kick, interrupt | events on one channel per queue, both ways |
//! | discovery | directories in xenstore |
//!
//! Both halves are domains: all that they do is a call of [`Calls`]. Below it is a [`model`] of the hypervisor.

pub mod abi;
mod guest;
mod host;
mod kernel;
pub mod model;
mod store;
pub mod wire;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polyvirt_core::hypervisor::{Hypervisor, HypervisorError};

pub use abi::Calls;
pub use guest::Guest;
pub use host::{Host, Memory};

/// Xen.
#[derive(Clone, Copy, Debug)]
pub struct Xen;

impl Hypervisor for Xen {
    type Host = Host;
    type Guest = Guest;
}

/// Always: the model needs nothing.
pub fn available() -> Result<String, HypervisorError> {
    Ok("a model of the hypervisor".into())
}

/// Two domains on the model: the host half in domain 0, and the guest half, which has `ram` bytes for drivers.
pub fn start(ram: usize) -> Result<(Host, Guest), HypervisorError> {
    let (host, guest) = model::start(ram)?;
    let id = guest.id();
    Ok((Host::new(Arc::new(host), abi::DOM0, id), Guest::new(Arc::new(guest), abi::DOM0)))
}

/// Locks even what a panic left behind: a broken device stays a device, and the driver has to notice.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
