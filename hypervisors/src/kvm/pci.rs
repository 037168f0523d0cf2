//! What a PCI bus asks of KVM: port accesses, irqfds whose routes follow MSI-X tables, ioeventfds that follow base address registers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use polyvirt_core::hypervisor::{self, HypervisorError};
use polyvirt_core::memory::FlatMemory;
use polyvirt_transports::pci::registers::pin_line;
use polyvirt_transports::pci::{AddressMap, Doorbell, Machine, Message, Platform, Root, SharedDevice, Space, Wires};
use vmm_sys_util::eventfd::EventFd;

use super::abi;
use super::guest::Guest;
use super::hands::Command;
use super::host::{Host, failed};
use super::machine::{Routes, refused};
use crate::event_loop::{EventLoop, event_fd};

impl Platform for Host {
    type Memory = Arc<FlatMemory>;

    fn memory(&self) -> Self::Memory {
        hypervisor::Host::memory(self)
    }

    fn forward_to(&mut self, root: Arc<Root>) {
        let _ = self.bus.pci.set(root);
    }

    fn wires(&mut self, function: u8, queues: u16, vectors: u16) -> Result<Arc<dyn Wires>, HypervisorError> {
        let mut messages = Vec::new();
        for _ in 0..vectors {
            let (irqfd, gsi) = (event_fd().map_err(failed("eventfd"))?, self.routes.add()?);
            self.vm.register_irqfd(&irqfd, gsi).map_err(refused("KVM_IRQFD"))?;
            messages.push((irqfd, gsi));
        }
        let kicks: Vec<_> = (0..queues).map(|_| event_fd()).collect::<Result<_, _>>().map_err(failed("eventfd"))?;
        let served = kicks.iter().map(EventFd::try_clone).collect::<Result<_, _>>().map_err(failed("eventfd"))?;
        self.functions.insert(function, (served, None));
        let (vm, routes, pin) = (Arc::clone(&self.vm), self.routes.clone(), self.routes.line(pin_line(function >> 3)));
        let pins = Arc::clone(&self.bus.pins);
        Ok(Arc::new(Function { vm, routes, kicks, messages, pin, pins, bells: Mutex::default() }))
    }

    fn serve(&mut self, function: u8, device: SharedDevice) -> Result<(), HypervisorError> {
        if let Some((kicks, event_loop)) = self.functions.get_mut(&function) {
            let spawned = EventLoop::spawn(format!("kvm function {function:#x}"), device, std::mem::take(kicks));
            *event_loop = Some(spawned.map_err(failed("the device's event loop"))?);
        }
        Ok(())
    }
}

/// By GSI, how many functions assert that pin: its line is up as long as one does.
#[derive(Default)]
pub(super) struct Pins(BTreeMap<u32, usize>);

impl Pins {
    /// One function more or less asserts `pin`; whether KVM is to be told. It is of each that does: where a line is a
    /// message, every one counts.
    fn changes(&mut self, pin: u32, asserted: bool) -> bool {
        let count = self.0.entry(pin).or_default();
        *count = if asserted { *count + 1 } else { count.saturating_sub(1) };
        asserted || *count == 0
    }

    /// A bit for each of the first 64 GSIs that is up.
    pub(super) fn held(&self) -> u64 {
        let up = self.0.iter().filter(|(_, count)| **count > 0);
        up.fold(0, |all, (gsi, _)| all | 1u64.checked_shl(*gsi).unwrap_or(0))
    }
}

/// The wires of one function.
struct Function {
    vm: Arc<VmFd>,
    routes: Routes,
    /// By queue.
    kicks: Vec<EventFd>,
    /// By vector: its irqfd, and that one's GSI.
    messages: Vec<(EventFd, u32)>,
    /// The GSI of its pin.
    pin: u32,
    pins: Arc<Mutex<Pins>>,
    /// Where the kicks are registered.
    bells: Mutex<Vec<Doorbell>>,
}

impl Function {
    /// Has KVM turn writes to `bell` into events, or not any more.
    fn register(&self, bell: &Doorbell, on: bool) -> Result<(), kvm_ioctls::Error> {
        let Some(kick) = self.kicks.get(usize::from(bell.queue)) else { return Ok(()) };
        let at = match bell.space {
            Space::Memory => IoEventAddress::Mmio(bell.address),
            Space::Io => IoEventAddress::Pio(bell.address),
        };
        match (bell.value, on) {
            (Some(value), true) => self.vm.register_ioevent(kick, &at, value),
            (Some(value), false) => self.vm.unregister_ioevent(kick, &at, value),
            (None, true) => self.vm.register_ioevent(kick, &at, NoDatamatch),
            (None, false) => self.vm.unregister_ioevent(kick, &at, NoDatamatch),
        }
    }
}

impl Wires for Function {
    fn route(&self, vector: u16, message: Message) {
        let Some((_, gsi)) = self.messages.get(usize::from(vector)) else { return };
        if let Err(error) = self.routes.set(*gsi, message) {
            tracing::error!(%error, vector, "a vector keeps its old message");
        }
    }

    fn signal(&self, vector: u16) {
        let Some((irqfd, _)) = self.messages.get(usize::from(vector)) else { return };
        if let Err(error) = irqfd.write(1) {
            tracing::error!(%error, vector, "an interrupt is lost");
        }
    }

    fn pin(&self, asserted: bool) {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if !pins.changes(self.pin, asserted) {
            return;
        }
        if let Err(error) = self.vm.set_irq_line(self.pin, asserted) {
            tracing::error!(%error, asserted, "an interrupt pin stays as it was");
        }
    }

    fn ring_at(&self, doorbells: &[Doorbell]) {
        let mut bells = self.bells.lock().unwrap_or_else(PoisonError::into_inner);
        for bell in bells.drain(..) {
            if let Err(error) = self.register(&bell, false) {
                tracing::error!(%error, ?bell, "a doorbell stays where it was");
            }
        }
        // Where KVM takes none, as where functions overlap, the write is an exit, and a kick all the same.
        bells.extend(doorbells.iter().filter(|bell| self.register(bell, true).is_ok()));
    }
}

impl Machine for Guest {
    fn address_map(&self) -> AddressMap {
        abi::PCI
    }

    fn input(&self, port: u16, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.access(("input", Command::Input), 4, port.into(), data)
    }

    fn output(&self, port: u16, data: &[u8]) -> Result<(), HypervisorError> {
        self.access(("output", Command::Output), 4, port.into(), &mut data.to_vec())
    }

    fn message(&self, line: u32) -> Message {
        abi::message(line)
    }
}

#[cfg(test)]
mod tests {
    use super::Pins;

    #[test]
    fn a_line_stays_up_until_the_last_function_lets_go_of_it() {
        let mut pins = Pins::default();
        assert!(pins.changes(84, true) && pins.changes(84, true) && pins.changes(85, true));
        assert!(!pins.changes(84, false));
        assert!(pins.held() == 0 && pins.changes(61, true) && pins.held() == 1 << 61);
        assert!(pins.changes(84, false) && pins.changes(85, false));
        assert!(pins.changes(84, true));
    }
}
