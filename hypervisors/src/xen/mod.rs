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
pub mod model;
mod store;
pub mod sys;
pub mod wire;

use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

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

/// The argument with which [`start`] runs the program that it is in once more: it is to call [`hands`] then.
pub const HANDS: &str = "xen-hands";

/// Is the [hands](sys::hands) of a domain, for whoever holds the other end of standard input.
pub fn hands() -> Result<(), HypervisorError> {
    sys::hands::serve()
}

/// What [`start`] starts: the version of Xen, or the model, which needs nothing.
pub fn available() -> Result<String, HypervisorError> {
    sys::available().or_else(|_| Ok("a model of the hypervisor".into()))
}

/// Whether [`start`] starts halves on a real Xen, not on the model.
pub fn is_real() -> bool {
    static REAL: LazyLock<bool> = LazyLock::new(|| sys::available().is_ok());
    *REAL
}

/// The two halves. In domain 0 of a real Xen both are in that domain, the guest half with [`HANDS`] of its own, and grant
/// to each other through the hypervisor. Elsewhere they are two domains on the model: the host half in domain 0, and
/// the guest half, which has `ram` bytes for drivers.
pub fn start(ram: usize) -> Result<(Host, Guest), HypervisorError> {
    if is_real() {
        let host = sys::Domain::open()?;
        let guest = sys::Domain::with_hands(Command::new("/proc/self/exe").arg(HANDS))?;
        return Ok((Host::new(Arc::new(host), abi::DOM0, abi::DOM0), Guest::new(Arc::new(guest), abi::DOM0)));
    }
    let (host, guest) = model::start(ram)?;
    let id = guest.id();
    Ok((Host::new(Arc::new(host), abi::DOM0, id), Guest::new(Arc::new(guest), abi::DOM0)))
}

/// Locks even what a panic left behind: a broken device stays a device, and the driver has to notice.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
