//! The queues of a back end: how they start, where they go on, how they stop.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use polyvirt_core::hypervisor::{Cause, Interrupt as _};
use polyvirt_core::memory::{Access, GuestMemory, ResolveError};
use polyvirt_core::queue::packed::layout::{DESCRIPTOR_LEN, EVENT_LEN, Position, USED};
use polyvirt_core::queue::split::layout::{descriptors_len, device_len, driver_len};
use polyvirt_core::queue::{Layout, MAX_QUEUE_SIZE, Observer, QueueError, QueueState, SavedQueue};
use polyvirt_core::state::Area;
use polyvirt_core::{Features, Status};

use super::body::Body;
use super::device::{Backend, Reply, Ring};
use super::error::ServeError;
use super::inflight::{self, packed, split};
use super::map::{map, memory_file};
use super::messages::*;

/// The areas of a queue: address, bytes, and what the device does there.
type Areas = [(u64, u64, Access); 3];

/// Where a queue goes on, whether that is kept, and by whom.
type Booked = (SavedQueue, Kept, Option<Box<dyn Observer>>);

/// Whether it is known to memory that outlives this process what is in flight of a queue.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// It is not, and the front end did not ask.
    Unasked,
    /// It is not: that memory is too short.
    No,
    /// From now on.
    FromNow,
    /// It was before, too.
    Before,
}

impl Backend {
    /// Begins or ends to serve queue `index`, as what is known about it by now demands.
    pub(super) fn update(&mut self, index: usize) -> Result<(), ServeError> {
        let Ring { started, enabled, running, broken, .. } = self.rings[index];
        match (started && enabled, running) {
            // One that is broken is not tried again by every kick, and none is begun for who has left.
            (true, false) if broken || self.gone || self.rests(index) => Ok(()),
            (true, false) => self.start(index),
            (false, true) => {
                self.stop(index);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    pub(super) fn set_addresses(&mut self, body: &Body<'_>) -> Result<(), ServeError> {
        let addresses: VringAddr = body.fixed()?;
        let index = self.index(body)?.0;
        let ring = self.set_up(index);
        let place = |a: &VringAddr| (a.descriptors, a.available, a.used);
        // This may change while the queue runs: so logging begins, and ends.
        ring.log.set((addresses.flags & VRING_LOG != 0).then_some(addresses.log));
        if ring.running && ring.addresses.as_ref().map(place) != Some(place(&addresses)) {
            return Err(body.refused("a queue that runs cannot be moved"));
        }
        ring.addresses = Some(addresses);
        Ok(())
    }

    /// The front end says something about queue `index`: if it was broken, it may be another now.
    pub(super) fn set_up(&mut self, index: usize) -> &mut Ring {
        let ring = &mut self.rings[index];
        ring.broken &= ring.running;
        ring
    }

    fn start(&mut self, index: usize) -> Result<(), ServeError> {
        let missing = |what: &str| Err(ServeError::Queue { index, reason: format!("it has no {what}") });
        match self.rings[index] {
            Ring { addresses: None, .. } => return missing("addresses"),
            Ring { entries: 0, .. } => return missing("size"),
            _ => {}
        }
        // What is broken stops the whole device. When nothing is any more, all of it goes on.
        let mut recovered = false;
        if self.state.needs_reset().is_some() && !self.rings.iter().any(|ring| ring.broken) {
            self.state.recover();
            recovered = self.state.needs_reset().is_none();
            self.tell_broken();
        }
        // Where its rings are and what they hold is the driver's, whom the front end does not answer for: what is wrong
        // there breaks the queue, not the session.
        if let Err(reason) = self.take_over(index) {
            tracing::warn!(index, %reason, "a queue cannot be used");
            self.memory.log().forget_used(index);
            self.state.reset_queue(index as u16);
            self.rings[index].broken = true;
            self.calls.broken(index);
            self.state.fail(QueueError::HandOver);
        }
        if recovered {
            (0..self.rings.len()).try_for_each(|other| self.update(other))?;
        }
        Ok(())
    }

    /// Hands queue `index` to the device, if that runs and all is known that it takes.
    fn take_over(&mut self, index: usize) -> Result<(), String> {
        // A queue that was started and enabled says that the driver is ready. It may be all that does: QEMU's
        // vhost-user-rng takes VHOST_USER_PROTOCOL_F_STATUS and never sends DRIVER_OK.
        if !self.state.status().intersects(Status::DRIVER_OK | Status::SUSPEND) {
            let ready = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
            self.state.set_status(ready);
            if !self.state.status().contains(Status::FEATURES_OK) {
                let accepted = self.state.driver_features();
                return Err(unacceptable(accepted));
            }
            self.state.set_status(ready | Status::DRIVER_OK);
            self.implied = true;
        }
        if !self.state.is_running() {
            // The driver has to reset the device.
            return Ok(());
        }
        let entries = self.rings[index].entries;
        let Some(areas) = self.areas(index)? else { return Ok(()) };
        let [(descriptors, ..), _, (used, ..)] = areas;
        let state = self.resumed(self.rings[index].base, descriptors, used);
        let (saved, kept, observer) = self.book(index, areas, SavedQueue { state, in_flight: vec![] })?;
        let layout = if self.packed() { Layout::Packed } else { Layout::Modern };
        let anew = kept != Kept::Before && saved.state == QueueState::start(layout);
        tracing::info!(index, entries, ?saved, "a queue starts");
        let queue = index as u16;
        self.state.set_queue_size(queue, entries);
        for (area, (address, ..)) in [Area::Descriptors, Area::Driver, Area::Device].into_iter().zip(areas) {
            self.state.set_queue_address(queue, area, address);
        }
        self.state.set_saved_queue(queue, saved);
        if kept == Kept::No && !self.packed() {
            self.state.keep_queue_order(queue);
        }
        if let Some(observer) = observer {
            self.state.observe_queue(queue, observer);
        }
        self.log_used(index, areas);
        self.state.enable_queue(queue);
        if self.state.queue_state(queue).is_none() {
            return Err(self.state.needs_reset().map_or_else(String::new, |reason| reason.to_string()));
        }
        (self.rings[index].running, self.rings[index].broken) = (true, false);
        self.tell_broken();
        if !anew {
            // Whoever had the queue before may have died between a used buffer and the call for it. What the driver says
            // about calls does not count here: with EVENT_IDX it names a buffer that lies behind us already.
            self.calls.raise(Cause::Queue(queue));
        }
        Ok(())
    }

    /// Has a book kept of what is in flight of queue `index`, if there is memory for it: where the queue goes on, which is
    /// `saved` if nothing else is known, and who keeps it.
    fn book(&mut self, index: usize, areas: Areas, mut saved: SavedQueue) -> Result<Booked, String> {
        let [(descriptors, descriptors_len, _), _, (used, device_len, _)] = areas;
        let packed = self.packed();
        let (queue, entries) = (index as u16, self.rings[index].entries);
        let book = self.inflight.as_ref().filter(|(_, area)| queue < area.queues);
        let knows = book.is_some_and(|(memory, area)| inflight::knows(memory, queue, area.entries, packed));
        // QEMU makes memory for rings of the length it was started with, and over mmio the driver may choose longer ones.
        let Some((memory, area)) = book.filter(|(_, area)| u32::from(area.entries) >= entries) else {
            if knows {
                return Err("more may be in flight than the memory for that can tell".into());
            }
            if book.is_none() {
                return Ok((saved, Kept::Unasked, None));
            }
            tracing::warn!(index, "the ring is longer than the memory for what is in flight: that is not kept");
            // Used in order, what is in flight is what is available behind the used index, whoever is killed.
            if !packed {
                saved.state.available = saved.state.used;
            }
            return Ok((saved, Kept::No, None));
        };
        let pages = |address, len| {
            self.memory.pages(address, len).ok_or_else(|| String::from("it is not in memory, or in several pieces"))
        };
        let size = entries.min(u16::MAX.into()) as u16;
        let observer: Box<dyn Observer> = if packed {
            let ring = pages(descriptors, descriptors_len)?;
            let tracker = packed::Tracker::new(memory, queue, area.entries, size, ring);
            let mut tracker = tracker.map_err(|error| error.to_string())?;
            let found = tracker.recover(Position::unpack(saved.state.used)).map_err(|error| error.to_string())?;
            saved.state = self.put_back(descriptors, size, &found).map_err(|error| error.to_string())?;
            Box::new(tracker)
        } else {
            let tracker = split::Tracker::new(memory, queue, area.entries, size, pages(used, device_len)?);
            let mut tracker = tracker.map_err(|error| error.to_string())?;
            saved = tracker.recover().unwrap_or(saved);
            Box::new(tracker)
        };
        Ok((saved, if knows { Kept::Before } else { Kept::FromNow }, Some(observer)))
    }

    /// Has writes to the used ring of queue `index` logged where the front end says. A packed ring has none.
    fn log_used(&self, index: usize, [_, _, (used, len, access)]: Areas) {
        if !self.packed()
            && let Some(guest) = self.memory.guest_place(used, len, access)
        {
            self.memory.log().add_used(index, guest, len, self.rings[index].log.clone());
        }
    }

    /// Writes what is in flight to where the driver had it: behind what is used. There it is taken again like everything
    /// that is available; what stands there now may be overwritten.
    fn put_back(&self, ring: u64, size: u16, found: &packed::Recovered) -> Result<QueueState, ResolveError> {
        let len = DESCRIPTOR_LEN * u64::from(size);
        let words = self.memory.resolve_words::<u64>(ring, len, Access::READ | Access::WRITE)?;
        let mut at = found.used;
        for descriptor in &found.descriptors {
            assert!(words.store_pair(2 * usize::from(at.index()), *descriptor, Ordering::Release));
            at = at.advanced(1, size);
        }
        let used = found.used.pack();
        Ok(QueueState { available: used, used })
    }

    /// The areas of queue `index`: device address, bytes, what the device does there. None if they are not known yet.
    pub(super) fn areas(&self, index: usize) -> Result<Option<Areas>, String> {
        let Ring { addresses, entries, .. } = &self.rings[index];
        let Some(VringAddr { descriptors, available, used, .. }) = *addresses else { return Ok(None) };
        let size = u16::try_from(*entries).map_err(|_| format!("{entries} entries"))?;
        let [first, second, third] = self.lens(size);
        if self.state.driver_features().contains(Features::ACCESS_PLATFORM) {
            let areas = [(descriptors, first.0, first.1), (available, second.0, second.1), (used, third.0, third.1)];
            let missing = |&(address, len, access): &(u64, u64, Access)| {
                matches!(self.memory.resolve(address, len, access, |_| {}), Err(ResolveError::Pending(_)))
            };
            // All of them are asked for at once.
            return Ok((areas.iter().filter(|area| missing(area)).count() == 0).then_some(areas));
        }
        // QEMU names an address of its own heap for a ring that the driver has placed outside of memory.
        let guest = |user| self.memory.guest_address(user).ok_or_else(|| format!("{user:#x} is in no memory region"));
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

    pub(super) fn packed(&self) -> bool {
        self.state.driver_features().contains(Features::RING_PACKED)
    }

    /// Learns or forgets a translation. Queues that waited for it go on. Those whose areas it takes away stop until they
    /// are kicked: most likely their driver is about to leave.
    pub(super) fn set_translation(&mut self, body: &Body<'_>) -> Result<(), ServeError> {
        let translation: Iotlb = body.fixed()?;
        match translation.kind {
            Iotlb::UPDATE => {
                self.memory.learn(translation).map_err(|error| body.refused(error))?;
                for index in 0..self.rings.len() {
                    self.update(index)?;
                    // Served once the message is answered.
                    self.rings[index].due |= self.state.queue_pending(index as u16).is_some();
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

    /// New memory for what is in flight.
    pub(super) fn new_inflight(&mut self, body: &Body<'_>) -> Result<Option<Reply>, ServeError> {
        let InflightArea { queues, entries, .. } = self.inflight_area(body)?;
        let size = inflight::size(queues, entries, self.packed()) as u64;
        let (file, memory) = memory_file("inflight", size).map_err(|error| body.refused(error))?;
        let area = InflightArea { size, offset: 0, queues, entries };
        self.inflight = Some((memory, area));
        Ok(Some(Reply { payload: area.to_bytes(), fds: vec![file] }))
    }

    pub(super) fn set_inflight(&mut self, body: &Body<'_>, fds: Vec<OwnedFd>) -> Result<(), ServeError> {
        let area = self.inflight_area(body)?;
        let needed = inflight::size(area.queues, area.entries, self.packed()) as u64;
        if area.size < needed || !area.offset.is_multiple_of(8) {
            return Err(body.refused(format!("{} bytes at {}, expected {needed}", area.size, area.offset)));
        }
        if self.rings.iter().any(|ring| ring.running) {
            return Err(body.refused("a queue runs"));
        }
        for fd in fds {
            self.inflight = Some((map(fd, area.offset, area.size).map_err(|error| body.refused(error))?, area));
        }
        Ok(())
    }

    /// Nothing of queue `index` is in flight, and nobody is to think so.
    pub(super) fn forget_inflight(&mut self, index: usize) {
        // The features tell the layout.
        if let Some((memory, area)) = &self.inflight
            && index < usize::from(area.queues)
            && !self.state.driver_features().is_empty()
        {
            inflight::forget(memory, index as u16, area.entries, self.packed());
        }
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
    pub(super) fn first_base(&self) -> u32 {
        if self.packed() { 0x8000_8000 } else { 0 }
    }

    /// Takes queue `index` from the device, once what is in flight is finished.
    pub(super) fn stop(&mut self, index: usize) {
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
        self.memory.log().forget_used(index);
        (self.rings[index].running, self.rings[index].broken) = (false, false);
    }

    pub(super) fn stop_all(&mut self) {
        // Nothing is begun in one while another is finished.
        (0..self.rings.len()).for_each(|index| self.state.hold_queue(index as u16));
        (0..self.rings.len()).for_each(|index| self.stop(index));
    }

    /// Where the device is in the queues that it looks at by itself: it has to, for as long as there is one.
    pub(super) fn polled(&self) -> Vec<(usize, QueueState)> {
        let running = self.state.is_running();
        let rings = self.rings.iter().enumerate().filter(|(_, ring)| running && ring.running && ring.polled);
        rings.filter_map(|(index, _)| Some((index, self.state.queue_state(index as u16)?))).collect()
    }

    pub(super) fn tell_broken(&mut self) {
        for (index, ring) in self.rings.iter_mut().enumerate().filter(|(_, ring)| ring.running && !ring.broken) {
            if let Some(reason) = self.state.queue_broken(index as u16) {
                tracing::warn!(index, %reason, "the driver broke a queue");
                ring.broken = true;
                self.calls.broken(index);
            }
        }
    }
}

/// Why no queue runs with the features that were `accepted`.
fn unacceptable(accepted: Features) -> String {
    if accepted.contains(Features::VERSION_1) {
        return format!("it is to run with unacceptable features: {accepted:?}");
    }
    "the driver did not accept VIRTIO_F_VERSION_1: it takes this for a legacy device, which is not served here; QEMU's devices \
     need disable-legacy=on"
        .into()
}

/// Waits for an event and takes it.
fn wait_for(event: &EventFd) {
    // An error other than an interruption cannot be; either way the caller looks again.
    let _ = poll(&mut [PollFd::new(event.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
    let _ = event.read();
}
