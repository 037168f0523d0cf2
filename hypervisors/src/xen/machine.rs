//! What the two halves run on: a real Xen where there is one, the model elsewhere.

use std::process::Command;
use std::sync::{Arc, LazyLock};
use std::task::{Wake, Waker};
use std::thread::{Thread, current, park};

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_transports::xenbus::Store as _;

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

/// The host half in domain 0 of a real Xen, for devices that domain `guest` drives.
pub fn serve(guest: u16) -> Result<Host, HypervisorError> {
    Ok(Host::new(Arc::new(sys::Domain::open()?), abi::DOM0, guest))
}

/// The guest half in this domain of a real Xen, for devices that domain 0 serves.
pub fn drive() -> Result<Guest, HypervisorError> {
    Ok(Guest::new(Arc::new(sys::Domain::open()?), abi::DOM0))
}

/// Waits until the toolstack has taken the domain that `host` serves out of xenstore, which is when it is gone.
pub fn wait_for_its_end(host: &Host) -> Result<(), HypervisorError> {
    /// Wakes the thread that waits.
    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    let (store, guest) = host.guest();
    let node = format!("/local/domain/{guest}/domid");
    store.watch(&node, Waker::from(Arc::new(Unpark(current()))))?;
    while store.read(&node)?.is_some() {
        park();
    }
    Ok(())
}
