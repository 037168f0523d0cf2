//! The host's side: messages decoded into the device state machine.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::{Wake, Waker};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use polyvirt_core::device::Device;
use polyvirt_core::memory::{Access, GuestMemory, MemoryError, Pages};
use polyvirt_core::queue::packed::layout::{DESCRIPTOR_LEN, EVENT_LEN, USED};
use polyvirt_core::queue::split::layout::{descriptors_len, device_len, driver_len};
use polyvirt_core::queue::{Layout, MAX_QUEUE_SIZE, QueueState, SavedQueue};
use polyvirt_core::state::{Area, Interface, VirtioDevice};
use polyvirt_core::{Features, Status};

use super::calls::{Calls, never_block};
use super::connection::{Connection, Message};
use super::error::ServeError;
use super::inflight::{self, Tracker};
use super::map::{map, memory_file};
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
    state: VirtioDevice<Memory>,
    memory: Memory,
    calls: Arc<Calls>,
    /// Where the device's waker rings.
    pub(super) news: Arc<EventFd>,
    pub(super) rings: Vec<Ring>,
    /// What this session's front end accepted.
    protocol: ProtocolFeatures,
    /// The memory that knows what is in flight, and how it is divided.
    inflight: Option<(Pages, InflightArea)>,
}

/// A queue as the front end set it up.
#[derive(Default)]
pub(super) struct Ring {
    entries: u32,
    addresses: Option<VringAddr>,
    base: Option<u32>,
    /// What is readable when the driver kicked.
    pub(super) kick: Option<OwnedFd>,
    /// Whether kicks may come.
    started: bool,
    enabled: bool,
    /// Whether the device has the queue.
    running: bool,
    /// Whether its being broken was told.
    broken: bool,
}

/// What a message is answered with.
struct Reply {
    payload: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Reply {
    fn new(payload: &impl Payload) -> Option<Self> {
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
    /// Puts `device` behind a socket. `translated`: whether the front end may translate device addresses
    /// (VIRTIO_F_ACCESS_PLATFORM). That is offered only on demand: User Mode Linux accepts it and cannot do it.
    pub fn new(device: Box<dyn Device<Memory>>, translated: bool) -> Result<Self, ServeError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let news = EventFd::from_flags(flags).map_err(|reason| ServeError::System { call: "eventfd", reason })?;
        let (news, memory, calls) = (Arc::new(news), Memory::new(), Arc::<Calls>::default());
        let platform = if translated { Features::ACCESS_PLATFORM } else { Features::empty() };
        let mut state = VirtioDevice::new(device, memory.clone(), calls.clone(), Interface::Modern)
            .with_features(Features::RING_RESET | Features::RING_PACKED | platform)
            .with_queue_max_size(MAX_QUEUE_SIZE);
        state.set_waker(Waker::from(Arc::new(News(news.clone()))));
        let mut backend =
            Self { state, memory, calls, news, rings: Vec::new(), protocol: ProtocolFeatures::empty(), inflight: None };
        backend.begin();
        Ok(backend)
    }

    /// As at the beginning of a session.
    fn begin(&mut self) {
        self.rings.clear();
        self.rings.resize_with(self.state.queue_count().into(), Ring::default);
        self.calls.reset(self.rings.len());
        self.protocol = ProtocolFeatures::empty();
        self.inflight = None;
        self.memory.clear();
    }

    /// The session is over: what is in flight is finished while its memory is there, and nothing touches it afterwards.
    pub(super) fn end(&mut self) {
        self.stop_all();
        self.state.reset();
        self.begin();
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
                self.rings[index].entries = num;
            }
            R::SetVringAddr => self.set_addresses(&body)?,
            R::SetVringBase => {
                let VringState { num, .. } = self.idle(&body)?;
                let index = self.index(&body)?.0;
                self.rings[index].base = Some(num);
            }
            R::GetVringBase => {
                body.fixed::<VringState>()?;
                let index = self.index(&body)?.0;
                self.stop(index);
                self.rings[index].started = false;
                self.rings[index].kick = None;
                let num = self.rings[index].base.unwrap_or_else(|| self.first_base());
                return Ok(Reply::new(&VringState { index: index as u32, num }));
            }
            R::SetVringKick => {
                let (index, fd) = self.ring_fd(&body, fds)?;
                let ring = &mut self.rings[index];
                ring.kick = fd.map(never_block);
                ring.started = true;
                self.update(index)?;
            }
            R::SetVringCall => {
                let (index, fd) = self.ring_fd(&body, fds)?;
                self.calls.set_call(index, fd);
            }
            R::SetVringErr => {
                let (index, fd) = self.ring_fd(&body, fds)?;
                self.calls.set_error(index, fd);
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
                let ring = &mut self.rings[index];
                ring.enabled = num == 1;
                // Without a descriptor for kicks there is no message that starts the queue. One without addresses is not
                // used: QEMU enables every queue, and its firmware sets up only the first.
                let inband = self.protocol.contains(ProtocolFeatures::INBAND_NOTIFICATIONS);
                ring.started |= num == 1 && inband && ring.addresses.is_some();
                self.update(index)?;
            }
            R::SetBackendReqFd => {
                body.empty()?;
                for fd in fds {
                    self.calls.set_backend(Connection::new(UnixStream::from(fd))?);
                }
            }
            R::GetConfig => {
                let (area, mut data) = body.config()?;
                self.state.read_config(area.offset.into(), &mut data);
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
                if self.kick(index)? {
                    let _ = self.news.write(1);
                }
            }
            R::GetMaxMemSlots => {
                body.empty()?;
                return Ok(Reply::new(&MEM_SLOTS));
            }
            R::AddMemReg => {
                let region = body.region()?;
                for fd in fds {
                    self.memory.add(region, fd).map_err(|error| body.refused(error))?;
                }
            }
            R::RemMemReg => {
                let region = body.region()?;
                self.memory.remove(region).map_err(|error| body.refused(error))?;
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
            R::SetLogFd => fds.into_iter().for_each(|fd| self.memory.log().set_event(fd)),
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
        if !self.protocol.contains(ProtocolFeatures::STATUS) {
            self.state.reset();
        }
        self.state.set_driver_features(accepted);
        self.memory.translate(accepted.contains(Features::ACCESS_PLATFORM));
        if features & PROTOCOL_FEATURES == 0 {
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        Ok(())
    }

    fn set_mem_table(&mut self, body: &Body<'_>, fds: Vec<OwnedFd>) -> Result<(), ServeError> {
        let count = match body.payload.first_chunk::<4>() {
            Some(&count) => u32::from_ne_bytes(count) as usize,
            None => return Err(body.size(8)),
        };
        if count > MEM_TABLE_MAX {
            return Err(body.refused(format!("{count} regions, expected at most {MEM_TABLE_MAX}")));
        }
        body.descriptors(&fds, count)?;
        // User Mode Linux sends the payload of two regions and announces one: what is not announced does not count.
        let announced = 8 + count * Region::LEN;
        if body.payload.len() < announced || body.payload.len() > 8 + MEM_TABLE_MAX * Region::LEN {
            return Err(body.size(announced));
        }
        let regions = body.payload[8..announced].chunks_exact(Region::LEN).map(Region::from_bytes);
        self.memory.replace(regions.zip(fds).collect()).map_err(|error| body.refused(error))
    }

    fn set_addresses(&mut self, body: &Body<'_>) -> Result<(), ServeError> {
        let addresses: VringAddr = body.fixed()?;
        let index = self.index(body)?.0;
        let ring = &mut self.rings[index];
        let place = |a: &VringAddr| (a.descriptors, a.available, a.used);
        if ring.running && ring.addresses.as_ref().map(place) != Some(place(&addresses)) {
            return Err(body.refused("a queue that runs cannot be moved"));
        }
        ring.addresses = Some(addresses);
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
        self.state.set_status(Status::from_bits_retain(status));
        for index in 0..self.rings.len() {
            self.update(index)?;
        }
        Ok(())
    }

    /// Back to the beginning, but for memory and descriptors.
    fn reset(&mut self) {
        self.stop_all();
        self.state.reset();
        for ring in &mut self.rings {
            (ring.started, ring.enabled, ring.base) = (false, false, None);
        }
    }

    /// Begins or ends to serve queue `index`, as what is known about it by now demands.
    fn update(&mut self, index: usize) -> Result<(), ServeError> {
        let Ring { started, enabled, running, .. } = self.rings[index];
        match (started && enabled, running) {
            (true, false) => self.start(index),
            (false, true) => {
                self.stop(index);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn start(&mut self, index: usize) -> Result<(), ServeError> {
        let failed = |reason: String| ServeError::Queue { index, reason };
        // A queue that was started and enabled says that the driver is ready. It may be all that does: QEMU's
        // vhost-user-rng takes VHOST_USER_PROTOCOL_F_STATUS and never sends DRIVER_OK.
        if !self.state.status().contains(Status::DRIVER_OK) {
            let ready = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
            self.state.set_status(ready);
            if !self.state.status().contains(Status::FEATURES_OK) {
                let accepted = self.state.driver_features();
                return Err(failed(format!("it is to run with unacceptable features: {accepted:?}")));
            }
            self.state.set_status(ready | Status::DRIVER_OK);
        }
        if !self.state.is_running() {
            // The driver has to reset the device.
            return Ok(());
        }
        let entries = self.rings[index].entries;
        let Some(areas) = self.areas(index)? else { return Ok(()) };
        let [(descriptors, ..), (available, driver_len, _), (used, device_len, _)] = areas;
        let mut saved =
            SavedQueue { state: self.resumed(self.rings[index].base, descriptors, used), in_flight: vec![] };
        if let Some((memory, InflightArea { queues, entries: most, .. })) = &self.inflight
            && index < usize::from(*queues)
            && !self.packed()
        {
            let rings = self.memory.pages(available, driver_len).zip(self.memory.pages(used, device_len));
            let rings = rings.ok_or_else(|| failed("its rings are in several pieces".into()))?;
            let size = entries.min(u16::MAX.into()) as u16;
            let tracker = Tracker::new(memory, index as u16, *most, size, rings);
            let tracker = Arc::new(tracker.map_err(|error| failed(error.to_string()))?);
            saved = tracker.recover().unwrap_or(saved);
            self.memory.watch(available, used, &tracker);
        }
        tracing::info!(index, entries, ?saved, "a queue starts");
        let queue = index as u16;
        self.state.set_queue_size(queue, entries);
        for (area, (address, ..)) in [Area::Descriptors, Area::Driver, Area::Device].into_iter().zip(areas) {
            self.state.set_queue_address(queue, area, address);
        }
        self.state.set_saved_queue(queue, saved);
        self.state.enable_queue(queue);
        self.memory.unwatch();
        if self.state.queue_state(queue).is_none() {
            let reason = self.state.needs_reset().map_or_else(String::new, |reason| reason.to_string());
            return Err(failed(reason));
        }
        (self.rings[index].running, self.rings[index].broken) = (true, false);
        self.tell_broken();
        Ok(())
    }

    /// The areas of queue `index`: device address, bytes, what the device does there. None if they are not known yet.
    fn areas(&self, index: usize) -> Result<Option<[(u64, u64, Access); 3]>, ServeError> {
        let failed = |reason: String| ServeError::Queue { index, reason };
        let Ring { addresses, entries, .. } = &self.rings[index];
        let Some(VringAddr { descriptors, available, used, .. }) = *addresses else {
            return Err(failed("it has no addresses".into()));
        };
        let size = u16::try_from(*entries).map_err(|_| failed(format!("{entries} entries")))?;
        let [first, second, third] = self.lens(size);
        if self.state.driver_features().contains(Features::ACCESS_PLATFORM) {
            let areas = [(descriptors, first.0, first.1), (available, second.0, second.1), (used, third.0, third.1)];
            let missing = |&(address, len, access): &(u64, u64, Access)| {
                matches!(self.memory.resolve(address, len, access, |_| {}), Err(MemoryError::NotYet { .. }))
            };
            // All of them are asked for at once.
            return Ok((areas.iter().filter(|area| missing(area)).count() == 0).then_some(areas));
        }
        let guest =
            |user| self.memory.guest_address(user).ok_or_else(|| failed(format!("{user:#x} is in no memory region")));
        Ok(Some([
            (guest(descriptors)?, first.0, first.1),
            (guest(available)?, second.0, second.1),
            (guest(used)?, third.0, third.1),
        ]))
    }

    /// Bytes of the areas of a queue of `size` entries, and what the device does there.
    fn lens(&self, size: u16) -> [(u64, Access); 3] {
        let (read, both, entries) = (Access::READ, Access::READ | Access::WRITE, u64::from(size));
        if self.packed() {
            return [(DESCRIPTOR_LEN * entries, both), (EVENT_LEN, read), (EVENT_LEN, Access::WRITE)];
        }
        // Without EVENT_IDX the event words are not part of split rings (2.7.6, 2.7.8).
        let event = if self.state.driver_features().contains(Features::EVENT_IDX) { 0 } else { 2 };
        [(descriptors_len(size), read), (driver_len(size) - event, read), (device_len(size) - event, both)]
    }

    fn packed(&self) -> bool {
        self.state.driver_features().contains(Features::RING_PACKED)
    }

    /// Learns or forgets a translation. Queues that waited for it go on. Those whose areas it takes away stop until they
    /// are kicked: most likely their driver is about to leave.
    fn set_translation(&mut self, body: &Body<'_>) -> Result<(), ServeError> {
        let translation: Iotlb = body.fixed()?;
        match translation.kind {
            Iotlb::UPDATE => {
                self.memory.learn(translation).map_err(|error| body.refused(error))?;
                for index in 0..self.rings.len() {
                    if self.kick(index)? {
                        // Served further once the message is answered.
                        let _ = self.news.write(1);
                    }
                }
            }
            Iotlb::INVALIDATE => {
                self.memory.forget(translation.iova, translation.size);
                for index in 0..self.rings.len() {
                    let Ring { running, addresses: Some(addresses), .. } = self.rings[index] else { continue };
                    let lens = self.lens(self.rings[index].entries as u16);
                    let places = [addresses.descriptors, addresses.available, addresses.used];
                    let mut areas = places.into_iter().zip(lens);
                    if running && !areas.all(|(address, (len, access))| self.memory.knows(address, len, access)) {
                        self.stop(index);
                    }
                }
            }
            kind => return Err(body.refused(format!("type {kind}, expected an update or an invalidation"))),
        }
        Ok(())
    }

    /// New memory for what is in flight. Packed rings have none: what a crash leaves of them cannot be told from what
    /// was overwritten.
    fn new_inflight(&mut self, body: &Body<'_>) -> Result<Option<Reply>, ServeError> {
        let InflightArea { queues, entries, .. } = self.inflight_area(body)?;
        if self.packed() {
            return Ok(Reply::new(&InflightArea { size: 0, offset: 0, queues, entries }));
        }
        let size = inflight::size(queues, entries) as u64;
        let (file, memory) = memory_file("inflight", size).map_err(|error| body.refused(error))?;
        let area = InflightArea { size, offset: 0, queues, entries };
        self.inflight = Some((memory, area));
        Ok(Some(Reply { payload: area.to_bytes(), fds: vec![file] }))
    }

    fn set_inflight(&mut self, body: &Body<'_>, fds: Vec<OwnedFd>) -> Result<(), ServeError> {
        let area = self.inflight_area(body)?;
        let needed = inflight::size(area.queues, area.entries) as u64;
        if area.size < needed || !area.offset.is_multiple_of(8) {
            return Err(body.refused(format!("{} bytes at {}, expected {needed}", area.size, area.offset)));
        }
        for fd in fds {
            self.inflight = Some((map(fd, area.offset, area.size).map_err(|error| body.refused(error))?, area));
        }
        Ok(())
    }

    /// The payload, which is about no more queues and entries than there can be.
    fn inflight_area(&self, body: &Body<'_>) -> Result<InflightArea, ServeError> {
        let area: InflightArea = body.fixed()?;
        let InflightArea { queues, entries, .. } = area;
        if queues == 0 || usize::from(queues) > self.rings.len() || entries == 0 || entries > MAX_QUEUE_SIZE {
            let most = self.rings.len();
            return Err(body.refused(format!("{queues} queues of {entries}, expected 1 to {most} queues")));
        }
        Ok(area)
    }

    /// Where the device goes on in a queue with this base, whose descriptors and used ring are there.
    fn resumed(&self, base: Option<u32>, descriptors: u64, used: u64) -> QueueState {
        let base = base.unwrap_or_else(|| self.first_base());
        if !self.state.driver_features().contains(Features::RING_PACKED) {
            // The used index is where it always is: in the ring.
            return QueueState { available: base as u16, used: self.peek(used.wrapping_add(2)) };
        }
        // User Mode Linux begins packed rings with a base of 0, which says "in a later round". Only in a later round
        // does the first descriptor have the flag that a device sets.
        let flags = self.peek(descriptors.wrapping_add(DESCRIPTOR_LEN - 2));
        if base == 0 && flags & USED == 0 {
            return QueueState::start(Layout::Packed);
        }
        QueueState { available: base as u16, used: (base >> 16) as u16 }
    }

    /// A number in guest memory; 0 if there is none, but then the queue does not start.
    fn peek(&self, address: u64) -> u16 {
        let mut value = [0; 2];
        let _ = self.memory.resolve(address, 2, Access::READ, |segment| {
            let len = segment.len().min(value.len());
            let _ = segment.read(0, &mut value[..len]);
        });
        u16::from_le_bytes(value)
    }

    /// Where queues begin, as the protocol tells it.
    fn first_base(&self) -> u32 {
        if self.packed() { 0x8000_8000 } else { 0 }
    }

    /// Takes queue `index` from the device, once what is in flight is finished.
    fn stop(&mut self, index: usize) {
        let queue = index as u16;
        if !self.rings[index].running {
            return;
        }
        self.state.hold_queue(queue);
        while self.state.is_running() && self.state.queue_in_flight(queue) > 0 {
            if !self.state.poll() && self.state.queue_in_flight(queue) > 0 {
                wait_for(&self.news);
            }
        }
        if let Some(QueueState { available, used }) = self.state.queue_state(queue) {
            let packed = self.packed();
            let base = u32::from(available) | if packed { u32::from(used) << 16 } else { 0 };
            self.rings[index].base = Some(base);
            tracing::info!(index, base, "a queue stops");
        }
        self.state.reset_queue(queue);
        self.rings[index].running = false;
    }

    fn stop_all(&mut self) {
        (0..self.rings.len()).for_each(|index| self.stop(index));
    }

    /// The driver kicked queue `index`. True if there is more to do.
    pub(super) fn kick(&mut self, index: usize) -> Result<bool, ServeError> {
        // It may wait for translations.
        self.update(index)?;
        let more = self.state.kick(index as u16);
        self.tell_broken();
        Ok(more)
    }

    /// The device has news. True if there is more to do.
    pub(super) fn poll(&mut self) -> bool {
        let more = self.state.poll();
        self.tell_broken();
        more
    }

    /// What waits for room on the back end's socket; the socket, if something is left.
    pub(super) fn flush(&self) -> Option<OwnedFd> {
        self.calls.ask(self.memory.misses());
        self.calls.flush()
    }

    fn tell_broken(&mut self) {
        for (index, ring) in self.rings.iter_mut().enumerate().filter(|(_, ring)| ring.running && !ring.broken) {
            if let Some(reason) = self.state.queue_broken(index as u16) {
                tracing::warn!(index, %reason, "the driver broke a queue");
                ring.broken = true;
                self.calls.broken(index);
            }
        }
    }

    /// The queue that the payload begins with, and its most entries.
    fn index(&self, body: &Body<'_>) -> Result<(usize, u16), ServeError> {
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

/// The protocol feature that a message belongs to.
fn needs(request: Request) -> Option<ProtocolFeatures> {
    use ProtocolFeatures as P;
    Some(match request {
        Request::GetQueueNum => P::MQ,
        Request::SetLogBase | Request::SetLogFd => P::LOG_SHMFD,
        Request::SetBackendReqFd => P::BACKEND_REQ,
        Request::GetConfig | Request::SetConfig => P::CONFIG,
        Request::GetInflightFd | Request::SetInflightFd => P::INFLIGHT_SHMFD,
        Request::ResetDevice => P::RESET_DEVICE,
        Request::VringKick => P::INBAND_NOTIFICATIONS,
        Request::GetMaxMemSlots | Request::AddMemReg | Request::RemMemReg => P::CONFIGURE_MEM_SLOTS,
        Request::SetStatus | Request::GetStatus => P::STATUS,
        _ => return None,
    })
}

/// The payload of a message, and what to say about it.
struct Body<'a> {
    request: Request,
    payload: &'a [u8],
}

impl Body<'_> {
    fn refused(&self, reason: impl ToString) -> ServeError {
        ServeError::Refused { request: self.request.name(), reason: reason.to_string() }
    }

    fn size(&self, expected: usize) -> ServeError {
        ServeError::Size { request: self.request.name(), expected, got: self.payload.len() }
    }

    fn descriptors(&self, fds: &[OwnedFd], expected: usize) -> Result<(), ServeError> {
        if fds.len() == expected {
            return Ok(());
        }
        Err(ServeError::Descriptors { request: self.request.name(), expected, got: fds.len() })
    }

    fn exactly(&self, len: usize) -> Result<(), ServeError> {
        if self.payload.len() == len { Ok(()) } else { Err(self.size(len)) }
    }

    fn empty(&self) -> Result<(), ServeError> {
        self.exactly(0)
    }

    fn fixed<T: Payload>(&self) -> Result<T, ServeError> {
        self.exactly(T::LEN)?;
        Ok(T::from_bytes(self.payload))
    }

    fn number(&self) -> Result<u64, ServeError> {
        self.fixed()
    }

    /// A region, behind eight bytes of padding.
    fn region(&self) -> Result<Region, ServeError> {
        self.exactly(8 + Region::LEN)?;
        Ok(Region::from_bytes(&self.payload[8..]))
    }

    /// A piece of the configuration: where, and bytes.
    fn config(&self) -> Result<(ConfigArea, Vec<u8>), ServeError> {
        if self.payload.len() < ConfigArea::LEN {
            return Err(self.size(ConfigArea::LEN));
        }
        let area = ConfigArea::from_bytes(self.payload);
        let ConfigArea { offset, size, .. } = area;
        if u64::from(offset) + u64::from(size) > CONFIG_MAX as u64 {
            return Err(self.refused(format!("{offset}+{size}, expected at most {CONFIG_MAX} bytes")));
        }
        self.exactly(ConfigArea::LEN + size as usize)?;
        Ok((area, self.payload[ConfigArea::LEN..].to_vec()))
    }
}

/// Waits for an event and takes it.
fn wait_for(event: &EventFd) {
    // An error other than an interruption cannot be; either way the caller looks again.
    let _ = poll(&mut [PollFd::new(event.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
    let _ = event.read();
}
