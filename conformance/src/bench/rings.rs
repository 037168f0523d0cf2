//! The rings: device role, driver role, both formats, against the peers and against a loop written by hand.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use polyvirt_core::memory::{FlatMemory, Owner, Pages, Words};
use polyvirt_core::queue::split::layout;
use polyvirt_core::queue::{Buffer, DriverQueue, Layout, PopError, Queue, QueueConfig};
use polyvirt_core::transport::{Notify, TransportError, Virtqueue};

use super::{Effort, Row, Work, alternate, opponents};

/// Where the parts of a ring and its buffers are in guest memory.
pub(super) const DESCRIPTORS: u64 = 0x10_0000;
pub(super) const AVAILABLE: u64 = 0x20_0000;
pub(super) const USED: u64 = 0x30_0000;
pub(super) const BUFFERS: u64 = 0x40_0000;
/// Bytes of a memory region, and the distance between two.
pub(super) const REGION: usize = 64 << 20;
pub(super) const STRIDE: u64 = 1 << 30;

/// The shape of a device-role run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) size: u16,
    pub(super) chain: u16,
    pub(super) batch: u16,
    pub(super) regions: u64,
    pub(super) event_idx: bool,
}

impl Shape {
    /// Chains that fit the ring.
    pub(super) const fn chains(self) -> u16 {
        self.size / self.chain
    }

    /// Address and length of piece `piece` of chain `chain`: the first is a header, all others data; the regions take
    /// turns.
    pub(super) fn piece(self, chain: u16, piece: u16) -> (u64, u32) {
        let number = u64::from(chain) * u64::from(self.chain) + u64::from(piece);
        let region = number % self.regions;
        // Neighbouring buffers do not share a page; all stay within a region.
        let at = BUFFERS + number % 4096 * 0x2000;
        (region * STRIDE + at, if piece == 0 { 16 } else { 4096 })
    }
}

/// Guest memory as `shape` wants it, with a split ring whose descriptors are written once.
pub(super) fn split_memory(shape: Shape) -> FlatMemory {
    let memory = FlatMemory::new((0..shape.regions).map(|region| (region * STRIDE, Pages::allocate(REGION))));
    let descriptors = Words::<u64, _>::new(memory.pages(DESCRIPTORS, 16 * usize::from(shape.size)).unwrap()).unwrap();
    for chain in 0..shape.chains() {
        for piece in 0..shape.chain {
            let index = chain * shape.chain + piece;
            let (address, len) = shape.piece(chain, piece);
            let write = if piece > 0 || shape.chain == 1 { layout::WRITE } else { 0 };
            let last = piece + 1 == shape.chain;
            let flags = u64::from(write | if last { 0 } else { layout::NEXT });
            let next = u64::from(if last { 0 } else { index + 1 });
            descriptors.store(2 * usize::from(index), address.to_le(), Ordering::Relaxed);
            let word = u64::from(len) | flags << 32 | next << 48;
            descriptors.store(2 * usize::from(index) + 1, word.to_le(), Ordering::Relaxed);
        }
    }
    let available = words16(&memory, AVAILABLE, layout::driver_len(shape.size));
    for slot in 0..shape.size {
        // The ring may be longer than the chains last: the slots follow the chains round and round.
        available.store(
            layout::available_entry(usize::from(slot)),
            (slot % shape.chains() * shape.chain).to_le(),
            Ordering::Relaxed,
        );
    }
    memory
}

pub(super) type Words16 = Words<u16, polyvirt_core::memory::Owner>;

pub(super) fn words16(memory: &FlatMemory, address: u64, len: u64) -> Words16 {
    Words::new(memory.pages(address, len as usize).unwrap()).unwrap()
}

fn config(shape: Shape, layout: Layout) -> QueueConfig {
    QueueConfig {
        size: shape.size,
        descriptors: DESCRIPTORS,
        driver: AVAILABLE,
        device: USED,
        layout,
        event_idx: shape.event_idx,
        indirect: true,
        in_order: false,
    }
}

/// The chain, if there is one, of a queue that works.
fn popped<C>(found: Result<C, PopError>) -> Option<C> {
    match found {
        Ok(chain) => Some(chain),
        Err(PopError::Broken(reason)) => panic!("{reason}"),
        Err(PopError::Empty | PopError::Spent | PopError::Pending(_)) => None,
    }
}

/// Our device role on a split ring: the driver only moves the available index.
fn ours_split<'m>(memory: &'m FlatMemory, shape: Shape) -> Work<'m> {
    let mut queue = Queue::new(memory, config(shape, Layout::Modern)).unwrap();
    let available = words16(memory, AVAILABLE, layout::driver_len(shape.size));
    available.store(layout::INDEX, 0u16, Ordering::Release);
    let mut index = 0u16;
    Box::new(move |count| {
        let (mut done, mut written, mut interrupts) = (0, 0u64, 0u64);
        while done < count {
            index = index.wrapping_add(shape.batch);
            available.store(layout::INDEX, index.to_le(), Ordering::Release);
            queue.begin_burst();
            while let Some(mut chain) = popped(queue.pop()) {
                let writable = chain.writable_len();
                chain.set_written(writable);
                written += u64::from(writable);
                queue.complete(chain).unwrap();
                done += 1;
            }
            interrupts += u64::from(queue.needs_interrupt());
        }
        black_box((written, interrupts));
        done
    })
}

/// Both of our roles on one ring, in turns: a driver adds, a device takes and gives back, the driver takes back.
fn round_trip(layout: Layout, batch: u16) -> Work<'static> {
    let size = 256;
    let ring = || Pages::allocate(4096);
    let (descriptors, driver, device) = (ring(), ring(), ring());
    let memory = FlatMemory::new([
        (DESCRIPTORS, descriptors.clone()),
        (AVAILABLE, driver.clone()),
        (USED, device.clone()),
        (BUFFERS, Pages::allocate(2 * 4096)),
    ]);
    let shape = Shape { size, chain: 2, batch, regions: 1, event_idx: true };
    let config = config(shape, layout);
    let mut driver = DriverQueue::new(Virtqueue { config, descriptors, driver, device, notify: Count(0) }).unwrap();
    let header = [Buffer { address: BUFFERS, len: 16 }];
    let data = [Buffer { address: BUFFERS + 4096, len: 4096 }];
    // Leaked, so that the work can own a queue that borrows it.
    let memory: &'static FlatMemory = Box::leak(Box::new(memory));
    let mut device = Queue::new(memory, config).unwrap();
    Box::new(move |count| {
        let (mut done, mut interrupts) = (0, 0u64);
        while done < count {
            for number in 0..batch {
                driver.add_buf(&header, &data, number).unwrap();
            }
            driver.kick().unwrap();
            device.begin_burst();
            while let Some(mut chain) = popped(device.pop()) {
                let writable = chain.writable_len();
                chain.set_written(writable);
                device.complete(chain).unwrap();
            }
            interrupts += u64::from(device.needs_interrupt());
            for _ in 0..batch {
                done += u64::from(driver.get_buf().unwrap().is_some());
            }
        }
        black_box(interrupts);
        done
    })
}

/// A device that gives back what it gets, in order, and looks at nothing: the same for us and for the peer.
pub(super) struct Echo {
    available: Words16,
    used: Words<u32, Owner>,
    size: u16,
    index: u16,
}

impl Echo {
    /// On the driver and device area of a split ring.
    pub(super) fn split(driver: Pages, device: Pages, size: u16) -> Self {
        Self { available: Words::new(driver).unwrap(), used: Words::new(device).unwrap(), size, index: 0 }
    }

    /// Completes the next `count` chains with `len` bytes written.
    pub(super) fn complete(&mut self, count: u16, len: u32) {
        for _ in 0..count {
            let slot = usize::from(self.index & (self.size - 1));
            let head = self.available.load::<u16>(layout::available_entry(slot), Ordering::Acquire);
            let entry = layout::used_entry(slot);
            self.used.store(entry, u32::from(u16::from_le(head)).to_le(), Ordering::Relaxed);
            self.used.store(entry + 1, len.to_le(), Ordering::Relaxed);
            self.index = self.index.wrapping_add(1);
        }
        self.used.store(layout::INDEX, self.index.to_le(), Ordering::Release);
    }
}

/// A doorbell that counts.
struct Count(u64);

impl Notify for Count {
    fn notify(&mut self) -> Result<(), TransportError> {
        self.0 += 1;
        Ok(())
    }
}

/// Our driver role on a split ring of 256: the same work as [`opponents::virtio_drivers`].
fn ours_driver(batch: u16) -> Work<'static> {
    let size = 256;
    let driver = Pages::allocate(4096);
    let device = Pages::allocate(4096);
    let mut echo = Echo::split(driver.clone(), device.clone(), size);
    let mut queue = DriverQueue::new(Virtqueue {
        config: QueueConfig { size, event_idx: true, ..QueueConfig::default() },
        descriptors: Pages::allocate(16 * usize::from(size)),
        driver,
        device,
        notify: Count(0),
    })
    .unwrap();
    let header = [Buffer { address: BUFFERS, len: 16 }];
    let data = [Buffer { address: BUFFERS + 4096, len: 4096 }];
    Box::new(move |count| {
        let mut done = 0;
        while done < count {
            for number in 0..batch {
                queue.add_buf(&header, &data, number).unwrap();
            }
            queue.kick().unwrap();
            echo.complete(batch, 4096);
            for _ in 0..batch {
                done += u64::from(queue.get_buf().unwrap().is_some());
            }
        }
        done
    })
}

/// Bytes copied by each operation of [`two_threads`].
const COPIED: u32 = 64;

/// Driver and device on a thread each, both looking rather than sleeping: the driver writes 64 bytes, the device reads
/// them.
fn two_threads(layout: Layout) -> Work<'static> {
    let size = 256u16;
    Box::new(move |count| {
        // Fewer would measure how fast threads start.
        let count = count.max(100_000);
        let ring = || Pages::allocate(4096);
        let (descriptors, driver, device, buffers) =
            (ring(), ring(), ring(), Pages::allocate(usize::from(size) * COPIED as usize));
        let memory = FlatMemory::new([
            (DESCRIPTORS, descriptors.clone()),
            (AVAILABLE, driver.clone()),
            (USED, device.clone()),
            (BUFFERS, buffers.clone()),
        ]);
        let shape = Shape { size, chain: 1, batch: 1, regions: 1, event_idx: true };
        let config = config(shape, layout);
        let mut driver = DriverQueue::new(Virtqueue { config, descriptors, driver, device, notify: Count(0) }).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut device = Queue::new(&memory, config).unwrap();
                let (mut done, mut sum) = (0, 0u64);
                while done < count {
                    device.begin_burst();
                    while let Some(chain) = popped(device.pop()) {
                        let mut bytes = [0; COPIED as usize];
                        chain.read(0, &mut bytes).unwrap();
                        sum += u64::from(bytes[0]);
                        device.complete(chain).unwrap();
                        done += 1;
                    }
                    device.needs_interrupt();
                    std::hint::spin_loop();
                }
                black_box(sum);
            });
            let (mut added, mut back, mut free) = (0, 0, (0..size).rev().collect::<Vec<_>>());
            while back < count {
                while added < count
                    && let Some(slot) = free.pop()
                {
                    let offset = usize::from(slot) * COPIED as usize;
                    buffers.write(offset, &[added as u8; COPIED as usize]).unwrap();
                    let buffer = Buffer { address: BUFFERS + offset as u64, len: COPIED };
                    driver.add_buf(&[buffer], &[], slot).unwrap();
                    added += 1;
                    if added % 16 == 0 || added == count {
                        driver.kick().unwrap();
                    }
                }
                while let Some((slot, _)) = driver.get_buf().unwrap() {
                    free.push(slot);
                    back += 1;
                }
                driver.kick().unwrap();
            }
        });
        count
    })
}

/// Descriptors per second of our device role on a split ring.
fn descriptors<'m>(memory: &'m FlatMemory, shape: Shape) -> Work<'m> {
    let mut chains = ours_split(memory, shape);
    Box::new(move |count| chains(count / u64::from(shape.chain) + 1) * u64::from(shape.chain))
}

/// Runs the rows whose name contains `only`; `progress` is told the name of each before it runs.
pub fn run(effort: Effort, only: &str, progress: impl FnMut(&str)) -> Vec<Row> {
    let mut table = Table { effort, only, rows: Vec::new(), progress: Box::new(progress) };
    let shape = Shape { size: 256, chain: 2, batch: 32, regions: 1, event_idx: true };
    for regions in [1, 4] {
        for batch in [1, 32] {
            let shape = Shape { batch, regions, ..shape };
            let memory = split_memory(shape);
            table.row(
                format!("device role, split, chains of 2, batch {batch}, {regions} region(s)"),
                ("chains/s", opponents::VIRTIO_QUEUE, Some(4.0)),
                &mut ours_split(&memory, shape),
                &mut opponents::virtio_queue(shape),
            );
        }
    }
    for batch in [1, 32] {
        table.row(
            format!("driver role, split, add and get, batch {batch}"),
            ("buffers/s", opponents::VIRTIO_DRIVERS, Some(2.0)),
            &mut ours_driver(batch),
            &mut opponents::virtio_drivers(batch),
        );
    }
    for batch in [1, 32] {
        table.row(
            format!("both roles, packed, chains of 2, batch {batch}"),
            ("chains/s", "our split ring", Some(1.0)),
            &mut round_trip(Layout::Packed, batch),
            &mut round_trip(Layout::Modern, batch),
        );
    }
    for batch in [1, 32] {
        let shape = Shape { batch, ..shape };
        let (memory, other) = (split_memory(shape), split_memory(shape));
        table.row(
            format!("abstraction, split, chains of 2, batch {batch}"),
            ("chains/s", opponents::BY_HAND, Some(0.98)),
            &mut ours_split(&memory, shape),
            &mut opponents::by_hand(&other, shape),
        );
    }
    let reference = split_memory(shape);
    // As many descriptors in a burst as the reference has, where they fit.
    let burst = shape.batch * shape.chain;
    let sized = |size: u16| Shape { size, batch: shape.batch.min(size / shape.chain), ..shape };
    let sizes = [16, 64, 1024, 4096, 32768].map(|size| ("queue size", size.into(), sized(size)));
    let regions = [2, 4, 8, 16, 32, 64].map(|regions| ("regions", regions, Shape { regions, ..shape }));
    let linked = |chain: u16| Shape { chain, batch: (burst / chain).max(1), ..shape };
    let chains = [1, 4, 8, 16, 32, 64, 128].map(|chain| ("chain length", chain.into(), linked(chain)));
    for (what, value, other) in sizes.into_iter().chain(regions).chain(chains) {
        let memory = split_memory(other);
        table.row(
            format!("growth, split, {what} {value}"),
            ("descriptors/s", "queue size 256, 1 region, chains of 2", None),
            &mut descriptors(&memory, other),
            &mut descriptors(&reference, shape),
        );
    }
    table.row(
        "two threads, packed, 64 bytes copied".into(),
        ("operations/s", "our split ring", None),
        &mut two_threads(Layout::Packed),
        &mut two_threads(Layout::Modern),
    );
    table.rows
}

/// The rows so far.
struct Table<'p> {
    effort: Effort,
    only: &'p str,
    rows: Vec<Row>,
    progress: Box<dyn FnMut(&str) + 'p>,
}

impl Table<'_> {
    /// Measures a row: its name; unit, opponent and bar; ours, and the opponent's.
    fn row<'w>(
        &mut self,
        name: String,
        (unit, opponent, bar): (&'static str, &str, Option<f64>),
        ours: &mut Work<'w>,
        peer: &mut Work<'w>,
    ) {
        if !name.contains(self.only) {
            return;
        }
        (self.progress)(&name);
        let (ours, peer) = alternate(self.effort, ours, peer);
        self.rows.push(Row { name, ours, peer, peer_version: opponent.to_owned(), unit, ratio: ours / peer, bar });
    }
}
