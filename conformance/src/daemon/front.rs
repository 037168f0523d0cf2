//! A front end in a case's hands: the protocol message by message, in any order.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use polyvirt_core::Features;
use polyvirt_core::hypervisor::{HypervisorError, Share};
use polyvirt_core::memory::{Access, Pages};
use polyvirt_core::queue::{Layout, QueueConfig};
use polyvirt_core::transport::{BlockingTransport, Interrupts, Notify, Transport, TransportError, Virtqueue};
use polyvirt_core::{Status, memory::MemoryError};
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Connection, ConnectionError, Message};

use super::{DaemonHandle, RAM, RAM_AT};
use crate::cases::sample::Sample;
use crate::raw::{Memory, Ring};
use crate::suite::{Objection, Session};

/// Entries of the rings.
pub const SIZE: u16 = 64;
/// What is accepted of the protocol's features if it is offered. Not STATUS: with it a daemon waits for DRIVER_OK, which is
/// another case's.
pub const PROTOCOL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::CONFIG);

/// A connection on which a case speaks.
pub struct Front {
    connection: Connection,
    daemon: DaemonHandle,
    packed: bool,
    /// Features of device and protocol that are offered.
    pub offered: u64,
    /// The protocol's features that are accepted.
    pub protocol: ProtocolFeatures,
    watchdog: Duration,
}

/// What happened to a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The daemon called.
    Called,
    /// The daemon said that the ring is broken.
    Broken,
    /// The daemon closed the connection.
    Closed,
}

/// How an answer to a message came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was carried out.
    Done,
    /// It was refused with this number, and the connection is still there.
    Refused(u64),
    /// The connection was closed.
    Closed,
}

impl Front {
    /// Connects, negotiates the features that the daemon's rings of the session's format need, and hands memory over.
    pub fn begin(session: &Session) -> Result<Self, Objection> {
        let mut front = Self::negotiated(session, PROTOCOL, 0)?;
        front.hand_over_memory()?;
        Ok(front)
    }

    /// Connects and negotiates, with `protocol` as far as it is offered, and `more` features.
    pub fn negotiated(session: &Session, protocol: ProtocolFeatures, more: u64) -> Result<Self, Objection> {
        let daemon = session.daemon()?;
        let socket = daemon.connect().map_err(|error| Objection::failed("the daemon takes a connection", error))?;
        let connection = Connection::new(socket).map_err(|error| Objection::failed("a connection", error))?;
        let packed = session.cell.ring.feature().contains(Features::RING_PACKED);
        let mut front = Self {
            connection,
            daemon,
            packed,
            offered: 0,
            protocol: ProtocolFeatures::empty(),
            watchdog: session.watchdog,
        };
        front.send(Request::SetOwner, &[], &[])?;
        front.offered = front.ask(Request::GetFeatures, &[])?;
        if front.offered & PROTOCOL_FEATURES != 0 {
            let theirs: u64 = front.ask(Request::GetProtocolFeatures, &[])?;
            let accepted = ProtocolFeatures::from_bits_retain(theirs) & protocol;
            front.send(Request::SetProtocolFeatures, &accepted.bits().to_bytes(), &[])?;
            front.protocol = accepted;
        }
        front.set_features(more)?;
        Ok(front)
    }

    /// Accepts VERSION_1, the format of the rings, the protocol's features, and `more`, as far as they are offered.
    pub fn set_features(&mut self, more: u64) -> Result<(), Objection> {
        let format = if self.packed { Features::RING_PACKED } else { Features::empty() };
        let features = (Features::VERSION_1 | format).bits() as u64 | PROTOCOL_FEATURES | more;
        self.tell(Request::SetFeatures, &(features & self.offered).to_bytes(), &[])
    }

    /// Needs a feature of the protocol; a case is skipped where it was not offered.
    pub fn need(&self, feature: ProtocolFeatures, what: &str) -> Result<(), Objection> {
        match self.protocol.contains(feature) {
            true => Ok(()),
            false => Err(Objection::Skipped(format!("the daemon does not offer {what}"))),
        }
    }

    /// Hands the session's memory over, all of it.
    pub fn hand_over_memory(&mut self) -> Result<(), Objection> {
        let ram = self.daemon.ram.0.try_clone().map_err(|error| Objection::failed("a descriptor", error))?;
        self.hand_over(&[(self.region(), ram)])
    }

    /// The region that the session's memory is.
    pub fn region(&self) -> Region {
        Region { guest: RAM_AT, size: RAM, user: self.user(RAM_AT), offset: 0 }
    }

    /// Hands over a table of these regions and their files, in place of all before.
    pub fn hand_over(&mut self, regions: &[(Region, OwnedFd)]) -> Result<(), Objection> {
        let mut payload = (regions.len() as u64).to_bytes();
        regions.iter().for_each(|(region, _)| payload.extend(region.to_bytes()));
        let fds: Vec<_> = regions.iter().map(|(_, file)| file.as_fd()).collect();
        self.tell(Request::SetMemTable, &payload, &fds)
    }

    /// The front end's address of what is at guest-physical `address`: any that is not the same will do.
    pub fn user(&self, address: u64) -> u64 {
        address + (1 << 40)
    }

    /// Sends a message.
    pub fn send(&mut self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Objection> {
        self.connection.send(request as u32, 0, payload, fds).map_err(|error| gone(request, &error))
    }

    /// Sends a message, and waits until it is carried out: by its acknowledgement, or by the answer to a question behind it.
    pub fn tell(&mut self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Objection> {
        match self.try_tell(request, payload, fds)? {
            Answer::Done => Ok(()),
            Answer::Refused(code) => Err(Objection::failed(format!("{} is carried out", request.name()), code)),
            Answer::Closed => Err(gone(request, &ConnectionError::Closed)),
        }
    }

    /// [`Front::tell`], where the daemon may refuse.
    pub fn try_tell(&mut self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Answer, Objection> {
        let acknowledged = self.protocol.contains(ProtocolFeatures::REPLY_ACK);
        let flags = if acknowledged { NEED_REPLY } else { 0 };
        let sent = self.connection.send(request as u32, flags, payload, fds);
        let sent = sent.and_then(|()| match acknowledged {
            true => self.connection.wait(self.watchdog),
            false => {
                self.connection.send(Request::GetFeatures as u32, 0, &[], &[])?;
                self.connection.wait(self.watchdog)
            }
        });
        match sent {
            Ok(message) if acknowledged && message.payload.len() == u64::LEN => {
                let code = u64::from_bytes(&message.payload);
                Ok(if code == 0 { Answer::Done } else { Answer::Refused(code) })
            }
            Ok(_) => Ok(Answer::Done),
            Err(error @ ConnectionError::Silent(_)) => Err(gone(request, &error)),
            Err(_) => Ok(Answer::Closed),
        }
    }

    /// Asks for a payload.
    pub fn ask<T: Payload>(&mut self, request: Request, payload: &[u8]) -> Result<T, Objection> {
        Ok(self.ask_with(request, payload, &[])?.0)
    }

    /// Asks for a payload and what comes with it.
    pub fn ask_with<T: Payload>(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(T, Vec<OwnedFd>), Objection> {
        self.send(request, payload, fds)?;
        let Message { header, payload, fds } =
            self.connection.wait(self.watchdog).map_err(|error| gone(request, &error))?;
        if header.request != request as u32 || payload.len() < T::LEN {
            let told = format!("request {} with {} bytes", header.request, payload.len());
            return Err(Objection::failed(format!("an answer to {}", request.name()), told));
        }
        Ok((T::from_bytes(&payload), fds))
    }

    /// Whether the daemon still answers on this connection.
    pub fn answers(&mut self) -> bool {
        self.ask::<u64>(Request::GetFeatures, &[]).is_ok()
    }

    /// Where a ring begins, as the protocol tells it.
    pub fn first_base(&self) -> u32 {
        if self.packed { 0x8000_8000 } else { 0 }
    }

    /// A fresh ring for queue `index`, of which the daemon knows nothing yet.
    pub fn ring(&self, session: &Session, index: u16) -> Result<LiveRing, Objection> {
        LiveRing::new(session, index, SIZE, self.packed)
    }

    /// Hands `live` over in the usual order, to go on at `base`.
    pub fn start(&mut self, live: &LiveRing, base: u32) -> Result<(), Objection> {
        for step in Step::USUAL {
            self.step(live, base, step)?;
        }
        Ok(())
    }

    /// One step of handing `live` over.
    pub fn step(&mut self, live: &LiveRing, base: u32, step: Step) -> Result<(), Objection> {
        let state = |num| VringState { index: live.index.into(), num }.to_bytes();
        let which = u64::from(live.index).to_bytes();
        match step {
            Step::Num => self.tell(Request::SetVringNum, &state(live.ring.size().into()), &[]),
            Step::Base => self.tell(Request::SetVringBase, &state(base), &[]),
            Step::Addresses => self.tell(Request::SetVringAddr, &self.addresses(live, None).to_bytes(), &[]),
            Step::Error => self.tell(Request::SetVringErr, &which, &[live.error.as_fd()]),
            Step::Call => self.tell(Request::SetVringCall, &which, &[live.call.as_fd()]),
            Step::Kick => self.tell(Request::SetVringKick, &which, &[live.kick.as_fd()]),
            Step::Enable => self.enable(live.index, true),
        }
    }

    /// Where the parts of `live` are; with `log`, the used ring is logged at that guest address.
    pub fn addresses(&self, live: &LiveRing, log: Option<u64>) -> VringAddr {
        let QueueConfig { descriptors, driver, device, .. } = live.ring.config;
        VringAddr {
            index: live.index.into(),
            flags: if log.is_some() { VRING_LOG } else { 0 },
            descriptors: self.user(descriptors),
            available: self.user(driver),
            used: self.user(device),
            log: log.unwrap_or(0),
        }
    }

    /// Enables or disables a ring, where that can be said.
    pub fn enable(&mut self, index: u16, enabled: bool) -> Result<(), Objection> {
        if self.offered & PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        self.tell(Request::SetVringEnable, &VringState { index: index.into(), num: enabled.into() }.to_bytes(), &[])
    }

    /// Stops a ring: where the daemon was in it.
    pub fn stop(&mut self, index: u16) -> Result<u32, Objection> {
        let state = VringState { index: index.into(), num: 0 };
        Ok(self.ask::<VringState>(Request::GetVringBase, &state.to_bytes())?.num)
    }

    /// The rings that a device of the session's type needs to serve a sample, started from their beginning: the last one is
    /// the sample's.
    pub fn start_all(&mut self, session: &Session) -> Result<Vec<LiveRing>, Objection> {
        let rings: Vec<_> = (0..session.queues()).map(|index| self.ring(session, index)).collect::<Result<_, _>>()?;
        for live in &rings {
            self.start(live, self.first_base())?;
        }
        Ok(rings)
    }

    /// Waits until something happens to `live`.
    pub fn wait(&self, live: &LiveRing) -> Result<Event, Objection> {
        let begun = Instant::now();
        loop {
            let input = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut fds = [input(live.call.as_fd()), input(live.error.as_fd()), input(self.connection.as_fd())];
            let left = self.watchdog.saturating_sub(begun.elapsed());
            let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
            if live.call.read().is_ok() {
                return Ok(Event::Called);
            }
            if live.error.read().is_ok() {
                return Ok(Event::Broken);
            }
            if fds[2].any().unwrap_or(true) {
                return Ok(Event::Closed);
            }
            if begun.elapsed() >= self.watchdog {
                return Err(Objection::failed("a call", format!("nothing in {:?}", self.watchdog)));
            }
        }
    }

    /// Waits for a call.
    pub fn called(&self, live: &LiveRing) -> Result<(), Objection> {
        match self.wait(live)? {
            Event::Called => Ok(()),
            Event::Broken => Err(Objection::failed("a call", "the daemon says that the ring is broken")),
            Event::Closed => Err(Objection::failed("a call", "the daemon closed the connection")),
        }
    }

    /// Waits until `live` has a used buffer, and leaves it there. A call may be about nothing: some daemons call when a ring
    /// starts.
    pub fn until_used(&self, live: &LiveRing) -> Result<(), Objection> {
        while !live.ring.has_used() {
            self.called(live)?;
        }
        Ok(())
    }

    /// Waits until `live` has a used buffer: its id and the bytes written.
    pub fn used(&self, live: &mut LiveRing) -> Result<(u32, u32), Objection> {
        loop {
            if let Some(used) = live.ring.take() {
                return Ok(used);
            }
            self.called(live)?;
        }
    }

    /// Lets the device serve a sample in the last of `rings`.
    pub fn serve(&self, session: &mut Session, rings: &mut [LiveRing]) -> Result<(), Objection> {
        let live = rings.last_mut().expect("every device has a queue");
        let sample = live.offer(session, 0)?;
        live.ring.kick()?;
        let (id, _) = self.used(live)?;
        if id != 0 {
            return Err(Objection::failed("the buffer 0 used", id));
        }
        sample.check_memory()
    }
}

/// The steps that hand a ring over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// SET_VRING_NUM.
    Num,
    /// SET_VRING_BASE.
    Base,
    /// SET_VRING_ADDR.
    Addresses,
    /// SET_VRING_ERR.
    Error,
    /// SET_VRING_CALL.
    Call,
    /// SET_VRING_KICK.
    Kick,
    /// SET_VRING_ENABLE.
    Enable,
}

impl Step {
    /// As QEMU does it.
    pub const USUAL: [Self; 7] =
        [Self::Num, Self::Base, Self::Addresses, Self::Error, Self::Call, Self::Kick, Self::Enable];
}

/// A ring in the session's memory, with its events.
pub struct LiveRing {
    /// The ring, in the driver's hands.
    pub ring: Ring,
    /// Which queue it is.
    pub index: u16,
    /// What the driver kicks with.
    pub kick: Arc<EventFd>,
    /// What the daemon calls with.
    pub call: EventFd,
    /// What the daemon says with that the ring is broken.
    pub error: EventFd,
    _areas: [Memory; 3],
}

impl LiveRing {
    /// A fresh ring of `size` entries for queue `index`.
    pub fn new(session: &Session, index: u16, size: u16, packed: bool) -> Result<Self, Objection> {
        let both = Access::READ | Access::WRITE;
        // Each area a page and more: the largest is 16 bytes an entry.
        let area = || Memory::new(session, u32::from(size) * 16 + 4096, both);
        let areas = [area()?, area()?, area()?];
        let [descriptors, driver, device] = &areas;
        let config = QueueConfig {
            size,
            descriptors: descriptors.address,
            driver: driver.address,
            device: device.address,
            layout: if packed { Layout::Packed } else { Layout::Modern },
            ..QueueConfig::default()
        };
        let kick = Arc::new(event()?);
        let [descriptors, driver, device] = [descriptors, driver, device].map(|area| area.pages.clone());
        let notify = Box::new(Doorbell(kick.clone()));
        let virtqueue = Virtqueue { config, descriptors, driver, device, notify: notify as Box<dyn Notify> };
        let ring = Ring::new(virtqueue, index, session.trace.clone())?;
        Ok(Self { ring, index, kick, call: event()?, error: event()?, _areas: areas })
    }

    /// New events, as a front end has that connects anew.
    pub fn renew_events(&mut self) -> Result<(), Objection> {
        (self.call, self.error) = (event()?, event()?);
        Ok(())
    }

    /// Makes a sample available whose first descriptor is `head`, without a kick.
    pub fn offer(&mut self, session: &Session, head: u16) -> Result<Sample, Objection> {
        let sample = Sample::new(session)?;
        self.ring.chain(head, &sample.pieces);
        self.ring.offer(head);
        Ok(sample)
    }

    /// Where the daemon is, as GET_VRING_BASE tells it, if it used all that was made available.
    pub fn position(&mut self) -> u32 {
        if self.ring.is_packed() {
            let at = u32::from(self.ring.packed().available.pack());
            return at | at << 16;
        }
        self.ring.split().available.into()
    }
}

struct Doorbell(Arc<EventFd>);

impl Notify for Doorbell {
    fn notify(&mut self) -> Result<(), TransportError> {
        // Fails only when the counter is full: then it is rung already.
        let _ = self.0.write(1);
        Ok(())
    }
}

/// The transport of a session in which the case speaks itself: it has memory, and nothing else.
pub(super) struct Undriven {
    pub(super) device_type: u32,
    pub(super) share: Arc<dyn Share>,
}

const SPEAKS: TransportError = TransportError::Unsupported("driver: the case speaks the protocol itself");

impl Transport for Undriven {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        Err(SPEAKS)
    }

    fn set_driver_features(&mut self, _: Features) -> Result<(), TransportError> {
        Err(SPEAKS)
    }

    fn status(&mut self) -> Result<Status, TransportError> {
        Err(SPEAKS)
    }

    fn set_status(&mut self, _: Status) -> Result<(), TransportError> {
        Err(SPEAKS)
    }

    fn begin_reset(&mut self) -> Result<(), TransportError> {
        Err(SPEAKS)
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        Err(SPEAKS)
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        Err(SPEAKS)
    }

    fn read_config(&mut self, _: u32, _: &mut [u8]) -> Result<(), TransportError> {
        Err(SPEAKS)
    }

    fn write_config(&mut self, _: u32, _: &[u8]) -> Result<(), TransportError> {
        Err(SPEAKS)
    }

    fn queue_max_size(&mut self, _: u16) -> Result<u16, TransportError> {
        Err(SPEAKS)
    }

    fn find_vq(&mut self, _: u16, _: Option<u16>) -> Result<Virtqueue, TransportError> {
        Err(SPEAKS)
    }

    fn begin_vq_reset(&mut self, _: u16) -> Result<(), TransportError> {
        Err(SPEAKS)
    }

    fn poll_vq_reset(&mut self, _: u16) -> Result<bool, TransportError> {
        Err(SPEAKS)
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        Err(SPEAKS)
    }

    fn share(&self) -> Arc<dyn Share> {
        self.share.clone()
    }
}

impl BlockingTransport for Undriven {
    fn sleep(&mut self, _: Duration) -> Result<bool, TransportError> {
        Err(SPEAKS)
    }

    fn pause(&mut self, _: Duration) -> Result<(), TransportError> {
        Err(SPEAKS)
    }
}

/// An event that nothing happened to.
pub fn event() -> Result<EventFd, Objection> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|error| HypervisorError::Refused { call: "eventfd", reason: error.to_string() }.into())
}

fn gone(request: Request, error: &ConnectionError) -> Objection {
    Objection::failed(format!("{} is answered", request.name()), error)
}

/// The bytes of `pages` from `offset` on.
pub fn bytes(pages: &Pages, offset: usize, len: usize) -> Result<Vec<u8>, MemoryError> {
    let mut bytes = vec![0; len];
    pages.read(offset, &mut bytes)?;
    Ok(bytes)
}
