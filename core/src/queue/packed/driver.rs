//! The driver's role on a packed ring.

use core::sync::atomic::Ordering;

use super::layout::{
    DESCRIPTOR_LEN, EVENT_LEN, EVENTS_AT, EVENTS_OFF, EVENTS_ON, Events, INDIRECT, NEXT, Position, Tail, WRITE,
};
use crate::memory::{MemoryError, Owner, Pages, Words};
use crate::queue::driver::Place;
use crate::queue::{Buffer, MAX_QUEUE_SIZE, QueueConfig, QueueError};
use crate::sync::fence;

/// The ring in the driver's memory, and where the driver is in it.
pub(in crate::queue) struct Ring {
    descriptors: Words<u64, Owner>,
    driver: Words<u32, Owner>,
    device: Words<u32, Owner>,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// [Settled](Position::settled) when it is published.
    next_available: Position,
    /// The first descriptor of what is not published, and its second word: written last.
    unpublished: Option<(Position, u64)>,
    published: Position,
    /// Settled when it is looked at.
    next_used: Position,
    interrupts: bool,
}

/// Where the pieces of a buffer go, as they are written.
pub(in crate::queue) struct Cursor {
    at: Position,
    id: u16,
    /// Whether the next one is the first of what is not published.
    holds: bool,
}

impl Ring {
    pub(in crate::queue) fn new(
        config: &QueueConfig,
        descriptors: Pages,
        driver: Pages,
        device: Pages,
    ) -> Result<Self, QueueError> {
        let size = config.size;
        if size == 0 || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size { size: size.into(), max: MAX_QUEUE_SIZE });
        }
        // The ring and no more: what is beyond the last descriptor is beyond the words.
        let len = (DESCRIPTOR_LEN * u64::from(size)) as usize;
        let outside = MemoryError::OutOfBounds { offset: 0, len, size: descriptors.len() };
        let descriptors = descriptors.slice(0, len).ok_or(outside)?;
        // What an earlier run left must not look like news to either side.
        descriptors.fill(0, len, 0)?;
        driver.fill(0, EVENT_LEN as usize, 0)?;
        device.fill(0, EVENT_LEN as usize, 0)?;
        Ok(Self {
            descriptors: Words::new(descriptors)?,
            driver: Words::new(driver)?,
            device: Words::new(device)?,
            size,
            event_idx: config.event_idx,
            indirect: config.indirect,
            next_available: Position::START,
            unpublished: None,
            published: Position::START,
            next_used: Position::START,
            interrupts: true,
        })
    }

    pub(in crate::queue) const fn is_indirect(&self) -> bool {
        self.indirect
    }

    /// Where the first piece of the buffer `id` goes.
    #[inline(always)]
    pub(in crate::queue) fn cursor(&self, id: u16) -> Cursor {
        Cursor { at: self.next_available, id, holds: self.unpublished.is_none() }
    }

    /// Writes one piece.
    #[inline(always)]
    pub(in crate::queue) fn write(&mut self, at: &mut Cursor, piece: Buffer, place: Place) {
        let write = if place.writable { WRITE } else { 0 };
        self.write_descriptor(at, piece, write | if place.last { 0 } else { NEXT });
    }

    /// Makes the entry of an indirect table: piece, number of the next, writable, last. Entries follow one another.
    pub(in crate::queue) fn table_words(&self) -> impl Fn(Buffer, u16, bool, bool) -> (u64, u64) + use<> {
        |piece, _, writable, _| {
            let tail = Tail { len: piece.len, id: 0, flags: if writable { WRITE } else { 0 } };
            (piece.address.to_le(), tail.to_word())
        }
    }

    /// Writes the descriptor that names the indirect table.
    pub(in crate::queue) fn write_table(&mut self, at: &mut Cursor, _head: u16, table: Buffer) {
        self.write_descriptor(at, table, INDIRECT);
    }

    /// On a packed ring the descriptors themselves are the entry; the next one goes behind them.
    #[inline(always)]
    pub(in crate::queue) fn enter(&mut self, at: Cursor, _id: u16) {
        self.next_available = at.at;
    }

    /// Writes the next descriptor; the very first of what is not published is only remembered, so that nothing can be
    /// seen before all of it is there.
    #[inline(always)]
    fn write_descriptor(&mut self, cursor: &mut Cursor, piece: Buffer, flags: u16) {
        let tail = Tail { len: piece.len, id: cursor.id, flags };
        let (index, word) = (cursor.at.word(), cursor.at.available_word(tail));
        if cursor.holds {
            self.descriptors.store(index, piece.address.to_le(), Ordering::Relaxed);
            self.unpublished = Some((cursor.at, word));
            cursor.holds = false;
        } else if !self.descriptors.store_pair(index, (piece.address.to_le(), word), Ordering::Relaxed) {
            cursor.at = self.write_over(cursor.at, piece.address, tail);
        }
        cursor.at = cursor.at.ahead(1);
    }

    /// Writes a descriptor where this round is over: at the start of the next. Where that is.
    #[cold]
    fn write_over(&self, at: Position, address: u64, tail: Tail) -> Position {
        let at = at.settled(self.size);
        let words = (address.to_le(), at.available_word(tail));
        assert!(self.descriptors.store_pair(at.word(), words, Ordering::Relaxed));
        at
    }

    /// Where the driver goes on, as a notification tells it.
    pub(in crate::queue) const fn next(&self) -> u16 {
        self.next_available.pack()
    }

    /// Publishes what was added; whether the device wants to be notified of it.
    #[inline(always)]
    pub(in crate::queue) fn publish(&mut self) -> bool {
        let Some((first, word)) = self.unpublished.take() else { return false };
        self.next_available = self.next_available.settled(self.size);
        // Release: everything that was added is visible before the descriptor that comes first.
        self.descriptors.store(first.word() + 1, word, Ordering::Release);
        let old = core::mem::replace(&mut self.published, self.next_available);
        // We write descriptors, then read the device's wish; the device does the reverse. One of us must see the other.
        fence(Ordering::SeqCst);
        Events::from_word(self.device.load(0, Ordering::Relaxed)).wanted(
            self.event_idx,
            old,
            self.next_available,
            self.size,
        )
    }

    /// The next used descriptor: buffer id and length, unchecked.
    #[inline(always)]
    pub(in crate::queue) fn used(&mut self) -> Option<(u32, u32)> {
        let at = self.next_used;
        let tail = match self.look(at) {
            Some(tail) if at.is_used(tail.flags) => tail,
            _ if self.used_after_all() => self.look(self.next_used)?,
            _ => return None,
        };
        // Without WRITE the length means nothing (2.8.5).
        Some((tail.id.into(), if tail.flags & WRITE != 0 { tail.len } else { 0 }))
    }

    /// Whether the next descriptor is used, at the start of the next round if this one is over. Where the driver may go to
    /// sleep, it says before from where on it wants an interrupt.
    #[inline(never)]
    fn used_after_all(&mut self) -> bool {
        self.next_used = self.next_used.settled(self.size);
        if self.is_used() {
            return true;
        }
        if !(self.interrupts && self.event_idx) {
            return false;
        }
        self.wish(EVENTS_AT);
        self.is_used()
    }

    /// Whether the next descriptor, in this round, is used.
    fn is_used(&self) -> bool {
        self.look(self.next_used).is_some_and(|tail| self.next_used.is_used(tail.flags))
    }

    /// Reads what stands at `at`, where the next used descriptor is expected; none behind all descriptors.
    #[inline(always)]
    fn look(&self, at: Position) -> Option<Tail> {
        // Acquire: the buffer is read after the flags that make it used.
        self.descriptors.try_load(at.word() + 1, Ordering::Acquire).map(Tail::from_word)
    }

    /// A buffer of `entries` descriptors was taken back: the next used one is behind them.
    #[inline(always)]
    pub(in crate::queue) fn advance(&mut self, entries: u16) {
        self.next_used = self.next_used.ahead(entries);
    }

    /// Whether `count` more buffers may be used: their descriptors do not say so one by one.
    pub(in crate::queue) const fn covers(&self, _count: u64) -> bool {
        true
    }

    fn wish(&mut self, flags: u16) {
        self.next_used = self.next_used.settled(self.size);
        self.driver.store(0, Events { at: self.next_used, flags }.to_word(), Ordering::Relaxed);
        // We write our wish, then look for used descriptors; the device does the reverse.
        fence(Ordering::SeqCst);
    }

    pub(in crate::queue) fn disable_interrupts(&mut self) {
        self.interrupts = false;
        self.wish(EVENTS_OFF);
    }

    /// Whether nothing was used meanwhile.
    pub(in crate::queue) fn enable_interrupts(&mut self) -> bool {
        self.interrupts = true;
        self.wish(if self.event_idx { EVENTS_AT } else { EVENTS_ON });
        !self.is_used()
    }
}
