//! The rings: device role, driver role, both formats, against the peers and against a loop written by hand.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use polyvirt_core::memory::{FlatMemory, Owner, Pages, Words};
use polyvirt_core::queue::split::layout;
use polyvirt_core::queue::{Buffer, DriverQueue, Layout, Queue, QueueConfig};
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
            while let Some(mut chain) = queue.pop().unwrap() {
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
            while let Some(mut chain) = device.pop().unwrap() {
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

/// Runs all rows; `progress` is told the name of each before it runs.
pub fn run(effort: Effort, mut progress: impl FnMut(&str)) -> Vec<Row> {
    let mut rows = Vec::new();
    for regions in [1, 4] {
        for batch in [1, 32] {
            let shape = Shape { size: 256, chain: 2, batch, regions, event_idx: true };
            let name = format!("device role, split, chains of 2, batch {batch}, {regions} region(s)");
            progress(&name);
            let memory = split_memory(shape);
            let (ours, peer) = alternate(effort, &mut ours_split(&memory, shape), &mut opponents::virtio_queue(shape));
            rows.push(Row {
                name,
                ours,
                peer,
                peer_version: opponents::VIRTIO_QUEUE.to_owned(),
                unit: "chains/s",
                ratio: ours / peer,
                bar: Some(4.0),
            });
        }
    }
    for batch in [1, 32] {
        let shape = Shape { size: 256, chain: 2, batch, regions: 1, event_idx: true };
        let name = format!("abstraction, split, chains of 2, batch {batch}");
        progress(&name);
        let memory = split_memory(shape);
        let other = split_memory(shape);
        let (ours, peer) = alternate(effort, &mut ours_split(&memory, shape), &mut opponents::by_hand(&other, shape));
        rows.push(Row {
            name,
            ours,
            peer,
            peer_version: opponents::BY_HAND.to_owned(),
            unit: "chains/s",
            ratio: ours / peer,
            bar: Some(0.98),
        });
    }
    for batch in [1, 32] {
        let name = format!("both roles, packed, chains of 2, batch {batch}");
        progress(&name);
        let (ours, peer) =
            alternate(effort, &mut round_trip(Layout::Packed, batch), &mut round_trip(Layout::Modern, batch));
        rows.push(Row {
            name,
            ours,
            peer,
            peer_version: "our split ring".to_owned(),
            unit: "chains/s",
            ratio: ours / peer,
            bar: Some(1.0),
        });
    }
    for batch in [1, 32] {
        let name = format!("driver role, split, add and get, batch {batch}");
        progress(&name);
        let (ours, peer) = alternate(effort, &mut ours_driver(batch), &mut opponents::virtio_drivers(batch));
        rows.push(Row {
            name,
            ours,
            peer,
            peer_version: opponents::VIRTIO_DRIVERS.to_owned(),
            unit: "buffers/s",
            ratio: ours / peer,
            bar: Some(2.0),
        });
    }
    rows
}
