//! Both sides against each other and against wrong ones, over a bus that is a function call.
extern crate std;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::task::Waker;
use core::time::Duration;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use polyvirt_core::device::{Device, Queues};
use polyvirt_core::features::Features;
use polyvirt_core::hypervisor::{BusDevice, Cause, Guest, Host, HypervisorError, Interrupt, Share, WaitForInterrupt};
use polyvirt_core::memory::{Access, FlatMemory, Pages};
use polyvirt_core::queue::{Buffer, DriverQueue, QueueError};
use polyvirt_core::status::Status;
use polyvirt_core::transport::{self, BlockingTransport, Interrupts, QueueSet, Transport, TransportError};

use super::registers::{DeviceDescriptor, HostRing, PAGE, QueueEntry, RING_PAGES};
use super::{Driver, GuestPlace, HostPlace, attach};

const RAM: usize = 16 * PAGE;
const NOW: Duration = Duration::ZERO;
const READY: Status = Status::ACKNOWLEDGE.union(Status::DRIVER).union(Status::DRIVER_OK);

/// Host and guest, and the bus between them.
#[derive(Clone)]
struct Machine {
    ram: Pages,
    above: Pages,
    memory: Arc<FlatMemory>,
    devices: Arc<Mutex<Vec<Plugged>>>,
    pending: Arc<AtomicU64>,
    allocated: Arc<Mutex<usize>>,
}

type Plugged = (HostPlace, Box<dyn BusDevice>);

impl Machine {
    fn new() -> Self {
        let all = Pages::allocate(RAM + 32 * PAGE);
        Self {
            ram: all.slice(0, RAM).unwrap(),
            above: all.slice(RAM, 32 * PAGE).unwrap(),
            memory: Arc::new(FlatMemory::new([(0, all)])),
            devices: Arc::default(),
            pending: Arc::default(),
            allocated: Arc::default(),
        }
    }

    /// Attaches a toy and meets it.
    fn with_toy(&mut self) -> (Driver<Self>, Arc<Record>) {
        let record = Arc::<Record>::default();
        attach(self, Arc::clone(&self.memory), Toy::new(&record)).unwrap();
        let place = self.enumerate().unwrap().pop().unwrap();
        (Driver::connect(Arc::new(self.clone()), place).unwrap(), record)
    }

    fn page(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.above.read(offset, &mut bytes).unwrap();
        bytes
    }

    fn poll(&self) {
        self.devices.lock().unwrap().iter_mut().for_each(|(_, device)| while device.poll() {});
    }
}

impl Host for Machine {
    type Memory = Arc<FlatMemory>;
    type Place = HostPlace;

    fn memory(&self) -> Self::Memory {
        Arc::clone(&self.memory)
    }

    fn place(&mut self, _: u32, queues: u16) -> Result<HostPlace, HypervisorError> {
        let devices = self.devices.lock().unwrap();
        let before: usize = devices.iter().map(|(place, _)| place.rings.len()).sum();
        let offset = devices.last().map_or(0, |(place, _)| place.offset + place.len);
        let ring = |index| {
            let start = (1 + index * RING_PAGES) * PAGE;
            let pages = self.above.slice(start, RING_PAGES * PAGE).unwrap();
            HostRing { address: (RAM + start) as u64, pages, line: 1 + index as u16 }
        };
        let rings = (before..before + usize::from(queues)).map(ring).collect();
        Ok(HostPlace { page: self.above.slice(0, PAGE).unwrap(), offset, len: 0, rings })
    }

    fn interrupt(&self, place: &HostPlace) -> Arc<dyn Interrupt> {
        Arc::new(Lines(Arc::clone(&self.pending), place.rings.iter().map(|ring| ring.line).collect()))
    }

    fn plug(&mut self, place: HostPlace, device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        self.devices.lock().unwrap().push((place, device));
        Ok(())
    }
}

struct Lines(Arc<AtomicU64>, Vec<u16>);

impl Interrupt for Lines {
    fn raise(&self, cause: Cause) {
        let index = if let Cause::Queue(index) = cause { usize::from(index) } else { 0 };
        self.0.fetch_or(1 << self.1[index], Ordering::SeqCst);
    }
}

impl Share for Machine {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        let len = len.next_multiple_of(PAGE);
        let mut allocated = self.allocated.lock().unwrap();
        let pages = self.ram.slice(*allocated, len).ok_or(HypervisorError::Exhausted("RAM"))?;
        *allocated += len;
        Ok(pages)
    }
    fn share(&self, pages: &Pages, _: Access) -> Result<u64, HypervisorError> {
        Ok((pages.as_ptr().addr() - self.ram.as_ptr().addr()) as u64)
    }
    fn unshare(&self, _: u64) -> Result<(), HypervisorError> {
        Ok(())
    }
}

impl Guest for Machine {
    type Place = GuestPlace;

    fn notify(&self, doorbell: u64, _: u32) -> Result<(), HypervisorError> {
        for (place, device) in self.devices.lock().unwrap().iter_mut() {
            if doorbell == (RAM + place.offset) as u64 {
                device.write(0, &[]);
            }
            if let Some(queue) = place.rings.iter().position(|ring| ring.address == doorbell) {
                while device.kick(queue as u16) {}
            }
        }
        Ok(())
    }
    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        Ok(self.pending.fetch_and(!(1 << line), Ordering::SeqCst) & 1 << line != 0)
    }
    fn enumerate(&self) -> Result<Vec<GuestPlace>, HypervisorError> {
        let place = |offset| GuestPlace { memory: self.above.clone(), address: RAM as u64, offset };
        Ok(super::registers::descriptors(&self.above).unwrap().into_iter().map(place).collect())
    }
}

impl WaitForInterrupt for Machine {
    fn wait(&self, lines: &[u32], _: Duration) -> Result<bool, HypervisorError> {
        Ok(lines.iter().any(|line| self.pending.load(Ordering::SeqCst) & 1 << line != 0))
    }
}

/// What happened to a toy.
#[derive(Default)]
struct Record {
    written: Mutex<Vec<(usize, Vec<u8>)>>,
    accepted: Mutex<Option<Features>>,
    resets: AtomicU64,
    /// The next poll changes the configuration.
    news: AtomicBool,
}

/// Answers a buffer with its bytes in reverse. Its configuration: four bytes that the driver may write, a byte that
/// counts news, a byte that is constant.
struct Toy {
    record: Arc<Record>,
    device_type: u32,
    config: Vec<u8>,
}

impl Toy {
    fn new(record: &Arc<Record>) -> Box<Self> {
        Box::new(Self { record: Arc::clone(record), device_type: 42, config: vec![1, 2, 3, 4, 0, 0xcc] })
    }
}

impl Device<Arc<FlatMemory>> for Toy {
    fn device_type(&self) -> u32 {
        self.device_type
    }
    fn features(&self) -> Features {
        Features::bit(0) | Features::bit(9) | Features::bit(55)
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[12, 1024, 0]
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.record.written.lock().unwrap().push((offset, data.into()));
        if offset == 0 {
            self.config[..4].copy_from_slice(&data[..4]);
        }
    }
    fn activate(&mut self, features: Features, _: Waker) {
        *self.record.accepted.lock().unwrap() = Some(features);
    }
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, Arc<FlatMemory>>) {
        let Some(queue) = queues.get(index) else { return };
        while let Ok(mut chain) = queue.pop() {
            let mut bytes = vec![0; chain.readable_len() as usize];
            chain.read(0, &mut bytes).unwrap();
            bytes.reverse();
            chain.write(0, &bytes).unwrap();
            queue.complete(chain).unwrap();
        }
    }
    fn poll(&mut self, queues: &mut Queues<'_, Arc<FlatMemory>>) {
        if self.record.news.swap(false, Ordering::SeqCst) {
            self.config[4] += 1;
            queues.config_changed();
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {
        self.record.resets.fetch_add(1, Ordering::SeqCst);
    }
}

/// Sends `bytes` through `queue` and returns what comes back.
fn round_trip(driver: &mut Driver<Machine>, index: u16, queue: &mut DriverQueue<()>, bytes: &[u8]) -> Vec<u8> {
    let share = driver.share();
    let pages = share.allocate(PAGE).unwrap();
    let address = share.share(&pages, Access::READ | Access::WRITE).unwrap();
    pages.write(0, bytes).unwrap();
    let len = bytes.len() as u32;
    queue.add_buf(&[Buffer { address, len }], &[Buffer { address: address + 2048, len }], ()).unwrap();
    assert!(queue.kick().unwrap());
    assert_eq!(driver.wait(NOW), Ok(Interrupts { queues: QueueSet::of(index), config: false }));
    assert_eq!(queue.get_buf().unwrap(), Some(((), len)));
    assert!(queue.enable_cb());
    let mut back = vec![0; bytes.len()];
    pages.read(2048, &mut back).unwrap();
    back
}

#[test]
fn the_device_page_is_as_the_launcher_of_2_6_25_lays_it_out() {
    let mut machine = Machine::new();
    machine.with_toy();
    machine.with_toy();
    let frame = (RAM / PAGE) as u8;
    let mut expected = vec![42, 3, 4, 6, 0];
    expected.extend([8, 0, 1, 0, frame + 1, 0, 0, 0]); // 12 is no power of two: 8
    expected.extend([128, 0, 2, 0, frame + 3, 0, 0, 0]);
    expected.extend([0, 0, 3, 0, frame + 5, 0, 0, 0]);
    expected.extend([0b0000_0001, 0b0000_0010, 0, 0b0011_1000]); // bits 0, 9, 27, 28, 29; not 55, nor VERSION_1
    expected.extend([0; 4]);
    expected.extend([1, 2, 3, 4, 0, 0xcc]);
    assert_eq!(machine.page(0, 43), expected);
    (expected[7], expected[15], expected[23]) = (4, 5, 6);
    (expected[9], expected[17], expected[25]) = (frame + 7, frame + 9, frame + 11);
    assert_eq!(machine.page(43, 43), expected, "right after the first");
    assert!(machine.page(86, PAGE - 86).iter().all(|&byte| byte == 0));
}

#[test]
fn a_driver_negotiates_and_its_buffers_come_back() {
    let mut machine = Machine::new();
    let (mut driver, record) = machine.with_toy();
    assert_eq!((driver.device_type(), driver.is_legacy()), (42, true));
    let wanted = Features::bit(9) | Features::EVENT_IDX | Features::VERSION_1;
    let accepted = transport::initialize(&mut driver, wanted).unwrap();
    assert_eq!(accepted, Features::bit(9) | Features::EVENT_IDX);
    assert_eq!([0, 1, 2, 3].map(|index| driver.queue_max_size(index).unwrap()), [8, 128, 0, 0]);
    for (size, right) in [(None, true), (Some(8), true), (Some(4), false), (Some(16), false)] {
        assert_eq!(driver.find_vq(0, size).is_ok(), right, "{size:?}");
    }
    assert_eq!(driver.find_vq(2, None).map(drop), Err(TransportError::NoQueue(2)));
    assert_eq!(driver.find_vq(3, None).map(drop), Err(TransportError::NoQueue(3)));
    assert_eq!(driver.reset_vq(0), Err(TransportError::Unsupported("reset of a single queue")));
    let mut queues = [0, 1].map(|index| DriverQueue::new(driver.find_vq(index, None).unwrap()).unwrap());
    transport::driver_ok(&mut driver).unwrap();
    assert_eq!(*record.accepted.lock().unwrap(), Some(accepted));
    for turn in 0..40 {
        assert_eq!(round_trip(&mut driver, turn as u16 % 2, &mut queues[turn % 2], b"lguest"), b"tseugl");
        *machine.allocated.lock().unwrap() = 0;
    }
    assert_eq!(driver.wait(NOW), Err(TransportError::Watchdog(NOW, "an interrupt")));
}

#[test]
fn a_reset_clears_status_features_and_rings_and_the_device_works_again() {
    let mut machine = Machine::new();
    let (mut driver, record) = machine.with_toy();
    for resets in 1..3 {
        transport::initialize(&mut driver, Features::bit(0)).unwrap();
        assert_eq!(record.resets.load(Ordering::SeqCst), 2 * resets - 1);
        let mut queue = DriverQueue::new(driver.find_vq(1, None).unwrap()).unwrap();
        transport::driver_ok(&mut driver).unwrap();
        assert_eq!(round_trip(&mut driver, 1, &mut queue, b"ab"), b"ba");
        assert_eq!(driver.status(), Ok(READY));
        driver.reset().unwrap();
        assert_eq!(driver.status(), Ok(Status::empty()));
        assert_eq!(machine.page(33, 4), [0; 4], "the accepted features");
        assert!(machine.page(3 * PAGE, 2 * PAGE).iter().all(|&byte| byte == 0), "the ring");
    }
}

#[test]
fn a_status_without_a_notify_is_taken_over_by_the_next_kick() {
    let mut machine = Machine::new();
    let (mut driver, record) = machine.with_toy();
    let mut queue = DriverQueue::<()>::new(driver.find_vq(1, None).unwrap()).unwrap();
    let pages = machine.allocate(PAGE).unwrap();
    let address = machine.share(&pages, Access::READ | Access::WRITE).unwrap();
    queue.add_buf(&[Buffer { address, len: 1 }], &[Buffer { address, len: 1 }], ()).unwrap();
    queue.kick().unwrap();
    assert!(queue.get_buf().unwrap().is_none(), "status 0");
    // As a guest of 2.6.25: only memory is written, the status before the features.
    machine.above.write(DeviceDescriptor::STATUS, &[READY.bits()]).unwrap();
    machine.above.write(33, &[1, 0, 0, 0]).unwrap();
    machine.notify((RAM + 3 * PAGE) as u64, 0).unwrap();
    assert_eq!(*record.accepted.lock().unwrap(), Some(Features::bit(0)));
    assert_eq!(queue.get_buf().unwrap(), Some(((), 1)));
    // And its status of 0 is no reset until it says so.
    machine.above.write(DeviceDescriptor::STATUS, &[0]).unwrap();
    machine.notify((RAM + 3 * PAGE) as u64, 0).unwrap();
    assert_eq!(record.resets.load(Ordering::SeqCst), 0);
    machine.notify(RAM as u64, 0).unwrap();
    assert_eq!(record.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn features_that_were_not_offered_do_not_count() {
    let mut machine = Machine::new();
    let (mut driver, record) = machine.with_toy();
    transport::initialize(&mut driver, Features::empty()).unwrap();
    for beyond in [Features::VERSION_1, Features::bit(55)] {
        assert_eq!(driver.set_driver_features(beyond), Err(TransportError::FeaturesRefused(beyond)), "no room for it");
    }
    driver.set_driver_features(Features::bit(9) | Features::bit(10)).unwrap();
    transport::driver_ok(&mut driver).unwrap();
    assert_eq!(*record.accepted.lock().unwrap(), Some(Features::bit(9)));
    machine.above.write(33, &[0xff; 4]).unwrap();
    machine.notify(RAM as u64, 0).unwrap();
    assert_eq!(*record.accepted.lock().unwrap(), Some(Features::bit(9)), "too late");
}

#[test]
fn configuration_writes_arrive_as_words_and_read_only_bytes_come_back() {
    let mut machine = Machine::new();
    let (mut driver, record) = machine.with_toy();
    let early = driver.write_config(0, &[9]);
    assert_eq!(early, Err(TransportError::Unsupported("configuration write before ACKNOWLEDGE")));
    transport::initialize(&mut driver, Features::empty()).unwrap();
    driver.write_config(1, &[7, 8]).unwrap();
    driver.write_config(1, &[7, 8]).unwrap();
    driver.write_config(5, &[0]).unwrap();
    assert_eq!(
        *record.written.lock().unwrap(),
        [(0, vec![1, 7, 8, 4]), (4, vec![0, 0])],
        "what is the same is no write"
    );
    let mut config = [0; 6];
    transport::read_config(&mut driver, 0, &mut config).unwrap();
    assert_eq!(config, [1, 7, 8, 4, 0, 0xcc]);
    for (offset, len) in [(0, 7), (6, 1), (u32::MAX, 1)] {
        assert!(driver.read_config(offset, &mut vec![0; len]).is_err(), "{offset}+{len}");
        assert!(driver.write_config(offset, &vec![0; len]).is_err(), "{offset}+{len}");
    }
    assert_eq!(driver.read_config(6, &mut []), Ok(()));
}

#[test]
fn a_change_of_the_configuration_is_in_the_page_before_its_interrupt() {
    let mut machine = Machine::new();
    let (mut driver, record) = machine.with_toy();
    transport::initialize(&mut driver, Features::empty()).unwrap();
    transport::driver_ok(&mut driver).unwrap();
    machine.poll();
    assert!(driver.wait(NOW).is_err(), "no news");
    record.news.store(true, Ordering::SeqCst);
    machine.poll();
    assert_eq!(driver.wait(NOW), Ok(Interrupts { queues: QueueSet::of(0), config: true }));
    let mut news = [0];
    driver.read_config(4, &mut news).unwrap();
    assert_eq!(news, [1]);
    assert!(driver.wait(NOW).is_err(), "told once");
}

#[test]
fn a_ring_that_the_driver_breaks_shows_in_the_status_until_a_reset() {
    let mut machine = Machine::new();
    let (mut driver, _record) = machine.with_toy();
    transport::initialize(&mut driver, Features::empty()).unwrap();
    let mut virtqueue = driver.find_vq(1, None).unwrap();
    transport::driver_ok(&mut driver).unwrap();
    virtqueue.driver.write(2, &129u16.to_le_bytes()).unwrap();
    virtqueue.notify.notify().unwrap();
    assert_eq!(driver.wait(NOW), Ok(Interrupts { queues: QueueSet::of(0), config: true }));
    assert_eq!(driver.status(), Ok(READY | Status::DEVICE_NEEDS_RESET));
    // Not the driver's to clear.
    driver.set_status(READY).unwrap();
    assert_eq!(driver.status(), Ok(READY | Status::DEVICE_NEEDS_RESET));
    driver.reset().unwrap();
    assert_eq!(driver.status(), Ok(Status::empty()));
    transport::initialize(&mut driver, Features::empty()).unwrap();
    let mut queue = DriverQueue::new(driver.find_vq(1, None).unwrap()).unwrap();
    transport::driver_ok(&mut driver).unwrap();
    assert_eq!(round_trip(&mut driver, 1, &mut queue, b"ab"), b"ba");
}

#[test]
fn what_the_guest_does_to_the_rest_of_the_page_changes_nothing_for_the_device() {
    let mut machine = Machine::new();
    let (mut driver, _record) = machine.with_toy();
    transport::initialize(&mut driver, Features::empty()).unwrap();
    let mut queue = DriverQueue::new(driver.find_vq(1, None).unwrap()).unwrap();
    transport::driver_ok(&mut driver).unwrap();
    machine.above.fill(0, 4, 0xff).unwrap();
    machine.above.fill(5, 28, 0xff).unwrap();
    assert_eq!(round_trip(&mut driver, 1, &mut queue, b"ab"), b"ba");
    machine.above.write(DeviceDescriptor::STATUS, &[0xff]).unwrap();
    machine.notify(RAM as u64, 0).unwrap();
    let status = driver.status().unwrap();
    assert!(status.contains(Status::FAILED) && !status.contains(Status::DEVICE_NEEDS_RESET), "{status:?}");
    machine.devices.lock().unwrap().iter_mut().for_each(|(_, device)| {
        let mut bytes = [1; 3];
        device.read(u64::MAX, &mut bytes);
        assert_eq!(bytes, [0; 3]);
        device.write(1, &[1]);
        assert!(!device.kick(u16::MAX));
    });
}

#[test]
fn a_device_that_does_not_fit_a_descriptor_is_refused() {
    let mut machine = Machine::new();
    let (memory, record) = (machine.memory(), Arc::<Record>::default());
    for (device_type, config) in [(0, 0), (256, 0), (1 << 16 | 1, 0), (1, 256)] {
        let mut toy = Toy::new(&record);
        (toy.device_type, toy.config) = (device_type, vec![0; config]);
        let refused = attach(&mut machine, memory.clone(), toy);
        assert!(matches!(refused, Err(HypervisorError::Refused { call: "attach", .. })), "{device_type} {config}");
    }
    assert!(machine.enumerate().unwrap().is_empty());
    let mut toy = Toy::new(&record);
    (toy.device_type, toy.config) = (255, vec![7; 255]);
    attach(&mut machine, memory.clone(), toy).unwrap();
}

#[test]
fn a_driver_believes_no_place_that_the_host_cannot_mean() {
    let mut machine = Machine::new();
    machine.with_toy();
    let place = machine.enumerate().unwrap().remove(0);
    let connect = |offset| Driver::connect(Arc::new(machine.clone()), GuestPlace { offset, ..place.clone() });
    for offset in [100, PAGE - 4, usize::MAX] {
        assert!(matches!(connect(offset), Err(TransportError::NotADevice { .. })), "{offset}");
    }
    let wrong = |entry: QueueEntry| {
        machine.above.write(DeviceDescriptor::HEADER, &entry.to_bytes()).unwrap();
        connect(0).and_then(|mut driver| driver.find_vq(0, None)).map(drop)
    };
    let right = QueueEntry { size: 8, line: 1, frame: (RAM / PAGE + 1) as u32 };
    assert_eq!(wrong(right), Ok(()));
    assert!(matches!(wrong(QueueEntry { line: 64, ..right }), Err(TransportError::NotADevice { found: 64, .. })));
    for size in [7, 256, u16::MAX] {
        let reason = QueueError::Size { size: size.into(), max: size };
        assert_eq!(wrong(QueueEntry { size, ..right }), Err(TransportError::Queue { index: 0, reason }));
    }
    for frame in [0, (RAM / PAGE) as u32 - 1, (RAM / PAGE) as u32 + 31, u32::MAX] {
        assert!(matches!(wrong(QueueEntry { frame, ..right }), Err(TransportError::NotADevice { .. })), "{frame}");
    }
}
