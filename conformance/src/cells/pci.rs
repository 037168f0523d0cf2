//! virtio over PCI, on any hypervisor that a PCI bus can stand on.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use polyvirt_core::device::Device;
use polyvirt_core::hypervisor::{Guest, Host, HypervisorError, Share, WaitForInterrupt};
use polyvirt_core::memory::{Access, GuestMemory, Pages};
use polyvirt_core::queue::ByteOrder;
use polyvirt_core::transport::{BlockingTransport, TransportError};
use polyvirt_transports::pci::registers::{BAR_64, BAR_COUNT, BAR_IO, BARS, region};
use polyvirt_transports::pci::{
    self, Bus, Functions, Generation, GuestPlace, HostPlace, LegacyDriver, Machine, Message, Platform, Signalling,
    Space,
};

use super::notes::Notes;
use super::{Connection, FlawedGuest, FlawedHost, Port, Wire};
use crate::suite::{Evidence, RegisterAccess, RegisterFile};

/// A PCI bus on hypervisor `P`.
pub struct OnPci<P>(PhantomData<P>);

impl<P: Port> Port for OnPci<P>
where
    P::Host: Platform,
    P::Guest: Machine,
{
    const NAME: &'static str = P::NAME;
    const ENDS_APART: bool = P::ENDS_APART;
    type Host = pci::Host<P::Host>;
    type Guest = Bus<P::Guest>;

    fn evidence() -> Evidence {
        P::evidence()
    }

    fn available() -> Result<String, String> {
        P::available()
    }

    fn start(ram: usize) -> Result<(Self::Host, Arc<Self::Guest>), HypervisorError> {
        P::start(ram).map(Self::on)
    }

    fn memory_end(ram: usize) -> Option<u64> {
        P::memory_end(ram)
    }
}

impl<P: Port> OnPci<P>
where
    P::Host: Platform,
    P::Guest: Machine,
{
    /// A bus on the halves of a machine.
    pub(super) fn on((host, guest): (P::Host, Arc<P::Guest>)) -> (pci::Host<P::Host>, Arc<Bus<P::Guest>>) {
        (pci::Host::new(host, guest.address_map()), Arc::new(Bus::new(guest)))
    }
}

/// The host half of a bus on port `P` with a flaw.
pub(super) type HostOn<P> = pci::Host<FlawedHost<<P as Port>::Host>>;
/// Its guest half.
pub(super) type GuestOn<P> = Bus<FlawedGuest<<P as Port>::Guest>>;

/// virtio-pci: a modern device, which interrupts by messages.
pub struct Pci;

impl<H: Host<Place = HostPlace>, G: Functions + WaitForInterrupt + 'static> Wire<H, G> for Pci {
    const NAME: &'static str = "pci";
    const LEGACY: bool = false;

    fn attach<B, M>(host: &mut B, memory: M, device: Box<dyn Device<M>>) -> Result<(), HypervisorError>
    where
        B: Host<Place = H::Place>,
        M: GuestMemory + Send + 'static,
    {
        pci::attach(host, memory, device, Generation::Modern)
    }

    fn connect(guest: &Arc<G>, place: GuestPlace) -> Result<Connection, TransportError> {
        observed(guest, place, false)
    }
}

/// virtio-pci: a transitional device through its legacy interface, which interrupts by its pin.
pub struct PciLegacy;

impl<H: Host<Place = HostPlace>, G: Functions + WaitForInterrupt + 'static> Wire<H, G> for PciLegacy {
    const NAME: &'static str = "pci-legacy";
    const LEGACY: bool = true;
    const LINES: usize = 4;

    fn attach<B, M>(host: &mut B, memory: M, device: Box<dyn Device<M>>) -> Result<(), HypervisorError>
    where
        B: Host<Place = H::Place>,
        M: GuestMemory + Send + 'static,
    {
        pci::attach(host, memory, device, Generation::Transitional(ByteOrder::Little))
    }

    fn connect(guest: &Arc<G>, place: GuestPlace) -> Result<Connection, TransportError> {
        observed(guest, place, true)
    }
}

/// Offsets of a [`RegisterFile`] from here on are addresses of memory, wherever that is. Below are those of the function's
/// [`region`]s.
pub(crate) const MEMORY: u64 = 0xf << 60;
/// Offsets from here on are ports.
pub(crate) const PORTS: u64 = 0xe << 60;

fn observed<G: Functions + WaitForInterrupt + 'static>(
    guest: &Arc<G>,
    place: GuestPlace,
    legacy: bool,
) -> Result<Connection, TransportError> {
    let mut bars = Vec::new();
    let mut bar = 0;
    while bar < BAR_COUNT {
        let word = |index: u8| {
            let mut data = [0; 4];
            guest.read_config(place.function, BARS + 4 * u16::from(index), &mut data)?;
            Ok::<_, HypervisorError>(u32::from_le_bytes(data))
        };
        let low = word(bar)?;
        let wide = low & (BAR_IO | BAR_64) == BAR_64;
        let high = if wide { word(bar + 1)? } else { 0 };
        let (space, mask) = if low & BAR_IO != 0 { (Space::Io, !3) } else { (Space::Memory, !0xf) };
        let base = u64::from(high) << 32 | u64::from(low & mask);
        if base != 0 {
            bars.push((bar, space, base));
        }
        bar += 1 + u8::from(wide);
    }
    let observed = Arc::new(Observed { guest: Arc::clone(guest), place, legacy, bars, notes: Notes::default() });
    let driver = RegisterFile::connect(&observed)?;
    Ok((driver, Some(Box::new(observed))))
}

/// A guest whose accesses to a function are written down.
struct Observed<G> {
    guest: Arc<G>,
    place: GuestPlace,
    legacy: bool,
    /// Where its base address registers are.
    bars: Vec<(u8, Space, u64)>,
    notes: Notes,
}

impl<G: Functions> Observed<G> {
    /// The offset of an address, in the form of a [`RegisterFile`].
    fn offset(&self, space: Space, address: u64) -> u64 {
        let below = self.bars.iter().filter(|bar| bar.1 == space && bar.2 <= address);
        match (below.max_by_key(|bar| bar.2), space) {
            (Some((bar, _, base)), _) => region(*bar) + (address - base),
            (None, Space::Memory) => MEMORY + address,
            (None, Space::Io) => PORTS + address,
        }
    }

    /// Does `access` with the bytes of `part`.
    fn perform(&self, access: RegisterAccess, part: &mut [u8]) -> Result<(), HypervisorError> {
        let within = access.offset & !MEMORY;
        let (space, address) = match access.offset & MEMORY {
            0 if access.write => return self.guest.write_config(self.place.function, within as u16, part),
            0 => return self.guest.read_config(self.place.function, within as u16, part),
            MEMORY => (Space::Memory, within),
            PORTS => (Space::Io, within),
            at => match self.bars.iter().find(|(bar, ..)| region(*bar) == at) {
                Some((_, space, base)) => (*space, base + within),
                None => {
                    let reason = format!("there is no base address register for {:#x}", access.offset);
                    return Err(HypervisorError::Refused { call: "access", reason });
                }
            },
        };
        if access.write { self.guest.store(space, address, part) } else { self.guest.load(space, address, part) }
    }
}

impl<G: Functions> Share for Observed<G> {
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

impl<G: Functions> Guest for Observed<G> {
    type Place = GuestPlace;

    fn notify(&self, doorbell: u64, value: u32) -> Result<(), HypervisorError> {
        self.guest.notify(doorbell, value)
    }

    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        self.guest.take(line)
    }

    fn enumerate(&self) -> Result<Vec<GuestPlace>, HypervisorError> {
        self.guest.enumerate()
    }
}

impl<G: Functions + WaitForInterrupt> WaitForInterrupt for Observed<G> {
    fn wait(&self, lines: &[u32], most: Duration) -> Result<bool, HypervisorError> {
        self.guest.wait(lines, most)
    }
}

impl<G: Functions> Functions for Observed<G> {
    fn read_config(&self, _function: u8, offset: u16, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.notes.load(offset.into(), data, |access, part| self.perform(access, part))
    }

    fn write_config(&self, _function: u8, offset: u16, data: &[u8]) -> Result<(), HypervisorError> {
        self.notes.store(offset.into(), data, |access, part| self.perform(access, part))
    }

    fn load(&self, space: Space, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.notes.load(self.offset(space, address), data, |access, part| self.perform(access, part))
    }

    fn store(&self, space: Space, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        self.notes.store(self.offset(space, address), data, |access, part| self.perform(access, part))
    }

    fn message(&self, line: u32) -> Message {
        self.guest.message(line)
    }
}

impl<G: Functions + WaitForInterrupt + 'static> RegisterFile for Arc<Observed<G>> {
    fn load(&self, offset: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.perform(RegisterAccess { offset, len: data.len(), value: 0, write: false }, data)
    }

    fn store(&self, offset: u64, data: &[u8]) -> Result<(), HypervisorError> {
        let access = RegisterAccess { offset, len: data.len(), value: 0, write: true };
        self.perform(access, &mut data.to_vec())
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
        Ok(match self.legacy {
            false => Box::new(pci::Driver::connect(Arc::clone(self), self.place, Signalling::Messages)?),
            true => Box::new(LegacyDriver::connect(Arc::clone(self), self.place, Signalling::Pin)?),
        })
    }
}
