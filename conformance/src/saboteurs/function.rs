//! Meddlers between a PCI bus and an honest function: they change what its registers say and what reaches them. They know
//! where our device has what.

use std::sync::Arc;
use std::task::Waker;

use polyvirt_core::hypervisor::BusDevice;
use polyvirt_transports::pci::registers::*;

use super::Memory;
use crate::cells::Sabotage;

/// Where our device has its common configuration, interrupt status, device configuration, and doorbells.
pub(super) const COMMON: u64 = region(4);
pub(super) const ISR: u64 = COMMON + 0x1000;
pub(super) const DEVICE: u64 = COMMON + 0x2000;
pub(super) const NOTIFY: u64 = COMMON + 0x3000;
/// Where the doorbells end.
pub(super) const NOTIFY_END: u64 = NOTIFY + 0x1000;
/// The table of messages.
pub(super) const TABLE: u64 = region(1);
/// The ports of the legacy interface.
pub(super) const PORTS: u64 = region(0);

/// Where our modern device has its capabilities.
pub(super) mod capability {
    pub(in super::super) const COMMON: u64 = 0x40;
    pub(in super::super) const ISR: u64 = 0x50;
    pub(in super::super) const DEVICE: u64 = 0x60;
    pub(in super::super) const NOTIFY: u64 = 0x70;
    pub(in super::super) const WINDOW: u64 = 0x84;
    pub(in super::super) const MSIX: u64 = 0x98;
}

/// What an honest read becomes: offset, and the bytes.
pub(super) type Read = fn(&mut Meddler, u64, &mut [u8]);
/// What a write becomes: offset, and the bytes; false keeps it from the device.
pub(super) type Write = fn(&mut Meddler, u64, &mut [u8]) -> bool;

/// What to do differently.
#[derive(Clone, Copy, Default)]
pub(super) struct Plan {
    pub(super) read: Option<Read>,
    pub(super) write: Option<Write>,
}

impl Sabotage<Memory> for Plan {
    fn bus_device(&self, honest: Box<dyn BusDevice>, _memory: Memory) -> Box<dyn BusDevice> {
        let plan = *self;
        Box::new(Meddler { honest, plan, status: 0, resets: 0, queue: 0, met: false, seen: 0, flag: false })
    }
}

/// Something else is read.
pub(super) fn reading(read: Read) -> Arc<dyn Sabotage<Memory>> {
    Arc::new(Plan { read: Some(read), write: None })
}

/// Something else is written.
pub(super) fn writing(write: Write) -> Arc<dyn Sabotage<Memory>> {
    Arc::new(Plan { read: None, write: Some(write) })
}

/// Something else is written and read.
pub(super) fn both(write: Write, read: Read) -> Arc<dyn Sabotage<Memory>> {
    Arc::new(Plan { read: Some(read), write: Some(write) })
}

/// An honest function, and someone who is not.
pub(super) struct Meddler {
    honest: Box<dyn BusDevice>,
    plan: Plan,
    /// As the driver wrote it.
    pub(super) status: u8,
    /// How often it wrote 0.
    pub(super) resets: usize,
    /// The queue that is selected.
    pub(super) queue: u16,
    /// Whether the driver has met the device: it has set up messages, or written a status.
    pub(super) met: bool,
    /// For plans that remember.
    pub(super) seen: u64,
    pub(super) flag: bool,
}

impl Meddler {
    /// What an honest register reads.
    pub(super) fn ask<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.honest.read(offset, &mut data);
        data
    }

    /// Writes an honest register.
    pub(super) fn tell(&mut self, offset: u64, data: &[u8]) {
        self.honest.write(offset, data);
    }

    /// Whether the driver said DRIVER_OK.
    pub(super) const fn running(&self) -> bool {
        self.status & 4 != 0
    }

    fn watch(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (_, &[status]) if offset == COMMON + common::DEVICE_STATUS || offset == PORTS + legacy::DEVICE_STATUS => {
                (self.status, self.met) = (status, true);
                self.resets += usize::from(status == 0);
            }
            (_, &[a, b]) if offset == COMMON + common::QUEUE_SELECT || offset == PORTS + legacy::QUEUE_SELECT => {
                self.queue = u16::from_le_bytes([a, b]);
            }
            (_, &[_, control]) if offset == capability::MSIX + 2 => self.met |= control & 0xc0 == 0x80,
            _ => {}
        }
    }
}

impl BusDevice for Meddler {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.honest.read(offset, data);
        if let Some(read) = self.plan.read {
            read(self, offset, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut data = data.to_vec();
        let goes_on = self.plan.write.is_none_or(|write| write(self, offset, &mut data));
        self.watch(offset, &data);
        if goes_on {
            self.honest.write(offset, &data);
        }
    }

    fn kick(&mut self, queue: u16) -> bool {
        self.honest.kick(queue)
    }

    fn poll(&mut self) -> bool {
        self.honest.poll()
    }

    fn set_waker(&mut self, waker: Waker) {
        self.honest.set_waker(waker);
    }
}

/// In what is read or written at `offset`, the field at `field` is `value`.
pub(super) fn set(offset: u64, data: &mut [u8], field: u64, value: &[u8]) {
    for (byte, at) in data.iter_mut().zip(offset..) {
        if let Some(value) = at.checked_sub(field).and_then(|at| value.get(usize::try_from(at).ok()?)) {
            *byte = *value;
        }
    }
}
