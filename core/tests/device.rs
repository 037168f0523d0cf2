//! The device's role on a split ring: where it may be, which chains it takes back, how long it serves.

mod common;

use common::{BUFFERS, HOLE, Memory, SPACE, SPLIT, Shape, popped, refused};
use polyvirt_core::memory::{FlatMemory, MemoryError, Pages};
use polyvirt_core::queue::split::layout::{NO_NOTIFY, WRITE};
use polyvirt_core::queue::{PopError, Queue, QueueConfig, QueueError};

const SIZE: u16 = 8;

fn shapes() -> impl Iterator<Item = Shape> {
    let event = [false, true];
    SPLIT.into_iter().flat_map(move |layout| {
        event.map(|event_idx| Shape { size: SIZE, event_idx, indirect: true, in_order: false, layout })
    })
}

#[test]
fn a_chain_of_an_earlier_run_is_refused_and_the_queue_goes_on() {
    for shape in shapes() {
        let memory = Memory::new(shape);
        memory.descriptor(0, BUFFERS, 1, WRITE, 0);
        memory.available(0, &[0]);
        let mut before = memory.device();
        let old = before.pop().expect("a chain");
        let mut after = memory.device();
        let new = after.pop().expect("a chain");
        assert_eq!(after.complete(old), Err(QueueError::Stale { head: 0 }));
        assert_eq!(after.broken(), None);
        assert_eq!(memory.get16(shape.config().device + 2), 0, "nothing was used");
        after.complete(new).unwrap();
        assert_eq!(memory.get16(shape.config().device + 2), 1);
    }
}

#[test]
fn a_burst_takes_no_more_than_the_queue_is_long_even_if_the_driver_keeps_adding() {
    for shape in shapes() {
        let memory = Memory::new(shape);
        memory.descriptor(0, BUFFERS, 1, 0, 0);
        let mut queue = memory.device();
        queue.begin_burst();
        let mut taken = 0;
        memory.available(0, &[0]);
        while let Some(chain) = popped(queue.pop()) {
            queue.complete(chain).unwrap();
            taken += 1;
            memory.available(taken, &[0]);
        }
        assert_eq!(taken, SIZE);
        assert!(queue.end_burst(), "there is more");
    }
}

#[test]
fn without_event_idx_kicks_are_off_from_the_first_chain_to_the_end_of_the_burst() {
    for shape in shapes().filter(|shape| !shape.event_idx) {
        let memory = Memory::new(shape);
        memory.descriptor(0, BUFFERS, 1, 0, 0);
        memory.available(0, &[0]);
        let flags = || memory.get16(shape.config().device);
        let mut queue = memory.device();
        queue.begin_burst();
        assert_eq!(flags(), 0);
        assert!(queue.pop().is_ok());
        assert_eq!(flags(), NO_NOTIFY);
        assert!(matches!(queue.pop(), Err(PopError::Empty)));
        assert!(!queue.end_burst());
        assert_eq!(flags(), 0);
    }
}

#[test]
fn an_area_that_cannot_be_a_ring() {
    for shape in shapes() {
        let memory = Memory::new(shape);
        let good = shape.config();
        let refused = |config| refused(Queue::new(memory.map.clone(), config));
        for size in [0, 3, 6, u16::MAX] {
            let reason = refused(QueueConfig { size, ..good });
            assert_eq!(reason, QueueError::Size { size: size.into(), max: 32768 });
        }
        for (config, address, align) in [
            (QueueConfig { descriptors: good.descriptors + 8, ..good }, good.descriptors + 8, 16),
            (QueueConfig { driver: good.driver + 1, ..good }, good.driver + 1, 2),
            (QueueConfig { device: good.device + 2, ..good }, good.device + 2, 4),
        ] {
            assert_eq!(refused(config), QueueError::Memory(MemoryError::Misaligned { address, align }));
        }
        for config in [
            QueueConfig { descriptors: HOLE, ..good },
            QueueConfig { driver: HOLE, ..good },
            QueueConfig { device: HOLE, ..good },
            QueueConfig { device: BUFFERS + SPACE - 16, ..good },
        ] {
            let reason = refused(config);
            assert!(matches!(reason, QueueError::Memory(MemoryError::NotMapped { .. })), "{reason}");
        }
        let wraps = refused(QueueConfig { descriptors: u64::MAX - 15, ..good });
        assert!(matches!(wraps, QueueError::Memory(_)), "{wraps}");
    }
}

#[test]
fn an_area_in_two_pieces_of_host_memory_is_refused() {
    let map = FlatMemory::new([(0, Pages::allocate(4096)), (4096, Pages::allocate(4096))]);
    let config = QueueConfig { size: SIZE, descriptors: 4096 - 64, driver: 0, device: 1024, ..QueueConfig::default() };
    let reason = refused(Queue::new(&map, config));
    assert!(matches!(reason, QueueError::Memory(MemoryError::Scattered { .. })), "{reason}");
}

#[test]
fn a_ring_may_end_with_memory_and_has_an_event_word_only_with_event_idx() {
    let map = FlatMemory::new([(0, Pages::allocate(4096))]);
    let without = |event_idx, device_end: u64, driver_end: u64| {
        let device = 4096 - 4 - 8 * u64::from(SIZE) - device_end;
        let driver = 4096 - 4 - 2 * u64::from(SIZE) - driver_end;
        Queue::new(&map, QueueConfig { size: SIZE, device, driver, event_idx, ..QueueConfig::default() }).map(|_| ())
    };
    assert_eq!(without(false, 0, 0), Ok(()));
    assert_eq!(without(true, 4, 2), Ok(()));
    for (device, driver) in [(0, 2), (4, 0)] {
        let reason = refused(without(true, device, driver));
        assert!(matches!(reason, QueueError::Memory(MemoryError::NotMapped { .. })), "{reason}");
    }
}
