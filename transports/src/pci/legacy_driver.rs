//! The guest's side of the legacy interface: a driver's transport over ports, as in the paper.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::task::Waker;
use core::time::Duration;

use polyvirt_core::hypervisor::{Share, WaitForInterrupt, WakeOnInterrupt};
use polyvirt_core::queue::{MAX_QUEUE_SIZE, QueueError};
use polyvirt_core::transport::{
    BlockingTransport, Interrupts, Notify, Transport, TransportError, Virtqueue, WakingTransport, try_reset,
};
use polyvirt_core::{Features, Status};

use super::bus::Functions;
use super::function::{Function, Signalling, width};
use super::registers::legacy::*;
use super::registers::{DEVICE_ID, GuestPlace, MODERN_ID, REVISION_ID, Space};
use crate::areas::Areas;

/// The driver side, connected to the legacy interface of the function at a place.
///
/// Dropping it while queues are in use resets the device, so that their memory can return to the guest; not that of a device
/// which takes its time, for which a caller waits before.
pub struct LegacyDriver<G: Functions + 'static> {
    function: Function<G>,
    device_type: u32,
    /// The first port.
    base: u64,
    features: Features,
    /// Whether a reset was begun.
    resetting: bool,
    /// The rings that the device may use.
    queues: BTreeMap<u16, Areas>,
}

impl<G: Functions + 'static> LegacyDriver<G> {
    /// Meets the device at `place`, or says why there is none; it interrupts as `signalling` says.
    pub fn connect(guest: Arc<G>, place: GuestPlace, signalling: Signalling) -> Result<Self, TransportError> {
        let found = Function { guest: Arc::clone(&guest), place, vectors: 0 };
        let device_type = found.device_type()?;
        let (id, revision) = (found.config().u16(DEVICE_ID)?, found.config().u8(REVISION_ID)?);
        if id >= MODERN_ID {
            return Err(TransportError::NotADevice { expected: "an id from 0x1000 to 0x103f", found: id.into() });
        }
        if revision != 0 {
            return Err(TransportError::NotADevice { expected: "revision 0", found: revision.into() });
        }
        let Some((Space::Io, base)) = found.config().bar(0)? else {
            return Err(TransportError::NotADevice { expected: "ports in the first region", found: id.into() });
        };
        let function = Function::new(guest, place, signalling)?;
        Ok(Self { function, device_type, base, features: Features::empty(), resetting: false, queues: BTreeMap::new() })
    }

    fn read<const N: usize>(&self, register: u64) -> Result<[u8; N], TransportError> {
        let mut data = [0; N];
        self.function.guest.load(Space::Io, self.base + register, &mut data)?;
        Ok(data)
    }

    fn write<const N: usize>(&self, register: u64, data: [u8; N]) -> Result<(), TransportError> {
        Ok(self.function.guest.store(Space::Io, self.base + register, &data)?)
    }

    /// Maps an event to `vector`, and makes sure that the device did.
    fn map(&self, register: u64, vector: u16) -> Result<(), TransportError> {
        if self.function.vectors == 0 {
            return Ok(());
        }
        self.write(register, vector.to_le_bytes())?;
        match u16::from_le_bytes(self.read(register)?) {
            mapped if mapped == vector => Ok(()),
            mapped => Err(TransportError::NotADevice { expected: "the vector that was mapped", found: mapped.into() }),
        }
    }

    /// Where a field of the device configuration is.
    fn config_at(&self, offset: u32) -> u64 {
        self.base + config(self.function.vectors > 0) + u64::from(offset)
    }
}

impl<G: Functions + 'static> Transport for LegacyDriver<G> {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn is_legacy(&self) -> bool {
        true
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        let features = self.read(DEVICE_FEATURES).map(u32::from_le_bytes)?;
        Ok(Features::from_bits_retain(features.into()))
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        self.write(DRIVER_FEATURES, features.word(0).to_le_bytes())?;
        self.features = Features::from_bits_retain(features.word(0).into());
        self.map(CONFIG_VECTOR, Function::<G>::CONFIG_VECTOR)
    }

    fn status(&mut self) -> Result<Status, TransportError> {
        let [status] = self.read(DEVICE_STATUS)?;
        Ok(Status::from_bits_retain(status))
    }

    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        self.write(DEVICE_STATUS, [status.bits()])
    }

    fn begin_reset(&mut self) -> Result<(), TransportError> {
        self.write(DEVICE_STATUS, [0])?;
        self.resetting = true;
        Ok(())
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        if !core::mem::take(&mut self.resetting) {
            return Ok(self.queues.is_empty());
        }
        // Whoever reads it has waited for the write; no legacy device is slower.
        self.status()?;
        self.features = Features::empty();
        self.queues.clear();
        Ok(true)
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        Ok(0)
    }

    /// Reads one field: 2, 4 or 8 bytes at a multiple of that are a number, anything else is an array of bytes.
    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        let (width, mut port) = (width(offset, data.len()), self.config_at(offset));
        for part in data.chunks_mut(width) {
            self.function.guest.load(Space::Io, port, part)?;
            port += width as u64;
        }
        Ok(())
    }

    /// Writes one field, as [`LegacyDriver::read_config`] reads it.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        let (width, mut port) = (width(offset, data.len()), self.config_at(offset));
        for part in data.chunks(width) {
            self.function.guest.store(Space::Io, port, part)?;
            port += width as u64;
        }
        Ok(())
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        self.write(QUEUE_SELECT, index.to_le_bytes())?;
        Ok(u16::from_le_bytes(self.read(QUEUE_SIZE)?).min(MAX_QUEUE_SIZE))
    }

    /// The device chooses the size: `size` must be none, or the device's.
    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError> {
        let max = self.queue_max_size(index)?;
        if max == 0 {
            return Err(TransportError::NoQueue(index));
        }
        match self.read(QUEUE_ADDRESS).map(u32::from_le_bytes)? {
            0 => {}
            found => {
                return Err(TransportError::NotADevice { expected: "a queue that is not in use", found: found.into() });
            }
        }
        if let Some(size) = size
            && size != max
        {
            return Err(TransportError::Queue { index, reason: QueueError::Size { size: size.into(), max } });
        }
        let areas = Areas::contiguous(&self.share(), index, max, max, self.features)?;
        let address = areas.config().descriptors;
        let Ok(page) = u32::try_from(address / PAGE) else {
            return Err(TransportError::NotADevice { expected: "a ring below 2^44", found: address });
        };
        // Kept from here on: if placing fails half-way, only a reset makes sure that the device is off the memory.
        let areas = self.queues.entry(index).insert_entry(areas).into_mut();
        let port = self.base + QUEUE_NOTIFY;
        let notify = Box::new(Doorbell { guest: Arc::clone(&self.function.guest), port, queue: index });
        let virtqueue = areas.virtqueue(notify);
        self.write(QUEUE_ADDRESS, page.to_le_bytes())?;
        self.map(QUEUE_VECTOR, self.function.queue_vector(index))?;
        Ok(virtqueue)
    }

    fn begin_vq_reset(&mut self, _index: u16) -> Result<(), TransportError> {
        Err(TransportError::Unsupported("reset of a single queue"))
    }

    fn poll_vq_reset(&mut self, _index: u16) -> Result<bool, TransportError> {
        Err(TransportError::Unsupported("reset of a single queue"))
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        self.function.take_interrupts(self.queues.keys().copied(), || self.read(ISR).map(|[isr]| isr))
    }

    fn share(&self) -> Arc<dyn Share> {
        self.function.guest.clone()
    }
}

impl<G: Functions + WaitForInterrupt + 'static> BlockingTransport for LegacyDriver<G> {
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError> {
        Ok(self.function.guest.wait(&self.function.lines(), most)?)
    }

    fn pause(&mut self, time: Duration) -> Result<(), TransportError> {
        self.function.guest.wait(&[], time)?;
        Ok(())
    }
}

impl<G: Functions + WakeOnInterrupt + 'static> WakingTransport for LegacyDriver<G> {
    fn wake_on_interrupt(&mut self, waker: &Waker) -> Result<(), TransportError> {
        Ok(self.function.guest.wake_on(&self.function.lines(), waker)?)
    }
}

impl<G: Functions + 'static> Drop for LegacyDriver<G> {
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

/// The notify register.
struct Doorbell<G> {
    guest: Arc<G>,
    port: u64,
    queue: u16,
}

impl<G: Functions> Notify for Doorbell<G> {
    fn notify(&mut self) -> Result<(), TransportError> {
        Ok(self.guest.store(Space::Io, self.port, &self.queue.to_le_bytes())?)
    }
}
