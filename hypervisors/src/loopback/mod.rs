//! No hypervisor at all: guest and host in one process. The smallest port there can be.
//!
//! | mechanism | here |
//! |---|---|
//! | memory | flat: both halves see the same bytes at the same addresses |
//! | kick | a function call |
//! | interrupt | a set and a condition variable |
//! | discovery | a list |
//!
//! The bus carries virtio-mmio: a register access is a function call too. `pci.rs` is what a PCI bus asks for besides.

mod guest;
mod host;
mod pci;

use std::collections::BTreeSet;
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;

use polyvirt_core::hypervisor::{BusDevice, Hypervisor, HypervisorError};
use polyvirt_core::memory::{FlatMemory, Pages};
use polyvirt_transports::mmio::Place;
use polyvirt_transports::pci::Root;

pub use guest::Guest;
pub use host::Host;

use crate::flat_share::FlatShare;

/// Guest-physical address of the RAM.
pub const RAM: u64 = 0x8000_0000;
/// Guest-physical address of the first device, above all RAM.
pub const DEVICES: u64 = 1 << 48;

/// How many interrupt lines there are.
const LINES: u32 = 256;

/// The two halves, as types.
pub struct Loopback;

impl Hypervisor for Loopback {
    type Host = Host;
    type Guest = Guest;
}

/// Always: it needs nothing.
pub fn available() -> Result<String, HypervisorError> {
    Ok("this process".into())
}

/// A machine with `ram` bytes of memory: its two halves.
pub fn start(ram: usize) -> Result<(Host, Guest), HypervisorError> {
    let ram = Pages::allocate(ram);
    let memory = Arc::new(FlatMemory::new([(RAM, ram.clone())]));
    let bus = Arc::<Bus>::default();
    Ok((Host { memory, bus: bus.clone(), lines: 0..LINES }, Guest { share: FlatShare::new(RAM, ram), bus }))
}

/// What the halves have in common.
#[derive(Default)]
struct Bus {
    devices: Mutex<Vec<(Place, SharedDevice)>>,
    pci: OnceLock<Arc<Root>>,
    interrupts: Arc<Interrupts>,
}

type SharedDevice = Arc<Mutex<Box<dyn BusDevice>>>;

/// Interrupts, by line.
#[derive(Default)]
struct Interrupts {
    lines: Mutex<Lines>,
    arrived: Condvar,
}

#[derive(Default)]
struct Lines {
    /// What came and was not taken.
    pending: BTreeSet<u32>,
    /// What pins hold up, one item for each pin that does: as long as one does, it is pending.
    held: Vec<u32>,
    /// Who is woken when one of their lines is pending.
    sleepers: Vec<(Vec<u32>, Waker)>,
}

impl Lines {
    fn is_pending(&self, line: u32) -> bool {
        self.pending.contains(&line) || self.held.contains(&line)
    }

    /// Who is to be woken, behind the lock: it slept for what is pending now.
    #[must_use]
    fn awake(&mut self) -> Vec<Waker> {
        let sleepers = mem::take(&mut self.sleepers);
        let (awake, asleep) =
            sleepers.into_iter().partition::<Vec<_>, _>(|(lines, _)| lines.iter().any(|&line| self.is_pending(line)));
        self.sleepers = asleep;
        awake.into_iter().map(|(_, waker)| waker).collect()
    }
}

impl Interrupts {
    /// Changes the lines, and tells whoever waits for them.
    fn change(&self, change: impl FnOnce(&mut Lines)) {
        let mut lines = lock(&self.lines);
        change(&mut lines);
        let awake = lines.awake();
        drop(lines);
        self.arrived.notify_all();
        awake.into_iter().for_each(Waker::wake);
    }
}

/// Locks even what a panic left behind: a broken device stays a device, and the driver has to notice.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
