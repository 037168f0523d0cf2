//! KVM: memory slots, MMIO exits, ioeventfds for kicks, irqfds for interrupts.
//!
//! The guest is one vCPU that runs only while a call of [`Guest`] is under way, on the caller's thread; it has no
//! other software than the hands that such a call moves.
#![allow(unsafe_code)]

mod abi;
mod guest;
mod hands;
mod host;

use std::ptr::NonNull;
use std::sync::Arc;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KvmIrqRouting, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use polyvirt_core::hypervisor::{Hypervisor, HypervisorError};
use polyvirt_core::memory::{FlatMemory, Pages};
use polyvirt_transports::mmio::Registers;

use abi::refused;
pub use guest::Guest;
pub use host::Host;

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
    let kvm = kvm_ioctls::Kvm::new()
        .map_err(|error| HypervisorError::Unavailable(format!("/dev/kvm cannot be opened: {error}")))?;
    let vm = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
    vm.set_tss_address(abi::KVM_TSS).map_err(refused("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(refused("KVM_CREATE_IRQCHIP"))?;
    let routes: Vec<_> = (0..abi::LINES).map(abi::route).collect();
    let routing = KvmIrqRouting::from_entries(&routes).expect("fewer routes than KVM has");
    vm.set_gsi_routing(&routing).map_err(refused("KVM_SET_GSI_ROUTING"))?;
    let ram = memory_slot(&vm, 0, 0, ram)?;
    let hands = memory_slot(&vm, 1, abi::HANDS, hands::LEN)?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("KVM_GET_SUPPORTED_CPUID"))?;
    let vcpu = guest::Vcpu::new(&vm, &cpuid, hands)?;
    let bus = Arc::new(host::Bus::default());
    let guest = Guest::new(vcpu, Arc::clone(&bus), ram.clone());
    Ok((Host::new(vm, Arc::new(FlatMemory::new([(0, ram)])), bus), guest))
}

/// New memory of `len` bytes, which the guest sees at `address`.
fn memory_slot(vm: &VmFd, slot: u32, address: u64, len: usize) -> Result<Pages, HypervisorError> {
    struct Mapping(NonNull<std::ffi::c_void>, usize);
    // SAFETY: the mapping belongs to the process; the owner does nothing but unmap it when it is dropped.
    unsafe impl Send for Mapping {}
    // SAFETY: as above.
    unsafe impl Sync for Mapping {}
    impl Drop for Mapping {
        fn drop(&mut self) {
            // SAFETY: mapped below with this length, unmapped once, and its pages are gone.
            if let Err(error) = unsafe { munmap(self.0, self.1) } {
                tracing::error!(%error, "guest memory stays mapped");
            }
        }
    }

    let size = len.try_into().map_err(|_| HypervisorError::Exhausted("guest memory"))?;
    // SAFETY: a new anonymous mapping, wherever there is room.
    let start =
        unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED) }
            .map_err(|error| HypervisorError::Refused { call: "mmap", reason: error.to_string() })?;
    // SAFETY: mapped for reading and writing until the owner is dropped; nobody has a reference to the bytes.
    let pages = unsafe { Pages::new(start.cast(), len, Arc::new(Mapping(start, len))) };
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: address,
        memory_size: len as u64,
        userspace_addr: pages.as_ptr().addr() as u64,
    };
    // SAFETY: the slot's memory stays mapped as long as the vCPU that could touch it: `Guest` owns both.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("KVM_SET_USER_MEMORY_REGION"))?;
    Ok(pages)
}
