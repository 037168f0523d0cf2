//! The guest's side: a driver's transport over registers.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use core::task::Waker;
use core::time::Duration;

use polyvirt_core::hypervisor::{Share, WaitForInterrupt, WakeOnInterrupt};
use polyvirt_core::queue::{MAX_QUEUE_SIZE, QueueConfig, split};
use polyvirt_core::transport::{
    BlockingTransport, Interrupts, Notify, QueueSet, Transport, TransportError, Virtqueue, WakingTransport, try_reset,
};
use polyvirt_core::{Features, Status};

use super::registers::*;
use crate::areas::Areas;

/// The driver side, connected to the device at a place.
///
/// Dropping it while queues are in use resets the device, so that their memory can return to the guest; not that of a device
/// which takes its time, for which a caller waits before.
pub struct Driver<G: Registers + 'static> {
    guest: Arc<G>,
    place: Place,
    legacy: bool,
    device_type: u32,
    features: Features,
    /// The queue whose registers are seen.
    selected: u16,
    /// The queues whose reset was begun.
    resetting: BTreeSet<u16>,
    /// The rings that the device may use.
    queues: BTreeMap<u16, Areas>,
}

impl<G: Registers + 'static> Driver<G> {
    /// Meets the device at `place`, or says why there is none.
    pub fn connect(guest: Arc<G>, place: G::Place) -> Result<Self, TransportError> {
        Self::meet(guest, place, false)
    }

    /// As [`Driver::connect`], through the legacy interface (version 1).
    pub fn connect_legacy(guest: Arc<G>, place: G::Place) -> Result<Self, TransportError> {
        Self::meet(guest, place, true)
    }

    fn meet(guest: Arc<G>, place: G::Place, legacy: bool) -> Result<Self, TransportError> {
        let (features, queues) = (Features::empty(), BTreeMap::new());
        let mut driver =
            Self { guest, place, legacy, device_type: 0, features, selected: 0, resetting: BTreeSet::new(), queues };
        driver.expect(MAGIC_VALUE, MAGIC, "the magic value 0x74726976")?;
        match legacy {
            false => driver.expect(VERSION, VERSION_2, "version 2 of virtio-mmio")?,
            true => driver.expect(VERSION, VERSION_1, "version 1 of virtio-mmio")?,
        }
        driver.device_type = driver.read(DEVICE_ID)?;
        if driver.device_type == 0 {
            return Err(TransportError::NotADevice { expected: "a device type other than 0", found: 0 });
        }
        Ok(driver)
    }

    /// What the driver talks through.
    pub fn guest(&self) -> &Arc<G> {
        &self.guest
    }

    /// Where the device is.
    pub const fn place(&self) -> Place {
        self.place
    }

    fn read(&self, register: u64) -> Result<u32, TransportError> {
        let mut data = [0; 4];
        self.guest.load(self.place.base + register, &mut data)?;
        Ok(u32::from_le_bytes(data))
    }

    fn write(&self, register: u64, value: u32) -> Result<(), TransportError> {
        Ok(self.guest.store(self.place.base + register, &value.to_le_bytes())?)
    }

    fn expect(&self, register: u64, value: u32, expected: &'static str) -> Result<(), TransportError> {
        match self.read(register)? {
            found if found == value => Ok(()),
            found => Err(TransportError::NotADevice { expected, found: found.into() }),
        }
    }

    fn select(&mut self, index: u16) -> Result<(), TransportError> {
        self.selected = index;
        self.write(QUEUE_SEL, index.into())
    }

    fn configure(&self, config: &QueueConfig) -> Result<(), TransportError> {
        self.write(QUEUE_SIZE, config.size.into())?;
        for (low, high, address) in [
            (QUEUE_DESC_LOW, QUEUE_DESC_HIGH, config.descriptors),
            (QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH, config.driver),
            (QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH, config.device),
        ] {
            self.write(low, address as u32)?;
            self.write(high, (address >> 32) as u32)?;
        }
        self.write(QUEUE_READY, 1)
    }

    fn configure_legacy(&self, config: &QueueConfig) -> Result<(), TransportError> {
        let page = split::layout::LEGACY_ALIGN;
        let Ok(first) = u32::try_from(config.descriptors / page) else {
            return Err(TransportError::NotADevice { expected: "a ring below 2^44", found: config.descriptors });
        };
        self.write(LEGACY_PAGE_SIZE, page as u32)?;
        self.write(QUEUE_SIZE, config.size.into())?;
        self.write(LEGACY_QUEUE_ALIGN, page as u32)?;
        self.write(LEGACY_QUEUE_PAGE, first)
    }

    /// How many words of features there are.
    fn words(&self) -> u32 {
        if self.legacy { 1 } else { Features::WORDS }
    }
}

impl<G: Registers + 'static> Transport for Driver<G> {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn is_legacy(&self) -> bool {
        self.legacy
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        let mut features = Features::empty();
        for word in 0..self.words() {
            self.write(DEVICE_FEATURES_SEL, word)?;
            features = features.with_word(word, self.read(DEVICE_FEATURES)?);
        }
        Ok(features)
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        for word in 0..self.words() {
            self.write(DRIVER_FEATURES_SEL, word)?;
            self.write(DRIVER_FEATURES, features.word(word))?;
        }
        self.features = features;
        Ok(())
    }

    fn status(&mut self) -> Result<Status, TransportError> {
        Ok(Status::from_bits_retain(self.read(STATUS)? as u8))
    }

    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        self.write(STATUS, status.bits().into())
    }

    fn begin_reset(&mut self) -> Result<(), TransportError> {
        self.write(STATUS, 0)
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        let done = self.read(STATUS)? == 0;
        if done {
            self.features = Features::empty();
            self.resetting.clear();
            self.queues.clear();
        }
        Ok(done)
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        if self.legacy { Ok(0) } else { self.read(CONFIG_GENERATION) }
    }

    /// Reads one field: 2, 4 or 8 bytes at a multiple of that are a number, anything else is an array of bytes.
    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        let (width, mut address) = (width(offset, data.len()), self.place.base + CONFIG + u64::from(offset));
        for part in data.chunks_mut(width) {
            self.guest.load(address, part)?;
            address += width as u64;
        }
        Ok(())
    }

    /// Writes one field, as [`Driver::read_config`] reads it.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        let (width, mut address) = (width(offset, data.len()), self.place.base + CONFIG + u64::from(offset));
        for part in data.chunks(width) {
            self.guest.store(address, part)?;
            address += width as u64;
        }
        Ok(())
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        self.select(index)?;
        Ok(self.read(QUEUE_SIZE_MAX)?.min(MAX_QUEUE_SIZE.into()) as u16)
    }

    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError> {
        self.select(index)?;
        let in_use = if self.legacy { LEGACY_QUEUE_PAGE } else { QUEUE_READY };
        self.expect(in_use, 0, "a queue that is not in use")?;
        let max = self.queue_max_size(index)?;
        if max == 0 {
            return Err(TransportError::NoQueue(index));
        }
        let areas = match self.legacy {
            false => Areas::allocate(&self.share(), index, size, max, self.features)?,
            true => Areas::contiguous(&self.share(), index, size.unwrap_or(max), max, self.features)?,
        };
        // Kept from here on: if enabling fails half-way, only a reset makes sure that the device is off the memory.
        let areas = self.queues.entry(index).insert_entry(areas).into_mut();
        let (config, doorbell) = (*areas.config(), self.place.base + QUEUE_NOTIFY);
        let tells_next = self.features.contains(Features::NOTIFICATION_DATA);
        let notify = Box::new(Doorbell { guest: self.guest.clone(), address: doorbell, queue: index, tells_next });
        let virtqueue = areas.virtqueue(notify);
        if self.legacy {
            self.configure_legacy(&config)?
        } else {
            self.configure(&config)?
        }
        Ok(virtqueue)
    }

    fn begin_vq_reset(&mut self, index: u16) -> Result<(), TransportError> {
        if self.legacy || !self.features.contains(Features::RING_RESET) {
            return Err(TransportError::Unsupported("queue reset (VIRTIO_F_RING_RESET was not negotiated)"));
        }
        self.select(index)?;
        self.write(QUEUE_RESET, 1)?;
        self.resetting.insert(index);
        Ok(())
    }

    fn poll_vq_reset(&mut self, index: u16) -> Result<bool, TransportError> {
        if !self.resetting.contains(&index) {
            return Ok(!self.queues.contains_key(&index));
        }
        if self.selected != index {
            self.select(index)?;
        }
        let done = self.read(QUEUE_RESET)? == 0;
        if done {
            self.resetting.remove(&index);
            self.queues.remove(&index);
        }
        Ok(done)
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        if !self.guest.take(self.place.line)? {
            return Ok(Interrupts::default());
        }
        let status = self.read(INTERRUPT_STATUS)? & (USED_BUFFER | CONFIG_CHANGE);
        if status != 0 {
            self.write(INTERRUPT_ACK, status)?;
        }
        // It does not tell which.
        let queues = if status & USED_BUFFER != 0 { QueueSet::ALL } else { QueueSet::NONE };
        Ok(Interrupts { queues, config: status & CONFIG_CHANGE != 0 })
    }

    fn share(&self) -> Arc<dyn Share> {
        self.guest.clone()
    }
}

impl<G: Registers + WaitForInterrupt + 'static> BlockingTransport for Driver<G> {
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError> {
        Ok(self.guest.wait(&[self.place.line], most)?)
    }

    fn pause(&mut self, time: Duration) -> Result<(), TransportError> {
        self.guest.wait(&[], time)?;
        Ok(())
    }
}

impl<G: Registers + WakeOnInterrupt + 'static> WakingTransport for Driver<G> {
    fn wake_on_interrupt(&mut self, waker: &Waker) -> Result<(), TransportError> {
        Ok(self.guest.wake_on(&[self.place.line], waker)?)
    }
}

impl<G: Registers + 'static> Drop for Driver<G> {
    fn drop(&mut self) {
        if self.queues.is_empty() {
            return;
        }
        let reset = try_reset(self);
        if reset != Ok(true) {
            // Better lost than given to someone else while the device writes to it.
            tracing::warn!(?reset, "the device may still use its rings: their memory is not taken back");
            core::mem::forget(core::mem::take(&mut self.queues));
        }
    }
}

/// The register QueueNotify.
struct Doorbell<G> {
    guest: Arc<G>,
    address: u64,
    queue: u16,
    /// Whether VIRTIO_F_NOTIFICATION_DATA was accepted: then the register takes more than the queue.
    tells_next: bool,
}

impl<G: Registers> Notify for Doorbell<G> {
    fn notify(&mut self) -> Result<(), TransportError> {
        Ok(self.guest.notify(self.address, self.queue.into())?)
    }

    fn notify_at(&mut self, next: u16) -> Result<(), TransportError> {
        let next = if self.tells_next { u32::from(next) << 16 } else { 0 };
        Ok(self.guest.notify(self.address, next | u32::from(self.queue))?)
    }
}

/// How wide the accesses to a field of the configuration are (4.2.2.2): its own width, at most 32 bits.
fn width(offset: u32, len: usize) -> usize {
    let aligned = |width| offset.is_multiple_of(width);
    match len {
        2 if aligned(2) => 2,
        4 | 8 if aligned(4) => 4,
        _ => 1,
    }
}
