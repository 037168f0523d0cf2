//! What is in flight of a split ring: a header, and an entry for each descriptor.
//!
//! Before a chain's completion is visible its head is noted, afterwards the chain is crossed out.

use std::sync::atomic::Ordering;

use polyvirt_core::memory::{MemoryError, Owner, Pages, Words};
use polyvirt_core::queue::split::layout::INDEX;
use polyvirt_core::queue::{Observer, QueueState, SavedQueue, Taken};

use super::{AT_ENTRIES, AT_VERSION, VERSION, part};

/// Bytes of a header: u64 features, u16 version, u16 entries, u16 head of the last completion, u16 used index.
pub(super) const HEADER: usize = 16;
/// Bytes of an entry: u8 in flight, 5 unused, u16 next, u64 counter.
pub(super) const ENTRY: usize = 16;

/// In units of u16 from the start of a queue's part.
const AT_LAST_HEAD: usize = 6;
const AT_USED_INDEX: usize = 7;

/// What is known of one queue, of which it sees the device take and use chains.
pub(in super::super) struct Tracker {
    /// The queue's part of the memory.
    words: Words<u64, Owner>,
    entries: u16,
    /// The used ring, as the device sees it.
    used: Words<u32, Owner>,
    /// Numbers chains in the order in which they were taken.
    counter: u64,
}

impl Tracker {
    /// The part of queue `index` in `memory`, which is divided for queues of `entries`; the queue has `size` entries, and
    /// its used ring is there.
    pub(in super::super) fn new(
        memory: &Pages,
        index: u16,
        entries: u16,
        size: u16,
        used: Pages,
    ) -> Result<Self, MemoryError> {
        Ok(Self {
            words: part(memory, index, entries, false)?,
            entries: entries.min(size),
            used: Words::new(used)?,
            counter: 0,
        })
    }

    /// Where the device goes on: behind what is used, with what was in flight before all others. None if the memory does
    /// not say.
    pub(in super::super) fn recover(&mut self) -> Option<SavedQueue> {
        let used = u16::from_le(self.used.load::<u16>(INDEX, Ordering::Acquire));
        let known = self.half(AT_VERSION) == VERSION;
        if !known {
            (0..self.entries).for_each(|head| self.cross_out(head));
            self.set_half(AT_ENTRIES, self.entries);
            self.set_half(AT_USED_INDEX, used);
            self.set_half(AT_VERSION, VERSION);
        }
        if self.half(AT_USED_INDEX) != used {
            // The completion was seen, and the end came before it was crossed out.
            self.cross_out(self.half(AT_LAST_HEAD));
            self.set_half(AT_USED_INDEX, used);
        }
        // Each counter is read once: another process may write here, and sorting takes one answer for granted.
        let mut taken = Vec::new();
        for head in 0..self.entries {
            if self.is_in_flight(head) {
                taken.push((self.words.load::<u64>(at(head) + 1, Ordering::Relaxed), head));
            }
        }
        taken.sort_unstable();
        let last = taken.last().map_or(0, |&(counter, _)| counter);
        self.counter = last.wrapping_add(1);
        let heads: Vec<_> = taken.into_iter().map(|(_, head)| head).collect();
        let available = used.wrapping_add(heads.len() as u16);
        known.then_some(SavedQueue { state: QueueState { available, used }, in_flight: heads })
    }

    fn is_in_flight(&self, head: u16) -> bool {
        self.words.load::<u64>(at(head), Ordering::Acquire).to_ne_bytes()[0] == 1
    }

    fn cross_out(&self, head: u16) {
        if head < self.entries {
            self.words.store::<u64>(at(head), 0, Ordering::Release);
        }
    }

    fn half(&self, index: usize) -> u16 {
        self.words.load(index, Ordering::Acquire)
    }

    fn set_half(&self, index: usize, value: u16) {
        self.words.store(index, value, Ordering::Release);
    }
}

impl Observer for Tracker {
    fn taken(&mut self, Taken { head, .. }: Taken) {
        // One that was in flight before keeps its number.
        if head < self.entries && !self.is_in_flight(head) {
            self.words.store(at(head) + 1, self.counter, Ordering::Relaxed);
            self.counter = self.counter.wrapping_add(1);
            // Release: a chain that is in flight has its number.
            self.words.store::<u64>(at(head), u64::from_ne_bytes([1, 0, 0, 0, 0, 0, 0, 0]), Ordering::Release);
        }
    }

    fn using(&mut self, head: u16) {
        self.set_half(AT_LAST_HEAD, head);
    }

    fn used(&mut self, head: u16) {
        self.cross_out(head);
        self.set_half(AT_USED_INDEX, u16::from_le(self.used.load::<u16>(INDEX, Ordering::Relaxed)));
    }
}

/// The entry of `head`, in units of u64.
fn at(head: u16) -> usize {
    (HEADER + ENTRY * usize::from(head)) / 8
}

#[cfg(test)]
mod tests {
    use super::super::size;
    use super::*;
    use polyvirt_core::queue::packed::layout::Position;

    struct Rig {
        memory: Pages,
        used: Pages,
    }

    impl Rig {
        fn new() -> Self {
            let memory = Pages::allocate(size(2, 8, false));
            Self { memory, used: Pages::allocate(4096) }
        }

        fn tracker(&self) -> Tracker {
            Tracker::new(&self.memory, 1, 8, 8, self.used.clone()).unwrap()
        }

        fn publish(&self, index: u16) {
            self.used.write(2, &index.to_le_bytes()).unwrap();
        }
    }

    fn taken(head: u16) -> Taken {
        Taken { head, start: Position::START, entries: 1 }
    }

    #[test]
    fn what_was_taken_and_not_used_is_in_flight_in_its_order() {
        let rig = Rig::new();
        let mut tracker = rig.tracker();
        assert_eq!(tracker.recover(), None);
        // 5 is put back, and taken again.
        for head in [5, 2, 7, 5] {
            tracker.taken(taken(head));
        }
        tracker.using(2);
        rig.publish(1);
        tracker.used(2);
        let saved = rig.tracker().recover().unwrap();
        assert_eq!(saved.in_flight, [5, 7]);
        assert_eq!(saved.state, QueueState { available: 3, used: 1 });
    }

    #[test]
    fn a_completion_that_was_seen_is_not_in_flight_even_if_it_was_not_crossed_out() {
        let rig = Rig::new();
        let mut tracker = rig.tracker();
        assert_eq!(tracker.recover(), None);
        tracker.taken(taken(3));
        tracker.taken(taken(4));
        tracker.using(3);
        assert_eq!(rig.tracker().recover().unwrap().in_flight, [3, 4], "not seen yet");
        rig.publish(1);
        assert_eq!(rig.tracker().recover().unwrap().in_flight, [4], "the end came right behind the index");
    }

    #[test]
    fn counters_that_another_process_rewrites_do_no_harm() {
        const ENTRIES: u16 = 512;
        let memory = Pages::allocate(size(1, ENTRIES, false));
        let mut tracker = Tracker::new(&memory, 0, ENTRIES, ENTRIES, Pages::allocate(8192)).unwrap();
        assert_eq!(tracker.recover(), None);
        let words = tracker.words.clone();
        let set = |head: u16, counter: u64| words.store(at(head) + 1, counter, Ordering::Relaxed);
        for head in 0..ENTRIES {
            tracker.words.store::<u64>(at(head), u64::from_ne_bytes([1, 0, 0, 0, 0, 0, 0, 0]), Ordering::Relaxed);
        }
        // Dropped however the test ends.
        let (going, end) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut number = 1u64;
                while end.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                    for head in 0..ENTRIES {
                        number = number.wrapping_mul(6364136223846793005).wrapping_add(1);
                        set(head, number >> 8);
                    }
                }
            });
            let _going = going;
            for _ in 0..300 {
                assert_eq!(tracker.recover().map(|saved| saved.in_flight.len()), Some(ENTRIES.into()));
            }
        });
    }

    #[test]
    fn heads_beyond_the_queue_and_memory_too_small_do_no_harm() {
        let rig = Rig::new();
        let mut tracker = rig.tracker();
        tracker.taken(taken(8));
        tracker.using(u16::MAX);
        tracker.used(u16::MAX);
        assert_eq!(tracker.recover(), None);
        assert!(Tracker::new(&rig.memory, 300, 8, 8, rig.used.clone()).is_err());
    }
}
