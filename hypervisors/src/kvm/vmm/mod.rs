//! A machine that boots Linux: what a guest kernel wants besides virtio.
//!
//! Memory, processors, KVM's interrupt controllers and timer, a serial port, power control, and ACPI tables that say so. The
//! devices are plugged into the [`Host`] that comes with it, the one that the conformance suite runs on, by memory-mapped
//! places or over a PCI bus; a stock kernel finds both by the tables.

mod kernel;
mod map;
mod ports;
mod processor;
mod tables;

use std::fs::File;
use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VmFd};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{FlatMemory, MemoryError, Pages};

pub use ports::SerialInput;

use super::host::{Bus, Host, failed};
use super::machine::{KVM_TSS, Routes, memory_slot, refused};
use crate::event_loop::event_fd;
use ports::Ports;
use processor::Processor;

/// How long a kernel may take until it first touches a port.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What is to be booted.
#[derive(Debug)]
pub struct Boot {
    /// A bzImage, or an ELF file, of a 64-bit Linux.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// What the kernel is told.
    pub command_line: String,
    /// Whether the tables tell of a PCI bus; otherwise, of the memory-mapped places that are taken.
    pub pci: bool,
}

/// Why a guest did not boot, or came to an end that it did not ask for.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// KVM refuses something, or there is none.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// What is to be booted is no 64-bit Linux, or is damaged.
    #[error("the kernel is neither a bzImage nor an ELF file of a 64-bit Linux: {0}")]
    NotAKernel(String),
    /// A file cannot be read.
    #[error("the {what} cannot be read: {error}")]
    Read {
        /// Which.
        what: &'static str,
        /// Why.
        error: std::io::Error,
    },
    /// Memory is too small.
    #[error("the {what} needs {needed} bytes of memory, of which there are {there}: give the guest more (--mem)")]
    Room {
        /// For what.
        what: &'static str,
        /// Bytes.
        needed: u64,
        /// Bytes.
        there: u64,
    },
    /// The kernel's command line is too long.
    #[error("a command line of {len} bytes, and the kernel takes {max}")]
    CommandLine {
        /// Bytes.
        len: usize,
        /// Bytes.
        max: usize,
    },
    /// Something of the machine does not fit into the guest's memory.
    #[error("the guest's memory: {0}")]
    Memory(#[from] MemoryError),
    /// KVM could not run the guest on.
    #[error("the KVM of this host cannot run this kernel: {0}")]
    Stopped(String),
}

/// How the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It switched itself off.
    Off,
    /// It wants to start again.
    Restart,
    /// A triple fault: to a PC, this is a restart too, and a kernel that crashes early ends like this.
    TripleFault,
}

/// A machine that is not running yet.
pub struct Vmm {
    vm: Arc<VmFd>,
    ram: Pages,
    bus: Arc<Bus>,
    ports: Arc<Ports>,
    processors: Vec<Processor>,
}

impl Vmm {
    /// A machine with `ram` bytes of memory and `cpus` processors, whose serial port writes to `serial`; and where devices
    /// are plugged in.
    pub fn new(ram: usize, cpus: u8, serial: Box<dyn Write + Send>) -> Result<(Host, Self), VmmError> {
        let kvm =
            Kvm::new().map_err(|error| HypervisorError::Unavailable(format!("/dev/kvm cannot be opened: {error}")))?;
        let vm = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
        vm.set_tss_address(KVM_TSS).map_err(refused("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(refused("KVM_CREATE_IRQCHIP"))?;
        vm.create_pit2(kvm_pit_config::default()).map_err(refused("KVM_CREATE_PIT2"))?;
        let vm = Arc::new(vm);
        let routes = Routes::of_a_pc(&vm)?;
        let ram = memory_slot(&vm, 0, 0, ram)?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("KVM_GET_SUPPORTED_CPUID"))?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let processors =
            (0..cpus).map(|id| Processor::new(&vm, &cpuid, id, cpus, deadline)).collect::<Result<_, _>>()?;
        let irqfd = event_fd().map_err(failed("eventfd"))?;
        vm.register_irqfd(&irqfd, map::SERIAL_LINE).map_err(refused("KVM_IRQFD"))?;
        let ports = Arc::new(Ports::new(irqfd, serial));
        let bus = Arc::new(Bus::default());
        let memory = Arc::new(FlatMemory::new([(0, ram.clone())]));
        let host = Host::new(Arc::clone(&vm), routes, memory, Arc::clone(&bus));
        Ok((host, Self { vm, ram, bus, ports, processors }))
    }

    /// The end of the serial port that is typed into.
    pub fn serial_input(&self) -> SerialInput {
        SerialInput(Arc::clone(&self.ports))
    }

    /// Boots `boot` and runs it to its end. Its processors stay where they are then: they stop with the process.
    ///
    /// If the kernel has not so much as touched a port after [`PATIENCE`], `tell_of_silence` is called: on the KVM of some
    /// hosts, which is software, stock kernels spin for ever without a fault.
    pub fn run(mut self, boot: Boot, tell_of_silence: impl FnOnce()) -> Result<Ended, VmmError> {
        let places = if boot.pci { None } else { Some(self.bus.places()) };
        tables::write(&self.ram, self.processors.len() as u8, places.as_deref())?;
        let entry = kernel::load(&self.ram, boot)?;
        self.processors[0].enter_kernel(entry)?;
        let (ended, end) = channel();
        for processor in self.processors {
            let (ended, bus, ports) = (ended.clone(), Arc::clone(&self.bus), Arc::clone(&self.ports));
            // Kept by every processor: the guest's memory outlives them all.
            let (vm, ram) = (Arc::clone(&self.vm), self.ram.clone());
            let spawned = thread::Builder::new().name(format!("processor {}", processor.id())).spawn(move || {
                let _machine = (vm, ram);
                // Only the first end counts.
                let _ = ended.send(processor.run(&bus, &ports));
            });
            spawned.map_err(failed("a processor's thread"))?;
        }
        drop(ended);
        match end.recv_timeout(PATIENCE) {
            Ok(end) => return end,
            Err(RecvTimeoutError::Timeout) if self.ports.is_untouched() => tell_of_silence(),
            Err(_) => {}
        }
        end.recv().unwrap_or_else(|_| Err(VmmError::Stopped("all processors are gone".into())))
    }
}

/// A lock whose holder may have panicked.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
