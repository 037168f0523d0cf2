//! A disk of several queues, of which one is reset while the backend works on requests of all of them.

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
use polyvirt_devices::blk::{self, Backend, Completion, Request};

const QUEUES: u16 = 3;
/// Bytes of memory that each queue has: three areas and buffers, a page each.
const EACH: u64 = 0x4000;
const SIZE: u16 = 8;
const STATUS_NONE: u8 = 0xff;

/// A disk of zeroes that finishes what it is asked for when it is told to.
#[derive(Clone, Default)]
struct Held(Arc<Mutex<(VecDeque<u64>, VecDeque<Completion>)>>);

impl Held {
    /// Finishes everything; how much it was.
    fn release(&self) -> usize {
        let (held, done) = &mut *self.0.lock().unwrap();
        let count = held.len();
        done.extend(held.drain(..).map(|id| Completion { id, result: Ok(vec![0xd1; 512]) }));
        count
    }
}

impl Backend for Held {
    fn capacity(&self) -> u64 {
        64
    }
    fn submit(&mut self, id: u64, request: Request) {
        assert!(matches!(request, Request::Read { len: 512, .. }));
        self.0.lock().unwrap().0.push_back(id);
    }
    fn complete(&mut self) -> Option<Completion> {
        self.0.lock().unwrap().1.pop_front()
    }
    fn set_waker(&mut self, _waker: Waker) {}
}

struct Silent;

impl Notify for Silent {
    fn notify(&mut self) -> Result<(), TransportError> {
        Ok(())
    }
}

impl Interrupt for Silent {
    fn raise(&self, _cause: Cause) {}
}

/// A driver of one queue: each request reads a sector.
struct Driver {
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

    /// Reads a sector into the slot `number`, 0 or 1.
    fn read(&mut self, number: u16) {
        let at = 0x400 * usize::from(number);
        self.buffers.fill(at, 16, 0).unwrap();
        self.buffers.fill(at + 16, 513, STATUS_NONE).unwrap();
        let [header, data] =
            [(0, 16), (16, 513)].map(|(offset, len)| Buffer { address: self.base + (at + offset) as u64, len });
        self.queue.add_buf(&[header], &[data], number).unwrap();
        self.queue.kick().unwrap();
    }

    /// What is in the slot: the first byte of the data, and the status.
    fn slot(&self, number: u16) -> [u8; 2] {
        let mut bytes = [0; 513];
        self.buffers.read(0x400 * usize::from(number) + 16, &mut bytes).unwrap();
        [bytes[0], bytes[512]]
    }

    fn used(&mut self) -> Vec<u16> {
        std::iter::from_fn(|| self.queue.get_buf().unwrap()).map(|(number, _)| number).collect()
    }
}

#[test]
fn a_queue_that_is_reset_loses_its_requests_and_no_other_does() {
    for (layout, format) in [(Layout::Modern, Features::empty()), (Layout::Packed, Features::RING_PACKED)] {
        let ram = Arc::new(FlatMemory::new([(0, Pages::allocate(usize::from(QUEUES) * EACH as usize))]));
        let backend = Held::default();
        let options = blk::Options { queues: QUEUES, queue_size: SIZE, ..blk::Options::default() };
        let device: Box<dyn Device<Arc<FlatMemory>>> = Box::new(blk::Device::new(backend.clone(), options));
        let mut disk = VirtioDevice::new(device, ram.clone(), Arc::new(Silent), Interface::Modern)
            .with_features(Features::RING_RESET | Features::RING_PACKED);
        let begun = Status::ACKNOWLEDGE | Status::DRIVER;
        disk.set_status(begun);
        disk.set_driver_features(Features::VERSION_1 | Features::RING_RESET | blk::wire::MQ | format);
        disk.set_status(begun | Status::FEATURES_OK);
        let mut drivers: Vec<_> = (0..QUEUES).map(|index| Driver::enable(&mut disk, &ram, index, layout)).collect();
        disk.set_status(begun | Status::FEATURES_OK | Status::DRIVER_OK);
        assert!(disk.is_running());

        // Two requests in each queue, all with the backend.
        for (index, driver) in drivers.iter_mut().enumerate() {
            driver.read(0);
            driver.read(1);
            disk.kick(index as u16);
        }
        disk.reset_queue(1);
        assert!(!disk.queue_enabled(1));
        assert_eq!(backend.release(), 6, "{layout:?}");
        while disk.poll() {}
        assert_eq!(drivers[0].used(), [0, 1], "{layout:?}");
        assert_eq!(drivers[2].used(), [0, 1], "{layout:?}");
        assert_eq!([drivers[0].slot(1), drivers[2].slot(0)], [[0xd1, 0]; 2]);
        assert_eq!(drivers[1].used(), [], "{layout:?}");
        assert_eq!([drivers[1].slot(0), drivers[1].slot(1)], [[STATUS_NONE; 2]; 2], "nothing arrives any more");

        // The others go on while it is enabled again, and it begins anew.
        drivers[0].read(0);
        disk.kick(0);
        drivers[1] = Driver::enable(&mut disk, &ram, 1, layout);
        drivers[1].read(0);
        disk.kick(1);
        assert_eq!(backend.release(), 2, "{layout:?}");
        while disk.poll() {}
        assert_eq!([drivers[0].used(), drivers[1].used()], [[0], [0]], "{layout:?}");
        assert_eq!(drivers[1].slot(0), [0xd1, 0]);
        assert!(disk.needs_reset().is_none() && disk.is_running());
    }
}
