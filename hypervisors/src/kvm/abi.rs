//! What both sides agree on: the guest-physical address space, and how a line becomes an interrupt.

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_transports::mmio::Place;

/// RAM is from 0 up to here at most.
pub(super) const RAM_END: u64 = 0xc000_0000;

/// The hands' own memory: a slot that devices do not see, so no device can break what drives it.
pub(super) const HANDS: u64 = 0xc000_0000;

/// A store here ends the hands' command: no slot is behind it, so it exits.
pub(super) const DONE: u64 = 0xc010_0000;

/// What belongs to the hands ends here.
pub(super) const HANDS_END: u64 = 0xc020_0000;

/// Devices: the register block of line `n` is at `DEVICES + n * DEVICE_LEN`.
pub(super) const DEVICES: u64 = 0xd000_0000;

/// Bytes of a register block.
pub(super) const DEVICE_LEN: u64 = 0x1000;

/// The register to which a kick goes: QueueNotify (VIRTIO 1.4, 4.2.2).
pub(super) const QUEUE_NOTIFY: u64 = 0x50;

/// The registers of the local APIC.
pub(super) const APIC: u64 = 0xfee0_0000;

/// Three pages that KVM wants for itself on some Intel processors (`KVM_SET_TSS_ADDR`).
pub(super) const KVM_TSS: usize = 0xfffb_d000;

/// Interrupt lines, as many as [`Guest::wait`](polyvirt_core::hypervisor::Guest::wait) has bits.
pub(super) const LINES: u32 = 64;

/// The vector of line 0; the others follow.
pub(super) const FIRST_VECTOR: u32 = 0x40;

/// Where the device on `line` is.
pub(super) fn place(line: u32) -> Place {
    Place { base: DEVICES + u64::from(line) * DEVICE_LEN, line }
}

/// How `line`, which is also its number among KVM's GSIs, reaches the processor: as a message to its local APIC.
pub(super) fn route(line: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi: line, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = APIC as u32;
    entry.u.msi.data = FIRST_VECTOR + line;
    entry
}

/// The error of an ioctl.
pub(super) fn refused(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> HypervisorError {
    move |error| HypervisorError::Refused { call, reason: error.to_string() }
}
