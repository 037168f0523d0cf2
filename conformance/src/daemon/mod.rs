//! Someone else's device: a daemon behind a socket, which speaks vhost-user.

mod expectations;
pub mod front;
mod process;

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use polyvirt_core::Features;
use polyvirt_core::memory::{Access, FlatMemory, GuestMemory, Pages};
use polyvirt_core::transport::{Transport, TransportError};
use polyvirt_devices::blk;
use polyvirt_hypervisors::FlatShare;
use polyvirt_transports::vhost_user::{Driver, Guest, Options, memory_file};

pub use expectations::{ExpectationError, Expectations};
pub use process::{Process, SOCKET};

use crate::cells::Kind;
use crate::suite::{Case, Cell, Evidence, NO_VARIANT, Objection, RingFormat, Session, Target, Variant};
use front::Undriven;

/// Guest memory of a session, bytes.
pub const RAM: u64 = 8 << 20;
/// Guest-physical address of it.
pub const RAM_AT: u64 = 0x4000_0000;

/// Sectors that the cases for a disk use, at least.
const LEAST_SECTORS: u64 = 2048;
/// How long a case waits for an event that is known not to come.
const KNOWN_PATIENCE: Duration = Duration::from_millis(500);

/// A daemon as the suite sees it. Every session is a connection of its own; what the device keeps, a disk's bytes say,
/// stays from one to the next.
pub struct Daemon {
    socket: PathBuf,
    kind: Kind,
    ring: RingFormat,
    /// Cases that it is known to fail.
    known: BTreeSet<String>,
    /// Its process, if the suite starts it.
    process: Option<Arc<Process>>,
}

/// What a case needs that speaks the protocol itself, and kills the daemon.
#[derive(Clone)]
pub struct DaemonHandle {
    socket: PathBuf,
    process: Option<Arc<Process>>,
    /// The memory of the session: its file, and as it is mapped here. It outlives connections and daemons.
    pub ram: Arc<(OwnedFd, Pages)>,
}

impl DaemonHandle {
    /// A new connection; the daemon is started if it does not run and the suite can.
    pub fn connect(&self) -> io::Result<UnixStream> {
        process::connect(&self.socket, self.process.as_ref())
    }

    /// Kills the daemon; a case is skipped if the suite did not start it.
    pub fn kill(&self) -> Result<(), Objection> {
        let process = self.process.as_ref().ok_or_else(process::not_ours)?;
        process.kill().map_err(|error| Objection::failed("the daemon can be killed", error))
    }

    /// Skips a case that has to kill the daemon if the suite did not start it.
    pub fn can_be_killed(&self) -> Result<(), Objection> {
        self.process.as_ref().map(drop).ok_or_else(process::not_ours)
    }
}

impl Daemon {
    /// The daemon that listens at `socket` and is a device of `kind`, driven with rings of `ring`.
    pub const fn new(socket: PathBuf, kind: Kind, ring: RingFormat) -> Self {
        Self { socket, kind, ring, known: BTreeSet::new(), process: None }
    }

    /// The suite starts it, as `process` says, and may kill it.
    #[must_use]
    pub fn started_by(self, process: Option<Arc<Process>>) -> Self {
        Self { process, ..self }
    }

    /// It is known to fail these cases: most of them would wait for something that does not come.
    #[must_use]
    pub fn known_to_fail<'a>(mut self, cases: impl IntoIterator<Item = &'a String>) -> Self {
        self.known.extend(cases.into_iter().cloned());
        self
    }

    /// The formats of rings that the daemon offers.
    pub fn formats(socket: PathBuf, kind: Kind, process: Option<Arc<Process>>) -> Result<Vec<RingFormat>, String> {
        // If there is no socket now, that is a mistake.
        let missing = process.is_none() && !socket.exists();
        let first = match missing {
            true => Err(ErrorKind::NotFound.into()),
            false => process::connect(&socket, process.as_ref()),
        };
        let first = first.map_err(|error| format!("{}: {error}", socket.display()))?;
        let daemon = Self::new(socket, kind, RingFormat::Split).started_by(process);
        // One connection, not two: some daemons listen anew for each, and one that comes too early is lost.
        let mut driver =
            daemon.connect(Some(first)).map_err(|error| format!("{}: {error}", daemon.socket.display()))?.0;
        let offered = driver.device_features().map_err(|error| error.to_string())?;
        if !offered.contains(Features::VERSION_1) {
            return Err(format!("{}: VIRTIO_F_VERSION_1 is not offered", daemon.socket.display()));
        }
        if kind == Kind::Blk {
            let mut capacity = [0; 8];
            let sectors = driver.read_config(0, &mut capacity).map_or(LEAST_SECTORS, |()| u64::from_le_bytes(capacity));
            if offered.contains(blk::wire::RO) || sectors < LEAST_SECTORS {
                let socket = daemon.socket.display();
                return Err(format!(
                    "{socket}: the cases write to the disk, and need {LEAST_SECTORS} sectors of 512 bytes: {}",
                    if offered.contains(blk::wire::RO) {
                        "it is read-only".into()
                    } else {
                        format!("it has {sectors}")
                    }
                ));
            }
        }
        Ok(RingFormat::of(false).iter().copied().filter(|format| offered.contains(format.feature())).collect())
    }

    /// A driver for the daemon, with `first` as its first connection if there is one already.
    fn connect(&self, first: Option<UnixStream>) -> Result<(Driver, Arc<FlatMemory>), TransportError> {
        let (file, pages) = memory_file("polyvirt", RAM).map_err(|error| {
            polyvirt_core::hypervisor::HypervisorError::Refused { call: "memory", reason: error.to_string() }
        })?;
        let memory = Arc::new(FlatMemory::new([(RAM_AT, pages.clone())]));
        let share = Arc::new(FlatShare::new(RAM_AT, pages.clone()));
        let guest = Guest { share, regions: vec![(RAM_AT, file, pages)] };
        let (socket, process) = (self.socket.clone(), self.process.clone());
        let options = Options { queues: if self.kind == Kind::Console { 2 } else { 1 }, ..Options::default() };
        let first = std::cell::Cell::new(first);
        let dial = Box::new(move || first.take().map_or_else(|| process::connect(&socket, process.as_ref()), Ok));
        Ok((Driver::connect(dial, self.kind.device_type(), guest, options)?, memory))
    }
}

impl Daemon {
    /// A session in which nobody has connected yet.
    fn undriven(&self) -> Result<Session, String> {
        let (file, pages) = memory_file("polyvirt", RAM).map_err(|error| error.to_string())?;
        let share = Arc::new(FlatShare::new(RAM_AT, pages.clone()));
        let transport = Undriven { device_type: self.kind.device_type(), share };
        let mut session = Session::new(self.cell(), Box::new(transport), Box::new(()));
        let (socket, process) = (self.socket.clone(), self.process.clone());
        session.daemon = Some(DaemonHandle { socket, process, ram: Arc::new((file, pages)) });
        Ok(session)
    }
}

impl Target for Daemon {
    fn cell(&self) -> Cell {
        Cell {
            hypervisor: "daemon",
            transport: "vhost-user",
            device: self.kind.name(),
            device_type: self.kind.device_type(),
            legacy: false,
            ring: self.ring,
            evidence: Evidence::Real,
        }
    }

    fn available(&self) -> Result<(), String> {
        Ok(())
    }

    fn patience(&self, case: &Case) -> Option<Duration> {
        self.known.contains(case.name).then_some(KNOWN_PATIENCE)
    }

    fn session(&self, variant: Variant<'_>) -> Result<Session, String> {
        if variant == Variant::Undriven {
            return self.undriven();
        }
        if variant != Variant::Plain {
            return Err(NO_VARIANT.into());
        }
        let (driver, memory) = self.connect(None).map_err(|error| error.to_string())?;
        let mut session = Session::new(self.cell(), Box::new(driver), Box::new(()));
        session.memory_end = Some(RAM_AT + RAM);
        session.peek = Some(Box::new(move |address, bytes| {
            let mut at = 0;
            let resolved = memory.resolve(address, bytes.len() as u64, Access::READ, |segment| {
                let end = at + segment.len();
                let read = bytes.get_mut(at..end).map(|part| segment.read(0, part));
                at = if matches!(read, Some(Ok(()))) { end } else { usize::MAX };
            });
            resolved.is_ok() && at == bytes.len()
        }));
        Ok(session)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    #[test]
    fn the_first_connection_is_the_one_that_is_spoken_on() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        // It serves one connection and listens anew, as daemons on vhost-user-backend do.
        let daemon = thread::spawn(move || {
            let mut connection = listener.accept().unwrap().0;
            drop(listener);
            let mut header = [0; 12];
            connection.read_exact(&mut header).map(|()| header[0])
        });
        assert!(Daemon::formats(socket, Kind::Rng, None).is_err(), "it does not answer");
        const SET_OWNER: u8 = 3;
        assert_eq!(daemon.join().unwrap().unwrap(), SET_OWNER);
    }
}
