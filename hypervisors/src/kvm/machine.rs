//! The machine around the guest, as far as KVM wants one: memory slots, interrupt controller, a processor.
#![allow(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    CpuId, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KvmIrqRouting, kvm_irq_routing_entry, kvm_regs, kvm_segment,
    kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::Pages;
use polyvirt_transports::pci::Message;
use polyvirt_transports::pci::registers::MESSAGE_LINES;

use super::abi::{self, APIC, LINES};
use super::hands::{self, Hands};
use crate::mapping;

/// The local APIC's end-of-interrupt register.
const APIC_EOI: u64 = APIC + 0xb0;

/// Three pages that KVM wants for itself on some Intel processors (`KVM_SET_TSS_ADDR`).
pub(super) const KVM_TSS: usize = 0xfffb_d000;

/// What a guest runs on.
pub(super) struct Machine {
    /// The virtual machine.
    pub(super) vm: Arc<VmFd>,
    /// Where its interrupts go.
    pub(super) routes: Routes,
    /// Its processor.
    pub(super) vcpu: VcpuFd,
    /// The payload on it.
    pub(super) hands: Hands,
    /// Its memory, from 0 on.
    pub(super) ram: Pages,
}

impl Machine {
    /// Creates a machine with `ram` bytes of memory.
    pub(super) fn new(ram: usize) -> Result<Self, HypervisorError> {
        let kvm =
            Kvm::new().map_err(|error| HypervisorError::Unavailable(format!("/dev/kvm cannot be opened: {error}")))?;
        let vm = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
        vm.set_tss_address(KVM_TSS).map_err(refused("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(refused("KVM_CREATE_IRQCHIP"))?;
        let vm = Arc::new(vm);
        let routes = Routes::to_hands(&vm)?;
        let memory = memory_slot(&vm, 0, 0, ram + hands::LEN)?;
        let parts = memory.slice(0, ram).zip(memory.slice(ram, hands::LEN));
        let (ram, own) = parts.expect("the slot is as long as both");
        let base = ram.len() as u64;
        let hands = Hands::new(own, base).map_err(|error| HypervisorError::GuestStopped(error.to_string()))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self { vcpu: vcpu(&vm, &cpuid, base)?, vm, routes, hands, ram })
    }
}

/// The error of an ioctl.
pub(super) fn refused(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> HypervisorError {
    move |error| HypervisorError::Refused { call, reason: error.to_string() }
}

/// The most routes that KVM has (`KVM_MAX_IRQ_ROUTES`).
const MOST_ROUTES: u32 = 4096;

/// The pins of KVM's I/O APIC.
const PINS: u32 = 24;
/// Those that are no ISA interrupt's: devices have them.
const DEVICE_PINS: std::ops::Range<u32> = 16..PINS;

/// The pin of a PC's I/O APIC that interrupt line `line` comes in at: four for the pins of a PCI bus, or one for each of the
/// first eight devices in memory.
pub(super) fn pin_of_line(line: u32) -> u32 {
    DEVICE_PINS.start + line.checked_sub(MESSAGE_LINES).unwrap_or(line) % DEVICE_PINS.len() as u32
}

/// Where a GSI goes.
#[derive(Clone, Copy)]
enum Target {
    /// To the local APIC, as a message.
    Message(Message),
    /// To a pin of the I/O APIC, and if there is one with this number, of the old controllers.
    Pin(u32),
}

/// Where each of KVM's GSIs goes: first those that the machine itself may have, then the interrupt lines, then messages.
#[derive(Clone)]
pub(super) struct Routes {
    vm: Arc<VmFd>,
    /// The GSI of line 0.
    first_line: u32,
    /// By GSI; none for one that has no message yet.
    targets: Arc<Mutex<Vec<Option<Target>>>>,
}

impl Routes {
    /// For a guest that is nothing but hands: each line is a message.
    fn to_hands(vm: &Arc<VmFd>) -> Result<Self, HypervisorError> {
        let lines = (0..LINES).map(|line| Target::Message(abi::message(line)));
        Self::new(vm, 0, lines.map(Some).collect())
    }

    /// For a PC: the first GSIs are the pins of its I/O APIC, and the lines come in there.
    pub(super) fn of_a_pc(vm: &Arc<VmFd>) -> Result<Self, HypervisorError> {
        let targets = (0..PINS).chain((0..LINES).map(pin_of_line)).map(Target::Pin);
        Self::new(vm, PINS, targets.map(Some).collect())
    }

    fn new(vm: &Arc<VmFd>, first_line: u32, targets: Vec<Option<Target>>) -> Result<Self, HypervisorError> {
        let new = Self { vm: Arc::clone(vm), first_line, targets: Arc::new(Mutex::new(targets)) };
        new.tell(&new.lock())?;
        Ok(new)
    }

    /// The GSI of interrupt line `line`.
    pub(super) const fn line(&self, line: u32) -> u32 {
        self.first_line + line
    }

    /// A new GSI, which goes nowhere yet.
    pub(super) fn add(&self) -> Result<u32, HypervisorError> {
        let mut targets = self.lock();
        let gsi = targets.len() as u32;
        if gsi == MOST_ROUTES {
            return Err(HypervisorError::Exhausted("interrupt routes"));
        }
        targets.push(None);
        Ok(gsi)
    }

    /// `gsi` goes to `message` from now on.
    pub(super) fn set(&self, gsi: u32, message: Message) -> Result<(), HypervisorError> {
        let mut targets = self.lock();
        if let Some(target) = targets.get_mut(gsi as usize) {
            *target = Some(Target::Message(message));
        }
        self.tell(&targets)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Target>>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, targets: &[Option<Target>]) -> Result<(), HypervisorError> {
        let entries: Vec<_> = targets
            .iter()
            .zip(0..)
            .flat_map(|(target, gsi)| target.iter().flat_map(move |to| route(gsi, *to)))
            .collect();
        let routing = KvmIrqRouting::from_entries(&entries).expect("fewer routes than KVM has");
        self.vm.set_gsi_routing(&routing).map_err(refused("KVM_SET_GSI_ROUTING"))
    }
}

/// What KVM is told for `gsi`.
fn route(gsi: u32, target: Target) -> Vec<kvm_irq_routing_entry> {
    match target {
        Target::Message(Message { address, data }) => {
            let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            entry.u.msi.address_lo = address as u32;
            entry.u.msi.address_hi = (address >> 32) as u32;
            entry.u.msi.data = data;
            vec![entry]
        }
        Target::Pin(pin) => {
            // Pin 2 of the first old controller is where the second comes in.
            let old = match pin {
                0 | 1 | 3..8 => Some((KVM_IRQCHIP_PIC_MASTER, pin)),
                8..16 => Some((KVM_IRQCHIP_PIC_SLAVE, pin - 8)),
                _ => None,
            };
            let to = |(chip, pin)| {
                let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
                (entry.u.irqchip.irqchip, entry.u.irqchip.pin) = (chip, pin);
                entry
            };
            old.into_iter().chain([(KVM_IRQCHIP_IOAPIC, pin)]).map(to).collect()
        }
    }
}

/// New memory of `len` bytes, which the guest sees at `address`.
pub(super) fn memory_slot(vm: &VmFd, slot: u32, address: u64, len: usize) -> Result<Pages, HypervisorError> {
    let pages = mapping::anonymous(len)?;
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: address,
        memory_size: len as u64,
        userspace_addr: pages.as_ptr().addr() as u64,
    };
    // SAFETY: the memory stays mapped as long as the one vCPU that could touch it: `Guest` owns all three.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("KVM_SET_USER_MEMORY_REGION"))?;
    Ok(pages)
}

/// The processor, at the first instruction of the hands, whose memory is at `base`.
fn vcpu(vm: &VmFd, cpuid: &CpuId, base: u64) -> Result<VcpuFd, HypervisorError> {
    let vcpu = vm.create_vcpu(0).map_err(refused("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(cpuid).map_err(refused("KVM_SET_CPUID2"))?;
    let mut sregs = vcpu.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
    enter_cpl3(&mut sregs, base);
    vcpu.set_sregs(&sregs).map_err(refused("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: base + hands::CODE,
        r14: base + hands::MAILBOX,
        r15: APIC_EOI,
        // For interrupts that come at CPL 0: below the part for those that come at CPL 3.
        rsp: base + hands::STACK_TOP - 0x800,
        rflags: 1 << 9 | 1 << 1, // interrupts enabled (at CPL 3 the payload cannot); bit 1 is always set
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(refused("KVM_SET_REGS"))?;
    let mut apic = vcpu.get_lapic().map_err(refused("KVM_GET_LAPIC"))?;
    // The spurious-interrupt register: APIC enabled (bit 8), vector 255.
    apic.regs[0xf0] = -1;
    apic.regs[0xf1] |= 1;
    vcpu.set_lapic(&apic).map_err(refused("KVM_SET_LAPIC"))?;
    Ok(vcpu)
}

/// As [`enter_cpl3`], but CPL 0: for ports.
pub(super) fn enter_cpl0(sregs: &mut kvm_sregs, _base: u64) {
    (sregs.cs.selector, sregs.cs.dpl) = (hands::CODE_CPL0, 0);
    sregs.ss = kvm_segment { unusable: 1, ..Default::default() };
}

/// Long mode, paging, CPL 3, with the tables in the hands' memory at `hands`.
pub(super) fn enter_cpl3(sregs: &mut kvm_sregs, hands: u64) {
    let flat = kvm_segment { limit: u32::MAX, present: 1, dpl: 3, s: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: hands::DATA_CPL3, type_: 3, db: 1, ..flat };
    sregs.cs = kvm_segment { selector: hands::CODE_CPL3, type_: 11, l: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    let (base, limit, selector) = (hands + hands::TSS, hands::TSS_LIMIT, hands::TSS_SELECTOR);
    sregs.tr = kvm_segment { base, limit, selector, type_: 11, present: 1, ..Default::default() };
    (sregs.gdt.base, sregs.gdt.limit) = (hands + hands::GDT, hands::GDT_LIMIT);
    (sregs.idt.base, sregs.idt.limit) = (hands + hands::IDT, hands::IDT_LIMIT);
    sregs.cr3 = hands + hands::PAGE_TABLES;
    sregs.cr4 = 1 << 5; // PAE
    sregs.efer = 1 << 8 | 1 << 10; // long mode enabled and active
    sregs.cr0 = 1 << 31 | 1 << 4 | 1 << 1 | 1; // paging, ET, MP, protection
}
