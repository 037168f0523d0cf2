//! The root of the bus: answers what the guest does to configuration ports, configuration memory, and the addresses where
//! functions are.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::configuration::{Configuration, Decoded, Identity};
use super::host::{Doorbell, SharedDevice, Wires};
use super::registers::*;

/// Answers for all functions of bus 0. Any access, of any width, at any address of the [`AddressMap`] is answered; where
/// there is nothing, reads are all ones.
pub struct Root {
    map: AddressMap,
    /// The register [`CONFIG_ADDRESS`].
    config_address: AtomicU32,
    bridge: Mutex<Configuration>,
    functions: RwLock<Vec<(u8, SharedDevice)>>,
    decoded: RwLock<Vec<(u8, Decoded)>>,
}

/// The host bridge, function 0: a name that operating systems have no quirks for.
const BRIDGE: Identity = Identity { vendor: 0x8086, device: 0x0d57, revision: 0, class: 0x06_0000, subsystem: (0, 0) };

/// What an access does.
enum Access<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl Root {
    /// An empty bus, which answers at `map`.
    pub fn new(map: AddressMap) -> Self {
        Self {
            map,
            config_address: AtomicU32::new(0),
            bridge: Mutex::new(Configuration::new(&BRIDGE)),
            functions: RwLock::default(),
            decoded: RwLock::default(),
        }
    }

    /// Where it answers, besides the configuration ports.
    pub const fn map(&self) -> &AddressMap {
        &self.map
    }

    /// The guest reads. False if the address is none of the bus; `data` is untouched then.
    pub fn read(&self, space: Space, address: u64, data: &mut [u8]) -> bool {
        self.access(space, address, Access::Read(data))
    }

    /// The guest writes. False if the address is none of the bus.
    pub fn write(&self, space: Space, address: u64, data: &[u8]) -> bool {
        self.access(space, address, Access::Write(data))
    }

    /// Reads configuration space of `function`, for hypervisors that decode such accesses themselves.
    pub fn read_config(&self, function: u8, offset: u64, data: &mut [u8]) {
        self.configure(function, offset, Access::Read(data));
    }

    /// Writes configuration space of `function`, as [`Root::read_config`] reads it.
    pub fn write_config(&self, function: u8, offset: u64, data: &[u8]) {
        self.configure(function, offset, Access::Write(data));
    }

    fn access(&self, space: Space, address: u64, access: Access<'_>) -> bool {
        match space {
            Space::Io if (CONFIG_ADDRESS..CONFIG_DATA + 4).contains(&address) => self.ports(address, access),
            Space::Io if self.map.io.contains(&address) => self.decode(space, address, access),
            Space::Io => return false,
            Space::Memory => {
                let config = self.map.ecam.and_then(|start| address.checked_sub(start)).filter(|at| *at < ECAM_LEN);
                if let Some(at) = config {
                    self.configure((at / ECAM_STRIDE) as u8, at % ECAM_STRIDE, access);
                } else if self.map.memory.contains(&address) || self.map.memory64.contains(&address) {
                    self.decode(space, address, access);
                } else {
                    return false;
                }
            }
        }
        true
    }

    /// The ports of type-1 configuration access: the address counts only as a whole, the data in any part.
    fn ports(&self, port: u64, access: Access<'_>) {
        let selected = self.config_address.load(Ordering::Relaxed);
        match (port, access) {
            (CONFIG_ADDRESS, Access::Read(data)) if data.len() == 4 => data.copy_from_slice(&selected.to_le_bytes()),
            (CONFIG_ADDRESS, Access::Write(data)) if data.len() == 4 => {
                let bytes = data.try_into().unwrap_or_default();
                self.config_address.store(u32::from_le_bytes(bytes), Ordering::Relaxed);
            }
            // Enabled, and bus 0.
            (CONFIG_DATA.., access) if selected >> 16 & 0x80ff == 0x8000 => {
                let lane = port - CONFIG_DATA;
                let (function, offset) = ((selected >> 8) as u8, u64::from(selected & 0xfc) + lane);
                let here = (4 - lane) as usize;
                match access {
                    Access::Read(data) => {
                        let (here, beyond) = data.split_at_mut(here.min(data.len()));
                        beyond.fill(0xff);
                        self.configure(function, offset, Access::Read(here));
                    }
                    Access::Write(data) => {
                        self.configure(function, offset, Access::Write(&data[..here.min(data.len())]));
                    }
                }
            }
            (_, access) => nothing(access),
        }
    }

    fn configure(&self, function: u8, offset: u64, access: Access<'_>) {
        if function == 0 {
            let mut bridge = self.bridge.lock().unwrap_or_else(PoisonError::into_inner);
            return match access {
                Access::Read(data) => bridge.read(offset, data),
                Access::Write(data) => bridge.write(offset, data),
            };
        }
        self.forward(function, offset.min(ECAM_STRIDE), access);
    }

    /// An access to wherever software has placed functions: the first that answers there does.
    fn decode(&self, space: Space, address: u64, access: Access<'_>) {
        let decoded = self.decoded.read().unwrap_or_else(PoisonError::into_inner);
        let found = decoded.iter().find(|(_, d)| d.space == space && address.wrapping_sub(d.base) < d.len).copied();
        drop(decoded);
        match found {
            Some((function, d)) => self.forward(function, region(d.bar) + (address - d.base), access),
            None => nothing(access),
        }
    }

    fn forward(&self, function: u8, offset: u64, access: Access<'_>) {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        let device = functions.iter().find(|(number, _)| *number == function).map(|(_, device)| Arc::clone(device));
        drop(functions);
        let Some(device) = device else { return nothing(access) };
        // A device that panicked is called all the same: it is the driver that has to notice.
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        match access {
            Access::Read(data) => device.read(offset, data),
            Access::Write(data) => device.write(offset, data),
        }
    }

    pub(super) fn plug(&self, function: u8, device: SharedDevice) {
        self.functions.write().unwrap_or_else(PoisonError::into_inner).push((function, device));
    }

    /// Takes all functions off the bus.
    pub(super) fn clear(&self) {
        self.functions.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.decoded.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn set_decoded(&self, function: u8, ranges: &[Decoded]) {
        let mut decoded = self.decoded.write().unwrap_or_else(PoisonError::into_inner);
        decoded.retain(|(other, _)| *other != function);
        decoded.extend(ranges.iter().map(|range| (function, *range)));
    }

    /// Whether the bus answers at `address` at all.
    fn covers(&self, space: Space, address: u64) -> bool {
        match space {
            Space::Io => self.map.io.contains(&address),
            Space::Memory => self.map.memory.contains(&address) || self.map.memory64.contains(&address),
        }
    }
}

/// Nobody answers.
fn nothing(access: Access<'_>) {
    if let Access::Read(data) = access {
        data.fill(0xff);
    }
}

/// A function's connection to the bus: what it answers to.
pub(super) struct Slot {
    root: Arc<Root>,
    function: u8,
    wires: Arc<dyn Wires>,
    /// What the bus knows.
    last: Mutex<Vec<Decoded>>,
}

impl Slot {
    pub(super) fn new(root: Arc<Root>, function: u8, wires: Arc<dyn Wires>) -> Self {
        Self { root, function, wires, last: Mutex::default() }
    }

    /// The function answers to `ranges` from now on; writes to `bells` behind them are kicks: queue, base address register,
    /// offset, and value if not any will do.
    pub(super) fn decode(&self, ranges: Vec<Decoded>, bells: &[(u16, u8, u64, Option<u16>)]) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if *last == ranges {
            return;
        }
        self.root.set_decoded(self.function, &ranges);
        let doorbells: Vec<_> = bells
            .iter()
            .filter_map(|&(queue, bar, offset, value)| {
                let range = ranges.iter().find(|range| range.bar == bar)?;
                let (space, address) = (range.space, range.base + offset);
                self.root.covers(space, address).then_some(Doorbell { queue, space, address, value })
            })
            .collect();
        self.wires.ring_at(&doorbells);
        *last = ranges;
    }
}
