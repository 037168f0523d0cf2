//! The transports.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
        let observed = Arc::new(Observed { guest: Arc::clone(guest), place, notes: Mutex::default() });
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
    notes: Mutex<Notes>,
}

#[derive(Default)]
struct Notes {
    log: Vec<RegisterAccess>,
    /// By offset, what is read there instead of the truth.
    lies: BTreeMap<u64, u32>,
    /// What an access turns into.
    change: Option<fn(RegisterAccess) -> Vec<RegisterAccess>>,
}

impl<G: Registers> Observed<G> {
    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `access`, or what it turns into; the value is that of the last one that reads.
    fn access(&self, access: RegisterAccess) -> Result<u64, HypervisorError> {
        let mut value = 0;
        let change = self.notes().change;
        for mut access in change.map_or(vec![access], |change| change(access)) {
            let address = self.place.base.wrapping_add(access.offset);
            let mut bytes = access.value.to_le_bytes();
            let Some(part) = bytes.get_mut(..access.len) else { continue };
            if access.write {
                self.guest.store(address, part)?;
            } else {
                self.guest.load(address, part)?;
                let lie = self.notes().lies.get(&access.offset).map(|lie| lie.to_le_bytes());
                part.iter_mut().zip(lie.iter().flatten()).for_each(|(to, from)| *to = *from);
                access.value = u64::from_le_bytes(bytes);
                value = access.value;
            }
            let mut notes = self.notes();
            if notes.log.len() < LIMIT {
                notes.log.push(access);
            }
        }
        Ok(value)
    }

    fn offset(&self, address: u64) -> u64 {
        address.wrapping_sub(self.place.base)
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
        self.store(doorbell, &value.to_le_bytes())
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
        let access = RegisterAccess { offset: self.offset(address), len: data.len(), value: 0, write: false };
        let value = self.access(access)?.to_le_bytes();
        data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
        Ok(())
    }

    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        let mut value = [0; 8];
        value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let (offset, value) = (self.offset(address), u64::from_le_bytes(value));
        self.access(RegisterAccess { offset, len: data.len(), value, write: true }).map(drop)
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
        self.notes().log.clone()
    }

    fn lie(&self, offset: u64, value: Option<u32>) {
        let mut notes = self.notes();
        match value {
            Some(value) => notes.lies.insert(offset, value),
            None => notes.lies.remove(&offset),
        };
    }

    fn tamper(&self, change: fn(RegisterAccess) -> Vec<RegisterAccess>) {
        self.notes().change = Some(change);
    }

    fn connect(&self) -> Result<Box<dyn Transport>, TransportError> {
        Ok(Box::new(mmio::Driver::connect(Arc::clone(self), self.place)?))
    }
}
