//! What is in flight of a packed ring: a header, and an entry for each descriptor that was taken and not used.
//!
//! A used descriptor overwrites one that may still be in flight, so descriptors are kept here, in entries that are
//! linked into chains and into a list of free ones. Each change of the header is one store. Before a used descriptor is
//! written the header says what comes of it, beside what was; afterwards what was is what came. Whether a back end that
//! dies in between had written it, the ring itself tells.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use polyvirt_core::memory::{MemoryError, Owner, Pages, Words};
use polyvirt_core::queue::packed::layout::{AVAILABLE, NEXT, Position, Tail, USED};

use super::{AT_ENTRIES, AT_VERSION, VERSION, part};

/// Bytes of a header: u64 features, u16 version, u16 entries, u16 first free entry, the same before, u16 used index, the
/// same before, u8 used wrap counter, the same before, 10 unused.
pub(super) const HEADER: usize = 32;
/// Bytes of an entry: u8 in flight, 1 unused, u16 next, u16 last of its chain, u16 entries of its chain, u64 counter;
/// then the descriptor: u16 id, u16 flags, u32 length, u64 address.
pub(super) const ENTRY: usize = 32;

/// In units of u64 from the start of a queue's part: the words that hold the first free entry, and where is used.
const AT_FREE: usize = 1;
const AT_USED: usize = 2;

/// Bytes about what is in flight that make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(in super::super) enum Nonsense {
    /// An index beyond the ring.
    #[error("what was in flight: a used index of {0} in a ring of {1}")]
    Index(u16, u16),
    /// There are fewer entries than descriptors.
    #[error("what is in flight: {0} entries for a ring of {1}")]
    Entries(u16, u16),
    /// A chain that is none.
    #[error("what was in flight: the chain at entry {0} is none")]
    Chain(u16),
}

/// What is known of one queue. The ring's lease sees the device take and use chains, and tells.
pub(in super::super) struct Tracker {
    /// The queue's part of the memory.
    words: Words<u64, Owner>,
    entries: u16,
    /// The descriptors, as the device sees them.
    ring: Words<u64, Owner>,
    size: u16,
    state: Mutex<State>,
}

/// What this process knows besides.
struct State {
    /// Where the next chain that the device takes begins, and what was read of it.
    from: Position,
    chain: Vec<(u64, Tail)>,
    /// Numbers chains in the order in which they were taken.
    counter: u64,
    /// The first entries of chains, by buffer id.
    heads: BTreeMap<u16, u16>,
    /// The chain that is just being used.
    using: Option<u16>,
}

/// What was found in the memory.
#[derive(Debug, PartialEq, Eq)]
pub(in super::super) struct Recovered {
    /// Where the next used descriptor goes.
    pub(in super::super) used: Position,
    /// The descriptors of all chains in flight, as they have to stand in the ring from there on: address, rest.
    pub(in super::super) descriptors: Vec<(u64, u64)>,
}

/// The halves and bytes of a header word.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word([u8; 8]);

impl Word {
    fn half(self, index: usize) -> u16 {
        u16::from_ne_bytes([self.0[2 * index], self.0[2 * index + 1]])
    }

    fn set_half(&mut self, index: usize, value: u16) {
        self.0[2 * index..2 * index + 2].copy_from_slice(&value.to_ne_bytes());
    }
}

/// In the word at [`AT_FREE`]: now and before, in units of u16.
const FREE: [usize; 2] = [2, 3];
/// In the word at [`AT_USED`]: now and before, in units of u16 and of u8.
const INDEX: [usize; 2] = [0, 1];
const WRAP: [usize; 2] = [4, 5];
const NOW: usize = 0;
const BEFORE: usize = 1;

impl Tracker {
    /// The part of queue `index` in `memory`, which is divided for queues of `entries`; the queue has `size` descriptors,
    /// which are in `ring`.
    pub(in super::super) fn new(
        memory: &Pages,
        index: u16,
        entries: u16,
        size: u16,
        ring: Pages,
    ) -> Result<Self, MemoryError> {
        let state = State { from: Position::START, chain: Vec::new(), counter: 0, heads: BTreeMap::new(), using: None };
        let words = part(memory, index, entries, true)?;
        Ok(Self { words, entries, ring: Words::new(ring)?, size, state: Mutex::new(state) })
    }

    /// What was in flight, and where the device goes on; at `base` if the memory does not say.
    pub(in super::super) fn recover(&self, base: Position) -> Result<Recovered, Nonsense> {
        if self.entries < self.size {
            return Err(Nonsense::Entries(self.entries, self.size));
        }
        if self.half(AT_VERSION) != VERSION {
            self.begin(base);
        }
        let mut used = self.used(BEFORE);
        if used.index >= self.size {
            return Err(Nonsense::Index(used.index, self.size));
        }
        let now = self.used(NOW);
        let submitted = now != used && {
            let flags = Tail::from_word(self.ring.load(2 * usize::from(used.index) + 1, Ordering::Acquire)).flags;
            flags & (AVAILABLE | USED) != used.available_flags()
        };
        let (free, taken) = if submitted { (NOW, now) } else { (BEFORE, used) };
        used = taken;
        if used.index >= self.size {
            return Err(Nonsense::Index(used.index, self.size));
        }
        let first_free = self.free(free);
        self.set_free([first_free; 2]);
        self.set_used([used; 2]);
        let chains = self.chains(first_free)?;
        let mut state = self.lock();
        state.counter = chains.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let mut descriptors = Vec::new();
        let mut at = used;
        for (_, chain) in &chains {
            let (Some(&head), Some(&last)) = (chain.first(), chain.last()) else { continue };
            let id = self.descriptor(last).1.id;
            if descriptors.len() + chain.len() > self.size.into() || state.heads.insert(id, head).is_some() {
                return Err(Nonsense::Chain(head));
            }
            for &entry in chain {
                let (address, tail) = self.descriptor(entry);
                let next = if entry == last { 0 } else { NEXT };
                let flags = tail.flags & !(AVAILABLE | USED | NEXT) | next | at.available_flags();
                descriptors.push((address.to_le(), Tail { flags, ..tail }.to_word()));
                at = at.advanced(1, self.size);
            }
        }
        state.from = at;
        Ok(Recovered { used, descriptors })
    }

    /// Nothing is in flight, and the device goes on at `base`.
    fn begin(&self, base: Position) {
        for entry in 0..self.entries {
            self.words.store::<u64>(at(entry), 0, Ordering::Relaxed);
            self.set_entry_half(entry, 1, entry + 1);
        }
        self.words.store(AT_ENTRIES, self.entries, Ordering::Relaxed);
        self.set_free([0; 2]);
        self.set_used([base; 2]);
        self.words.store(AT_VERSION, VERSION, Ordering::Release);
    }

    /// The chains in flight, in their order: counter, entries. What is in the list of free entries is not in flight.
    fn chains(&self, first_free: u16) -> Result<Vec<(u64, Vec<u16>)>, Nonsense> {
        let mut seen = vec![false; self.entries.into()];
        let mut free = first_free;
        while let Some(seen @ false) = seen.get_mut(usize::from(free)) {
            *seen = true;
            self.set_in_flight(free, false);
            free = self.entry_half(free, 1);
        }
        let mut chains = Vec::new();
        for head in 0..self.entries {
            if seen[usize::from(head)] || !self.is_in_flight(head) {
                continue;
            }
            let (last, count) = (self.entry_half(head, 2), self.entry_half(head, 3));
            let mut chain = vec![head];
            while chain.len() < count.into() {
                chain.push(self.entry_half(chain[chain.len() - 1], 1));
                if chain.len() > self.size.into() {
                    return Err(Nonsense::Chain(head));
                }
            }
            for &entry in &chain {
                match seen.get_mut(usize::from(entry)) {
                    Some(seen @ false) => *seen = true,
                    _ => return Err(Nonsense::Chain(head)),
                }
            }
            if count == 0 || chain.last() != Some(&last) {
                return Err(Nonsense::Chain(head));
            }
            chains.push((self.words.load::<u64>(at(head) + 1, Ordering::Relaxed), chain));
        }
        chains.sort_by_key(|(counter, _)| *counter);
        Ok(chains)
    }

    /// `len` bytes at `offset` of the ring were read: a descriptor that is available is part of a chain that is taken.
    pub(in super::super) fn read_ring(&self, offset: usize, len: usize) {
        let mut state = self.lock();
        let from = state.from;
        let index = (offset / 16) as u16;
        if len != 16 || index >= self.size {
            return;
        }
        // The device may begin with a chain anew, after it could not see all of it.
        let place = from.advanced(state.chain.len() as u16, self.size);
        if index == from.index && index != place.index {
            state.chain.clear();
        } else if index != place.index {
            return;
        }
        let place = from.advanced(state.chain.len() as u16, self.size);
        // What the device has seen stays as it is. What it has not, because it came only now, it will see the next time.
        let tail = Tail::from_word(self.ring.load(2 * usize::from(index) + 1, Ordering::Acquire));
        if !place.is_available(tail.flags) || state.chain.len() >= self.size.into() {
            return;
        }
        let address = u64::from_le(self.ring.load(2 * usize::from(index), Ordering::Relaxed));
        state.chain.push((address, tail));
        if tail.flags & NEXT == 0 {
            self.take(&mut state);
        }
    }

    /// The device has taken the chain that was read.
    fn take(&self, state: &mut State) {
        let chain = std::mem::take(&mut state.chain);
        state.from = state.from.advanced(chain.len() as u16, self.size);
        let head = self.free(BEFORE);
        let Some(id) = chain.last().map(|(_, tail)| tail.id) else { return };
        // The device does not take an id twice, nor more than the ring has.
        if state.heads.contains_key(&id) {
            return;
        }
        let (mut free, mut last) = (head, head);
        for &(address, tail) in &chain {
            if free >= self.entries {
                return;
            }
            self.set_descriptor(free, address, tail);
            last = free;
            free = self.entry_half(free, 1);
        }
        self.set_entry_half(head, 2, last);
        self.set_entry_half(head, 3, chain.len() as u16);
        self.words.store(at(head) + 1, state.counter, Ordering::Relaxed);
        state.counter = state.counter.wrapping_add(1);
        self.set_in_flight(head, true);
        self.set_free([free; 2]);
        state.heads.insert(id, head);
    }

    /// `word` is about to be stored at `offset` of the ring: a descriptor that is used.
    pub(in super::super) fn writes_ring(&self, offset: usize, len: usize, word: u64) {
        let mut state = self.lock();
        if len != 8 || offset % 16 != 8 {
            return;
        }
        let Some(head) = state.heads.remove(&Tail::from_word(word).id) else { return };
        let (last, count) = (self.entry_half(head, 2), self.entry_half(head, 3));
        let (first_free, used) = (self.free(BEFORE), self.used(BEFORE));
        if last < self.entries {
            self.set_entry_half(last, 1, first_free);
        }
        self.set_free([head, first_free]);
        self.set_used([used.advanced(count.min(self.size), self.size), used]);
        state.using = Some(head);
    }

    /// It was stored.
    pub(in super::super) fn wrote_ring(&self) {
        let Some(head) = self.lock().using.take() else { return };
        self.set_in_flight(head, false);
        self.set_free([self.free(NOW); 2]);
        self.set_used([self.used(NOW); 2]);
    }

    fn free(&self, when: usize) -> u16 {
        self.word(AT_FREE).half(FREE[when])
    }

    fn set_free(&self, [now, before]: [u16; 2]) {
        let mut word = self.word(AT_FREE);
        word.set_half(FREE[NOW], now);
        word.set_half(FREE[BEFORE], before);
        self.set_word(AT_FREE, word);
    }

    fn used(&self, when: usize) -> Position {
        let word = self.word(AT_USED);
        Position::new(word.half(INDEX[when]), word.0[WRAP[when]] != 0)
    }

    fn set_used(&self, places: [Position; 2]) {
        let mut word = self.word(AT_USED);
        for (when, place) in places.into_iter().enumerate() {
            word.set_half(INDEX[when], place.index);
            word.0[WRAP[when]] = place.wrap().into();
        }
        self.set_word(AT_USED, word);
    }

    fn word(&self, index: usize) -> Word {
        Word(self.words.load::<u64>(index, Ordering::Acquire).to_ne_bytes())
    }

    fn set_word(&self, index: usize, word: Word) {
        self.words.store(index, u64::from_ne_bytes(word.0), Ordering::Release);
    }

    fn half(&self, index: usize) -> u16 {
        self.words.load(index, Ordering::Acquire)
    }

    fn is_in_flight(&self, entry: u16) -> bool {
        self.word(at(entry)).0[0] == 1
    }

    fn set_in_flight(&self, entry: u16, in_flight: bool) {
        let mut word = self.word(at(entry));
        word.0[0] = in_flight.into();
        self.set_word(at(entry), word);
    }

    /// The half at `index` of an entry's first word.
    fn entry_half(&self, entry: u16, index: usize) -> u16 {
        if entry < self.entries { self.word(at(entry)).half(index) } else { self.entries }
    }

    fn set_entry_half(&self, entry: u16, index: usize, value: u16) {
        self.words.store(4 * at(entry) + index, value, Ordering::Release);
    }

    fn descriptor(&self, entry: u16) -> (u64, Tail) {
        let [id, flags] = [0, 1].map(|half| self.half(4 * (at(entry) + 2) + half));
        let len = self.words.load::<u32>(2 * (at(entry) + 2) + 1, Ordering::Relaxed);
        (self.words.load(at(entry) + 3, Ordering::Relaxed), Tail { len, id, flags })
    }

    fn set_descriptor(&self, entry: u16, address: u64, Tail { len, id, flags }: Tail) {
        for (half, value) in [id, flags].into_iter().enumerate() {
            self.words.store(4 * (at(entry) + 2) + half, value, Ordering::Relaxed);
        }
        self.words.store(2 * (at(entry) + 2) + 1, len, Ordering::Relaxed);
        self.words.store(at(entry) + 3, address, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Entry `entry`, in units of u64.
fn at(entry: u16) -> usize {
    (HEADER + ENTRY * usize::from(entry)) / 8
}

#[cfg(test)]
mod tests {
    use super::super::size;
    use super::*;

    const SIZE: u16 = 8;

    /// A driver and a device on one ring, and what is true about it.
    struct Rig {
        memory: Pages,
        ring: Pages,
        next: Position,
        /// Made available and not taken: ids.
        available: Vec<(u16, u16)>,
        /// Taken and not used, in order: id, descriptors.
        taken: Vec<(u16, u16)>,
        from: Position,
        used: Position,
    }

    impl Rig {
        fn new() -> Self {
            let (memory, ring) = (Pages::allocate(size(2, SIZE, true)), Pages::allocate(4096));
            let start = Position::START;
            Self { memory, ring, next: start, available: vec![], taken: vec![], from: start, used: start }
        }

        fn tracker(&self) -> Tracker {
            Tracker::new(&self.memory, 1, SIZE, SIZE, self.ring.clone()).unwrap()
        }

        /// What comes of it if the back end dies now.
        fn recovered(&self) -> Recovered {
            let copy = |pages: &Pages| {
                let mut bytes = vec![0; pages.len()];
                pages.read(0, &mut bytes).unwrap();
                let copy = Pages::allocate(bytes.len());
                copy.write(0, &bytes).unwrap();
                copy
            };
            let tracker = Tracker::new(&copy(&self.memory), 1, SIZE, SIZE, copy(&self.ring)).unwrap();
            tracker.recover(Position::new(3, false)).unwrap()
        }

        /// Where the device goes on, and chains as they have to be in the ring.
        fn expected(&self) -> Recovered {
            let mut at = self.used;
            let mut descriptors = Vec::new();
            for &(id, count) in &self.taken {
                for piece in 0..count {
                    descriptors.push(descriptor(at, id, piece, count));
                    at = at.advanced(1, SIZE);
                }
            }
            Recovered { used: self.used, descriptors }
        }

        fn free(&self) -> u16 {
            SIZE - self.available.iter().chain(&self.taken).map(|(_, count)| count).sum::<u16>()
        }

        fn add(&mut self, id: u16, count: u16) {
            for piece in (0..count).rev() {
                let at = self.next.advanced(piece, SIZE);
                let (address, rest) = descriptor(at, id, piece, count);
                let bytes = [address.to_ne_bytes(), rest.to_ne_bytes()].concat();
                self.ring.write(16 * usize::from(at.index), &bytes).unwrap();
            }
            self.next = self.next.advanced(count, SIZE);
            self.available.push((id, count));
        }

        fn take(&mut self, tracker: &Tracker) {
            let (id, count) = self.available.remove(0);
            for piece in 0..count {
                assert_eq!(self.recovered(), self.expected(), "in the middle of a chain");
                tracker.read_ring(16 * usize::from(self.from.advanced(piece, SIZE).index), 16);
            }
            self.from = self.from.advanced(count, SIZE);
            self.taken.push((id, count));
        }

        /// Uses the chain at `which`; the driver may be so quick that its slot has the next chain at once.
        fn put(&mut self, tracker: &Tracker, which: usize, at_once: Option<u16>) {
            let (id, count) = self.taken[which];
            let at = self.used;
            let word = Tail { len: 0, id, flags: at.used_flags() }.to_word();
            let offset = 16 * usize::from(at.index) + 8;
            tracker.writes_ring(offset, 8, word);
            assert_eq!(self.recovered(), self.expected(), "it is not written yet");
            self.ring.write(offset, &word.to_ne_bytes()).unwrap();
            self.taken.remove(which);
            self.used = self.used.advanced(count, SIZE);
            assert_eq!(self.recovered(), self.expected(), "it is written");
            if let Some(id) = at_once {
                self.add(id, 1);
                assert_eq!(self.recovered(), self.expected(), "it was overwritten");
            }
            tracker.wrote_ring();
        }
    }

    fn descriptor(at: Position, id: u16, piece: u16, count: u16) -> (u64, u64) {
        let next = if piece + 1 == count { 0 } else { NEXT };
        let flags = next | at.available_flags();
        let address = u64::from(id) << 16 | u64::from(piece);
        (address.to_le(), Tail { len: 100 + u32::from(piece), id, flags }.to_word())
    }

    #[test]
    fn whenever_the_back_end_dies_what_was_taken_and_not_used_is_in_flight_in_its_order() {
        let mut rig = Rig::new();
        let tracker = rig.tracker();
        assert_eq!(tracker.recover(Position::START).unwrap(), rig.expected());
        let mut dice = 1u32;
        let mut roll = |sides: usize| {
            dice = dice.wrapping_mul(1664525).wrapping_add(1013904223);
            (dice >> 16) as usize % sides
        };
        for id in 0..3000 {
            let count = 1 + roll(3) as u16;
            match roll(3) {
                0 if rig.free() >= count => rig.add(id, count),
                1 if !rig.available.is_empty() => rig.take(&tracker),
                2 if !rig.taken.is_empty() => {
                    let which = roll(rig.taken.len());
                    let at_once = (roll(2) == 0).then_some(id);
                    rig.put(&tracker, which, at_once);
                }
                // A look at the ring that finds nothing, or only what is to be taken later.
                _ => tracker.read_ring(16 * usize::from(rig.from.index), 8),
            }
            assert_eq!(rig.recovered(), rig.expected());
        }
        assert!(rig.taken.len() + rig.available.len() > 0);
    }

    #[test]
    fn a_chain_that_could_not_be_taken_at_first_is_in_flight_once() {
        let mut rig = Rig::new();
        let tracker = rig.tracker();
        tracker.recover(Position::START).unwrap();
        rig.add(7, 3);
        for place in [0, 1, 0, 1, 2] {
            tracker.read_ring(16 * place, 16);
        }
        (rig.taken, rig.available) = (rig.available.clone(), vec![]);
        assert_eq!(rig.recovered(), rig.expected());
        // It was seen before the device knew: the device reads it again.
        (0..3).for_each(|place| tracker.read_ring(16 * place, 16));
        assert_eq!(rig.recovered(), rig.expected());
    }

    #[test]
    fn nonsense_is_refused() {
        let rig = Rig::new();
        let tracker = rig.tracker();
        tracker.recover(Position::START).unwrap();
        tracker.set_used([Position::new(SIZE, true); 2]);
        assert_eq!(rig.tracker().recover(Position::START), Err(Nonsense::Index(SIZE, SIZE)));
        tracker.set_used([Position::START; 2]);
        // In flight, and of no descriptors; then a chain in a circle; then one that ends nowhere.
        tracker.set_free([1; 2]);
        tracker.set_in_flight(0, true);
        assert_eq!(rig.tracker().recover(Position::START), Err(Nonsense::Chain(0)));
        for (next, count) in [(0, 2), (0, u16::MAX), (SIZE, 2)] {
            tracker.set_entry_half(0, 1, next);
            tracker.set_entry_half(0, 3, count);
            assert_eq!(rig.tracker().recover(Position::START), Err(Nonsense::Chain(0)));
        }
        let small = Tracker::new(&rig.memory, 1, SIZE, SIZE + 1, rig.ring.clone()).unwrap();
        assert_eq!(small.recover(Position::START), Err(Nonsense::Entries(SIZE, SIZE + 1)));
        assert!(Tracker::new(&rig.memory, 300, SIZE, SIZE, rig.ring.clone()).is_err());
    }
}
