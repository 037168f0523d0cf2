//! Who is served when: queues take turns, and a turn is soon over.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::task::Waker;

use polyvirt_core::device::{Device, Queues};
use polyvirt_core::hypervisor::{Cause, Interrupt};
use polyvirt_core::memory::{FlatMemory, Pages};
use polyvirt_core::queue::split::layout::WRITE;
use polyvirt_core::state::{Area, Interface, VirtioDevice};
use polyvirt_core::{Features, Status};

const SIZE: u16 = 8;
const QUEUES: usize = 4;
const PAGE: u64 = 0x1000;
/// Bytes of memory that each queue has.
const EACH: u64 = 3 * PAGE;
const BUFFERS: u64 = EACH * QUEUES as u64;

struct Line;

impl Interrupt for Line {
    fn raise(&self, _: Cause) {}
}

/// Which queue was served, and how many chains of it, in order.
type Served = Arc<Mutex<VecDeque<(usize, u16)>>>;

/// Completes what it finds in the queue that it is told of.
struct Honest(Served);

impl Device<Arc<FlatMemory>> for Honest {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[SIZE; QUEUES]
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn activate(&mut self, _: Features, _: Waker) {}
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, Arc<FlatMemory>>) {
        let queue = queues.get(index).unwrap();
        let mut count = 0;
        while let Ok(chain) = queue.pop() {
            queue.complete(chain).unwrap();
            count += 1;
        }
        self.0.lock().unwrap().push_back((index.into(), count));
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {}
}

struct Rig {
    state: VirtioDevice<Arc<FlatMemory>>,
    served: Served,
    memory: Arc<FlatMemory>,
    /// Chains that were made available, by queue.
    offered: [u16; QUEUES],
}

/// Descriptor, driver and device area of a queue.
fn areas(queue: usize) -> [u64; 3] {
    [0, 1, 2].map(|area| EACH * queue as u64 + PAGE * area)
}

impl Rig {
    fn new() -> Self {
        let memory = Arc::new(FlatMemory::new([(0, Pages::allocate((BUFFERS + PAGE) as usize))]));
        let served = Served::default();
        let device = Box::new(Honest(served.clone()));
        let mut state = VirtioDevice::new(device, memory.clone(), Arc::new(Line), Interface::Modern);
        state.set_driver_features(Features::VERSION_1);
        state.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        for queue in 0..QUEUES {
            let [descriptors, driver, device] = areas(queue);
            for (area, address) in [(Area::Descriptors, descriptors), (Area::Driver, driver), (Area::Device, device)] {
                state.set_queue_address(queue as u16, area, address);
            }
            state.enable_queue(queue as u16);
            let write = |address: u64, bytes: &[u8]| {
                memory.pages(address, bytes.len()).unwrap().write(0, bytes).unwrap();
            };
            for index in 0..SIZE {
                let at = descriptors + 16 * u64::from(index);
                write(at, &BUFFERS.to_le_bytes());
                write(at + 8, &(8 | u64::from(WRITE) << 32).to_le_bytes());
                write(driver + 4 + 2 * u64::from(index), &index.to_le_bytes());
            }
        }
        state.set_status(state.status() | Status::DRIVER_OK);
        assert!(state.is_running());
        served.lock().unwrap().clear();
        Self { state, served, memory, offered: [0; QUEUES] }
    }

    fn offer(&mut self, queue: usize, count: u16) {
        self.offered[queue] = self.offered[queue].wrapping_add(count);
        let index = self.memory.pages(areas(queue)[1] + 2, 2).unwrap();
        index.write(0, &self.offered[queue].to_le_bytes()).unwrap();
    }

    fn take(&self) -> Vec<(usize, u16)> {
        self.served.lock().unwrap().drain(..).collect()
    }
}

#[test]
fn queues_that_are_always_full_have_a_burst_each_in_turn() {
    let mut rig = Rig::new();
    for queue in 0..QUEUES {
        rig.offer(queue, SIZE);
        assert!(rig.state.kick(queue as u16));
        assert_eq!(rig.take(), [(queue, SIZE)], "what others have left does not hold it up");
        rig.offer(queue, SIZE);
    }
    let mut begun = None;
    for turn in 0..4 * QUEUES {
        assert!(rig.state.poll());
        let [(queue, SIZE)] = rig.take()[..] else { panic!("not one burst") };
        let first = *begun.get_or_insert(queue);
        assert_eq!(queue, (first + turn) % QUEUES, "it goes on where it left off");
        rig.offer(queue, SIZE);
    }
}

#[test]
fn a_turn_serves_on_its_way_what_is_soon_done() {
    let mut rig = Rig::new();
    for queue in 0..QUEUES {
        rig.offer(queue, SIZE);
        rig.state.kick(queue as u16);
    }
    rig.take();
    [1, SIZE, 2, SIZE].into_iter().enumerate().for_each(|(queue, count)| rig.offer(queue, count));
    let mut served = Vec::new();
    let mut turns = 0;
    while rig.state.poll() {
        let turn = rig.take();
        let full = turn.iter().filter(|(_, count)| *count == SIZE).count();
        assert!(full <= 1, "a turn ends with the first queue that uses up its burst: {turn:?}");
        served.extend(turn);
        turns += 1;
    }
    served.extend(rig.take());
    for (queue, count) in [1, SIZE, 2, SIZE].into_iter().enumerate() {
        let sum: u16 = served.iter().filter(|(which, _)| *which == queue).map(|(_, count)| count).sum();
        assert_eq!(sum, count, "{served:?}");
    }
    assert!(turns <= 3, "{turns} turns for what two suffice for, and a look");
}

#[test]
fn a_driver_that_kicks_one_queue_all_the_time_does_not_hold_up_the_others() {
    let mut rig = Rig::new();
    rig.offer(3, SIZE);
    assert!(rig.state.kick(3));
    rig.offer(3, SIZE);
    rig.take();
    // Whoever was told that there is more polls, others in between.
    let mut polled = Vec::new();
    for _ in 0..QUEUES {
        rig.offer(0, SIZE);
        rig.state.kick(0);
        assert_eq!(rig.take(), [(0, SIZE)]);
        rig.state.poll();
        polled.extend(rig.take());
    }
    assert!(polled.contains(&(3, SIZE)), "{polled:?}");
}
