//! The driver role with a device that writes what it likes.

use std::collections::BTreeMap;

use polyvirt_core::memory::Pages;
use polyvirt_core::queue::{AddError, Buffer, ByteOrder, DriverQueue, Layout, QueueConfig, QueueError, packed};
use polyvirt_core::transport::{Notify, TransportError, Virtqueue};

use crate::allocations;
use crate::input::Input;

/// The most steps of a script that are carried out.
const STEPS: usize = 1000;
/// Bytes that each area has room for, and of the canary behind each.
const AREA: usize = 4096;
const CANARY: u8 = 0xa5;
/// Where the memory for indirect tables is, as the device sees it.
const TABLES: u64 = 0x8000;

struct Doorbell;

impl Notify for Doorbell {
    fn notify(&mut self) -> Result<(), TransportError> {
        Ok(())
    }
}

/// The memory that both sides share: each area is followed by a page that neither may touch.
struct Shared {
    all: Pages,
    /// Descriptors, driver, device, tables.
    areas: [Pages; 4],
}

impl Shared {
    /// `lens` are multiples of what each area has to be aligned to.
    fn new(lens: [usize; 4]) -> Self {
        let all = Pages::allocate(2 * lens.len() * AREA);
        all.fill(0, all.len(), CANARY).expect("inside");
        let mut end = 0;
        let areas = lens.map(|len| {
            end += 2 * AREA;
            all.slice(end - AREA - len, len).expect("inside")
        });
        Self { all, areas }
    }

    fn check(&self) {
        let mut bytes = [0; AREA];
        for page in [1, 3, 5, 7] {
            self.all.read(page * AREA, &mut bytes).expect("inside");
            assert!(bytes.iter().all(|byte| *byte == CANARY), "written outside the areas");
        }
    }

    fn device_area(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.areas[2].len()];
        self.areas[2].read(0, &mut bytes).expect("inside");
        bytes
    }

    fn virtqueue(&self, config: QueueConfig) -> Virtqueue<Doorbell> {
        let [descriptors, driver, device, _] = self.areas.clone();
        Virtqueue { config, descriptors, driver, device, notify: Doorbell }
    }
}

pub(crate) fn run(data: &[u8], packed: bool) {
    let mut input = Input::new(data);
    let flags = input.byte();
    let layout = match flags >> 3 & 3 {
        _ if packed => Layout::Packed,
        0 | 1 => Layout::Modern,
        2 => Layout::Legacy(ByteOrder::Little),
        _ => Layout::Legacy(ByteOrder::Big),
    };
    let size = if packed { 1 + u16::from(input.byte() % 32) } else { 1 << (input.byte() % 6) };
    let entries = usize::from(size);
    let mut config = QueueConfig {
        size,
        layout,
        event_idx: flags & 1 != 0,
        indirect: flags & 2 != 0,
        in_order: flags & 64 != 0,
        ..QueueConfig::default()
    };
    let (driver, device) = if packed { (4, 4) } else { (6 + 2 * entries, (6 + 8 * entries).next_multiple_of(4)) };
    let shared = Shared::new([16 * entries, driver, device, 64 * entries]);
    allocations::restart();
    let mut queue = DriverQueue::<u32, _>::new(shared.virtqueue(config)).expect("a queue that can be");
    if flags & 4 != 0 {
        queue = queue.with_indirect(shared.areas[3].clone(), TABLES);
    }
    let mut device = Device::new(config);
    // What is out, by token: writable bytes.
    let (mut next, mut out) = (0u32, BTreeMap::new());
    for _ in 0..STEPS {
        let Some(step) = input.step() else { break };
        let device_area = shared.device_area();
        // Whoever else may write there: the device, and a driver that starts over and clears its rings.
        let mut free = step % 12 == 11;
        match step % 12 {
            0..3 => {
                let counts = input.byte();
                let piece = |number| Buffer { address: number, len: 1 << (counts & 7) };
                let readable: Vec<_> = (0..u64::from(counts >> 3 & 3)).map(piece).collect();
                let writable: Vec<_> = (0..u64::from(counts >> 5)).map(piece).collect();
                let calls = allocations::count().calls;
                let added = queue.add_buf(&readable, &writable, next);
                assert_eq!(allocations::count().calls, calls, "adding allocates");
                match added {
                    Ok(()) => {
                        out.insert(next, writable.iter().map(|piece| piece.len).sum::<u32>());
                        next += 1;
                    }
                    Err(AddError::Broken(_) | AddError::Full(_) | AddError::Pieces { .. }) => {}
                    Err(AddError::Notify(error)) => panic!("the doorbell works: {error}"),
                }
            }
            3 => drop(queue.kick().expect("the doorbell works")),
            4 | 5 => {
                let calls = allocations::count().calls;
                let got = queue.get_buf();
                assert_eq!(allocations::count().calls, calls, "getting allocates");
                match got {
                    Ok(Some((token, len))) => {
                        if config.in_order {
                            assert_eq!(out.keys().next(), Some(&token), "in order");
                        }
                        let writable = out.remove(&token).expect("a token comes back once");
                        assert!(len <= writable, "more was written than there is room for");
                    }
                    Ok(None) => {}
                    Err(reason) => {
                        assert_eq!(queue.get_buf(), Err(reason), "the first reason stays");
                        assert!(!queue.enable_cb() && !queue.kick().expect("nothing is rung"), "it is broken");
                    }
                }
            }
            6 => queue.disable_cb(),
            7 => drop(queue.enable_cb()),
            8 => {
                let area = &shared.areas[usize::from(input.byte() % 4)];
                let (offset, bytes) = (usize::from(input.u16()) % area.len(), input.slice());
                free = true;
                area.write(offset, &bytes[..bytes.len().min(area.len() - offset)]).expect("inside");
            }
            9 | 10 => {
                free = true;
                device.complete(&shared, &mut input);
            }
            _ => match input.byte() % 8 {
                0 => {
                    let drained = queue.drain();
                    assert!(drained.iter().eq(out.keys()), "all come back in their order");
                    out.clear();
                    // What is drained belongs to a ring that was reset.
                    queue.restart(shared.virtqueue(config)).expect("a queue that can be");
                    device = Device::new(config);
                }
                1 => {
                    queue.restart(shared.virtqueue(config)).expect("what fitted fits again");
                    device = Device::new(config);
                }
                2 => {
                    let other = QueueConfig { indirect: !config.indirect, ..config };
                    match queue.restart(shared.virtqueue(other)) {
                        Ok(()) => (config, device) = (other, Device::new(other)),
                        Err(reason) => assert!(matches!(reason, QueueError::IndirectNotNegotiated { .. }), "{reason}"),
                    }
                }
                3 => {
                    let other = QueueConfig { size: size * 2, ..config };
                    let refused = queue.restart(shared.virtqueue(other));
                    assert!(matches!(refused, Err(QueueError::Size { .. })), "{refused:?}");
                }
                _ => {}
            },
        }
        // On a split ring the driver only reads there; on a packed one the device's wishes are there.
        assert!(free || device_area == shared.device_area(), "the driver wrote the device area");
        assert_eq!(queue.in_flight(), out.len());
        assert!(usize::from(queue.free()) + queue.in_flight() <= entries, "an entry is free or in flight, not both");
    }
    shared.check();
    // The queue, another that replaces it, and the script's book.
    let most = 0x2_0000 + 256 * entries * 8;
    let peak = allocations::count().peak;
    assert!(peak <= most as isize, "{peak} bytes allocated, more than {most}");
}

/// A device that knows the format, and abuses it.
struct Device {
    config: QueueConfig,
    next: u16,
    position: packed::layout::Position,
}

impl Device {
    const fn new(config: QueueConfig) -> Self {
        Self { config, next: 0, position: packed::layout::Position::START }
    }

    /// Uses something at the right place.
    fn complete(&mut self, shared: &Shared, input: &mut Input<'_>) {
        let size = self.config.size;
        let (id, len, entries) = (input.byte(), input.byte(), input.byte());
        let write = |area: usize, at, bytes: &[u8]| shared.areas[area].write(at, bytes).expect("inside");
        if self.config.layout == Layout::Packed {
            let tail = packed::layout::Tail { len: len.into(), id: id.into(), flags: self.position.used_flags() };
            write(0, 16 * usize::from(self.position.index()) + 8, &tail.to_word().to_ne_bytes());
            self.position = self.position.advanced((1 + u16::from(entries % 4)).min(size), size);
        } else {
            let big = self.config.layout == Layout::Legacy(ByteOrder::Big);
            let put = |value: u32| if big { value.to_be_bytes() } else { value.to_le_bytes() };
            let at = 4 + 8 * usize::from(self.next % size);
            write(2, at, &put(id.into()));
            write(2, at + 4, &put(len.into()));
            self.next = self.next.wrapping_add(1);
            write(2, 2, &if big { self.next.to_be_bytes() } else { self.next.to_le_bytes() });
        }
    }
}
