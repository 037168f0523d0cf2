//! The host half: the bus of the device page, its rings and lines.

use std::sync::Arc;

use polyvirt_core::hypervisor::{self, BusDevice, Cause, HypervisorError, Interrupt};
use polyvirt_core::memory::{FlatMemory, Pages};
use polyvirt_transports::lguest::HostPlace;
use polyvirt_transports::lguest::registers::{HostRing, RING_PAGES};

use super::abi::{DEVICE_PAGES, LGUEST_IRQS, PAGE};
use super::launcher::{Launcher, Thread};

/// The host half. Dropping it ends the guest.
pub struct Host {
    thread: Thread,
    memory: Arc<FlatMemory>,
    /// The memory above RAM, and its guest-physical address.
    pub(super) devices: (Pages, u64),
    /// What the next place gets.
    next: Next,
}

#[derive(Clone, Copy)]
struct Next {
    device: usize,
    offset: usize,
    page: u64,
    line: u16,
}

impl Host {
    /// Starts the guest in `memory`, of which the last [`DEVICE_PAGES`] are above its RAM.
    pub(super) fn start(memory: &Pages) -> Result<Self, HypervisorError> {
        let ram_end = memory.len() as u64 - DEVICE_PAGES * PAGE;
        let above = memory.slice(ram_end as usize, (DEVICE_PAGES * PAGE) as usize);
        Ok(Self {
            thread: Thread::spawn(memory, ram_end)?,
            memory: Arc::new(FlatMemory::new([(0, memory.clone())])),
            devices: (above.ok_or(HypervisorError::Exhausted("memory"))?, ram_end),
            next: Next { device: 0, offset: 0, page: 1, line: 1 },
        })
    }

    /// What the guest printed on the early console: the last 64 KiB.
    pub fn early_console(&self) -> String {
        self.launcher().early_console()
    }

    /// The id of the guest's process.
    pub fn process_id(&self) -> i32 {
        self.launcher().process_id()
    }

    pub(super) const fn launcher(&self) -> &Arc<Launcher> {
        &self.thread.launcher
    }
}

impl hypervisor::Host for Host {
    type Memory = Arc<FlatMemory>;
    type Place = HostPlace;

    fn memory(&self) -> Self::Memory {
        Arc::clone(&self.memory)
    }

    fn place(&mut self, _device_type: u32, queues: u16) -> Result<HostPlace, HypervisorError> {
        let (above, ram_end) = &self.devices;
        let Next { offset, page, line, .. } = self.next;
        if u32::from(line) + u32::from(queues) > LGUEST_IRQS {
            return Err(HypervisorError::Exhausted("interrupt lines"));
        }
        let slice = |page: u64, pages| above.slice((page * PAGE) as usize, pages * PAGE as usize);
        let rings = (0..queues).map(|index| {
            let page = page + u64::from(index) * RING_PAGES as u64;
            let pages = slice(page, RING_PAGES)?;
            Some(HostRing { address: ram_end + page * PAGE, pages, line: line + index })
        });
        let rings: Option<Vec<_>> = rings.collect();
        let (Some(page), Some(rings)) = (slice(0, 1), rings) else {
            return Err(HypervisorError::Exhausted("pages for rings"));
        };
        Ok(HostPlace { page, offset, len: 0, rings })
    }

    fn interrupt(&self, place: &HostPlace) -> Arc<dyn Interrupt> {
        let lines = place.rings.iter().map(|ring| ring.line).collect();
        Arc::new(Lines { launcher: Arc::clone(self.launcher()), lines })
    }

    fn plug(&mut self, place: HostPlace, mut device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        let next = &mut self.next;
        if place.offset != next.offset || place.len == 0 || place.offset + place.len > PAGE as usize {
            let reason = format!("the place at {:#x} is taken, empty or beyond the device page", place.offset);
            return Err(HypervisorError::Refused { call: "plug", reason });
        }
        let rings: Vec<_> = place.rings.iter().map(|ring| ring.address).collect();
        next.offset += place.len;
        next.page += (rings.len() * RING_PAGES) as u64;
        next.line += rings.len() as u16;
        device.set_waker(self.thread.launcher.waker(next.device));
        next.device += 1;
        let plugged = Plugged { descriptor: self.devices.1 + place.offset as u64, rings, device };
        self.launcher().plug(plugged)
    }
}

struct Lines {
    launcher: Arc<Launcher>,
    lines: Vec<u16>,
}

impl Interrupt for Lines {
    fn raise(&self, cause: Cause) {
        // The bus has lines for queues only: a change of the configuration comes on the first.
        let index = match cause {
            Cause::Queue(index) => index.into(),
            Cause::Config => 0,
        };
        if let Some(line) = self.lines.get(index) {
            self.launcher.interrupt(1 << line);
        }
    }
}

/// A device on the bus, and the guest-physical addresses that mean it.
pub(super) struct Plugged {
    descriptor: u64,
    rings: Vec<u64>,
    pub(super) device: Box<dyn BusDevice>,
}

/// What a NOTIFY rings.
pub(super) enum Doorbell {
    Descriptor,
    Queue(u16),
}

impl Plugged {
    /// What a NOTIFY for `address` is to this device; none if it is not meant.
    pub(super) fn doorbell(&self, address: u64) -> Option<Doorbell> {
        if address == self.descriptor {
            return Some(Doorbell::Descriptor);
        }
        let queue = self.rings.iter().position(|&ring| ring == address)?;
        Some(Doorbell::Queue(queue as u16))
    }
}
