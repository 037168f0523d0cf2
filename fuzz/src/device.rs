//! The device role in memory that a hostile driver writes.

use std::sync::Arc;

use polyvirt_core::memory::{FlatMemory, WatchedLease};
use polyvirt_core::queue::{self, ByteOrder, Layout, Queue, QueueConfig, packed, split};

use crate::allocations;
use crate::input::Input;
use crate::ram::{self, Ram};

/// The most steps of a script that are carried out.
const STEPS: usize = 1000;

type Chain = queue::Chain<WatchedLease<Arc<FlatMemory>>>;

pub(crate) fn run(data: &[u8], packed: bool) {
    let mut input = Input::new(data);
    let ram = Ram::new();
    let config = config(&mut input, packed);
    let size = config.size;
    if packed {
        ram.allow_area(config.descriptors, 16 * u64::from(size));
        ram.allow_area(config.device, packed::layout::EVENT_LEN);
    } else {
        ram.allow_area(config.device, split::layout::device_len(size));
    }
    allocations::restart();
    let Ok(mut queue) = Queue::new(ram.memory(), config) else { return };
    let mut driver = Driver { config, next: 0, position: packed::layout::Position::START };
    let mut held = Vec::<Chain>::new();
    // Each chain has at most as many descriptors as the queue, each in at most as many segments as there are regions.
    let segments = usize::from(size) * 4;
    for _ in 0..STEPS {
        let Some(step) = input.step() else { break };
        ram.accesses();
        let (broken, calls) = (queue.broken(), allocations::count().calls);
        match step % 16 {
            0..4 => {
                let popped = queue.pop();
                // Index or flags, entry, wish; two words a descriptor; a table's entry in up to three segments.
                let most = if broken.is_some() { 0 } else { 4 + 5 * usize::from(size) };
                let accesses = ram.accesses();
                assert!(accesses <= most, "{accesses} accesses in one pop, more than {most}");
                // Lists of segments double as they grow.
                let most = 8 + 2 * segments.ilog2() as usize;
                assert!(allocations::count().calls - calls <= most, "one pop allocated more than {most} times");
                match popped {
                    Ok(Some(chain)) => {
                        assert!(chain.readable().len() + chain.writable().len() <= segments);
                        assert!(held.iter().all(|other| other.head() != chain.head()), "a head twice in flight");
                        held.push(chain);
                        assert!(held.len() <= usize::from(size), "more chains in flight than the queue has entries");
                    }
                    Ok(None) => {}
                    Err(reason) => assert_eq!(queue.broken(), Some(reason)),
                }
            }
            4 | 5 if !held.is_empty() => {
                let chain = held.swap_remove(usize::from(input.byte()) % held.len());
                let done = queue.complete(chain);
                assert_eq!(done.is_ok(), broken.is_none(), "what is in flight can be completed: {done:?}");
                // In order, one may end the wait of all others.
                let used = if config.in_order { usize::from(size) } else { 1 };
                assert!(ram.accesses() <= 3 * used);
            }
            6 if !held.is_empty() => {
                let which = usize::from(input.byte()) % held.len();
                touch(&ram, &mut held[which], &mut input);
            }
            7 => queue.begin_burst(),
            8 => {
                queue.end_burst();
                assert!(ram.accesses() <= 2);
            }
            9 => {
                queue.needs_interrupt();
                assert!(ram.accesses() <= 1);
            }
            10 => ram.poke(ram::address(&mut input), input.slice()),
            11 => driver.descriptor(&ram, &mut input),
            12 | 13 => driver.offer(&ram, &mut input),
            14 => {
                let area = [config.descriptors, config.driver, config.device][usize::from(input.byte()) % 3];
                let offset = u64::from(input.byte()) * 2;
                ram.poke(area.wrapping_add(offset), &input.u16().to_le_bytes());
            }
            _ => driver.table(&ram, &mut input),
        }
        assert!(broken.is_none() || queue.broken() == broken, "the first reason stays");
    }
    // Chains in flight, and what a queue of this size has of its own.
    let most = 0x1_0000 + 256 * (usize::from(size) + STEPS) + 160 * segments * STEPS.min(size.into());
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
    QueueConfig { size, descriptors, driver, device, layout, event_idx: flags & 1 != 0, indirect: flags & 2 != 0, in_order: flags & 64 != 0 }
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

/// A driver that knows the format, and abuses it.
struct Driver {
    config: QueueConfig,
    next: u16,
    position: packed::layout::Position,
}

impl Driver {
    const fn is_big(&self) -> bool {
        matches!(self.config.layout, Layout::Legacy(ByteOrder::Big))
    }

    fn put16(&self, ram: &Ram, address: u64, value: u16) {
        ram.poke(address, &if self.is_big() { value.to_be_bytes() } else { value.to_le_bytes() });
    }

    /// Writes a descriptor: address, length, and two fields of 16 bits.
    fn put(&self, ram: &Ram, at: u64, address: u64, len: u32, [third, fourth]: [u16; 2]) {
        ram.poke(at, &if self.is_big() { address.to_be_bytes() } else { address.to_le_bytes() });
        ram.poke(at.wrapping_add(8), &if self.is_big() { len.to_be_bytes() } else { len.to_le_bytes() });
        self.put16(ram, at.wrapping_add(12), third);
        self.put16(ram, at.wrapping_add(14), fourth);
    }

    /// Writes a descriptor of the ring.
    fn descriptor(&mut self, ram: &Ram, input: &mut Input<'_>) {
        let at = self.config.descriptors.wrapping_add(16 * u64::from(input.byte()));
        let (address, len, flags, next) = (ram::address(input), input.len(), input.byte(), input.byte());
        self.put(ram, at, address, len, [u16::from(flags & 7), next.into()]);
    }

    /// Writes an entry of what may be an indirect table.
    fn table(&mut self, ram: &Ram, input: &mut Input<'_>) {
        let at = 16 * u64::from(input.byte());
        let (address, len, flags, next) = (ram::address(input), input.len(), input.byte(), input.byte());
        let (flags, other) = (u16::from(flags & 7), u16::from(next));
        let fields = if self.config.layout == Layout::Packed { [other, flags] } else { [flags, other] };
        self.put(ram, at, address, len, fields);
    }

    /// Makes something available at the right place.
    fn offer(&mut self, ram: &Ram, input: &mut Input<'_>) {
        let QueueConfig { size, descriptors, driver, .. } = self.config;
        if self.config.layout == Layout::Packed {
            let (address, len, id, flags) = (ram::address(input), input.len(), input.byte(), input.byte());
            let at = descriptors.wrapping_add(16 * u64::from(self.position.index));
            let flags = u16::from(flags & 7) | self.position.available_flags();
            self.put(ram, at, address, len, [id.into(), flags]);
            self.position = self.position.advanced(1, size);
        } else {
            let slot = u64::from(self.next % size);
            self.put16(ram, driver.wrapping_add(4 + 2 * slot), input.byte().into());
            self.next = self.next.wrapping_add(1);
            self.put16(ram, driver.wrapping_add(2), self.next);
        }
    }
}
