//! What a chain may cost before it is refused, and what a refused one leaves behind.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{BUFFERS, HOLE, Memory, SPLIT, Shape, TABLES, broken, popped};
use polyvirt_core::memory::{Access, FlatMemory, GuestMemory, ResolveError, Segment};
use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, WRITE};
use polyvirt_core::queue::{BURST, Layout, PopError, Queue, QueueError};

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
    ) -> Result<(), ResolveError> {
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
            let reason = broken(queue.pop());
            assert_eq!(reason, Some(QueueError::TooLong { head: 0 }), "{layout:?}, indirect {indirect}");
            let asked = vast.asked.load(Ordering::Relaxed);
            assert!(asked <= 1 << 32, "{layout:?}, indirect {indirect}: {asked:#x} bytes were looked up");
        }
    }
}

#[test]
fn a_reason_given_by_the_device_breaks_the_queue() {
    for layout in [Layout::Modern, Layout::Packed] {
        let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout });
        let mut queue = memory.device();
        let reason = QueueError::Request { head: 0, reason: "none" };
        queue.fail(reason);
        assert_eq!(queue.broken(), Some(reason));
        assert_eq!(broken(queue.pop()), Some(reason));
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
        assert!(broken(queue.pop()).is_some(), "there is no memory at its addresses");
        assert_eq!(Arc::strong_count(&memory.map), leases, "{layout:?}");
    }
}

/// Memory in which every byte is a piece of its own; counts how many were asked for.
#[derive(Clone)]
struct Crumbs {
    map: Arc<FlatMemory>,
    asked: Arc<AtomicU64>,
}

impl GuestMemory for Crumbs {
    type Lease = Arc<FlatMemory>;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        access: Access,
        mut segments: impl FnMut(Segment<Self::Lease>),
    ) -> Result<(), ResolveError> {
        if address < BUFFERS {
            // The ring.
            return self.map.resolve(address, len, access, segments);
        }
        self.asked.fetch_add(len, Ordering::Relaxed);
        // There are always bytes behind the address, whatever they are.
        (0..len).try_for_each(|at| {
            let address = BUFFERS + (address - BUFFERS + at) % (TABLES + common::SPACE - BUFFERS);
            let there = !(BUFFERS + common::SPACE..TABLES).contains(&address);
            self.map.resolve(if there { address } else { BUFFERS }, 1, access, &mut segments)
        })
    }
}

const BOTH: [Layout; 2] = [Layout::Modern, Layout::Packed];

fn shape(size: u16, indirect: bool, layout: Layout) -> Shape {
    Shape { size, event_idx: false, indirect, in_order: false, layout }
}

/// Writes entry `index` of the table at `table`, for either layout.
fn entry(memory: &Memory, table: u64, index: u16, (address, len): (u64, u32), flags: u16, next: u16) {
    match memory.shape.layout {
        Layout::Packed => memory.descriptor_at(table, index, address, len, next, flags),
        _ => memory.descriptor_at(table, index, address, len, flags, next),
    }
}

const AVAILABLE: u16 = 1 << 7;

/// Makes the chains that begin in the first `count` entries of the ring available, the same for each: `piece`, with `flags`.
fn offer(memory: &Memory, count: u16, piece: (u64, u32), flags: u16) {
    let packed = memory.shape.layout == Layout::Packed;
    for index in 0..count {
        let (flags, id) = if packed { (flags | AVAILABLE, index) } else { (flags, 0) };
        entry(memory, common::RING, index, piece, flags, id);
    }
    if !packed {
        memory.available(0, &(0..count).collect::<Vec<_>>());
    }
}

/// After so many of either the next chain waits for another burst.
const WORK: usize = 1 << 16;

#[test]
fn a_burst_looks_at_no_more_than_a_little_however_long_the_queue_and_its_chains_are() {
    const LONG: u16 = 1024;
    for (layout, nested) in BOTH.into_iter().flat_map(|layout| [(layout, true), (layout, false)]) {
        let memory = Memory::new(shape(LONG, true, layout));
        if nested {
            // Each chain is the same table, as long as the queue.
            for index in 0..LONG {
                let more = if index + 1 < LONG && layout != Layout::Packed { NEXT } else { 0 };
                let next = if layout == Layout::Packed { 0 } else { index + 1 };
                entry(&memory, TABLES, index, (BUFFERS, 16), WRITE | more, next);
            }
            offer(&memory, LONG, (TABLES, 16 * u32::from(LONG)), INDIRECT);
        } else if layout == Layout::Packed {
            // Of direct descriptors a packed ring has no more than it is long.
            continue;
        } else {
            // Each chain goes on with all that come after it.
            for index in 0..LONG {
                memory.descriptor(index, BUFFERS, 16, WRITE | if index + 1 < LONG { NEXT } else { 0 }, index + 1);
            }
            memory.available(0, &(0..LONG).collect::<Vec<_>>());
        }
        let mut queue = memory.device();
        let (mut chains, mut bursts) = (0, 0);
        loop {
            queue.begin_burst();
            let (mut segments, mut taken) = (0, 0);
            // A device that asks once more gets no more.
            for _ in 0..2 {
                while let Some(chain) = popped(queue.pop()) {
                    segments += chain.writable().len();
                    taken += 1;
                    queue.complete(chain).unwrap();
                }
            }
            assert!(segments <= WORK + usize::from(LONG) + 128 * taken, "{layout:?}: {segments} segments in a burst");
            (chains, bursts) = (chains + taken, bursts + 1);
            let more = queue.end_burst();
            assert!(more || chains == usize::from(LONG), "{layout:?}: the rest of {chains} chains is forgotten");
            if !more {
                break;
            }
            assert!(taken > 0, "{layout:?}: a burst without a chain");
        }
        assert!(bursts > 5, "{layout:?}: {bursts} bursts");
        assert_eq!(queue.broken(), None);
    }
}

#[test]
fn a_burst_has_no_more_chains_than_it_takes_for_what_is_around_it_not_to_count() {
    for layout in BOTH {
        let memory = Memory::new(shape(4096, false, layout));
        offer(&memory, 4096, (BUFFERS, 16), WRITE);
        let mut queue = memory.device();
        for round in 0..4 {
            queue.begin_burst();
            let mut taken = 0;
            while let Some(chain) = popped(queue.pop()) {
                assert_eq!(chain.head(), round * BURST + taken);
                queue.complete(chain).unwrap();
                taken += 1;
            }
            assert_eq!(taken, BURST);
            assert!(queue.end_burst());
        }
        queue.begin_burst();
        assert!(matches!(queue.pop(), Err(PopError::Empty)));
        assert!(!queue.end_burst());
    }
}

#[test]
fn a_chain_in_too_many_pieces_is_refused_before_they_are_all_looked_up() {
    const MOST: u32 = 1 << 16;
    for layout in BOTH {
        for (len, fits) in [(MOST, true), (MOST + 1, false), (u32::MAX, false)] {
            let memory = Memory::new(shape(SIZE, false, layout));
            offer(&memory, 1, (BUFFERS, len), WRITE);
            let crumbs = Crumbs { map: memory.map.clone(), asked: Arc::default() };
            let mut queue = Queue::new(crumbs.clone(), memory.shape.config()).unwrap();
            let popped = queue.pop().map(|chain| chain.writable().len());
            let refused = PopError::Broken(QueueError::Scattered { head: 0, limit: MOST as usize });
            assert_eq!(popped, if fits { Ok(MOST as usize) } else { Err(refused) }, "{layout:?}: {len}");
            let asked = crumbs.asked.load(Ordering::Relaxed);
            assert!(asked <= 1 << 20, "{layout:?}: {asked} bytes were looked up");
        }
        // A table is as much work as a buffer.
        let memory = Memory::new(shape(32768, true, layout));
        for index in 0..4096 {
            let more = if layout == Layout::Packed { 0 } else { NEXT };
            entry(&memory, TABLES, index, (BUFFERS, 1), WRITE | more, 0);
        }
        offer(&memory, 1, (TABLES, MOST + 16), INDIRECT);
        let crumbs = Crumbs { map: memory.map.clone(), asked: Arc::default() };
        let mut queue = Queue::new(crumbs, memory.shape.config()).unwrap();
        let refused = QueueError::Scattered { head: 0, limit: MOST as usize };
        assert_eq!(broken(queue.pop()), Some(refused), "{layout:?}");
    }
}

#[test]
fn a_table_in_many_pieces_is_read_wherever_its_entries_lead() {
    const ENTRIES: u16 = 64;
    for layout in BOTH {
        let memory = Memory::new(shape(ENTRIES, true, layout));
        // To and fro: 0, 63, 1, 62 and so on; a packed ring has them one after another.
        let order: Vec<u16> = (0..ENTRIES).map(|at| if at % 2 == 0 { at / 2 } else { ENTRIES - 1 - at / 2 }).collect();
        for (number, &index) in order.iter().enumerate() {
            let next = order.get(number + 1).copied();
            let address = BUFFERS + 0x100 * index as u64;
            let more = if next.is_some() && layout != Layout::Packed { NEXT } else { 0 };
            let next = if layout == Layout::Packed { 0 } else { next.unwrap_or(0) };
            entry(&memory, TABLES, index, (address, 1), WRITE | more, next);
        }
        offer(&memory, 1, (TABLES, 16 * u32::from(ENTRIES)), INDIRECT);
        let crumbs = Crumbs { map: memory.map.clone(), asked: Arc::default() };
        let mut queue = Queue::new(crumbs, memory.shape.config()).unwrap();
        let chain = queue.pop().expect("a chain");
        let base = memory.map.pages(BUFFERS, 1).unwrap().as_ptr().addr();
        let found: Vec<_> =
            chain.writable().iter().map(|piece| ((piece.as_ptr().addr() - base) / 0x100) as u16).collect();
        let expected = if layout == Layout::Packed { (0..ENTRIES).collect() } else { order };
        assert_eq!(found, expected, "{layout:?}");
    }
}
