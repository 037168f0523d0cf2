//! Packed rings by hand (2.8).

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use polyvirt_core::memory::{Access, Owner, Words};
use polyvirt_core::queue::QueueConfig;
use polyvirt_core::queue::packed::layout::{
    AVAILABLE, DESCRIPTOR_LEN, EVENT_LEN, EVENTS_AT, Events, Position, Tail, USED,
};
use polyvirt_core::transport::Virtqueue;

use super::{Descriptor, INDIRECT, Made, NEXT, WRITE, shown};
use crate::suite::{Objection, Trace};

/// A packed ring in the driver's hands, or in the device's, without any rules.
///
/// A packed ring has no table in which descriptors could wait for being made available, so the case has one for itself:
/// offering a chain copies it from there to the places in the ring that come next.
pub struct Packed {
    config: QueueConfig,
    index: u16,
    /// The place of the next descriptor that is made available, if the driver is honest.
    pub available: Position,
    /// The place of the next used descriptor.
    pub taken: Position,
    /// (In the device's place) the place of the next descriptor to look at.
    pub seen: Position,
    /// (In the device's place) the place of the next descriptor to use.
    pub put: Position,
    table: Vec<Descriptor>,
    /// By buffer id, the descriptors of a chain that was made available.
    lengths: BTreeMap<u16, u16>,
    descriptors: Words<u64, Owner>,
    driver: Words<u32, Owner>,
    device: Words<u32, Owner>,
    trace: Trace,
}

impl Packed {
    pub(super) fn new<N>(virtqueue: Virtqueue<N>, index: u16, trace: Trace) -> Result<Self, Objection> {
        let Virtqueue { config, descriptors, driver, device, .. } = virtqueue;
        let [available, taken, seen, put] = [Position::START; 4];
        Ok(Self {
            config,
            index,
            available,
            taken,
            seen,
            put,
            table: vec![Descriptor { address: 0, len: 0, flags: 0, next: 0 }; config.size.into()],
            lengths: BTreeMap::new(),
            descriptors: Words::new(descriptors)?,
            driver: Words::new(driver)?,
            device: Words::new(device)?,
            trace,
        })
    }

    fn size(&self) -> u16 {
        self.config.size
    }

    /// The place `count` descriptors behind `at`, further than a round if need be.
    fn behind(&self, at: Position, count: u32) -> Position {
        let size = u32::from(self.size());
        let (laps, rest) = (count / size, (count % size) as u16);
        let at = at.advanced(rest, self.size());
        Position::new(at.index(), at.wrap() ^ (laps % 2 == 1))
    }

    /// The words of an entry of an indirect table: WRITE is the only flag that an honest driver sets there (2.8.8), but
    /// the attacks on tables need INDIRECT too.
    pub(super) fn words(&self, Descriptor { address, len, flags, .. }: Descriptor) -> [u64; 2] {
        [address.to_le(), Tail { len, id: 0, flags: flags & (WRITE | INDIRECT) }.to_word()]
    }

    pub(super) fn parse(&self, words: [u64; 2]) -> Descriptor {
        let Tail { len, flags, .. } = Tail::from_word(words[1]);
        Descriptor { address: u64::from_le(words[0]), len, flags, next: 0 }
    }

    pub(super) fn set_descriptor(&mut self, slot: u16, descriptor: Descriptor) {
        self.table[usize::from(slot)] = descriptor;
    }

    pub(super) fn descriptors(&self) -> &Words<u64, Owner> {
        &self.descriptors
    }

    /// What stands in the ring at `index`: address, and the rest.
    pub fn slot(&self, index: u16) -> (u64, Tail) {
        let at = 2 * usize::from(index);
        let tail = Tail::from_word(self.descriptors.load(at + 1, Ordering::SeqCst));
        (u64::from_le(self.descriptors.load(at, Ordering::SeqCst)), tail)
    }

    /// What reads the flags of a slot, from any thread.
    pub fn looker(&self) -> impl Fn(u16) -> u16 + Send + use<> {
        let ring = self.descriptors.clone();
        move |index| Tail::from_word(ring.load(2 * usize::from(index) + 1, Ordering::SeqCst)).flags
    }

    /// Writes a descriptor into the ring at `index`, whatever the rules.
    pub fn set_slot(&self, index: u16, address: u64, tail: Tail) {
        let at = 2 * usize::from(index);
        let Tail { len, id, flags } = tail;
        let queue = self.index;
        self.trace.note(format!("slot {index} of queue {queue}: {address:#x}+{len:#x}, id {id}, flags {flags:#06x}"));
        self.store(at, address, tail);
    }

    fn store(&self, at: usize, address: u64, tail: Tail) {
        self.descriptors.store(at, address.to_le(), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.descriptors.store(at + 1, tail.to_word(), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The chain at `head` of the case's table. It ends where a link leads out of the table, and when it is as long as
    /// the ring; NEXT stays in its last descriptor then.
    pub fn staged(&self, head: u16) -> Vec<Descriptor> {
        let mut chain = Vec::new();
        let mut at = Some(head);
        while let Some(&descriptor) = at.and_then(|at| self.table.get(usize::from(at))) {
            chain.push(descriptor);
            let goes_on = descriptor.flags & NEXT != 0 && chain.len() < self.table.len();
            at = goes_on.then_some(descriptor.next);
        }
        chain
    }

    /// Writes `chain` as buffer `id` from the next place on; what makes its first descriptor available is
    /// left to [`Packed::publish`].
    pub fn place(&mut self, id: u16, chain: &[Descriptor]) -> Vec<(Position, Tail)> {
        let mut late = Vec::new();
        for (number, &Descriptor { address, len, flags, .. }) in chain.iter().enumerate() {
            let at = self.available;
            // The buffer's id is that of its last descriptor (2.8.6).
            let id = if number + 1 < chain.len() { !id } else { id };
            let tail = Tail { len, id, flags: flags | at.available_flags() };
            if number == 0 {
                self.descriptors.store(2 * usize::from(at.index()), address.to_le(), Ordering::SeqCst);
                late.push((at, tail));
            } else {
                self.store(2 * usize::from(at.index()), address, tail);
            }
            self.available = at.advanced(1, self.size());
        }
        self.lengths.insert(id, chain.len() as u16);
        late
    }

    /// Makes visible what [`Packed::place`] left.
    pub fn publish(&mut self, late: Vec<(Position, Tail)>) {
        fence(Ordering::SeqCst);
        for (at, tail) in late.into_iter().rev() {
            self.descriptors.store(2 * usize::from(at.index()) + 1, tail.to_word(), Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
    }

    /// Makes `chain` available as buffer `id`, at once.
    pub fn offer(&mut self, id: u16, chain: &[Descriptor]) {
        let shown: Vec<_> = chain.iter().copied().map(shown).collect();
        self.trace.note(format!("make [{}] available in queue {} as buffer {id}", shown.join("; "), self.index));
        let late = self.place(id, chain);
        self.publish(late);
    }

    pub(super) fn offer_all(&mut self, heads: &[u16]) {
        let late = heads.iter().flat_map(|&head| self.place(head, &self.staged(head))).collect();
        self.publish(late);
    }

    /// Writes the driver's event suppression structure.
    pub fn set_driver_events(&self, at: u16, flags: u16) {
        self.trace.note(format!("driver events of queue {}: {at:#06x}, flags {flags}", self.index));
        self.driver.store(0, event_word(at, flags), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The driver's event suppression structure: place and flags, reserved bits included.
    pub fn driver_events(&self) -> (u16, u16) {
        parts(self.driver.load(0, Ordering::SeqCst))
    }

    /// Asks for an interrupt at the place `count` descriptors behind the next used one.
    pub fn want_interrupt_behind(&self, count: u32) {
        self.set_driver_events(self.behind(self.taken, count).pack(), EVENTS_AT);
    }

    /// (In the device's place) writes the device's event suppression structure.
    pub fn set_device_events(&self, at: u16, flags: u16) {
        self.trace.note(format!("device events of queue {}: {at:#06x}, flags {flags}", self.index));
        self.device.store(0, event_word(at, flags), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The device's event suppression structure: place and flags, reserved bits included.
    pub fn device_events(&self) -> (u16, u16) {
        fence(Ordering::SeqCst);
        parts(self.device.load(0, Ordering::SeqCst))
    }

    /// (In the device's place) asks for a kick at the place `count` descriptors behind what was seen.
    pub fn ask_for_kick_behind(&self, count: u32) {
        self.set_device_events(self.behind(self.seen, count).pack(), EVENTS_AT);
    }

    /// Whether a used descriptor waits.
    pub(super) fn has_used(&self) -> bool {
        fence(Ordering::SeqCst);
        self.taken.is_used(self.slot(self.taken.index()).1.flags)
    }

    /// Whether `id` was ever made available.
    pub(super) fn knows(&self, id: u32) -> bool {
        u16::try_from(id).is_ok_and(|id| self.lengths.contains_key(&id))
    }

    pub(super) fn take(&mut self) -> Option<(u32, u32)> {
        if !self.has_used() {
            return None;
        }
        let Tail { len, id, flags } = self.slot(self.taken.index()).1;
        let count = self.lengths.get(&id).copied().unwrap_or(1);
        self.taken = self.taken.advanced(count, self.size());
        // Without WRITE the length means nothing (2.8.5).
        Some((id.into(), if flags & WRITE != 0 { len } else { 0 }))
    }

    pub(super) fn next_chain(&mut self) -> Result<Option<Made>, Objection> {
        fence(Ordering::SeqCst);
        let (size, mut at, mut chain) = (self.size(), self.seen, Vec::new());
        loop {
            let (address, Tail { len, id, flags }) = self.slot(at.index());
            if !at.is_available(flags) {
                let expected = "a chain of which every descriptor is available";
                return match chain.len() {
                    0 => Ok(None),
                    _ => Err(Objection::failed(expected, format!("flags {flags:#06x} in slot {}", at.index()))),
                };
            }
            chain.push(Descriptor { address, len, flags: flags & !(AVAILABLE | USED), next: 0 });
            at = at.advanced(1, size);
            if flags & NEXT == 0 {
                self.seen = at;
                self.lengths.insert(id, chain.len() as u16);
                return Ok(Some(Made { id, chain }));
            }
            if chain.len() >= usize::from(size) {
                return Err(Objection::failed("a chain that ends", "one that goes round the ring"));
            }
        }
    }

    pub(super) fn put_used(&mut self, id: u16, len: u32) {
        let write = if len > 0 { WRITE } else { 0 };
        self.put_used_with(id, len, write);
    }

    /// (In the device's place) uses the next descriptor, with `flags` beside those that make it used.
    pub fn put_used_with(&mut self, id: u16, len: u32, flags: u16) {
        let at = self.put;
        let tail = Tail { len, id, flags: flags | at.used_flags() };
        fence(Ordering::SeqCst);
        self.descriptors.store(2 * usize::from(at.index()) + 1, tail.to_word(), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.put = at.advanced(self.lengths.get(&id).copied().unwrap_or(1), self.size());
    }

    /// (In the device's place) overwrites everything in the ring but who owns a descriptor.
    pub(super) fn deface(&self) {
        for index in 0..self.size() {
            let owner = self.slot(index).1.flags & (AVAILABLE | USED);
            let tail = Tail { len: u32::MAX, id: u16::MAX, flags: !(AVAILABLE | USED) | owner };
            self.store(2 * usize::from(index), u64::MAX, tail);
        }
    }

    pub(super) fn areas(&self) -> [(u64, u64, Access); 3] {
        let both = Access::READ | Access::WRITE;
        [
            (self.config.descriptors, DESCRIPTOR_LEN * u64::from(self.size()), both),
            (self.config.driver, EVENT_LEN, Access::READ),
            (self.config.device, EVENT_LEN, both),
        ]
    }

    pub(super) fn next_used(&self) -> [(u64, u64); 2] {
        let slot = self.config.descriptors + DESCRIPTOR_LEN * u64::from(self.taken.index());
        [(slot + 8, 6), (slot + 14, 2)]
    }
}

fn event_word(at: u16, flags: u16) -> u32 {
    (u32::from(at) | u32::from(flags) << 16).to_le()
}

fn parts(word: u32) -> (u16, u16) {
    let word = u32::from_le(word);
    (word as u16, (word >> 16) as u16)
}

/// Whether `word` is something that an event suppression structure may hold: a place in the ring, defined flags, and no
/// reserved bits.
pub fn is_event_structure((at, flags): (u16, u16), size: u16, event_idx: bool) -> bool {
    let most = if event_idx { EVENTS_AT } else { EVENTS_AT - 1 };
    let Events { at, .. } = Events { at: Position::unpack(at), flags };
    flags <= most && (flags != EVENTS_AT || at.index() < size)
}
