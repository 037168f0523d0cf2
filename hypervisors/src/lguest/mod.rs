//! lguest, for real: the guest is a process that shares its memory with the launcher and has no other way out.
//!
//! Its `int $0x1f` traps into the launcher (ptrace), which serves the hypercall; every system call is refused. An
//! interrupt enters the guest's handler by a frame on its stack. Nothing of this needs virtualization hardware or
//! privileges.

pub mod abi;
mod guest;
mod hands;
mod host;
mod kernel;
mod launcher;
#[cfg(test)]
mod tests;

use polyvirt_core::hypervisor::{Hypervisor, HypervisorError};

pub use guest::Guest;
pub use host::Host;

/// lguest, on x86-64 Linux.
#[derive(Clone, Copy, Debug)]
pub struct Lguest;

impl Hypervisor for Lguest {
    type Host = Host;
    type Guest = Guest;
}

/// Whether a guest runs on this host: by what, or why none does. Tries it.
pub fn available() -> Result<String, HypervisorError> {
    match start(0x1000) {
        Ok(_) => Ok("ptrace".into()),
        Err(error @ HypervisorError::Unavailable(_)) => Err(error),
        Err(error) => Err(unavailable(error.to_string())),
    }
}

/// Bytes of the guest's memory behind what is for its drivers: its hands and the device page, which devices see too.
pub const OWN_PAGES: u64 = (hands::PAGES + abi::DEVICE_PAGES) * abi::PAGE;

/// Starts a guest with `ram` bytes for its drivers, rounded up to whole pages: its two halves. Dropping the host half
/// ends the guest.
///
/// Fails with [`HypervisorError::Unavailable`] if this host does not allow it.
pub fn start(ram: usize) -> Result<(Host, Guest), HypervisorError> {
    let len = ram.checked_next_multiple_of(abi::PAGE as usize).and_then(|ram| ram.checked_add(OWN_PAGES as usize));
    let memory = crate::mapping::anonymous(len.ok_or(HypervisorError::Exhausted("address space"))?)?;
    let host = Host::start(&memory)?;
    let guest = Guest::new(&host, memory)?;
    // A first hypercall that does nothing: once it is served, the guest has set itself up.
    guest.hypercall(abi::LHCALL_FLUSH_ASYNC, [0; 3])?;
    Ok((host, guest))
}

fn unavailable(reason: String) -> HypervisorError {
    HypervisorError::Unavailable(format!("no guest can be started: {reason}"))
}
