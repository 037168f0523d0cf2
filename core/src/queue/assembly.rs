//! What device roles share: putting chains together, and the book of those in flight.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use super::chain::Parts;
use super::{Chain, QueueError};
use crate::memory::{Access, GuestMemory, Lease, Segment};

/// The most bytes that a chain may have in all (2.7.5.2).
const CHAIN_LEN_MAX: u64 = 1 << 32;

/// Distinguishes the runs of all queues, so that a chain cannot be completed on a queue that it does not come from.
static RUNS: AtomicU32 = AtomicU32::new(0);

/// The chains of a running queue: which are in flight, and the memory of those that came back.
pub(super) struct Chains<L> {
    run: u32,
    in_flight: Box<[u64]>,
    /// The memory of completed chains, so that the steady state allocates nothing: one for each chain that was in flight
    /// at once. Boxed, so that handing a chain over moves a pointer.
    #[allow(clippy::vec_box)]
    spare: Vec<Box<Parts<L>>>,
}

impl<L> Chains<L> {
    /// `identities`: how many values a head or buffer id can have.
    pub(super) fn new(identities: usize) -> Self {
        Self {
            run: RUNS.fetch_add(1, Ordering::Relaxed),
            in_flight: vec![0; identities.div_ceil(64)].into(),
            spare: Vec::new(),
        }
    }

    /// Marks `head` (or a buffer id) as in flight; false if it is already.
    #[inline(always)]
    pub(super) fn take(&mut self, head: u16) -> bool {
        let bit = 1 << (head % 64);
        let word = &mut self.in_flight[usize::from(head / 64)];
        let free = *word & bit == 0;
        *word |= bit;
        free
    }

    #[inline(always)]
    pub(super) fn assemble(&mut self, head: u16) -> Assembly<L> {
        let parts = match self.spare.pop() {
            Some(parts) => parts,
            None => self.allocate(),
        };
        Assembly { head, parts, readable: 0, writable: 0 }
    }

    #[cold]
    fn allocate(&self) -> Box<Parts<L>> {
        let segments = Vec::with_capacity(4);
        Box::new(Parts {
            run: self.run,
            head: 0,
            entries: 0,
            readable_len: 0,
            writable_len: 0,
            written: 0,
            writable_from: 0,
            segments,
        })
    }

    /// Takes `chain` out of flight and keeps its memory for another.
    #[inline(always)]
    pub(super) fn give_back(&mut self, Chain(mut parts): Chain<L>) -> Result<(), QueueError> {
        let bit = 1 << (parts.head % 64);
        match self.in_flight.get_mut(usize::from(parts.head / 64)) {
            Some(word) if parts.run == self.run && *word & bit != 0 => *word &= !bit,
            _ => return Err(QueueError::Stale { head: parts.head }),
        }
        // The leases end here, not when the memory is used again.
        parts.segments.clear();
        self.spare.push(parts);
        Ok(())
    }
}

/// A chain that is being put together.
pub(super) struct Assembly<L> {
    head: u16,
    parts: Box<Parts<L>>,
    readable: u64,
    writable: u64,
}

impl<L: Lease> Assembly<L> {
    #[inline(always)]
    pub(super) const fn head(&self) -> u16 {
        self.head
    }

    /// Adds what one descriptor describes.
    #[inline(always)]
    pub(super) fn add<M: GuestMemory<Lease = L>>(
        &mut self,
        memory: &M,
        address: u64,
        len: u32,
        writable: bool,
    ) -> Result<(), QueueError> {
        let segments = &mut self.parts.segments;
        let access = if writable {
            if self.writable == 0 {
                self.parts.writable_from = segments.len();
            }
            self.writable += u64::from(len);
            Access::WRITE
        } else {
            if self.writable > 0 {
                return Err(QueueError::Order { head: self.head });
            }
            self.readable += u64::from(len);
            Access::READ
        };
        if self.readable + self.writable > CHAIN_LEN_MAX {
            return Err(QueueError::TooLong { head: self.head });
        }
        memory.resolve(address, len.into(), access, |segment| segments.push(segment))?;
        Ok(())
    }

    /// The chain, known to the driver as `head` (or buffer id), which takes `entries` descriptors of the ring.
    #[inline(always)]
    pub(super) fn finish(mut self, head: u16, entries: u16) -> Chain<L> {
        let parts = &mut *self.parts;
        if self.writable == 0 {
            parts.writable_from = parts.segments.len();
        }
        parts.head = head;
        parts.entries = entries;
        // A part may have exactly 2^32 bytes; the last of them has no use, because the used length cannot count it.
        parts.readable_len = u32::try_from(self.readable).unwrap_or(u32::MAX);
        parts.writable_len = u32::try_from(self.writable).unwrap_or(u32::MAX);
        parts.written = 0;
        Chain(self.parts)
    }
}

/// Reads entry `index` of an indirect table, which may lie across segments; the caller has checked that it is inside.
pub(super) fn read_table<L: Lease>(table: &[Segment<L>], index: u16) -> Result<[u64; 2], QueueError> {
    let mut bytes = [0; 16];
    let (mut skip, mut done) = (16 * usize::from(index), 0);
    for segment in table {
        if skip >= segment.len() {
            skip -= segment.len();
            continue;
        }
        let here = (segment.len() - skip).min(16 - done);
        segment.read(skip, &mut bytes[done..done + here])?;
        done += here;
        skip = 0;
        if done == 16 {
            break;
        }
    }
    let (first, second) = bytes.split_at(8);
    let word = |half: &[u8]| half.try_into().map_or(0, u64::from_ne_bytes);
    Ok([word(first), word(second)])
}
