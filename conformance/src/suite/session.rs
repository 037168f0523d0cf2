//! A fresh machine with a fresh device, in a case's hands.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::transport::{BlockingTransport, TransportError};

use super::role::{MakeRole, honest};
use super::{Cell, Objection, Probe, Recorded, Trace};
use crate::daemon::DaemonHandle;

/// How long a case waits for an event if nobody says otherwise.
const EVENT_WATCHDOG: Duration = Duration::from_secs(5);

/// Reads guest memory as the device sees it.
pub type Peek = Box<dyn Fn(u64, &mut [u8]) -> bool + Send>;

/// One machine, one device, the driver side of its transport.
pub struct Session {
    /// Where this is.
    pub cell: Cell,
    /// The driver side of the transport.
    pub transport: Recorded,
    /// What was done so far: a failure's reproduction.
    pub trace: Trace,
    /// The device's accesses to guest memory; for devices in this process only.
    pub probe: Option<Probe>,
    /// What stands behind the device.
    pub far_side: Box<dyn FarSide>,
    /// The device's registers, on transports that have them.
    pub registers: Option<Box<dyn RegisterFile>>,
    /// Where flat guest memory ends, if that is what the hypervisor gives to devices.
    pub memory_end: Option<u64>,
    /// The driver's queues that cases look at.
    pub driver_role: MakeRole,
    /// How long a case waits for an event. Far more than any takes: it only bounds a hang.
    pub watchdog: Duration,
    /// Reads what the device would read at an address; false where it may not.
    pub peek: Option<Peek>,
    /// The daemon that the device is; for targets that are daemons, and cases that speak to them themselves.
    pub daemon: Option<DaemonHandle>,
    /// Panics of the device.
    pub alarm: Alarm,
    /// Another device of the same machine, on the same interrupt line.
    pub neighbour: Option<Box<Self>>,
    /// Dropped last: the machine.
    _machine: Box<dyn Any + Send>,
}

impl Session {
    /// A session over `transport`, with nothing else known; `machine` is kept until it ends. Drivers get rings of the
    /// cell's format.
    pub fn new(cell: Cell, transport: Box<dyn BlockingTransport>, machine: Box<dyn Any + Send>) -> Self {
        let trace = Trace::default();
        Self {
            cell,
            transport: Recorded::new(transport, trace.clone()).hiding(cell.ring.hidden()),
            trace,
            probe: None,
            far_side: Box::new(()),
            registers: None,
            memory_end: None,
            driver_role: honest,
            watchdog: EVENT_WATCHDOG,
            peek: None,
            daemon: None,
            alarm: Alarm::default(),
            neighbour: None,
            _machine: machine,
        }
    }

    /// Puts a driver in the way that is broken on purpose: `wrap` gets what it should have used.
    pub(crate) fn break_driver(&mut self, wrap: impl FnOnce(Box<dyn BlockingTransport>) -> Box<dyn BlockingTransport>) {
        let honest = Box::new(self.transport.clone());
        self.transport = Recorded::new(wrap(honest), Trace::default());
    }

    /// The probe; a case that needs it is skipped where there is none.
    pub fn probe(&self) -> Result<Probe, Objection> {
        self.probe.clone().ok_or_else(|| Objection::Skipped("the device's memory accesses cannot be observed".into()))
    }

    /// The daemon; a case that needs one is skipped where there is none.
    pub fn daemon(&self) -> Result<DaemonHandle, Objection> {
        self.daemon.clone().ok_or_else(|| Objection::Skipped("the device is no daemon".into()))
    }

    /// The registers; a case that needs them is skipped where there are none.
    pub fn registers(&self) -> Result<&dyn RegisterFile, Objection> {
        self.registers
            .as_deref()
            .ok_or_else(|| Objection::Skipped("the registers cannot be accessed one by one".into()))
    }
}

/// The registers of a device, access by access.
pub trait RegisterFile: Send {
    /// Reads `data.len()` (1, 2, 4 or 8) bytes at `offset`, in one access.
    fn load(&self, offset: u64, data: &mut [u8]) -> Result<(), HypervisorError>;

    /// Writes `data` (1, 2, 4 or 8 bytes) to `offset`, in one access.
    fn store(&self, offset: u64, data: &[u8]) -> Result<(), HypervisorError>;

    /// What the driver side of the transport did, and not [`RegisterFile::load`] and [`RegisterFile::store`].
    fn log(&self) -> Vec<RegisterAccess>;

    /// From now on the driver side of the transport reads `value` at `offset`; without a value it reads the truth.
    fn lie(&self, offset: u64, value: Option<u32>);

    /// From now on each access of the driver side turns into others: for drivers that are broken on purpose.
    fn tamper(&self, change: fn(RegisterAccess) -> Vec<RegisterAccess>);

    /// Meets the device once more, as a driver does that has just found it.
    fn connect(&self) -> Result<Box<dyn BlockingTransport>, TransportError>;
}

/// An access to a register by the driver side of a transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterAccess {
    /// From the start of the device's registers.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
    /// What was read or written.
    pub value: u64,
    /// Whether it was a write.
    pub write: bool,
}

/// What stands behind a device, as far as a case can move it or look at it. Whatever an implementation does not offer
/// makes the case that asks for it skipped.
pub trait FarSide: Send {
    /// (Block) the backend fails the next request.
    fn fail_next_io(&mut self) -> Result<(), Objection> {
        missing("fail the next request")
    }

    /// (Block) the disk has `sectors` sectors of 512 bytes from now on.
    fn set_capacity(&mut self, sectors: u64) -> Result<(), Objection> {
        let _ = sectors;
        missing("change the disk's size")
    }

    /// (Block) how often the backend was told to make data durable.
    fn flushes(&mut self) -> Result<u64, Objection> {
        missing("count flushes")
    }

    /// (Block) from now on the backend does nothing, if `hangs`; else all that it was asked for meanwhile.
    fn hang_io(&mut self, hangs: bool) -> Result<(), Objection> {
        let _ = hangs;
        missing("make the backend hang")
    }

    /// (Block) how many requests the backend has not done.
    fn held_io(&mut self) -> Result<usize, Objection> {
        missing("count what the backend has")
    }

    /// (Block) what the disk holds from byte `offset` on.
    fn read_disk(&mut self, offset: u64, data: &mut [u8]) -> Result<(), Objection> {
        let _ = (offset, data);
        missing("read the disk")
    }

    /// (Console) someone types `bytes`.
    fn input(&mut self, bytes: &[u8]) -> Result<(), Objection> {
        let _ = bytes;
        missing("type")
    }

    /// (Console) what was printed since the last call.
    fn output(&mut self) -> Result<Vec<u8>, Objection> {
        missing("see what was printed")
    }

    /// (Console) the window has another size.
    fn resize(&mut self, columns: u16, rows: u16) -> Result<(), Objection> {
        let _ = (columns, rows);
        missing("change the window's size")
    }
}

/// Nothing behind the device can be moved or looked at.
impl FarSide for () {}

fn missing<T>(what: &str) -> Result<T, Objection> {
    Err(Objection::Skipped(format!("the far side cannot {what}")))
}

/// Where panics of a device arrive, whichever thread they are on.
#[derive(Clone, Default)]
pub struct Alarm(Arc<Mutex<Option<String>>>);

impl Alarm {
    /// The device panicked with `payload`. The first panic stays.
    pub fn ring(&self, payload: &(dyn Any + Send)) {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert_with(|| panic_text(payload));
    }

    /// What the device panicked with, if it did.
    pub fn rang(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What a panic said.
pub(super) fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without words".into())
}
