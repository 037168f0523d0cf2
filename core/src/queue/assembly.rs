//! What device roles share: putting chains together, and the book of those in flight.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use super::chain::{Parts, clamp};
use super::packed::layout::Position;
use super::{Blocked, Chain, MAX_QUEUE_SIZE, PopError, QueueError};
use crate::memory::{Access, GuestMemory, Lease, MemoryError, Pending, Segment};

/// The most bytes that a chain may have in all (2.7.5.2).
const CHAIN_LEN_MAX: u64 = 1 << 32;

/// The most segments that a chain may have: as many as the longest chain of page-sized buffers has, none of which begins
/// with a page.
pub(super) const SEGMENTS_MAX: usize = 2 * MAX_QUEUE_SIZE as usize;

/// Segments for which a list that nothing uses has room.
pub(super) const SEGMENTS_KEPT: usize = 128;

/// Bytes that are looked up at once: what is longer, from one multiple of them to the next.
const PART: u64 = 1 << 20;

/// Descriptors and segments, of chains that are not what chains mostly are, after which a burst ends. What it does besides
/// is bounded by the number of chains, each with at most [`SEGMENTS_KEPT`] segments.
const WORK: u32 = 1 << 16;

/// Distinguishes the runs of all queues, so that a chain cannot be completed on a queue that it does not come from.
static RUNS: AtomicU32 = AtomicU32::new(0);

/// Set in the run of a chain whose list of segments is longer than those that are kept. What is compared anyway shows that
/// too, so that it costs other chains nothing.
const LONG: u32 = 1 << 31;

/// A number for the run of a queue.
fn new_run() -> u32 {
    RUNS.fetch_add(1, Ordering::Relaxed) % LONG
}

/// The ring gives no chain; why, [`Chains::stopped`] tells. Without the reason, so that what is checked in passing costs a
/// branch and no more.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopped;

/// The chains of a running queue: which are in flight, and the memory of those that came back.
pub(super) struct Chains<L> {
    run: u32,
    /// What keeps the next chain from being taken. If it is a fault, the next is none.
    blocked: Option<Blocked>,
    /// What this burst has looked at so far, as [`WORK`] counts it.
    work: u32,
    /// Whether a chain waits for the next burst, because this one has looked at enough.
    exhausted: bool,
    /// By head or buffer id. A byte each: what asks whether one is in flight checks its range as well.
    in_flight: Box<[bool]>,
    /// The memory of completed chains, so that the steady state allocates nothing: one for each chain that was in flight
    /// at once. Boxed, so that handing a chain over moves a pointer.
    #[allow(clippy::vec_box)]
    spare: Vec<Box<Parts<L>>>,
}

impl<L> Chains<L> {
    /// `identities`: how many values a head or buffer id can have.
    pub(super) fn new(identities: usize) -> Self {
        let in_flight = vec![false; identities].into();
        Self { run: new_run(), blocked: None, work: 0, exhausted: false, in_flight, spare: Vec::new() }
    }

    /// Whether `head` (or a buffer id) is one, and not in flight.
    #[inline(always)]
    pub(super) fn is_free(&self, head: u16) -> bool {
        self.in_flight.get(usize::from(head)).is_some_and(|in_flight| !in_flight)
    }

    /// How many are in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.iter().filter(|in_flight| **in_flight).count()
    }

    /// Marks `head` (or a buffer id), which is free, as in flight.
    #[inline(always)]
    pub(super) fn mark(&mut self, head: u16) {
        self.in_flight[usize::from(head)] = true;
    }

    /// Whether `chain` is of this run.
    #[inline(always)]
    pub(super) fn own(&self, chain: &Chain<L>) -> bool {
        chain.0.run & !LONG == self.run
    }

    /// All heads in flight.
    pub(super) fn heads(&self) -> Vec<u16> {
        let numbered = self.in_flight.iter().enumerate();
        numbered.filter(|(_, in_flight)| **in_flight).map(|(head, _)| head as u16).collect()
    }

    /// Marks `heads`, each of which has to be free.
    pub(super) fn mark_all(&mut self, heads: &[u16]) -> Result<(), QueueError> {
        for &head in heads {
            match self.in_flight.get_mut(usize::from(head)) {
                Some(in_flight) if !*in_flight => *in_flight = true,
                Some(_) => return Err(QueueError::InFlight { head }),
                None => return Err(QueueError::Index { index: head, size: self.in_flight.len() as u32 }),
            }
        }
        Ok(())
    }

    /// Why `head` is not free.
    #[cold]
    pub(super) fn not_free(&mut self, head: u16) -> Stopped {
        let size = self.in_flight.len() as u32;
        let inside = u32::from(head) < size;
        self.fail(if inside { QueueError::InFlight { head } } else { QueueError::Index { index: head, size } })
    }

    /// The beginning of a chain, in memory that is there already.
    #[inline(always)]
    pub(super) fn assemble_at_once(&mut self) -> Option<Assembly<L>> {
        Some(Assembly { parts: self.spare.pop()?, state: 0 })
    }

    /// The beginning of a chain.
    pub(super) fn assemble(&mut self) -> Assembly<L> {
        let parts = self.spare.pop().unwrap_or_else(|| self.allocate());
        Assembly { parts, state: 0 }
    }

    fn allocate(&self) -> Box<Parts<L>> {
        let segments = Vec::with_capacity(4);
        Box::new(Parts {
            run: self.run,
            head: 0,
            entries: 0,
            number: 0,
            start: Position::START,
            readable: 0,
            writable_len: 0,
            written: 0,
            wrote: 0,
            writable_from: 0,
            segments,
        })
    }

    /// Takes `chain` out of flight and keeps its memory for another; the error is its head if it is not of this run. One that is, is in flight: it exists once, and is given back here.
    #[inline(always)]
    pub(super) fn give_back(&mut self, Chain(mut parts): Chain<L>) -> Result<(), u16> {
        if parts.run != self.run {
            return self.give_back_long(Chain(parts));
        }
        self.in_flight[usize::from(parts.head)] = false;
        // The leases end here, before the driver is told, not when the memory is used again.
        parts.segments.clear();
        self.spare.push(parts);
        Ok(())
    }

    /// As [`Chains::give_back`], of a chain that does not seem to be of this run: it may only have a long list.
    #[cold]
    #[inline(never)]
    fn give_back_long(&mut self, Chain(mut parts): Chain<L>) -> Result<(), u16> {
        if parts.run & !LONG != self.run {
            return Err(parts.head);
        }
        parts.run = self.run;
        parts.segments.clear();
        parts.segments.shrink_to(SEGMENTS_KEPT);
        self.give_back(Chain(parts))
    }

    /// Another burst begins.
    #[inline(always)]
    pub(super) fn begin_burst(&mut self) {
        (self.work, self.exhausted) = (0, false);
    }

    /// Whether this burst ended because it has looked at enough.
    pub(super) const fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    /// Whether a chain that takes its time may be put together in this burst.
    pub(super) fn may_work(&mut self) -> Result<(), Stopped> {
        self.exhausted |= self.work >= WORK;
        if self.exhausted { Err(Stopped) } else { Ok(()) }
    }

    /// A chain that was put together took so many descriptors and segments.
    pub(super) fn worked(&mut self, descriptors: usize, segments: usize) {
        let work = u32::try_from(descriptors + segments).unwrap_or(WORK);
        self.work = self.work.saturating_add(work).min(WORK);
    }

    /// A chain cannot be put together. For a fault the queue is broken: its run is over, so that no chain of it comes back.
    /// The first reason stays.
    #[cold]
    #[inline(never)]
    pub(super) fn block(&mut self, blocked: Blocked) -> Stopped {
        if self.broken().is_none() {
            if let Blocked::Broken(_) = blocked {
                self.run = new_run();
            }
            self.blocked = Some(blocked);
        }
        Stopped
    }

    /// As [`Chains::block`], for a fault.
    #[cold]
    pub(super) fn fail(&mut self, reason: QueueError) -> Stopped {
        self.block(reason.into())
    }

    /// Whether the next chain could not be taken when it was looked at last.
    pub(super) const fn is_blocked(&self) -> bool {
        self.blocked.is_some()
    }

    /// The next chain is looked at anew, if the queue is not broken.
    pub(super) fn look_again(&mut self) {
        if self.pending().is_some() {
            self.blocked = None;
        }
    }

    /// Why there was no chain.
    pub(super) fn stopped(&self) -> PopError {
        match self.blocked {
            Some(Blocked::Broken(reason)) => PopError::Broken(reason),
            Some(Blocked::Pending(pending)) => PopError::Pending(pending),
            None if self.exhausted => PopError::Spent,
            None => PopError::Empty,
        }
    }

    /// What the next chain waited for when it was looked at last.
    pub(super) const fn pending(&self) -> Option<Pending> {
        match self.blocked {
            Some(Blocked::Pending(pending)) => Some(pending),
            _ => None,
        }
    }

    /// Why the queue is broken.
    pub(super) const fn broken(&self) -> Option<QueueError> {
        match self.blocked {
            Some(Blocked::Broken(reason)) => Some(reason),
            _ => None,
        }
    }
}

/// A chain that is being put together. Two words, so that it stays in registers wherever it is handed on.
pub(super) struct Assembly<L> {
    parts: Box<Parts<L>>,
    /// Bytes so far, and [`TURNED`]. No chain has enough descriptors to overflow it.
    state: u64,
}

/// The bit of [`Assembly::state`] that says that the writable part has begun.
const TURNED: u64 = 1 << 63;

impl<L: Lease> Assembly<L> {
    /// Adds what one descriptor describes, as a segment, if it takes no more than a look: otherwise it is left to
    /// [`Assembly::add`]. Nothing is called from here, so that a loop around it stays in registers.
    #[inline(always)]
    #[must_use]
    pub(super) fn add_at_once<M: GuestMemory<Lease = L>>(
        &mut self,
        memory: &M,
        (address, len): (u64, u32),
        writable: bool,
    ) -> bool {
        let access = if writable { Access::WRITE } else { Access::READ };
        if writable {
            self.turn();
        } else if self.state & TURNED != 0 {
            return false;
        }
        let segments = &mut self.parts.segments;
        if segments.len() == segments.capacity() {
            return false;
        }
        let Some(segment) = memory.resolve_at_once(address, len.into(), access) else { return false };
        segments.push(segment);
        self.state += u64::from(len);
        true
    }

    /// Adds what one descriptor of the chain at `head` describes.
    pub(super) fn add<M: GuestMemory<Lease = L>>(
        &mut self,
        memory: &M,
        head: u16,
        (address, len): (u64, u32),
        writable: bool,
    ) -> Result<(), Blocked> {
        let access = if writable {
            self.turn();
            Access::WRITE
        } else {
            if self.state & TURNED != 0 {
                return Err(QueueError::Order { head }.into());
            }
            Access::READ
        };
        self.state += u64::from(len);
        // Before it is looked up: memory in small pieces makes segments of what no chain can have.
        if self.state & !TURNED > CHAIN_LEN_MAX {
            return Err(QueueError::TooLong { head }.into());
        }
        let Parts { run, segments, .. } = &mut *self.parts;
        gather(memory, head, (address, len), access, segments)?;
        if segments.capacity() > SEGMENTS_KEPT {
            *run |= LONG;
        }
        Ok(())
    }

    /// The readable part ends here, if it has not ended before.
    #[inline(always)]
    fn turn(&mut self) {
        if self.state & TURNED == 0 {
            self.parts.writable_from = self.parts.segments.len();
            self.parts.readable = self.state;
            self.state |= TURNED;
        }
    }

    /// The chain, known to the driver as `head` (or buffer id), which takes `entries` descriptors of the ring.
    #[inline(always)]
    pub(super) fn finish(mut self, chains: &mut Chains<L>, head: u16, entries: u16) -> Result<Chain<L>, Stopped> {
        self.turn();
        let len = self.state & !TURNED;
        if len >= CHAIN_LEN_MAX {
            return self.finish_long(chains, head, entries);
        }
        let parts = &mut *self.parts;
        (parts.head, parts.entries, parts.written, parts.wrote) = (head, entries, 0, 0);
        parts.writable_len = len as u32 - parts.readable as u32;
        Ok(Chain(self.parts))
    }

    /// A part may have exactly 2^32 bytes; the last of them has no use, because the used length cannot count it.
    #[cold]
    #[inline(never)]
    fn finish_long(mut self, chains: &mut Chains<L>, head: u16, entries: u16) -> Result<Chain<L>, Stopped> {
        let len = self.state & !TURNED;
        if len > CHAIN_LEN_MAX {
            return Err(chains.fail(QueueError::TooLong { head }));
        }
        let parts = &mut *self.parts;
        (parts.head, parts.entries, parts.written, parts.wrote) = (head, entries, 0, 0);
        parts.writable_len = clamp(len - parts.readable);
        Ok(Chain(self.parts))
    }

    /// How many segments there are.
    #[inline(always)]
    pub(super) fn segments(&self) -> usize {
        self.parts.segments.len()
    }
}

/// Adds the segments of a piece of the chain at `head` to `segments`, of which there may be [`SEGMENTS_MAX`].
pub(super) fn gather<M: GuestMemory>(
    memory: &M,
    head: u16,
    (address, len): (u64, u32),
    access: Access,
    segments: &mut Vec<Segment<M::Lease>>,
) -> Result<(), Blocked> {
    let (mut at, mut left) = (address, u64::from(len));
    loop {
        // Part by part, so that what has too many pieces is not looked up to its end.
        let part = if left <= PART { left } else { PART - at % PART };
        memory
            .resolve(at, part, access, |segment| {
                if segments.len() <= SEGMENTS_MAX {
                    segments.push(segment);
                }
            })
            .map_err(|error| error.of(address, len.into()))?;
        if segments.len() > SEGMENTS_MAX {
            return Err(QueueError::Scattered { head, limit: SEGMENTS_MAX }.into());
        }
        left -= part;
        if left == 0 {
            return Ok(());
        }
        at = at.checked_add(part).ok_or(MemoryError::Wraps { address, len: len.into() })?;
    }
}
