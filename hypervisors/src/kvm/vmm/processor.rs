//! A processor that runs a kernel.

use std::ops::ControlFlow;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use nix::errno::Errno;
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_transports::pci::Space;

use super::super::host::Bus;
use super::super::machine::refused;
use super::kernel::Entry;
use super::ports::Ports;
use super::{Ended, VmmError, map};

/// IA32_MISC_ENABLE, and its bit for fast string operations.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: MTRRs are on, and memory is cached.
const MTRR_DEFAULT: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// CPUID leaf 1, ECX: under a hypervisor, which leaf 0x4000_0000 names.
const HYPERVISOR: u32 = 1 << 31;

/// A processor; all but the first wait for the kernel to start them.
pub(super) struct Processor {
    fd: VcpuFd,
    id: u8,
}

impl Processor {
    /// Processor `id` of `count`.
    pub(super) fn new(vm: &VmFd, cpuid: &CpuId, id: u8, count: u8, deadline: bool) -> Result<Self, HypervisorError> {
        let fd = vm.create_vcpu(id.into()).map_err(refused("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(&identified(cpuid, id, count, deadline)).map_err(refused("KVM_SET_CPUID2"))?;
        let entries =
            [MISC_ENABLE, MTRR_DEFAULT].map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
        let msrs = Msrs::from_entries(&entries).expect("two registers");
        // How many of them it knows is left to KVM.
        fd.set_msrs(&msrs).map_err(refused("KVM_SET_MSRS"))?;
        let mut apic = fd.get_lapic().map_err(refused("KVM_GET_LAPIC"))?;
        // LINT0 takes the old interrupt controllers' (ExtINT), LINT1 NMIs.
        for (register, mode) in [(0x350, 0b111u8), (0x360, 0b100)] {
            apic.regs[register + 1] = (apic.regs[register + 1] as u8 & !7 | mode) as _;
        }
        fd.set_lapic(&apic).map_err(refused("KVM_SET_LAPIC"))?;
        Ok(Self { fd, id })
    }

    pub(super) const fn id(&self) -> u8 {
        self.id
    }

    /// At `entry` in 64-bit mode, as the boot protocol of Linux wants it.
    pub(super) fn enter_kernel(&mut self, entry: Entry) -> Result<(), HypervisorError> {
        let mut sregs = self.fd.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
        long_mode(&mut sregs);
        self.fd.set_sregs(&sregs).map_err(refused("KVM_SET_SREGS"))?;
        let regs = kvm_regs {
            rip: entry.0,
            rsi: map::ZERO_PAGE,
            rsp: map::STACK_TOP,
            rflags: 1 << 1, // always set
            ..Default::default()
        };
        self.fd.set_regs(&regs).map_err(refused("KVM_SET_REGS"))
    }

    /// Runs until the guest, or KVM, comes to an end.
    pub(super) fn run(mut self, bus: &Bus, ports: &Ports) -> Result<Ended, VmmError> {
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => {
                    if !ports.read(port, data) && !bus.read(Space::Io, port.into(), data) {
                        data.fill(0xff);
                    }
                }
                Ok(VcpuExit::IoOut(port, data)) => match ports.write(port, data) {
                    Some(ControlFlow::Break(ended)) => return Ok(ended),
                    Some(ControlFlow::Continue(())) => {}
                    None => _ = bus.write(Space::Io, port.into(), data),
                },
                Ok(VcpuExit::MmioRead(address, data)) => {
                    if !bus.read(Space::Memory, address, data) {
                        data.fill(0xff);
                    }
                }
                Ok(VcpuExit::MmioWrite(address, data)) => _ = bus.write(Space::Memory, address, data),
                Ok(VcpuExit::Shutdown) => return Ok(Ended::TripleFault),
                Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {}
                Err(error) if [Errno::EINTR as i32, Errno::EAGAIN as i32].contains(&error.errno()) => {}
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    return Err(VmmError::Stopped(format!("unexpected exit {exit}{}", self.place())));
                }
                Err(error) => return Err(VmmError::Stopped(format!("KVM_RUN: {error}{}", self.place()))),
            }
        }
    }

    /// Where the processor is.
    fn place(&self) -> String {
        self.fd.get_regs().map_or_else(|_| String::new(), |regs| format!(" at rip {:#x}", regs.rip))
    }
}

/// What KVM can do, as processor `id` of `count` says it.
fn identified(cpuid: &CpuId, id: u8, count: u8, deadline: bool) -> CpuId {
    let mut cpuid = cpuid.clone();
    let id = u32::from(id);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xffff | u32::from(count) << 16 | id << 24;
                // The timer of KVM's local APIC can do it, but that is told apart; and the guest may know whose it is: it takes
                // its clock from there, and does not measure timers on a busy host.
                entry.ecx |= u32::from(deadline) << 24 | HYPERVISOR;
            }
            0xb | 0x1f => entry.edx = id,
            0x8000_001e => entry.eax = id,
            _ => {}
        }
    }
    cpuid
}

/// 64-bit mode, paging, flat segments.
fn long_mode(sregs: &mut kvm_sregs) {
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x10, type_: 11, l: 1, ..flat };
    let data = kvm_segment { selector: 0x18, type_: 3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { selector: 0x20, type_: 11, limit: 0x67, present: 1, ..Default::default() };
    (sregs.gdt.base, sregs.gdt.limit) = (map::GDT, 5 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr3 = map::PAGE_TABLES;
    sregs.cr4 = 1 << 5; // PAE
    sregs.efer = 1 << 8 | 1 << 10; // long mode enabled and active
    sregs.cr0 = 1 << 31 | 1 << 4 | 1 << 1 | 1; // paging, ET, MP, protection
}
