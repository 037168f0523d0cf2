//! What Xen does below the seam: takes an access of the guest's for a request if the server asked for it, and lets the
//! processor wait for the answer.
//!
//! It has one processor, the ranges as Xen enforces them, configuration ports that Xen decodes itself, and a local
//! interrupt controller with a line for each bit.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polyvirt_core::hypervisor::{self, HypervisorError, Share, WaitForInterrupt};
use polyvirt_core::memory::{Access, FlatMemory, Pages};
use polyvirt_transports::mmio::{Place, Registers};
use polyvirt_transports::pci::registers::{CONFIG_ADDRESS, CONFIG_DATA};
use polyvirt_transports::pci::{self, AddressMap, Machine, Message};

use super::abi::{Calls, Kind, PCI, RANGES, Range, Request};
use super::host::{Host, start as start_host};
use crate::flat_share::FlatShare;

/// Guest-physical address of the memory.
pub const RAM: u64 = 0x10_0000;
/// Where messages go; the data are the line.
const MESSAGES: u64 = 0xfee0_0000;

/// A domain with `ram` bytes of memory, and its device model: the bus, and the guest.
pub fn start(ram: usize) -> Result<(pci::Host<Host<Model>>, Guest), HypervisorError> {
    let ram = Pages::allocate(ram);
    let memory = Arc::new(FlatMemory::new([(RAM, ram.clone())]));
    let model = Arc::new(Model { memory, state: Mutex::default(), changed: Condvar::new() });
    RANGES.iter().try_for_each(|range| model.claim(*range))?;
    let guest = Guest { model: Arc::clone(&model), processor: Mutex::default(), share: FlatShare::new(RAM, ram) };
    Ok((start_host(model), guest))
}

/// Xen, for one domain.
pub struct Model {
    memory: Arc<FlatMemory>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What the server is asked for.
    ranges: Vec<Range>,
    /// What the processor waits for.
    slot: Slot,
    /// Interrupt lines: the vectors of messages.
    pending: BTreeSet<u32>,
    invalidations: usize,
    stopped: bool,
}

/// The processor's slot of the page of requests.
#[derive(Default)]
enum Slot {
    #[default]
    Free,
    Ready(Request),
    InProcess,
    Answered(u64),
}

impl Model {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    /// Waits until `look` finds something; none once the server is stopped.
    fn wait<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        let mut state = self.lock();
        loop {
            if let Some(found) = look(&mut state) {
                return Some(found);
            }
            if state.stopped {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Hands `request` to the server, and waits for the answer; none if there is no server any more.
    pub fn ask(&self, request: Request) -> Option<u64> {
        self.change(|state| state.slot = Slot::Ready(request));
        let answer = self.wait(|state| match state.slot {
            Slot::Answered(data) => Some(data),
            _ => None,
        });
        self.change(|state| state.slot = Slot::Free);
        answer
    }

    /// Whether the server is asked for `size` bytes from `at` on.
    fn is_claimed(&self, kind: Kind, at: u64, size: u64) -> bool {
        let last = at.saturating_add(size - 1);
        self.lock().ranges.iter().any(|range| match *range {
            Range::Ports(first, end) => kind == Kind::Port && u64::from(first) <= at && last <= u64::from(end),
            Range::Memory(first, end) => kind == Kind::Memory && first <= at && last <= end,
            Range::Function(function) => kind == Kind::Config && at >> 32 == u64::from(function),
        })
    }

    /// How often mapped memory had to be given up.
    pub fn invalidations(&self) -> usize {
        self.lock().invalidations
    }
}

impl Calls for Model {
    type Memory = Arc<FlatMemory>;

    fn memory(&self) -> Arc<FlatMemory> {
        Arc::clone(&self.memory)
    }

    fn invalidate(&self) -> Result<(), HypervisorError> {
        self.change(|state| state.invalidations += 1);
        Ok(())
    }

    fn claim(&self, range: Range) -> Result<(), HypervisorError> {
        self.change(|state| {
            // Xen refuses what overlaps.
            if state.ranges.contains(&range) {
                let call = "XEN_DMOP_map_io_range_to_ioreq_server";
                return Err(HypervisorError::Refused { call, reason: "File exists (os error 17)".into() });
            }
            state.ranges.push(range);
            Ok(())
        })
    }

    fn inject_msi(&self, message: Message) -> Result<(), HypervisorError> {
        if message.address == MESSAGES {
            self.change(|state| state.pending.insert(message.data & 0xff));
        }
        Ok(())
    }

    fn next(&self) -> Option<(usize, Request)> {
        self.wait(|state| match state.slot {
            Slot::Ready(request) => {
                state.slot = Slot::InProcess;
                Some((0, request))
            }
            _ => None,
        })
    }

    fn answer(&self, _processor: usize, data: u64) -> Result<(), HypervisorError> {
        self.change(|state| state.slot = Slot::Answered(data));
        Ok(())
    }

    fn stop(&self) {
        self.change(|state| state.stopped = true);
    }
}

/// The guest: a processor, and memory for its drivers.
pub struct Guest {
    model: Arc<Model>,
    /// What it last wrote to [`CONFIG_ADDRESS`]: Xen looks on. Locked while the processor is busy.
    processor: Mutex<u32>,
    share: FlatShare,
}

impl Guest {
    /// What Xen is to it.
    pub const fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// One access that no memory answers.
    fn access(&self, kind: Kind, address: u64, read: bool, data: &mut [u8]) {
        let mut selected = self.processor.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut kind, mut at) = (kind, address);
        if kind == Kind::Port && (CONFIG_DATA..CONFIG_DATA + 4).contains(&address) && *selected >> 31 == 1 {
            let (function, register) = (u64::from(*selected >> 8 & 0xffff), u64::from(*selected & 0xfc));
            (kind, at) = (Kind::Config, (function << 32) + register + (address - CONFIG_DATA));
        }
        let mut bytes = [0; 8];
        let size = data.len().min(bytes.len());
        bytes[..size].copy_from_slice(&data[..size]);
        if kind == Kind::Port && address == CONFIG_ADDRESS && !read && size == 4 {
            *selected = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        let answer = if self.model.is_claimed(kind, at, size as u64) {
            let data = u64::from_le_bytes(bytes);
            let request = Request {
                kind,
                address: at,
                data,
                indirect: false,
                size: size as u32,
                count: 1,
                downwards: false,
                read,
            };
            self.model.ask(request)
        } else {
            None
        };
        if read {
            data.copy_from_slice(&answer.unwrap_or(u64::MAX).to_le_bytes()[..size]);
        }
    }
}

impl Share for Guest {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        self.share.allocate(len)
    }

    fn share(&self, pages: &Pages, access: Access) -> Result<u64, HypervisorError> {
        self.share.share(pages, access)
    }

    fn unshare(&self, address: u64) -> Result<(), HypervisorError> {
        self.share.unshare(address)
    }
}

impl hypervisor::Guest for Guest {
    type Place = Place;

    fn notify(&self, doorbell: u64, value: u32) -> Result<(), HypervisorError> {
        self.store(doorbell, &value.to_le_bytes())
    }

    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        Ok(self.model.lock().pending.remove(&line))
    }

    /// None: everything is on the bus.
    fn enumerate(&self) -> Result<Vec<Place>, HypervisorError> {
        Ok(Vec::new())
    }
}

impl WaitForInterrupt for Guest {
    fn wait(&self, lines: &[u32], most: Duration) -> Result<bool, HypervisorError> {
        let state = self.model.lock();
        let nothing = |state: &mut State| !lines.iter().any(|line| state.pending.contains(line));
        let waited = self.model.changed.wait_timeout_while(state, most, nothing);
        Ok(!waited.unwrap_or_else(PoisonError::into_inner).1.timed_out())
    }
}

impl Registers for Guest {
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.access(Kind::Memory, address, true, data);
        Ok(())
    }

    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        self.access(Kind::Memory, address, false, &mut data.to_vec());
        Ok(())
    }
}

impl Machine for Guest {
    fn address_map(&self) -> AddressMap {
        PCI
    }

    fn input(&self, port: u16, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.access(Kind::Port, port.into(), true, data);
        Ok(())
    }

    fn output(&self, port: u16, data: &[u8]) -> Result<(), HypervisorError> {
        self.access(Kind::Port, port.into(), false, &mut data.to_vec());
        Ok(())
    }

    fn message(&self, line: u32) -> Message {
        Message { address: MESSAGES, data: line }
    }
}
