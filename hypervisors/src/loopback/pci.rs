//! What a PCI bus asks for: accesses, messages, pins. All of them are function calls.

use std::sync::{Arc, Mutex};

use polyvirt_core::hypervisor::{self, HypervisorError};
use polyvirt_core::memory::FlatMemory;
use polyvirt_transports::pci::registers::pin_line;
use polyvirt_transports::pci::{AddressMap, Doorbell, Machine, Message, Platform, Root, SharedDevice, Space, Wires};

use super::host::poll_when_woken;
use super::{Guest, Host, Interrupts, lock};

/// A message to here is the interrupt of the line that it names.
const MESSAGES: u64 = 0xfee0_0000;

impl Platform for Host {
    type Memory = Arc<FlatMemory>;

    fn memory(&self) -> Self::Memory {
        hypervisor::Host::memory(self)
    }

    fn forward_to(&mut self, root: Arc<Root>) {
        let _ = self.bus.pci.set(root);
    }

    fn wires(&mut self, function: u8, _queues: u16, vectors: u16) -> Result<Arc<dyn Wires>, HypervisorError> {
        let messages = Mutex::new(vec![Message::default(); vectors.into()]);
        let pin = pin_line(function >> 3);
        Ok(Arc::new(Function { interrupts: Arc::clone(&self.bus.interrupts), messages, pin }))
    }

    fn serve(&mut self, _function: u8, device: SharedDevice) -> Result<(), HypervisorError> {
        poll_when_woken(&device);
        Ok(())
    }
}

/// The wires of one function.
struct Function {
    interrupts: Arc<Interrupts>,
    /// By vector.
    messages: Mutex<Vec<Message>>,
    /// Its pin's line.
    pin: u32,
}

impl Wires for Function {
    fn route(&self, vector: u16, message: Message) {
        if let Some(routed) = lock(&self.messages).get_mut(usize::from(vector)) {
            *routed = message;
        }
    }

    fn signal(&self, vector: u16) {
        let message = lock(&self.messages).get(usize::from(vector)).copied().unwrap_or_default();
        if message.address == MESSAGES {
            self.interrupts.raise(message.data);
        }
    }

    fn pin(&self, asserted: bool) {
        self.interrupts.change(|lines| match (asserted, lines.held.iter().position(|&held| held == self.pin)) {
            (true, _) => lines.held.push(self.pin),
            (false, Some(held)) => drop(lines.held.swap_remove(held)),
            (false, None) => {}
        });
    }

    // Every write is a function call, and so is a kick.
    fn ring_at(&self, _doorbells: &[Doorbell]) {}
}

impl Machine for Guest {
    fn address_map(&self) -> AddressMap {
        AddressMap { ecam: None, memory: 0x4000_0000..0x8000_0000, memory64: 1 << 40..1 << 41, io: 0x1000..0x1_0000 }
    }

    fn input(&self, port: u16, data: &mut [u8]) -> Result<(), HypervisorError> {
        if !self.bus.pci.get().is_some_and(|root| root.read(Space::Io, port.into(), data)) {
            data.fill(0xff);
        }
        Ok(())
    }

    fn output(&self, port: u16, data: &[u8]) -> Result<(), HypervisorError> {
        if let Some(root) = self.bus.pci.get() {
            root.write(Space::Io, port.into(), data);
        }
        Ok(())
    }

    fn message(&self, line: u32) -> Message {
        Message { address: MESSAGES, data: line }
    }
}
