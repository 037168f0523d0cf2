//! virtio-mmio, register by register: the device side under every access, the driver side before a device that lies.

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::time::Duration;

use polyvirt_core::device::{Device, Queues};
use polyvirt_core::hypervisor::{BusDevice, Cause, Guest, Host, HypervisorError, Interrupt, Share, WaitForInterrupt};
use polyvirt_core::memory::{Access, FlatMemory, GuestMemory, PAGE_SIZE, Pages};
use polyvirt_core::queue::{Buffer, DriverQueue, Layout, MAX_QUEUE_SIZE, QueueError};
use polyvirt_core::transport::{
    BlockingTransport, QueueSet, Transport, TransportError, driver_ok, initialize, read_config,
};
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio::{self, Place, Registers, registers::*};

const RAM: u64 = 0x4000_0000;
const PLACE: Place = Place { base: 0xd000_0000, line: 5 };
const BOTH: Access = Access::READ.union(Access::WRITE);

/// A machine with one device: what it serves, and what was done to it.
struct Machine {
    device: Mutex<Option<Box<dyn BusDevice>>>,
    /// Registers that read something else than the device says.
    lies: Mutex<BTreeMap<u64, u32>>,
    /// Whether the configuration changes whenever it is read.
    restless: Mutex<bool>,
    log: Mutex<Vec<Accessed>>,
    interrupts: Mutex<Vec<Cause>>,
    wakes: Mutex<usize>,
    memory: Arc<FlatMemory>,
    next: Mutex<u64>,
    shared: Mutex<BTreeMap<u64, Access>>,
}

#[derive(Clone, Debug, PartialEq)]
struct Accessed {
    write: bool,
    offset: u64,
    data: Vec<u8>,
}

impl Machine {
    /// A machine with a [`Toy`], attached as any host does it.
    fn new() -> Arc<Self> {
        let machine = Arc::new(Self {
            device: Mutex::default(),
            lies: Mutex::default(),
            restless: Mutex::default(),
            log: Mutex::default(),
            interrupts: Mutex::default(),
            wakes: Mutex::default(),
            memory: Arc::new(FlatMemory::new([(RAM, Pages::allocate(0x80000))])),
            next: Mutex::new(RAM),
            shared: Mutex::default(),
        });
        let mut host = Hosting(machine.clone());
        let memory = host.memory();
        mmio::attach(&mut host, memory, Box::new(Toy { config: [1, 2, 3, 4, 5, 6, 7, 8, 9], polls: 0 })).unwrap();
        machine
    }

    fn with_device<R>(&self, call: impl FnOnce(&mut dyn BusDevice) -> R) -> R {
        call(&mut **self.device.lock().unwrap().as_mut().unwrap())
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.with_device(|device| device.read(offset, &mut data));
        u32::from_le_bytes(data)
    }

    fn set(&self, offset: u64, value: u32) {
        self.with_device(|device| device.write(offset, &value.to_le_bytes()));
    }

    fn lie(&self, register: u64, value: u32) {
        self.lies.lock().unwrap().insert(register, value);
    }

    fn interrupts(&self) -> Vec<Cause> {
        mem::take(&mut self.interrupts.lock().unwrap())
    }

    fn log(&self) -> Vec<Accessed> {
        mem::take(&mut self.log.lock().unwrap())
    }

    fn wakes(&self) -> usize {
        *self.wakes.lock().unwrap()
    }

    fn shared(&self) -> Vec<Access> {
        self.shared.lock().unwrap().values().copied().collect()
    }
}

struct Hosting(Arc<Machine>);

impl Host for Hosting {
    type Memory = Arc<FlatMemory>;
    type Place = Place;

    fn memory(&self) -> Self::Memory {
        self.0.memory.clone()
    }
    fn place(&mut self, device_type: u32, queues: u16) -> Result<Place, HypervisorError> {
        assert_eq!((device_type, queues), (42, 2));
        Ok(PLACE)
    }
    fn interrupt(&self, place: &Place) -> Arc<dyn Interrupt> {
        assert_eq!(*place, PLACE);
        Arc::new(Line(self.0.clone()))
    }
    fn plug(&mut self, place: Place, mut device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        assert_eq!(place, PLACE);
        device.set_waker(Waker::from(Arc::new(Line(self.0.clone()))));
        *self.0.device.lock().unwrap() = Some(device);
        Ok(())
    }
}

struct Line(Arc<Machine>);

impl Interrupt for Line {
    fn raise(&self, cause: Cause) {
        self.0.interrupts.lock().unwrap().push(cause);
    }
}

impl Wake for Line {
    fn wake(self: Arc<Self>) {
        *self.0.wakes.lock().unwrap() += 1;
    }
}

impl Share for Machine {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        let mut next = self.next.lock().unwrap();
        let len = (len as u64).next_multiple_of(PAGE_SIZE);
        let pages = self.memory.pages(*next, len as usize).ok_or(HypervisorError::Exhausted("guest memory"))?;
        *next += len;
        Ok(pages)
    }
    fn share(&self, pages: &Pages, access: Access) -> Result<u64, HypervisorError> {
        let start = self.memory.pages(RAM, 1).unwrap().as_ptr().addr();
        let address = RAM + (pages.as_ptr().addr() - start) as u64;
        assert_eq!(self.shared.lock().unwrap().insert(address, access), None);
        Ok(address)
    }
    fn unshare(&self, address: u64) -> Result<(), HypervisorError> {
        let removed = self.shared.lock().unwrap().remove(&address);
        removed.map(|_| ()).ok_or(HypervisorError::InUse { address })
    }
}

impl Guest for Machine {
    type Place = Place;

    fn notify(&self, doorbell: u64, value: u32) -> Result<(), HypervisorError> {
        self.store(doorbell, &value.to_le_bytes())
    }
    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        Ok(line == PLACE.line && !self.interrupts().is_empty())
    }
    fn enumerate(&self) -> Result<Vec<Place>, HypervisorError> {
        Ok(vec![PLACE])
    }
}

impl WaitForInterrupt for Machine {
    fn wait(&self, _: &[u32], _: Duration) -> Result<bool, HypervisorError> {
        Ok(false)
    }
}

impl Registers for Machine {
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        let offset = address - PLACE.base;
        if offset >= CONFIG && *self.restless.lock().unwrap() {
            self.with_device(|device| device.poll());
        }
        self.with_device(|device| device.read(offset, data));
        if let Some(lie) = self.lies.lock().unwrap().get(&offset) {
            data.copy_from_slice(&lie.to_le_bytes());
        }
        self.log.lock().unwrap().push(Accessed { write: false, offset, data: data.to_vec() });
        Ok(())
    }
    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        let offset = address - PLACE.base;
        self.log.lock().unwrap().push(Accessed { write: true, offset, data: data.to_vec() });
        self.with_device(|device| device.write(offset, data));
        Ok(())
    }
}

/// Completes what it finds, with the readable bytes copied; from its second poll on it counts them in its configuration.
struct Toy {
    config: [u8; 9],
    polls: u8,
}

impl<M: GuestMemory> Device<M> for Toy {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> Features {
        Features::bit(0) | Features::bit(100)
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[4, 300]
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config[offset..offset + data.len()].copy_from_slice(data);
    }
    fn activate(&mut self, _: Features, _: Waker) {}
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        let queue = queues.get(index).unwrap();
        while let Ok(mut chain) = queue.pop() {
            let mut bytes = vec![0; chain.readable_len().min(chain.writable_len()) as usize];
            chain.read(0, &mut bytes).unwrap();
            chain.write(0, &bytes).unwrap();
            queue.complete(chain).unwrap();
        }
    }
    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        self.polls += 1;
        if self.polls > 1 {
            self.config[0] = self.polls;
            queues.config_changed();
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {
        self.polls = 0;
    }
}

fn connect(machine: &Arc<Machine>) -> mmio::Driver<Machine> {
    mmio::Driver::connect(machine.clone(), PLACE).unwrap()
}

/// A driver that has come to DRIVER_OK, with queue 0.
fn running(machine: &Arc<Machine>, features: Features) -> (mmio::Driver<Machine>, DriverQueue<u8>) {
    let mut driver = connect(machine);
    initialize(&mut driver, features).unwrap();
    let queue = DriverQueue::new(driver.find_vq(0, None).unwrap()).unwrap();
    driver_ok(&mut driver).unwrap();
    machine.interrupts();
    (driver, queue)
}

fn exchange(machine: &Machine, queue: &mut DriverQueue<u8>) {
    let pages = machine.allocate(64).unwrap();
    let address = machine.share(&pages, BOTH).unwrap();
    pages.write(0, b"a buffer").unwrap();
    let (readable, writable) = (Buffer { address, len: 8 }, Buffer { address: address + 32, len: 16 });
    queue.add_buf(&[readable], &[writable], 7).unwrap();
    queue.kick().unwrap();
    assert_eq!(queue.get_buf(), Ok(Some((7, 8))));
    let mut echo = [0; 8];
    pages.read(32, &mut echo).unwrap();
    assert_eq!(&echo, b"a buffer");
    machine.unshare(address).unwrap();
}

#[test]
fn the_identity_registers_read_what_the_table_says() {
    let machine = Machine::new();
    assert_eq!(machine.get(0x000), 0x7472_6976);
    assert_eq!(machine.get(0x004), 2);
    assert_eq!(machine.get(0x008), 42);
    assert_eq!(machine.get(0x00c).to_le_bytes(), *b"poly");
    machine.set(0x0ac, 1);
    for half in [0x0b0, 0x0b4, 0x0b8, 0x0bc] {
        assert_eq!(machine.get(half), u32::MAX, "{half:#x}: there is no shared memory region");
    }
}

#[test]
fn feature_words_are_selected_and_there_are_none_beyond_the_fourth() {
    let machine = Machine::new();
    let word = |selector| {
        machine.set(DEVICE_FEATURES_SEL, selector);
        machine.get(DEVICE_FEATURES)
    };
    assert_eq!(word(0) & 0x00ff_ffff, 1);
    assert_eq!(word(1) & 0x101, 0x101, "VIRTIO_F_VERSION_1, VIRTIO_F_RING_RESET");
    assert_eq!((word(3), word(4), word(u32::MAX)), (1 << 4, 0, 0));

    let accept = |selector, value| {
        machine.set(DRIVER_FEATURES_SEL, selector);
        machine.set(DRIVER_FEATURES, value);
    };
    accept(u32::MAX, u32::MAX);
    accept(0, 1);
    accept(3, 1 << 4);
    accept(1, 1);
    machine.set(STATUS, 11);
    assert_eq!(machine.get(STATUS), 11, "what was written to a word that does not exist is not accepted");
    assert_eq!(machine.get(DRIVER_FEATURES), 0, "write-only");
}

#[test]
fn queue_registers_are_of_the_selected_queue() {
    let machine = Machine::new();
    let max = |selector| {
        machine.set(QUEUE_SEL, selector);
        machine.get(QUEUE_SIZE_MAX)
    };
    assert_eq!([0, 1, 2, 0xffff, 0x1_0000, 0x1_0001, u32::MAX].map(max), [4, 300, 0, 0, 0, 0, 0]);
    machine.set(QUEUE_READY, 1);
    assert_eq!(machine.get(QUEUE_READY), 0, "there is no such queue");
    machine.set(QUEUE_SEL, 1);
    machine.set(QUEUE_READY, 2);
    assert_eq!(machine.get(QUEUE_READY), 0, "only 1 enables");
    machine.set(QUEUE_READY, 1);
    assert_eq!(machine.get(QUEUE_READY), 1);
    machine.set(QUEUE_SEL, 0);
    assert_eq!(machine.get(QUEUE_READY), 0);
    machine.set(QUEUE_SEL, 1);
    machine.set(QUEUE_READY, 0);
    assert_eq!(machine.get(QUEUE_READY), 0);
}

#[test]
fn a_queue_resets_with_queue_ready_and_with_queue_reset_if_negotiated() {
    for (features, register, value, ready) in [
        (Features::RING_RESET, QUEUE_RESET, 1, 0),
        (Features::empty(), QUEUE_RESET, 1, 1),
        (Features::RING_RESET, QUEUE_RESET, 2, 1),
        (Features::empty(), QUEUE_READY, 0, 0),
    ] {
        let machine = Machine::new();
        let (_driver, _queue) = running(&machine, features);
        machine.set(QUEUE_SEL, 0);
        assert_eq!((machine.get(QUEUE_READY), machine.get(QUEUE_RESET)), (1, 0));
        machine.set(register, value);
        assert_eq!((machine.get(QUEUE_READY), machine.get(QUEUE_RESET)), (ready, 0), "{features:?} {register:#x}");
    }
}

#[test]
fn interrupt_status_says_what_happened_and_only_ack_clears_it() {
    let machine = Machine::new();
    let (_driver, mut queue) = running(&machine, Features::empty());
    assert_eq!(machine.get(INTERRUPT_STATUS), 0);
    exchange(&machine, &mut queue);
    assert_eq!((machine.get(INTERRUPT_STATUS), machine.interrupts()), (1, vec![Cause::Queue(0)]));
    machine.with_device(|device| device.poll());
    assert_eq!((machine.get(INTERRUPT_STATUS), machine.interrupts()), (3, vec![Cause::Config]));
    machine.set(INTERRUPT_ACK, 1);
    assert_eq!(machine.get(INTERRUPT_STATUS), 2);
    assert_eq!(machine.interrupts(), [Cause::Config], "what is left interrupts again");
    machine.set(INTERRUPT_ACK, !2);
    assert_eq!((machine.get(INTERRUPT_STATUS), machine.interrupts()), (2, vec![Cause::Config]));
    machine.set(INTERRUPT_ACK, 2);
    assert_eq!((machine.get(INTERRUPT_STATUS), machine.interrupts()), (0, vec![]));
}

#[test]
fn reset_clears_interrupts_ready_bits_and_selectors() {
    let machine = Machine::new();
    let (_driver, mut queue) = running(&machine, Features::empty());
    exchange(&machine, &mut queue);
    machine.set(QUEUE_SEL, 1);
    machine.set(STATUS, 0x100);
    assert_eq!((machine.get(STATUS), machine.get(INTERRUPT_STATUS)), (15, 1), "only 0 resets");
    machine.set(STATUS, 0);
    assert_eq!((machine.get(STATUS), machine.get(INTERRUPT_STATUS)), (0, 0));
    assert_eq!((machine.get(QUEUE_SIZE_MAX), machine.get(QUEUE_READY)), (4, 0));
}

#[test]
fn the_doorbell_serves_at_once_and_what_is_left_when_the_host_polls() {
    let machine = Machine::new();
    let (_driver, mut queue) = running(&machine, Features::empty());
    let pages = machine.allocate(64).unwrap();
    let address = machine.share(&pages, Access::READ).unwrap();
    for absent in [1, 2, 0x1_0000] {
        machine.set(QUEUE_NOTIFY, absent);
    }
    assert_eq!(machine.wakes(), 0);
    // The write serves as many as the queue is long; whether there are more is the host's to find out.
    (0..4).for_each(|token| queue.add_buf(&[Buffer { address, len: 1 }], &[], token).unwrap());
    assert!(queue.kick().unwrap());
    (0..4).for_each(|token| assert_eq!(queue.get_buf(), Ok(Some((token, 0)))));
    assert_eq!(machine.wakes(), 1);
    queue.add_buf(&[Buffer { address, len: 1 }], &[], 9).unwrap();
    assert!(!queue.kick().unwrap(), "no kick is wanted meanwhile");
    assert!(!machine.with_device(|device| device.poll()));
    assert_eq!(queue.get_buf(), Ok(Some((9, 0))));
}

#[test]
fn any_access_is_answered() {
    let machine = Machine::new();
    let (_driver, _queue) = running(&machine, Features::empty());
    let edges = [u64::MAX, u64::MAX - 3, 1 << 32, u64::from(u32::MAX)];
    for offset in (0..0x120).chain(edges) {
        for len in [0, 1, 2, 3, 4, 5, 8, 16, 4096] {
            let mut data = vec![0xaa; len];
            machine.with_device(|device| device.read(offset, &mut data));
            if offset < CONFIG && (len != 4 || offset % 4 != 0) {
                assert!(data.iter().all(|&byte| byte == 0), "{len} bytes at {offset:#x}: {data:?}");
            }
            if len != 4 {
                machine.with_device(|device| device.write(offset, &data));
            }
        }
    }
    for offset in (0..CONFIG).filter(|offset| offset % 4 != 0) {
        machine.set(offset, u32::MAX);
    }
    assert_eq!((machine.get(MAGIC_VALUE), machine.get(STATUS)), (MAGIC, 15), "no register was written");
    for offset in (0..CONFIG).step_by(4) {
        for value in [u32::MAX, 0x8000_0000, 1, 0] {
            machine.set(offset, value);
        }
    }
    assert_eq!((machine.get(MAGIC_VALUE), machine.get(STATUS)), (MAGIC, 0));
}

#[test]
fn configuration_is_read_and_written_at_any_width() {
    let machine = Machine::new();
    let read = |offset, len| {
        let mut data = vec![0xaa; len];
        machine.with_device(|device| device.read(CONFIG + offset, &mut data));
        data
    };
    assert_eq!(read(0, 1), [1]);
    assert_eq!(read(3, 2), [4, 5]);
    assert_eq!(read(1, 8), [2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(read(7, 4), [8, 9, 0, 0]);
    assert_eq!(read(0xeff, 4), [0; 4]);
    let generation = machine.get(CONFIG_GENERATION);
    machine.with_device(|device| device.write(CONFIG + 1, &[0x22, 0x33]));
    machine.with_device(|device| device.write(CONFIG + 8, &[0, 0]));
    assert_eq!(read(0, 4), [1, 0x22, 0x33, 4]);
    assert_eq!(read(8, 1), [9], "a write that reaches beyond the end writes nothing");
    assert_ne!(machine.get(CONFIG_GENERATION), generation);
}

#[test]
fn a_driver_comes_up_exchanges_buffers_waits_and_lets_go() {
    for features in [
        Features::empty(),
        Features::EVENT_IDX | Features::INDIRECT_DESC,
        Features::RING_PACKED,
        Features::RING_PACKED | Features::EVENT_IDX,
    ] {
        let machine = Machine::new();
        let (mut driver, mut queue) = running(&machine, features);
        let packed = features.contains(Features::RING_PACKED);
        let expected = if packed { [BOTH, Access::READ, Access::WRITE] } else { [Access::READ, Access::READ, BOTH] };
        assert_eq!(machine.shared(), expected, "descriptors, driver area, device area");
        exchange(&machine, &mut queue);
        let interrupts = driver.wait(Duration::ZERO).unwrap();
        assert_eq!((interrupts.queues, interrupts.config), (QueueSet::ALL, false));
        assert_eq!(machine.get(INTERRUPT_STATUS), 0, "acknowledged");
        assert!(matches!(driver.wait(Duration::ZERO), Err(TransportError::Watchdog(..))));
        driver.reset().unwrap();
        assert_eq!((machine.shared(), machine.get(STATUS)), (vec![], 0));
    }
}

#[test]
fn the_driver_touches_registers_as_it_must() {
    let machine = Machine::new();
    let (mut driver, mut queue) = running(&machine, Features::RING_RESET);
    exchange(&machine, &mut queue);
    driver.wait(Duration::ZERO).unwrap();
    driver.reset_vq(0).unwrap();
    driver.find_vq(0, Some(2)).unwrap();
    driver.find_vq(1, None).unwrap();
    driver.reset().unwrap();

    let read_only = [MAGIC_VALUE, VERSION, DEVICE_ID, VENDOR_ID, DEVICE_FEATURES, QUEUE_SIZE_MAX, INTERRUPT_STATUS];
    let write_only = [DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_SEL, QUEUE_SIZE, QUEUE_NOTIFY];
    let (addresses, shared_memory) = (QUEUE_DESC_LOW..=QUEUE_DEVICE_HIGH, SHM_SEL..=SHM_BASE_HIGH);
    let (mut queue, mut ready, mut selected, mut acknowledged) = (None, BTreeMap::new(), [false; 2], 0);
    let log = machine.log();
    let first: Vec<_> = log[..3].iter().map(|access| (access.write, access.offset)).collect();
    assert_eq!(first, [(false, MAGIC_VALUE), (false, VERSION), (false, DEVICE_ID)]);
    for Accessed { write, offset, data } in log {
        assert!(offset < CONFIG && data.len() == 4 && offset % 4 == 0, "{offset:#x}");
        assert!(!(write && read_only.contains(&offset)), "{offset:#x} is read-only");
        assert!(write || !(write_only.contains(&offset) || addresses.contains(&offset)), "{offset:#x} is write-only");
        assert!(!shared_memory.contains(&offset), "{offset:#x} is for drivers that expect shared memory");
        let value = u32::from_le_bytes(data.try_into().unwrap());
        let is_ready = ready.get(&queue) == Some(&true);
        match offset {
            DEVICE_FEATURES_SEL => selected[0] = true,
            DEVICE_FEATURES => assert!(mem::take(&mut selected[0])),
            DRIVER_FEATURES_SEL => selected[1] = true,
            DRIVER_FEATURES => assert!(mem::take(&mut selected[1])),
            QUEUE_SEL => queue = Some(value),
            QUEUE_READY if write => _ = ready.insert(queue, value == 1),
            QUEUE_RESET if write => _ = ready.insert(queue, false),
            STATUS if write && value == 0 => ready.clear(),
            QUEUE_SIZE => assert!(value <= 300 && !is_ready),
            INTERRUPT_ACK => acknowledged += value,
            at if addresses.contains(&at) => assert!(!is_ready, "{at:#x}"),
            _ => {}
        }
    }
    assert_eq!(acknowledged, 1, "used buffers, once");
}

#[test]
fn undefined_interrupt_bits_are_neither_told_nor_acknowledged() {
    let machine = Machine::new();
    let (mut driver, _queue) = running(&machine, Features::empty());
    for (status, config, last) in [
        (0xffff_fffe, true, Accessed { write: true, offset: INTERRUPT_ACK, data: vec![2, 0, 0, 0] }),
        (0xffff_fffc, false, Accessed { write: false, offset: INTERRUPT_STATUS, data: vec![0xfc, 0xff, 0xff, 0xff] }),
    ] {
        machine.lie(INTERRUPT_STATUS, status);
        machine.interrupts.lock().unwrap().push(Cause::Config);
        let interrupts = driver.take_interrupts().unwrap();
        assert_eq!((interrupts.queues, interrupts.config), (QueueSet::NONE, config));
        assert_eq!(machine.log().last(), Some(&last));
    }
}

#[test]
fn what_is_not_a_device_is_left_alone() {
    for (register, lie, reads) in [(MAGIC_VALUE, 0, 1), (VERSION, 1, 2), (VERSION, 3, 2), (DEVICE_ID, 0, 3)] {
        let machine = Machine::new();
        machine.lie(register, lie);
        let error = mmio::Driver::connect(machine.clone(), PLACE).map(|_| ()).unwrap_err();
        assert!(matches!(error, TransportError::NotADevice { found, .. } if found == u64::from(lie)), "{error}");
        let log = machine.log();
        assert_eq!(log.len(), reads, "nothing else is accessed");
        assert!(log.iter().all(|access| !access.write));
    }
}

#[test]
fn configuration_fields_are_accessed_by_their_width() {
    let machine = Machine::new();
    let mut driver = connect(&machine);
    for (offset, len, widths) in [
        (0, 1, &[1][..]),
        (2, 2, &[2]),
        (4, 4, &[4]),
        (0, 8, &[4, 4]),
        (0, 6, &[1; 6]),
        (1, 2, &[1; 2]),
        (2, 4, &[1; 4]),
        (5, 0, &[]),
    ] {
        machine.log();
        let mut data = vec![0; len];
        driver.read_config(offset, &mut data).unwrap();
        assert_eq!(data, (1..=9).skip(offset as usize).take(len).collect::<Vec<_>>());
        driver.write_config(offset, &data).unwrap();
        let (writes, reads): (Vec<_>, Vec<_>) = machine.log().into_iter().partition(|access| access.write);
        for log in [reads, writes] {
            assert_eq!(log.iter().map(|access| access.data.len()).collect::<Vec<_>>(), widths);
            assert!(log.iter().all(|access| access.offset % access.data.len() as u64 == 0));
        }
    }
}

#[test]
fn a_configuration_that_never_settles_is_given_up() {
    let machine = Machine::new();
    let (mut driver, _queue) = running(&machine, Features::empty());
    assert_eq!(read_config(&mut driver, 0, &mut [0; 4]), Ok(()));
    *machine.restless.lock().unwrap() = true;
    assert_eq!(read_config(&mut driver, 0, &mut [0; 4]), Err(TransportError::ConfigUnstable));
}

#[test]
fn a_device_that_never_resets_is_given_up_and_keeps_the_memory() {
    let machine = Machine::new();
    let (mut driver, _queue) = running(&machine, Features::RING_RESET);
    machine.lie(QUEUE_RESET, 1);
    assert!(matches!(driver.reset_vq(0), Err(TransportError::Watchdog(..))));
    assert_eq!(machine.shared().len(), 3);
    machine.lie(STATUS, 15);
    assert!(matches!(driver.reset(), Err(TransportError::Watchdog(..))));
    assert_eq!(machine.shared().len(), 3);
    drop(driver);
    assert_eq!(machine.shared().len(), 3, "the device may still write there");
}

#[test]
fn a_reset_in_progress_is_polled_and_one_that_was_not_begun_takes_no_memory_back() {
    let machine = Machine::new();
    let (mut driver, _queue) = running(&machine, Features::RING_RESET);
    assert_eq!(
        (driver.poll_vq_reset(0), driver.poll_vq_reset(1), driver.poll_reset()),
        (Ok(false), Ok(true), Ok(false))
    );
    assert_eq!(machine.shared().len(), 3, "the device uses it");

    driver.begin_vq_reset(0).unwrap();
    machine.lie(QUEUE_RESET, 1);
    assert_eq!((driver.poll_vq_reset(0), machine.shared().len()), (Ok(false), 3));
    machine.lies.lock().unwrap().clear();
    assert_eq!((driver.poll_vq_reset(0), machine.shared().len()), (Ok(true), 0));
    assert_eq!(driver.poll_vq_reset(0), Ok(true), "it is still");

    driver.find_vq(0, None).unwrap();
    assert_eq!((driver.poll_vq_reset(0), machine.shared().len()), (Ok(false), 3));
    driver.begin_reset().unwrap();
    machine.lie(STATUS, 15);
    assert_eq!((driver.poll_reset(), machine.shared().len()), (Ok(false), 3));
    machine.lies.lock().unwrap().clear();
    assert_eq!((driver.poll_reset(), machine.shared().len()), (Ok(true), 0));
}

#[test]
fn a_driver_that_is_dropped_takes_the_rings_away_from_the_device_first() {
    let machine = Machine::new();
    let (driver, _queue) = running(&machine, Features::empty());
    drop(driver);
    assert_eq!((machine.shared(), machine.get(STATUS)), (vec![], 0));
}

#[test]
fn queue_sizes_are_checked_whatever_the_device_says() {
    let machine = Machine::new();
    let mut driver = connect(&machine);
    initialize(&mut driver, Features::empty()).unwrap();
    assert!(matches!(driver.find_vq(2, None), Err(TransportError::NoQueue(2))));
    for size in [0, 3, 8, u16::MAX] {
        let refused = driver.find_vq(0, Some(size)).map(|_| ()).unwrap_err();
        assert!(matches!(refused, TransportError::Queue { index: 0, reason: QueueError::Size { .. } }), "{size}");
    }
    assert_eq!(driver.find_vq(1, None).unwrap().config.size, 256, "the largest power of two up to 300");
    assert_eq!(driver.queue_max_size(1), Ok(300));
    let again = driver.find_vq(1, None).map(|_| ()).unwrap_err();
    assert!(matches!(again, TransportError::NotADevice { .. }), "in use: {again}");
    machine.lie(QUEUE_SIZE_MAX, u32::MAX);
    assert_eq!(driver.queue_max_size(0), Ok(MAX_QUEUE_SIZE));
    let exhausted = driver.find_vq(0, None).map(|_| ()).unwrap_err();
    assert!(matches!(exhausted, TransportError::Hypervisor(HypervisorError::Exhausted(_))), "{exhausted}");
    assert_eq!(machine.shared().len(), 3, "only queue 1: what was shared for queue 0 is taken back");
}

#[test]
fn a_packed_queue_may_have_any_size() {
    let machine = Machine::new();
    let mut driver = connect(&machine);
    initialize(&mut driver, Features::RING_PACKED).unwrap();
    let config = driver.find_vq(1, None).unwrap().config;
    assert_eq!((config.size, config.layout), (300, Layout::Packed));
}

#[test]
fn a_queue_is_reset_alone_only_if_that_was_negotiated() {
    let machine = Machine::new();
    let (mut driver, _queue) = running(&machine, Features::empty());
    machine.log();
    assert!(matches!(driver.reset_vq(0), Err(TransportError::Unsupported(_))));
    assert_eq!(machine.log(), []);

    let machine = Machine::new();
    let (mut driver, _queue) = running(&machine, Features::RING_RESET);
    driver.reset_vq(0).unwrap();
    assert_eq!(machine.shared(), []);
    let mut queue = DriverQueue::new(driver.find_vq(0, Some(2)).unwrap()).unwrap();
    exchange(&machine, &mut queue);
    assert_eq!(driver.status(), Ok(Status::from_bits_retain(15)));
}

#[test]
fn features_that_the_device_does_not_keep_are_an_error() {
    let machine = Machine::new();
    let mut driver = connect(&machine);
    machine.lie(DEVICE_FEATURES, 0);
    assert!(matches!(initialize(&mut driver, Features::empty()), Err(TransportError::FeaturesMissing(_))));
    // Every word offers everything, which the device then refuses.
    machine.lie(DEVICE_FEATURES, u32::MAX);
    assert!(matches!(initialize(&mut driver, Features::all()), Err(TransportError::FeaturesRefused(_))));
    assert_eq!(machine.get(STATUS), 0x83, "FAILED");
}
