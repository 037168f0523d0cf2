//! Xen, for guests that know nothing of grants: PVH domains, whose device model this is.
//!
//! | mechanism | here |
//! |---|---|
//! | memory | all memory of the domain, mapped where it is accessed: device-visible addresses are guest-physical ones |
//! | kick | a write to the notification register, which Xen hands to the ioreq server |
//! | interrupt | MSI-X: the message that the driver wrote, injected by XEN_DMOP_inject_msi |
//! | discovery | a PCI bus behind ports 0xcf8 to 0xcff, whose functions are placed as firmware would |
//!
//! On a real Xen there is the host half only: the guest half is any operating system with drivers for virtio over PCI,
//! which needs no change. All that the host half does is a call of [`Calls`]; the real ones are [`Domain`]'s, and a
//! [`model`] of what Xen does below them has a guest half too.

pub mod abi;
mod domain;
mod host;
pub mod model;

use std::sync::Arc;

use polyvirt_core::hypervisor::{Hypervisor, HypervisorError};
use polyvirt_transports::pci::{self, Bus};

pub use abi::Calls;
pub use domain::Domain;
pub use host::Host;

/// The two halves on the [`model`]; on a real Xen the guest half is an operating system.
pub struct XenHvm;

impl Hypervisor for XenHvm {
    type Host = pci::Host<Host<model::Model>>;
    type Guest = Bus<model::Guest>;
}

/// What [`start`] starts: the model, which needs nothing.
pub fn available() -> Result<String, HypervisorError> {
    Ok("a model of the hypervisor".into())
}

/// A domain on the model with `ram` bytes of memory: its two halves.
pub fn start(ram: usize) -> Result<(pci::Host<Host<model::Model>>, Bus<model::Guest>), HypervisorError> {
    let (host, guest) = model::start(ram)?;
    Ok((host, Bus::new(Arc::new(guest))))
}

/// Makes this process the device model of domain `id`, with an empty bus: devices are [attached](pci::attach) to what
/// this returns before the domain runs. Needs domain 0, or another domain that has the right.
pub fn open(id: u16) -> Result<(Arc<Domain>, pci::Host<Host<Domain>>), HypervisorError> {
    let domain = Arc::new(Domain::open(id)?);
    Ok((Arc::clone(&domain), host::start(domain)))
}
