//! An indirect table, wherever its parts are in host memory.

use alloc::vec::Vec;

use super::assembly::{SEGMENTS_KEPT, gather};
use super::{Blocked, QueueError};
use crate::memory::{Access, GuestMemory, Lease, Segment};

/// Bytes of an entry, in either format of rings.
const ENTRY: usize = 16;

/// The segments of a table, for as long as a chain is put together from it.
pub(super) struct Table<L> {
    segments: Vec<Segment<L>>,
    /// Where each of them ends, in bytes from the start of the table.
    ends: Vec<usize>,
}

impl<L: Lease> Table<L> {
    pub(super) const fn new() -> Self {
        Self { segments: Vec::new(), ends: Vec::new() }
    }

    /// Resolves the table of the chain at `head`.
    pub(super) fn resolve<M: GuestMemory<Lease = L>>(
        &mut self,
        memory: &M,
        head: u16,
        place: (u64, u32),
    ) -> Result<(), Blocked> {
        gather(memory, head, place, Access::READ, &mut self.segments)?;
        let mut end = 0;
        self.ends.extend(self.segments.iter().map(|segment| {
            end += segment.len();
            end
        }));
        Ok(())
    }

    /// Reads entry `index`, which may lie across segments; the caller has checked that it is inside.
    pub(super) fn entry(&self, index: u16) -> Result<(u64, u64), QueueError> {
        let at = ENTRY * usize::from(index);
        // Wherever it is, it is found in a few steps: a driver can have its entries jump to and fro.
        let first = self.ends.partition_point(|&end| end <= at);
        let begin = first.checked_sub(1).map_or(0, |before| self.ends[before]);
        let (mut bytes, mut skip, mut done) = ([0; ENTRY], at - begin, 0);
        for segment in &self.segments[first..] {
            let here = (segment.len() - skip).min(ENTRY - done);
            segment.read(skip, &mut bytes[done..done + here])?;
            (skip, done) = (0, done + here);
            if done == ENTRY {
                break;
            }
        }
        let (first, second) = bytes.split_at(ENTRY / 2);
        let word = |half: &[u8]| half.try_into().map_or(0, u64::from_ne_bytes);
        Ok((word(first), word(second)))
    }

    /// How many segments there are.
    pub(super) fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Lets go of the table's memory.
    pub(super) fn clear(&mut self) {
        self.segments.clear();
        self.segments.shrink_to(SEGMENTS_KEPT);
        self.ends.clear();
        self.ends.shrink_to(SEGMENTS_KEPT);
    }
}
