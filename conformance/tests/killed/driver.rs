//! A driver of a block device whose every bit of state is in guest memory, so that it outlives the process that runs it
//! – wherever that was killed.

use std::sync::atomic::Ordering;

use polyvirt_core::memory::{Owner, Pages, Words};
use polyvirt_core::queue::packed::layout::{AVAILABLE, Position, Tail};
use polyvirt_core::queue::split::layout::{available_entry, used_entry};

/// Bytes of guest memory, which begins at 0.
pub(crate) const RAM: u64 = 1 << 20;
/// Entries of the queue.
pub(crate) const SIZE: u16 = 64;
/// Requests at once: three descriptors each.
const SLOTS: u16 = 16;
/// Sectors that are written, one after another, over and over.
pub(crate) const SECTORS: u64 = 64;
/// Requests in all, at most.
pub(crate) const MOST: u64 = 0x8000;

/// Where things are in guest memory.
pub(crate) const DESCRIPTORS: u64 = 0;
pub(crate) const AVAILABLE_RING: u64 = 0x1000;
pub(crate) const USED_RING: u64 = 0x2000;
const STATE: usize = 0x3000 / 8;
const SLOT: usize = 0x3100 / 8;
const ACKNOWLEDGED: usize = 0x4000;
const BUFFERS: u64 = 0x20000;

/// In the state: the next to make available, the next to be used, the number of the next request.
const NEXT: usize = STATE;
const LAST: usize = STATE + 1;
const NUMBER: usize = STATE + 2;

/// States of a slot.
const FREE: u64 = 0;
const PREPARED: u64 = 1;
const PUBLISHED: u64 = 2;

/// The flags of descriptors, the same in both formats.
const CHAINED: u16 = 1;
const WRITE: u16 = 2;

pub(crate) struct Driver {
    words: Words<u64, Owner>,
    pages: Pages,
    packed: bool,
    /// Whether the first used buffer may be one that was seen before.
    again: bool,
}

impl Driver {
    /// Goes on in the memory `pages`, wherever the driver before was.
    pub(crate) fn new(pages: &Pages, packed: bool) -> Self {
        let driver = Self { words: Words::new(pages.clone()).unwrap(), pages: pages.clone(), packed, again: true };
        if packed && driver.get(NUMBER) == 0 {
            driver.set(NEXT, Position::START.pack().into());
            driver.set(LAST, Position::START.pack().into());
        }
        for slot in 0..SLOTS {
            if driver.state(slot) == PREPARED {
                driver.set_state(slot, if driver.is_published(slot) { PUBLISHED } else { FREE });
            }
            // Of the last request only: older ones were made available there rounds ago.
            let last = driver.get(place(slot) + 1) + 1 == driver.get(NUMBER);
            if last && driver.state(slot) == PUBLISHED && driver.get(place(slot) + 2) == driver.get(NEXT) {
                driver.advance();
            }
        }
        driver
    }

    /// Makes as many requests available as there is room for, up to request `until`. How many.
    pub(crate) fn submit(&self, until: u64) -> usize {
        let free = (0..SLOTS).filter(|slot| self.state(*slot) == FREE && self.get(NUMBER) < until);
        free.map(|slot| self.submit_one(slot)).count()
    }

    fn submit_one(&self, slot: u16) {
        let number = self.get(NUMBER);
        assert!(number < MOST);
        self.set(NUMBER, number + 1);
        let buffer = buffer(slot);
        let header = [&1u32.to_le_bytes()[..], &[0; 4], &(number % SECTORS).to_le_bytes()].concat();
        self.pages.write(buffer as usize, &header).unwrap();
        self.pages.write(buffer as usize + 0x200, &number.to_le_bytes().repeat(64)).unwrap();
        self.pages.write(buffer as usize + 0x800, &[0xff]).unwrap();
        self.set(place(slot) + 1, number);
        self.set(place(slot) + 2, self.get(NEXT));
        self.set_state(slot, PREPARED);
        self.publish(slot);
        self.set_state(slot, PUBLISHED);
        self.advance();
    }

    fn publish(&self, slot: u16) {
        let pieces = [(0, 16, CHAINED), (0x200, 512, CHAINED), (0x800, 1, WRITE)];
        if self.packed {
            let first = Position::unpack(self.get(NEXT) as u16);
            // The first one last: it makes the others available, too.
            for (step, (offset, len, flags)) in pieces.into_iter().enumerate().rev() {
                let at = first.advanced(step as u16, SIZE);
                let tail = Tail { len, id: slot, flags: flags | at.available_flags() };
                let words = ((buffer(slot) + offset).to_le(), tail.to_word());
                assert!(self.words.store_pair(2 * usize::from(at.index()), words, Ordering::Release));
            }
            return;
        }
        for (step, (offset, len, flags)) in pieces.into_iter().enumerate() {
            let index = 3 * slot + step as u16;
            let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(index + 1) << 48;
            let words = ((buffer(slot) + offset).to_le(), rest.to_le());
            assert!(self.words.store_pair(2 * usize::from(index), words, Ordering::Relaxed));
        }
        let next = self.get(NEXT) as u16;
        let entry = AVAILABLE_RING as usize / 2 + available_entry(usize::from(next % SIZE));
        self.words.store(entry, (3 * slot).to_le(), Ordering::Relaxed);
        self.words.store(AVAILABLE_RING as usize / 2 + 1, next.wrapping_add(1).to_le(), Ordering::Release);
    }

    fn is_published(&self, slot: u16) -> bool {
        let at = self.get(place(slot) + 2) as u16;
        if self.packed {
            let at = Position::unpack(at);
            let tail = Tail::from_word(self.words.load(2 * usize::from(at.index()) + 1, Ordering::Acquire));
            return (tail.flags & AVAILABLE != 0) == at.wrap();
        }
        let index = self.words.load::<u16>(AVAILABLE_RING as usize / 2 + 1, Ordering::Acquire);
        u16::from_le(index) == at.wrapping_add(1)
    }

    /// One more was made available.
    fn advance(&self) {
        let next = self.get(NEXT) as u16;
        self.set(NEXT, self.behind(next).into());
    }

    fn behind(&self, at: u16) -> u16 {
        if self.packed { Position::unpack(at).advanced(3, SIZE).pack() } else { at.wrapping_add(1) }
    }

    /// Acknowledges what was used. How many.
    pub(crate) fn reap(&mut self) -> usize {
        let mut count = 0;
        while let Some(slot) = self.used(self.get(LAST) as u16) {
            let number = self.get(place(slot) + 1);
            match self.state(slot) {
                PUBLISHED => {
                    let mut status = [0xff];
                    self.pages.read(buffer(slot) as usize + 0x800, &mut status).unwrap();
                    assert_eq!(status, [0], "request {number} failed");
                    self.pages.write(ACKNOWLEDGED + number as usize, &[1]).unwrap();
                    self.set_state(slot, FREE);
                    count += 1;
                }
                state => assert!(self.again, "request {number} was used twice: state {state}"),
            }
            self.again = false;
            let last = self.get(LAST) as u16;
            self.set(LAST, self.behind(last).into());
        }
        self.again = false;
        count
    }

    /// Whether everything in flight is used, though not acknowledged.
    pub(crate) fn is_all_used(&self) -> bool {
        let mut left = (0..SLOTS).filter(|slot| self.state(*slot) != FREE).count();
        let mut last = self.get(LAST) as u16;
        while left > 0 && self.used(last).is_some() {
            (left, last) = (left - 1, self.behind(last));
        }
        left == 0
    }

    /// The slot that was used at `last`.
    fn used(&self, last: u16) -> Option<u16> {
        let slot = if self.packed {
            let at = Position::unpack(last);
            let tail = Tail::from_word(self.words.load(2 * usize::from(at.index()) + 1, Ordering::Acquire));
            if !at.is_used(tail.flags) {
                return None;
            }
            tail.id
        } else {
            let index = self.words.load::<u16>(USED_RING as usize / 2 + 1, Ordering::Acquire);
            if u16::from_le(index) == last {
                return None;
            }
            let entry = USED_RING as usize / 4 + used_entry(usize::from(last % SIZE));
            u32::from_le(self.words.load::<u32>(entry, Ordering::Relaxed)) as u16 / 3
        };
        assert!(slot < SLOTS, "slot {slot} was used");
        Some(slot)
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        (0..SLOTS).all(|slot| self.state(slot) == FREE)
    }

    /// How many requests there were.
    pub(crate) fn count(&self) -> u64 {
        self.get(NUMBER)
    }

    /// Whether request `number` was acknowledged.
    pub(crate) fn is_acknowledged(&self, number: u64) -> bool {
        let mut byte = [0];
        self.pages.read(ACKNOWLEDGED + number as usize, &mut byte).unwrap();
        byte == [1]
    }

    /// Where a front end says that the queue goes on, if it knows nothing but the rings.
    pub(crate) fn base(&self) -> u32 {
        if self.packed {
            return 0x8000_8000;
        }
        u16::from_le(self.words.load::<u16>(USED_RING as usize / 2 + 1, Ordering::Acquire)).into()
    }

    fn state(&self, slot: u16) -> u64 {
        self.get(place(slot))
    }

    fn set_state(&self, slot: u16, state: u64) {
        self.set(place(slot), state);
    }

    fn get(&self, index: usize) -> u64 {
        self.words.load(index, Ordering::Acquire)
    }

    fn set(&self, index: usize, value: u64) {
        self.words.store(index, value, Ordering::Release);
    }
}

/// What is known of `slot`: state, number of its request, where it was made available.
fn place(slot: u16) -> usize {
    SLOT + 4 * usize::from(slot)
}

/// Its buffer: header, data, status.
fn buffer(slot: u16) -> u64 {
    BUFFERS + 0x1000 * u64::from(slot)
}
