//! The device's role on a packed ring.

use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use super::layout::{
    DESCRIPTOR_LEN, EVENT_LEN, EVENTS_AT, EVENTS_OFF, EVENTS_ON, Events, INDIRECT, NEXT, Position, Tail, WRITE,
};
use crate::memory::{Access, GuestMemory, Segment, Words};
use crate::queue::assembly::{Assembly, Chains, Latched, read_table};
use crate::queue::{Chain, MAX_QUEUE_SIZE, QueueConfig, QueueError, QueueState};

/// The ring, resolved, and where the device is in it.
pub(in crate::queue) struct Ring<M: GuestMemory> {
    memory: M,
    descriptors: Words<u64, M::Lease>,
    driver: Words<u32, M::Lease>,
    device: Words<u32, M::Lease>,
    size: u16,
    event_idx: bool,
    indirect: bool,
    next_available: Position,
    next_used: Position,
    /// `next_used` when the driver was last considered for an interrupt.
    signalled: Position,
    /// Descriptors from there to `next_used`: rounds do not show in positions.
    unsignalled: u32,
    /// Descriptors that were taken and not given back.
    taken: u16,
    chains: Chains<M::Lease>,
    table: Vec<Segment<M::Lease>>,
}

impl<M: GuestMemory> Ring<M> {
    pub(in crate::queue) fn new(memory: M, config: &QueueConfig) -> Result<Self, QueueError> {
        let size = config.size;
        if size == 0 || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size { size: size.into(), max: MAX_QUEUE_SIZE });
        }
        let both = Access::READ | Access::WRITE;
        config.check_alignment(16, 4, 4)?;
        Ok(Self {
            descriptors: memory.resolve_words(config.descriptors, DESCRIPTOR_LEN * u64::from(size), both)?,
            driver: memory.resolve_words(config.driver, EVENT_LEN, Access::READ)?,
            device: memory.resolve_words(config.device, EVENT_LEN, Access::WRITE)?,
            memory,
            size,
            event_idx: config.event_idx,
            indirect: config.indirect,
            next_available: Position::START,
            next_used: Position::START,
            signalled: Position::START,
            unsignalled: 0,
            taken: 0,
            // Any 16-bit value is a legal buffer id (2.8.4).
            chains: Chains::new(1 << 16),
            table: Vec::new(),
        })
    }

    pub(in crate::queue) fn resume(&mut self, state: QueueState) -> Result<(), QueueError> {
        let position = |packed| {
            let at = Position::unpack(packed);
            let size = self.size.into();
            if at.index < self.size { Ok(at) } else { Err(QueueError::Index { index: at.index, size }) }
        };
        (self.next_available, self.next_used) = (position(state.available)?, position(state.used)?);
        self.signalled = self.next_used;
        Ok(())
    }

    pub(in crate::queue) const fn state(&self) -> QueueState {
        QueueState { available: self.next_available.pack(), used: self.next_used.pack() }
    }

    pub(in crate::queue) fn in_flight(&self) -> usize {
        self.chains.in_flight()
    }

    pub(in crate::queue) const fn size(&self) -> u16 {
        self.size
    }

    #[inline(always)]
    fn tail(&self, at: Position, order: Ordering) -> Tail {
        Tail::from_word(self.descriptors.load(2 * usize::from(at.index) + 1, order))
    }

    #[inline(always)]
    fn address(&self, at: Position) -> u64 {
        u64::from_le(self.descriptors.load(2 * usize::from(at.index), Ordering::Relaxed))
    }

    /// At most how many chains are available, as of now.
    #[inline(always)]
    pub(in crate::queue) fn available(&mut self) -> Result<u16, Latched> {
        let available = self.next_available.is_available(self.tail(self.next_available, Ordering::Relaxed).flags);
        Ok(if available { self.size } else { 0 })
    }

    #[inline(always)]
    pub(in crate::queue) fn pop(&mut self) -> Result<Option<Chain<M::Lease>>, Latched> {
        // Acquire: the rest of the chain is read after the flags that make it available.
        let first = self.tail(self.next_available, Ordering::Acquire);
        if !self.next_available.is_available(first.flags) {
            return Ok(None);
        }
        self.walk(first).map(Some)
    }

    /// The chain that begins with `tail`. As long as it is what chains mostly are (direct, short, of whole pieces, without
    /// fault) it is walked here, with nothing to call; as soon as it is not, [`Ring::walk_on`] goes on.
    #[inline(always)]
    fn walk(&mut self, mut tail: Tail) -> Result<Chain<M::Lease>, Latched> {
        let mut at = self.next_available;
        let Some(mut assembly) = self.chains.assemble_at_once() else {
            let assembly = self.chains.assemble();
            return self.walk_on(assembly, at, tail, self.address(at));
        };
        loop {
            let (address, writable) = (self.address(at), tail.flags & WRITE != 0);
            if tail.flags & INDIRECT != 0 || !assembly.add_at_once(&self.memory, (address, tail.len), writable) {
                return self.walk_on(assembly, at, tail, address);
            }
            at = at.advanced(1, self.size);
            if tail.flags & NEXT == 0 {
                break;
            }
            tail = self.tail(at, Ordering::Relaxed);
        }
        // A segment each, so far.
        let count = assembly.segments();
        if count > usize::from(self.size - self.taken) {
            return Err(self.overrun(count));
        }
        self.enter(assembly, tail.id, at, count as u16)
    }

    /// The next chain from the descriptor at `at` on, which is `tail` and `address`, and of which `assembly` has a segment
    /// for each descriptor before.
    #[inline(never)]
    fn walk_on(
        &mut self,
        mut assembly: Assembly<M::Lease>,
        mut at: Position,
        mut tail: Tail,
        mut address: u64,
    ) -> Result<Chain<M::Lease>, Latched> {
        let mut count = assembly.segments();
        loop {
            count += 1;
            if count > usize::from(self.size - self.taken) {
                return Err(self.overrun(count));
            }
            at = at.advanced(1, self.size);
            let (piece, writable) = ((address, tail.len), tail.flags & WRITE != 0);
            if tail.flags & INDIRECT != 0 {
                if tail.flags & NEXT != 0 || count > 1 {
                    return Err(self.chains.fail(QueueError::IndirectWithNext { head: tail.id }));
                }
                let walked = self.walk_table(assembly, address, tail);
                assembly = walked.map_err(|reason| self.chains.fail(reason))?;
                break;
            }
            assembly.add(&self.memory, tail.id, piece, writable).map_err(|reason| self.chains.fail(reason))?;
            if tail.flags & NEXT == 0 {
                break;
            }
            (tail, address) = (self.tail(at, Ordering::Relaxed), self.address(at));
        }
        self.enter(assembly, tail.id, at, count as u16)
    }

    /// The chain known as `id`, that of its last descriptor (2.8.6), which has `count` descriptors and ends before `behind`.
    #[inline(always)]
    fn enter(
        &mut self,
        assembly: Assembly<M::Lease>,
        id: u16,
        behind: Position,
        count: u16,
    ) -> Result<Chain<M::Lease>, Latched> {
        if !self.chains.is_free(id) {
            return Err(self.chains.not_free(id));
        }
        self.chains.mark(id);
        self.taken += count;
        self.next_available = behind;
        assembly.finish(id, count).map_err(|reason| self.chains.fail(reason))
    }

    /// A chain of at least `count` descriptors is more than the driver has.
    #[cold]
    fn overrun(&mut self, count: usize) -> Latched {
        let (size, head) = (self.size, self.next_available.index);
        let too_many = count > usize::from(size);
        let limit = size.into();
        self.chains.fail(if too_many {
            QueueError::TooManyDescriptors { head, limit }
        } else {
            QueueError::Overrun { size }
        })
    }

    /// The chain is the table at `address` (2.8.7): every entry of it, in order.
    fn walk_table(
        &mut self,
        mut assembly: Assembly<M::Lease>,
        address: u64,
        tail: Tail,
    ) -> Result<Assembly<M::Lease>, QueueError> {
        let (head, len) = (tail.id, tail.len);
        if !self.indirect {
            return Err(QueueError::IndirectNotNegotiated { head });
        }
        let entries = u64::from(len) / DESCRIPTOR_LEN;
        if len == 0 || !u64::from(len).is_multiple_of(DESCRIPTOR_LEN) {
            return Err(QueueError::IndirectLength { head, len });
        }
        if entries > self.size.into() {
            return Err(QueueError::TooManyDescriptors { head, limit: self.size.into() });
        }
        self.table.clear();
        let table = &mut self.table;
        self.memory.resolve(address, len.into(), Access::READ, |segment| table.push(segment))?;
        for index in 0..entries as u16 {
            let (address, rest) = read_table(&self.table, index)?;
            // Only WRITE has a meaning here; the other flags are ignored (2.8.7), except that a table in a table is
            // told apart from a buffer by one of them.
            let entry = Tail::from_word(rest);
            if entry.flags & INDIRECT != 0 {
                return Err(QueueError::IndirectNested { head });
            }
            assembly.add(&self.memory, head, (u64::from_le(address), entry.len), entry.flags & WRITE != 0)?;
        }
        self.table.clear();
        Ok(assembly)
    }

    #[inline(always)]
    pub(in crate::queue) fn complete(&mut self, chain: Chain<M::Lease>) -> Result<(), u16> {
        let (id, written, count) = (chain.0.head, chain.0.written, chain.0.entries);
        self.chains.give_back(chain)?;
        let at = self.next_used;
        let flags = at.used_flags() | if written > 0 { WRITE } else { 0 };
        let word = Tail { len: written, id, flags }.to_word();
        // Release: the buffer's bytes are visible before the flags that make it used.
        self.descriptors.store(2 * usize::from(at.index) + 1, word, Ordering::Release);
        self.next_used = at.advanced(count, self.size);
        self.unsignalled = self.unsignalled.saturating_add(count.into());
        self.taken -= count;
        Ok(())
    }

    #[inline(always)]
    pub(in crate::queue) fn needs_interrupt(&mut self) -> bool {
        if self.unsignalled == 0 {
            return false;
        }
        // The driver writes its wish, then looks for used descriptors; we do the reverse. One of us must see the other.
        fence(Ordering::SeqCst);
        let old = core::mem::replace(&mut self.signalled, self.next_used);
        let moved = core::mem::take(&mut self.unsignalled);
        let events = Events::from_word(self.driver.load(0, Ordering::Relaxed));
        // More than a round passes every place, but positions do not tell it from less.
        let event_idx = self.event_idx && moved <= self.size.into();
        events.wanted(event_idx, old, self.next_used, self.size)
    }

    fn wish(&self, flags: u16) {
        self.device.store(0, Events { at: self.next_available, flags }.to_word(), Ordering::Relaxed);
    }

    /// Asks for no kicks. With EVENT_IDX the place where one was wanted lies behind.
    pub(in crate::queue) fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.wish(EVENTS_OFF);
        }
    }

    /// Asks for kicks. True if chains are available already, for which no kick will come.
    pub(in crate::queue) fn enable_kicks(&mut self) -> Result<bool, Latched> {
        self.wish(if self.event_idx { EVENTS_AT } else { EVENTS_ON });
        // We write our wish, then look for available descriptors; the driver does the reverse.
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }

    pub(in crate::queue) fn fail(&mut self, reason: QueueError) -> Latched {
        self.chains.fail(reason)
    }

    pub(in crate::queue) const fn broken(&self) -> Option<QueueError> {
        self.chains.broken()
    }
}
