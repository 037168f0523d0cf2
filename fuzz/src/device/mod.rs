//! The device role in memory that a hostile driver writes.

mod driver;

use std::collections::VecDeque;
use std::sync::Arc;

use polyvirt_core::memory::{FlatMemory, WatchedLease};
use polyvirt_core::queue::packed::layout::{Position, Tail};
use polyvirt_core::queue::{
    self, Blocked, ByteOrder, Layout, PopError, Queue, QueueConfig, QueueError, QueueState, SavedQueue,
};
use polyvirt_core::queue::{packed, split};

use crate::allocations;
use crate::input::Input;
use crate::ram::{self, Memory, Ram};
use driver::Driver;

/// The most steps of a script that are carried out.
const STEPS: usize = 1000;
/// The most segments that one range of memory comes in: no more than two regions touch.
const PARTS: usize = 2;

type Chain = queue::Chain<WatchedLease<Arc<FlatMemory>>>;

pub(crate) fn run(data: &[u8], packed: bool) {
    let mut input = Input::new(data);
    let ram = Ram::new();
    let config = config(&mut input, packed);
    allow(&ram, &config);
    allocations::restart();
    let Ok(queue) = Queue::new(ram.memory(), config) else { return };
    let mut bench = Bench {
        ram,
        config,
        queue,
        driver: Driver::new(config),
        held: Vec::new(),
        taken: VecDeque::new(),
        saved: Some(Vec::new()),
    };
    for _ in 0..STEPS {
        let Some(step) = input.step() else { break };
        bench.ram.accesses();
        bench.step(step, &mut input);
    }
    bench.check_in_flight();
    // A queue's own book, of which there are two while one replaces the other, and that of the script's steps; chains
    // that are held, each of which may have been in a list of segments twice as long while that grew.
    let segments = usize::from(config.size) * PARTS;
    let most = 0x4_0000 + 512 * (usize::from(config.size) + STEPS) + 160 * segments * STEPS.min(config.size.into());
    let peak = allocations::count().peak;
    assert!(peak <= most as isize, "{peak} bytes allocated, more than {most}");
}

/// A queue that can be, mostly.
fn config(input: &mut Input<'_>, packed: bool) -> QueueConfig {
    let flags = input.byte();
    let size = match (flags & 4 != 0, packed) {
        (true, _) => input.u16(),
        (false, true) => 1 + u16::from(input.byte() % 32),
        (false, false) => 1 << (input.byte() % 6),
    };
    let [descriptors, driver, device] = match flags & 8 != 0 {
        true => [ram::address(input), ram::address(input), ram::address(input)],
        false => [0x10_1000, 0x10_2000, 0u64.wrapping_sub(0x1000)],
    };
    let layout = match flags >> 4 & 3 {
        _ if packed => Layout::Packed,
        0 | 1 => Layout::Modern,
        2 => Layout::Legacy(ByteOrder::Little),
        _ => Layout::Legacy(ByteOrder::Big),
    };
    let (event_idx, indirect, in_order) = (flags & 1 != 0, flags & 2 != 0, flags & 64 != 0);
    QueueConfig { size, descriptors, driver, device, layout, event_idx, indirect, in_order }
}

/// Lets the device touch the areas of its ring as the spec has it: without EVENT_IDX the event words are not part of a
/// split ring. Elsewhere it may read only if tables may be there.
fn allow(ram: &Ram, config: &QueueConfig) {
    let &QueueConfig { size, descriptors, driver, device, layout, event_idx, indirect, .. } = config;
    if layout == Layout::Packed {
        ram.allow_writing(descriptors, packed::layout::DESCRIPTOR_LEN * u64::from(size));
        ram.allow_reading(driver, packed::layout::EVENT_LEN);
        ram.allow_writing(device, packed::layout::EVENT_LEN);
    } else {
        let event = if event_idx { 0 } else { 2 };
        ram.allow_reading(descriptors, split::layout::descriptors_len(size));
        ram.allow_reading(driver, split::layout::driver_len(size) - event);
        ram.allow_writing(device, split::layout::device_len(size) - event);
    }
    ram.allow_tables(indirect);
}

/// A queue, what its device holds, and the driver.
struct Bench {
    ram: Ram,
    config: QueueConfig,
    queue: Queue<Memory>,
    driver: Driver,
    held: Vec<Chain>,
    /// What is taken and not used, in the order in which it was taken.
    taken: VecDeque<Taken>,
    /// The heads that are to be taken again before all others, the next one first; none if a state that the script made
    /// up is the reason why this is not known.
    saved: Option<Vec<u16>>,
}

/// A chain that was taken.
struct Taken {
    head: u16,
    /// (Packed) how many descriptors it takes.
    entries: u16,
    /// Once it was completed, the bytes written: it may have to wait for an older one.
    finished: Option<u32>,
}

impl Bench {
    fn step(&mut self, step: u8, input: &mut Input<'_>) {
        let (broken, size) = (self.queue.broken(), usize::from(self.config.size));
        match step {
            0xe0..=0xef => {
                let fresh = self.leave(step, input);
                if fresh {
                    return;
                }
            }
            _ => match step % 16 {
                0..4 => self.pop(broken),
                4 | 5 if !self.held.is_empty() => {
                    let chain = self.held.swap_remove(usize::from(input.byte()) % self.held.len());
                    self.complete(chain, broken);
                }
                6 if !self.held.is_empty() => {
                    let which = usize::from(input.byte()) % self.held.len();
                    touch(&self.ram, &mut self.held[which], input);
                }
                7 => self.queue.begin_burst(),
                8 => {
                    self.queue.end_burst();
                    assert!(self.ram.accesses() <= 2);
                }
                9 => {
                    self.queue.needs_interrupt();
                    assert!(self.ram.accesses() <= 1);
                }
                10 => self.ram.poke(ram::address(input), input.slice()),
                11 => self.driver.descriptor(&self.ram, input),
                12 | 13 => self.driver.offer(&self.ram, input),
                14 => {
                    let area = usize::from(input.byte()) % 3;
                    let area = [self.config.descriptors, self.config.driver, self.config.device][area];
                    let offset = u64::from(input.byte()) * 2;
                    self.ram.poke(area.wrapping_add(offset), &input.u16().to_le_bytes());
                }
                _ => self.driver.table(&self.ram, input),
            },
        }
        assert!(broken.is_none() || self.queue.broken() == broken, "the first reason stays");
        assert!(self.taken.len() <= size, "more chains in flight than the queue has entries");
    }

    /// The queue's own book says what the script's does.
    fn check_in_flight(&self) {
        // What a restored queue has yet to take again is not counted.
        if self.queue.broken().is_none() && self.saved.is_some() {
            assert_eq!(self.queue.in_flight(), self.taken.len());
        }
    }

    fn pop(&mut self, broken: Option<QueueError>) {
        let size = usize::from(self.config.size);
        let (calls, before) = (allocations::count().calls, self.queue.state().available);
        let popped = self.queue.pop();
        // Index or flags, entry, wish; a descriptor or an entry of a table in up to two segments. A loop is noticed
        // when the list of segments, which may have been as long as twice the most that a chain has, is full.
        let most = if broken.is_some() { 0 } else { 8 + 2 * PARTS * size };
        let accesses = self.ram.accesses();
        assert!(accesses <= most, "{accesses} accesses in one pop, more than {most}");
        // Lists of segments double as they grow.
        let most = 8 + 2 * (PARTS * size).ilog2() as usize;
        assert!(allocations::count().calls - calls <= most, "one pop allocated more than {most} times");
        match popped {
            Ok(chain) => {
                let segments = chain.readable().len() + chain.writable().len();
                assert!(segments <= PARTS * size, "{segments} segments");
                let sum = |part: &[_]| part.iter().map(segment_len).sum::<u64>();
                let (readable, writable) = (sum(chain.readable()), sum(chain.writable()));
                assert!(readable + writable <= 1 << 32, "a chain of more than 2^32 bytes");
                assert_eq!(u64::from(chain.readable_len()), readable.min(u32::MAX.into()));
                assert_eq!(u64::from(chain.writable_len()), writable.min(u32::MAX.into()));
                assert_eq!(chain.written(), 0);
                assert!(self.taken.iter().all(|other| other.head != chain.head()), "a head twice in flight");
                let entries = distance(before, self.queue.state().available, self.config.size);
                self.taken.push_back(Taken { head: chain.head(), entries, finished: None });
                match &mut self.saved {
                    Some(saved) if !saved.is_empty() => assert_eq!(chain.head(), saved.remove(0)),
                    _ => {}
                }
                self.held.push(chain);
            }
            Err(PopError::Broken(reason)) => assert_eq!(self.queue.broken(), Some(reason)),
            // Of memory that is there nothing is pending.
            Err(PopError::Pending(pending)) => panic!("{pending}"),
            Err(PopError::Empty | PopError::Spent) => assert_eq!(self.queue.broken(), None),
        }
    }

    /// Gives `chain` back: exactly one entry says so, and it says the truth. If chains are used in order, there is one for
    /// each that has waited for this one, and none as long as this one has to wait.
    fn complete(&mut self, chain: Chain, broken: Option<QueueError>) {
        let QueueConfig { size, descriptors, device, layout, in_order, .. } = self.config;
        let which = self.taken.iter().position(|taken| taken.head == chain.head()).expect("it was taken");
        self.taken[which].finished = Some(chain.written());
        let before = self.queue.state().used;
        let done = self.queue.complete(chain);
        assert_eq!(done.is_ok(), broken.is_none(), "what is in flight can be completed: {done:?}");
        let accesses = self.ram.accesses();
        if done.is_err() {
            assert_eq!(accesses, 0, "a broken queue writes nothing");
            return;
        }
        let used: Vec<_> = if in_order {
            let count = self.taken.iter().take_while(|taken| taken.finished.is_some()).count();
            self.taken.drain(..count).collect()
        } else {
            self.taken.remove(which).into_iter().collect()
        };
        assert!(accesses <= 2 * used.len());
        let mut at = before;
        for Taken { head, entries, finished } in used {
            let written = finished.expect("it is used");
            if layout == Layout::Packed {
                let place = Position::unpack(at);
                let tail = self.ram.peek(descriptors + 16 * u64::from(place.index()) + 8);
                let tail = Tail::from_word(u64::from_ne_bytes(tail));
                assert!(place.is_used(tail.flags));
                assert_eq!((tail.id, tail.len), (head, written));
                at = place.advanced(entries, size).pack();
            } else {
                let entry = device + 4 + 8 * u64::from(at % size);
                let entry = [entry, entry + 4].map(|at| self.driver.get32(&self.ram, at));
                assert_eq!(entry, [u32::from(head), written]);
                at = at.wrapping_add(1);
            }
        }
        assert_eq!(self.queue.state().used, at);
        if layout != Layout::Packed && at != before {
            assert_eq!(self.driver.get16(&self.ram, device + 2), at);
        }
    }

    /// What the host does with a queue besides serving it. True if the queue is another now.
    fn leave(&mut self, step: u8, input: &mut Input<'_>) -> bool {
        let config = self.config;
        match step & 15 {
            0 => self.queue.hold(),
            1 => self.queue.release(),
            2..5 => {
                let broken = self.queue.broken();
                let saved = self.queue.save();
                assert_eq!(self.ram.accesses(), 0, "saving touches memory");
                // What cannot be saved, and a queue that is broken, are left as they are.
                let (Ok(saved), None) = (saved, broken) else { return false };
                let restored = Queue::restore(self.ram.memory(), config, &saved);
                match restored {
                    Ok(queue) => {
                        self.queue = queue;
                        if self.saved.is_some() {
                            self.saved = Some(saved.in_flight);
                        }
                    }
                    Err(reason) => {
                        assert!(self.saved.is_none(), "a state of its own: {reason}");
                        return false;
                    }
                }
                self.forsake();
                return true;
            }
            5 | 6 => {
                let state = QueueState { available: input.u16(), used: input.u16() };
                let in_flight = input.slice().iter().map(|head| u16::from(*head)).collect();
                return self.replace(Queue::restore(self.ram.memory(), config, &SavedQueue { state, in_flight }));
            }
            7 | 8 => {
                let state = QueueState { available: input.u16(), used: input.u16() };
                return self.replace(Queue::resume(self.ram.memory(), config, state));
            }
            9 => self.queue.fail(QueueError::Request { head: 0, reason: "the script says so" }),
            // The driver writes while the device is in the middle of something.
            _ => self.ram.race(input.byte(), ram::address(input), input.slice()),
        }
        false
    }

    /// Goes on with `other`, if it can be.
    fn replace(&mut self, other: Result<Queue<Memory>, Blocked>) -> bool {
        let Ok(other) = other else { return false };
        self.queue = other;
        self.saved = None;
        self.forsake();
        true
    }

    /// The queue is another: what is held does not belong to it.
    fn forsake(&mut self) {
        self.taken.clear();
        for chain in std::mem::take(&mut self.held) {
            let head = chain.head();
            assert_eq!(self.queue.complete(chain), Err(QueueError::Stale { head }));
        }
        assert_eq!(self.ram.accesses(), 0, "a chain of another queue was completed");
    }
}

/// (Packed) how many descriptors lie between two places: all of them if they are the same place in different rounds.
fn distance(from: u16, to: u16, size: u16) -> u16 {
    let [start, end] = [from, to].map(|at| u32::from(Position::unpack(at).index()));
    let lap = if (from ^ to) & 1 << 15 != 0 { u32::from(size) } else { 0 };
    (end + lap).wrapping_sub(start) as u16
}

fn segment_len<L>(segment: &polyvirt_core::memory::Segment<L>) -> u64 {
    segment.len() as u64
}

/// Reads and writes a chain's bytes as a device does.
fn touch(ram: &Ram, chain: &mut Chain, input: &mut Input<'_>) {
    let mut bytes = [0; 64];
    let (offset, len) = (input.len(), 1 + usize::from(input.byte() % 64));
    let end = u64::from(offset) + len as u64;
    let (readable, writable) = (chain.readable_len(), chain.writable_len());
    ram.allow_buffers(true);
    let read = chain.read(offset, &mut bytes[..len]);
    // A readable part of 2^32 bytes says that it has one less; whether the last one can be read is left open.
    if readable < u32::MAX {
        assert_eq!(read.is_ok(), end <= u64::from(readable));
    }
    assert_eq!(chain.write(offset, &bytes[..len]).is_ok(), end <= u64::from(writable));
    assert!(chain.written() <= writable);
    ram.allow_buffers(false);
}
