//! The driver's role on a split ring.

use alloc::boxed::Box;
use core::marker::PhantomData;
use core::sync::atomic::{Ordering, fence};

use super::layout::{self, Descriptor, INDEX, INDIRECT, NEXT, NO_INTERRUPT, NO_NOTIFY, Order, WRITE};
use crate::memory::{Owner, Pages, Words};
use crate::queue::driver::Tables;
use crate::queue::{Buffer, MAX_QUEUE_SIZE, QueueConfig, QueueError};

/// The ring in the driver's memory, and where the driver is in it.
pub(in crate::queue) struct Ring<O> {
    descriptors: Words<u64, Owner>,
    driver: Words<u16, Owner>,
    device: Words<u32, Owner>,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// Links free descriptors, and the descriptors of each chain: the ring's own links belong to the device as well.
    next: Box<[u16]>,
    /// How many descriptors the chain at a head takes, and its last one.
    chains: Box<[(u16, u16)]>,
    first_free: u16,
    free: u16,
    next_available: u16,
    published: u16,
    next_used: u16,
    /// The used index as last read: entries before it are the driver's.
    used: u16,
    interrupts: bool,
    order: PhantomData<O>,
}

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
            event_idx: config.event_idx,
            indirect: config.indirect,
            next: (1..=size).collect(),
            chains: (0..size).map(|_| (0, 0)).collect(),
            first_free: 0,
            free: size,
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

    pub(in crate::queue) const fn free(&self) -> u16 {
        self.free
    }

    /// Writes a chain, or a table and the descriptor that names it, and enters it into the available ring. None if there
    /// is no room.
    #[inline]
    pub(in crate::queue) fn add(
        &mut self,
        readable: &[Buffer],
        writable: &[Buffer],
        tables: Option<&Tables>,
    ) -> Option<u16> {
        let pieces = readable.len() + writable.len();
        let needed = if tables.is_some() { 1 } else { pieces };
        if needed > usize::from(self.free) {
            return None;
        }
        let head = self.first_free;
        let last = match tables {
            Some(tables) => {
                self.add_table(head, readable, writable, tables);
                head
            }
            None => self.add_chain(head, readable, writable),
        };
        self.first_free = self.next[usize::from(last)];
        self.free -= needed as u16;
        self.chains[usize::from(head)] = (needed as u16, last);
        let slot = self.next_available & (self.size - 1);
        self.driver.store(layout::available_entry(slot), O::u16(head), Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        Some(head)
    }

    #[inline]
    fn add_chain(&mut self, head: u16, readable: &[Buffer], writable: &[Buffer]) -> u16 {
        let (mut index, mut last) = (head, head);
        let mut left = readable.len() + writable.len();
        for (number, piece) in readable.iter().chain(writable).enumerate() {
            left -= 1;
            let write = if number < readable.len() { 0 } else { WRITE };
            let next = self.next[usize::from(index)];
            let (flags, link) = if left == 0 { (write, 0) } else { (write | NEXT, next) };
            self.write(index, Descriptor { address: piece.address, len: piece.len, flags, next: link });
            last = index;
            index = next;
        }
        last
    }

    fn add_table(&mut self, head: u16, readable: &[Buffer], writable: &[Buffer], tables: &Tables) {
        let (pages, offset, address) = tables.table(head);
        let pieces = readable.len() + writable.len();
        for (number, piece) in readable.iter().chain(writable).enumerate() {
            let write = if number < readable.len() { 0 } else { WRITE };
            let (flags, next) = if number + 1 == pieces { (write, 0) } else { (write | NEXT, number as u16 + 1) };
            let [first, second] = O::words(Descriptor { address: piece.address, len: piece.len, flags, next });
            let at = offset + 16 * number;
            // The table has room: the caller compared its entries with the pieces.
            let _ = pages.write(at, &first.to_ne_bytes());
            let _ = pages.write(at + 8, &second.to_ne_bytes());
        }
        let len = 16 * pieces as u32;
        self.write(head, Descriptor { address, len, flags: INDIRECT, next: 0 });
    }

    #[inline(always)]
    fn write(&self, index: u16, descriptor: Descriptor) {
        let [first, second] = O::words(descriptor);
        let at = 2 * usize::from(index);
        self.descriptors.store(at, first, Ordering::Relaxed);
        self.descriptors.store(at + 1, second, Ordering::Relaxed);
    }

    /// Publishes what was added; whether the device wants to be notified of it.
    #[inline]
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
    #[inline]
    pub(in crate::queue) fn used(&mut self) -> Option<(u32, u32)> {
        if self.next_used == self.used && !self.look() {
            // Only here, where the driver may go to sleep, does it have to say from where on it wants an interrupt.
            if !(self.interrupts && self.event_idx) || !self.wish() {
                return None;
            }
        }
        let entry = layout::used_entry(self.next_used & (self.size - 1));
        let id = O::u32(self.device.load(entry, Ordering::Relaxed));
        let len = O::u32(self.device.load(entry + 1, Ordering::Relaxed));
        self.next_used = self.next_used.wrapping_add(1);
        Some((id, len))
    }

    /// Reads the used index; whether there is more than before.
    #[inline]
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

    /// Frees the descriptors of the chain at `head`, which was in flight.
    #[inline]
    pub(in crate::queue) fn release(&mut self, head: u16) {
        let (count, last) = self.chains[usize::from(head)];
        self.next[usize::from(last)] = self.first_free;
        self.first_free = head;
        self.free += count;
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
