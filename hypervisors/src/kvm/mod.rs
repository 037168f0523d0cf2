//! KVM: memory slots, exits for memory and ports, ioeventfds for kicks, irqfds for interrupts.
//!
//! The guest is one vCPU that runs only while a call of [`Guest`] is under way, on the caller's thread; it has no
//! other software than the hands that such a call moves.

mod abi;
mod guest;
mod hands;
mod host;
mod machine;
mod pci;
mod vcpu;
pub mod vmm;

use std::sync::Arc;

use polyvirt_core::hypervisor::{Hypervisor, HypervisorError};
use polyvirt_core::memory::FlatMemory;
use polyvirt_transports::mmio::Registers;

pub use abi::PCI as PCI_MAP;
pub use guest::Guest;
pub use host::Host;
use machine::Machine;
use vcpu::Vcpu;

/// KVM, on x86-64 Linux.
#[derive(Clone, Copy, Debug)]
pub struct Kvm;

impl Hypervisor for Kvm {
    type Host = Host;
    type Guest = Guest;
}

/// Whether a guest runs on this host: the KVM modules that are loaded, or why none runs.
pub fn available() -> Result<String, HypervisorError> {
    let probe = || {
        let (_host, guest) = start(0x2000)?;
        let (mut value, written) = ([0; 8], *b"polyvirt");
        guest.store(0x1000, &written)?;
        guest.load(0x1000, &mut value)?;
        match value == written {
            true => Ok(()),
            false => Err(HypervisorError::GuestStopped("its memory does not keep what it stores".into())),
        }
    };
    probe().map_err(|error| match error {
        HypervisorError::Unavailable(_) => error,
        error => HypervisorError::Unavailable(format!("/dev/kvm is there but unusable: {error}")),
    })?;
    let modules = std::fs::read_dir("/sys/module").into_iter().flatten().flatten();
    let mut names: Vec<_> = modules.filter_map(|module| module.file_name().into_string().ok()).collect();
    names.retain(|name| name.starts_with("kvm"));
    names.sort();
    Ok(format!("/dev/kvm ({})", names.join(", ")))
}

/// Starts a virtual machine with `ram` bytes of memory from guest-physical 0, at most 3 GiB: its two halves.
///
/// Fails with [`HypervisorError::Unavailable`] if `/dev/kvm` cannot be opened, and with [`HypervisorError::Refused`] if
/// an ioctl fails.
pub fn start(ram: usize) -> Result<(Host, Guest), HypervisorError> {
    if ram == 0 || !ram.is_multiple_of(0x1000) || ram as u64 > abi::RAM_END {
        let reason = format!("expected 1 to {:#x} bytes of RAM in whole pages of 4096, got {ram:#x}", abi::RAM_END);
        return Err(HypervisorError::Refused { call: "start", reason });
    }
    let machine = Machine::new(ram)?;
    let bus = Arc::new(host::Bus::default());
    let memory = Arc::new(FlatMemory::new([(0, machine.ram.clone())]));
    let guest = Guest::new(Vcpu::new(machine.vcpu, machine.hands), Arc::clone(&bus), machine.ram);
    Ok((Host::new(machine.vm, machine.routes, memory, bus), guest))
}
