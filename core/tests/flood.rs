//! What a guest can cost: work for each kick, and memory, both bounded by the size of the queue, whatever it does.
//!
//! A step is an access to guest memory. Everything is derived from the size: a kick serves at most as many chains as the
//! queue is long, and a chain has at most as many descriptors.

mod common;
mod counting;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Waker;

use common::{BUFFERS, Memory, RING, Shape, TABLES};
use counting::count;
use polyvirt_core::device::{Device, Queues};
use polyvirt_core::hypervisor::{Cause, Interrupt};
use polyvirt_core::memory::{Accessed, FlatMemory, Log, Segment, Watched, WatchedLease};
use polyvirt_core::queue::packed::layout::{Position, Tail};
use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, WRITE};
use polyvirt_core::queue::{Chain, Layout, QueueConfig, QueueError};
use polyvirt_core::state::{Area, Interface, VirtioDevice};
use polyvirt_core::{Features, Status};

/// Entries of the queue.
const SIZE: u16 = 64;
/// The same, to count with.
const N: usize = SIZE as usize;

/// What a kick may read and write besides its chains: the flags or the event word to ask for no kicks and for kicks, the
/// available index (or a descriptor's flags) before the first chain, behind the last, and once more when kicks are on
/// again, and the driver's wish for an interrupt.
const STEPS_OF_A_KICK: usize = 6;
/// What a chain takes besides its descriptors: its entry in the available ring, the descriptor that names its table, its
/// entry in the used ring, and the used index.
const STEPS_OF_A_CHAIN: usize = 4;
/// The most descriptors that are read of one chain: it is refused for its length when it has one more than the queue
/// has entries, or, in the memory of an earlier chain, when that is full. Memory grows by doubling, so it may have room
/// for nearly twice as many segments as there were.
const DESCRIPTORS_READ: usize = 2 * N;

type Guarded = Watched<Arc<FlatMemory>>;
type Lease = WatchedLease<Arc<FlatMemory>>;

/// The most bytes that a queue keeps for chains: for each in flight a handle's fixed part, and segments, of which the
/// memory grows by doubling.
fn memory_of_chains() -> isize {
    (N * (256 + 2 * N * size_of::<Segment<Lease>>())) as isize
}

/// The list of the parts that a table is in: one, in the memory that a list of this kind begins with.
const MEMORY_OF_A_TABLE: isize = 4 * size_of::<Segment<Lease>>() as isize;

#[derive(Default)]
struct Steps(AtomicUsize);

impl Log for Steps {
    fn accessed(&self, _: Accessed) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Line;

impl Interrupt for Line {
    fn raise(&self, _: Cause) {}
}

/// Takes all it can get.
struct Greedy {
    /// Whether it keeps what it takes, for ever.
    hoards: bool,
    held: Vec<Chain<Lease>>,
    served: Arc<AtomicUsize>,
    /// What the driver does after each chain.
    then: Box<dyn FnMut() + Send>,
}

impl Device<Guarded> for Greedy {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[SIZE]
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn activate(&mut self, _: Features, _: Waker) {}
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, Guarded>) {
        let queue = queues.get(index).unwrap();
        while let Ok(chain) = queue.pop() {
            self.served.fetch_add(1, Ordering::Relaxed);
            if self.hoards {
                self.held.push(chain);
            } else {
                queue.complete(chain).unwrap();
            }
            (self.then)();
        }
    }
    fn reset_queue(&mut self, _: u16) {
        self.held.clear();
    }
    fn reset(&mut self) {
        self.held.clear();
    }
}

/// What a kick cost.
#[derive(Debug)]
struct Cost {
    chains: usize,
    steps: usize,
    allocations: usize,
    /// Whether the device wants another turn.
    more: bool,
}

/// A guest, and the device that it floods.
struct Flood {
    guest: Guest,
    state: VirtioDevice<Guarded>,
    steps: Arc<Steps>,
    served: Arc<AtomicUsize>,
}

/// Writes a ring as it likes.
#[derive(Clone)]
struct Guest {
    memory: Arc<Memory>,
    /// Split: the available index.
    index: u16,
    /// Packed: the next place.
    place: Position,
}

impl Guest {
    fn is_packed(&self) -> bool {
        self.memory.shape.layout == Layout::Packed
    }

    /// Fills the table at [`TABLES`] with as many entries as the queue has.
    fn fill_table(&self) {
        for index in 0..SIZE {
            if self.is_packed() {
                let at = TABLES + 16 * u64::from(index);
                self.memory.write(at, &BUFFERS.to_le_bytes());
                self.memory.write(at + 8, &Tail { len: 16, id: 0, flags: WRITE }.to_word().to_ne_bytes());
            } else {
                let next = if index + 1 < SIZE { NEXT } else { 0 };
                self.memory.descriptor_at(TABLES, index, BUFFERS, 16, WRITE | next, index + 1);
            }
        }
    }

    /// Packed: writes the next descriptor, available.
    fn put(&mut self, id: u16, address: u64, len: u32, flags: u16) {
        let at = RING + 16 * u64::from(self.place.index());
        let tail = Tail { len, id, flags: flags | self.place.available_flags() };
        self.memory.write(at, &address.to_le_bytes());
        self.memory.write(at + 8, &tail.to_word().to_ne_bytes());
        self.place = self.place.advanced(1, SIZE);
    }

    /// Makes `count` chains available, each the table of as many descriptors as the queue has; all the same table.
    fn tables(&mut self, count: u16) {
        for id in 0..count {
            if self.is_packed() {
                self.put(id, TABLES, 16 * u32::from(SIZE), INDIRECT);
            } else {
                self.memory.descriptor(id, TABLES, 16 * u32::from(SIZE), INDIRECT, 0);
            }
        }
        if !self.is_packed() {
            self.available(count);
        }
    }

    /// Makes the most descriptors available that fit the ring: packed, one chain of all; split, a chain from each entry to
    /// the last, which share their descriptors.
    fn direct(&mut self) {
        for index in 0..SIZE {
            let next = if index + 1 < SIZE { NEXT } else { 0 };
            if self.is_packed() {
                self.put(0, BUFFERS, 16, WRITE | next);
            } else {
                self.memory.descriptor(index, BUFFERS, 16, WRITE | next, index + 1);
            }
        }
        if !self.is_packed() {
            self.available(SIZE);
        }
    }

    /// Makes a chain available that never ends.
    fn endless(&mut self) {
        for index in 0..SIZE {
            if self.is_packed() {
                self.put(0, BUFFERS, 16, WRITE | NEXT);
            } else {
                self.memory.descriptor(index, BUFFERS, 16, WRITE | NEXT, (index + 1) % SIZE);
            }
        }
        if !self.is_packed() {
            self.available(1);
        }
    }

    /// Makes one chain of one descriptor available, under an id that it had before.
    fn one(&mut self, id: u16) {
        if self.is_packed() {
            self.put(id, BUFFERS, 16, WRITE);
        } else {
            self.memory.descriptor(id, BUFFERS, 16, WRITE, 0);
            self.memory.available(self.index, &[id]);
            self.index = self.index.wrapping_add(1);
        }
    }

    /// Split: makes the heads 0 to `count` available.
    fn available(&mut self, count: u16) {
        self.memory.available(self.index, &(0..count).collect::<Vec<_>>());
        self.index = self.index.wrapping_add(count);
    }
}

impl Flood {
    fn new(shape: Shape, hoards: bool) -> Self {
        Self::with(shape, hoards, |_| Box::new(|| {}))
    }

    fn with(shape: Shape, hoards: bool, then: impl FnOnce(Guest) -> Box<dyn FnMut() + Send>) -> Self {
        let memory = Arc::new(Memory::new(shape));
        let guest = Guest { memory, index: 0, place: Position::START };
        let (steps, served) = (Arc::<Steps>::default(), Arc::<AtomicUsize>::default());
        let watched = Watched::new(guest.memory.map.clone(), "device", steps.clone());
        // The test's own books are no part of the cost.
        let held = Vec::with_capacity(if hoards { N } else { 0 });
        let device = Greedy { hoards, held, served: served.clone(), then: then(guest.clone()) };
        let mut state = VirtioDevice::new(Box::new(device), watched, Arc::new(Line), Interface::Modern)
            .with_features(Features::RING_PACKED);
        let mut features = Features::VERSION_1 | Features::INDIRECT_DESC;
        features.set(Features::EVENT_IDX, shape.event_idx);
        features.set(Features::RING_PACKED, shape.layout == Layout::Packed);
        features.set(Features::IN_ORDER, shape.in_order);
        state.set_driver_features(features);
        state.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        let QueueConfig { descriptors, driver, device, .. } = shape.config();
        for (area, address) in [(Area::Descriptors, descriptors), (Area::Driver, driver), (Area::Device, device)] {
            state.set_queue_address(0, area, address);
        }
        state.enable_queue(0);
        state.set_status(state.status() | Status::DRIVER_OK);
        assert!(state.is_running());
        guest.fill_table();
        Self { guest, state, steps, served }
    }

    fn kick(&mut self) -> Cost {
        let chains = self.served.load(Ordering::Relaxed);
        let steps = self.steps.0.load(Ordering::Relaxed);
        let allocations = count().calls;
        let more = self.state.kick(0);
        Cost {
            chains: self.served.load(Ordering::Relaxed) - chains,
            steps: self.steps.0.load(Ordering::Relaxed) - steps,
            allocations: count().calls - allocations,
            more,
        }
    }

    /// The queue is broken, and nothing costs anything any more.
    fn is_broken(&mut self) -> QueueError {
        let reason = self.state.needs_reset().expect("the queue is broken");
        for _ in 0..100 {
            let cost = self.kick();
            assert_eq!((cost.chains, cost.steps, cost.allocations, cost.more), (0, 0, 0, false));
        }
        reason
    }
}

/// Both formats, with and without EVENT_IDX and IN_ORDER.
fn shapes() -> impl Iterator<Item = Shape> {
    [Layout::Modern, Layout::Packed].into_iter().flat_map(|layout| {
        [(false, false), (false, true), (true, false), (true, true)].map(move |(event_idx, in_order)| Shape {
            size: SIZE,
            event_idx,
            indirect: true,
            in_order,
            layout,
        })
    })
}

/// The flood comes again and again; the first costs memory, no other does.
fn floods(descriptors: impl Fn(Shape) -> usize, chains: impl Fn(Shape) -> usize, fill: impl Fn(&mut Guest)) {
    for shape in shapes() {
        let mut flood = Flood::new(shape, false);
        for round in 0..10 {
            counting::restart();
            fill(&mut flood.guest);
            let cost = flood.kick();
            assert_eq!(cost.chains, chains(shape), "{shape:?}");
            let most = descriptors(shape) + STEPS_OF_A_CHAIN * cost.chains + STEPS_OF_A_KICK;
            assert!(cost.steps <= most, "{shape:?}: {cost:?}, more than {most} steps");
            // That they are counted at all: each descriptor is read.
            assert!(cost.steps > descriptors(shape), "{shape:?}: {cost:?}");
            if round == 0 {
                // Each was completed before the next: they share the memory of one.
                let most = memory_of_chains() / N as isize + MEMORY_OF_A_TABLE;
                assert!(count().peak <= most, "{shape:?}: {} bytes, more than {most}", count().peak);
            } else {
                assert_eq!(cost.allocations, 0, "{shape:?}: round {round}");
            }
        }
    }
}

#[test]
fn a_ring_full_of_tables_that_are_as_long_as_the_queue() {
    floods(|_| N * N, |_| N, |guest| guest.tables(SIZE));
}

#[test]
fn a_ring_full_of_descriptors() {
    // On a split ring a guest can have a descriptor be part of many chains.
    floods(
        |shape| if shape.layout == Layout::Packed { N } else { N * (N + 1) / 2 },
        |shape| if shape.layout == Layout::Packed { 1 } else { N },
        Guest::direct,
    );
}

#[test]
fn a_device_that_keeps_all_it_takes_keeps_no_more_than_the_queue_has_room_for() {
    for shape in shapes() {
        let mut flood = Flood::new(shape, true);
        counting::restart();
        flood.guest.tables(SIZE);
        assert_eq!(flood.kick().chains, N);
        let most = memory_of_chains();
        assert!(count().peak <= most, "{shape:?}: {} bytes, more than {most}", count().peak);
        assert!(count().peak > (N * N * size_of::<Segment<Lease>>()) as isize, "all of them are held");

        // The driver never takes anything back, and goes on.
        flood.guest.tables(SIZE);
        let cost = flood.kick();
        assert!(cost.steps <= STEPS_OF_A_KICK + STEPS_OF_A_CHAIN + DESCRIPTORS_READ, "{shape:?}: {cost:?}");
        assert_eq!(cost.chains, 0);
        assert!(count().peak <= most, "{shape:?}: {} bytes, more than {most}", count().peak);
        let reason = flood.is_broken();
        assert!(matches!(reason, QueueError::InFlight { .. } | QueueError::Overrun { .. }), "{reason}");
    }
}

#[test]
fn a_driver_that_never_consumes_what_was_used_is_served_with_what_there_is() {
    for shape in shapes() {
        let mut flood = Flood::new(shape, false);
        counting::restart();
        // The used index, or the wrap counter, goes round many times while nobody looks.
        for round in 0..u16::MAX / SIZE + 10 {
            for id in 0..SIZE {
                flood.guest.one(id);
            }
            let cost = flood.kick();
            assert_eq!(cost.chains, N);
            assert!(cost.steps <= N + STEPS_OF_A_CHAIN * N + STEPS_OF_A_KICK, "{shape:?}: {cost:?}");
            assert!(round == 0 || cost.allocations == 0, "{shape:?}: {cost:?}");
        }
        let most = memory_of_chains() / N as isize;
        assert!(count().peak <= most, "{shape:?}: {} bytes, more than {most}", count().peak);
    }
}

#[test]
fn a_chain_without_an_end_is_refused_once_it_is_longer_than_the_queue() {
    for shape in shapes() {
        // In fresh memory, and in that of a chain as long as can be.
        for seasoned in [false, true] {
            let mut flood = Flood::new(shape, false);
            if seasoned {
                flood.guest.direct();
                flood.kick();
            }
            counting::restart();
            flood.guest.endless();
            let cost = flood.kick();
            assert_eq!(cost.chains, 0);
            let most = STEPS_OF_A_KICK + STEPS_OF_A_CHAIN + DESCRIPTORS_READ;
            assert!(cost.steps <= most, "{shape:?}: {cost:?}, more than {most} steps");
            assert!(count().peak <= memory_of_chains() / N as isize);
            let reason = flood.is_broken();
            // A packed ring has no loops: the chain runs into what is not available.
            let packed = shape.layout == Layout::Packed;
            assert!(
                matches!(reason, QueueError::TooManyDescriptors { .. })
                    || packed && matches!(reason, QueueError::Unavailable { .. }),
                "{shape:?}: {reason}"
            );
        }
    }
}

#[test]
fn a_kick_for_nothing_costs_a_look() {
    for shape in shapes() {
        let mut flood = Flood::new(shape, false);
        for _ in 0..1000 {
            let cost = flood.kick();
            assert!(cost.steps <= STEPS_OF_A_KICK, "{shape:?}: {cost:?}");
            assert_eq!((cost.chains, cost.allocations, cost.more), (0, 0, false));
        }
        assert_eq!(flood.state.needs_reset(), None);
        flood.guest.one(3);
        assert_eq!(flood.kick().chains, 1, "{shape:?}: it still works");
    }
}

#[test]
fn a_driver_that_rewinds_is_not_served_again() {
    for shape in shapes() {
        let mut flood = Flood::new(shape, false);
        for id in 0..8 {
            flood.guest.one(id);
        }
        assert_eq!(flood.kick().chains, 8);
        let past = Guest { index: 0, place: Position::START, ..flood.guest.clone() };
        let mut rewound = past.clone();
        rewound.one(0);
        let cost = flood.kick();
        assert_eq!(cost.chains, 0);
        assert!(cost.steps <= STEPS_OF_A_KICK, "{shape:?}: {cost:?}");
        if shape.layout == Layout::Packed {
            // Where the device looks next, nothing has changed.
            assert_eq!(flood.state.needs_reset(), None);
            flood.guest.one(9);
            assert_eq!(flood.kick().chains, 1);
        } else {
            let reason = flood.is_broken();
            assert!(matches!(reason, QueueError::IndexJump { last: 8, index: 1, .. }), "{reason}");
        }
    }
}

#[test]
fn a_driver_that_adds_while_it_is_served_does_not_hold_the_device() {
    for shape in shapes() {
        let mut flood = Flood::with(shape, false, |mut guest| {
            guest.one(0);
            // What the device has completed is available again at once.
            Box::new(move || guest.one(0))
        });
        // DRIVER_OK has served the first burst.
        for _ in 0..10 {
            let cost = flood.kick();
            assert_eq!(cost.chains, N, "{shape:?}");
            assert!(cost.steps <= (1 + 1 + STEPS_OF_A_CHAIN) * N + STEPS_OF_A_KICK, "{shape:?}: {cost:?}");
            assert!(cost.more, "{shape:?}: the rest waits for another turn");
        }
    }
}
