//! What device roles share: putting chains together, and the book of those in flight.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use super::chain::{Parts, clamp};
use super::packed::layout::Position;
use super::{Chain, MAX_QUEUE_SIZE, QueueError};
use crate::memory::{Access, GuestMemory, Lease, MemoryError, Segment};

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

/// The run of a queue that is latched: of no chain.
const LATCHED: u32 = u32::MAX;

/// Set in the run of a chain whose list of segments is longer than those that are kept. What is compared anyway shows that
/// too, so that it costs other chains nothing.
const LONG: u32 = 1 << 31;

/// The queue is latched, for a reason that [`Chains::broken`] tells. Without the reason, so that what is checked in
/// passing costs a branch and no more.
#[derive(Clone, Copy, Debug)]
pub(super) struct Latched;

/// The chains of a running queue: which are in flight, and the memory of those that came back.
pub(super) struct Chains<L> {
    run: u32,
    broken: Option<QueueError>,
    /// Whether a chain could not be taken yet.
    put_off: bool,
    /// What this burst has looked at so far, as [`WORK`] counts it; more than that once a chain had to be put off for it.
    work: u32,
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
        let run = RUNS.fetch_add(1, Ordering::Relaxed) % (LATCHED & !LONG);
        Self { run, broken: None, put_off: false, work: 0, in_flight, spare: Vec::new() }
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
    pub(super) fn not_free(&mut self, head: u16) -> Latched {
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
        self.work = 0;
    }

    /// Whether this burst ended because it has looked at enough.
    pub(super) const fn is_exhausted(&self) -> bool {
        self.work > WORK
    }

    /// Whether a chain that takes its time may be put together in this burst; if not, it is put off.
    pub(super) fn may_work(&mut self) -> Result<(), Latched> {
        if self.work < WORK {
            return Ok(());
        }
        (self.work, self.put_off) = (u32::MAX, true);
        Err(Latched)
    }

    /// A chain that was put together took so many descriptors and segments.
    pub(super) fn worked(&mut self, descriptors: usize, segments: usize) {
        let work = u32::try_from(descriptors + segments).unwrap_or(WORK);
        self.work = self.work.saturating_add(work).min(WORK);
    }

    /// A chain cannot be taken. That latches the queue, unless it is no fault.
    #[cold]
    #[inline(never)]
    pub(super) fn fail(&mut self, reason: QueueError) -> Latched {
        if let QueueError::Memory(MemoryError::NotYet { .. }) = reason {
            self.put_off = true;
            return Latched;
        }
        self.latch(reason)
    }

    /// Latches the queue: from now on no chain comes back. The first reason stays.
    pub(super) fn latch(&mut self, reason: QueueError) -> Latched {
        self.run = LATCHED;
        self.broken.get_or_insert(reason);
        Latched
    }

    /// Whether the chain that failed last was only put off: [its memory](MemoryError::NotYet) is not known yet, or this burst
    /// has looked at enough.
    pub(super) fn take_put_off(&mut self) -> bool {
        core::mem::take(&mut self.put_off)
    }

    /// Why the queue is latched.
    pub(super) const fn broken(&self) -> Option<QueueError> {
        self.broken
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
    ) -> Result<(), QueueError> {
        let access = if writable {
            self.turn();
            Access::WRITE
        } else {
            if self.state & TURNED != 0 {
                return Err(QueueError::Order { head });
            }
            Access::READ
        };
        self.state += u64::from(len);
        // Before it is looked up: memory in small pieces makes segments of what no chain can have.
        if self.state & !TURNED > CHAIN_LEN_MAX {
            return Err(QueueError::TooLong { head });
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
    pub(super) fn finish(mut self, chains: &mut Chains<L>, head: u16, entries: u16) -> Result<Chain<L>, Latched> {
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
    fn finish_long(mut self, chains: &mut Chains<L>, head: u16, entries: u16) -> Result<Chain<L>, Latched> {
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
) -> Result<(), QueueError> {
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
            return Err(QueueError::Scattered { head, limit: SEGMENTS_MAX });
        }
        left -= part;
        if left == 0 {
            return Ok(());
        }
        at = at.checked_add(part).ok_or(MemoryError::Wraps { address, len: len.into() })?;
    }
}
