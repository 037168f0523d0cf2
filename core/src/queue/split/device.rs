//! The device's role on a split ring.

use core::marker::PhantomData;
use core::sync::atomic::Ordering;

use super::layout::{self, Descriptor, INDEX, INDIRECT, NEXT, NO_INTERRUPT, NO_NOTIFY, Order, WRITE};
use crate::memory::{Access, GuestMemory, Pending, Words};
use crate::queue::assembly::{Assembly, Chains, Stopped};
use crate::queue::chain::Parts;
use crate::queue::table::Table;
use crate::queue::{
    Blocked, Chain, INDIRECT_MAX, MAX_QUEUE_SIZE, PopError, QueueConfig, QueueError, QueueState, SavedQueue,
};
use crate::sync::fence;

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
    /// How many chains were completed; its low 16 bits are the used index. Wider than that, so that a whole round of
    /// indices between two looks at the driver's wish does not pass for nothing.
    completed: u32,
    /// `completed` when the driver was last considered for an interrupt.
    signalled: u32,
    chains: Chains<M::Lease>,
    /// The head of the last chain that [`Ring::walk_on`] went on with.
    walked: u16,
    table: Table<M::Lease>,
    order: PhantomData<O>,
}

impl<M: GuestMemory, O: Order> Ring<M, O> {
    pub(in crate::queue) fn new(memory: M, config: &QueueConfig) -> Result<Self, Blocked> {
        let size = config.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size { size: size.into(), max: MAX_QUEUE_SIZE }.into());
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
            completed: 0,
            signalled: 0,
            chains: Chains::new(size.into()),
            walked: 0,
            table: Table::new(),
            order: PhantomData,
        })
    }

    pub(in crate::queue) fn resume(&mut self, state: QueueState) -> Result<(), QueueError> {
        self.next_available = state.available;
        self.completed = state.used.into();
        self.signalled = self.completed;
        Ok(())
    }

    pub(in crate::queue) const fn state(&self) -> QueueState {
        QueueState { available: self.next_available, used: self.completed as u16 }
    }

    pub(in crate::queue) fn save(&self) -> Result<SavedQueue, QueueError> {
        Ok(SavedQueue { state: self.state(), in_flight: self.chains.heads() })
    }

    /// Marks what was in flight, if it can have been: as many chains as were taken and not used.
    pub(in crate::queue) fn restore(&mut self, SavedQueue { state, in_flight }: &SavedQueue) -> Result<(), QueueError> {
        let QueueState { available, used } = *state;
        let taken = available.wrapping_sub(used);
        if taken > self.size || usize::from(taken) != in_flight.len() {
            return Err(QueueError::State { in_flight: in_flight.len(), available, used, size: self.size });
        }
        self.chains.mark_all(in_flight)
    }

    /// The chain at `head`, which is marked as in flight.
    pub(in crate::queue) fn take_again(&mut self, head: u16) -> Result<Chain<M::Lease>, Stopped> {
        self.walk(head)
    }

    pub(in crate::queue) fn in_flight(&self) -> usize {
        self.chains.in_flight()
    }

    /// How much is in flight, in chains.
    pub(in crate::queue) fn taken(&self) -> usize {
        self.next_available.wrapping_sub(self.completed as u16).into()
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

    /// Takes the next chain: [`Ring::available`] has said that there is one.
    #[inline(always)]
    pub(in crate::queue) fn pop(&mut self) -> Result<Chain<M::Lease>, Stopped> {
        let slot = usize::from(self.next_available) & self.mask;
        let head = O::u16(self.driver.load(layout::available_entry(slot), Ordering::Relaxed));
        if !self.chains.is_free(head) {
            return Err(self.chains.not_free(head));
        }
        self.chains.mark(head);
        self.next_available = self.next_available.wrapping_add(1);
        self.walk(head)
    }

    /// The head of the chain that could not be taken yet, which stays in flight.
    pub(in crate::queue) const fn left(&self) -> Option<u16> {
        Some(self.walked)
    }

    /// Lets go of a chain that is to be taken again; it stays in flight, and this is its head.
    pub(in crate::queue) fn put_back(&mut self, chain: Chain<M::Lease>) -> Result<Option<u16>, ()> {
        let head = chain.head();
        self.chains.give_back(chain).map_err(|_| ())?;
        self.chains.mark(head);
        Ok(Some(head))
    }

    /// How many chains are available, as of now.
    #[inline(always)]
    pub(in crate::queue) fn available(&mut self) -> Result<u16, Stopped> {
        // Acquire: entries and descriptors are read after the index that covers them.
        let index = O::u16(self.driver.load(INDEX, Ordering::Acquire));
        let available = index.wrapping_sub(self.next_available);
        if available > self.size {
            let (last, size) = (self.next_available, self.size);
            return Err(self.chains.fail(QueueError::IndexJump { last, index, size }));
        }
        Ok(available)
    }

    #[inline(always)]
    fn descriptor(&self, index: u16) -> Option<Descriptor> {
        self.descriptors.load_pair(2 * usize::from(index), Ordering::Relaxed).map(O::descriptor)
    }

    /// The chain at `head`. As long as it is what chains mostly are (direct, short, of whole pieces, without fault) it is
    /// walked here, with nothing to call; as soon as it is not, [`Ring::walk_on`] goes on.
    #[inline(always)]
    fn walk(&mut self, head: u16) -> Result<Chain<M::Lease>, Stopped> {
        let Some(mut descriptor) = self.descriptor(head) else { return Err(self.chains.not_free(head)) };
        let Some(mut assembly) = self.chains.assemble_at_once() else {
            let assembly = self.chains.assemble();
            return self.walk_on(assembly, head, descriptor);
        };
        loop {
            let Descriptor { address, len, flags, next } = descriptor;
            if flags & INDIRECT != 0 || !assembly.add_at_once(&self.memory, (address, len), flags & WRITE != 0) {
                return self.walk_on(assembly, head, descriptor);
            }
            if flags & NEXT == 0 {
                break;
            }
            match self.descriptor(next) {
                Some(next) => descriptor = next,
                None => return Err(self.chains.fail(QueueError::Index { index: next, size: self.size.into() })),
            }
        }
        // A segment each, so far.
        if assembly.segments() > usize::from(self.size) {
            return Err(self.chains.fail(QueueError::TooManyDescriptors { head, limit: self.size.into() }));
        }
        assembly.finish(&mut self.chains, head, 1)
    }

    /// The chain at `head` from `descriptor` on, of which `assembly` has a segment for each descriptor before.
    #[inline(never)]
    fn walk_on(
        &mut self,
        mut assembly: Assembly<M::Lease>,
        head: u16,
        descriptor: Descriptor,
    ) -> Result<Chain<M::Lease>, Stopped> {
        self.walked = head;
        self.chains.may_work()?;
        let added = self.add_all(&mut assembly, head, descriptor);
        let segments = assembly.segments() + self.table.segments();
        // Its leases end here, whatever became of the chain.
        self.table.clear();
        match added {
            Ok(descriptors) => {
                self.chains.worked(descriptors, segments);
                assembly.finish(&mut self.chains, head, 1)
            }
            Err(blocked) => Err(self.chains.block(blocked)),
        }
    }

    /// Adds the chain from `descriptor` on; how many descriptors that were.
    fn add_all(
        &mut self,
        assembly: &mut Assembly<M::Lease>,
        head: u16,
        mut descriptor: Descriptor,
    ) -> Result<usize, Blocked> {
        let most = usize::from(self.size).saturating_sub(assembly.segments()) as u16;
        for left in (1..=most).rev() {
            let Descriptor { address, len, flags, next } = descriptor;
            let descriptors = usize::from(most - left) + 1;
            if flags & INDIRECT != 0 {
                return self.add_table(assembly, head, descriptor, left).map(|more| descriptors + more);
            }
            assembly.add(&self.memory, head, (address, len), flags & WRITE != 0)?;
            if flags & NEXT == 0 {
                return Ok(descriptors);
            }
            let beyond = QueueError::Index { index: next, size: self.size.into() };
            descriptor = self.descriptor(next).ok_or(beyond)?;
        }
        Err(QueueError::TooManyDescriptors { head, limit: self.size.into() }.into())
    }

    /// The rest of the chain, at most `left` descriptors or [`INDIRECT_MAX`], is in the table that `descriptor` names
    /// (2.7.5.3).
    fn add_table(
        &mut self,
        assembly: &mut Assembly<M::Lease>,
        head: u16,
        descriptor: Descriptor,
        left: u16,
    ) -> Result<usize, Blocked> {
        let len = descriptor.len;
        if !self.indirect {
            return Err(QueueError::IndirectNotNegotiated { head }.into());
        }
        if descriptor.flags & NEXT != 0 {
            return Err(QueueError::IndirectWithNext { head }.into());
        }
        let entries = u64::from(len) / layout::DESCRIPTOR_LEN;
        if len == 0 || !u64::from(len).is_multiple_of(layout::DESCRIPTOR_LEN) || entries > u16::MAX.into() {
            return Err(QueueError::IndirectLength { head, len }.into());
        }
        self.table.resolve(&self.memory, head, (descriptor.address, len))?;
        let mut index = 0;
        // One that takes more steps than there are entries loops.
        let limit = entries.min(left.max(INDIRECT_MAX).into());
        for step in 0..=limit {
            if u64::from(index) >= entries {
                return Err(QueueError::Index { index, size: entries as u32 }.into());
            }
            if step == limit {
                break;
            }
            let entry = O::descriptor(self.table.entry(index)?);
            if entry.flags & INDIRECT != 0 {
                return Err(QueueError::IndirectNested { head }.into());
            }
            assembly.add(&self.memory, head, (entry.address, entry.len), entry.flags & WRITE != 0)?;
            if entry.flags & NEXT == 0 {
                return Ok(step as usize + 1);
            }
            index = entry.next;
        }
        Err(QueueError::TooManyDescriptors { head, limit: limit as u32 }.into())
    }

    #[inline(always)]
    pub(in crate::queue) fn complete(&mut self, chain: Chain<M::Lease>) -> Result<(), u16> {
        let Parts { head, written, .. } = *chain.0;
        self.chains.give_back(chain)?;
        let entry = layout::used_entry(self.completed as usize & self.mask);
        assert!(self.device.store_pair(entry, (O::u32(u32::from(head)), O::u32(written)), Ordering::Relaxed));
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
    pub(in crate::queue) fn enable_kicks(&mut self) -> Result<bool, Stopped> {
        if self.event_idx {
            self.device.store(layout::avail_event(self.size), O::u16(self.next_available), Ordering::Relaxed);
        } else {
            self.device.store(0, O::u16(0), Ordering::Relaxed);
        }
        // We write our wish, then read the index; the driver does the reverse. One of us must see the other.
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
