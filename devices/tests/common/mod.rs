//! A disk whose backend finishes what it is told to, and a driver of any of its queues.
#![allow(dead_code, reason = "each test uses a part")]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::task::Waker;

use polyvirt_core::device::Device;
use polyvirt_core::hypervisor::{Cause, Interrupt};
use polyvirt_core::memory::{FlatMemory, Pages};
use polyvirt_core::queue::{Buffer, DriverQueue, Layout, QueueConfig};
use polyvirt_core::state::{Area, Interface, VirtioDevice};

use polyvirt_core::transport::{Notify, TransportError, Virtqueue};
use polyvirt_core::{Features, Status};
use polyvirt_devices::blk::{self, Backend, Completion, Request, wire};

/// Bytes of memory that each queue has: three areas and buffers, a page each.
const EACH: u64 = 0x4000;
/// Entries of a queue.
pub(crate) const SIZE: u16 = 8;
/// What a status byte is before the device writes it.
pub(crate) const STATUS_NONE: u8 = 0xff;
/// Sectors of the disk.
pub(crate) const SECTORS: u64 = 1 << 20;

/// A disk full of 0xd1 that finishes what it is asked for when it is told to.
#[derive(Clone, Default)]
pub(crate) struct Held(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    asked: VecDeque<(u64, Request)>,
    done: VecDeque<Completion>,
    cancelled: Vec<u64>,
}

impl Held {
    /// Finishes everything; how much it was.
    pub(crate) fn release(&self) -> usize {
        let mut count = 0;
        while self.release_one() {
            count += 1;
        }
        count
    }

    /// Finishes the oldest, if there is one.
    pub(crate) fn release_one(&self) -> bool {
        let kept = &mut *self.0.lock().unwrap();
        let Some((id, request)) = kept.asked.pop_front() else { return false };
        let data = if let Request::Read { len, .. } = request { vec![0xd1; len] } else { Vec::new() };
        kept.done.push_back(Completion { id, result: Ok(data) });
        true
    }

    /// What it was asked for and has not finished.
    pub(crate) fn asked(&self) -> Vec<Request> {
        self.0.lock().unwrap().asked.iter().map(|(_, request)| request.clone()).collect()
    }

    /// How much of what it has nobody wants any more.
    pub(crate) fn cancelled(&self) -> usize {
        let kept = &*self.0.lock().unwrap();
        kept.asked.iter().filter(|(id, _)| kept.cancelled.contains(id)).count()
    }
}

impl Backend for Held {
    fn capacity(&self) -> u64 {
        SECTORS
    }
    fn submit(&mut self, id: u64, request: Request) {
        self.0.lock().unwrap().asked.push_back((id, request));
    }
    fn cancel(&mut self, id: u64) {
        self.0.lock().unwrap().cancelled.push(id);
    }
    fn complete(&mut self) -> Option<Completion> {
        self.0.lock().unwrap().done.pop_front()
    }
    fn set_waker(&mut self, _waker: Waker) {}
}

pub(crate) struct Silent;

impl Notify for Silent {
    fn notify(&mut self) -> Result<(), TransportError> {
        Ok(())
    }
}

impl Interrupt for Silent {
    fn raise(&self, _cause: Cause) {}
}

/// The device, its memory and its backend.
pub(crate) struct Rig {
    pub(crate) disk: VirtioDevice<Arc<FlatMemory>>,
    pub(crate) drivers: Vec<Driver>,
    pub(crate) backend: Held,
    ram: Arc<FlatMemory>,
    layout: Layout,
}

impl Rig {
    /// A disk with `queues` queues that runs, its driver having accepted `wanted`.
    pub(crate) fn new(queues: u16, layout: Layout, wanted: Features) -> Self {
        let ram = Arc::new(FlatMemory::new([(0, Pages::allocate(usize::from(queues) * EACH as usize))]));
        let backend = Held::default();
        let options = blk::Options { queues, queue_size: SIZE, ..blk::Options::default() };
        let device: Box<dyn Device<Arc<FlatMemory>>> = Box::new(blk::Device::new(backend.clone(), options));
        let disk = VirtioDevice::new(device, ram.clone(), Arc::new(Silent), Interface::Modern)
            .with_features(Features::RING_RESET | Features::RING_PACKED);
        let mut rig = Self { disk, drivers: Vec::new(), backend, ram, layout };
        rig.bring_up(queues, wanted);
        rig
    }

    /// Takes the device into use, from reset on.
    pub(crate) fn bring_up(&mut self, queues: u16, wanted: Features) {
        let begun = Status::ACKNOWLEDGE | Status::DRIVER;
        let format = if self.layout == Layout::Packed { Features::RING_PACKED } else { Features::empty() };
        self.disk.set_status(begun);
        self.disk.set_driver_features(Features::VERSION_1 | Features::RING_RESET | format | wanted);
        self.disk.set_status(begun | Status::FEATURES_OK);
        assert!(self.disk.status().contains(Status::FEATURES_OK));
        self.drivers.clear();
        for index in 0..queues {
            let driver = Driver::enable(&mut self.disk, &self.ram, index, self.layout);
            self.drivers.push(driver);
        }
        self.disk.set_status(begun | Status::FEATURES_OK | Status::DRIVER_OK);
        assert!(self.disk.is_running());
    }

    /// Takes queue `index`, which was reset, into use again.
    pub(crate) fn enable(&mut self, index: u16) {
        self.drivers[usize::from(index)] = Driver::enable(&mut self.disk, &self.ram, index, self.layout);
    }

    /// Lets the device see what its backend has finished.
    pub(crate) fn poll(&mut self) {
        while self.disk.poll() {}
    }
}

/// A driver of one queue.
pub(crate) struct Driver {
    queue: DriverQueue<u16, Silent>,
    buffers: Pages,
    base: u64,
}

impl Driver {
    /// Sets up queue `index` of `disk` and takes it into use.
    fn enable(disk: &mut VirtioDevice<Arc<FlatMemory>>, ram: &FlatMemory, index: u16, layout: Layout) -> Self {
        let base = u64::from(index) * EACH;
        let [descriptors, driver, device, buffers] =
            [0, 1, 2, 3].map(|page| ram.pages(base + 0x1000 * page, 0x1000).unwrap());
        for page in [&descriptors, &driver, &device] {
            page.fill(0, 0x1000, 0).unwrap();
        }
        let config = QueueConfig {
            size: SIZE,
            descriptors: base,
            driver: base + 0x1000,
            device: base + 0x2000,
            layout,
            ..QueueConfig::default()
        };
        let queue = DriverQueue::new(Virtqueue { config, descriptors, driver, device, notify: Silent }).unwrap();
        disk.set_queue_size(index, SIZE.into());
        for (area, address) in
            [(Area::Descriptors, config.descriptors), (Area::Driver, config.driver), (Area::Device, config.device)]
        {
            disk.set_queue_address(index, area, address);
        }
        disk.enable_queue(index);
        Self { queue, buffers, base: base + 0x3000 }
    }

    /// Makes a request in the slot `number`, 0 or 1: `out` goes to the device, `room` bytes and a status come from it.
    pub(crate) fn ask(&mut self, number: u16, (kind, sector): (u32, u64), out: &[u8], room: u32) {
        let at = 0x600 * usize::from(number);
        let header = wire::Header { kind, sector }.to_bytes();
        self.buffers.write(at, &header).unwrap();
        self.buffers.write(at + 16, out).unwrap();
        self.buffers.fill(at + 0x300, room as usize + 1, STATUS_NONE).unwrap();
        let piece = |offset: usize, len: u32| Buffer { address: self.base + (at + offset) as u64, len };
        let readable = [piece(0, 16 + out.len() as u32)];
        self.queue.add_buf(&readable, &[piece(0x300, room + 1)], number).unwrap();
        self.queue.kick().unwrap();
    }

    /// Reads a sector into the slot `number`.
    pub(crate) fn read(&mut self, number: u16) {
        self.ask(number, (wire::IN, 0), &[], 512);
    }

    /// What is in the slot `number` for a read of a sector: the first byte of the data, and the status.
    pub(crate) fn slot(&self, number: u16) -> [u8; 2] {
        [self.byte(number, 0), self.byte(number, 512)]
    }

    /// What the device wrote in slot `number`.
    pub(crate) fn byte(&self, number: u16, at: usize) -> u8 {
        let mut byte = [0];
        self.buffers.read(0x600 * usize::from(number) + 0x300 + at, &mut byte).unwrap();
        byte[0]
    }

    pub(crate) fn used(&mut self) -> Vec<u16> {
        std::iter::from_fn(|| self.queue.get_buf().unwrap()).map(|(number, _)| number).collect()
    }
}
