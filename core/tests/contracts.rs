//! The driver's five operations and their contracts, and a device that breaks its own.

mod common;

use std::sync::Arc;

use common::{BUFFERS, Doorbell, Memory, RING, Rig, SPACE, SPLIT, Shape, TABLES, buffer, every_shape, popped};
use polyvirt_core::memory::{FlatMemory, Pages};
use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, NO_INTERRUPT, NO_NOTIFY, WRITE};
use polyvirt_core::queue::{AddError, Buffer, ByteOrder, DriverQueue, Layout, Queue, QueueError};

const SIZE: u16 = 4;

fn add(driver: &mut DriverQueue<u64, Doorbell>, token: u64) {
    driver.add_buf(&[buffer(token, 16)], &[], token).unwrap();
}

#[test]
fn adding_to_a_full_ring_kicks_even_if_the_device_asked_not_to_and_says_so() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        (0..4).for_each(|token| add(&mut rig.driver, token));
        rig.driver.kick().unwrap();
        let rung = rig.kicks.rung();
        // The device is serving, so it wants no kicks.
        rig.device.begin_burst();
        let chain = rig.device.pop().expect("a chain");
        match rig.driver.add_buf(&[buffer(4, 16)], &[], 44) {
            Err(AddError::Full(44)) => {}
            other => panic!("{other:?}, {shape:?}"),
        }
        assert_eq!(rig.kicks.rung(), rung + 1);
        rig.device.complete(chain).unwrap();
        assert_eq!(rig.driver.get_buf().unwrap(), Some((0, 0)));
        add(&mut rig.driver, 44);
    }
}

#[test]
fn the_kick_of_a_full_ring_publishes_what_was_added_before() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        (0..4).for_each(|token| add(&mut rig.driver, token));
        assert_eq!(rig.serve(), 0, "nothing is published yet");
        assert!(matches!(rig.driver.add_buf(&[buffer(4, 16)], &[], 4), Err(AddError::Full(4))));
        assert_eq!(rig.serve(), 4);
    }
}

#[test]
fn one_kick_publishes_many_buffers() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        (0..3).for_each(|token| add(&mut rig.driver, token));
        assert_eq!(rig.kicks.rung(), 0);
        assert_eq!(rig.serve(), 0, "nothing is published before the kick");
        assert!(rig.driver.kick().unwrap());
        assert_eq!(rig.kicks.rung(), 1);
        assert_eq!(rig.serve(), 3);
        assert!(!rig.driver.kick().unwrap(), "nothing was added");
        assert_eq!(rig.kicks.rung(), 1);
    }
}

#[test]
fn buffers_come_back_in_the_order_of_their_completion() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        for token in 0..4 {
            rig.driver.add_buf(&[], &[buffer(token, 16)], token).unwrap();
        }
        rig.driver.kick().unwrap();
        rig.device.begin_burst();
        let mut chains: Vec<_> = (0..4).map(|_| rig.device.pop().expect("a chain")).collect();
        assert_eq!(rig.driver.get_buf().unwrap(), None);
        for (which, token) in [(2, 2), (0, 0), (1, 3), (0, 1)] {
            let mut chain = chains.remove(which);
            chain.write(0, &vec![7; token as usize]).unwrap();
            rig.device.complete(chain).unwrap();
            assert_eq!(rig.driver.in_flight(), chains.len() + 1);
            assert_eq!(rig.driver.get_buf().unwrap(), Some((token, token as u32)));
        }
        assert_eq!((rig.driver.in_flight(), rig.driver.free()), (0, SIZE));
    }
}

#[test]
fn disabling_callbacks_is_a_hint_and_get_buf_works_on() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        rig.driver.disable_cb();
        for token in 0..10 {
            add(&mut rig.driver, token);
            rig.driver.kick().unwrap();
            assert_eq!(rig.serve(), 1);
            assert!(!rig.device.needs_interrupt(), "{shape:?}");
            assert_eq!(rig.driver.get_buf().unwrap(), Some((token, 0)));
            assert_eq!(rig.driver.get_buf().unwrap(), None);
        }
    }
}

#[test]
fn a_device_that_interrupts_although_callbacks_are_disabled_is_handled() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        add(&mut rig.driver, 1);
        rig.driver.kick().unwrap();
        rig.driver.disable_cb();
        // The interrupt handler of a driver is nothing but this.
        assert_eq!(rig.driver.get_buf().unwrap(), None);
        rig.serve();
        assert_eq!(rig.driver.get_buf().unwrap(), Some((1, 0)));
        assert_eq!(rig.driver.get_buf().unwrap(), None);
    }
}

#[test]
fn enabling_callbacks_returns_false_when_more_was_used_meanwhile() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        rig.driver.disable_cb();
        assert!(rig.driver.enable_cb(), "nothing was used");
        rig.driver.disable_cb();
        add(&mut rig.driver, 1);
        rig.driver.kick().unwrap();
        rig.serve();
        assert!(!rig.device.needs_interrupt(), "no interrupt will tell");
        assert!(!rig.driver.enable_cb(), "so this has to");
        assert_eq!(rig.driver.get_buf().unwrap(), Some((1, 0)));
        assert!(rig.driver.enable_cb());
    }
}

#[test]
fn once_enabled_callbacks_come_for_the_next_buffer() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        for token in 0..10 {
            rig.driver.disable_cb();
            add(&mut rig.driver, token);
            rig.driver.kick().unwrap();
            assert!(rig.driver.enable_cb());
            rig.serve();
            assert!(rig.device.needs_interrupt(), "{shape:?}");
            assert!(!rig.device.needs_interrupt(), "once is enough");
            assert_eq!(rig.driver.get_buf().unwrap(), Some((token, 0)));
        }
    }
}

#[test]
fn an_interrupt_is_not_lost_when_the_device_completes_whole_rounds_between_two_looks() {
    for size in [1, 2, SIZE] {
        for shape in every_shape(size) {
            let mut rig = Rig::new(shape);
            // Two rounds bring a packed ring back to where it was, 65,536 buffers a split one.
            let round = if shape.layout == Layout::Packed { 2 * u64::from(size) } else { 1 << 16 };
            for token in 1..=round {
                if token == round {
                    assert_eq!(rig.driver.get_buf().unwrap(), None, "the driver is about to sleep");
                }
                add(&mut rig.driver, token);
                rig.driver.kick().unwrap();
                assert_eq!(rig.serve(), 1);
                if token < round {
                    assert_eq!(rig.driver.get_buf().unwrap(), Some((token, 0)));
                }
            }
            assert!(rig.device.needs_interrupt(), "{shape:?}");
        }
    }
}

#[test]
fn the_device_is_notified_by_the_flag_or_when_the_event_index_is_passed() {
    for layout in SPLIT {
        let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout });
        let kicks = Doorbell::default();
        let mut driver = memory.driver(kicks.clone());
        let used = memory.shape.config().device;
        memory.put16(used, NO_NOTIFY);
        // What would be the event index has no meaning.
        add(&mut driver, 0);
        assert!(!driver.kick().unwrap());
        memory.put16(used, 0);
        add(&mut driver, 1);
        assert!(driver.kick().unwrap());
        assert_eq!(kicks.rung(), 1);

        let memory = Memory::new(Shape { event_idx: true, ..memory.shape });
        let mut driver = memory.driver(kicks.clone());
        let event = used + 4 + 8 * u64::from(SIZE);
        memory.put16(event, 1);
        // The lower bit of flags is ignored.
        memory.put16(used, NO_NOTIFY);
        let mut kick = |token| {
            add(&mut driver, token);
            driver.kick().unwrap()
        };
        assert_eq!([kick(0), kick(1), kick(2)], [false, true, false]);
    }
}

#[test]
fn the_event_index_works_across_the_wrap_of_indices() {
    for layout in SPLIT {
        let mut rig = Rig::new(Shape { size: SIZE, event_idx: true, indirect: false, in_order: false, layout });
        for token in 0..70_000 {
            add(&mut rig.driver, token);
            assert!(rig.driver.kick().unwrap(), "the device sleeps");
            assert_eq!(rig.driver.get_buf().unwrap(), None, "the driver is about to sleep");
            assert_eq!(rig.serve(), 1);
            assert!(rig.device.needs_interrupt(), "the driver sleeps");
            assert_eq!(rig.driver.get_buf().unwrap(), Some((token, 0)));
        }
        assert_eq!(rig.kicks.rung(), 70_000);
    }
}

#[test]
fn without_event_idx_the_flag_tells_whether_callbacks_are_wanted() {
    for layout in SPLIT {
        let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout });
        let mut driver: DriverQueue<u64, _> = memory.driver(Doorbell::default());
        let flags = || memory.get16(memory.shape.config().driver);
        assert_eq!(flags(), 0);
        driver.disable_cb();
        assert_eq!(flags(), NO_INTERRUPT);
        assert!(driver.enable_cb());
        assert_eq!(flags(), 0);
        let memory = Memory::new(Shape { event_idx: true, ..memory.shape });
        let mut driver: DriverQueue<u64, _> = memory.driver(Doorbell::default());
        driver.disable_cb();
        assert_eq!(memory.get16(memory.shape.config().driver), 0, "with EVENT_IDX flags stay 0");
    }
}

#[test]
fn a_buffer_has_between_one_piece_and_as_many_as_the_queue() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        for count in [0, usize::from(SIZE) + 1] {
            let pieces = vec![buffer(0, 16); count];
            match rig.driver.add_buf(&pieces, &[], 9) {
                Err(AddError::Pieces { token: 9, pieces, size: SIZE }) => assert_eq!(pieces, count),
                other => panic!("{other:?}"),
            }
        }
        rig.driver.add_buf(&[buffer(0, 16); 2], &[buffer(1, 16); 2], 1).unwrap();
        assert_eq!(rig.driver.free(), 0);
        rig.driver.kick().unwrap();
        rig.device.begin_burst();
        let chain = rig.device.pop().expect("a chain");
        assert_eq!((chain.readable_len(), chain.writable_len()), (32, 32));
    }
}

#[test]
fn the_bytes_of_descriptors_and_rings_are_those_of_the_spec() {
    let memory = Memory::new(Shape {
        size: SIZE,
        event_idx: false,
        indirect: false,
        in_order: false,
        layout: Layout::Legacy(ByteOrder::Big),
    });
    let mut driver = memory.driver(Doorbell::default());
    driver
        .add_buf(&[Buffer { address: 0x0102_0304_0506_0708, len: 0x0a0b }], &[Buffer { address: 9, len: 1 }], ())
        .unwrap();
    driver.kick().unwrap();
    assert_eq!(memory.read(RING), [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 10, 11, 0, NEXT as u8, 0, 1]);
    assert_eq!(memory.read::<14>(RING + 16), [0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 1, 0, WRITE as u8]);
    assert_eq!(memory.read(memory.shape.config().driver), [0, 0, 0, 1, 0, 0]);

    let memory = Memory::new(Shape { layout: Layout::Modern, ..memory.shape });
    let mut driver = memory.driver(Doorbell::default());
    driver.add_buf(&[Buffer { address: 0x0102_0304_0506_0708, len: 0x0a0b }], &[], ()).unwrap();
    driver.kick().unwrap();
    assert_eq!(memory.read::<14>(RING), [8, 7, 6, 5, 4, 3, 2, 1, 11, 10, 0, 0, 0, 0]);
    assert_eq!(memory.read(memory.shape.config().driver), [0, 0, 1, 0, 0, 0]);
}

#[test]
fn an_indirect_buffer_takes_one_entry_and_its_table_holds_the_pieces() {
    for layout in SPLIT {
        let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect: true, in_order: false, layout });
        let mut driver = memory.driver(Doorbell::default());
        let mut device = memory.device();
        for token in 0..u64::from(SIZE) {
            driver.add_buf(&[buffer(0, 16), buffer(1, 16)], &[buffer(2, 16)], token).unwrap();
        }
        assert_eq!(driver.free(), 0);
        driver.kick().unwrap();
        assert_eq!(memory.get16(RING + 12), INDIRECT);
        assert_eq!(memory.get16(TABLES + 12), NEXT);
        assert_eq!(memory.get16(TABLES + 16 + 14), 2, "next");
        assert_eq!(memory.get16(TABLES + 32 + 12), WRITE);
        while let Some(chain) = popped(device.pop()) {
            assert_eq!((chain.readable_len(), chain.writable_len()), (32, 16));
            device.complete(chain).unwrap();
        }
        for token in 0..u64::from(SIZE) {
            assert_eq!(driver.get_buf().unwrap(), Some((token, 0)));
        }
    }
}

#[test]
fn a_buffer_of_one_piece_or_without_the_feature_uses_no_table() {
    for layout in SPLIT {
        let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect: true, in_order: false, layout });
        let mut driver = memory.driver(Doorbell::default());
        driver.add_buf(&[buffer(0, 16)], &[], ()).unwrap();
        assert_eq!(memory.get16(RING + 12), 0);
        let memory = Memory::new(Shape { indirect: false, ..memory.shape });
        let mut driver = memory.driver(Doorbell::default());
        driver.add_buf(&[buffer(0, 16), buffer(1, 16)], &[], ()).unwrap();
        assert_eq!(memory.get16(RING + 12), NEXT);
        assert_eq!(driver.free(), SIZE - 2);
    }
}

#[test]
fn a_buffer_that_fits_no_table_is_chained_in_the_ring() {
    let memory =
        Memory::new(Shape { size: SIZE, event_idx: false, indirect: true, in_order: false, layout: Layout::Modern });
    // Two entries for each of four tables.
    let tables = Pages::allocate(4096).slice(0, 16 * 2 * 4).unwrap();
    let mut driver = DriverQueue::new(memory.virtqueue(Doorbell::default())).unwrap().with_indirect(tables, TABLES);
    driver.add_buf(&[buffer(0, 16); 3], &[], 1).unwrap();
    assert_eq!(driver.free(), 1);
    driver.add_buf(&[buffer(0, 16); 2], &[], 2).unwrap();
    assert_eq!(driver.free(), 0);
}

/// On every split layout: `spoil` writes the used ring of a driver with one buffer (token 7, 16 writable bytes, head 0)
/// in flight. It gives `reason`, the driver is broken, and the buffer is not lost.
fn device_caught(spoil: impl Fn(&Memory), reason: QueueError) {
    device_caught_on(&SPLIT, spoil, reason);
}

fn device_caught_on(layouts: &[Layout], spoil: impl Fn(&Memory), reason: QueueError) {
    for &layout in layouts {
        let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout });
        let kicks = Doorbell::default();
        let mut driver = memory.driver(kicks.clone());
        driver.add_buf(&[], &[buffer(0, 16)], 7).unwrap();
        driver.kick().unwrap();
        driver.add_buf(&[], &[buffer(1, 16)], 8).unwrap();
        spoil(&memory);
        let rung = kicks.rung();
        let ring: [u8; 16] = memory.read(memory.shape.config().driver);
        assert_eq!(driver.get_buf(), Err(reason));
        assert_eq!(driver.get_buf(), Err(reason), "broken");
        assert!(matches!(driver.add_buf(&[], &[buffer(2, 16)], 9), Err(AddError::Broken(why)) if why == reason));
        assert!(!driver.kick().unwrap());
        driver.disable_cb();
        assert!(!driver.enable_cb(), "the caller looks again and sees the reason");
        assert_eq!(memory.read::<16>(memory.shape.config().driver), ring, "a broken queue is left alone");
        assert_eq!(kicks.rung(), rung);
        assert_eq!(driver.drain(), [7, 8]);
        assert_eq!((driver.in_flight(), driver.free()), (0, SIZE));
    }
}

#[test]
fn a_used_id_that_is_not_in_flight() {
    for id in [1 << 16, u32::MAX, SIZE.into(), 2] {
        device_caught(|memory| memory.used(0, id, 0, 1), QueueError::UsedId { id });
    }
}

#[test]
fn a_used_length_beyond_the_buffer() {
    for len in [17, u32::MAX] {
        let reason = QueueError::UsedLength { len, writable: 16 };
        device_caught_on(&[Layout::Modern], |memory| memory.used(0, 0, len, 1), reason);
    }
}

#[test]
fn a_used_length_of_a_legacy_device_counts_as_far_as_the_buffer_has_room() {
    for order in [ByteOrder::Little, ByteOrder::Big] {
        let layout = Layout::Legacy(order);
        let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout });
        let mut driver = memory.driver(Doorbell::default());
        // What is readable is counted, too; or what there never was; or nothing at all.
        for (index, (len, counts)) in
            [(32, 16), (17, 16), (u32::MAX, 16), (16, 16), (3, 3), (0, 0)].into_iter().enumerate()
        {
            driver.add_buf(&[buffer(0, 16)], &[buffer(1, 16)], 7).unwrap();
            driver.kick().unwrap();
            memory.used(index as u16 % SIZE, 0, len, index as u16 + 1);
            assert_eq!(driver.get_buf(), Ok(Some((7, counts))), "{len}, {order:?}");
        }
        driver.add_buf(&[buffer(0, 16)], &[], 8).unwrap();
        driver.kick().unwrap();
        memory.used(6 % SIZE, 0, 16, 7);
        assert_eq!(driver.get_buf(), Ok(Some((8, 0))), "nothing is writable");
        driver.add_buf(&[], &[buffer(0, 16)], 9).unwrap();
        driver.restart(memory.virtqueue(Doorbell::default())).unwrap();
        driver.kick().unwrap();
        memory.used(0, 0, 99, 1);
        assert_eq!(driver.get_buf(), Ok(Some((9, 16))), "after a restart as well");
    }
}

#[test]
fn a_buffer_that_is_returned_twice() {
    for layout in SPLIT {
        let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout });
        let mut driver = memory.driver(Doorbell::default());
        driver.add_buf(&[], &[buffer(0, 16)], 7).unwrap();
        driver.kick().unwrap();
        memory.used(0, 0, 16, 1);
        memory.used(1, 0, 16, 2);
        assert_eq!(driver.get_buf(), Ok(Some((7, 16))));
        assert_eq!(driver.get_buf(), Err(QueueError::UsedId { id: 0 }));
    }
}

#[test]
fn what_the_device_writes_into_descriptors_is_never_read_back() {
    for layout in SPLIT {
        let memory = Memory::new(Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout });
        let mut driver = memory.driver(Doorbell::default());
        for round in 0..20u16 {
            driver.add_buf(&[buffer(0, 16)], &[buffer(1, 16), buffer(2, 16)], round).unwrap();
            driver.kick().unwrap();
            let slot = round % SIZE;
            let head = memory.get16(memory.shape.config().driver + 4 + 2 * u64::from(slot));
            memory.write(RING, &[0xff; 16 * SIZE as usize]);
            memory.used(slot, head.into(), 32, round + 1);
            assert_eq!(driver.get_buf(), Ok(Some((round, 32))));
            assert_eq!(driver.free(), SIZE);
        }
    }
}

/// What a device finds available: readable and writable bytes, and the first readable byte.
fn requests(device: &mut Queue<Arc<FlatMemory>>) -> Vec<(u32, u32, u8)> {
    device.begin_burst();
    let mut requests = Vec::new();
    while let Some(chain) = popped(device.pop()) {
        let mut first = [0];
        chain.read(0, &mut first).unwrap();
        requests.push((chain.readable_len(), chain.writable_len(), first[0]));
    }
    device.end_burst();
    requests
}

#[test]
fn a_restart_publishes_what_was_in_flight_again_in_its_old_order() {
    for shape in every_shape(8).flat_map(|shape| [false, true].map(|indirect| Shape { indirect, ..shape })) {
        let mut rig = Rig::new(shape);
        for token in 0..8 {
            rig.memory.write(BUFFERS + 16 * token, &[token as u8]);
        }
        // Heads that were used by a buffer of another shape before, and come in another order.
        for token in 0..3 {
            rig.driver.add_buf(&[buffer(token, 16)], &[buffer(token, 16)], token).unwrap();
        }
        rig.driver.kick().unwrap();
        rig.device.begin_burst();
        let mut chains: Vec<_> = (0..3).map(|_| rig.device.pop().expect("a chain")).collect();
        for which in [1, 1, 0] {
            rig.device.complete(chains.remove(which)).unwrap();
            rig.driver.get_buf().unwrap().expect("a buffer");
        }
        rig.driver.add_buf(&[buffer(3, 16)], &[], 3).unwrap();
        rig.driver.add_buf(&[buffer(4, 16)], &[buffer(7, 16)], 4).unwrap();
        rig.driver.kick().unwrap();
        rig.driver.add_buf(&[buffer(5, 16), buffer(6, 8)], &[], 5).unwrap();

        let fresh = Memory::new(shape);
        for token in 0..8 {
            fresh.write(BUFFERS + 16 * token, &[token as u8]);
        }
        rig.driver.restart(fresh.virtqueue(Doorbell::default())).unwrap();
        assert_eq!(rig.driver.in_flight(), 3);
        let mut device = fresh.device();
        assert_eq!(requests(&mut device), [], "the caller kicks");
        assert!(rig.driver.kick().unwrap());
        // Indirect tables stay where they were.
        let tables: [u8; SPACE as usize] = rig.memory.read(TABLES);
        fresh.write(TABLES, &tables);
        assert_eq!(requests(&mut device), [(16, 0, 3), (16, 16, 4), (24, 0, 5)], "{shape:?}");
        assert_eq!(rig.driver.drain(), [3, 4, 5]);
    }
}

#[test]
fn a_restart_on_a_ring_that_cannot_hold_the_buffers_changes_nothing() {
    let shape = Shape { size: SIZE, event_idx: false, indirect: true, in_order: false, layout: Layout::Modern };
    let mut rig = Rig::new(shape);
    rig.driver.add_buf(&[buffer(0, 16); 2], &[], 1).unwrap();
    let restart = |driver: &mut DriverQueue<u64, Doorbell>, shape| {
        driver.restart(Memory::new(shape).virtqueue(Doorbell::default()))
    };
    let smaller = restart(&mut rig.driver, Shape { size: 2, ..shape });
    assert_eq!(smaller, Err(QueueError::Size { size: 2, max: SIZE }));
    let direct = restart(&mut rig.driver, Shape { indirect: false, ..shape });
    assert_eq!(direct, Err(QueueError::IndirectNotNegotiated { head: 0 }));
    rig.driver.kick().unwrap();
    assert_eq!(rig.serve(), 1, "the old ring works on");
    assert_eq!(rig.driver.get_buf().unwrap(), Some((1, 0)));
    // With nothing indirect in flight the feature may go.
    restart(&mut rig.driver, Shape { indirect: false, ..shape }).unwrap();
    rig.driver.add_buf(&[buffer(0, 16); 2], &[], 2).unwrap();
    assert_eq!(rig.driver.free(), SIZE - 2);
}

#[test]
fn a_broken_driver_works_again_after_a_restart() {
    let shape = Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout: Layout::Modern };
    let mut rig = Rig::new(shape);
    rig.driver.add_buf(&[buffer(0, 16)], &[], 1).unwrap();
    rig.driver.kick().unwrap();
    rig.memory.used(0, 99, 0, 1);
    assert_eq!(rig.driver.get_buf(), Err(QueueError::UsedId { id: 99 }));
    rig.driver.restart(rig.memory.virtqueue(rig.kicks.clone())).unwrap();
    rig.device = rig.memory.device();
    assert!(rig.driver.kick().unwrap());
    assert_eq!(rig.serve(), 1);
    assert_eq!(rig.driver.get_buf(), Ok(Some((1, 0))));
}
