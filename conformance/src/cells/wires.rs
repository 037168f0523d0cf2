//! The transports.

use std::sync::Arc;
use std::time::Duration;

use polyvirt_core::device::Device;
use polyvirt_core::hypervisor::{Guest, Host, HypervisorError, Share, WaitForInterrupt};
use polyvirt_core::memory::{Access, GuestMemory, Pages};
use polyvirt_core::queue::ByteOrder;
use polyvirt_core::transport::{BlockingTransport, TransportError};
use polyvirt_transports::mmio::Registers;
use polyvirt_transports::{lguest, mmio, xenbus};

use super::notes::Notes;
use super::{Connection, Wire};
use crate::suite::{RegisterAccess, RegisterFile};

/// virtio-mmio.
pub struct Mmio;

impl<H: Host<Place = mmio::Place>, G: Registers + WaitForInterrupt + 'static> Wire<H, G> for Mmio {
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
        observed(guest, place, false)
    }
}

/// virtio-mmio of version 1.
pub struct MmioLegacy;

impl<H: Host<Place = mmio::Place>, G: Registers + WaitForInterrupt + 'static> Wire<H, G> for MmioLegacy {
    const NAME: &'static str = "mmio-legacy";
    const LEGACY: bool = true;

    fn attach<B, M>(host: &mut B, memory: M, device: Box<dyn Device<M>>) -> Result<(), HypervisorError>
    where
        B: Host<Place = H::Place>,
        M: GuestMemory + Send + 'static,
    {
        mmio::attach_legacy(host, memory, device, ByteOrder::Little)
    }

    fn connect(guest: &Arc<G>, place: mmio::Place) -> Result<Connection, TransportError> {
        observed(guest, place, true)
    }
}

fn observed<G: Registers + WaitForInterrupt + 'static>(
    guest: &Arc<G>,
    place: mmio::Place,
    legacy: bool,
) -> Result<Connection, TransportError> {
    let observed = Arc::new(Observed { guest: Arc::clone(guest), place, legacy, notes: Notes::default() });
    let driver = RegisterFile::connect(&observed)?;
    Ok((driver, Some(Box::new(observed))))
}

/// lguest's device page.
pub struct LguestPage;

impl<H, G> Wire<H, G> for LguestPage
where
    H: Host<Place = lguest::registers::HostPlace>,
    G: WaitForInterrupt<Place = lguest::registers::GuestPlace> + 'static,
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

impl<H: Host<Place = xenbus::HostPlace>, G: xenbus::Domain + WaitForInterrupt + 'static> Wire<H, G> for Xenbus {
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

/// A guest whose register accesses are written down.
struct Observed<G> {
    guest: Arc<G>,
    place: mmio::Place,
    legacy: bool,
    notes: Notes,
}

impl<G: Registers> Observed<G> {
    /// Does `access` with the bytes of `part`.
    fn perform(&self, access: RegisterAccess, part: &mut [u8]) -> Result<(), HypervisorError> {
        let address = self.place.base.wrapping_add(access.offset);
        if access.write { self.guest.store(address, part) } else { self.guest.load(address, part) }
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
        let (at, value) = (self.offset(doorbell), value.to_le_bytes());
        // Written down as what it is to the device; whatever it turns into, the port's own kick rings the doorbell.
        self.notes.store(at, &value, |access, part| match <[u8; 4]>::try_from(&*part) {
            Ok(value) if access.write && access.offset == at => self.guest.notify(doorbell, u32::from_le_bytes(value)),
            _ => self.perform(access, part),
        })
    }

    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        self.guest.take(line)
    }

    fn enumerate(&self) -> Result<Vec<mmio::Place>, HypervisorError> {
        self.guest.enumerate()
    }
}

impl<G: Registers + WaitForInterrupt> WaitForInterrupt for Observed<G> {
    fn wait(&self, lines: &[u32], most: Duration) -> Result<bool, HypervisorError> {
        self.guest.wait(lines, most)
    }
}

impl<G: Registers> Registers for Observed<G> {
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.notes.load(self.offset(address), data, |access, part| self.perform(access, part))
    }

    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        self.notes.store(self.offset(address), data, |access, part| self.perform(access, part))
    }
}

impl<G: Registers + WaitForInterrupt + 'static> RegisterFile for Arc<Observed<G>> {
    fn load(&self, offset: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.guest.load(self.place.base.wrapping_add(offset), data)
    }

    fn store(&self, offset: u64, data: &[u8]) -> Result<(), HypervisorError> {
        self.guest.store(self.place.base.wrapping_add(offset), data)
    }

    fn log(&self) -> Vec<RegisterAccess> {
        self.notes.log()
    }

    fn lie(&self, offset: u64, value: Option<u32>) {
        self.notes.lie(offset, value);
    }

    fn tamper(&self, change: fn(RegisterAccess) -> Vec<RegisterAccess>) {
        self.notes.tamper(change);
    }

    fn connect(&self) -> Result<Box<dyn BlockingTransport>, TransportError> {
        let driver = match self.legacy {
            false => mmio::Driver::connect(Arc::clone(self), self.place),
            true => mmio::Driver::connect_legacy(Arc::clone(self), self.place),
        };
        Ok(Box::new(driver?))
    }
}
