//! The host's side: the bus with its devices, kicks by ioeventfd, interrupts by irqfd.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use kvm_ioctls::{IoEventAddress, VmFd};
use polyvirt_core::hypervisor::{self, BusDevice, Cause, HypervisorError, Interrupt};
use polyvirt_core::memory::FlatMemory;
use polyvirt_transports::mmio::Place;
use polyvirt_transports::mmio::registers::{PLACE_SIZE, QUEUE_NOTIFY};
use polyvirt_transports::pci::{Root, Space};
use vmm_sys_util::eventfd::EventFd;

use super::abi;
use super::machine::{Routes, refused};
use super::pci::Pins;
use crate::event_loop::{EventLoop, SharedDevice, event_fd, lock};

/// The host half.
pub struct Host {
    pub(super) vm: Arc<VmFd>,
    pub(super) routes: Routes,
    memory: Arc<FlatMemory>,
    pub(super) bus: Arc<Bus>,
    /// By line.
    places: Vec<Reserved>,
    /// The functions of the PCI bus, by number: their kicks until they are served, and who serves them.
    pub(super) functions: BTreeMap<u8, (Vec<EventFd>, Option<EventLoop>)>,
}

struct Reserved {
    queues: u16,
    interrupt: Arc<Line>,
    /// Serves the kicks once a device is plugged.
    event_loop: Option<EventLoop>,
}

impl Host {
    pub(super) fn new(vm: Arc<VmFd>, routes: Routes, memory: Arc<FlatMemory>, bus: Arc<Bus>) -> Self {
        Self { vm, routes, memory, bus, places: Vec::new(), functions: BTreeMap::new() }
    }
}

impl hypervisor::Host for Host {
    type Memory = Arc<FlatMemory>;
    type Place = Place;

    fn memory(&self) -> Self::Memory {
        Arc::clone(&self.memory)
    }

    fn place(&mut self, _device_type: u32, queues: u16) -> Result<Place, HypervisorError> {
        let line = self.places.len() as u32;
        if line == abi::LINES {
            return Err(HypervisorError::Exhausted("interrupt lines"));
        }
        let irqfd = event_fd().map_err(failed("eventfd"))?;
        self.vm.register_irqfd(&irqfd, self.routes.line(line)).map_err(refused("KVM_IRQFD"))?;
        self.places.push(Reserved { queues, interrupt: Arc::new(Line(irqfd)), event_loop: None });
        Ok(abi::place(line))
    }

    /// # Panics
    /// If `place` does not come from [`Host::place`](hypervisor::Host::place) of this host.
    fn interrupt(&self, place: &Place) -> Arc<dyn Interrupt> {
        self.places[place.line as usize].interrupt.clone()
    }

    fn plug(&mut self, place: Place, device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        let reserved = self.places.get_mut(place.line as usize).filter(|reserved| reserved.event_loop.is_none());
        let Some(reserved) = reserved.filter(|_| abi::place(place.line) == place) else {
            let reason = format!("expected a place that is reserved and free, got {place:x?}");
            return Err(HypervisorError::Refused { call: "plug", reason });
        };
        let doorbell = IoEventAddress::Mmio(place.base + QUEUE_NOTIFY);
        let mut kicks = Vec::new();
        for queue in 0..reserved.queues {
            let kick = event_fd().map_err(failed("eventfd"))?;
            self.vm.register_ioevent(&kick, &doorbell, u32::from(queue)).map_err(refused("KVM_IOEVENTFD"))?;
            kicks.push(kick);
        }
        let device: SharedDevice = Arc::new(device.into());
        let event_loop = EventLoop::spawn(format!("kvm line {}", place.line), Arc::clone(&device), kicks);
        reserved.event_loop = Some(event_loop.map_err(failed("the device's event loop"))?);
        self.bus.plug(place, device);
        Ok(())
    }
}

impl Drop for Host {
    /// The devices go with the host; the guest, if it lives on, finds none.
    fn drop(&mut self) {
        self.bus.devices.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// An interrupt line: an irqfd.
struct Line(EventFd);

impl Interrupt for Line {
    fn raise(&self, cause: Cause) {
        if let Err(error) = self.0.write(1) {
            tracing::error!(%error, ?cause, "an interrupt is lost");
        }
    }
}

/// What is plugged, as the vCPU sees it.
#[derive(Default)]
pub(super) struct Bus {
    devices: RwLock<Vec<(Place, SharedDevice)>>,
    pub(super) pci: OnceLock<Arc<Root>>,
    /// The pins of its functions.
    pub(super) pins: Arc<Mutex<Pins>>,
}

impl Bus {
    pub(super) fn plug(&self, place: Place, device: SharedDevice) {
        self.devices.write().unwrap_or_else(PoisonError::into_inner).push((place, device));
    }

    /// Where devices are.
    pub(super) fn places(&self) -> Vec<Place> {
        self.devices.read().unwrap_or_else(PoisonError::into_inner).iter().map(|&(place, _)| place).collect()
    }

    /// A read that no memory answers. False if nothing else does.
    pub(super) fn read(&self, space: Space, address: u64, data: &mut [u8]) -> bool {
        self.access(space, address, |device, offset| device.read(offset, data))
            || self.pci.get().is_some_and(|root| root.read(space, address, data))
    }

    /// A write that no memory answers. False if nothing else does.
    pub(super) fn write(&self, space: Space, address: u64, data: &[u8]) -> bool {
        self.access(space, address, |device, offset| device.write(offset, data))
            || self.pci.get().is_some_and(|root| root.write(space, address, data))
    }

    /// Lets the device at `address` do `access`, which gets it and the offset. False if no device is there.
    fn access(&self, space: Space, address: u64, access: impl FnOnce(&mut dyn BusDevice, u64)) -> bool {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        let in_it = |&&(place, _): &&(Place, _)| address.wrapping_sub(place.base) < PLACE_SIZE;
        let Some((place, device)) = devices.iter().find(in_it).filter(|_| space == Space::Memory) else {
            return false;
        };
        access(&mut **lock(device), address - place.base);
        true
    }
}

pub(super) fn failed(call: &'static str) -> impl FnOnce(std::io::Error) -> HypervisorError {
    move |error| HypervisorError::Refused { call, reason: error.to_string() }
}
