//! Memory that knows which chains are in flight and outlives the connection (INFLIGHT_SHMFD): a part for each queue.
//!
//! Its layout, and the order of what is written there, are the protocol's ("Inflight I/O tracking"), so that another
//! back end can go on with it: whenever one dies, what is not used yet and only that is known to be in flight.

pub(super) mod packed;
pub(super) mod split;

use std::sync::atomic::Ordering;

use polyvirt_core::memory::{MemoryError, Owner, Pages, Words};

/// Every queue's part begins at a multiple of this.
const ALIGN: usize = 64;
/// The layout's version.
const VERSION: u16 = 1;

/// In units of u16 from the start of a queue's part: what both layouts have. Version 0 says that there is nothing yet.
const AT_VERSION: usize = 4;
const AT_ENTRIES: usize = 5;

/// Bytes for `queues` queues of `entries` entries.
pub(super) fn size(queues: u16, entries: u16, packed: bool) -> usize {
    usize::from(queues) * part_size(entries, packed)
}

fn part_size(entries: u16, packed: bool) -> usize {
    let (header, entry) = if packed { (packed::HEADER, packed::ENTRY) } else { (split::HEADER, split::ENTRY) };
    (header + entry * usize::from(entries)).next_multiple_of(ALIGN)
}

/// The part of queue `index` in `memory`, which is divided for queues of `entries`.
fn part(memory: &Pages, index: u16, entries: u16, packed: bool) -> Result<Words<u64, Owner>, MemoryError> {
    let len = part_size(entries, packed);
    let offset = usize::from(index) * len;
    let missing = MemoryError::OutOfBounds { offset, len, size: memory.len() };
    Words::new(memory.slice(offset, len).ok_or(missing)?)
}

/// Whether something is known of queue `index`: a back end kept it, this one or another.
pub(super) fn knows(memory: &Pages, index: u16, entries: u16, packed: bool) -> bool {
    let version = |words: Words<u64, Owner>| words.load::<u16>(AT_VERSION, Ordering::Acquire);
    part(memory, index, entries, packed).is_ok_and(|words| version(words) == VERSION)
}

/// Nothing is known of queue `index` any more: it begins anew.
pub(super) fn forget(memory: &Pages, index: u16, entries: u16, packed: bool) {
    if let Ok(words) = part(memory, index, entries, packed) {
        words.store(AT_VERSION, 0u16, Ordering::Release);
    }
}
