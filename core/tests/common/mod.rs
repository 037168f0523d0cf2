//! What the tests of rings share: a ring in memory, a driver and a device on it, and a hand that writes it raw.
#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use polyvirt_core::memory::{FlatMemory, Pages};
use polyvirt_core::queue::{Blocked, Buffer, ByteOrder, DriverQueue, Layout, PopError, Queue, QueueConfig, QueueError};
use polyvirt_core::queue::{packed, split};
use polyvirt_core::transport::{Notify, TransportError, Virtqueue};

/// Where the ring is.
pub const RING: u64 = 0x10000;
/// Where there is memory for buffers.
pub const BUFFERS: u64 = 0x100_0000;
/// Where there is memory for indirect tables.
pub const TABLES: u64 = 0x200_0000;
/// No memory is here.
pub const HOLE: u64 = 0x800_0000;
/// Bytes of the memory for buffers and of that for tables.
pub const SPACE: u64 = 0x10000;

/// The split ring's layouts.
pub const SPLIT: [Layout; 3] = [Layout::Modern, Layout::Legacy(ByteOrder::Little), Layout::Legacy(ByteOrder::Big)];

/// Every layout, each with and without EVENT_IDX, without indirect descriptors.
pub fn every_shape(size: u16) -> impl Iterator<Item = Shape> {
    let layouts = SPLIT.into_iter().chain([Layout::Packed]);
    layouts.flat_map(move |layout| {
        [false, true].map(|event_idx| Shape { size, event_idx, indirect: false, in_order: false, layout })
    })
}

/// The chain, if there is one, of a queue that works.
pub fn popped<C>(found: Result<C, PopError>) -> Option<C> {
    match found {
        Ok(chain) => Some(chain),
        Err(PopError::Broken(reason)) => panic!("{reason}"),
        Err(PopError::Empty | PopError::Spent | PopError::Pending(_)) => None,
    }
}

/// What the queue is broken by, as [`Queue::pop`] says.
pub fn broken<C>(popped: Result<C, PopError>) -> Option<QueueError> {
    match popped.map(drop) {
        Err(PopError::Broken(reason)) => Some(reason),
        _ => None,
    }
}

/// What is wrong with a queue that cannot be taken into use.
pub fn refused<Q>(made: Result<Q, Blocked>) -> QueueError {
    match made.map(drop) {
        Err(Blocked::Broken(reason)) => reason,
        other => panic!("refused, not {other:?}"),
    }
}

/// A doorbell that counts.
#[derive(Clone, Default)]
pub struct Doorbell(Arc<AtomicUsize>);

impl Doorbell {
    /// How often it rang.
    pub fn rung(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Notify for Doorbell {
    fn notify(&mut self) -> Result<(), TransportError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// What kind of ring.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub size: u16,
    pub event_idx: bool,
    pub indirect: bool,
    pub in_order: bool,
    pub layout: Layout,
}

impl Shape {
    /// Offsets of the driver and the device area, and the end of the ring.
    fn areas(self) -> (u64, u64, u64) {
        match self.layout {
            Layout::Packed => {
                let driver = packed::layout::DESCRIPTOR_LEN * u64::from(self.size);
                (driver, driver + packed::layout::EVENT_LEN, driver + 2 * packed::layout::EVENT_LEN)
            }
            Layout::Modern | Layout::Legacy(_) => split::layout::legacy(self.size),
        }
    }

    /// The ring at [`RING`].
    pub fn config(self) -> QueueConfig {
        let (driver, device, _) = self.areas();
        QueueConfig {
            size: self.size,
            descriptors: RING,
            driver: RING + driver,
            device: RING + device,
            layout: self.layout,
            event_idx: self.event_idx,
            indirect: self.indirect,
            in_order: self.in_order,
        }
    }
}

/// Memory with a ring.
pub struct Memory {
    pub shape: Shape,
    pub map: Arc<FlatMemory>,
    ring: Pages,
    tables: Pages,
}

impl Memory {
    pub fn new(shape: Shape) -> Self {
        let ring = Pages::allocate(shape.areas().2 as usize);
        let tables = Pages::allocate(SPACE as usize);
        let buffers = Pages::allocate(SPACE as usize);
        let map = FlatMemory::new([(RING, ring.clone()), (BUFFERS, buffers), (TABLES, tables.clone())]);
        Self { shape, map: Arc::new(map), ring, tables }
    }

    /// The device's role on the ring.
    pub fn device(&self) -> Queue<Arc<FlatMemory>> {
        Queue::new(self.map.clone(), self.shape.config()).unwrap()
    }

    /// The driver's end of the ring, with `notify` for a doorbell.
    pub fn virtqueue<N>(&self, notify: N) -> Virtqueue<N> {
        let (driver, device, end) = self.shape.areas();
        let part = |from: u64, to: u64| self.ring.slice(from as usize, (to - from) as usize).unwrap();
        Virtqueue {
            config: self.shape.config(),
            // More than the ring: drivers allocate whole pages.
            descriptors: part(0, end),
            driver: part(driver, device),
            device: part(device, end),
            notify,
        }
    }

    /// The driver's role on the ring; indirect if that was negotiated.
    pub fn driver<T, N: Notify>(&self, notify: N) -> DriverQueue<T, N> {
        DriverQueue::new(self.virtqueue(notify)).unwrap().with_indirect(self.tables.clone(), TABLES)
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.map.pages(address, bytes.len()).unwrap().write(0, bytes).unwrap();
    }

    pub fn read<const LEN: usize>(&self, address: u64) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        self.map.pages(address, LEN).unwrap().read(0, &mut bytes).unwrap();
        bytes
    }
}

/// Both roles on one ring.
pub struct Rig {
    pub driver: DriverQueue<u64, Doorbell>,
    pub device: Queue<Arc<FlatMemory>>,
    pub memory: Memory,
    pub kicks: Doorbell,
}

impl Rig {
    pub fn new(shape: Shape) -> Self {
        let memory = Memory::new(shape);
        let kicks = Doorbell::default();
        Self { driver: memory.driver(kicks.clone()), device: memory.device(), memory, kicks }
    }

    /// The device takes and completes, in order, all that is available; how many.
    pub fn serve(&mut self) -> usize {
        let mut served = 0;
        loop {
            self.device.begin_burst();
            while let Some(chain) = popped(self.device.pop()) {
                self.device.complete(chain).unwrap();
                served += 1;
            }
            if !self.device.end_burst() {
                return served;
            }
        }
    }
}

/// Piece `number` of the memory for buffers, in pieces of `len` bytes; from the start again after the last.
pub fn buffer(number: u64, len: u32) -> Buffer {
    Buffer { address: BUFFERS + number * u64::from(len) % SPACE, len }
}

/// A hand that writes a split ring as it likes, by the offsets of the spec (2.7).
impl Memory {
    fn is_big(&self) -> bool {
        self.shape.layout == Layout::Legacy(ByteOrder::Big)
    }

    pub fn put16(&self, address: u64, value: u16) {
        self.write(address, &if self.is_big() { value.to_be_bytes() } else { value.to_le_bytes() });
    }

    pub fn put32(&self, address: u64, value: u32) {
        self.write(address, &if self.is_big() { value.to_be_bytes() } else { value.to_le_bytes() });
    }

    pub fn get16(&self, address: u64) -> u16 {
        let bytes = self.read(address);
        if self.is_big() { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) }
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn descriptor_at(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.write(at, &if self.is_big() { address.to_be_bytes() } else { address.to_le_bytes() });
        self.put32(at + 8, len);
        self.put16(at + 12, flags);
        self.put16(at + 14, next);
    }

    /// Writes descriptor `index` of the ring.
    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(RING, index, address, len, flags, next);
    }

    /// Makes `heads` available, from available index `from` on.
    pub fn available(&self, from: u16, heads: &[u16]) {
        let ring = self.shape.config().driver;
        let mut index = from;
        for &head in heads {
            self.put16(ring + 4 + 2 * u64::from(index % self.shape.size), head);
            index = index.wrapping_add(1);
        }
        self.put16(ring + 2, index);
    }

    /// Writes used element `slot` and sets the used index to `index`.
    pub fn used(&self, slot: u16, id: u32, len: u32, index: u16) {
        let ring = self.shape.config().device;
        self.put32(ring + 4 + 8 * u64::from(slot), id);
        self.put32(ring + 8 + 8 * u64::from(slot), len);
        self.put16(ring + 2, index);
    }
}
