//! The driver's role on a packed ring.

use core::sync::atomic::Ordering;

use super::layout::{
    DESCRIPTOR_LEN, EVENT_LEN, EVENTS_AT, EVENTS_OFF, EVENTS_ON, Events, INDIRECT, NEXT, Position, Tail, WRITE,
};
use crate::memory::{Owner, Pages, Words};
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
    next_available: Position,
    /// The first descriptor of what is not published, and its second word: written last.
    unpublished: Option<(Position, u64)>,
    published: Position,
    next_used: Position,
    interrupts: bool,
}

/// Where the pieces of a buffer go, as they are written.
pub(in crate::queue) struct Cursor {
    index: u16,
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
        // What an earlier run left must not look like news to either side.
        descriptors.fill(0, (DESCRIPTOR_LEN * u64::from(size)) as usize, 0)?;
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

    /// Where the next piece goes.
    #[inline(always)]
    pub(in crate::queue) fn cursor(&self) -> Cursor {
        Cursor { index: self.next_available.index, holds: self.unpublished.is_none() }
    }

    /// Writes one piece of the buffer `id`.
    #[inline(always)]
    pub(in crate::queue) fn write(&mut self, at: &mut Cursor, id: u16, piece: Buffer, place: Place) {
        let write = if place.writable { WRITE } else { 0 };
        self.write_descriptor(at, id, piece, write | if place.last { 0 } else { NEXT });
    }

    /// Makes the entry of an indirect table: piece, number of the next, writable, last. Entries follow one another.
    pub(in crate::queue) fn table_words(&self) -> impl Fn(Buffer, u16, bool, bool) -> (u64, u64) + use<> {
        |piece, _, writable, _| {
            let tail = Tail { len: piece.len, id: 0, flags: if writable { WRITE } else { 0 } };
            (piece.address.to_le(), tail.to_word())
        }
    }

    /// Writes the descriptor that names the indirect table of buffer `id`.
    pub(in crate::queue) fn write_table(&mut self, at: &mut Cursor, id: u16, table: Buffer) {
        self.write_descriptor(at, id, table, INDIRECT);
    }

    /// On a packed ring the descriptors themselves are the entry; the next one goes behind them.
    #[inline(always)]
    pub(in crate::queue) fn enter(&mut self, at: Cursor, _id: u16) {
        self.next_available.index = at.index;
    }

    /// Writes the next descriptor; the very first of what is not published is only remembered, so that nothing can be
    /// seen before all of it is there.
    #[inline(always)]
    fn write_descriptor(&mut self, cursor: &mut Cursor, id: u16, piece: Buffer, flags: u16) {
        let at = self.next_available.at(cursor.index);
        let word = Tail { len: piece.len, id, flags: flags | at.available_flags() }.to_word();
        let index = 2 * usize::from(at.index);
        if cursor.holds {
            self.descriptors.store(index, piece.address.to_le(), Ordering::Relaxed);
            self.unpublished = Some((at, word));
            cursor.holds = false;
        } else {
            self.descriptors.store_pair(index, (piece.address.to_le(), word), Ordering::Relaxed);
        }
        cursor.index += 1;
        if cursor.index >= self.size {
            self.wrap(cursor);
        }
    }

    /// The next round begins, for what is written from now on.
    #[cold]
    fn wrap(&mut self, cursor: &mut Cursor) {
        self.next_available = self.next_available.at(self.size).advanced(0, self.size);
        cursor.index = self.next_available.index;
    }

    /// Where the driver goes on, as a notification tells it.
    pub(in crate::queue) const fn next(&self) -> u16 {
        self.next_available.pack()
    }

    /// Publishes what was added; whether the device wants to be notified of it.
    #[inline(always)]
    pub(in crate::queue) fn publish(&mut self) -> bool {
        let Some((first, word)) = self.unpublished.take() else { return false };
        // Release: everything that was added is visible before the descriptor that comes first.
        self.descriptors.store(2 * usize::from(first.index) + 1, word, Ordering::Release);
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
        let mut tail = self.look();
        if !self.next_used.is_used(tail.flags) {
            // Only here, where the driver may go to sleep, does it have to say from where on it wants an interrupt.
            if !(self.interrupts && self.event_idx) {
                return None;
            }
            self.wish(EVENTS_AT);
            tail = self.look();
            if !self.next_used.is_used(tail.flags) {
                return None;
            }
        }
        // Without WRITE the length means nothing (2.8.5).
        Some((tail.id.into(), if tail.flags & WRITE != 0 { tail.len } else { 0 }))
    }

    /// Reads what stands where the next used descriptor is expected.
    #[inline(always)]
    fn look(&self) -> Tail {
        // Acquire: the buffer is read after the flags that make it used.
        Tail::from_word(self.descriptors.load(2 * usize::from(self.next_used.index) + 1, Ordering::Acquire))
    }

    /// A buffer of `entries` descriptors was taken back: the next used one is behind them.
    #[inline(always)]
    pub(in crate::queue) fn advance(&mut self, entries: u16) {
        self.next_used.advance(entries, self.size);
    }

    /// Whether `count` more buffers may be used: their descriptors do not say so one by one.
    pub(in crate::queue) const fn covers(&self, _count: u64) -> bool {
        true
    }

    fn wish(&mut self, flags: u16) {
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
        !self.next_used.is_used(self.look().flags)
    }
}
