//! A device that the case plays, for cases about what the ordinary drivers of devices ask for: every request is answered at
//! once, and kept. The real device behind the transport never gets DRIVER_OK.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polyvirt_core::hypervisor::{HypervisorError, Share};
use polyvirt_core::memory::{Access, Pages};
use polyvirt_core::transport::{BlockingTransport, Interrupts, Notify, Transport, TransportError, Virtqueue};
use polyvirt_core::{Features, Status};

use crate::raw::{Descriptor, Made, Ring, WRITE};
use crate::suite::{BLK, CONSOLE, Objection, Recorded, Trace};

/// The driver side of a transport, with a device that the case plays.
pub struct Played {
    inner: Recorded,
    hidden: Features,
    play: Play,
}

/// What the device was asked.
#[derive(Clone)]
pub struct Play(Arc<Mutex<Scene>>);

struct Scene {
    device_type: u32,
    rings: Vec<Ring>,
    /// What the driver shares, and where.
    shared: Vec<(u64, Pages)>,
    /// The newest chain, by queue.
    newest: Vec<(u16, Result<Vec<Descriptor>, Objection>)>,
}

impl Played {
    /// In place of `inner`, without offering `hidden`.
    pub fn new(inner: Recorded, hidden: Features) -> (Self, Play) {
        let (device_type, rings, shared, newest) = (inner.device_type(), Vec::new(), Vec::new(), Vec::new());
        let play = Play(Arc::new(Mutex::new(Scene { device_type, rings, shared, newest })));
        (Self { inner, hidden, play: play.clone() }, play)
    }
}

impl Play {
    fn scene(&self) -> MutexGuard<'_, Scene> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chain that queue `index` was given last.
    pub fn newest(&self, index: u16) -> Result<Vec<Descriptor>, Objection> {
        let scene = self.scene();
        let newest = scene.newest.iter().rev().find(|(queue, _)| *queue == index);
        newest
            .map_or_else(|| Err(Objection::failed("a request", format!("none in queue {index}"))), |(_, it)| it.clone())
    }

    /// What the driver shows at `address`.
    pub fn bytes<const N: usize>(&self, address: u64) -> Result<[u8; N], Objection> {
        let scene = self.scene();
        let mut bytes = [0; N];
        let read = scene.find(address, N).is_some_and(|(pages, offset)| pages.read(offset, &mut bytes).is_ok());
        match read {
            true => Ok(bytes),
            false => Err(Objection::failed("memory that the driver shared", format!("{address:#x}+{N:#x}"))),
        }
    }
}

impl Scene {
    fn find(&self, address: u64, len: usize) -> Option<(&Pages, usize)> {
        let inside = |(start, pages): &&(u64, Pages)| {
            address >= *start && address.saturating_add(len as u64) <= start.saturating_add(pages.len() as u64)
        };
        self.shared.iter().find(inside).map(|(start, pages)| (pages, (address - start) as usize))
    }

    /// Answers what queue `index` was given.
    fn serve(&mut self, index: u16) {
        let Some(at) = self.rings.iter().rposition(|ring| ring.index == index) else { return };
        loop {
            let made = match self.rings[at].next_chain() {
                Ok(Some(made)) => made,
                Ok(None) => break,
                Err(objection) => {
                    self.newest.push((index, Err(objection)));
                    break;
                }
            };
            let Made { id, chain } = made;
            if let Some(len) = self.answer(index, &chain) {
                self.rings[at].put_used_quietly(id.into(), len);
            }
            self.newest.retain(|(queue, _)| *queue != index);
            self.newest.push((index, Ok(chain)));
        }
        if self.rings[at].config.event_idx {
            self.rings[at].ask_for_kick_after(0);
        }
    }

    /// The used length of the answer to `chain`; none if the device keeps it.
    fn answer(&self, index: u16, chain: &[Descriptor]) -> Option<u32> {
        let writable = chain.iter().filter(|piece| piece.flags & WRITE != 0);
        if self.device_type == CONSOLE && index == 0 {
            return None;
        }
        if self.device_type == BLK
            && let Some(status) = writable.clone().next_back()
            && let Some((pages, offset)) = self.find(status.address + u64::from(status.len.max(1)) - 1, 1)
        {
            // What cannot be written, the driver never shared: it misses the answer.
            let _ = pages.write(offset, &[0]);
        }
        Some(writable.map(|piece| piece.len).sum())
    }
}

impl Transport for Played {
    fn device_type(&self) -> u32 {
        self.inner.device_type()
    }

    fn is_legacy(&self) -> bool {
        self.inner.is_legacy()
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        Ok(self.inner.device_features()?.difference(self.hidden))
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        self.inner.set_driver_features(features)
    }

    fn status(&mut self) -> Result<Status, TransportError> {
        self.inner.status()
    }

    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        self.inner.set_status(status.difference(Status::DRIVER_OK))
    }

    fn begin_reset(&mut self) -> Result<(), TransportError> {
        self.inner.begin_reset()
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        self.inner.poll_reset()
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        self.inner.config_generation()
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        self.inner.read_config(offset, data)
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        self.inner.write_config(offset, data)
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        self.inner.queue_max_size(index)
    }

    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError> {
        let Virtqueue { config, descriptors, driver, device, notify } = self.inner.find_vq(index, size)?;
        let copy = Virtqueue {
            config,
            descriptors: descriptors.clone(),
            driver: driver.clone(),
            device: device.clone(),
            notify: Box::new(Deaf) as Box<dyn Notify>,
        };
        // A ring that the driver has not touched yet has nothing to lose; one that cannot be seen is not played.
        Ring::new(copy, index, Trace::default()).into_iter().for_each(|ring| self.play.scene().rings.push(ring));
        let notify = Box::new(Doorbell { inner: notify, index, play: self.play.clone() });
        Ok(Virtqueue { config, descriptors, driver, device, notify })
    }

    fn begin_vq_reset(&mut self, index: u16) -> Result<(), TransportError> {
        self.inner.begin_vq_reset(index)
    }

    fn poll_vq_reset(&mut self, index: u16) -> Result<bool, TransportError> {
        self.inner.poll_vq_reset(index)
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        self.inner.take_interrupts()
    }

    fn share(&self) -> Arc<dyn Share> {
        Arc::new(Shares { inner: self.inner.share(), play: self.play.clone() })
    }
}

impl BlockingTransport for Played {
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError> {
        self.inner.sleep(most)
    }

    fn pause(&mut self, time: Duration) -> Result<(), TransportError> {
        self.inner.pause(time)
    }
}

/// A doorbell at which the played device answers.
struct Doorbell {
    inner: Box<dyn Notify>,
    index: u16,
    play: Play,
}

impl Notify for Doorbell {
    fn notify(&mut self) -> Result<(), TransportError> {
        self.inner.notify()?;
        self.play.scene().serve(self.index);
        Ok(())
    }

    fn notify_at(&mut self, next: u16) -> Result<(), TransportError> {
        self.inner.notify_at(next)?;
        self.play.scene().serve(self.index);
        Ok(())
    }
}

/// A doorbell that does nothing: for a ring in the device's place.
struct Deaf;

impl Notify for Deaf {
    fn notify(&mut self) -> Result<(), TransportError> {
        Ok(())
    }
}

/// Remembers what is shared, and where.
struct Shares {
    inner: Arc<dyn Share>,
    play: Play,
}

impl Share for Shares {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        self.inner.allocate(len)
    }

    fn share(&self, pages: &Pages, access: Access) -> Result<u64, HypervisorError> {
        let address = self.inner.share(pages, access)?;
        self.play.scene().shared.push((address, pages.clone()));
        Ok(address)
    }

    fn unshare(&self, address: u64) -> Result<(), HypervisorError> {
        self.play.scene().shared.retain(|(start, _)| *start != address);
        self.inner.unshare(address)
    }
}
