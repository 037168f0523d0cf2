//! A device and a driver that know no Xen, over grants, event channels and xenstore.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use polyvirt_core::device::{Device, Queues};
use polyvirt_core::hypervisor::{Guest as _, Host as _, HypervisorError, Share};
use polyvirt_core::memory::{Access, GuestMemory, Lease, MemoryError};
use polyvirt_core::queue::{Buffer, Chain, DriverQueue};
use polyvirt_core::shared::Shared;
use polyvirt_core::transport::{
    BlockingTransport, Interrupts, QueueSet, Transport, TransportError, driver_ok, initialize, resume, suspend,
};
use polyvirt_core::{Features, Status};
use polyvirt_hypervisors::xen::{self, Guest, Host};
use polyvirt_transports::xenbus::{self, Backend, Domain, Driver};

const WATCHDOG: Duration = Duration::from_secs(60);
const RAM: usize = 1 << 20;
const BOTH: Access = Access::READ.union(Access::WRITE);
const SIZE: u16 = 16;
/// Bytes of a request; its answer is as long.
const LEN: u32 = 24;

/// Sends back what it gets, reversed: on queue 0 at once, on queue 1 by its waker. While it is told to hold back, it
/// keeps what it gets.
struct Mirror<M: GuestMemory> {
    hold: Arc<AtomicBool>,
    waker: Waker,
    kept: Vec<(u16, Chain<M::Lease>)>,
    config: [u8; 4],
}

impl<M: GuestMemory> Mirror<M> {
    fn new(hold: &Arc<AtomicBool>) -> Box<Self> {
        Box::new(Self { hold: hold.clone(), waker: Waker::noop().clone(), kept: Vec::new(), config: *b"abcd" })
    }
}

fn answer<L: Lease>(chain: &mut Chain<L>) {
    let mut bytes = vec![0; chain.readable_len() as usize];
    chain.read(0, &mut bytes).unwrap();
    bytes.reverse();
    chain.write(0, &bytes).unwrap();
}

impl<M: GuestMemory<Lease: Send> + Send> Device<M> for Mirror<M> {
    fn device_type(&self) -> u32 {
        0x3f
    }
    fn features(&self) -> Features {
        Features::bit(3)
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[SIZE, SIZE]
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config[offset..offset + data.len()].copy_from_slice(data);
        self.waker.wake_by_ref();
    }
    fn activate(&mut self, _: Features, waker: Waker) {
        self.waker = waker;
    }
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        let Some(queue) = queues.get(index) else { return };
        while let Ok(mut chain) = queue.pop() {
            if index == 1 || self.hold.load(Ordering::SeqCst) {
                self.kept.push((index, chain));
                self.waker.wake_by_ref();
            } else {
                answer(&mut chain);
                queue.complete(chain).unwrap();
            }
        }
    }
    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        if self.config == *b"ring" {
            self.config = *b"rung";
            queues.config_changed();
        }
        if self.hold.load(Ordering::SeqCst) {
            return;
        }
        for (index, mut chain) in self.kept.drain(..) {
            answer(&mut chain);
            queues.get(index).unwrap().complete(chain).unwrap();
        }
    }
    fn reset_queue(&mut self, index: u16) {
        self.kept.retain(|(of, _)| *of != index);
    }
    fn reset(&mut self) {
        self.kept.clear();
    }
}

struct Machine {
    host: Host,
    guest: Arc<Guest>,
    backend: Backend,
    hold: Arc<AtomicBool>,
}

fn machine() -> Machine {
    let (mut host, guest) = xen::start(RAM).unwrap();
    let hold = Arc::default();
    let memory = host.memory();
    let backend = xenbus::attach(&mut host, memory, Mirror::new(&hold)).unwrap();
    Machine { host, guest: Arc::new(guest), backend, hold }
}

fn connect(guest: &Arc<Guest>) -> Driver<Guest> {
    Driver::connect(guest.clone(), guest.enumerate().unwrap().pop().unwrap()).unwrap()
}

/// Requests and their answers in shared memory.
struct Requests {
    memory: Shared,
    open: BTreeMap<u32, Vec<u8>>,
}

impl Requests {
    fn new(guest: &Arc<Guest>) -> Self {
        let share: Arc<dyn Share> = guest.clone();
        Self { memory: Shared::new(&share, usize::from(SIZE) * 64, BOTH).unwrap(), open: BTreeMap::new() }
    }

    fn send(&mut self, queue: &mut DriverQueue<u32>, number: u32) {
        let bytes: Vec<u8> = (0..LEN).map(|at| (number * 7 + at) as u8).collect();
        let slot = number % u32::from(SIZE) * 64;
        self.memory.pages().write(slot as usize, &bytes).unwrap();
        let [from, to] = [0, 32].map(|at| Buffer { address: self.memory.address() + u64::from(slot + at), len: LEN });
        queue.add_buf(&[from], &[to], number).unwrap();
        assert!(self.open.insert(number, bytes).is_none());
    }

    /// Takes what came back, and compares it.
    fn receive(&mut self, queue: &mut DriverQueue<u32>) {
        while let Some((number, len)) = queue.get_buf().unwrap() {
            let mut bytes = vec![0; LEN as usize];
            self.memory.pages().read((number % u32::from(SIZE) * 64 + 32) as usize, &mut bytes).unwrap();
            bytes.reverse();
            assert_eq!((len, Some(bytes)), (LEN, self.open.remove(&number)), "request {number}");
        }
    }

    fn receive_all(&mut self, driver: &mut Driver<Guest>, queue: &mut DriverQueue<u32>) {
        loop {
            self.receive(queue);
            if self.open.is_empty() {
                return;
            }
            if queue.enable_cb() {
                driver.wait(WATCHDOG).unwrap();
            }
        }
    }

    fn exchange(&mut self, driver: &mut Driver<Guest>, queue: &mut DriverQueue<u32>, count: u32) {
        for number in 0..count {
            if queue.free() < 2 {
                self.receive_all(driver, queue);
            }
            self.send(queue, number);
            queue.kick().unwrap();
        }
        self.receive_all(driver, queue);
    }
}

fn setup(driver: &mut Driver<Guest>, features: Features, index: u16) -> DriverQueue<u32> {
    assert!(initialize(driver, features).unwrap().contains(features));
    let queue = DriverQueue::new(driver.find_vq(index, None).unwrap()).unwrap();
    driver_ok(driver).unwrap();
    queue
}

#[test]
fn every_request_comes_back_with_its_bytes_whatever_was_negotiated() {
    for features in [
        Features::bit(3),
        Features::EVENT_IDX,
        Features::EVENT_IDX | Features::INDIRECT_DESC,
        Features::RING_PACKED,
        Features::RING_PACKED | Features::EVENT_IDX,
    ] {
        for index in 0..2 {
            let machine = machine();
            let mut driver = connect(&machine.guest);
            assert_eq!(driver.device_type(), 0x3f);
            let mut requests = Requests::new(&machine.guest);
            let mut queue = setup(&mut driver, features, index);
            requests.exchange(&mut driver, &mut queue, 200);
        }
    }
}

#[test]
fn an_interrupt_names_its_queue() {
    let machine = machine();
    let mut driver = connect(&machine.guest);
    let mut requests = Requests::new(&machine.guest);
    initialize(&mut driver, Features::empty()).unwrap();
    let mut queues = [0, 1].map(|index| DriverQueue::new(driver.find_vq(index, None).unwrap()).unwrap());
    driver_ok(&mut driver).unwrap();
    for turn in 0..20 {
        let index = turn % 2;
        let queue = &mut queues[index];
        requests.send(queue, turn as u32);
        queue.kick().unwrap();
        let came = driver.wait(WATCHDOG);
        assert_eq!(came, Ok(Interrupts { queues: QueueSet::of(index as u16), config: false }));
        requests.receive(queue);
        assert!(queue.enable_cb() && requests.open.is_empty());
    }
}

#[test]
fn a_backend_that_restarts_loses_no_request() {
    for index in 0..2 {
        let machine = machine();
        let mut driver = connect(&machine.guest);
        let mut requests = Requests::new(&machine.guest);
        let mut queue = setup(&mut driver, Features::EVENT_IDX, index);
        requests.exchange(&mut driver, &mut queue, 3);
        for restart in 1..=3 {
            machine.hold.store(true, Ordering::SeqCst);
            (0..5).for_each(|number| requests.send(&mut queue, restart * 100 + number));
            queue.kick().unwrap();
            machine.backend.close();
            while !driver.status().unwrap().contains(Status::DEVICE_NEEDS_RESET) {
                driver.wait(WATCHDOG).unwrap();
            }
            assert_eq!(driver.set_status(Status::ACKNOWLEDGE), Err(TransportError::Closed));
            requests.receive(&mut queue);
            assert_eq!(requests.open.len(), 5, "held back, so not answered");
            machine.hold.store(false, Ordering::SeqCst);

            initialize(&mut driver, Features::EVENT_IDX).unwrap();
            queue.restart(driver.find_vq(index, None).unwrap()).unwrap();
            assert_eq!(queue.in_flight(), 5);
            driver_ok(&mut driver).unwrap();
            queue.kick().unwrap();
            requests.receive_all(&mut driver, &mut queue);
            requests.exchange(&mut driver, &mut queue, 40);
        }
    }
}

#[test]
fn a_frontend_goes_and_another_one_comes() {
    let machine = machine();
    for _ in 0..70 {
        let mut driver = connect(&machine.guest);
        let mut requests = Requests::new(&machine.guest);
        let mut queue = setup(&mut driver, Features::empty(), 0);
        requests.exchange(&mut driver, &mut queue, 2);
    }
}

#[test]
fn a_frontend_that_hurries_is_no_obstacle_to_the_next() {
    let machine = machine();
    let place = machine.guest.enumerate().unwrap().pop().unwrap();
    for states in [&["5", "6", "1"][..], &["5"], &["6"], &["1"], &["6", "1", "5"], &["5", "6"]].repeat(8) {
        let mut driver = connect(&machine.guest);
        let mut queue = setup(&mut driver, Features::empty(), 0);
        Requests::new(&machine.guest).exchange(&mut driver, &mut queue, 1);
        // It goes without a word to the device, and waits for no answer. Nobody waits for the next one either.
        for state in states {
            machine.guest.store().write(&format!("{}/state", place.frontend), state).unwrap();
        }
        let mut next = connect(&machine.guest);
        let mut queue = setup(&mut next, Features::empty(), 0);
        Requests::new(&machine.guest).exchange(&mut next, &mut queue, 1);
    }
}

#[test]
fn a_queue_works_again_after_its_reset() {
    let machine = machine();
    let mut driver = connect(&machine.guest);
    let mut requests = Requests::new(&machine.guest);
    let mut queue = setup(&mut driver, Features::RING_RESET, 0);
    for _ in 0..3 {
        requests.exchange(&mut driver, &mut queue, 10);
        driver.reset_vq(0).unwrap();
        queue = DriverQueue::new(driver.find_vq(0, Some(8)).unwrap()).unwrap();
    }
    requests.exchange(&mut driver, &mut queue, 5);
}

#[test]
fn the_configuration_is_read_written_and_its_change_is_an_interrupt() {
    let machine = machine();
    let mut driver = connect(&machine.guest);
    let _queue = setup(&mut driver, Features::empty(), 0);
    let mut config = [0xff; 6];
    driver.read_config(1, &mut config).unwrap();
    assert_eq!(&config, b"bcd\0\0\0");
    let before = driver.config_generation().unwrap();
    driver.write_config(0, b"ring").unwrap();
    loop {
        driver.read_config(0, &mut config[..4]).unwrap();
        if &config[..4] == b"rung" {
            break;
        }
        assert_eq!(driver.wait(WATCHDOG), Ok(Interrupts { queues: QueueSet::NONE, config: true }));
    }
    assert_ne!(driver.config_generation().unwrap(), before);
    driver.write_config(2, b"too long").unwrap();
    driver.read_config(0, &mut config[..4]).unwrap();
    assert_eq!(&config[..4], b"rung");
}

#[test]
fn a_device_with_requests_in_flight_is_suspended_when_they_are_finished() {
    let machine = machine();
    let mut driver = connect(&machine.guest);
    let mut requests = Requests::new(&machine.guest);
    let mut queue = setup(&mut driver, Features::SUSPEND, 0);
    machine.hold.store(true, Ordering::SeqCst);
    requests.send(&mut queue, 1);
    queue.kick().unwrap();
    // One turn of the device may have begun before the kick. The next one serves kicks first: when it has answered, the
    // device has the request.
    driver.write_config(0, b"efgh").unwrap();
    driver.write_config(0, b"ijkl").unwrap();
    suspend(&mut driver).unwrap();
    assert!(!driver.status().unwrap().contains(Status::SUSPEND), "it is held back");
    machine.hold.store(false, Ordering::SeqCst);
    let place = machine.guest.enumerate().unwrap().pop().unwrap();
    // Asked again for what it has done: it looks after its backend on the way.
    let request = format!("{}/request", place.frontend);
    let store = machine.guest.store();
    store.write(&request, &store.read(&request).unwrap().unwrap()).unwrap();
    requests.receive_all(&mut driver, &mut queue);
    let begun = Instant::now();
    while !driver.status().unwrap().contains(Status::SUSPEND) {
        assert!(begun.elapsed() < WATCHDOG, "SUSPEND never shows");
        std::thread::yield_now();
    }
    resume(&mut driver).unwrap();
    assert!(!driver.status().unwrap().contains(Status::SUSPEND));
    requests.exchange(&mut driver, &mut queue, 20);
}

#[test]
fn a_backend_that_dies_is_noticed() {
    let machine = machine();
    let mut driver = connect(&machine.guest);
    let mut queue = setup(&mut driver, Features::empty(), 0);
    let mut requests = Requests::new(&machine.guest);
    requests.exchange(&mut driver, &mut queue, 3);
    let guest = machine.guest.clone();
    drop(machine.host);
    // An interrupt of the last exchange may still be on its way.
    while !driver.wait(WATCHDOG).unwrap().config {}
    assert!(driver.status().unwrap().contains(Status::DEVICE_NEEDS_RESET));
    assert_eq!(driver.write_config(0, &[0]), Err(TransportError::Closed));
    assert_eq!(guest.enumerate(), Ok(vec![]));
    // Nothing of the guest's is in use any more.
    drop(queue);
    assert_eq!(guest.unshare(requests.memory.address()), Ok(()));
}

#[test]
fn whatever_a_frontend_writes_the_backend_survives_it() {
    let machine = machine();
    let place = machine.guest.enumerate().unwrap().pop().unwrap();
    let store = machine.guest.store();
    let long = "9".repeat(1500);
    let strange = ["", "-1", "4294967296", "18446744073709551616", "nan", "\u{1F980}", "1 status 15", &long];
    for value in strange {
        for node in ["state", "request"] {
            store.write(&format!("{}/{node}", place.frontend), value).unwrap();
        }
        // Anew, and connected: from now on it listens.
        store.write(&format!("{}/state", place.frontend), "1").unwrap();
        let begun = Instant::now();
        while store.read(&format!("{}/state", place.backend)).unwrap().as_deref() != Some("2") {
            assert!(begun.elapsed() < WATCHDOG, "the backend never waits");
            std::thread::yield_now();
        }
        store.write(&format!("{}/state", place.frontend), "4").unwrap();
        for number in 1..20 {
            for request in [
                "features 100000000;status 11",
                "queue 0 16 1000 2000 3000 5",
                "queue 0 4294967295 fffffffffffffff 0 1 4294967295;status 15",
                "queue 65535 16 1000 2000 3000 5",
                "status 15",
                "reset 7",
                "config 4294967295 00",
                "config 0 0",
                "x",
                value,
            ] {
                store.write(&format!("{}/request", place.frontend), &format!("{number} {request}")).unwrap();
            }
        }
    }
    let mut driver = connect(&machine.guest);
    let mut requests = Requests::new(&machine.guest);
    let mut queue = setup(&mut driver, Features::empty(), 0);
    requests.exchange(&mut driver, &mut queue, 10);
}

#[test]
fn the_host_sees_what_is_granted_as_it_is_granted_and_nothing_else() {
    let (host, guest) = xen::start(RAM).unwrap();
    let memory = host.memory();
    let resolve = |address, len, access| {
        let mut parts = vec![];
        memory.resolve(address, len, access, |part| parts.push(part)).map(|()| parts)
    };
    let [before, pages, after] = [4096, 3 * 4096, 4096].map(|len| guest.allocate(len).unwrap());
    pages.write(4090, b"across pages").unwrap();
    let address = guest.share(&pages, BOTH).unwrap();
    let parts = resolve(address + 4090, 12, Access::READ).unwrap();
    assert_eq!(parts.len(), 1, "consecutive references are one piece");
    let mut bytes = [0; 12];
    parts[0].read(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"across pages");
    resolve(address + 8192, 4096, Access::WRITE).unwrap()[0].write(4095, b"!").unwrap();
    pages.read(3 * 4096 - 1, &mut bytes[..1]).unwrap();
    assert_eq!(bytes[0], b'!');

    let read_only = guest.share(&before, Access::READ).unwrap();
    assert!(resolve(read_only, 4096, Access::READ).is_ok());
    for access in [Access::WRITE, BOTH] {
        let refused = resolve(read_only, 1, access).unwrap_err();
        assert_eq!(refused, MemoryError::Forbidden { address: read_only, len: 1, access }.into());
    }
    let _not_granted = after;
    for (address, len) in [(0, 1), (address - 1, 2), (read_only, 4097), (1 << 44, 1), (address, 1 << 40)] {
        let refused = resolve(address, len, Access::READ).unwrap_err();
        assert_eq!(refused, MemoryError::NotMapped { address, len }.into(), "{address:#x}+{len:#x}");
    }
    let wraps = MemoryError::Wraps { address: u64::MAX, len: 2 };
    assert_eq!(resolve(u64::MAX, 2, Access::READ).unwrap_err(), wraps.into());
    assert_eq!(resolve(7, 0, Access::READ).unwrap().len(), 0);
}

#[test]
fn what_the_device_uses_cannot_be_taken_back_and_then_it_can() {
    let (host, guest) = xen::start(RAM).unwrap();
    let pages = guest.allocate(2 * 4096).unwrap();
    let address = guest.share(&pages, BOTH).unwrap();
    let mut lease = None;
    host.memory().resolve(address + 4096, 8, Access::READ, |part| lease = Some(part)).unwrap();
    assert_eq!(guest.unshare(address), Err(HypervisorError::InUse { address: address + 4096 }));
    // All of it is still shared.
    host.memory().resolve(address, 2 * 4096, BOTH, drop).unwrap();
    drop(lease);
    assert_eq!(guest.unshare(address), Ok(()));
    assert!(guest.unshare(address).is_err());
    assert!(guest.unshare(address + 1).is_err());
    assert!(host.memory().resolve(address, 1, Access::READ, drop).is_err());
}

#[test]
fn granted_memory_is_not_handed_out_again_before_it_is_taken_back() {
    let (_host, guest) = xen::start(4096).unwrap();
    let pages = guest.allocate(4096).unwrap();
    let address = guest.share(&pages, BOTH).unwrap();
    drop(pages);
    assert_eq!(guest.allocate(1).unwrap_err(), HypervisorError::Exhausted("guest memory"));
    guest.unshare(address).unwrap();
    assert!(guest.allocate(1).is_ok());
}

#[test]
fn channels_and_watches_have_as_many_lines_as_there_are_and_give_them_back() {
    let (_host, guest) = xen::start(RAM).unwrap();
    let watch = guest.watch("data").unwrap();
    assert_eq!(guest.watch("data"), Ok(watch), "the same path, the same line");
    let channels: Vec<_> = (1..200).map(|_| guest.open_channel().unwrap()).collect();
    let lines: BTreeSet<_> = channels.iter().map(|channel| channel.line).chain([watch]).collect();
    assert_eq!(lines.len(), 200);
    guest.close_channel(channels[30]).unwrap();
    assert_eq!(guest.open_channel().unwrap().line, channels[30].line);
    assert!(guest.close_channel(xenbus::Channel { port: 4000, line: 1 }).is_err());
    assert!(guest.notify(u64::MAX, 0).is_err());
}
