//! The host's side: messages decoded into the device state machine.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::{Wake, Waker};

use nix::sys::eventfd::{EfdFlags, EventFd};
use polyvirt_core::device::Device;
use polyvirt_core::hypervisor::{Cause, Interrupt as _};
use polyvirt_core::memory::Pages;
use polyvirt_core::queue::MAX_QUEUE_SIZE;
use polyvirt_core::state::{Interface, VirtioDevice};
use polyvirt_core::{Features, Status};

use super::body::{Body, needs};
use super::calls::Calls;
use super::connection::{Connection, Message};
use super::error::ServeError;
use super::events::{self, event};
use super::log::UsedLog;
use super::map::{is_lost, map};
use super::memory::Memory;
use super::messages::*;

/// What the back end can do.
const OFFERED: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::INBAND_NOTIFICATIONS)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::LOG_SHMFD);

/// A device behind a socket. It serves one connection after another.
pub struct Backend {
    pub(super) state: VirtioDevice<Memory>,
    pub(super) memory: Memory,
    pub(super) calls: Arc<Calls>,
    /// Where the device's waker rings.
    pub(super) news: Arc<EventFd>,
    pub(super) rings: Vec<Ring>,
    /// What this session's front end accepted.
    pub(super) protocol: ProtocolFeatures,
    /// The memory that knows what is in flight, and how it is divided.
    pub(super) inflight: Option<(Pages, InflightArea)>,
    /// Whether the driver was taken to be ready because a queue was started.
    pub(super) implied: bool,
    /// Whether the front end has left: nothing is begun for it any more.
    pub(super) gone: bool,
    /// The generation of the configuration that the front end has, or was told of.
    pub(super) generation: u32,
}

/// A queue as the front end set it up.
#[derive(Default)]
pub(super) struct Ring {
    pub(super) entries: u32,
    pub(super) addresses: Option<VringAddr>,
    pub(super) base: Option<u32>,
    /// What is readable when the driver kicked.
    pub(super) kick: Option<OwnedFd>,
    /// Whether kicks may come.
    pub(super) started: bool,
    pub(super) enabled: bool,
    /// Whether the device has the queue.
    pub(super) running: bool,
    /// Whether it has none because its memory was taken away.
    pub(super) rests: bool,
    /// Whether there is more to do.
    pub(super) due: bool,
    /// Whether kicks do not come: the device looks by itself.
    pub(super) polled: bool,
    /// Whether it is broken, which was told: the queue itself, if it runs; else it cannot be taken as it is set up.
    pub(super) broken: bool,
    /// What [`Request::GetVringBase`] told.
    pub(super) handed_back: Option<u32>,
    /// Where writes to its used ring are logged besides.
    pub(super) log: Arc<UsedLog>,
}

/// What a message is answered with.
pub(super) struct Reply {
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reply {
    pub(super) fn new(payload: &impl Payload) -> Option<Self> {
        Some(Self { payload: payload.to_bytes(), fds: Vec::new() })
    }
}

/// Wakes by an event.
struct News(Arc<EventFd>);

impl Wake for News {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Fails only when the counter is full: then the loop is about to wake anyway.
        let _ = self.0.write(1);
    }
}

impl Backend {
    /// Puts `device` behind a socket, and offers `features` besides its own: those that not every front end is to be
    /// offered. RING_PACKED, which User Mode Linux takes whenever it is; ACCESS_PLATFORM (the front end translates device
    /// addresses), which User Mode Linux takes and cannot do.
    pub fn new(device: Box<dyn Device<Memory>>, features: Features) -> Result<Self, ServeError> {
        events::prepare();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let news = EventFd::from_flags(flags).map_err(|reason| ServeError::System { call: "eventfd", reason })?;
        let (news, memory, calls) = (Arc::new(news), Memory::new(), Arc::<Calls>::default());
        let features = features & (Features::RING_PACKED | Features::ACCESS_PLATFORM);
        let mut state = VirtioDevice::new(device, memory.clone(), calls.clone(), Interface::Modern)
            .with_features(Features::RING_RESET | features)
            .with_queue_max_size(MAX_QUEUE_SIZE);
        state.set_waker(Waker::from(Arc::new(News(news.clone()))));
        let (rings, protocol) = (Vec::new(), ProtocolFeatures::empty());
        let (inflight, implied, gone, generation) = (None, false, false, 0);
        let mut backend = Self { state, memory, calls, news, rings, protocol, inflight, implied, gone, generation };
        backend.begin();
        Ok(backend)
    }

    /// What to wake when the device has news that it may not know of before its driver is ready: of its medium's size, say.
    pub fn waker(&self) -> Waker {
        Waker::from(Arc::new(News(self.news.clone())))
    }

    /// As at the beginning of a session.
    fn begin(&mut self) {
        self.rings.clear();
        self.rings.resize_with(self.state.queue_count().into(), Ring::default);
        self.calls.reset(self.rings.len());
        self.protocol = ProtocolFeatures::empty();
        (self.inflight, self.implied, self.gone) = (None, false, false);
        self.generation = self.state.config_generation();
        self.memory.clear();
    }

    /// The session is over, and nothing touches its memory afterwards. What is in flight is finished while that is there;
    /// but of what nobody will ever hear of (the front end has left, and kept no memory that knows what is in flight), only
    /// what the backend has begun.
    pub(super) fn end(&mut self) {
        if !self.gone || self.inflight.is_some() {
            self.stop_all();
        }
        self.state.reset();
        self.begin();
    }

    /// A session panicked: what is in flight is given up, since nobody knows how far it is, and the device begins anew.
    pub(super) fn give_up(&mut self) {
        self.state.reset();
        self.begin();
    }

    /// Fails if memory of the front end went away.
    pub(super) fn check_memory(&self) -> Result<(), ServeError> {
        if let Some((guest, size)) = self.memory.lost() {
            return Err(ServeError::Lost { what: format!("region {guest:#x}+{size:#x}") });
        }
        let others = [self.inflight.as_ref().is_some_and(|(memory, _)| is_lost(memory)), self.memory.log().is_lost()];
        match others {
            [true, _] => Err(ServeError::Lost { what: "what is in flight".into() }),
            [_, true] => Err(ServeError::Lost { what: "the log".into() }),
            _ => Ok(()),
        }
    }

    /// Carries out `message`, and answers it on `connection`.
    pub(super) fn handle(&mut self, connection: &Connection, message: Message) -> Result<(), ServeError> {
        let Header { request: code, flags, .. } = message.header;
        let request = Request::from_code(code).ok_or(ServeError::Unknown { request: code })?;
        tracing::debug!(request = request.name(), payload = ?message.payload, fds = message.fds.len());
        let done = self.carry_out(request, message);
        // After the work: User Mode Linux has the message acknowledged that accepts acknowledgements.
        let wanted = flags & NEED_REPLY != 0 && self.protocol.contains(ProtocolFeatures::REPLY_ACK);
        // Before the answer, so that who gets it finds it done.
        let answer = match &done {
            Ok(Some(Reply { payload, fds })) => Some((payload.clone(), fds.iter().map(AsFd::as_fd).collect())),
            Ok(None) if wanted => Some((0u64.to_bytes(), Vec::new())),
            Err(_) if wanted => Some((1u64.to_bytes(), Vec::new())),
            _ => None,
        };
        let sent = answer.map_or(Ok(()), |(payload, fds): (Vec<u8>, Vec<BorrowedFd<'_>>)| {
            connection.send(code, REPLY, &payload, &fds)
        });
        // Why the message was refused says more than that nobody waits for an answer.
        done.map(drop).and(sent.map_err(ServeError::from))
    }

    fn carry_out(&mut self, request: Request, message: Message) -> Result<Option<Reply>, ServeError> {
        use Request as R;
        let Message { payload, mut fds, .. } = message;
        if let Some(feature) = needs(request)
            && !self.protocol.contains(feature)
        {
            return Err(ServeError::NotNegotiated { request: request.name() });
        }
        let body = Body { request, payload: &payload };
        match request {
            R::SetMemTable | R::SetVringKick | R::SetVringCall | R::SetVringErr => {}
            R::SetLogBase | R::SetLogFd | R::SetBackendReqFd | R::SetInflightFd | R::AddMemReg => {
                body.descriptors(&fds, 1)?;
            }
            // Some send the region's file here too, which is to be ignored.
            R::RemMemReg if fds.len() == 1 => fds.clear(),
            _ => body.descriptors(&fds, 0)?,
        }
        match request {
            R::GetFeatures => {
                body.empty()?;
                return Ok(Reply::new(&self.offered()));
            }
            R::SetFeatures => self.set_features(body.number()?)?,
            R::SetOwner => body.empty()?,
            R::ResetOwner | R::ResetDevice => {
                body.empty()?;
                self.reset();
            }
            R::SetMemTable => self.set_mem_table(&body, fds)?,
            R::SetVringNum => {
                let VringState { num, .. } = self.idle(&body)?;
                let (index, max) = self.index(&body)?;
                let packed = self.packed();
                if num == 0 || num > max.into() || !(packed || num.is_power_of_two()) {
                    return Err(body.refused(format!("{num} entries, expected a power of two up to {max}")));
                }
                self.set_up(index).entries = num;
            }
            R::SetVringAddr => self.set_addresses(&body)?,
            R::SetVringBase => {
                let VringState { num, .. } = self.idle(&body)?;
                let index = self.index(&body)?.0;
                // What was handed back is where it goes on; anything else begins anew.
                if self.rings[index].handed_back.is_some_and(|base| base != num) {
                    self.forget_inflight(index);
                }
                self.set_up(index).base = Some(num);
            }
            R::GetVringBase => {
                body.fixed::<VringState>()?;
                let index = self.index(&body)?.0;
                self.stop(index);
                let ring = self.set_up(index);
                (ring.started, ring.polled, ring.rests, ring.kick) = (false, false, false, None);
                let num = self.rings[index].base.unwrap_or_else(|| self.first_base());
                self.rings[index].handed_back = Some(num);
                return Ok(Reply::new(&VringState { index: index as u32, num }));
            }
            R::SetVringKick => {
                let (index, fd) = self.ring_fd(&body, fds)?;
                let kick = fd.map(event).transpose().map_err(|error| body.refused(error))?;
                let ring = self.set_up(index);
                (ring.started, ring.polled, ring.kick) = (true, kick.is_none(), kick);
                self.update(index)?;
            }
            R::SetVringCall => {
                let (index, fd) = self.ring_fd(&body, fds)?;
                let moved = fd.is_some() && self.rings[index].running;
                self.calls.set_call(index, body.bell(fd)?);
                if moved {
                    // A call may have gone where nobody looks any more: QEMU starts a queue before it says which descriptor
                    // it listens to.
                    self.calls.raise(Cause::Queue(index as u16));
                }
            }
            R::SetVringErr => {
                let (index, fd) = self.ring_fd(&body, fds)?;
                self.calls.set_error(index, body.bell(fd)?);
            }
            R::GetProtocolFeatures => {
                body.empty()?;
                return Ok(Reply::new(&OFFERED.bits()));
            }
            R::SetProtocolFeatures => {
                let features = ProtocolFeatures::from_bits_retain(body.number()?);
                if !OFFERED.contains(features) {
                    return Err(body.refused(format!("{:#x} was not offered", (features - OFFERED).bits())));
                }
                let others = ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK;
                if features.contains(ProtocolFeatures::INBAND_NOTIFICATIONS) && !features.contains(others) {
                    return Err(body.refused("INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK"));
                }
                self.protocol = features;
                let has = |feature| features.contains(feature);
                self.calls.allow(has(ProtocolFeatures::INBAND_NOTIFICATIONS), has(ProtocolFeatures::CONFIG));
            }
            R::GetQueueNum => {
                body.empty()?;
                return Ok(Reply::new(&(self.rings.len() as u64)));
            }
            R::SetVringEnable => {
                let VringState { num, .. } = body.fixed()?;
                let index = self.index(&body)?.0;
                if num > 1 {
                    return Err(body.refused(format!("{num}, expected 0 or 1")));
                }
                let inband = self.protocol.contains(ProtocolFeatures::INBAND_NOTIFICATIONS);
                let ring = self.set_up(index);
                ring.enabled = num == 1;
                // Without a descriptor for kicks there is no message that starts the queue. One without addresses is not
                // used: QEMU enables every queue, and its firmware sets up only the first.
                ring.started |= num == 1 && inband && ring.addresses.is_some();
                self.update(index)?;
            }
            R::SetBackendReqFd => {
                body.empty()?;
                for fd in fds {
                    let connection = Connection::new(UnixStream::from(fd)).map_err(|error| body.refused(error))?;
                    self.calls.set_backend(connection);
                }
            }
            R::GetConfig => {
                let (area, mut data) = body.config()?;
                self.state.read_config(area.offset.into(), &mut data);
                self.generation = self.state.config_generation();
                return Ok(Some(Reply { payload: [area.to_bytes(), data].concat(), fds: Vec::new() }));
            }
            R::SetConfig => {
                let (area, data) = body.config()?;
                self.state.write_config(area.offset.into(), &data);
            }
            R::VringKick => {
                body.fixed::<VringState>()?;
                let index = self.index(&body)?.0;
                self.rings[index].started = true;
                self.memory.ask_again();
                self.rings[index].due = self.kick(index)?;
            }
            R::GetMaxMemSlots => {
                body.empty()?;
                return Ok(Reply::new(&MEM_SLOTS));
            }
            R::AddMemReg => {
                let region = body.region()?;
                for fd in fds {
                    self.change_memory(&body, |memory| memory.add(region, fd))?;
                }
            }
            R::RemMemReg => {
                let region = body.region()?;
                self.change_memory(&body, |memory| memory.remove(region))?;
            }
            R::SetStatus => self.set_status(body.number()?)?,
            R::GetStatus => {
                body.empty()?;
                return Ok(Reply::new(&u64::from(self.state.status().bits())));
            }
            R::SetLogBase => {
                let LogArea { size, offset } = body.fixed()?;
                for fd in fds {
                    self.memory.log().set(map(fd, offset, size).map_err(|error| body.refused(error))?);
                }
                // This is answered even if nobody asks for an acknowledgement.
                return Ok(Reply::new(&0u64));
            }
            R::SetLogFd => {
                body.empty()?;
                body.bell(fds.pop())?.into_iter().for_each(|bell| self.memory.log().set_event(bell));
            }
            R::IotlbMsg => self.set_translation(&body)?,
            R::GetInflightFd => return self.new_inflight(&body),
            R::SetInflightFd => self.set_inflight(&body, fds)?,
        }
        Ok(None)
    }

    fn offered(&self) -> u64 {
        self.state.device_features().bits() as u64 | PROTOCOL_FEATURES | LOG_ALL
    }

    fn set_features(&mut self, features: u64) -> Result<(), ServeError> {
        let refused = |reason: String| ServeError::Refused { request: Request::SetFeatures.name(), reason };
        if features & !self.offered() != 0 {
            return Err(refused(format!("{:#x} was not offered", features & !self.offered())));
        }
        let accepted = Features::from_bits_retain((features & !(LOG_ALL | PROTOCOL_FEATURES)).into());
        self.memory.log().want(features & LOG_ALL != 0);
        if self.rings.iter().any(|ring| ring.running) {
            if accepted != self.state.driver_features() {
                return Err(refused("other features than before while queues run".into()));
            }
            return Ok(());
        }
        // Who does not tell the status begins with this. So does QEMU's vhost-user-rng, although it has STATUS: what the
        // driver before it accepted would stay.
        if !self.protocol.contains(ProtocolFeatures::STATUS) || std::mem::take(&mut self.implied) {
            self.state.reset();
        }
        self.state.set_driver_features(accepted);
        self.memory.translate(accepted.contains(Features::ACCESS_PLATFORM));
        if features & PROTOCOL_FEATURES == 0 {
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        Ok(())
    }

    fn set_status(&mut self, status: u64) -> Result<(), ServeError> {
        let request = Request::SetStatus.name();
        let Ok(status) = u8::try_from(status) else {
            return Err(ServeError::Refused { request, reason: format!("a status of {status:#x}") });
        };
        if status == 0 {
            self.reset();
            return Ok(());
        }
        let status = Status::from_bits_retain(status);
        self.implied &= !status.contains(Status::DRIVER_OK);
        self.state.set_status(status);
        self.tell_config();
        for index in 0..self.rings.len() {
            self.update(index)?;
        }
        Ok(())
    }

    /// Back to the beginning, but for memory and descriptors.
    fn reset(&mut self) {
        self.stop_all();
        for index in 0..self.rings.len() {
            self.forget_inflight(index);
            let ring = &mut self.rings[index];
            (ring.started, ring.enabled, ring.rests, ring.base) = (false, false, false, None);
            (ring.polled, ring.broken) = (false, false);
        }
        self.implied = false;
        self.state.reset();
    }

    /// The driver kicked queue `index`. True if there is more to do.
    pub(super) fn kick(&mut self, index: usize) -> Result<bool, ServeError> {
        if self.gone {
            return Ok(false);
        }
        // It may wait for translations.
        self.update(index)?;
        let more = self.state.kick(index as u16);
        self.tell_broken();
        Ok(more)
    }

    /// The device has news. True if there is more to do.
    pub(super) fn poll(&mut self) -> bool {
        if self.gone {
            return false;
        }
        let more = self.state.poll();
        self.tell_broken();
        self.tell_config();
        more
    }

    /// Tells the front end of another configuration before its driver drives the device. Afterwards the device does; but a
    /// front end keeps what it has read, and its driver reads that.
    fn tell_config(&mut self) {
        let now = self.state.config_generation();
        if std::mem::replace(&mut self.generation, now) != now && !self.state.status().contains(Status::DRIVER_OK) {
            self.calls.raise(Cause::Config);
        }
    }

    /// What waits for room on the back end's socket; the socket, if something is left.
    pub(super) fn flush(&self) -> Option<Arc<Connection>> {
        // No more misses than the memory keeps wait there: the next are asked for once these are out.
        self.calls.flush().or_else(|| {
            self.calls.ask(self.memory.misses());
            self.calls.flush()
        })
    }

    /// The queue that the payload begins with, and its most entries.
    pub(super) fn index(&self, body: &Body<'_>) -> Result<(usize, u16), ServeError> {
        let index = body.payload.first_chunk::<4>().map_or(u32::MAX, |index| u32::from_ne_bytes(*index));
        self.queue(body, index as usize)
    }

    fn queue(&self, body: &Body<'_>, index: usize) -> Result<(usize, u16), ServeError> {
        if index >= self.rings.len() {
            return Err(body.refused(format!("queue {index} of {}", self.rings.len())));
        }
        Ok((index, self.state.queue_max_size(index as u16).min(MAX_QUEUE_SIZE)))
    }

    /// The payload, which is about a queue that does not run.
    fn idle(&self, body: &Body<'_>) -> Result<VringState, ServeError> {
        let state: VringState = body.fixed()?;
        if self.rings[self.index(body)?.0].running {
            return Err(body.refused("the queue runs"));
        }
        Ok(state)
    }

    /// The queue and the descriptor of a message that hands one over.
    fn ring_fd(&self, body: &Body<'_>, mut fds: Vec<OwnedFd>) -> Result<(usize, Option<OwnedFd>), ServeError> {
        let value = body.number()?;
        body.descriptors(&fds, usize::from(value & VRING_NOFD == 0))?;
        let index = self.queue(body, (value & VRING_INDEX_MASK) as usize)?.0;
        if value & !(VRING_INDEX_MASK | VRING_NOFD) != 0 {
            return Err(body.refused(format!("unknown flags in {value:#x}")));
        }
        Ok((index, fds.pop()))
    }
}
