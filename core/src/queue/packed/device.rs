//! The device's role on a packed ring.

use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use super::layout::{
    AVAILABLE, DESCRIPTOR_LEN, EVENT_LEN, EVENTS_AT, EVENTS_OFF, EVENTS_ON, Events, INDIRECT, NEXT, Position, Tail,
    USED, WRITE,
};
use crate::memory::{Access, GuestMemory, Pending, Words};
use crate::queue::assembly::{Assembly, Chains, Stopped};
use crate::queue::chain::Parts;
use crate::queue::table::Table;
use crate::queue::{
    Blocked, Chain, INDIRECT_MAX, MAX_QUEUE_SIZE, PopError, QueueConfig, QueueError, QueueState, SavedQueue,
};
use crate::sync::fence;

/// [Compared](Position::compared) flags of what is not an available descriptor of a buffer.
const UNUSUAL: u16 = AVAILABLE | USED | INDIRECT;

/// The ring, resolved, and where the device is in it.
pub(in crate::queue) struct Ring<M: GuestMemory> {
    memory: M,
    descriptors: Words<u64, M::Lease>,
    driver: Words<u32, M::Lease>,
    device: Words<u32, M::Lease>,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// Both are [settled](Position::settled) when they are used.
    next_available: Position,
    next_used: Position,
    /// Descriptors taken so far: rounds do not show in positions.
    taken: u64,
    /// How many the driver can have made available so far: a round more than are used.
    limit: u64,
    /// As long as `limit` is less than this, some descriptors of a chain in flight are overwritten.
    overwritten: u64,
    /// `next_used` and `limit` when the driver was last considered for an interrupt.
    signalled: (Position, u64),
    chains: Chains<M::Lease>,
    table: Table<M::Lease>,
}

impl<M: GuestMemory> Ring<M> {
    pub(in crate::queue) fn new(memory: M, config: &QueueConfig) -> Result<Self, Blocked> {
        let size = config.size;
        if size == 0 || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size { size: size.into(), max: MAX_QUEUE_SIZE }.into());
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
            taken: 0,
            limit: size.into(),
            overwritten: 0,
            signalled: (Position::START, size.into()),
            // Any 16-bit value is a legal buffer id (2.8.4).
            chains: Chains::new(1 << 16),
            table: Table::new(),
        })
    }

    pub(in crate::queue) fn resume(&mut self, state: QueueState) -> Result<(), QueueError> {
        let position = |packed| {
            let at = Position::unpack(packed);
            let size = self.size.into();
            if at.index() < self.size { Ok(at) } else { Err(QueueError::Index { index: at.index(), size }) }
        };
        (self.next_available, self.next_used) = (position(state.available)?, position(state.used)?);
        self.signalled = (self.next_used, self.limit);
        Ok(())
    }

    pub(in crate::queue) const fn state(&self) -> QueueState {
        let [available, used] = [self.next_available, self.next_used];
        QueueState { available: available.settled(self.size).pack(), used: used.settled(self.size).pack() }
    }

    /// Goes back to before what is in flight, whose descriptors are still there if none was used before an older one.
    pub(in crate::queue) fn save(&self) -> Result<SavedQueue, QueueError> {
        if self.limit < self.overwritten {
            return Err(QueueError::Overwritten);
        }
        let used = self.next_used.settled(self.size).pack();
        Ok(SavedQueue { state: QueueState { available: used, used }, in_flight: Vec::new() })
    }

    pub(in crate::queue) fn restore(&mut self, SavedQueue { state, in_flight }: &SavedQueue) -> Result<(), QueueError> {
        let QueueState { available, used } = *state;
        if !in_flight.is_empty() || available != used {
            return Err(QueueError::State { in_flight: in_flight.len(), available, used, size: self.size });
        }
        Ok(())
    }

    /// What was in flight is taken from the ring again like everything else.
    pub(in crate::queue) fn take_again(&mut self, id: u16) -> Result<Chain<M::Lease>, Stopped> {
        Err(self.chains.fail(QueueError::Stale { head: id }))
    }

    pub(in crate::queue) fn in_flight(&self) -> usize {
        self.chains.in_flight()
    }

    /// How much is in flight, in descriptors.
    pub(in crate::queue) fn taken(&self) -> usize {
        (self.taken + u64::from(self.size) - self.limit) as usize
    }

    pub(in crate::queue) fn owns(&self, chain: &Chain<M::Lease>) -> bool {
        self.chains.own(chain)
    }

    /// Another burst begins.
    #[inline(always)]
    pub(in crate::queue) fn begin_burst(&mut self) {
        self.chains.begin_burst();
    }

    /// Whether this burst ended because it has looked at enough.
    pub(in crate::queue) const fn is_exhausted(&self) -> bool {
        self.chains.is_exhausted()
    }

    pub(in crate::queue) const fn size(&self) -> u16 {
        self.size
    }

    /// The two words of the descriptor at `at`, unless that is behind all of them: the second is read with `order`, before
    /// the first.
    #[inline(always)]
    fn descriptor(&self, at: Position, order: Ordering) -> Option<(u64, u64)> {
        self.descriptors.load_pair_backwards(at.word(), order)
    }

    /// At most how many chains are available, as of now.
    #[inline(always)]
    pub(in crate::queue) fn available(&mut self) -> Result<u16, Stopped> {
        self.next_available = self.next_available.settled(self.size);
        let tail = self.descriptors.load(self.next_available.word() + 1, Ordering::Relaxed);
        let available = self.next_available.is_available(Tail::from_word(tail).flags);
        Ok(if available { self.size } else { 0 })
    }

    /// Takes the next chain, if there is one.
    #[inline(always)]
    pub(in crate::queue) fn pop(&mut self) -> Result<Chain<M::Lease>, Stopped> {
        let at = self.next_available;
        // Acquire: the rest of the chain is read after the flags that make it available.
        let Some(first) = self.descriptor(at, Ordering::Acquire) else { return self.pop_over() };
        let flags = at.compared(first.1);
        if flags & UNUSUAL == 0 {
            return self.walk(at, first, flags);
        }
        self.take(at, first)
    }

    /// As [`Ring::pop`], where this round is over: at the start of the next.
    #[cold]
    fn pop_over(&mut self) -> Result<Chain<M::Lease>, Stopped> {
        self.next_available = self.next_available.settled(self.size);
        let at = self.next_available;
        self.take(at, self.descriptor(at, Ordering::Acquire).ok_or(Stopped)?)
    }

    /// The chain that begins with the descriptor `first` at `at`, if that is available.
    #[inline(always)]
    fn take(&mut self, at: Position, first: (u64, u64)) -> Result<Chain<M::Lease>, Stopped> {
        if !at.is_available(Tail::from_word(first.1).flags) {
            return Err(Stopped);
        }
        let assembly = self.chains.assemble();
        self.walk_on(assembly, at, first)
    }

    /// The chain that could not be taken yet is still available.
    pub(in crate::queue) const fn left(&self) -> Option<u16> {
        None
    }

    /// Lets go of the newest chain; then it is still available.
    pub(in crate::queue) fn put_back(&mut self, chain: Chain<M::Lease>) -> Result<Option<u16>, ()> {
        let Parts { entries, start, .. } = *chain.0;
        self.chains.give_back(chain).map_err(|_| ())?;
        self.next_available = start;
        self.taken -= u64::from(entries);
        Ok(None)
    }

    /// The chain that begins with `descriptor`, an available buffer at `at`, whose flags are `flags`. As long as it is what
    /// chains mostly are (direct, short, of whole pieces, in one round, without fault) it is walked here, with nothing to
    /// call; as soon as it is not, [`Ring::walk_on`] goes on.
    #[inline(always)]
    fn walk(
        &mut self,
        mut at: Position,
        mut descriptor: (u64, u64),
        mut flags: u16,
    ) -> Result<Chain<M::Lease>, Stopped> {
        let Some(mut assembly) = self.chains.assemble_at_once() else {
            let assembly = self.chains.assemble();
            return self.walk_on(assembly, at, descriptor);
        };
        let id = loop {
            let (address, word) = (u64::from_le(descriptor.0), u64::from_le(descriptor.1));
            if !assembly.add_at_once(&self.memory, (address, word as u32), flags & WRITE != 0) {
                break None;
            }
            if flags & NEXT == 0 {
                break Some((word >> 32) as u16);
            }
            at = at.ahead(1);
            let Some(next) = self.descriptor(at, Ordering::Relaxed) else {
                return self.walk_over(assembly, at);
            };
            (descriptor, flags) = (next, at.compared(next.1));
            if flags & UNUSUAL != 0 {
                break None;
            }
        };
        let Some(id) = id else { return self.walk_on(assembly, at, descriptor) };
        // A segment each, so far.
        let count = assembly.segments();
        self.enter(assembly, id, count, at.ahead(1))
    }

    /// The next chain, of which `assembly` has a segment for each descriptor up to the last of this round; it goes on in
    /// the next.
    #[cold]
    fn walk_over(&mut self, assembly: Assembly<M::Lease>, at: Position) -> Result<Chain<M::Lease>, Stopped> {
        let at = at.settled(self.size);
        // It is inside; nothing at all would not be available.
        let descriptor = self.descriptor(at, Ordering::Relaxed).unwrap_or_default();
        self.walk_on(assembly, at, descriptor)
    }

    /// The next chain from `descriptor` on, which is at `at` and of which `assembly` has a segment for each before.
    #[inline(never)]
    fn walk_on(
        &mut self,
        mut assembly: Assembly<M::Lease>,
        mut at: Position,
        descriptor: (u64, u64),
    ) -> Result<Chain<M::Lease>, Stopped> {
        self.chains.may_work()?;
        let mut count = assembly.segments();
        let mut entries = 0;
        let (mut address, mut tail) = parse(descriptor);
        loop {
            count += 1;
            if self.taken + count as u64 > self.limit {
                return Err(self.overrun(count));
            }
            // A descriptor that is not available is not to be used (2.8.12), wherever in a chain.
            if !at.is_available(tail.flags) {
                return Err(self.chains.fail(QueueError::Unavailable { head: self.next_available.index() }));
            }
            at = at.advanced(1, self.size);
            let (piece, writable) = ((address, tail.len), tail.flags & WRITE != 0);
            if tail.flags & INDIRECT != 0 {
                if tail.flags & NEXT != 0 || count > 1 {
                    return Err(self.chains.fail(QueueError::IndirectWithNext { head: tail.id }));
                }
                let added = self.add_table(&mut assembly, address, tail);
                entries = tail.len as usize / DESCRIPTOR_LEN as usize + self.table.segments();
                // Its leases end here, whatever became of the chain.
                self.table.clear();
                added.map_err(|blocked| self.chains.block(blocked))?;
                break;
            }
            assembly.add(&self.memory, tail.id, piece, writable).map_err(|blocked| self.chains.block(blocked))?;
            if tail.flags & NEXT == 0 {
                break;
            }
            (address, tail) = parse(self.descriptor(at, Ordering::Relaxed).unwrap_or_default());
        }
        self.chains.worked(count + entries, assembly.segments());
        self.enter(assembly, tail.id, count, at)
    }

    /// The chain known as `id`, that of its last descriptor (2.8.6), which has `count` descriptors; the next one is at
    /// `next`.
    #[inline(always)]
    fn enter(
        &mut self,
        assembly: Assembly<M::Lease>,
        id: u16,
        count: usize,
        next: Position,
    ) -> Result<Chain<M::Lease>, Stopped> {
        let taken = self.taken + count as u64;
        if taken > self.limit {
            return Err(self.overrun(count));
        }
        if !self.chains.is_free(id) {
            return Err(self.chains.not_free(id));
        }
        self.chains.mark(id);
        self.taken = taken;
        let start = core::mem::replace(&mut self.next_available, next);
        let mut chain = assembly.finish(&mut self.chains, id, count as u16)?;
        chain.0.start = start;
        Ok(chain)
    }

    /// A chain of at least `count` descriptors is more than the driver has.
    #[cold]
    fn overrun(&mut self, count: usize) -> Stopped {
        let (size, head) = (self.size, self.next_available.index());
        let too_many = count > usize::from(size);
        let limit = size.into();
        self.chains.fail(if too_many {
            QueueError::TooManyDescriptors { head, limit }
        } else {
            QueueError::Overrun { size }
        })
    }

    /// The chain is the table at `address` (2.8.7): every entry of it, in order.
    fn add_table(&mut self, assembly: &mut Assembly<M::Lease>, address: u64, tail: Tail) -> Result<(), Blocked> {
        let (head, len) = (tail.id, tail.len);
        if !self.indirect {
            return Err(QueueError::IndirectNotNegotiated { head }.into());
        }
        let entries = u64::from(len) / DESCRIPTOR_LEN;
        if len == 0 || !u64::from(len).is_multiple_of(DESCRIPTOR_LEN) {
            return Err(QueueError::IndirectLength { head, len }.into());
        }
        let limit = self.size.max(INDIRECT_MAX).into();
        if entries > u64::from(limit) {
            return Err(QueueError::TooManyDescriptors { head, limit }.into());
        }
        self.table.resolve(&self.memory, head, (address, len))?;
        for index in 0..entries as u16 {
            let (address, rest) = self.table.entry(index)?;
            // Only WRITE has a meaning here; the other flags are ignored (2.8.7), except that a table in a table is
            // told apart from a buffer by one of them.
            let entry = Tail::from_word(rest);
            if entry.flags & INDIRECT != 0 {
                return Err(QueueError::IndirectNested { head }.into());
            }
            assembly.add(&self.memory, head, (u64::from_le(address), entry.len), entry.flags & WRITE != 0)?;
        }
        Ok(())
    }

    #[inline(always)]
    pub(in crate::queue) fn complete(&mut self, chain: Chain<M::Lease>) -> Result<(), u16> {
        let Parts { head: id, written, wrote, entries: count, start, .. } = *chain.0;
        self.chains.give_back(chain)?;
        // Whether anything was written, wherever (2.8.4); the length says how much from the first byte on.
        let flags = if written | wrote > 0 { WRITE } else { 0 };
        let at = self.write_used(self.next_used, Tail { len: written, id, flags });
        if at != start {
            // The used descriptor went to where an older chain is.
            self.overwritten = self.taken + u64::from(self.size);
        }
        self.next_used = at.ahead(count);
        self.limit += u64::from(count);
        Ok(())
    }

    /// Writes a used descriptor at `at`, or at the start of the next round if this one is over: where it is.
    #[inline(always)]
    fn write_used(&self, at: Position, tail: Tail) -> Position {
        // Release: the buffer's bytes are visible before the flags that make it used.
        if self.descriptors.try_store(at.word() + 1, at.used_word(tail), Ordering::Release) {
            at
        } else {
            self.write_used_over(at, tail)
        }
    }

    #[cold]
    fn write_used_over(&self, at: Position, tail: Tail) -> Position {
        let at = at.settled(self.size);
        self.descriptors.store(at.word() + 1, at.used_word(tail), Ordering::Release);
        at
    }

    #[inline(always)]
    pub(in crate::queue) fn needs_interrupt(&mut self) -> bool {
        if self.limit == self.signalled.1 {
            return false;
        }
        // The driver writes its wish, then looks for used descriptors; we do the reverse. One of us must see the other.
        fence(Ordering::SeqCst);
        self.next_used = self.next_used.settled(self.size);
        let (old, before) = core::mem::replace(&mut self.signalled, (self.next_used, self.limit));
        let events = Events::from_word(self.driver.load(0, Ordering::Relaxed));
        // More than a round passes every place, but positions do not tell it from less.
        let event_idx = self.event_idx && self.limit - before <= self.size.into();
        events.wanted(event_idx, old, self.next_used, self.size)
    }

    fn wish(&self, flags: u16) {
        let at = self.next_available.settled(self.size);
        self.device.store(0, Events { at, flags }.to_word(), Ordering::Relaxed);
    }

    /// Asks for no kicks. With EVENT_IDX the place where one was wanted lies behind.
    pub(in crate::queue) fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.wish(EVENTS_OFF);
        }
    }

    /// Asks for kicks. True if chains are available already, for which no kick will come.
    pub(in crate::queue) fn enable_kicks(&mut self) -> Result<bool, Stopped> {
        self.wish(if self.event_idx { EVENTS_AT } else { EVENTS_ON });
        // We write our wish, then look for available descriptors; the driver does the reverse.
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }

    pub(in crate::queue) fn fail(&mut self, reason: QueueError) -> Stopped {
        self.chains.fail(reason)
    }

    /// Why the ring gave no chain.
    pub(in crate::queue) fn stopped(&self) -> PopError {
        self.chains.stopped()
    }

    pub(in crate::queue) const fn pending(&self) -> Option<Pending> {
        self.chains.pending()
    }

    pub(in crate::queue) const fn is_blocked(&self) -> bool {
        self.chains.is_blocked()
    }

    pub(in crate::queue) fn look_again(&mut self) {
        self.chains.look_again();
    }

    pub(in crate::queue) const fn broken(&self) -> Option<QueueError> {
        self.chains.broken()
    }
}

/// Address and second word of a descriptor.
#[inline(always)]
fn parse((address, tail): (u64, u64)) -> (u64, Tail) {
    (u64::from_le(address), Tail::from_word(tail))
}
