//! Who observes a queue hears of every chain when it is taken, before it is used and afterwards, and of nothing else.

mod common;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use common::{BUFFERS, Memory, Rig, Shape, buffer, every_shape};
use polyvirt_core::memory::{Faulty, Pending};
use polyvirt_core::queue::packed::layout::Position;
use polyvirt_core::queue::{Layout, Observer, PopError, Queue, QueueError, Taken};

const SIZE: u16 = 8;

/// What an observer was told, and whether the driver could see the chain then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Taken(u16),
    Using(u16, bool),
    Used(u16, bool),
}

/// Tells from the ring how many chains are used.
type Count = Box<dyn Fn() -> u16 + Send>;

struct Notes {
    told: Arc<Mutex<Vec<Told>>>,
    /// Of the chains that were taken: where they are.
    places: Arc<Mutex<Vec<(Position, u16)>>>,
    count: Count,
    before: u16,
}

impl Observer for Notes {
    fn taken(&mut self, Taken { head, start, entries }: Taken) {
        self.told.lock().unwrap().push(Told::Taken(head));
        self.places.lock().unwrap().push((start, entries));
    }
    fn using(&mut self, head: u16) {
        self.before = (self.count)();
        self.told.lock().unwrap().push(Told::Using(head, false));
    }
    fn used(&mut self, head: u16) {
        let seen = (self.count)() == self.before.wrapping_add(1);
        self.told.lock().unwrap().push(Told::Used(head, seen));
    }
}

struct Ears(Arc<Mutex<Vec<Told>>>, Arc<Mutex<Vec<(Position, u16)>>>);

impl Ears {
    fn take(&self) -> Vec<Told> {
        self.1.lock().unwrap().clear();
        self.0.lock().unwrap().drain(..).collect()
    }
}

/// How many chains of one descriptor each are used, as the driver sees it in its first round.
fn used(memory: &Memory) -> Count {
    let config = memory.shape.config();
    let map = memory.map.clone();
    let read = move |address| {
        let mut bytes = [0; 2];
        map.pages(address, 2).unwrap().read(0, &mut bytes).unwrap();
        bytes
    };
    match memory.shape.layout {
        Layout::Packed => Box::new(move || {
            let flags = |index: u64| u16::from_le_bytes(read(config.descriptors + 16 * index + 14));
            (0..u64::from(SIZE)).filter(|index| Position::START.is_used(flags(*index))).count() as u16
        }),
        Layout::Legacy(polyvirt_core::queue::ByteOrder::Big) => {
            Box::new(move || u16::from_be_bytes(read(config.device + 2)))
        }
        _ => Box::new(move || u16::from_le_bytes(read(config.device + 2))),
    }
}

fn observe<M: polyvirt_core::memory::GuestMemory>(queue: &mut Queue<M>, memory: &Memory) -> Ears {
    let (told, places) = (Arc::default(), Arc::default());
    let ears = Ears(Arc::clone(&told), Arc::clone(&places));
    queue.observe(Box::new(Notes { told, places, count: used(memory), before: 0 }));
    ears
}

fn add(rig: &mut Rig, count: u64) {
    for token in 0..count {
        rig.driver.add_buf(&[], &[buffer(token, 16)], token).unwrap();
    }
    rig.driver.kick().unwrap();
}

/// Every shape, with chains used in order and as they come.
fn shapes() -> impl Iterator<Item = Shape> {
    every_shape(SIZE).flat_map(|shape| [false, true].map(|in_order| Shape { in_order, ..shape }))
}

#[test]
fn each_chain_is_told_of_when_it_is_taken_before_the_driver_sees_it_used_and_afterwards() {
    for shape in shapes() {
        let mut rig = Rig::new(shape);
        let ears = observe(&mut rig.device, &rig.memory);
        add(&mut rig, 3);
        assert_eq!(ears.take(), [], "nothing is taken yet");
        rig.device.begin_burst();
        let mut chains: Vec<_> = (0..3).map(|_| rig.device.pop().unwrap()).collect();
        let heads: Vec<_> = chains.iter().map(|chain| chain.head()).collect();
        if shape.layout == Layout::Packed {
            let place = |index| (Position::START.advanced(index, SIZE), 1);
            assert_eq!(*ears.1.lock().unwrap(), [0, 1, 2].map(place));
        }
        assert_eq!(ears.take(), heads.iter().map(|head| Told::Taken(*head)).collect::<Vec<_>>());
        // The newest first.
        let mut expected: Vec<_> =
            heads.iter().flat_map(|&head| [Told::Using(head, false), Told::Used(head, true)]).collect();
        if !shape.in_order {
            expected = expected.chunks(2).rev().flatten().copied().collect();
        }
        while let Some(chain) = chains.pop() {
            if shape.in_order && !chains.is_empty() {
                rig.device.complete(chain).unwrap();
                assert_eq!(ears.0.lock().unwrap().len(), 0, "it waits for those before");
                continue;
            }
            rig.device.complete(chain).unwrap();
        }
        assert_eq!(ears.take(), expected, "{shape:?}");
    }
}

#[test]
fn what_is_put_back_or_was_in_flight_before_is_taken_again() {
    for shape in shapes() {
        let mut rig = Rig::new(shape);
        let ears = observe(&mut rig.device, &rig.memory);
        add(&mut rig, 2);
        rig.device.begin_burst();
        let first = rig.device.pop().unwrap();
        let head = first.head();
        rig.device.put_back(first).unwrap();
        let again = rig.device.pop().unwrap();
        assert_eq!(ears.take(), [Told::Taken(head), Told::Taken(head)], "{shape:?}");
        let saved = rig.device.save().unwrap();
        drop(again);
        let mut restored = Queue::restore(rig.memory.map.clone(), shape.config(), &saved).unwrap();
        let ears = observe(&mut restored, &rig.memory);
        restored.begin_burst();
        assert_eq!(restored.pop().unwrap().head(), head);
        assert_eq!(ears.take(), [Told::Taken(head)], "{shape:?}");
    }
}

#[test]
fn what_is_pending_or_breaks_the_queue_or_is_of_another_is_not_told_of() {
    for shape in shapes() {
        let mut rig = Rig::new(shape);
        let known = Arc::new(AtomicBool::new(false));
        let judge = {
            let known = known.clone();
            move |address, len, _| match address >= BUFFERS && !known.load(Relaxed) {
                true => Err(Pending { address, len }.into()),
                false => Ok(()),
            }
        };
        let memory = Faulty::new(rig.memory.map.clone(), Arc::new(judge));
        let mut device = Queue::new(memory, shape.config()).unwrap();
        let ears = observe(&mut device, &rig.memory);
        add(&mut rig, 2);
        for _ in 0..2 {
            device.begin_burst();
            assert!(matches!(device.pop(), Err(PopError::Pending(_))));
        }
        assert_eq!(ears.take(), [], "{shape:?}");
        known.store(true, Relaxed);
        device.begin_burst();
        let chain = device.pop().unwrap();
        assert_eq!(ears.take(), [Told::Taken(chain.head())]);
        // Of another queue.
        let other = rig.device.pop().unwrap();
        assert!(matches!(device.complete(other), Err(QueueError::Stale { .. })));
        device.fail(QueueError::Request { head: 0, reason: "none" });
        assert!(device.complete(chain).is_err());
        assert!(device.pop().is_err());
        assert_eq!(ears.take(), [], "{shape:?}: a broken queue uses nothing");
    }
}
