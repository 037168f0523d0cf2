//! The device's role on a split ring.

use alloc::vec::Vec;
use core::marker::PhantomData;
use core::sync::atomic::{Ordering, fence};

use super::layout::{self, Descriptor, INDEX, INDIRECT, NEXT, NO_INTERRUPT, NO_NOTIFY, Order, WRITE};
use crate::memory::{Access, GuestMemory, Segment, Words};
use crate::queue::assembly::{Assembly, Chains, read_table};
use crate::queue::{Chain, MAX_QUEUE_SIZE, QueueConfig, QueueError};

/// The ring, resolved, and where the device is in it.
pub(in crate::queue) struct Ring<M: GuestMemory, O> {
    memory: M,
    descriptors: Words<u64, M::Lease>,
    driver: Words<u16, M::Lease>,
    device: Words<u32, M::Lease>,
    size: u16,
    /// `size - 1`, in a word of its own: read together with an index that was just written, it would stall.
    mask: usize,
    event_idx: bool,
    indirect: bool,
    /// The next available entry to take.
    next_available: u16,
    /// The available index as last read: entries before it are the device's.
    available: u16,
    /// How many chains were completed; its low 16 bits are the used index. Wider than that, so that a whole round of
    /// indices between two looks at the driver's wish does not pass for nothing.
    completed: u32,
    /// `completed` when the driver was last considered for an interrupt.
    signalled: u32,
    chains: Chains<M::Lease>,
    table: Vec<Segment<M::Lease>>,
    order: PhantomData<O>,
}

impl<M: GuestMemory, O: Order> Ring<M, O> {
    pub(in crate::queue) fn new(memory: M, config: &QueueConfig) -> Result<Self, QueueError> {
        let size = config.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size { size: size.into(), max: MAX_QUEUE_SIZE });
        }
        let both = Access::READ | Access::WRITE;
        // Without EVENT_IDX the event words are not part of the rings (2.7.6, 2.7.8).
        let event = if config.event_idx { 0 } else { 2 };
        let driver_len = layout::driver_len(size) - event;
        let device_len = layout::device_len(size) - event;
        config.check_alignment(16, 2, 4)?;
        Ok(Self {
            descriptors: memory.resolve_words(config.descriptors, layout::descriptors_len(size), Access::READ)?,
            driver: memory.resolve_words(config.driver, driver_len, Access::READ)?,
            device: memory.resolve_words(config.device, device_len, both)?,
            memory,
            size,
            mask: usize::from(size) - 1,
            event_idx: config.event_idx,
            indirect: config.indirect,
            next_available: 0,
            available: 0,
            completed: 0,
            signalled: 0,
            chains: Chains::new(size.into()),
            table: Vec::new(),
            order: PhantomData,
        })
    }

    pub(in crate::queue) const fn size(&self) -> u16 {
        self.size
    }

    #[inline(always)]
    pub(in crate::queue) fn pop(&mut self) -> Result<Option<Chain<M::Lease>>, QueueError> {
        if self.next_available == self.available && !self.look()? {
            return Ok(None);
        }
        let slot = usize::from(self.next_available) & self.mask;
        let head = O::u16(self.driver.load(layout::available_entry(slot), Ordering::Relaxed));
        if head >= self.size {
            return Err(QueueError::Index { index: head, size: self.size.into() });
        }
        if !self.chains.take(head) {
            return Err(QueueError::InFlight { head });
        }
        let mut assembly = self.chains.assemble(head);
        self.walk(&mut assembly)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(assembly.finish(head, 1)))
    }

    /// Reads the available index; whether there is more than before.
    #[inline(always)]
    fn look(&mut self) -> Result<bool, QueueError> {
        // Acquire: entries and descriptors are read after the index that covers them.
        let index = O::u16(self.driver.load(INDEX, Ordering::Acquire));
        if index.wrapping_sub(self.next_available) > self.size {
            return Err(QueueError::IndexJump { last: self.next_available, index, size: self.size });
        }
        self.available = index;
        Ok(index != self.next_available)
    }

    #[inline(always)]
    fn descriptor(&self, index: u16) -> Descriptor {
        let at = 2 * usize::from(index);
        O::descriptor([self.descriptors.load(at, Ordering::Relaxed), self.descriptors.load(at + 1, Ordering::Relaxed)])
    }

    #[inline(always)]
    fn walk(&mut self, assembly: &mut Assembly<M::Lease>) -> Result<(), QueueError> {
        let head = assembly.head();
        let mut descriptor = self.descriptor(head);
        for left in (0..self.size).rev() {
            if descriptor.flags & INDIRECT != 0 {
                return self.walk_table(assembly, descriptor, left + 1);
            }
            assembly.add(&self.memory, descriptor.address, descriptor.len, descriptor.flags & WRITE != 0)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            if descriptor.next >= self.size {
                return Err(QueueError::Index { index: descriptor.next, size: self.size.into() });
            }
            descriptor = self.descriptor(descriptor.next);
        }
        Err(QueueError::TooManyDescriptors { head, limit: self.size.into() })
    }

    /// The rest of the chain, at most `left` descriptors, is in the table that `descriptor` names (2.7.5.3).
    #[inline(never)]
    fn walk_table(
        &mut self,
        assembly: &mut Assembly<M::Lease>,
        descriptor: Descriptor,
        left: u16,
    ) -> Result<(), QueueError> {
        let (head, len) = (assembly.head(), descriptor.len);
        if !self.indirect {
            return Err(QueueError::IndirectNotNegotiated { head });
        }
        if descriptor.flags & NEXT != 0 {
            return Err(QueueError::IndirectWithNext { head });
        }
        let entries = u64::from(len) / layout::DESCRIPTOR_LEN;
        if len == 0 || !u64::from(len).is_multiple_of(layout::DESCRIPTOR_LEN) || entries > u16::MAX.into() {
            return Err(QueueError::IndirectLength { head, len });
        }
        self.table.clear();
        let table = &mut self.table;
        self.memory.resolve(descriptor.address, len.into(), Access::READ, |segment| table.push(segment))?;
        let mut index = 0;
        // A chain has at most queue-size descriptors, wherever they are (2.7.5.3.1).
        for _ in 0..left {
            if u64::from(index) >= entries {
                return Err(QueueError::Index { index, size: entries as u32 });
            }
            let entry = O::descriptor(read_table(&self.table, index)?);
            if entry.flags & INDIRECT != 0 {
                return Err(QueueError::IndirectNested { head });
            }
            assembly.add(&self.memory, entry.address, entry.len, entry.flags & WRITE != 0)?;
            if entry.flags & NEXT == 0 {
                self.table.clear();
                return Ok(());
            }
            index = entry.next;
        }
        Err(QueueError::TooManyDescriptors { head, limit: self.size.into() })
    }

    #[inline(always)]
    pub(in crate::queue) fn complete(&mut self, chain: Chain<M::Lease>) -> Result<(), QueueError> {
        let (head, written) = (chain.0.head, chain.0.written);
        self.chains.give_back(chain)?;
        let entry = layout::used_entry(self.completed as usize & self.mask);
        self.device.store(entry, O::u32(u32::from(head)), Ordering::Relaxed);
        self.device.store(entry + 1, O::u32(written), Ordering::Relaxed);
        self.completed = self.completed.wrapping_add(1);
        // Release: the buffer's bytes and the entry are visible before the index that covers them.
        self.device.store(INDEX, O::u16(self.completed as u16), Ordering::Release);
        Ok(())
    }

    #[inline(always)]
    pub(in crate::queue) fn needs_interrupt(&mut self) -> bool {
        if self.completed == self.signalled {
            return false;
        }
        // The driver writes its wish, then reads the used index; we do the reverse. One of us must see the other.
        fence(Ordering::SeqCst);
        let old = core::mem::replace(&mut self.signalled, self.completed);
        if self.event_idx {
            let event = O::u16(self.driver.load(layout::used_event(self.size), Ordering::Relaxed));
            self.completed.wrapping_sub(old) > u16::MAX.into()
                || layout::passes(event, self.completed as u16, old as u16)
        } else {
            O::u16(self.driver.load(0, Ordering::Relaxed)) & NO_INTERRUPT == 0
        }
    }

    /// Asks for no kicks. With EVENT_IDX the event word, which lies behind, does so by itself.
    pub(in crate::queue) fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.device.store(0, O::u16(NO_NOTIFY), Ordering::Relaxed);
        }
    }

    /// Asks for kicks. True if chains are available already, for which no kick will come.
    pub(in crate::queue) fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        if self.event_idx {
            self.device.store(layout::avail_event(self.size), O::u16(self.next_available), Ordering::Relaxed);
        } else {
            self.device.store(0, O::u16(0), Ordering::Relaxed);
        }
        // We write our wish, then read the index; the driver does the reverse. One of us must see the other.
        fence(Ordering::SeqCst);
        self.look()
    }
}
