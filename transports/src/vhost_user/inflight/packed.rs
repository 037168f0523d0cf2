//! What is in flight of a packed ring: a header, and an entry for each descriptor that was taken and not used.
//!
//! A used descriptor overwrites one that may still be in flight, so descriptors are kept here, in entries that are
//! linked into chains and into a list of free ones. Each change of the header is one store. Before a used descriptor is
//! written the header says what comes of it, beside what was; afterwards what was is what came. Whether a back end that
//! dies in between had written it, the ring itself tells.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use polyvirt_core::memory::{MemoryError, Owner, Pages, Words};
use polyvirt_core::queue::packed::layout::{AVAILABLE, NEXT, Position, Tail, USED};
use polyvirt_core::queue::{Observer, Taken};

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

/// What is known of one queue, of which it sees the device take and use chains.
pub(in super::super) struct Tracker {
    /// The queue's part of the memory.
    words: Words<u64, Owner>,
    entries: u16,
    /// The descriptors, as the device sees them.
    ring: Words<u64, Owner>,
    size: u16,
    /// Numbers chains in the order in which they were taken.
    counter: u64,
    /// The first entries of chains, by buffer id.
    heads: BTreeMap<u16, u16>,
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
        let words = part(memory, index, entries, true)?;
        Ok(Self { words, entries, ring: Words::new(ring)?, size, counter: 0, heads: BTreeMap::new() })
    }

    /// What was in flight, and where the device goes on; at `base` if the memory does not say.
    pub(in super::super) fn recover(&mut self, base: Position) -> Result<Recovered, Nonsense> {
        if self.entries < self.size {
            return Err(Nonsense::Entries(self.entries, self.size));
        }
        if self.half(AT_VERSION) != VERSION {
            self.begin(base);
        }
        let mut used = self.next_used(BEFORE);
        if used.index() >= self.size {
            return Err(Nonsense::Index(used.index(), self.size));
        }
        let now = self.next_used(NOW);
        let submitted = now != used && {
            let flags = Tail::from_word(self.ring.load(2 * usize::from(used.index()) + 1, Ordering::Acquire)).flags;
            flags & (AVAILABLE | USED) != used.available_flags()
        };
        let (free, taken) = if submitted { (NOW, now) } else { (BEFORE, used) };
        used = taken;
        if used.index() >= self.size {
            return Err(Nonsense::Index(used.index(), self.size));
        }
        let first_free = self.free(free);
        self.set_free([first_free; 2]);
        self.set_used([used; 2]);
        let chains = self.chains(first_free)?;
        self.counter = chains.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let mut descriptors = Vec::new();
        let mut at = used;
        for (_, chain) in &chains {
            let (Some(&head), Some(&last)) = (chain.first(), chain.last()) else { continue };
            let id = self.descriptor(last).1.id;
            if descriptors.len() + chain.len() > self.size.into() || self.heads.insert(id, head).is_some() {
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

    fn free(&self, when: usize) -> u16 {
        self.word(AT_FREE).half(FREE[when])
    }

    fn set_free(&self, [now, before]: [u16; 2]) {
        let mut word = self.word(AT_FREE);
        word.set_half(FREE[NOW], now);
        word.set_half(FREE[BEFORE], before);
        self.set_word(AT_FREE, word);
    }

    fn next_used(&self, when: usize) -> Position {
        let word = self.word(AT_USED);
        Position::new(word.half(INDEX[when]), word.0[WRAP[when]] != 0)
    }

    fn set_used(&self, places: [Position; 2]) {
        let mut word = self.word(AT_USED);
        for (when, place) in places.into_iter().enumerate() {
            word.set_half(INDEX[when], place.index());
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
}

impl Observer for Tracker {
    fn taken(&mut self, Taken { head: id, start, entries: count }: Taken) {
        // One that was in flight before is known already.
        if self.heads.contains_key(&id) {
            return;
        }
        let head = self.free(BEFORE);
        let (mut free, mut last) = (head, head);
        for index in 0..count {
            if free >= self.entries {
                return;
            }
            // A driver that changes them now is answered for what it wrote last, by whoever goes on.
            let place = 2 * usize::from(start.advanced(index, self.size).index());
            let tail = Tail::from_word(self.ring.load(place + 1, Ordering::Relaxed));
            self.set_descriptor(free, u64::from_le(self.ring.load(place, Ordering::Relaxed)), Tail { id, ..tail });
            last = free;
            free = self.entry_half(free, 1);
        }
        self.set_entry_half(head, 2, last);
        self.set_entry_half(head, 3, count);
        self.words.store(at(head) + 1, self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.set_in_flight(head, true);
        self.set_free([free; 2]);
        self.heads.insert(id, head);
    }

    fn using(&mut self, id: u16) {
        let Some(&head) = self.heads.get(&id) else { return };
        let (last, count) = (self.entry_half(head, 2), self.entry_half(head, 3));
        let (first_free, used) = (self.free(BEFORE), self.next_used(BEFORE));
        if last < self.entries {
            self.set_entry_half(last, 1, first_free);
        }
        self.set_free([head, first_free]);
        self.set_used([used.advanced(count.min(self.size), self.size), used]);
    }

    fn used(&mut self, id: u16) {
        let Some(head) = self.heads.remove(&id) else { return };
        self.set_in_flight(head, false);
        self.set_free([self.free(NOW); 2]);
        self.set_used([self.next_used(NOW); 2]);
    }
}

/// Entry `entry`, in units of u64.
fn at(entry: u16) -> usize {
    (HEADER + ENTRY * usize::from(entry)) / 8
}

#[cfg(test)]
mod tests;
