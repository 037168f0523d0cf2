//! Ports that are broken on purpose: an honest one, with something between its mechanisms and who uses them.

use std::collections::BTreeSet;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::thread::Builder;
use std::time::Duration;

use polyvirt_core::hypervisor::{BusDevice, Guest, Host, HypervisorError, Interrupt, Share, WaitForInterrupt};
use polyvirt_core::memory::{Access, GuestMemory, MemoryError, Pages, ResolveError, Segment};
use polyvirt_transports::mmio::Registers;
use polyvirt_transports::pci::{AddressMap, Doorbell, Machine, Message, Platform, Root, SharedDevice, Wires};
use polyvirt_transports::xenbus::{Channel, Domain, Store};

use super::Port;
use crate::suite::Evidence;

/// What a port does otherwise than it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// The guest's kick rings nothing.
    DeafBell,
    /// The guest's kick panics, as one that is not written yet.
    NoBell,
    /// The guest's kick rings with 0, whatever the value is.
    OneBell,
    /// A device that says after a kick that it has more to do is not called again.
    NoSecondCall,
    /// A device that wakes its port is not polled.
    NoPoll,
    /// The last byte of memory is not there.
    ByteShort,
    /// There is a byte behind the end of memory.
    ByteLong,
    /// Interrupts that came before they are waited for are forgotten.
    Forgetful,
    /// Who asserts an interrupt pin that another function asserts already is forgotten as soon as that one lets go.
    LostPin,
    /// The pins of devices behind the first four come in at the next line.
    WrongPin,
    /// Nothing wrong: a kick is heard a moment later, by another thread. Every verdict is the same.
    Late,
}

/// How much later [`Flaw::Late`] hears: longer than a case takes from one step to the next.
const LATE: Duration = Duration::from_millis(1);

/// Port `P`, with a flaw if it is started [with one](Flawed::start_with).
pub struct Flawed<P>(PhantomData<P>);

impl<P: Port> Flawed<P> {
    /// Starts a machine on a port with `flaw`.
    pub fn start_with(flaw: Option<Flaw>, ram: usize) -> Result<Halves<P>, HypervisorError> {
        let (host, guest) = P::start(ram)?;
        let late = (flaw == Some(Flaw::Late)).then(|| deliver_late(&guest)).transpose()?;
        let end = P::memory_end(ram);
        Ok((
            FlawedHost { host, flaw, end, asserted: Arc::default() },
            Arc::new(FlawedGuest { guest, flaw, late, heard: Mutex::default() }),
        ))
    }
}

/// The halves of a flawed port.
type Halves<P> = (FlawedHost<<P as Port>::Host>, Arc<FlawedGuest<<P as Port>::Guest>>);

impl<P: Port> Port for Flawed<P> {
    const NAME: &'static str = P::NAME;
    const ENDS_APART: bool = P::ENDS_APART;
    type Host = FlawedHost<P::Host>;
    type Guest = FlawedGuest<P::Guest>;

    fn evidence() -> Evidence {
        P::evidence()
    }

    fn available() -> Result<String, String> {
        P::available()
    }

    fn start(ram: usize) -> Result<(Self::Host, Arc<Self::Guest>), HypervisorError> {
        Self::start_with(None, ram)
    }

    fn memory_end(ram: usize) -> Option<u64> {
        P::memory_end(ram)
    }
}

/// A host half with a flaw.
pub struct FlawedHost<H> {
    host: H,
    flaw: Option<Flaw>,
    /// Where its memory should end.
    end: Option<u64>,
    /// How many functions assert a pin.
    asserted: Arc<AtomicUsize>,
}

impl<H: Host> Host for FlawedHost<H> {
    type Memory = FlawedMemory<H::Memory>;
    type Place = H::Place;

    fn memory(&self) -> Self::Memory {
        FlawedMemory { memory: self.host.memory(), flaw: self.flaw, end: self.end }
    }

    fn place(&mut self, device_type: u32, queues: u16) -> Result<H::Place, HypervisorError> {
        self.host.place(device_type, queues)
    }

    fn interrupt(&self, place: &H::Place) -> Arc<dyn Interrupt> {
        self.host.interrupt(place)
    }

    fn plug(&mut self, place: H::Place, device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        self.host.plug(place, Box::new(Served { device, flaw: self.flaw }))
    }
}

impl<H: Platform> Platform for FlawedHost<H> {
    type Memory = FlawedMemory<<H as Platform>::Memory>;

    fn forward_to(&mut self, root: Arc<Root>) {
        self.host.forward_to(root);
    }

    fn memory(&self) -> Self::Memory {
        FlawedMemory { memory: self.host.memory(), flaw: self.flaw, end: self.end }
    }

    fn wires(&mut self, function: u8, queues: u16, vectors: u16) -> Result<Arc<dyn Wires>, HypervisorError> {
        let wrong = self.flaw == Some(Flaw::WrongPin) && function >= 5 << 3;
        let wires = self.host.wires(if wrong { function + (1 << 3) } else { function }, queues, vectors)?;
        Ok(match self.flaw {
            Some(Flaw::LostPin) => Arc::new(Pins { wires, asserted: Arc::clone(&self.asserted) }),
            _ => wires,
        })
    }

    fn serve(&mut self, function: u8, device: SharedDevice) -> Result<(), HypervisorError> {
        self.host.serve(function, device)
    }
}

/// Wires of which only the first to assert a pin counts.
struct Pins {
    wires: Arc<dyn Wires>,
    asserted: Arc<AtomicUsize>,
}

impl Wires for Pins {
    fn route(&self, vector: u16, message: Message) {
        self.wires.route(vector, message);
    }

    fn signal(&self, vector: u16) {
        self.wires.signal(vector);
    }

    fn pin(&self, asserted: bool) {
        let before = match asserted {
            true => self.asserted.fetch_add(1, Ordering::SeqCst),
            false => self.asserted.fetch_sub(1, Ordering::SeqCst),
        };
        if !(asserted && before > 0) {
            self.wires.pin(asserted);
        }
    }

    fn ring_at(&self, doorbells: &[Doorbell]) {
        self.wires.ring_at(doorbells);
    }
}

/// A device as a flawed port serves it.
struct Served {
    device: Box<dyn BusDevice>,
    flaw: Option<Flaw>,
}

impl BusDevice for Served {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.device.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.device.write(offset, data);
    }

    fn kick(&mut self, queue: u16) -> bool {
        self.device.kick(queue) && self.flaw != Some(Flaw::NoSecondCall)
    }

    fn poll(&mut self) -> bool {
        self.device.poll()
    }

    fn set_waker(&mut self, waker: Waker) {
        self.device.set_waker(if self.flaw == Some(Flaw::NoPoll) { Waker::noop().clone() } else { waker });
    }
}

/// Guest memory of a flawed port.
#[derive(Clone)]
pub struct FlawedMemory<M> {
    memory: M,
    flaw: Option<Flaw>,
    end: Option<u64>,
}

impl<M: GuestMemory> GuestMemory for FlawedMemory<M> {
    type Lease = M::Lease;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        access: Access,
        mut segments: impl FnMut(Segment<M::Lease>),
    ) -> Result<(), ResolveError> {
        let beyond = self.end.zip(address.checked_add(len)).map(|(end, wanted)| wanted.wrapping_sub(end));
        match (self.flaw, beyond) {
            (Some(Flaw::ByteShort), Some(0)) if len > 0 => Err(MemoryError::NotMapped { address, len }.into()),
            (Some(Flaw::ByteLong), Some(1)) if len > 1 => {
                self.memory.resolve(address, len - 1, access, &mut segments)?;
                self.memory.resolve(address + len - 2, 1, access, segments)
            }
            _ => self.memory.resolve(address, len, access, segments),
        }
    }
}

/// A guest half with a flaw.
pub struct FlawedGuest<G> {
    guest: Arc<G>,
    flaw: Option<Flaw>,
    late: Option<Sender<(u64, u32)>>,
    /// What came while somebody waited, and was not taken.
    heard: Mutex<BTreeSet<u32>>,
}

impl<G> FlawedGuest<G> {
    fn heard(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that rings what it is sent, a moment later, until the guest or the sender is gone.
fn deliver_late<G: Guest + 'static>(guest: &Arc<G>) -> Result<Sender<(u64, u32)>, HypervisorError> {
    let (sender, kicks): (_, Receiver<(u64, u32)>) = channel();
    let guest = Arc::downgrade(guest);
    let ring = move || {
        while let Ok(first) = kicks.recv() {
            std::thread::sleep(LATE);
            for (doorbell, value) in std::iter::once(first).chain(kicks.try_iter()) {
                let Some(guest) = guest.upgrade() else { return };
                // Nobody hears of a refusal any more.
                let _ = guest.notify(doorbell, value);
            }
        }
    };
    let spawned = Builder::new().name("late kicks".into()).spawn(ring);
    spawned.map_err(|error| HypervisorError::Refused { call: "spawn", reason: error.to_string() })?;
    Ok(sender)
}

impl<G: Guest> Share for FlawedGuest<G> {
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

impl<G: Guest> Guest for FlawedGuest<G> {
    type Place = G::Place;

    fn notify(&self, doorbell: u64, value: u32) -> Result<(), HypervisorError> {
        match (self.flaw, &self.late) {
            (Some(Flaw::DeafBell), _) => Ok(()),
            (Some(Flaw::NoBell), _) => unimplemented!("the guest's kick"),
            (Some(Flaw::OneBell), _) => self.guest.notify(doorbell, 0),
            (_, Some(late)) => {
                let gone = |_| HypervisorError::GuestStopped("nobody rings its bells".into());
                late.send((doorbell, value)).map_err(gone)
            }
            _ => self.guest.notify(doorbell, value),
        }
    }

    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        match self.flaw {
            Some(Flaw::Forgetful) => Ok(self.heard().remove(&line)),
            _ => self.guest.take(line),
        }
    }

    fn enumerate(&self) -> Result<Vec<G::Place>, HypervisorError> {
        self.guest.enumerate()
    }
}

impl<G: WaitForInterrupt> WaitForInterrupt for FlawedGuest<G> {
    fn wait(&self, lines: &[u32], most: Duration) -> Result<bool, HypervisorError> {
        if self.flaw != Some(Flaw::Forgetful) {
            return self.guest.wait(lines, most);
        }
        // What came before is lost.
        lines.iter().try_for_each(|&line| self.guest.take(line).map(drop))?;
        self.guest.wait(lines, most)?;
        let mut heard = self.heard();
        for &line in lines {
            if self.guest.take(line)? {
                heard.insert(line);
            }
        }
        Ok(lines.iter().any(|line| heard.contains(line)))
    }
}

impl<G: Registers> Registers for FlawedGuest<G> {
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.guest.load(address, data)
    }

    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        self.guest.store(address, data)
    }
}

impl<G: Machine> Machine for FlawedGuest<G> {
    fn address_map(&self) -> AddressMap {
        self.guest.address_map()
    }

    fn input(&self, port: u16, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.guest.input(port, data)
    }

    fn output(&self, port: u16, data: &[u8]) -> Result<(), HypervisorError> {
        self.guest.output(port, data)
    }

    fn message(&self, line: u32) -> Message {
        self.guest.message(line)
    }
}

impl<G: Domain> Domain for FlawedGuest<G> {
    fn store(&self) -> &dyn Store {
        self.guest.store()
    }

    fn open_channel(&self) -> Result<Channel, HypervisorError> {
        self.guest.open_channel()
    }

    fn close_channel(&self, channel: Channel) -> Result<(), HypervisorError> {
        self.guest.close_channel(channel)
    }

    fn watch(&self, path: &str) -> Result<u32, HypervisorError> {
        self.guest.watch(path)
    }
}
