//! The transports.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use polyvirt_core::device::Device;
use polyvirt_core::hypervisor::{Guest, Host, HypervisorError, Share};
use polyvirt_core::memory::{Access, GuestMemory, Pages};
use polyvirt_core::transport::{Transport, TransportError};
use polyvirt_transports::mmio::Registers;
use polyvirt_transports::{lguest, mmio, xenbus};

use super::{Connection, Wire};
use crate::suite::{RegisterAccess, RegisterFile};

/// virtio-mmio.
pub struct Mmio;

impl<H: Host<Place = mmio::Place>, G: Registers + 'static> Wire<H, G> for Mmio {
    const NAME: &'static str = "mmio";
    const LEGACY: bool = false;

    fn attach<B, M>(host: &mut B, memory: M, device: Box<dyn Device<M>>) -> Result<(), HypervisorError>
    where
        B: Host<Place = H::Place>,
        M: GuestMemory + Send + 'static,
    {
        mmio::attach(host, memory, device)
    }

    fn connect(guest: &Arc<G>, place: mmio::Place) -> Result<Connection, TransportError> {
        let (log, lies) = (Mutex::default(), Mutex::default());
        let observed = Arc::new(Observed { guest: Arc::clone(guest), place, log, lies });
        let driver = mmio::Driver::connect(Arc::clone(&observed), place)?;
        Ok((Box::new(driver), Some(Box::new(observed))))
    }
}

/// lguest's device page.
pub struct LguestPage;

impl<H, G> Wire<H, G> for LguestPage
where
    H: Host<Place = lguest::registers::HostPlace>,
    G: Guest<Place = lguest::registers::GuestPlace> + 'static,
{
    const NAME: &'static str = "lguest";
    const LEGACY: bool = true;

    fn attach<B, M>(host: &mut B, memory: M, device: Box<dyn Device<M>>) -> Result<(), HypervisorError>
    where
        B: Host<Place = H::Place>,
        M: GuestMemory + Send + 'static,
    {
        lguest::attach(host, memory, device)
    }

    fn connect(guest: &Arc<G>, place: G::Place) -> Result<Connection, TransportError> {
        Ok((Box::new(lguest::Driver::connect(Arc::clone(guest), place)?), None))
    }
}

/// xenstore and event channels.
pub struct Xenbus;

impl<H: Host<Place = xenbus::HostPlace>, G: xenbus::Domain + 'static> Wire<H, G> for Xenbus {
    const NAME: &'static str = "xenbus";
    const LEGACY: bool = false;

    fn attach<B, M>(host: &mut B, memory: M, device: Box<dyn Device<M>>) -> Result<(), HypervisorError>
    where
        B: Host<Place = H::Place>,
        M: GuestMemory + Send + 'static,
    {
        xenbus::attach(host, memory, device).map(drop)
    }

    fn connect(guest: &Arc<G>, place: xenbus::GuestPlace) -> Result<Connection, TransportError> {
        Ok((Box::new(xenbus::Driver::connect(Arc::clone(guest), place)?), None))
    }
}

/// The most register accesses that are remembered.
const LIMIT: usize = 1 << 16;

/// A guest whose register accesses are written down.
struct Observed<G> {
    guest: Arc<G>,
    place: mmio::Place,
    log: Mutex<Vec<RegisterAccess>>,
    /// By offset, what is read there instead of the truth.
    lies: Mutex<BTreeMap<u64, u32>>,
}

impl<G> Observed<G> {
    fn note(&self, address: u64, data: &[u8], write: bool) {
        let mut value = [0; 8];
        value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let offset = address.wrapping_sub(self.place.base);
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if log.len() < LIMIT {
            log.push(RegisterAccess { offset, len: data.len(), value: u64::from_le_bytes(value), write });
        }
    }
}

impl<G: Registers> Share for Observed<G> {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        self.guest.allocate(len)
    }

    fn share(&self, pages: &Pages, access: Access) -> Result<u64, HypervisorError> {
        self.guest.share(pages, access)
    }

    fn unshare(&self, address: u64) -> Result<(), HypervisorError> {
        self.guest.unshare(address)
    }
}

impl<G: Registers> Guest for Observed<G> {
    type Place = mmio::Place;

    fn notify(&self, doorbell: u64, value: u32) -> Result<(), HypervisorError> {
        self.note(doorbell, &value.to_le_bytes(), true);
        self.guest.notify(doorbell, value)
    }

    fn wait(&self, lines: u64, watchdog: Duration) -> Result<u64, HypervisorError> {
        self.guest.wait(lines, watchdog)
    }

    fn enumerate(&self) -> Result<Vec<mmio::Place>, HypervisorError> {
        self.guest.enumerate()
    }
}

impl<G: Registers> Registers for Observed<G> {
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.guest.load(address, data)?;
        let lies = self.lies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lie) = lies.get(&address.wrapping_sub(self.place.base)) {
            data.iter_mut().zip(lie.to_le_bytes()).for_each(|(to, from)| *to = from);
        }
        self.note(address, data, false);
        Ok(())
    }

    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        self.note(address, data, true);
        self.guest.store(address, data)
    }
}

impl<G: Registers + 'static> RegisterFile for Arc<Observed<G>> {
    fn load(&self, offset: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.guest.load(self.place.base.wrapping_add(offset), data)
    }

    fn store(&self, offset: u64, data: &[u8]) -> Result<(), HypervisorError> {
        self.guest.store(self.place.base.wrapping_add(offset), data)
    }

    fn log(&self) -> Vec<RegisterAccess> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lie(&self, offset: u64, value: Option<u32>) {
        let mut lies = self.lies.lock().unwrap_or_else(PoisonError::into_inner);
        match value {
            Some(value) => lies.insert(offset, value),
            None => lies.remove(&offset),
        };
    }

    fn connect(&self) -> Result<Box<dyn Transport>, TransportError> {
        Ok(Box::new(mmio::Driver::connect(Arc::clone(self), self.place)?))
    }
}
