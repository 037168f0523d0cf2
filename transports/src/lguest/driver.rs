//! The guest's side: the device page as its drivers see it.

use alloc::boxed::Box;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use core::task::Waker;
use core::time::Duration;

use polyvirt_core::features::Features;
use polyvirt_core::hypervisor::{Guest, HypervisorError, Share, WaitForInterrupt, WakeOnInterrupt};
use polyvirt_core::memory::{MemoryError, Pages};
use polyvirt_core::queue::{ByteOrder, Layout, QueueConfig, QueueError};
use polyvirt_core::status::Status;
use polyvirt_core::transport::{
    BlockingTransport, Interrupts, Notify, QueueSet, Transport, TransportError, Virtqueue, WakingTransport,
};

use super::registers::{DeviceDescriptor, GuestPlace, PAGE, QueueEntry, RING_ENTRIES, ring_areas};

/// How many interrupt lines there are.
const LINES: u16 = 32;

/// A device, met through the device page.
pub struct Driver<G> {
    guest: Arc<G>,
    place: GuestPlace,
    /// The descriptor's bytes.
    page: Pages,
    /// Its first bytes, as they were when the driver connected: the host has no business changing them.
    descriptor: DeviceDescriptor,
    accepted: Features,
    /// The interrupt lines of its queues, by queue.
    lines: Vec<u32>,
    /// The configuration, as [`Driver::take_interrupts`](Transport::take_interrupts) saw or the driver wrote it last.
    config: Vec<u8>,
    needed_reset: bool,
}

impl<G: Guest<Place = GuestPlace> + 'static> Driver<G> {
    /// Meets the device at `place`. Fails if there is none, or its interrupt lines do not exist.
    pub fn connect(guest: Arc<G>, place: GuestPlace) -> Result<Self, TransportError> {
        let nothing =
            TransportError::NotADevice { expected: "a descriptor on the device page", found: place.offset as u64 };
        let descriptor = DeviceDescriptor::read(&place.memory, place.offset).map_err(broken)?.ok_or(nothing.clone())?;
        let page = place.memory.slice(place.offset, descriptor.len()).ok_or(nothing)?;
        let mut driver = Self {
            guest,
            place,
            page,
            descriptor,
            accepted: Features::empty(),
            lines: Vec::new(),
            config: vec![0; descriptor.config_len.into()],
            needed_reset: false,
        };
        for index in 0..u16::from(descriptor.queues) {
            let line = driver.queue(index)?.line;
            if line >= LINES {
                return Err(TransportError::NotADevice { expected: "an interrupt line", found: line.into() });
            }
            driver.lines.push(line.into());
        }
        driver.page.read(descriptor.config().start, &mut driver.config).map_err(broken)?;
        Ok(driver)
    }

    fn queue(&self, index: u16) -> Result<QueueEntry, TransportError> {
        let at = self.descriptor.queue(index).ok_or(TransportError::NoQueue(index))?;
        let mut bytes = [0; DeviceDescriptor::QUEUE];
        self.page.read(at, &mut bytes).map_err(broken)?;
        Ok(QueueEntry::from_bytes(bytes))
    }

    /// Tells the launcher that the descriptor was written.
    fn notify(&self) -> Result<(), TransportError> {
        Ok(self.guest.notify(self.place.address + self.place.offset as u64, 0)?)
    }

    fn write_status(&self, status: Status) -> Result<(), TransportError> {
        self.page.write(DeviceDescriptor::STATUS, &[status.bits()]).map_err(broken)?;
        self.notify()
    }

    /// The `len` bytes of configuration from `offset` on, as a range of the descriptor.
    fn config_range(&self, offset: u32, len: usize) -> Result<Range<usize>, TransportError> {
        let Range { start, end } = self.descriptor.config();
        let start = start + offset as usize;
        if len > end.saturating_sub(start) {
            return Err(TransportError::Unsupported("configuration beyond its length"));
        }
        Ok(start..start + len)
    }
}

impl<G: Guest<Place = GuestPlace> + 'static> Transport for Driver<G> {
    fn device_type(&self) -> u32 {
        self.descriptor.device_type.into()
    }

    fn is_legacy(&self) -> bool {
        true
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        let mut bytes = [0; 16];
        let offered = self.descriptor.offered();
        let len = offered.len().min(bytes.len());
        self.page.read(offered.start, &mut bytes[..len]).map_err(broken)?;
        Ok(Features::from_bits_retain(u128::from_le_bytes(bytes)))
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        let (accepted, bytes) = (self.descriptor.accepted(), features.bits().to_le_bytes());
        let (fits, beyond) = bytes.split_at(accepted.len().min(bytes.len()));
        if beyond.iter().any(|&byte| byte != 0) {
            return Err(TransportError::FeaturesRefused(features));
        }
        self.page.write(accepted.start, fits).map_err(broken)?;
        self.accepted = features;
        Ok(())
    }

    fn status(&mut self) -> Result<Status, TransportError> {
        let mut status = [0];
        self.page.read(DeviceDescriptor::STATUS, &mut status).map_err(broken)?;
        Ok(Status::from_bits_retain(status[0]))
    }

    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        self.write_status(status)
    }

    fn begin_reset(&mut self) -> Result<(), TransportError> {
        self.write_status(Status::empty())
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        let done = self.status()?.is_empty();
        if done {
            self.accepted = Features::empty();
            self.needed_reset = false;
        }
        Ok(done)
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        Ok(0)
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        let range = self.config_range(offset, data.len())?;
        self.page.read(range.start, data).map_err(broken)
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        let range = self.config_range(offset, data.len())?;
        if self.status()?.is_empty() {
            // The NOTIFY that hands over the bytes would be a reset.
            return Err(TransportError::Unsupported("configuration write before ACKNOWLEDGE"));
        }
        self.page.write(range.start, data).map_err(broken)?;
        self.notify()?;
        // What the device made of it is no news.
        self.page.read(self.descriptor.config().start, &mut self.config).map_err(broken)
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        match self.queue(index) {
            Ok(entry) => Ok(entry.size),
            Err(TransportError::NoQueue(_)) => Ok(0),
            Err(error) => Err(error),
        }
    }

    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError> {
        let entry = self.queue(index)?;
        let wrong = |size: u16| TransportError::Queue {
            index,
            reason: QueueError::Size { size: size.into(), max: entry.size },
        };
        if entry.size == 0 {
            return Err(TransportError::NoQueue(index));
        }
        if !entry.size.is_power_of_two() || entry.size > RING_ENTRIES {
            return Err(wrong(entry.size));
        }
        if let Some(size) = size
            && size != entry.size
        {
            return Err(wrong(size));
        }
        let address = u64::from(entry.frame) * PAGE as u64;
        let start = address.checked_sub(self.place.address).and_then(|start| usize::try_from(start).ok());
        let areas = ring_areas(entry.size);
        let part = |area: &Range<usize>| self.place.memory.slice(start?.checked_add(area.start)?, area.len());
        let [Some(descriptors), Some(driver), Some(device)] = areas.each_ref().map(part) else {
            return Err(TransportError::NotADevice { expected: "a ring above RAM", found: address });
        };
        let at = |area: &Range<usize>| address + area.start as u64;
        let config = QueueConfig {
            size: entry.size,
            descriptors: at(&areas[0]),
            driver: at(&areas[1]),
            device: at(&areas[2]),
            layout: Layout::Legacy(ByteOrder::Little),
            event_idx: self.accepted.contains(Features::EVENT_IDX),
            indirect: self.accepted.contains(Features::INDIRECT_DESC),
            in_order: false,
        };
        let notify = Box::new(Doorbell { guest: Arc::clone(&self.guest), address });
        Ok(Virtqueue { config, descriptors, driver, device, notify })
    }

    fn begin_vq_reset(&mut self, _index: u16) -> Result<(), TransportError> {
        Err(TransportError::Unsupported("reset of a single queue"))
    }

    fn poll_vq_reset(&mut self, _index: u16) -> Result<bool, TransportError> {
        Err(TransportError::Unsupported("reset of a single queue"))
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        let mut queues = QueueSet::NONE;
        for (index, &line) in (0u16..).zip(&self.lines) {
            // Nobody keeps a host from giving one line to several queues.
            if !self.lines[..usize::from(index)].contains(&line) && self.guest.take(line)? {
                let same = (0..).zip(&self.lines).filter(|&(_, other)| *other == line);
                same.for_each(|(index, _)| queues |= QueueSet::of(index));
            }
        }
        if queues.is_empty() {
            return Ok(Interrupts::default());
        }
        // Lines belong to queues, and a change of the page comes on one of them: it shows by comparison only.
        let mut config = vec![0; self.config.len()];
        self.page.read(self.descriptor.config().start, &mut config).map_err(broken)?;
        let needs_reset = self.status()?.contains(Status::DEVICE_NEEDS_RESET);
        let changed = config != self.config || needs_reset && !self.needed_reset;
        (self.config, self.needed_reset) = (config, needs_reset);
        Ok(Interrupts { queues, config: changed })
    }

    fn share(&self) -> Arc<dyn Share> {
        Arc::<G>::clone(&self.guest)
    }
}

impl<G: WaitForInterrupt<Place = GuestPlace> + 'static> BlockingTransport for Driver<G> {
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError> {
        Ok(self.guest.wait(&self.lines, most)?)
    }

    fn pause(&mut self, time: Duration) -> Result<(), TransportError> {
        self.guest.wait(&[], time)?;
        Ok(())
    }
}

impl<G: WakeOnInterrupt<Place = GuestPlace> + 'static> WakingTransport for Driver<G> {
    fn wake_on_interrupt(&mut self, waker: &Waker) -> Result<(), TransportError> {
        Ok(self.guest.wake_on(&self.lines, waker)?)
    }
}

/// A ring's first page.
struct Doorbell<G> {
    guest: Arc<G>,
    address: u64,
}

impl<G: Guest> Notify for Doorbell<G> {
    fn notify(&mut self) -> Result<(), TransportError> {
        Ok(self.guest.notify(self.address, 0)?)
    }
}

/// The host handed out memory that is smaller than a device page.
fn broken(error: MemoryError) -> TransportError {
    TransportError::Hypervisor(HypervisorError::Refused { call: "device page", reason: format!("{error}") })
}
