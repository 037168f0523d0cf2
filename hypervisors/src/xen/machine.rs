//! What the two halves run on: a real Xen where there is one, the model elsewhere.

use std::process::Command;
use std::sync::{Arc, LazyLock};

use polyvirt_core::hypervisor::HypervisorError;

use super::guest::Guest;
use super::host::Host;
use super::{abi, model, sys};

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
