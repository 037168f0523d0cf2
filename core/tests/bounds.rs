//! What a chain may cost before it is refused, and what a refused one leaves behind.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{BUFFERS, HOLE, Memory, SPLIT, Shape, TABLES};
use polyvirt_core::memory::{Access, FlatMemory, GuestMemory, MemoryError, Segment};
use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, WRITE};
use polyvirt_core::queue::{Layout, Queue, QueueError};

const SIZE: u16 = 8;

/// Memory of which everything from [`HOLE`] on is there, though no bytes of it are handed out; counts how many were asked
/// for. As if it were in pages, each a segment, of which there would be too many to try.
#[derive(Clone)]
struct Vast {
    map: Arc<FlatMemory>,
    asked: Arc<AtomicU64>,
}

impl GuestMemory for Vast {
    type Lease = Arc<FlatMemory>;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        access: Access,
        segments: impl FnMut(Segment<Self::Lease>),
    ) -> Result<(), MemoryError> {
        if address < HOLE {
            return self.map.resolve(address, len, access, segments);
        }
        self.asked.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }
}

/// Writes a chain of as many descriptors as the queue has entries, each as long as can be, at `table`.
fn fill(memory: &Memory, table: u64, packed_flags: u16) {
    for index in 0..SIZE {
        let next = if index + 1 < SIZE { NEXT } else { 0 };
        let (address, len) = (HOLE, u32::MAX);
        if memory.shape.layout == Layout::Packed {
            // Here the buffer id stands before the flags.
            memory.descriptor_at(table, index, address, len, 0, WRITE | next | packed_flags);
        } else {
            memory.descriptor_at(table, index, address, len, WRITE | next, index + 1);
        }
    }
}

fn put(memory: &Memory, indirect: bool) {
    const AVAILABLE: u16 = 1 << 7;
    let packed = memory.shape.layout == Layout::Packed;
    if indirect {
        fill(memory, TABLES, 0);
        let (first, second) = if packed { (0, INDIRECT | AVAILABLE) } else { (INDIRECT, 0) };
        memory.descriptor(0, TABLES, 16 * u32::from(SIZE), first, second);
    } else {
        fill(memory, common::RING, AVAILABLE);
    }
    if !packed {
        memory.available(0, &[0]);
    }
}

#[test]
fn a_chain_that_is_too_long_is_refused_before_more_than_a_chain_may_have_is_looked_up() {
    for layout in SPLIT.into_iter().chain([Layout::Packed]) {
        for indirect in [false, true] {
            let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect, in_order: false, layout });
            put(&memory, indirect);
            let vast = Vast { map: memory.map.clone(), asked: Arc::default() };
            let mut queue = Queue::new(vast.clone(), memory.shape.config()).unwrap();
            let popped = queue.pop().map(|chain| chain.is_some());
            assert_eq!(popped, Err(QueueError::TooLong { head: 0 }), "{layout:?}, indirect {indirect}");
            let asked = vast.asked.load(Ordering::Relaxed);
            assert!(asked <= 1 << 32, "{layout:?}, indirect {indirect}: {asked:#x} bytes were looked up");
        }
    }
}

#[test]
fn a_reason_given_by_the_device_latches_the_queue_whatever_it_is() {
    for layout in [Layout::Modern, Layout::Packed] {
        let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout });
        let mut queue = memory.device();
        let reason = QueueError::Memory(MemoryError::NotYet { address: BUFFERS, len: 1 });
        queue.fail(reason);
        assert_eq!(queue.broken(), Some(reason));
        assert_eq!(queue.pop().map(|chain| chain.is_some()), Err(reason));
        assert_eq!(queue.in_flight(), 0);
    }
}

#[test]
fn a_refused_table_is_not_kept_accessible() {
    for layout in [Layout::Modern, Layout::Packed] {
        let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect: true, in_order: false, layout });
        put(&memory, true);
        let mut queue = memory.device();
        let leases = Arc::strong_count(&memory.map);
        assert!(queue.pop().is_err(), "there is no memory at its addresses");
        assert_eq!(Arc::strong_count(&memory.map), leases, "{layout:?}");
    }
}
