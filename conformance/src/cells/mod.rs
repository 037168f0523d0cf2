//! The cells of our own: hypervisor × transport × device × ring format.
//!
//! A port is registered in [`cells`] by one line. What is generic over ports, transports and devices is here; what is
//! particular is one `impl` of [`Port`] or [`Wire`] each.

mod devices;
mod flawed;
mod guard;
mod notes;
mod pci;
mod ports;
mod wires;

use std::any::Any;
use std::marker::PhantomData;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, LazyLock};
use std::thread::Builder;
use std::time::Duration;

use polyvirt_core::device::Device;
use polyvirt_core::hypervisor::{BusDevice, Guest, Host, HypervisorError, Interrupt, WaitForInterrupt};
use polyvirt_core::memory::{Access, GuestMemory};
use polyvirt_core::transport::{BlockingTransport, TransportError};
use polyvirt_transports::pci::{Machine, Platform};

pub use devices::Kind;
pub use flawed::{Flaw, Flawed, FlawedGuest, FlawedHost, FlawedMemory};
use guard::Guarded;
pub(crate) use pci::{MEMORY, PORTS};
pub use pci::{OnPci, Pci, PciLegacy};
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub use ports::XenHvm;
pub use ports::{Kvm, Lguest, Loopback, Xen};
pub use wires::{LguestPage, Mmio, MmioLegacy, Xenbus};

use crate::suite::{
    Alarm, Cell, Evidence, FarSide, MakeRole, NO_VARIANT, Probe, Probed, RegisterAccess, RegisterFile, RingFormat,
    Session, Target, Variant,
};

/// Guest memory of a session, bytes.
const RAM: usize = 8 << 20;
/// How long a case waits for what a saboteur may never do.
const SABOTEUR_WATCHDOG: Duration = Duration::from_secs(1);

/// How long any case waits for an event where an emulated processor does everything.
const EMULATED_WATCHDOG: Duration = Duration::from_secs(60);

/// The cells of the default matrix, in its order.
pub fn cells() -> Vec<Arc<dyn Target>> {
    [
        targets::<Kvm, Mmio>(),
        targets::<Kvm, MmioLegacy>(),
        targets::<OnPci<Kvm>, Pci>(),
        targets::<OnPci<Kvm>, PciLegacy>(),
        targets::<Xen, Xenbus>(),
        targets::<Lguest, LguestPage>(),
    ]
    .concat()
}

/// Cells that run when they are asked for by name: models that only stand in for a hypervisor.
pub fn models() -> Vec<Arc<dyn Target>> {
    [
        targets::<Loopback, Mmio>(),
        targets::<Loopback, MmioLegacy>(),
        targets::<OnPci<Loopback>, Pci>(),
        targets::<OnPci<Loopback>, PciLegacy>(),
        #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
        targets::<XenHvm, Pci>(),
    ]
    .concat()
}

/// All devices of one port over one transport, with each format of rings.
fn targets<P, W>() -> Vec<Arc<dyn Target>>
where
    P: Port,
    W: Wire<P::Host, P::Guest>,
{
    let formats = RingFormat::of(W::LEGACY).iter();
    let all =
        formats.flat_map(|&ring| Kind::ALL.map(|kind| Arc::new(Local::<P, W>::new(kind, ring)) as Arc<dyn Target>));
    all.collect()
}

/// A hypervisor, as a cell starts it.
pub trait Port: 'static {
    /// Its name.
    const NAME: &'static str;
    /// Its host half.
    type Host: Host + Send + 'static;
    /// Its guest half.
    type Guest: WaitForInterrupt + 'static;

    /// Whether a guest whose host half is gone may be ended while the next machine starts already: it takes long, and
    /// nothing of it is anybody else's.
    const ENDS_APART: bool = false;

    /// What its results are worth.
    fn evidence() -> Evidence;

    /// What it runs on, on this host; if it does not run, one sentence that says why.
    fn available() -> Result<String, String>;

    /// Starts a machine with `ram` bytes of memory.
    fn start(ram: usize) -> Result<(Self::Host, Arc<Self::Guest>), HypervisorError>;

    /// Where the memory of such a machine ends for devices; none where it is not flat. The layout says so: what is to be
    /// judged is not asked.
    fn memory_end(ram: usize) -> Option<u64>;
}

/// A transport between the halves of a hypervisor.
pub trait Wire<H: Host, G: Guest>: 'static {
    /// Its name.
    const NAME: &'static str;
    /// Whether it carries the legacy interface.
    const LEGACY: bool;
    /// Every how-many-th device has the interrupt line of the first; 0 if none does.
    const LINES: usize = 0;

    /// Puts `device` onto the bus of `host`.
    fn attach<B, M>(host: &mut B, memory: M, device: Box<dyn Device<M>>) -> Result<(), HypervisorError>
    where
        B: Host<Place = H::Place>,
        M: GuestMemory + Send + 'static;

    /// Meets the device from the guest; the second part are its registers, if it has any.
    fn connect(guest: &Arc<G>, place: G::Place) -> Result<Connection, TransportError>;
}

/// The driver side of a transport, and the device's registers if it has any.
pub type Connection = (Box<dyn BlockingTransport>, Option<Box<dyn RegisterFile>>);

/// What a saboteur puts in front of an honest device, to prove that the suite sees it.
pub trait Sabotage<M: GuestMemory>: Send + Sync {
    /// In place of the device.
    fn device(&self, honest: Box<dyn Device<M>>) -> Box<dyn Device<M>> {
        honest
    }

    /// In place of the device behind its transport; `memory` is what it sees.
    fn bus_device(&self, honest: Box<dyn BusDevice>, memory: M) -> Box<dyn BusDevice> {
        let _ = memory;
        honest
    }

    /// In place of its interrupts.
    fn interrupt(&self, honest: Arc<dyn Interrupt>) -> Arc<dyn Interrupt> {
        honest
    }

    /// In place of the driver's transport.
    fn driver(&self, honest: Box<dyn BlockingTransport>) -> Box<dyn BlockingTransport> {
        honest
    }

    /// In place of the driver's queues.
    fn driver_role(&self) -> Option<MakeRole> {
        None
    }

    /// What becomes of the driver's accesses to registers.
    fn register_access(&self) -> Option<fn(RegisterAccess) -> Vec<RegisterAccess>> {
        None
    }

    /// In place of what stands behind it.
    fn far_side(&self, honest: Box<dyn FarSide>) -> Box<dyn FarSide> {
        honest
    }
}

/// Guest memory of `P` as a probed device sees it.
pub type MemoryOf<P> = Probed<<<P as Port>::Host as Host>::Memory>;

/// One hypervisor × transport × device × ring format, all in this process.
pub struct Local<P: Port, W> {
    kind: Kind,
    ring: RingFormat,
    saboteur: Option<Arc<dyn Sabotage<MemoryOf<P>>>>,
    start: Box<Start<P>>,
    /// How long cases wait, if that is not for the port to say.
    watchdog: Option<Duration>,
    wire: PhantomData<fn() -> W>,
}

/// Starts a machine with so many bytes of memory.
type Start<P> = dyn Fn(usize) -> Result<(<P as Port>::Host, Arc<<P as Port>::Guest>), HypervisorError> + Send + Sync;

impl<P: Port, W: Wire<P::Host, P::Guest>> Local<P, W> {
    /// With an honest device.
    pub fn new(kind: Kind, ring: RingFormat) -> Self {
        Self { kind, ring, saboteur: None, start: Box::new(P::start), watchdog: None, wire: PhantomData }
    }

    /// With a device that `saboteur` breaks.
    pub fn sabotaged(kind: Kind, ring: RingFormat, saboteur: Arc<dyn Sabotage<MemoryOf<P>>>) -> Self {
        // Most of what is broken shows by something that does not come.
        Self { saboteur: Some(saboteur), watchdog: Some(SABOTEUR_WATCHDOG), ..Self::new(kind, ring) }
    }

    fn open(&self, variant: Variant<'_>) -> Result<Session, String> {
        let (mut host, guest) = (self.start)(RAM).map_err(|error| error.to_string())?;
        let memory = host.memory();
        let seen = memory.clone();
        let (probe, alarm) = (Probe::default(), Alarm::default());
        let far_side = match variant {
            // Carrying an image is about bytes, not about accesses: with no probe in the way.
            Variant::Image(_) => {
                let (device, far_side) = self.kind.device(variant)?;
                let mut bus = Guarded { host: &mut host, alarm: alarm.clone(), saboteur: None, memory: memory.clone() };
                W::attach(&mut bus, memory, device).map_err(|error| error.to_string())?;
                far_side
            }
            Variant::Crowd if W::LINES == 0 => return Err(NO_VARIANT.into()),
            Variant::Plain | Variant::ReadOnly | Variant::Undriven | Variant::Crowd => {
                let memory = probe.watch(memory);
                let (mut device, mut far_side) = self.kind.device(variant)?;
                let saboteur = self.saboteur.as_deref();
                if let Some(saboteur) = saboteur {
                    (device, far_side) = (saboteur.device(device), saboteur.far_side(far_side));
                }
                let mut bus = Guarded { host: &mut host, alarm: alarm.clone(), saboteur, memory: memory.clone() };
                W::attach(&mut bus, memory, device).map_err(|error| error.to_string())?;
                far_side
            }
        };
        let mut neighbours = Vec::new();
        for _ in 0..if variant == Variant::Crowd { W::LINES } else { 0 } {
            let memory = host.memory();
            let (device, far_side) = self.kind.device(variant)?;
            let mut bus = Guarded { host: &mut host, alarm: alarm.clone(), saboteur: None, memory: memory.clone() };
            W::attach(&mut bus, memory, device).map_err(|error| error.to_string())?;
            neighbours.push(far_side);
        }
        let mut places = guest.enumerate().map_err(|error| error.to_string())?.into_iter();
        let place = places.next().ok_or("the guest finds no device")?;
        let neighbour = match neighbours.pop() {
            Some(far_side) => {
                let place = places.nth(neighbours.len()).ok_or("the guest does not find the neighbour")?;
                let (transport, registers) = W::connect(&guest, place).map_err(|error| error.to_string())?;
                let mut neighbour = Session::new(self.cell(), transport, Box::new(()));
                (neighbour.far_side, neighbour.registers) = (far_side, registers);
                Some(Box::new(neighbour))
            }
            None => None,
        };
        let (transport, registers) = W::connect(&guest, place).map_err(|error| error.to_string())?;
        let machine: Box<dyn Any + Send> = match P::ENDS_APART {
            true => Box::new((host, Apart(Some(guest)))),
            false => Box::new((guest, host)),
        };
        let mut session = Session::new(self.cell(), transport, machine);
        if session.cell.evidence == Evidence::Emulated {
            session.watchdog = EMULATED_WATCHDOG;
        }
        session.watchdog = self.watchdog.unwrap_or(session.watchdog);
        session.probe = (!matches!(variant, Variant::Image(_))).then_some(probe);
        (session.far_side, session.registers) = (far_side, registers);
        (session.memory_end, session.alarm) = (P::memory_end(RAM), alarm);
        session.neighbour = neighbour.map(|mut neighbour| {
            neighbour.watchdog = session.watchdog;
            neighbour
        });
        session.peek = Some(Box::new(move |address, bytes| peek(&seen, address, bytes)));
        if let Some(saboteur) = &self.saboteur {
            session.break_driver(|honest| saboteur.driver(honest));
            session.driver_role = saboteur.driver_role().unwrap_or(session.driver_role);
            if let (Some(registers), Some(change)) = (&session.registers, saboteur.register_access()) {
                registers.tamper(change);
            }
        }
        Ok(session)
    }
}

impl<P: Port, W: Wire<FlawedHost<P::Host>, FlawedGuest<P::Guest>>> Local<Flawed<P>, W> {
    /// With an honest device, on a port that has `flaw`.
    pub fn flawed(kind: Kind, ring: RingFormat, flaw: Flaw) -> Self {
        let start = Box::new(move |ram| Flawed::<P>::start_with(Some(flaw), ram));
        // As for saboteurs; but what is late and no worse is waited for.
        let watchdog = (flaw != Flaw::Late).then_some(SABOTEUR_WATCHDOG);
        Self { start, watchdog, ..Self::new(kind, ring) }
    }
}

impl<P: Port, W> Local<OnPci<Flawed<P>>, W>
where
    P::Host: Platform,
    P::Guest: Machine,
    W: Wire<pci::HostOn<P>, pci::GuestOn<P>>,
{
    /// With an honest device on a PCI bus, on a port that has `flaw`.
    pub fn flawed_pci(kind: Kind, ring: RingFormat, flaw: Flaw) -> Self {
        let start = Box::new(move |ram| Flawed::<P>::start_with(Some(flaw), ram).map(OnPci::<Flawed<P>>::on));
        Self { start, watchdog: Some(SABOTEUR_WATCHDOG), ..Self::new(kind, ring) }
    }
}

impl<P: Port, W: Wire<P::Host, P::Guest>> Target for Local<P, W> {
    fn cell(&self) -> Cell {
        Cell {
            hypervisor: P::NAME,
            transport: W::NAME,
            device: self.kind.name(),
            device_type: self.kind.device_type(),
            legacy: W::LEGACY,
            ring: self.ring,
            evidence: P::evidence(),
        }
    }

    fn available(&self) -> Result<(), String> {
        P::available().map(drop)
    }

    fn versions(&self) -> Vec<String> {
        match P::evidence() {
            Evidence::Emulated => P::available().into_iter().chain(kernel()).collect(),
            Evidence::Real | Evidence::Model => Vec::new(),
        }
    }

    fn session(&self, variant: Variant<'_>) -> Result<Session, String> {
        self.open(variant)
    }
}

/// The kernel that this is a process of.
fn kernel() -> Option<String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    Some(format!("Linux {}", release.trim()))
}

/// A guest that is ended apart.
struct Apart<G: Send + Sync + 'static>(Option<Arc<G>>);

impl<G: Send + Sync + 'static> Drop for Apart<G> {
    fn drop(&mut self) {
        /// So many may wait for their end.
        const WAITING: usize = 4;
        static ENDS: LazyLock<Option<SyncSender<Box<dyn Any + Send>>>> = LazyLock::new(|| {
            let (sender, guests) = sync_channel(WAITING);
            let end = move || guests.into_iter().for_each(drop);
            Builder::new().name("ends of machines".into()).spawn(end).is_ok().then_some(sender)
        });
        let guest = Box::new(self.0.take());
        // Where there is no such thread it ends here and now.
        let _ = ENDS.as_ref().map(|ends| ends.send(guest));
    }
}

/// Reads guest memory in the device's place.
fn peek(memory: &impl GuestMemory, address: u64, bytes: &mut [u8]) -> bool {
    let mut at = 0;
    let resolved = memory.resolve(address, bytes.len() as u64, Access::READ, |segment| {
        let end = at + segment.len();
        let read = bytes.get_mut(at..end).map(|part| segment.read(0, part));
        at = if matches!(read, Some(Ok(()))) { end } else { usize::MAX };
    });
    resolved.is_ok() && at == bytes.len()
}
