//! A PCI host on a hypervisor: the bus that devices are put on.

use std::sync::{Arc, Mutex};

use polyvirt_core::hypervisor::{self, BusDevice, HypervisorError, Interrupt};
use polyvirt_core::memory::GuestMemory;

use super::interrupts::Interrupts;
use super::registers::*;
use super::root::{Root, Slot};

/// A device that the bus and whoever serves its kicks call in turns.
pub type SharedDevice = Arc<Mutex<Box<dyn BusDevice>>>;

/// What a PCI host asks of the hypervisor below it.
pub trait Platform {
    /// Guest memory as a device sees it.
    type Memory: GuestMemory + Send + 'static;

    /// From now on hands to [`Root::read`] and [`Root::write`] what the guest does in the root's [`AddressMap`] and at
    /// the configuration ports.
    fn forward_to(&mut self, root: Arc<Root>);

    /// A handle that resolves device-visible addresses.
    fn memory(&self) -> Self::Memory;

    /// The wires of function `function`, which has `queues` queues and at most `vectors` vectors.
    fn wires(&mut self, function: u8, queues: u16, vectors: u16) -> Result<Arc<dyn Wires>, HypervisorError>;

    /// From now on serves the doorbells of `function` and its waker, by [`BusDevice::kick`] and [`BusDevice::poll`].
    fn serve(&mut self, function: u8, device: SharedDevice) -> Result<(), HypervisorError>;
}

/// What goes from one function to the machine around it.
pub trait Wires: Send + Sync {
    /// The message of `vector` is `message` from now on.
    fn route(&self, vector: u16, message: Message);

    /// Sends the message of `vector`. May be called from any thread.
    fn signal(&self, vector: u16);

    /// Asserts the interrupt pin, or lets go of it: only ever a change. May be called from any thread.
    fn pin(&self, asserted: bool);

    /// The function's doorbells are at these places, and at no others any more. A hypervisor that can tell a write there
    /// from others may have it served as a kick; where it does not, the write comes as any other does.
    fn ring_at(&self, doorbells: &[Doorbell]);
}

/// Where a write is a kick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Of which queue.
    pub queue: u16,
    /// Memory or ports.
    pub space: Space,
    /// The address.
    pub address: u64,
    /// Which 16 bits have to be written; none if any write will do.
    pub value: Option<u16>,
}

/// A PCI host with one bus, on hypervisor `P`: [`attach`](super::attach) puts devices onto it.
pub struct Host<P> {
    platform: P,
    root: Arc<Root>,
    /// The next free device number.
    next: u8,
}

impl<P: Platform> Host<P> {
    /// An empty bus on `platform`, which answers at `map`.
    pub fn new(mut platform: P, map: AddressMap) -> Self {
        let root = Arc::new(Root::new(map));
        platform.forward_to(Arc::clone(&root));
        // Device 0 is the host bridge.
        Self { platform, root, next: 1 }
    }

    /// What the bus stands on.
    pub const fn platform(&self) -> &P {
        &self.platform
    }

    /// What answers the guest.
    pub const fn root(&self) -> &Arc<Root> {
        &self.root
    }
}

/// Where a device is, to its host side.
#[derive(Clone)]
pub struct HostPlace {
    /// Device number × 8 + function number.
    pub function: u8,
    pub(super) interrupts: Arc<Interrupts>,
    pub(super) slot: Arc<Slot>,
}

impl<P: Platform> hypervisor::Host for Host<P> {
    type Memory = P::Memory;
    type Place = HostPlace;

    fn memory(&self) -> P::Memory {
        self.platform.memory()
    }

    fn place(&mut self, _device_type: u32, queues: u16) -> Result<HostPlace, HypervisorError> {
        if self.next == 32 {
            return Err(HypervisorError::Exhausted("device numbers of the PCI bus"));
        }
        let function = self.next << 3;
        // One for each queue and one for the configuration; two even for a device that needs less (4.1.5.1.2).
        let vectors = queues.saturating_add(1).clamp(2, MSIX_MAX);
        let wires = self.platform.wires(function, queues, vectors)?;
        self.next += 1;
        let interrupts = Arc::new(Interrupts::new(Arc::clone(&wires), queues, vectors));
        Ok(HostPlace { function, interrupts, slot: Arc::new(Slot::new(Arc::clone(&self.root), function, wires)) })
    }

    fn interrupt(&self, place: &HostPlace) -> Arc<dyn Interrupt> {
        Arc::clone(&place.interrupts) as Arc<dyn Interrupt>
    }

    fn plug(&mut self, place: HostPlace, device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        let device = Arc::new(Mutex::new(device));
        self.platform.serve(place.function, Arc::clone(&device))?;
        self.root.plug(place.function, device);
        Ok(())
    }
}

impl<P> Drop for Host<P> {
    /// The devices go with the host; the guest, if it lives on, finds none.
    fn drop(&mut self) {
        self.root.clear();
    }
}
