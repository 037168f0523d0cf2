//! A queue that is left and gone on with, and states that no queue can be in.

mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use common::{BUFFERS, Memory, Rig, Shape, broken, every_shape, popped};
use polyvirt_core::memory::{Faulty, Pending};
use polyvirt_core::queue::{Blocked, Buffer, Layout, PopError, Queue, QueueError, QueueState, SavedQueue};

const SIZE: u16 = 8;

/// Adds `count` buffers and kicks.
fn add(rig: &mut Rig, count: u64) {
    for token in 0..count {
        rig.driver.add_buf(&[], &[Buffer { address: BUFFERS + 16 * token, len: 16 }], token).unwrap();
    }
    rig.driver.kick().unwrap();
}

fn restored(
    rig: &Rig,
    saved: &SavedQueue,
) -> Result<Queue<std::sync::Arc<polyvirt_core::memory::FlatMemory>>, Blocked> {
    Queue::restore(rig.memory.map.clone(), rig.memory.shape.config(), saved)
}

#[test]
fn what_was_in_flight_is_taken_again_and_comes_back_once() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        add(&mut rig, 5);
        rig.device.begin_burst();
        let taken: Vec<_> = (0..3).map(|_| rig.device.pop().unwrap()).collect();
        let heads: Vec<_> = taken.iter().map(|chain| chain.head()).collect();
        let saved = rig.device.save().unwrap();
        let mut device = restored(&rig, &saved).unwrap();
        for chain in taken {
            let stale = QueueError::Stale { head: chain.head() };
            assert_eq!(device.complete(chain), Err(stale), "a chain of before does not belong here");
        }
        device.begin_burst();
        let mut again = Vec::new();
        while let Some(chain) = popped(device.pop()) {
            again.push(chain.head());
            device.complete(chain).unwrap();
        }
        assert_eq!(again[..3], heads);
        let mut back = Vec::new();
        while let Some((token, _)) = rig.driver.get_buf().unwrap() {
            back.push(token);
        }
        assert_eq!(back, [0, 1, 2, 3, 4]);
    }
}

#[test]
fn a_queue_that_is_saved_before_it_took_everything_again_still_knows_all() {
    let mut rig =
        Rig::new(Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout: Layout::Modern });
    add(&mut rig, 4);
    rig.device.begin_burst();
    let _taken: Vec<_> = (0..4).map(|_| rig.device.pop().unwrap()).collect();
    let mut device = restored(&rig, &rig.device.save().unwrap()).unwrap();
    device.begin_burst();
    let first = device.pop().unwrap();
    device.complete(first).unwrap();
    let saved = device.save().unwrap();
    assert_eq!((saved.state, saved.in_flight.as_slice()), (QueueState { available: 4, used: 1 }, &[1, 2, 3][..]));
}

#[test]
fn a_packed_ring_cannot_be_saved_while_descriptors_in_flight_are_overwritten() {
    let mut rig =
        Rig::new(Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout: Layout::Packed });
    add(&mut rig, 3);
    rig.device.begin_burst();
    let mut taken: Vec<_> = (0..3).map(|_| rig.device.pop().unwrap()).collect();
    rig.device.complete(taken.remove(1)).unwrap();
    assert_eq!(rig.device.save(), Err(QueueError::Overwritten));
    for chain in taken {
        rig.device.complete(chain).unwrap();
    }
    let at = 0x8003;
    assert_eq!(rig.device.save(), Ok(SavedQueue { state: QueueState { available: at, used: at }, in_flight: vec![] }));
}

#[test]
fn states_that_no_queue_can_be_in_are_refused() {
    let saved = |available, used, in_flight: &[u16]| SavedQueue {
        state: QueueState { available, used },
        in_flight: in_flight.to_vec(),
    };
    for shape in every_shape(SIZE) {
        let memory = Memory::new(shape);
        let refused = |saved: &SavedQueue| common::refused(Queue::restore(memory.map.clone(), shape.config(), saved));
        let state = |available, used, in_flight| QueueError::State { in_flight, available, used, size: SIZE };
        let cases = match shape.layout {
            Layout::Packed => vec![
                (saved(8, 8, &[]), QueueError::Index { index: 8, size: 8 }),
                (saved(0xffff, 0xffff, &[]), QueueError::Index { index: 0x7fff, size: 8 }),
                (saved(0x8001, 0x8000, &[]), state(0x8001, 0x8000, 0)),
                (saved(0x8000, 0x8000, &[1]), state(0x8000, 0x8000, 1)),
            ],
            _ => vec![
                (saved(1, 0, &[]), state(1, 0, 0)),
                (saved(0, 0, &[1]), state(0, 0, 1)),
                (saved(0, 1, &[]), state(0, 1, 0)),
                (saved(9, 0, &[0, 1, 2, 3, 4, 5, 6, 7, 0]), state(9, 0, 9)),
                (saved(1, 0, &[8]), QueueError::Index { index: 8, size: 8 }),
                (saved(1, 0, &[0xffff]), QueueError::Index { index: 0xffff, size: 8 }),
                (saved(2, 0, &[3, 3]), QueueError::InFlight { head: 3 }),
            ],
        };
        for (saved, reason) in cases {
            assert_eq!(refused(&saved), reason, "{saved:?} on {shape:?}");
        }
    }
}

#[test]
fn what_a_restored_head_leads_to_is_checked_like_any_other() {
    let shape = Shape { size: SIZE, event_idx: false, indirect: false, in_order: false, layout: Layout::Modern };
    let memory = Memory::new(shape);
    memory.descriptor(2, BUFFERS, 16, polyvirt_core::queue::split::layout::NEXT, 2);
    let saved = SavedQueue { state: QueueState { available: 1, used: 0 }, in_flight: vec![2] };
    let mut device = Queue::restore(memory.map.clone(), shape.config(), &saved).unwrap();
    device.begin_burst();
    let reason = QueueError::TooManyDescriptors { head: 2, limit: 8 };
    assert_eq!(broken(device.pop()), Some(reason));
    assert_eq!(device.broken(), Some(reason));
}

#[test]
fn a_chain_whose_memory_is_not_known_yet_is_taken_once_it_is() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        add(&mut rig, 3);
        let known = Arc::new(AtomicBool::new(false));
        let judge = {
            let known = known.clone();
            move |address, len, _| match address == BUFFERS + 16 && !known.load(Relaxed) {
                true => Err(Pending { address, len }.into()),
                false => Ok(()),
            }
        };
        let memory = Faulty::new(rig.memory.map.clone(), Arc::new(judge));
        let mut device = Queue::new(memory, rig.memory.shape.config()).unwrap();
        for _ in 0..3 {
            device.begin_burst();
            while let Some(chain) = popped(device.pop()) {
                device.complete(chain).unwrap();
            }
            assert!(!device.end_burst(), "there is nothing to do until it is known");
            assert_eq!((device.broken(), device.in_flight()), (None, 0));
        }
        assert_eq!(device.state().available, device.state().used, "what was put off was not taken");
        known.store(true, Relaxed);
        device.begin_burst();
        while let Some(chain) = popped(device.pop()) {
            device.complete(chain).unwrap();
        }
        let mut back = Vec::new();
        while let Some((token, _)) = rig.driver.get_buf().unwrap() {
            back.push(token);
        }
        assert_eq!(back, [0, 1, 2]);
    }
}

#[test]
fn a_chain_that_is_put_back_is_taken_again_before_any_other() {
    for shape in every_shape(SIZE).flat_map(|shape| [false, true].map(|in_order| Shape { in_order, ..shape })) {
        let mut rig = Rig::new(shape);
        // More than a round, so that the place of a chain wraps.
        for round in 0..5 {
            add(&mut rig, 3);
            let mut taken = Vec::new();
            rig.device.begin_burst();
            for times in [0, 1, 3] {
                for _ in 0..times {
                    let chain = rig.device.pop().expect("a chain");
                    rig.device.put_back(chain).unwrap();
                    // Nothing of the driver's is kept: held, the queue could be left here, and gone on with elsewhere.
                    assert_eq!(rig.device.in_flight(), 0, "{shape:?}");
                    assert!(rig.device.is_idle());
                    let state = rig.device.state();
                    assert_eq!(state.available, state.used, "{shape:?}");
                    assert!(!rig.device.end_burst(), "it knows itself when to look again");
                    rig.device.begin_burst();
                }
                let chain = rig.device.pop().expect("a chain");
                taken.push(chain.writable()[0].as_ptr().addr());
                rig.device.complete(chain).unwrap();
            }
            assert!(taken.is_sorted(), "{shape:?}: each once, in their order: {taken:x?}");
            for token in 0..3 {
                assert_eq!(rig.driver.get_buf().unwrap().map(|(token, _)| token), Some(token), "{shape:?}, {round}");
            }
            assert!(matches!(rig.device.pop(), Err(PopError::Empty)));
            rig.device.end_burst();
        }
        // One of another run is refused.
        add(&mut rig, 1);
        rig.device.begin_burst();
        let chain = rig.device.pop().expect("a chain");
        let stale = QueueError::Stale { head: chain.head() };
        assert_eq!(rig.memory.device().put_back(chain), Err(stale));
    }
}

#[test]
fn a_chain_that_is_put_back_is_the_next_of_the_same_burst_too() {
    for shape in every_shape(SIZE).flat_map(|shape| [false, true].map(|in_order| Shape { in_order, ..shape })) {
        let mut rig = Rig::new(shape);
        add(&mut rig, 3);
        rig.device.begin_burst();
        let chain = rig.device.pop().unwrap();
        let head = chain.head();
        rig.device.put_back(chain).unwrap();
        let mut taken = Vec::new();
        while let Some(chain) = popped(rig.device.pop()) {
            taken.push(chain.writable()[0].as_ptr().addr());
            assert!(taken.len() > 1 || chain.head() == head, "{shape:?}");
            rig.device.complete(chain).unwrap();
        }
        assert!(taken.len() == 3 && taken.is_sorted(), "{shape:?}: {taken:x?}");
    }
}
