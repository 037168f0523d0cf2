//! The host half: serves devices.

use std::ops::Range;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::thread;

use polyvirt_core::hypervisor::{self, BusDevice, Cause, HypervisorError, Interrupt};
use polyvirt_core::memory::FlatMemory;
use polyvirt_transports::mmio::{Place, registers::PLACE_SIZE};

use super::{Bus, DEVICES, Interrupts, LINES, SharedDevice, lock};

/// The host half.
pub struct Host {
    pub(super) memory: Arc<FlatMemory>,
    pub(super) bus: Arc<Bus>,
    /// Interrupt lines that no place has yet.
    pub(super) lines: Range<u32>,
}

impl hypervisor::Host for Host {
    type Memory = Arc<FlatMemory>;
    type Place = Place;

    fn memory(&self) -> Self::Memory {
        self.memory.clone()
    }

    fn place(&mut self, _device_type: u32, _queues: u16) -> Result<Place, HypervisorError> {
        let line = self.lines.next().ok_or(HypervisorError::Exhausted("interrupt lines"))?;
        Ok(Place { base: DEVICES + u64::from(line) * PLACE_SIZE, line })
    }

    fn interrupt(&self, place: &Place) -> Arc<dyn Interrupt> {
        Arc::new(Line(self.bus.interrupts.clone(), place.line))
    }

    fn plug(&mut self, place: Place, device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        let device = Arc::new(Mutex::new(device));
        poll_when_woken(&device);
        lock(&self.bus.devices).push((place, device));
        Ok(())
    }
}

/// Has `device` polled whenever its waker fires.
pub(super) fn poll_when_woken(device: &SharedDevice) {
    let (alarm, alarms) = sync_channel(1);
    lock(device).set_waker(Waker::from(Arc::new(Alarm(alarm))));
    // The device owns its wakers and the bus owns the device: the thread ends when the machine is gone.
    let weak = Arc::downgrade(device);
    thread::spawn(move || {
        while alarms.recv().is_ok() {
            while weak.upgrade().is_some_and(|device| lock(&device).poll()) {}
        }
    });
}

/// A device's interrupt line.
struct Line(Arc<Interrupts>, u32);

impl Interrupt for Line {
    fn raise(&self, _cause: Cause) {
        self.0.raise(self.1);
    }
}

impl Interrupts {
    /// The interrupt of `line`, if there is such a line, is pending.
    pub(super) fn raise(&self, line: u32) {
        self.change(|lines| {
            if line < LINES {
                lines.pending.insert(line);
            }
        });
    }
}

/// Wakes a device's thread. The channel holds one message: a device that is to be polled anyway needs no second.
struct Alarm(SyncSender<()>);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        let _ = self.0.try_send(());
    }
}
