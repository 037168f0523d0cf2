//! The guest's side of the modern interface: a driver's transport over the structures that capabilities lead to.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use core::task::Waker;
use core::time::Duration;

use polyvirt_core::hypervisor::{Share, WaitForInterrupt, WakeOnInterrupt};
use polyvirt_core::queue::{MAX_QUEUE_SIZE, QueueConfig};
use polyvirt_core::transport::{
    BlockingTransport, Interrupts, Notify, Transport, TransportError, Virtqueue, WakingTransport, try_reset,
};
use polyvirt_core::{Features, Status};

use super::bus::Functions;
use super::function::{Function, Region, Signalling, width};
use super::registers::*;
use crate::areas::Areas;

/// The driver side, connected to the modern interface of the function at a place.
///
/// Dropping it while queues are in use resets the device, so that their memory can return to the guest; not that of a device
/// which takes its time, for which a caller waits before.
pub struct Driver<G: Functions + 'static> {
    function: Function<G>,
    device_type: u32,
    common: Region,
    notify: Region,
    multiplier: u32,
    isr: Region,
    device: Option<Region>,
    features: Features,
    /// The queue whose registers are seen.
    selected: u16,
    /// The queues whose reset was begun.
    resetting: BTreeSet<u16>,
    /// The rings that the device may use.
    queues: BTreeMap<u16, Areas>,
}

impl<G: Functions + 'static> Driver<G> {
    /// Meets the device at `place`, or says why there is none; it interrupts as `signalling` says.
    pub fn connect(guest: Arc<G>, place: GuestPlace, signalling: Signalling) -> Result<Self, TransportError> {
        let found = Function { guest: Arc::clone(&guest), place, vectors: 0 };
        let device_type = found.device_type()?;
        let missing = |expected| move || TransportError::NotADevice { expected, found: u64::from(place.function) };
        let (common, _) = structure(&found, CAP_COMMON, common::LEN as u64 - 8)?
            .ok_or_else(missing("a capability of the common configuration"))?;
        let (notify, at) = structure(&found, CAP_NOTIFY, 2)?.ok_or_else(missing("a notification capability"))?;
        let multiplier = found.config().u32(at + CAP_MULTIPLIER)?;
        let (isr, _) = structure(&found, CAP_ISR, 1)?.ok_or_else(missing("a capability of the interrupt status"))?;
        let device = structure(&found, CAP_DEVICE, 1)?.map(|(region, _)| region);
        let function = Function::new(guest, place, signalling)?;
        let (features, queues) = (Features::empty(), BTreeMap::new());
        Ok(Self {
            function,
            device_type,
            common,
            notify,
            multiplier,
            isr,
            device,
            features,
            selected: 0,
            resetting: BTreeSet::new(),
            queues,
        })
    }

    /// What the driver talks through.
    pub fn guest(&self) -> &Arc<G> {
        &self.function.guest
    }

    fn read<const N: usize>(&self, register: u64) -> Result<[u8; N], TransportError> {
        let mut data = [0; N];
        self.function.guest.load(self.common.space, self.common.at(register, N as u64)?, &mut data)?;
        Ok(data)
    }

    fn write<const N: usize>(&self, register: u64, data: [u8; N]) -> Result<(), TransportError> {
        Ok(self.function.guest.store(self.common.space, self.common.at(register, N as u64)?, &data)?)
    }

    fn read_u16(&self, register: u64) -> Result<u16, TransportError> {
        self.read(register).map(u16::from_le_bytes)
    }

    fn write_u16(&self, register: u64, value: u16) -> Result<(), TransportError> {
        self.write(register, value.to_le_bytes())
    }

    fn write_u32(&self, register: u64, value: u32) -> Result<(), TransportError> {
        self.write(register, value.to_le_bytes())
    }

    /// Maps an event to `vector`, and makes sure that the device did (4.1.5.1.2.2).
    fn map(&self, register: u64, vector: u16) -> Result<(), TransportError> {
        if self.function.vectors == 0 {
            return Ok(());
        }
        self.write_u16(register, vector)?;
        match self.read_u16(register)? {
            mapped if mapped == vector => Ok(()),
            mapped => Err(TransportError::NotADevice { expected: "the vector that was mapped", found: mapped.into() }),
        }
    }

    fn select(&mut self, index: u16) -> Result<(), TransportError> {
        self.selected = index;
        self.write_u16(common::QUEUE_SELECT, index)
    }

    fn configure(&self, config: &QueueConfig) -> Result<(), TransportError> {
        self.write_u16(common::QUEUE_SIZE, config.size)?;
        for (register, address) in [
            (common::QUEUE_DESC, config.descriptors),
            (common::QUEUE_DRIVER, config.driver),
            (common::QUEUE_DEVICE, config.device),
        ] {
            self.write_u32(register, address as u32)?;
            self.write_u32(register + 4, (address >> 32) as u32)?;
        }
        self.write_u16(common::QUEUE_ENABLE, 1)
    }

    /// The doorbell of the selected queue `index`.
    fn doorbell(&self, index: u16) -> Result<Doorbell<G>, TransportError> {
        let tells_next = self.features.contains(Features::NOTIFICATION_DATA);
        let offset = u64::from(self.read_u16(common::QUEUE_NOTIFY_OFF)?) * u64::from(self.multiplier);
        let address = self.notify.at(offset, if tells_next { 4 } else { 2 })?;
        let value = match self.features.contains(Features::NOTIF_CONFIG_DATA) {
            true => self.read_u16(common::QUEUE_NOTIF_CONFIG_DATA)?,
            false => index,
        };
        let (guest, space) = (Arc::clone(&self.function.guest), self.notify.space);
        Ok(Doorbell { guest, space, address, value, tells_next })
    }

    /// Each access to the device configuration of a field of `len` bytes at `offset`.
    fn config_fields(&self, offset: u32, len: usize) -> Result<(Space, u64, usize), TransportError> {
        let device = self.device.ok_or(TransportError::Unsupported("device configuration"))?;
        Ok((device.space, device.at(offset.into(), len as u64)?, width(offset, len)))
    }
}

/// The first usable structure of type `kind` and at least `len` bytes, and where its capability is (4.1.4.1).
fn structure<G: Functions>(
    function: &Function<G>,
    kind: u8,
    len: u64,
) -> Result<Option<(Region, u16)>, TransportError> {
    let config = function.config();
    for at in config.capabilities(CAP_VENDOR)? {
        // A capability that reaches beyond configuration space is none.
        if at > CONFIG_LEN as u16 - 20 || config.u8(at + CAP_TYPE)? != kind {
            continue;
        }
        let (offset, length) = (config.u32(at + CAP_OFFSET)?, config.u32(at + CAP_LENGTH)?);
        if let Some((space, base)) = config.bar(config.u8(at + CAP_BAR)?)?
            && u64::from(length) >= len
            && let Some(address) = base.checked_add(offset.into())
            && address.checked_add(length.into()).is_some()
        {
            return Ok(Some((Region { space, address, len: length.into() }, at)));
        }
    }
    Ok(None)
}

impl<G: Functions + 'static> Transport for Driver<G> {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        let mut features = Features::empty();
        for word in 0..Features::WORDS {
            self.write_u32(common::DEVICE_FEATURE_SELECT, word)?;
            features = features.with_word(word, self.read(common::DEVICE_FEATURE).map(u32::from_le_bytes)?);
        }
        Ok(features)
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        for word in 0..Features::WORDS {
            self.write_u32(common::DRIVER_FEATURE_SELECT, word)?;
            self.write_u32(common::DRIVER_FEATURE, features.word(word))?;
        }
        self.features = features;
        self.map(common::CONFIG_VECTOR, Function::<G>::CONFIG_VECTOR)
    }

    fn status(&mut self) -> Result<Status, TransportError> {
        let [status] = self.read(common::DEVICE_STATUS)?;
        Ok(Status::from_bits_retain(status))
    }

    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        self.write(common::DEVICE_STATUS, [status.bits()])
    }

    fn begin_reset(&mut self) -> Result<(), TransportError> {
        self.write(common::DEVICE_STATUS, [0])
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        let done = self.read(common::DEVICE_STATUS)? == [0];
        if done {
            self.features = Features::empty();
            self.resetting.clear();
            self.queues.clear();
        }
        Ok(done)
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        self.read(common::CONFIG_GENERATION).map(|[generation]| generation.into())
    }

    /// Reads one field: 2, 4 or 8 bytes at a multiple of that are a number, anything else is an array of bytes.
    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        let (space, mut address, width) = self.config_fields(offset, data.len())?;
        for part in data.chunks_mut(width) {
            self.function.guest.load(space, address, part)?;
            address += width as u64;
        }
        Ok(())
    }

    /// Writes one field, as [`Driver::read_config`] reads it.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        let (space, mut address, width) = self.config_fields(offset, data.len())?;
        for part in data.chunks(width) {
            self.function.guest.store(space, address, part)?;
            address += width as u64;
        }
        Ok(())
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        self.select(index)?;
        Ok(self.read_u16(common::QUEUE_SIZE)?.min(MAX_QUEUE_SIZE))
    }

    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError> {
        self.select(index)?;
        match self.read_u16(common::QUEUE_ENABLE)? {
            0 => {}
            found => {
                return Err(TransportError::NotADevice { expected: "a queue that is not in use", found: found.into() });
            }
        }
        let max = self.queue_max_size(index)?;
        if max == 0 {
            return Err(TransportError::NoQueue(index));
        }
        self.map(common::QUEUE_VECTOR, self.function.queue_vector(index))?;
        let notify = Box::new(self.doorbell(index)?);
        let areas = Areas::allocate(&self.share(), index, size, max, self.features)?;
        // Kept from here on: if enabling fails half-way, only a reset makes sure that the device is off the memory.
        let areas = self.queues.entry(index).insert_entry(areas).into_mut();
        let config = *areas.config();
        let virtqueue = areas.virtqueue(notify);
        self.configure(&config)?;
        Ok(virtqueue)
    }

    fn begin_vq_reset(&mut self, index: u16) -> Result<(), TransportError> {
        if !self.features.contains(Features::RING_RESET) {
            return Err(TransportError::Unsupported("queue reset (VIRTIO_F_RING_RESET was not negotiated)"));
        }
        self.select(index)?;
        self.write_u16(common::QUEUE_RESET, 1)?;
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
        let done = self.read_u16(common::QUEUE_RESET)? == 0;
        if done {
            self.resetting.remove(&index);
            self.queues.remove(&index);
        }
        Ok(done)
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        self.function.take_interrupts(self.queues.keys().copied(), || {
            let mut isr = [0];
            self.function.guest.load(self.isr.space, self.isr.at(0, 1)?, &mut isr)?;
            Ok(isr[0])
        })
    }

    fn share(&self) -> Arc<dyn Share> {
        self.function.guest.clone()
    }
}

impl<G: Functions + WaitForInterrupt + 'static> BlockingTransport for Driver<G> {
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError> {
        Ok(self.function.guest.wait(&self.function.lines(), most)?)
    }

    fn pause(&mut self, time: Duration) -> Result<(), TransportError> {
        self.function.guest.wait(&[], time)?;
        Ok(())
    }
}

impl<G: Functions + WakeOnInterrupt + 'static> WakingTransport for Driver<G> {
    fn wake_on_interrupt(&mut self, waker: &Waker) -> Result<(), TransportError> {
        Ok(self.function.guest.wake_on(&self.function.lines(), waker)?)
    }
}

impl<G: Functions + 'static> Drop for Driver<G> {
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

/// A queue's place in the notification structure.
struct Doorbell<G> {
    guest: Arc<G>,
    space: Space,
    address: u64,
    value: u16,
    /// Whether VIRTIO_F_NOTIFICATION_DATA was accepted: then 32 bits are written, and not 16.
    tells_next: bool,
}

impl<G: Functions> Notify for Doorbell<G> {
    fn notify(&mut self) -> Result<(), TransportError> {
        self.notify_at(0)
    }

    fn notify_at(&mut self, next: u16) -> Result<(), TransportError> {
        let data = (u32::from(next) << 16 | u32::from(self.value)).to_le_bytes();
        let len = if self.tells_next { 4 } else { 2 };
        Ok(self.guest.store(self.space, self.address, &data[..len])?)
    }
}
