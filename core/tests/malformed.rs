//! What a driver can do wrong on a split ring, and that the device's role survives it: each fault gives its error, latches
//! the queue, and from then on nothing of the ring is touched.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::{BUFFERS, HOLE, Memory, RING, SPACE, SPLIT, Shape, TABLES, broken, popped};
use polyvirt_core::memory::{
    Access, Accessed, FlatMemory, GuestMemory, Log, MemoryError, PAGE_SIZE, ResolveError, Segment, Translated, Watched,
};
use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, WRITE};
use polyvirt_core::queue::{INDIRECT_MAX, Layout, PopError, Queue, QueueConfig, QueueError};

const SIZE: u16 = 8;

/// Counts accesses, and keeps them.
#[derive(Default)]
struct Record {
    all: Mutex<Vec<Accessed>>,
    count: AtomicUsize,
}

impl Log for Record {
    fn accessed(&self, access: Accessed) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.all.lock().unwrap().push(access);
    }
}

fn shapes() -> impl Iterator<Item = Shape> {
    let event = [false, true];
    SPLIT.into_iter().flat_map(move |layout| {
        event.map(|event_idx| Shape { size: SIZE, event_idx, indirect: true, in_order: false, layout })
    })
}

/// On every kind of split ring: `spoil` breaks the ring, popping `good` chains works, the next gives what is returned.
/// The queue is broken then.
fn refused(indirect: bool, good: usize, spoil: impl Fn(&Memory)) -> QueueError {
    let mut reasons = shapes().map(|shape| {
        let shape = Shape { indirect, ..shape };
        let memory = Memory::new(shape);
        spoil(&memory);
        let record = Arc::new(Record::default());
        let watched = Watched::new(memory.map.clone(), "device", record.clone());
        let mut queue = Queue::new(watched, shape.config()).unwrap();
        queue.begin_burst();
        let mut chains: Vec<_> = (0..good).map(|_| queue.pop().expect("a good chain")).collect();
        let reason = broken(queue.pop()).expect("a bad chain");

        let before = record.count.load(Ordering::SeqCst);
        assert_eq!(queue.broken(), Some(reason));
        assert_eq!(broken(queue.pop()), Some(reason));
        if let Some(chain) = chains.pop() {
            assert_eq!(queue.complete(chain), Err(reason), "broken");
        }
        assert!(!queue.needs_interrupt());
        queue.begin_burst();
        assert_eq!(broken(queue.pop()), Some(reason));
        assert!(!queue.end_burst());
        queue.fail(QueueError::Request { head: 0, reason: "another" });
        assert_eq!(queue.broken(), Some(reason), "the first reason stays");
        assert_eq!(record.count.load(Ordering::SeqCst), before, "a broken queue touches nothing");
        reason
    });
    let first = reasons.next().unwrap();
    assert!(reasons.all(|reason| reason == first));
    first
}

/// As [`refused`], with only the chain at descriptor 0 available.
fn refused_chain(spoil: impl Fn(&Memory)) -> QueueError {
    refused(true, 0, |memory| {
        spoil(memory);
        memory.available(0, &[0]);
    })
}

/// On every kind of split ring: the chain at descriptor 0 that `make` made is taken; its readable and writable bytes.
fn taken_chain(make: impl Fn(&Memory)) -> (u32, u32) {
    let mut lens = shapes().map(|shape| {
        let memory = Memory::new(shape);
        make(&memory);
        memory.available(0, &[0]);
        let mut queue = memory.device();
        let chain = queue.pop().expect("a chain");
        let lens = (chain.readable_len(), chain.writable_len());
        queue.complete(chain).unwrap();
        lens
    });
    let first = lens.next().unwrap();
    assert!(lens.all(|lens| lens == first));
    first
}

#[test]
fn an_available_index_may_be_ahead_by_the_size_and_no_more() {
    let heads: Vec<u16> = (0..SIZE).collect();
    let full = |memory: &Memory| {
        heads.iter().for_each(|&head| memory.descriptor(head, BUFFERS, 1, 0, 0));
        memory.available(0, &heads);
    };
    let reason = refused(false, 0, |memory| {
        full(memory);
        memory.available(SIZE, &[0]);
    });
    assert_eq!(reason, QueueError::IndexJump { last: 0, index: SIZE + 1, size: SIZE });
    let memory = Memory::new(shapes().next().unwrap());
    full(&memory);
    let mut queue = memory.device();
    assert!(heads.iter().all(|&head| queue.pop().unwrap().head() == head));
}

#[test]
fn an_available_index_that_goes_back_is_a_jump() {
    for shape in shapes() {
        let memory = Memory::new(shape);
        memory.descriptor(0, BUFFERS, 1, 0, 0);
        memory.descriptor(1, BUFFERS, 1, 0, 0);
        memory.available(0, &[0, 1]);
        let mut queue = memory.device();
        assert!(queue.pop().is_ok());
        assert!(queue.pop().is_ok());
        memory.available(0, &[0]);
        assert_eq!(broken(queue.pop()), Some(QueueError::IndexJump { last: 2, index: 1, size: SIZE }));
    }
}

#[test]
fn a_jump_that_shows_when_kicks_are_enabled_again_latches_too() {
    for shape in shapes() {
        let memory = Memory::new(shape);
        let mut queue = memory.device();
        queue.begin_burst();
        assert!(matches!(queue.pop(), Err(PopError::Empty)));
        memory.put16(shape.config().driver + 2, 1000);
        assert!(!queue.end_burst());
        assert_eq!(queue.broken(), Some(QueueError::IndexJump { last: 0, index: 1000, size: SIZE }));
    }
}

#[test]
fn a_head_beyond_the_table() {
    for head in [SIZE, 0x8000, u16::MAX] {
        let reason = refused(true, 0, |memory| memory.available(0, &[head]));
        assert_eq!(reason, QueueError::Index { index: head, size: SIZE.into() });
    }
}

#[test]
fn a_next_beyond_the_table() {
    let reason = refused_chain(|memory| memory.descriptor(0, BUFFERS, 1, NEXT, SIZE));
    assert_eq!(reason, QueueError::Index { index: SIZE, size: SIZE.into() });
    let taken = taken_chain(|memory| memory.descriptor(0, BUFFERS, 1, 0, SIZE));
    assert_eq!(taken, (1, 0), "without NEXT the field has no meaning");
}

#[test]
fn the_same_head_twice_in_flight() {
    let reason = refused(false, 1, |memory| {
        memory.descriptor(3, BUFFERS, 1, 0, 0);
        memory.available(0, &[3, 3]);
    });
    assert_eq!(reason, QueueError::InFlight { head: 3 });
}

#[test]
fn a_head_may_come_again_once_it_is_completed() {
    for shape in shapes() {
        let memory = Memory::new(shape);
        memory.descriptor(3, BUFFERS, 1, 0, 0);
        let mut queue = memory.device();
        for round in 0..u16::from(u8::MAX) {
            memory.available(round, &[3]);
            queue.begin_burst();
            let chain = queue.pop().expect("a chain");
            queue.complete(chain).unwrap();
        }
    }
}

#[test]
fn a_loop_ends_by_count() {
    let to_itself = refused_chain(|memory| memory.descriptor(0, BUFFERS, 1, NEXT, 0));
    assert_eq!(to_itself, QueueError::TooManyDescriptors { head: 0, limit: SIZE.into() });
    let of_two = refused_chain(|memory| {
        memory.descriptor(0, BUFFERS, 1, NEXT, 5);
        memory.descriptor(5, BUFFERS, 1, NEXT, 0);
    });
    assert_eq!(of_two, to_itself);
    let without_bytes = refused_chain(|memory| memory.descriptor(0, BUFFERS, 0, NEXT, 0));
    assert_eq!(without_bytes, to_itself);
    let in_a_table = refused_chain(|memory| {
        memory.descriptor(0, TABLES, 32, INDIRECT, 0);
        memory.descriptor_at(TABLES, 0, BUFFERS, 1, NEXT, 1);
        memory.descriptor_at(TABLES, 1, BUFFERS, 1, NEXT, 0);
    });
    assert_eq!(in_a_table, QueueError::TooManyDescriptors { head: 0, limit: 2 });
}

/// Chains `count` descriptors of one byte each in the table at `table`.
fn chain_of(memory: &Memory, table: u64, count: u16) {
    for index in 0..count {
        let flags = if index + 1 < count { NEXT } else { 0 };
        memory.descriptor_at(table, index, BUFFERS, 1, flags, index + 1);
    }
}

#[test]
fn a_chain_has_at_most_as_many_descriptors_as_the_queue_or_as_anyone_puts_into_tables() {
    let too_many = QueueError::TooManyDescriptors { head: 0, limit: INDIRECT_MAX.into() };
    assert_eq!(taken_chain(|memory| chain_of(memory, RING, SIZE)), (SIZE.into(), 0));
    let table = |memory: &Memory, count: u16| {
        memory.descriptor(0, TABLES, 16 * u32::from(count), INDIRECT, 0);
        chain_of(memory, TABLES, count);
    };
    assert_eq!(taken_chain(|memory| table(memory, SIZE)), (SIZE.into(), 0));
    assert_eq!(taken_chain(|memory| table(memory, INDIRECT_MAX)), (INDIRECT_MAX.into(), 0));
    assert_eq!(refused_chain(|memory| table(memory, INDIRECT_MAX + 1)), too_many);
    // 2.7.5.3.2: ordinary descriptors, then one that names a table.
    let mixed = |memory: &Memory, ordinary: u16, count: u16| {
        chain_of(memory, RING, ordinary + 1);
        memory.descriptor(ordinary, TABLES, 16 * u32::from(count), INDIRECT, 0);
        chain_of(memory, TABLES, count);
    };
    assert_eq!(taken_chain(|memory| mixed(memory, 3, SIZE - 3)), (SIZE.into(), 0));
    assert_eq!(taken_chain(|memory| mixed(memory, 3, INDIRECT_MAX)), (3 + u32::from(INDIRECT_MAX), 0));
    assert_eq!(refused_chain(|memory| mixed(memory, 3, INDIRECT_MAX + 1)), too_many);
    assert_eq!(taken_chain(|memory| mixed(memory, SIZE - 1, 1)), (SIZE.into(), 0));
}

#[test]
fn a_table_may_be_longer_than_the_chain_in_it() {
    let taken = taken_chain(|memory| {
        memory.descriptor(0, TABLES, 16 * 100, INDIRECT, 0);
        memory.descriptor_at(TABLES, 0, BUFFERS, 5, NEXT, 99);
        memory.descriptor_at(TABLES, 99, BUFFERS, 6, WRITE, 0);
    });
    assert_eq!(taken, (5, 6));
}

#[test]
fn the_write_flag_of_a_descriptor_that_names_a_table_is_ignored() {
    let taken = taken_chain(|memory| {
        memory.descriptor(0, TABLES, 16, INDIRECT | WRITE, 0);
        memory.descriptor_at(TABLES, 0, BUFFERS, 5, 0, 0);
    });
    assert_eq!(taken, (5, 0));
}

#[test]
fn an_indirect_table_that_was_not_negotiated() {
    let reason = refused(false, 0, |memory| {
        memory.descriptor(0, TABLES, 16, INDIRECT, 0);
        memory.available(0, &[0]);
    });
    assert_eq!(reason, QueueError::IndirectNotNegotiated { head: 0 });
}

#[test]
fn an_indirect_table_that_is_malformed() {
    let with_next = refused_chain(|memory| memory.descriptor(0, TABLES, 16, INDIRECT | NEXT, 1));
    assert_eq!(with_next, QueueError::IndirectWithNext { head: 0 });
    let nested = refused_chain(|memory| {
        memory.descriptor(0, TABLES, 16, INDIRECT, 0);
        memory.descriptor_at(TABLES, 0, TABLES + 16, 16, INDIRECT, 0);
    });
    assert_eq!(nested, QueueError::IndirectNested { head: 0 });
    for len in [0, 15, 24, 1 << 20, 0xffff_fff0] {
        let reason = refused_chain(|memory| memory.descriptor(0, TABLES, len, INDIRECT, 0));
        assert_eq!(reason, QueueError::IndirectLength { head: 0, len });
    }
    let beyond = refused_chain(|memory| {
        memory.descriptor(0, TABLES, 32, INDIRECT, 0);
        memory.descriptor_at(TABLES, 0, BUFFERS, 1, NEXT, 2);
    });
    assert_eq!(beyond, QueueError::Index { index: 2, size: 2 });
    for (address, len) in [(HOLE, 16), (TABLES + SPACE - 16, 32)] {
        let reason = refused_chain(|memory| memory.descriptor(0, address, len, INDIRECT, 0));
        assert!(matches!(reason, QueueError::Memory(MemoryError::NotMapped { .. })), "{reason}");
    }
}

#[test]
fn readable_after_writable() {
    let order = QueueError::Order { head: 0 };
    let direct = refused_chain(|memory| {
        memory.descriptor(0, BUFFERS, 1, WRITE | NEXT, 1);
        memory.descriptor(1, BUFFERS, 1, 0, 0);
    });
    assert_eq!(direct, order);
    let across = refused_chain(|memory| {
        memory.descriptor(0, BUFFERS, 1, WRITE | NEXT, 1);
        memory.descriptor(1, TABLES, 16, INDIRECT, 0);
        memory.descriptor_at(TABLES, 0, BUFFERS, 1, 0, 0);
    });
    assert_eq!(across, order);
}

#[test]
fn descriptors_without_bytes_are_tolerated_wherever_they_point() {
    let taken = taken_chain(|memory| {
        memory.descriptor(0, HOLE, 0, NEXT, 1);
        memory.descriptor(1, BUFFERS, 7, NEXT, 2);
        memory.descriptor(2, BUFFERS, 0, WRITE | NEXT, 3);
        memory.descriptor(3, BUFFERS, 9, WRITE, 0);
    });
    assert_eq!(taken, (7, 9));
    assert_eq!(taken_chain(|memory| memory.descriptor(0, BUFFERS, 0, WRITE, 0)), (0, 0));
}

#[test]
fn a_buffer_that_is_not_memory() {
    for (address, len) in [(HOLE, 1), (BUFFERS + SPACE - 1, 2), (BUFFERS - 1, 2), (0, u32::MAX)] {
        for flags in [0, WRITE] {
            let reason = refused_chain(|memory| memory.descriptor(0, address, len, flags, 0));
            let not_mapped = MemoryError::NotMapped { address, len: len.into() };
            assert_eq!(reason, QueueError::Memory(not_mapped));
        }
    }
    let wraps = refused_chain(|memory| memory.descriptor(0, u64::MAX, 2, 0, 0));
    assert_eq!(wraps, QueueError::Memory(MemoryError::Wraps { address: u64::MAX, len: 2 }));
    assert_eq!(taken_chain(|memory| memory.descriptor(0, BUFFERS + SPACE - 2, 2, 0, 0)), (2, 0));
}

/// Memory in which everything from [`Endless::START`] on is there, without bytes: for lengths that no test can have.
#[derive(Clone)]
struct Endless(Arc<FlatMemory>);

impl Endless {
    const START: u64 = 1 << 40;
}

impl GuestMemory for Endless {
    type Lease = Arc<FlatMemory>;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        access: Access,
        segments: impl FnMut(Segment<Self::Lease>),
    ) -> Result<(), ResolveError> {
        if address >= Self::START { Ok(()) } else { self.0.resolve(address, len, access, segments) }
    }
}

#[test]
fn a_chain_may_have_2_to_the_32_bytes_and_not_one_more() {
    let half = 1 << 31;
    for (first, second, third, allowed) in
        [(half, half, 0, true), (half, half, 1, false), (u32::MAX, 1, 0, true), (u32::MAX, 1, 1, false)]
    {
        for shape in shapes() {
            let memory = Memory::new(shape);
            memory.descriptor(0, Endless::START, first, NEXT, 1);
            memory.descriptor(1, Endless::START, second, WRITE | NEXT, 2);
            memory.descriptor(2, Endless::START, third, WRITE, 0);
            memory.available(0, &[0]);
            let mut queue = Queue::new(Endless(memory.map.clone()), shape.config()).unwrap();
            match queue.pop() {
                Ok(chain) => {
                    assert!(allowed);
                    assert_eq!((chain.readable_len(), chain.writable_len()), (first, second));
                }
                other => {
                    assert!(!allowed);
                    assert_eq!(broken(other), Some(QueueError::TooLong { head: 0 }));
                }
            }
        }
    }
}

#[test]
fn rights_count_for_buffers_and_tables() {
    let rights = |table: Access, readable: Access, writable: Access| {
        let shape = Shape { size: SIZE, event_idx: false, indirect: true, in_order: false, layout: Layout::Modern };
        let memory = Memory::new(shape);
        memory.descriptor(0, TABLES, 32, INDIRECT, 0);
        memory.descriptor_at(TABLES, 0, BUFFERS, 4, NEXT, 1);
        memory.descriptor_at(TABLES, 1, BUFFERS + PAGE_SIZE, 4, WRITE, 0);
        memory.available(0, &[0]);
        let both = Access::READ | Access::WRITE;
        let translated = Translated::new(
            memory.map.clone(),
            [
                (RING, RING, both),
                (RING + PAGE_SIZE, RING + PAGE_SIZE, both),
                (TABLES, TABLES, table),
                (BUFFERS, BUFFERS, readable),
                (BUFFERS + PAGE_SIZE, BUFFERS + PAGE_SIZE, writable),
            ],
        );
        let mut queue = Queue::new(translated, shape.config()).unwrap();
        queue.pop().map(drop)
    };
    let (read, write) = (Access::READ, Access::WRITE);
    assert_eq!(rights(read, read, write), Ok(()));
    for wrong in [rights(write, read, write), rights(read, write, write), rights(read, read, read)] {
        let reason = broken(wrong);
        assert!(matches!(reason, Some(QueueError::Memory(MemoryError::Forbidden { .. }))), "{reason:?}");
    }
}

#[test]
fn a_table_and_a_buffer_in_pieces_of_memory_are_one_for_the_chain() {
    let shape = Shape { size: SIZE, event_idx: true, indirect: true, in_order: false, layout: Layout::Modern };
    let memory = Memory::new(shape);
    // The table's second entry lies across two pages that are far apart, and so does the buffer.
    let edge = PAGE_SIZE - 24;
    memory.descriptor(0, TABLES + edge, 48, INDIRECT, 0);
    memory.available(0, &[0]);
    let entries = Memory::new(shape);
    entries.descriptor_at(TABLES, 0, BUFFERS + PAGE_SIZE - 2, 4, NEXT, 1);
    entries.descriptor_at(TABLES, 1, BUFFERS + 0x3000, 3, NEXT, 2);
    entries.descriptor_at(TABLES, 2, BUFFERS + 0x3100, 5, WRITE, 0);
    let table: [u8; 48] = entries.read(TABLES);
    memory.write(TABLES + edge, &table[..24]);
    memory.write(TABLES + 0x5000, &table[24..]);
    memory.write(BUFFERS + PAGE_SIZE - 2, b"po");
    memory.write(BUFFERS + 0x7000, b"ly");
    memory.write(BUFFERS + 0x3000, b"vir");
    let both = Access::READ | Access::WRITE;
    let translated = Translated::new(
        memory.map.clone(),
        [
            (RING, RING, both),
            (RING + PAGE_SIZE, RING + PAGE_SIZE, both),
            (TABLES, TABLES, both),
            (TABLES + PAGE_SIZE, TABLES + 0x5000, both),
            (BUFFERS, BUFFERS, both),
            (BUFFERS + PAGE_SIZE, BUFFERS + 0x7000, both),
            (BUFFERS + 0x3000, BUFFERS + 0x3000, both),
        ],
    );
    let mut queue = Queue::new(translated, shape.config()).unwrap();
    let chain = queue.pop().expect("a chain");
    let mut bytes = [0; 7];
    chain.read(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"polyvir");
    assert_eq!((chain.readable_len(), chain.writable_len(), chain.readable().len()), (7, 5, 3));
}

#[test]
fn each_descriptor_is_read_once_and_the_drivers_areas_are_never_written() {
    for shape in shapes() {
        let memory = Memory::new(shape);
        memory.descriptor(0, BUFFERS, 4, NEXT, 1);
        memory.descriptor(1, BUFFERS + 16, 4, WRITE, 0);
        memory.descriptor(2, TABLES, 16, INDIRECT, 0);
        memory.descriptor_at(TABLES, 0, BUFFERS + 32, 4, WRITE, 0);
        memory.available(0, &[0, 2]);
        let record = Arc::new(Record::default());
        let watched = Watched::new(memory.map.clone(), "device", record.clone());
        let mut queue = Queue::new(watched, shape.config()).unwrap();
        queue.begin_burst();
        while let Some(mut chain) = popped(queue.pop()) {
            chain.write(0, b"done").unwrap();
            queue.complete(chain).unwrap();
        }
        queue.needs_interrupt();
        queue.end_burst();
        let accesses = record.all.lock().unwrap().clone();
        let QueueConfig { driver, device, .. } = shape.config();
        for byte in (RING..RING + 3 * 16).chain(TABLES..TABLES + 16).chain(driver + 4..driver + 8) {
            let read = accesses.iter().filter(|access| (access.address..access.address + access.len).contains(&byte));
            assert_eq!(read.count(), 1, "byte {byte:#x}, {shape:?}");
        }
        let written = accesses.iter().filter(|access| access.direction == Access::WRITE);
        for access in written {
            let answers = [BUFFERS + 16, BUFFERS + 32].contains(&access.address);
            assert!(answers || access.address >= device, "{access:?}, {shape:?}");
        }
    }
}
