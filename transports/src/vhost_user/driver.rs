//! The guest's side: a driver's transport over a socket. It is guest and VMM at once.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use polyvirt_core::hypervisor::{HypervisorError, Share};
use polyvirt_core::transport::{BlockingTransport, Interrupts, Notify, QueueSet, Transport, TransportError, Virtqueue};
use polyvirt_core::{Features, Status};

use super::events::{Bell, take};
use super::iommu::Iommu;
use super::link::{Link, refused};
use super::messages::*;
use super::session::{Dial, Guest, Options, Session, event};
use crate::areas::Areas;

/// Entries of a queue at most. The protocol has no way to ask; this is what every back end takes.
const QUEUE_SIZE: u16 = 256;
/// How often a back end that keeps no status is asked whether it is still there.
const PROBE: Duration = Duration::from_millis(100);
/// The driver side, connected to a back end.
///
/// The protocol is a conversation: what needs an answer of the back end waits for it, at most so long. What [`Transport`]
/// promises holds for the doorbells and for [`Transport::take_interrupts`].
///
/// What the protocol leaves to the VMM is done here: the device status, if the back end does not want it, and a queue is
/// handed over when the driver is ready. If the back end closes the connection, the device needs a reset, and that
/// connects again.
pub struct Driver {
    dial: Dial,
    device_type: u32,
    guest: Guest,
    options: Options,
    iommu: Option<Arc<Iommu>>,
    session: Session,
    accepted: Features,
    status: Status,
    queues: BTreeMap<u16, Queue>,
}

struct Queue {
    areas: Areas,
    kick: EventFd,
    /// The same, which the back end cannot hold up.
    bell: Arc<Bell>,
    call: EventFd,
    error: EventFd,
    /// Whether the back end has it.
    started: bool,
}

impl Queue {
    fn doorbell(&self, index: u16, by_message: Option<Arc<Link>>) -> Doorbell {
        Doorbell { bell: Arc::clone(&self.bell), by_message, index }
    }
}

impl Driver {
    /// Connects to the back end behind `dial`, which is of `device_type`: the protocol does not tell.
    pub fn connect(dial: Dial, device_type: u32, mut guest: Guest, options: Options) -> Result<Self, TransportError> {
        let iommu = options.iommu.then(|| Arc::new(Iommu::new(guest.share.clone())));
        if let Some(iommu) = &iommu {
            guest.share = iommu.clone();
        }
        let session = Session::open(&dial, &guest, options, iommu.clone())?;
        Ok(Self {
            dial,
            device_type,
            guest,
            options,
            iommu,
            session,
            accepted: Features::empty(),
            status: Status::empty(),
            queues: BTreeMap::new(),
        })
    }

    /// The protocol features negotiated.
    pub const fn protocol(&self) -> ProtocolFeatures {
        self.session.protocol
    }

    fn has(&self, feature: ProtocolFeatures) -> bool {
        self.session.protocol.contains(feature)
    }

    fn tell(&self, request: Request, payload: &impl Payload) -> Result<(), TransportError> {
        self.session.link.tell(request, &payload.to_bytes(), &[])
    }

    fn acceptable(&self) -> bool {
        let offered = self.session.features();
        offered.contains(self.accepted) && self.accepted.contains(Features::VERSION_1)
    }

    /// Whether kicks and calls are messages.
    fn in_band(&self) -> bool {
        self.has(ProtocolFeatures::INBAND_NOTIFICATIONS | ProtocolFeatures::BACKEND_REQ)
    }

    /// Hands queue `index` over.
    fn start(&mut self, index: u16) -> Result<(), TransportError> {
        let link = Arc::clone(&self.session.link);
        let in_band = self.in_band();
        let user = |address| self.guest.user(address, self.accepted);
        let Some(queue) = self.queues.get(&index) else { return Err(TransportError::NoQueue(index)) };
        let config = queue.areas.config();
        let number = u32::from(index);
        let state = |num| VringState { index: number, num }.to_bytes();
        let base = if self.accepted.contains(Features::RING_PACKED) { 0x8000_8000 } else { 0 };
        let addresses = VringAddr {
            index: number,
            flags: 0,
            descriptors: user(config.descriptors)?,
            available: user(config.driver)?,
            used: user(config.device)?,
            log: 0,
        };
        link.tell(Request::SetVringNum, &state(config.size.into()), &[])?;
        link.tell(Request::SetVringBase, &state(base), &[])?;
        link.tell(Request::SetVringAddr, &addresses.to_bytes(), &[])?;
        let which = u64::from(index).to_bytes();
        link.tell(Request::SetVringErr, &which, &[queue.error.as_fd()])?;
        if !in_band {
            link.tell(Request::SetVringCall, &which, &[queue.call.as_fd()])?;
            // Some call as soon as they can, in case a call of the session before was lost. It is about nothing here.
            let _ = take(queue.call.as_fd());
            link.tell(Request::SetVringKick, &which, &[queue.kick.as_fd()])?;
        }
        if self.session.offered & PROTOCOL_FEATURES != 0 {
            link.tell(Request::SetVringEnable, &state(1), &[])?;
        }
        if !self.has(ProtocolFeatures::REPLY_ACK) {
            // Whatever is answered now, the queue runs: a kick comes after that.
            link.ask_for::<u64>(Request::GetFeatures, &[])?;
        }
        if let Some(queue) = self.queues.get_mut(&index) {
            queue.started = true;
            // A back end may begin with a queue only when it is kicked. For what was made available before now, the
            // driver kicked nobody.
            if queue.areas.has_available() {
                queue.doorbell(index, in_band.then_some(link)).notify()?;
            }
        }
        Ok(())
    }

    /// Takes queue `index` back: where the back end was in it.
    fn stop(&mut self, index: u16) -> Result<u32, TransportError> {
        let Some(queue) = self.queues.get_mut(&index) else { return Err(TransportError::NoQueue(index)) };
        queue.started = false;
        let state = VringState { index: index.into(), num: 0 };
        Ok(self.session.link.ask_for::<VringState>(Request::GetVringBase, &state.to_bytes())?.num)
    }

    /// Takes all queues back and resets the device, as far as the back end can.
    fn give_up(&mut self) -> Result<(), TransportError> {
        let started: Vec<_> = self.queues.iter().filter(|(_, queue)| queue.started).map(|(&index, _)| index).collect();
        for index in started {
            self.stop(index)?;
        }
        if self.has(ProtocolFeatures::STATUS) {
            self.tell(Request::SetStatus, &0u64)?;
        } else if self.has(ProtocolFeatures::RESET_DEVICE) {
            self.session.link.tell(Request::ResetDevice, &[], &[])?;
        }
        Ok(())
    }

    /// Asks the back end something, no matter what: some that gave up on a queue close the connection only then.
    fn probe(&self) {
        if !self.has(ProtocolFeatures::STATUS) {
            // What comes of it shows by the connection's state.
            let _ = self.session.link.ask_for::<u64>(Request::GetFeatures, &[]);
        }
    }

    /// Whether the back end said that a queue is broken.
    fn broken(&self) -> bool {
        // The events stay: the queues stay broken.
        let mut fds: Vec<_> = self.queues.values().map(|queue| input(&queue.error)).collect();
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0)
    }
}

impl Transport for Driver {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        let offered = self.session.features();
        // Without the status there is no way to suspend.
        Ok(if self.has(ProtocolFeatures::STATUS) { offered } else { offered - Features::SUSPEND })
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        if !self.status.contains(Status::FEATURES_OK) {
            // Where the guest is is not the driver's choice.
            let platform = self.session.features() & Features::ACCESS_PLATFORM;
            self.accepted = features | if self.iommu.is_some() { platform } else { Features::empty() };
        }
        Ok(())
    }

    fn status(&mut self) -> Result<Status, TransportError> {
        if self.status.is_empty() {
            return Ok(self.status);
        }
        let link = &self.session.link;
        let mut status = self.status;
        if self.has(ProtocolFeatures::STATUS) {
            match link.ask_for::<u64>(Request::GetStatus, &[]) {
                Ok(theirs) => status = Status::from_bits_retain(theirs as u8),
                Err(TransportError::Closed) => {}
                Err(error) => return Err(error),
            }
        } else {
            self.probe();
        }
        let needs_reset = link.is_closed() || self.broken();
        Ok(status | if needs_reset { Status::DEVICE_NEEDS_RESET } else { Status::empty() })
    }

    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        let driver = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK | Status::FAILED;
        let mut status = status & (driver | Status::SUSPEND);
        if !self.acceptable() {
            status &= !Status::FEATURES_OK;
        }
        if !(self.status | status).contains(Status::FEATURES_OK) {
            status &= !Status::DRIVER_OK;
        }
        let new = status & !self.status;
        if new.contains(Status::FEATURES_OK) {
            let protocol = self.session.offered & PROTOCOL_FEATURES;
            self.tell(Request::SetFeatures, &(self.accepted.bits() as u64 | protocol))?;
        }
        if new.contains(Status::DRIVER_OK) {
            let queues: Vec<_> = self.queues.keys().copied().collect();
            for index in queues {
                self.start(index)?;
            }
        }
        if new.contains(Status::FAILED) && !self.has(ProtocolFeatures::STATUS) {
            self.give_up()?;
        }
        self.status |= status & driver;
        if self.has(ProtocolFeatures::STATUS) {
            self.tell(Request::SetStatus, &u64::from((self.status | status).bits()))?;
        }
        Ok(())
    }

    /// The back end answers; it is done when this returns.
    fn begin_reset(&mut self) -> Result<(), TransportError> {
        let done = if self.session.link.is_closed() { Err(TransportError::Closed) } else { self.give_up() };
        match done {
            Err(TransportError::Closed) => {
                self.session = Session::open(&self.dial, &self.guest, self.options, self.iommu.clone())?
            }
            done => done?,
        }
        let news = &self.session.news;
        news.called.store(0, Ordering::Release);
        news.config.store(false, Ordering::Release);
        (self.accepted, self.status) = (Features::empty(), Status::empty());
        self.queues.clear();
        Ok(())
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        Ok(self.queues.is_empty())
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        Ok(self.session.news.generation.load(Ordering::Acquire))
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        if !self.has(ProtocolFeatures::CONFIG) {
            return Err(TransportError::Unsupported("device configuration (CONFIG was not negotiated)"));
        }
        // From the beginning on, as all front ends do: not every back end heeds the offset.
        let (from, to) = (offset as usize, offset as usize + data.len());
        if to > CONFIG_MAX {
            return Err(refused(Request::GetConfig, format!("{offset}+{}, at most {CONFIG_MAX} bytes", data.len())));
        }
        let area = ConfigArea { offset: 0, size: to as u32, flags: 0 };
        let payload = [area.to_bytes(), vec![0; to]].concat();
        let answer = self.session.link.ask(Request::GetConfig, &payload, &[])?.payload;
        if answer.len() != payload.len() {
            let reason = format!("{} bytes, expected {}", answer.len(), payload.len());
            return Err(refused(Request::GetConfig, reason));
        }
        data.copy_from_slice(&answer[ConfigArea::LEN + from..]);
        Ok(())
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        if !self.has(ProtocolFeatures::CONFIG) {
            return Err(TransportError::Unsupported("device configuration (CONFIG was not negotiated)"));
        }
        let area = ConfigArea { offset, size: data.len() as u32, flags: 0 };
        self.session.link.tell(Request::SetConfig, &[&area.to_bytes(), data].concat(), &[])
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        Ok(if index < self.session.queues { QUEUE_SIZE } else { 0 })
    }

    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError> {
        let max = self.queue_max_size(index)?;
        if max == 0 {
            return Err(TransportError::NoQueue(index));
        }
        if self.queues.contains_key(&index) {
            return Err(TransportError::NotADevice { expected: "a queue that is not in use", found: 1 });
        }
        let areas = Areas::allocate(&self.guest.share, index, size, max, self.accepted)?;
        let (kick, call, error) = (event()?, event()?, event()?);
        let refused = |error: String| HypervisorError::Refused { call: "eventfd", reason: error };
        let copy = kick.as_fd().try_clone_to_owned().map_err(|error| refused(error.to_string()))?;
        let bell = Arc::new(Bell::new(copy).map_err(|error| refused(error.to_string()))?);
        let queue = Queue { areas, kick, bell, call, error, started: false };
        let by_message = self.in_band().then(|| Arc::clone(&self.session.link));
        let virtqueue = queue.areas.virtqueue(Box::new(queue.doorbell(index, by_message)));
        self.queues.insert(index, queue);
        if self.status.contains(Status::DRIVER_OK) {
            self.start(index)?;
        }
        Ok(virtqueue)
    }

    fn begin_vq_reset(&mut self, index: u16) -> Result<(), TransportError> {
        if !self.accepted.contains(Features::RING_RESET) {
            return Err(TransportError::Unsupported("queue reset (VIRTIO_F_RING_RESET was not negotiated)"));
        }
        if self.queues.get(&index).is_some_and(|queue| queue.started) {
            self.stop(index)?;
        }
        self.queues.remove(&index);
        Ok(())
    }

    fn poll_vq_reset(&mut self, index: u16) -> Result<bool, TransportError> {
        Ok(!self.queues.contains_key(&index))
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        let news = &self.session.news;
        let broken =
            !self.status.contains(Status::DEVICE_NEEDS_RESET) && (self.session.link.is_closed() || self.broken());
        // Not what a poll says, but what is taken: an event may come in between.
        let mut called = QueueSet::NONE;
        for (&index, queue) in &self.queues {
            if take(queue.call.as_fd()) == Ok(true) {
                called |= QueueSet::of(index);
            }
        }
        let _ = news.event.read();
        let interrupts = Interrupts {
            queues: QueueSet::from_bits(news.called.swap(0, Ordering::AcqRel)) | called,
            config: news.config.swap(false, Ordering::AcqRel) || broken,
        };
        if broken {
            // Told once; the status goes on telling.
            self.status |= Status::DEVICE_NEEDS_RESET;
        }
        Ok(interrupts)
    }

    fn share(&self) -> Arc<dyn Share> {
        self.guest.share.clone()
    }
}

impl BlockingTransport for Driver {
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError> {
        let begun = Instant::now();
        loop {
            let mut fds = vec![input(&self.session.news.event)];
            fds.extend(self.queues.values().map(|queue| input(&queue.call)));
            if !self.status.contains(Status::DEVICE_NEEDS_RESET) {
                fds.extend(self.queues.values().map(|queue| input(&queue.error)));
                fds.push(self.session.link.hang_up());
            }
            let left = most.saturating_sub(begun.elapsed());
            let timeout = PollTimeout::try_from(left.min(PROBE)).unwrap_or(PollTimeout::MAX);
            let _ = poll(&mut fds, timeout);
            if fds.iter().any(|fd| fd.any().unwrap_or(false)) {
                return Ok(true);
            }
            if begun.elapsed() >= most {
                return Ok(false);
            }
            self.probe();
        }
    }

    fn pause(&mut self, time: Duration) -> Result<(), TransportError> {
        std::thread::sleep(time);
        Ok(())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // A back end that is gone, or does not answer, has nothing mapped but what the regions' files keep.
        if !self.queues.is_empty()
            && let Err(error) = self.give_up()
        {
            tracing::debug!(%error, "the back end was not stopped");
        }
    }
}

/// A queue's doorbell.
struct Doorbell {
    bell: Arc<Bell>,
    by_message: Option<Arc<Link>>,
    index: u16,
}

impl Notify for Doorbell {
    fn notify(&mut self) -> Result<(), TransportError> {
        if let Some(link) = &self.by_message {
            let state = VringState { index: self.index.into(), num: 0 };
            return link.tell(Request::VringKick, &state.to_bytes(), &[]);
        }
        self.bell.ring();
        Ok(())
    }
}

fn input(event: &EventFd) -> PollFd<'_> {
    PollFd::new(event.as_fd(), PollFlags::POLLIN)
}
