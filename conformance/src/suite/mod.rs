//! The suite: what a case is, what it runs on, and what may come of it.
//!
//! A case is written once, against the driver side of a [`Session`]; a [`Target`] is anything that opens sessions: a
//! cell of our own, or later someone else's device. [`run_cell`] runs the cases that apply, each in a session of its
//! own.

mod format;
mod probe;
mod recorded;
mod role;
mod run;
mod session;

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use polyvirt_core::transport::TransportError;

pub use format::{RingFormat, Rings};
pub use probe::{Mark, Probe, Probed};
pub use recorded::{Call, Recorded, Trace};
pub use role::{DriverRole, MakeRole};
pub use run::{CASE_WATCHDOG, CaseResult, CellResult, Failure, Progress, Skipped, run_cell, run_cell_within};
pub use session::{Alarm, FarSide, Peek, RegisterAccess, RegisterFile, Session};

/// The device type of the block device (chapter 5).
pub const BLK: u32 = 2;
/// The device type of the console.
pub const CONSOLE: u32 = 3;
/// The device type of the entropy device.
pub const RNG: u32 = 4;

/// One thing that is checked.
#[derive(Clone, Copy)]
pub struct Case {
    /// Area and name, `area/what-holds`.
    pub name: &'static str,
    /// What is checked, in a sentence.
    pub about: &'static str,
    /// The statements of VIRTIO 1.4 that it judges: ids of `ledger/statements.tsv`.
    pub statements: &'static [&'static str],
    /// Those that it judges with packed rings, if they are others.
    pub packed_statements: Option<&'static [&'static str]>,
    /// The classes of bad input that it covers: 1 to 41, and 101 to 106 for those of a hostile device (D1 to D6).
    pub class: &'static [u8],
    /// Where it makes sense.
    pub applies: Applies,
    /// Which device it needs.
    pub variant: Variant<'static>,
    /// Does it.
    pub run: fn(&mut Session) -> Verdict,
}

impl Case {
    /// A case that judges no statement, covers no class and applies everywhere.
    pub const fn new(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Self {
        let (statements, packed_statements, class) = (&[], None, &[]);
        Self { name, about, statements, packed_statements, class, applies: Applies::ANY, variant: Variant::Plain, run }
    }

    /// The case, judging `statements`.
    #[must_use]
    pub const fn judges(self, statements: &'static [&'static str]) -> Self {
        Self { statements, ..self }
    }

    /// The case, judging `statements` where rings are packed: chapter 2.8 says again what 2.7 says of split ones.
    #[must_use]
    pub const fn packed_judges(self, statements: &'static [&'static str]) -> Self {
        Self { packed_statements: Some(statements), ..self }
    }

    /// What it judges with rings of `format`.
    pub fn statements_with(&self, format: RingFormat) -> &'static [&'static str] {
        self.packed_statements.filter(|_| format == RingFormat::Packed).unwrap_or(self.statements)
    }

    /// All that it judges, with one format of rings or the other.
    pub fn all_statements(&self) -> BTreeSet<&'static str> {
        let formats = RingFormat::of(false).iter().filter(|&&format| self.applies.rings.includes(format));
        formats.flat_map(|&format| self.statements_with(format)).copied().collect()
    }

    /// The case, covering classes of bad input.
    #[must_use]
    pub const fn class(self, class: &'static [u8]) -> Self {
        Self { class, ..self }
    }

    /// The case, only where `applies` says; what was said about rings stays.
    #[must_use]
    pub const fn on(self, applies: Applies) -> Self {
        Self { applies: Applies { rings: self.applies.rings, ..applies }, ..self }
    }

    /// The case, about what only rings of `format` have.
    #[must_use]
    pub const fn only(self, format: RingFormat) -> Self {
        Self { applies: Applies { rings: Rings::Only(format), ..self.applies }, ..self }
    }

    /// The case, which no ring has to do with: once for all formats.
    #[must_use]
    pub const fn once(self) -> Self {
        Self { applies: Applies { rings: Rings::Neither, ..self.applies }, ..self }
    }

    /// The case, with another device than the plain one.
    #[must_use]
    pub const fn with(self, variant: Variant<'static>) -> Self {
        Self { variant, ..self }
    }
}

/// Where a case makes sense; elsewhere it is not even skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applies {
    /// This device type only.
    pub device: Option<u32>,
    /// The legacy interface only, or the modern one only.
    pub legacy: Option<bool>,
    /// This transport only.
    pub transport: Option<&'static str>,
    /// These formats of rings only.
    pub rings: Rings,
}

impl Applies {
    /// Everywhere.
    pub const ANY: Self = Self { device: None, legacy: None, transport: None, rings: Rings::Either };
    /// On the modern interface.
    pub const MODERN: Self = Self { legacy: Some(false), ..Self::ANY };
    /// On the legacy interface.
    pub const LEGACY: Self = Self { legacy: Some(true), ..Self::ANY };
    /// Over MMIO.
    pub const MMIO: Self = Self { transport: Some("mmio"), ..Self::ANY };
    /// Over PCI, through the modern interface.
    pub const PCI: Self = Self { transport: Some("pci"), ..Self::ANY };
    /// Over PCI, through the legacy interface.
    pub const PCI_LEGACY: Self = Self { transport: Some("pci-legacy"), ..Self::LEGACY };
    /// Over MMIO, through the legacy interface.
    pub const MMIO_LEGACY: Self = Self { transport: Some("mmio-legacy"), ..Self::LEGACY };

    /// Against a daemon, over vhost-user.
    pub const VHOST_USER: Self = Self { transport: Some("vhost-user"), ..Self::ANY };

    /// With one device type.
    pub const fn to(device: u32) -> Self {
        Self { device: Some(device), ..Self::ANY }
    }

    /// The same, with one device type only.
    #[must_use]
    pub const fn device(self, device: u32) -> Self {
        Self { device: Some(device), ..self }
    }

    /// Whether `cell` is such a place.
    pub fn includes(&self, cell: &Cell) -> bool {
        self.device.is_none_or(|device| device == cell.device_type)
            && self.legacy.is_none_or(|legacy| legacy == cell.legacy)
            && self.transport.is_none_or(|transport| transport == cell.transport)
            && self.rings.includes(cell.ring)
    }
}

/// What is special about the device of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Variant<'a> {
    /// Nothing.
    #[default]
    Plain,
    /// A block device that cannot be written.
    ReadOnly,
    /// A device that shares its interrupt line with another of its kind, which is the session's neighbour.
    Crowd,
    /// A block device that serves this raw image.
    Image(&'a Path),
    /// A daemon that nobody has connected to: the case speaks the protocol itself.
    Undriven,
}

/// What a case says when it ends: a [`Finding`], or an [`Objection`] as soon as something is not as it should be.
pub type Verdict = Result<Finding, Objection>;

/// A case came to its good end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// What was expected happened.
    Passed,
    /// A malformed input was refused, and the device is alive after a reset.
    Rejected,
}

/// A case stopped before its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Objection {
    /// Something else than expected happened.
    Failed {
        /// What should have happened.
        expected: String,
        /// What did.
        observed: String,
    },
    /// The case cannot be run here, for this reason.
    Skipped(String),
}

impl Objection {
    /// Something else than expected happened.
    pub fn failed(expected: impl fmt::Display, observed: impl fmt::Display) -> Self {
        Self::Failed { expected: expected.to_string(), observed: observed.to_string() }
    }
}

impl From<TransportError> for Objection {
    fn from(error: TransportError) -> Self {
        if let TransportError::Unsupported(_) = error {
            return Self::Skipped(error.to_string());
        }
        Self::failed("the transport does what it is asked", error)
    }
}

impl From<polyvirt_core::hypervisor::HypervisorError> for Objection {
    fn from(error: polyvirt_core::hypervisor::HypervisorError) -> Self {
        Self::from(TransportError::Hypervisor(error))
    }
}

impl From<polyvirt_core::memory::MemoryError> for Objection {
    fn from(error: polyvirt_core::memory::MemoryError) -> Self {
        Self::failed("the driver reaches its own memory", error)
    }
}

impl From<polyvirt_core::queue::QueueError> for Objection {
    fn from(error: polyvirt_core::queue::QueueError) -> Self {
        Self::failed("the driver's queue works", error)
    }
}

/// What came of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// What was expected happened.
    Passed,
    /// Something else happened.
    Failed {
        /// What should have happened.
        expected: String,
        /// What did.
        observed: String,
        /// The steps that lead there, one a line.
        reproduction: String,
    },
    /// A malformed input was refused, and the device is alive after a reset.
    Rejected,
    /// The case did not come back.
    Wedged,
    /// The case was not run.
    Skipped {
        /// Why.
        reason: String,
    },
}

/// What a result is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// A real hypervisor or kernel interface of this host did it.
    Real,
    /// A real hypervisor or guest kernel did it, on an emulated CPU.
    Emulated,
    /// Our own model of what the hypervisor does did it.
    Model,
}

impl Evidence {
    /// What a real interface of this host is worth: its processor may be emulated.
    pub fn of_this_host() -> Self {
        static EMULATED: LazyLock<bool> = LazyLock::new(|| {
            // QEMU's name for the processor that it emulates instruction by instruction.
            std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG CPU"))
        });
        if *EMULATED { Self::Emulated } else { Self::Real }
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Real => "real",
            Self::Emulated => "emulated",
            Self::Model => "model",
        })
    }
}

/// Where cases run: one place of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The hypervisor's name.
    pub hypervisor: &'static str,
    /// The transport's name.
    pub transport: &'static str,
    /// The device's name.
    pub device: &'static str,
    /// The device type (chapter 5).
    pub device_type: u32,
    /// Whether the device is used through the legacy interface.
    pub legacy: bool,
    /// The format of its rings.
    pub ring: RingFormat,
    /// What results are worth.
    pub evidence: Evidence,
}

impl fmt::Display for Cell {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{} × {}, {}", self.hypervisor, self.transport, self.device, self.ring)
    }
}

/// Anything that the suite can be pointed at.
pub trait Target: Send + Sync {
    /// Which place of the matrix it is.
    fn cell(&self) -> Cell;

    /// Whether sessions can be opened on this host; if not, the error is one sentence that says why.
    fn available(&self) -> Result<(), String>;

    /// On which versions of what results were won, if that is not of this host.
    fn versions(&self) -> Vec<String> {
        Vec::new()
    }

    /// How long `case` waits for an event, if that is not to be as long as others do: because it is known to wait for
    /// nothing.
    fn patience(&self, case: &Case) -> Option<Duration> {
        let _ = case;
        None
    }

    /// A fresh machine with a fresh device in it. The error says what could not be had; for a variant that the target
    /// does not have it is [`NO_VARIANT`].
    fn session(&self, variant: Variant<'_>) -> Result<Session, String>;
}

/// What [`Target::session`] says if it does not have a variant: the case is skipped then.
pub const NO_VARIANT: &str = "the target does not have such a device";
