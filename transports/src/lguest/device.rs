//! The host's side: a device behind its descriptor.
//!
//! The guest writes status, accepted features and configuration straight into the page and tells so by a NOTIFY. All
//! of them are read then, once, and checked as values:
//!
//! - NOTIFY on the descriptor: a status of 0 resets; another is the driver's new status. (Guests of 2.6.25 only notify
//!   for a reset, for which they write 0.)
//! - NOTIFY on a ring: a kick. A status that changed without a NOTIFY (guests of 2.6.25) is taken over first; while it
//!   is 0 the kick is ignored.
//! - Either: configuration bytes that are not what the device last published were written by the driver. The device
//!   gets them as aligned words of four bytes, and the page shows what it made of them: read-only fields come back.
//!
//! What the device changes, it publishes in the page before the interrupt that tells so.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::Waker;

use polyvirt_core::device::Device;
use polyvirt_core::features::Features;
use polyvirt_core::hypervisor::{BusDevice, Cause, Host, HypervisorError, Interrupt};
use polyvirt_core::memory::{GuestMemory, MemoryError, Pages};
use polyvirt_core::queue::ByteOrder;
use polyvirt_core::state::{Area, Interface, VirtioDevice};
use polyvirt_core::status::Status;

use super::registers::{DeviceDescriptor, HostPlace, HostRing, QueueEntry, RING_ENTRIES, ring_areas};

/// Bytes of the feature fields: the 32 bits of the legacy interface.
const FEATURE_LEN: u8 = 4;

/// Puts `device` onto the device page of `host`. `memory` is what the device sees of the guest: `host.memory()`,
/// perhaps wrapped.
///
/// Fails if the page, the interrupt lines or the memory for rings are used up, or the device does not fit a
/// descriptor: a type above 255, more than 255 queues or bytes of configuration.
pub fn attach<H, M>(host: &mut H, memory: M, device: Box<dyn Device<M>>) -> Result<(), HypervisorError>
where
    H: Host<Place = HostPlace>,
    M: GuestMemory + Send + 'static,
{
    let (device_type, queues) = (device.device_type(), device.queue_max_sizes().len());
    let config_len = device.config().len();
    let descriptor = DeviceDescriptor {
        device_type: byte("device type", device_type as usize)?,
        queues: byte("number of queues", queues)?,
        feature_len: FEATURE_LEN,
        config_len: byte("configuration length", config_len)?,
    };
    if device_type == 0 {
        return Err(refused("device type 0 ends the list".into()));
    }
    let mut place = host.place(device_type, u16::from(descriptor.queues))?;
    place.len = descriptor.len();
    let page = place.page.slice(place.offset, place.len).ok_or(HypervisorError::Exhausted("device page"))?;
    if place.rings.len() != queues {
        return Err(refused(alloc::format!("expected {queues} rings, got {}", place.rings.len())));
    }
    let interrupt = Arc::new(AfterPublishing { config: AtomicBool::new(false), interrupt: host.interrupt(&place) });
    let virtio = VirtioDevice::new(device, memory, interrupt.clone(), Interface::Legacy(ByteOrder::Little));
    let mut device = LguestDevice {
        virtio,
        interrupt,
        page,
        descriptor,
        rings: place.rings.clone(),
        seen: vec![0; place.len],
        status: 0,
        config: vec![0; config_len],
    };
    device.write_descriptor().map_err(|error| refused(alloc::format!("device page: {error}")))?;
    device.set_up_queues();
    host.plug(place, Box::new(device))
}

struct LguestDevice<M: GuestMemory> {
    virtio: VirtioDevice<M>,
    interrupt: Arc<AfterPublishing>,
    /// The descriptor's bytes.
    page: Pages,
    descriptor: DeviceDescriptor,
    rings: Vec<HostRing>,
    /// The descriptor as it was read last.
    seen: Vec<u8>,
    /// What the page says, as far as the device knows.
    status: u8,
    /// As `status`.
    config: Vec<u8>,
}

impl<M: GuestMemory> LguestDevice<M> {
    /// Writes the descriptor, its type last: then it is there.
    fn write_descriptor(&mut self) -> Result<(), MemoryError> {
        let header = self.descriptor.to_bytes();
        self.page.write(1, &header[1..])?;
        for index in 0..self.virtio.queue_count() {
            let (size, ring) = (self.ring_size(index), &self.rings[usize::from(index)]);
            let entry = QueueEntry { size, line: ring.line, frame: (ring.address / 4096) as u32 };
            self.page
                .write(DeviceDescriptor::HEADER + DeviceDescriptor::QUEUE * usize::from(index), &entry.to_bytes())?;
        }
        let offered = self.virtio.device_features().word(0).to_le_bytes();
        self.page.write(self.descriptor.offered().start, &offered)?;
        self.page.fill(self.descriptor.accepted().start, FEATURE_LEN.into(), 0)?;
        self.config.copy_from_slice(self.virtio.config());
        self.page.write(self.descriptor.config().start, &self.config)?;
        self.page.write(0, &header[..1])
    }

    /// The driver has no say in size and place of rings: they are enabled from the start.
    fn set_up_queues(&mut self) {
        for index in 0..self.virtio.queue_count() {
            let size = self.ring_size(index);
            if size == 0 {
                continue;
            }
            let start = self.rings[usize::from(index)].address;
            let areas = [Area::Descriptors, Area::Driver, Area::Device];
            for (area, range) in areas.into_iter().zip(ring_areas(size)) {
                self.virtio.set_queue_address(index, area, start + range.start as u64);
            }
            self.virtio.set_queue_size(index, size.into());
            self.virtio.enable_queue(index);
        }
    }

    /// The largest power of two that device and allocation allow; 0 if the device has no such queue.
    fn ring_size(&self, index: u16) -> u16 {
        self.virtio.queue_max_size(index).min(RING_ENTRIES).checked_ilog2().map_or(0, |log| 1 << log)
    }

    /// Reads the descriptor, once, and hands the driver's configuration writes to the device. Returns the status.
    fn look(&mut self) -> Result<u8, MemoryError> {
        self.page.read(0, &mut self.seen)?;
        let seen = &self.seen[self.descriptor.config()];
        for range in changed_words(&self.config, seen) {
            self.config[range.clone()].copy_from_slice(&seen[range.clone()]);
            self.virtio.write_config(range.start as u64, &seen[range]);
        }
        Ok(self.seen[DeviceDescriptor::STATUS])
    }

    /// Takes over the driver's new status and the features that it accepts, as [`look`](Self::look) saw them.
    fn take_status(&mut self) {
        self.status = self.seen[DeviceDescriptor::STATUS];
        let accepted =
            self.seen[self.descriptor.accepted()].iter().rev().fold(0, |bits, &byte| bits << 8 | u128::from(byte));
        self.virtio.set_driver_features(Features::from_bits_retain(accepted));
        self.virtio.set_status(Status::from_bits_retain(self.status));
    }

    fn reset(&mut self) -> Result<(), MemoryError> {
        self.status = 0;
        self.virtio.reset();
        for ring in &self.rings {
            ring.pages.fill(0, ring.pages.len(), 0)?;
        }
        self.page.fill(self.descriptor.accepted().start, FEATURE_LEN.into(), 0)?;
        self.set_up_queues();
        Ok(())
    }

    /// Shows in the page what the device changed, and only that: the driver may be about to tell of its own changes.
    fn publish(&mut self) -> Result<(), MemoryError> {
        let status = self.virtio.status().bits();
        if status != self.status {
            self.page.write(DeviceDescriptor::STATUS, &[status])?;
            self.status = status;
        }
        // A device whose configuration changes its length breaks its promise; what fits is shown.
        let len = self.config.len().min(self.virtio.config().len());
        let config = &self.virtio.config()[..len];
        if *config != self.config[..len] {
            self.page.write(self.descriptor.config().start, config)?;
            self.config[..len].copy_from_slice(config);
        }
        Ok(())
    }

    fn finish(&mut self, worked: Result<bool, MemoryError>) -> bool {
        let published = self.publish();
        self.interrupt.published();
        match worked.and_then(|again| published.map(|()| again)) {
            Ok(again) => again,
            Err(error) => {
                tracing::error!(%error, "the descriptor is not where it should be");
                false
            }
        }
    }
}

impl<M: GuestMemory + Send> BusDevice for LguestDevice<M> {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // The page is memory: nothing is read by asking the device.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, _data: &[u8]) {
        if offset != 0 {
            return;
        }
        let worked = self.look().and_then(|status| match status {
            0 => self.reset(),
            _ => {
                self.take_status();
                Ok(())
            }
        });
        self.finish(worked.map(|()| false));
    }

    fn kick(&mut self, queue: u16) -> bool {
        let worked = self.look().map(|status| {
            if status == 0 {
                // The driver has not begun, or is about to reset: not the device's to overwrite.
                tracing::debug!(queue, "kick while the status is 0: ignored");
                return false;
            }
            if status != self.status {
                self.take_status();
            }
            self.virtio.kick(queue)
        });
        self.finish(worked)
    }

    fn poll(&mut self) -> bool {
        let again = self.virtio.poll();
        self.finish(Ok(again))
    }

    fn set_waker(&mut self, waker: Waker) {
        self.virtio.set_waker(waker);
    }
}

/// Holds back interrupts that announce a change in the page until it is there.
struct AfterPublishing {
    config: AtomicBool,
    interrupt: Arc<dyn Interrupt>,
}

impl AfterPublishing {
    fn published(&self) {
        if self.config.swap(false, Ordering::Relaxed) {
            self.interrupt.raise(Cause::Config);
        }
    }
}

impl Interrupt for AfterPublishing {
    fn raise(&self, cause: Cause) {
        match cause {
            Cause::Config => self.config.store(true, Ordering::Relaxed),
            Cause::Queue(_) => self.interrupt.raise(cause),
        }
    }
}

/// The ranges of neighbouring words of four bytes in which `new` differs from `old`, of the same length.
fn changed_words(old: &[u8], new: &[u8]) -> Vec<Range<usize>> {
    let mut changed: Vec<Range<usize>> = Vec::new();
    for (word, (old, new)) in old.chunks(4).zip(new.chunks(4)).enumerate().filter(|(_, (old, new))| old != new) {
        let (start, end) = (4 * word, 4 * word + old.len());
        match changed.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => changed.push(start..end),
        }
        debug_assert_eq!(old.len(), new.len());
    }
    changed
}

fn byte(what: &str, value: usize) -> Result<u8, HypervisorError> {
    u8::try_from(value)
        .map_err(|_| refused(alloc::format!("a descriptor has one byte for the {what}, not for {value}")))
}

fn refused(reason: alloc::string::String) -> HypervisorError {
    HypervisorError::Refused { call: "attach", reason }
}
