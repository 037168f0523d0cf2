//! Memory that is not there yet: a queue that waits for it is neither idle nor broken, and goes on once it came.

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::Waker;

use common::{BUFFERS, Memory, Rig, Shape, buffer, every_shape, popped};
use polyvirt_core::device::{Device, Queues};
use polyvirt_core::hypervisor::{Cause, Interrupt};
use polyvirt_core::memory::{Access, Faulty, FlatMemory, GuestMemory, MemoryError, Pending, ResolveError};
use polyvirt_core::queue::{Blocked, Layout, PopError, Queue, QueueConfig, QueueError};
use polyvirt_core::state::{Area, Interface, VirtioDevice};
use polyvirt_core::{Features, Status};

const SIZE: u16 = 8;

type Slow = Faulty<Arc<FlatMemory>>;

/// Memory of which the page at `at` is there once `known` says so.
fn slow(map: &Arc<FlatMemory>, at: u64, known: &Arc<AtomicBool>) -> Slow {
    let known = known.clone();
    let judge = move |address, len, _: Access| match (at..at + 0x1000).contains(&address) && !known.load(Relaxed) {
        true => Err(Pending { address, len }.into()),
        false => Ok(()),
    };
    Faulty::new(map.clone(), Arc::new(judge))
}

#[test]
fn no_chain_is_told_from_the_end_of_a_burst_from_memory_on_its_way_and_from_a_fault() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        let known = Arc::new(AtomicBool::new(false));
        let mut device = Queue::new(slow(&rig.memory.map, BUFFERS, &known), shape.config()).unwrap();
        let why = |device: &mut Queue<Slow>| device.pop().map(drop).unwrap_err();
        assert_eq!(why(&mut device), PopError::Empty);
        assert_eq!(device.pending(), None);

        rig.driver.add_buf(&[buffer(0, 16)], &[], 0).unwrap();
        rig.driver.kick().unwrap();
        let pending = Pending { address: BUFFERS, len: 16 };
        for _ in 0..2 {
            device.begin_burst();
            for _ in 0..2 {
                assert_eq!(why(&mut device), PopError::Pending(pending), "{shape:?}");
                assert_eq!((device.pending(), device.broken(), device.in_flight()), (Some(pending), None, 0));
            }
            assert!(!device.end_burst(), "there is nothing to do until it came");
        }
        assert_eq!(device.pending(), Some(pending), "it waits between bursts, too");
        device.hold();
        device.begin_burst();
        assert_eq!(why(&mut device), PopError::Spent, "held");
        device.release();

        known.store(true, Relaxed);
        device.begin_burst();
        let chain = device.pop().unwrap();
        assert_eq!(device.pending(), None);
        device.complete(chain).unwrap();
        assert_eq!(why(&mut device), PopError::Empty);

        for token in 1..=SIZE.into() {
            rig.driver.get_buf().unwrap();
            rig.driver.add_buf(&[buffer(0, 16)], &[], token).unwrap();
        }
        rig.driver.kick().unwrap();
        device.begin_burst();
        while let Some(chain) = popped(device.pop()) {
            device.complete(chain).unwrap();
        }
        assert_eq!(why(&mut device), PopError::Spent, "as many as the queue is long");
        let reason = QueueError::Request { head: 0, reason: "none" };
        device.fail(reason);
        assert_eq!(why(&mut device), PopError::Broken(reason));
        device.begin_burst();
        assert_eq!(why(&mut device), PopError::Broken(reason));
        assert_eq!((device.pending(), device.broken()), (None, Some(reason)));
    }
}

#[test]
fn a_chain_that_waits_does_not_keep_a_queue_from_being_broken() {
    for shape in every_shape(SIZE) {
        let mut rig = Rig::new(shape);
        let known = Arc::new(AtomicBool::new(false));
        let mut device = Queue::new(slow(&rig.memory.map, BUFFERS, &known), shape.config()).unwrap();
        rig.driver.add_buf(&[buffer(0, 16)], &[], 0).unwrap();
        rig.driver.kick().unwrap();
        assert!(matches!(device.pop(), Err(PopError::Pending(_))));
        let reason = QueueError::Request { head: 0, reason: "none" };
        device.fail(reason);
        known.store(true, Relaxed);
        assert!(matches!(device.pop(), Err(PopError::Broken(why)) if why == reason));
        assert_eq!((device.pending(), device.broken()), (None, Some(reason)));
    }
}

#[test]
fn areas_that_are_not_there_yet_are_no_fault() {
    for shape in every_shape(SIZE) {
        let memory = Memory::new(shape);
        let known = Arc::new(AtomicBool::new(false));
        let QueueConfig { descriptors, driver, device, .. } = shape.config();
        for area in [descriptors, driver, device] {
            known.store(false, Relaxed);
            let slow = slow(&memory.map, area & !0xfff, &known);
            let made = Queue::new(slow.clone(), shape.config()).map(drop);
            assert!(matches!(made, Err(Blocked::Pending(_))), "{made:?}");
            known.store(true, Relaxed);
            assert!(Queue::new(slow, shape.config()).is_ok());
        }
    }
}

/// Counts what it completes.
struct Counting(Arc<AtomicUsize>);

impl<M: GuestMemory> Device<M> for Counting {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[SIZE; 2]
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn activate(&mut self, _: Features, _: Waker) {}
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        let Some(queue) = queues.get(index) else { return };
        while let Ok(chain) = queue.pop() {
            queue.complete(chain).unwrap();
            self.0.fetch_add(1, Relaxed);
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {}
}

#[derive(Default)]
struct Line(Mutex<Vec<Cause>>);

impl Interrupt for Line {
    fn raise(&self, cause: Cause) {
        self.0.lock().unwrap().push(cause);
    }
}

/// A device whose queue 0 is on the ring of `shape`, and whose driver is ready.
fn ready(memory: Slow, shape: Shape) -> (VirtioDevice<Slow>, Arc<AtomicUsize>, Arc<Line>) {
    let (served, line) = (Arc::new(AtomicUsize::new(0)), Arc::new(Line::default()));
    let device = Box::new(Counting(served.clone()));
    let mut state =
        VirtioDevice::new(device, memory, line.clone(), Interface::Modern).with_features(Features::RING_PACKED);
    let mut features = Features::VERSION_1 | Features::SUSPEND;
    features.set(Features::RING_PACKED, shape.layout == Layout::Packed);
    features.set(Features::EVENT_IDX, shape.event_idx);
    state.set_driver_features(features);
    state.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
    let QueueConfig { descriptors, driver, device, .. } = shape.config();
    for (area, address) in [(Area::Descriptors, descriptors), (Area::Driver, driver), (Area::Device, device)] {
        state.set_queue_address(0, area, address);
    }
    state.set_queue_size(0, SIZE.into());
    state.enable_queue(0);
    state.set_status(state.status() | Status::DRIVER_OK);
    (state, served, line)
}

fn modern() -> impl Iterator<Item = Shape> {
    every_shape(SIZE).filter(|shape| !matches!(shape.layout, Layout::Legacy(_)))
}

#[test]
fn a_queue_whose_areas_are_on_their_way_starts_when_they_came_and_nothing_needs_a_reset() {
    for shape in modern() {
        let mut rig = Rig::new(shape);
        rig.driver.add_buf(&[buffer(0, 16)], &[], 0).unwrap();
        rig.driver.kick().unwrap();
        let known = Arc::new(AtomicBool::new(false));
        let area = shape.config().device & !0xfff;
        let (mut state, served, line) = ready(slow(&rig.memory.map, area, &known), shape);
        for _ in 0..2 {
            assert!(state.is_running());
            assert_eq!(state.needs_reset(), None, "{shape:?}");
            assert!(state.queue_enabled(0) && state.queue_state(0).is_none());
            assert!(state.queue_pending(0).is_some());
            assert_eq!(state.queue_pending(1), None, "it was not enabled");
            // It may be said too soon.
            assert!(!state.memory_came());
            assert!(!state.kick(0), "it does not run");
        }
        known.store(true, Relaxed);
        assert!(!state.memory_came());
        assert_eq!((state.queue_pending(0), state.needs_reset()), (None, None));
        assert_eq!(served.load(Relaxed), 1, "without a kick: it came before");
        assert_eq!(*line.0.lock().unwrap(), [Cause::Queue(0)]);
        // A reset forgets that something was waited for.
        let (mut state, ..) = ready(slow(&rig.memory.map, area, &Arc::default()), shape);
        state.reset();
        assert_eq!(state.queue_pending(0), None);
    }
}

#[test]
fn a_chain_whose_memory_is_on_its_way_is_served_when_it_came_and_no_other_queue_is() {
    for shape in modern() {
        let mut rig = Rig::new(shape);
        let known = Arc::new(AtomicBool::new(false));
        let (mut state, served, line) = ready(slow(&rig.memory.map, BUFFERS, &known), shape);
        rig.driver.add_buf(&[buffer(0, 16)], &[], 0).unwrap();
        rig.driver.kick().unwrap();
        assert!(!state.kick(0), "{shape:?}: there is nothing to do until it came");
        assert_eq!(state.queue_pending(0), Some(Pending { address: BUFFERS, len: 16 }));
        assert_eq!((state.queue_broken(0), state.needs_reset()), (None, None));
        assert!(!state.memory_came());
        assert_eq!(served.load(Relaxed), 0);
        known.store(true, Relaxed);
        assert!(!state.memory_came());
        assert_eq!((served.load(Relaxed), state.queue_pending(0)), (1, None));
        assert_eq!(*line.0.lock().unwrap(), [Cause::Queue(0)]);
    }
}

#[test]
fn a_suspended_device_starts_what_it_waits_for_when_it_is_resumed() {
    for shape in modern() {
        let rig = Rig::new(shape);
        let known = Arc::new(AtomicBool::new(false));
        let (mut state, ..) = ready(slow(&rig.memory.map, shape.config().device & !0xfff, &known), shape);
        state.set_status(Status::SUSPEND | state.status());
        known.store(true, Relaxed);
        assert!(!state.memory_came());
        assert!(state.status().contains(Status::SUSPEND));
        assert!(state.queue_state(0).is_none(), "a suspended device touches no ring");
        state.set_status(state.status() | Status::DRIVER_OK);
        assert!(state.queue_state(0).is_some(), "{shape:?}");
    }
}

#[test]
fn what_is_pending_and_what_is_a_fault_are_two_types() {
    let pending = Pending { address: 1, len: 2 };
    let fault = MemoryError::NotMapped { address: 1, len: 2 };
    assert_eq!(Blocked::from(ResolveError::from(pending)), Blocked::Pending(pending));
    assert_eq!(Blocked::from(ResolveError::from(fault)), Blocked::Broken(QueueError::Memory(fault)));
}
