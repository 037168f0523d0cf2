//! The driver's role on a split ring.

use core::marker::PhantomData;
use core::sync::atomic::Ordering;

use super::layout::{self, Descriptor, INDEX, INDIRECT, NEXT, NO_INTERRUPT, NO_NOTIFY, Order, WRITE};
use crate::memory::{Owner, Pages, Words};
use crate::queue::driver::Place;
use crate::queue::{Buffer, MAX_QUEUE_SIZE, QueueConfig, QueueError};
use crate::sync::fence;

/// The ring in the driver's memory, and where the driver is in it.
pub(in crate::queue) struct Ring<O> {
    descriptors: Words<u64, Owner>,
    driver: Words<u16, Owner>,
    device: Words<u32, Owner>,
    size: u16,
    /// `size - 1`, in a word of its own: read together with an index that was just written, it would stall.
    mask: usize,
    event_idx: bool,
    indirect: bool,
    next_available: u16,
    published: u16,
    next_used: u16,
    /// The used index as last read: entries before it are the driver's.
    used: u16,
    interrupts: bool,
    order: PhantomData<O>,
}

/// Where the pieces of a buffer go: their places say so.
pub(in crate::queue) struct Cursor;

impl<O: Order> Ring<O> {
    pub(in crate::queue) fn new(
        config: &QueueConfig,
        descriptors: Pages,
        driver: Pages,
        device: Pages,
    ) -> Result<Self, QueueError> {
        let size = config.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size { size: size.into(), max: MAX_QUEUE_SIZE });
        }
        // What an earlier run left must not look like news to either side.
        driver.fill(0, layout::driver_len(size) as usize, 0)?;
        device.fill(0, layout::device_len(size) as usize, 0)?;
        descriptors.fill(0, layout::descriptors_len(size) as usize, 0)?;
        Ok(Self {
            descriptors: Words::new(descriptors)?,
            driver: Words::new(driver)?,
            device: Words::new(device)?,
            size,
            mask: usize::from(size) - 1,
            event_idx: config.event_idx,
            indirect: config.indirect,
            next_available: 0,
            published: 0,
            next_used: 0,
            used: 0,
            interrupts: true,
            order: PhantomData,
        })
    }

    pub(in crate::queue) const fn is_indirect(&self) -> bool {
        self.indirect
    }

    /// Where the first piece of the chain at `head` goes.
    #[inline(always)]
    pub(in crate::queue) const fn cursor(&self, _head: u16) -> Cursor {
        Cursor
    }

    /// Writes one piece.
    #[inline(always)]
    pub(in crate::queue) fn write(&mut self, _at: &mut Cursor, piece: Buffer, place: Place) {
        let next = if place.last { 0 } else { NEXT };
        let write = if place.writable { WRITE } else { 0 };
        let Buffer { address, len } = piece;
        self.write_descriptor(place.index, Descriptor { address, len, flags: write | next, next: place.next });
    }

    /// Makes the entry of an indirect table: piece, number of the next, writable, last.
    pub(in crate::queue) fn table_words(&self) -> impl Fn(Buffer, u16, bool, bool) -> (u64, u64) + use<O> {
        |piece, next, writable, last| {
            let flags = if writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            O::words(Descriptor { address: piece.address, len: piece.len, flags, next: if last { 0 } else { next } })
        }
    }

    /// Writes the descriptor at `head` that names an indirect table.
    pub(in crate::queue) fn write_table(&mut self, _at: &mut Cursor, head: u16, table: Buffer) {
        let Buffer { address, len } = table;
        self.write_descriptor(head, Descriptor { address, len, flags: INDIRECT, next: 0 });
    }

    #[inline(always)]
    fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        assert!(self.descriptors.store_pair(2 * usize::from(index), O::words(descriptor), Ordering::Relaxed));
    }

    /// Enters the chain at `head` into the available ring.
    #[inline(always)]
    pub(in crate::queue) fn enter(&mut self, _at: Cursor, head: u16) {
        let slot = usize::from(self.next_available) & self.mask;
        self.driver.store(layout::available_entry(slot), O::u16(head), Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Where the driver goes on, as a notification tells it: the available index.
    pub(in crate::queue) const fn next(&self) -> u16 {
        self.next_available
    }

    /// Publishes what was added; whether the device wants to be notified of it.
    #[inline(always)]
    pub(in crate::queue) fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_available);
        if old == new {
            return false;
        }
        // Release: descriptors and entries are visible before the index that covers them.
        self.driver.store(INDEX, O::u16(new), Ordering::Release);
        self.published = new;
        // We write the index, then read the device's wish; the device does the reverse. One of us must see the other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = O::u16(self.device.load(layout::avail_event(self.size), Ordering::Relaxed));
            layout::passes(event, new, old)
        } else {
            O::u16(self.device.load(0, Ordering::Relaxed)) & NO_NOTIFY == 0
        }
    }

    /// The next used element: id and length, unchecked.
    #[inline(always)]
    pub(in crate::queue) fn used(&mut self) -> Option<(u32, u32)> {
        if self.next_used == self.used && !self.look() {
            // Only here, where the driver may go to sleep, does it have to say from where on it wants an interrupt.
            if !(self.interrupts && self.event_idx && self.wish()) {
                return None;
            }
        }
        let entry = layout::used_entry(usize::from(self.next_used) & self.mask);
        let (id, len) = self.device.load_pair(entry, Ordering::Relaxed)?;
        Some((O::u32(id), O::u32(len)))
    }

    /// Reads the used index; whether there is more than before.
    #[inline(always)]
    fn look(&mut self) -> bool {
        // Acquire: elements and buffers are read after the index that covers them.
        self.used = O::u16(self.device.load(INDEX, Ordering::Acquire));
        self.used != self.next_used
    }

    /// Writes the driver's wish for an interrupt at the next element, and looks again.
    fn wish(&mut self) -> bool {
        if self.event_idx {
            self.driver.store(layout::used_event(self.size), O::u16(self.next_used), Ordering::Relaxed);
        } else {
            self.driver.store(0, O::u16(0), Ordering::Relaxed);
        }
        // We write our wish, then read the index; the device does the reverse. One of us must see the other.
        fence(Ordering::SeqCst);
        self.look()
    }

    /// A buffer was taken back: the next used element is behind its own.
    #[inline(always)]
    pub(in crate::queue) fn advance(&mut self, _entries: u16) {
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Whether the used index covers `count` buffers more.
    pub(in crate::queue) const fn covers(&self, count: u64) -> bool {
        count <= self.used.wrapping_sub(self.next_used) as u64
    }

    pub(in crate::queue) fn disable_interrupts(&mut self) {
        self.interrupts = false;
        if self.event_idx {
            // Just passed: not reached again for 65,535 elements.
            let passed = self.next_used.wrapping_sub(1);
            self.driver.store(layout::used_event(self.size), O::u16(passed), Ordering::Relaxed);
        } else {
            self.driver.store(0, O::u16(NO_INTERRUPT), Ordering::Relaxed);
        }
    }

    /// Whether nothing was used meanwhile.
    pub(in crate::queue) fn enable_interrupts(&mut self) -> bool {
        self.interrupts = true;
        !self.wish()
    }
}
