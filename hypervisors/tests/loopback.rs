//! A toy device, end to end: driver queue, virtio-mmio, loopback, device queue.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::Waker;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use polyvirt_core::Features;
use polyvirt_core::device::{Device, Queues};
use polyvirt_core::hypervisor::{Guest as _, Host as _, HypervisorError, Share};
use polyvirt_core::memory::{Access, GuestMemory, Pages};
use polyvirt_core::queue::{AddError, Buffer, Chain, DriverQueue};
use polyvirt_core::transport::{BlockingTransport, Transport, TransportError, driver_ok, initialize};
use polyvirt_hypervisors::loopback::{self, DEVICES, Guest, RAM};
use polyvirt_transports::mmio::registers::PLACE_SIZE;
use polyvirt_transports::mmio::{self, Registers};

const WATCHDOG: Duration = Duration::from_secs(20);
const SIZE: u16 = 8;
/// Bytes of a request, and of its echo.
const LEN: u32 = 48;

/// Sends back what it is sent: at once on queue 0, from another thread on queue 1.
struct Echo<M: GuestMemory> {
    waker: Option<Waker>,
    backend: Option<Backend<Chain<M::Lease>>>,
    /// Says when the device is dropped.
    _life: Sender<()>,
}

struct Backend<C> {
    requests: Sender<C>,
    done: Receiver<C>,
    thread: JoinHandle<()>,
}

impl<M: GuestMemory<Lease: 'static>> Echo<M> {
    fn new() -> (Self, Receiver<()>) {
        let (life, death) = channel();
        (Self { waker: None, backend: None, _life: life }, death)
    }

    fn start(&mut self) {
        let Some(waker) = self.waker.clone() else { return };
        let (requests, queue) = channel::<Chain<M::Lease>>();
        let (finished, done) = channel();
        let thread = thread::spawn(move || {
            for mut chain in queue {
                echo::<M>(&mut chain);
                let _ = finished.send(chain);
                waker.wake_by_ref();
            }
        });
        self.backend = Some(Backend { requests, done, thread });
    }

    /// Returns when no thread touches guest memory any more.
    fn stop(&mut self) {
        if let Some(Backend { requests, thread, .. }) = self.backend.take() {
            drop(requests);
            thread.join().unwrap();
        }
    }
}

fn echo<M: GuestMemory>(chain: &mut Chain<M::Lease>) {
    let mut bytes = vec![0; chain.readable_len() as usize];
    chain.read(0, &mut bytes).unwrap();
    chain.write(0, &bytes).unwrap();
}

impl<M: GuestMemory<Lease: 'static>> Device<M> for Echo<M> {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[SIZE, SIZE]
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn activate(&mut self, _: Features, waker: Waker) {
        self.waker = Some(waker);
        self.start();
    }
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        let (Some(queue), Some(backend)) = (queues.get(index), &self.backend) else { return };
        while let Ok(mut chain) = queue.pop() {
            if index == 1 {
                backend.requests.send(chain).unwrap();
            } else {
                echo::<M>(&mut chain);
                queue.complete(chain).unwrap();
            }
        }
    }
    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        let (Some(queue), Some(backend)) = (queues.get(1), &self.backend) else { return };
        for chain in backend.done.try_iter() {
            queue.complete(chain).unwrap();
        }
    }
    fn reset_queue(&mut self, index: u16) {
        if index == 1 {
            self.stop();
            self.start();
        }
    }
    fn reset(&mut self) {
        self.waker = None;
        self.stop();
    }
}

/// A machine with an [`Echo`]; the receiver learns when the device is gone.
fn machine() -> (loopback::Host, Arc<Guest>, Receiver<()>) {
    let (mut host, guest) = loopback::start(1 << 20).unwrap();
    let (device, death) = Echo::new();
    let memory = host.memory();
    mmio::attach(&mut host, memory, Box::new(device)).unwrap();
    (host, Arc::new(guest), death)
}

fn connect(guest: &Arc<Guest>, features: Features) -> mmio::Driver<Guest> {
    let place = guest.enumerate().unwrap()[0];
    let mut driver = mmio::Driver::connect(guest.clone(), place).unwrap();
    let accepted = initialize(&mut driver, features).unwrap();
    assert!(accepted.contains(features));
    driver
}

/// Memory that is shared with the device until this is dropped.
struct Shared {
    guest: Arc<Guest>,
    pages: Pages,
    address: u64,
}

impl Shared {
    fn new(guest: &Arc<Guest>, len: usize) -> Self {
        let pages = guest.allocate(len).unwrap();
        let address = guest.share(&pages, Access::READ | Access::WRITE).unwrap();
        Self { guest: guest.clone(), pages, address }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.guest.unshare(self.address).unwrap();
    }
}

/// Sends `count` different requests, as many at a time as fit, and compares each echo. Sleeps only when the contract of
/// `enable_cb` allows it, so a lost interrupt shows.
fn exchange(driver: &mut mmio::Driver<Guest>, queue: &mut DriverQueue<usize>, buffers: &Shared, count: usize) {
    let stride = 2 * LEN as usize;
    let mut free: Vec<usize> = (0..SIZE.into()).collect();
    let mut expected = BTreeMap::new();
    let (mut sent, mut received) = (0, 0);
    while received < count {
        while sent < count
            && let Some(slot) = free.pop()
        {
            let bytes: Vec<_> = (0..LEN as usize).map(|at| (sent * 31 + at) as u8).collect();
            buffers.pages.write(slot * stride, &bytes).unwrap();
            let at = buffers.address + (slot * stride) as u64;
            // Requests in one, two or three pieces.
            let cut = (sent % 3) as u32 * 16;
            let readable =
                [Buffer { address: at, len: LEN - cut }, Buffer { address: at + u64::from(LEN - cut), len: cut }];
            let readable = if cut == 0 { &readable[..1] } else { &readable };
            let writable = Buffer { address: at + u64::from(LEN), len: LEN };
            match queue.add_buf(readable, &[writable], slot) {
                Ok(()) => _ = expected.insert(slot, bytes),
                Err(AddError::Full(slot)) => {
                    free.push(slot);
                    break;
                }
                Err(error) => panic!("{error}"),
            }
            sent += 1;
        }
        queue.kick().unwrap();
        queue.disable_cb();
        loop {
            while let Some((slot, len)) = queue.get_buf().unwrap() {
                let mut echo = vec![0; LEN as usize];
                buffers.pages.read(slot * stride + LEN as usize, &mut echo).unwrap();
                assert_eq!((len, Some(echo)), (LEN, expected.remove(&slot)));
                free.push(slot);
                received += 1;
            }
            if queue.enable_cb() {
                break;
            }
        }
        if !expected.is_empty() {
            driver.wait(WATCHDOG).unwrap();
        }
    }
    assert!(expected.is_empty());
}

#[test]
fn every_request_comes_back_with_its_bytes_whatever_was_negotiated() {
    let bits = [Features::EVENT_IDX, Features::INDIRECT_DESC, Features::RING_PACKED];
    for choice in 0..8 {
        let chosen = bits.iter().enumerate().filter(|(bit, _)| choice >> bit & 1 == 1);
        let features = chosen.fold(Features::empty(), |all, (_, &feature)| all | feature);
        for index in 0..2 {
            let (_host, guest, _death) = machine();
            let mut driver = connect(&guest, features);
            let tables = Shared::new(&guest, usize::from(SIZE) * 3 * 16);
            let queue = driver.find_vq(index, None).unwrap();
            let mut queue = DriverQueue::new(queue).unwrap().with_indirect(tables.pages.clone(), tables.address);
            let buffers = Shared::new(&guest, usize::from(SIZE) * 2 * LEN as usize);
            driver_ok(&mut driver).unwrap();
            exchange(&mut driver, &mut queue, &buffers, 500);
        }
    }
}

#[test]
fn a_queue_works_again_after_its_reset_and_after_the_devices() {
    let (_host, guest, _death) = machine();
    let mut driver = connect(&guest, Features::RING_RESET);
    let buffers = Shared::new(&guest, usize::from(SIZE) * 2 * LEN as usize);
    driver_ok(&mut driver).unwrap();
    for (index, size) in [(0, None), (0, Some(4)), (1, Some(4)), (1, None)] {
        let mut queue = DriverQueue::new(driver.find_vq(index, size).unwrap()).unwrap();
        exchange(&mut driver, &mut queue, &buffers, 20);
        driver.reset_vq(index).unwrap();
    }
    initialize(&mut driver, Features::empty()).unwrap();
    let mut queue = DriverQueue::new(driver.find_vq(1, None).unwrap()).unwrap();
    driver_ok(&mut driver).unwrap();
    exchange(&mut driver, &mut queue, &buffers, 20);
}

#[test]
fn an_interrupt_that_came_before_the_wait_is_not_lost_and_none_is_invented() {
    let (_host, guest, _death) = machine();
    let mut driver = connect(&guest, Features::empty());
    let mut queue = DriverQueue::new(driver.find_vq(0, None).unwrap()).unwrap();
    let buffers = Shared::new(&guest, 4096);
    driver_ok(&mut driver).unwrap();
    queue.add_buf(&[], &[Buffer { address: buffers.address, len: 8 }], ()).unwrap();
    queue.kick().unwrap();
    assert!(!driver.wait(WATCHDOG).unwrap().queues.is_empty());
    assert_eq!(driver.wait(Duration::ZERO), Err(TransportError::Watchdog(Duration::ZERO, "an interrupt")));
}

#[test]
fn several_devices_have_their_own_places_and_lines() {
    let (mut host, guest) = loopback::start(1 << 16).unwrap();
    for number in 0..256 {
        let memory = host.memory();
        mmio::attach(&mut host, memory, Box::new(Echo::new().0)).unwrap();
        let places = guest.enumerate().unwrap();
        assert_eq!(places.len(), number + 1);
        assert_eq!(places[number].line, number as u32);
    }
    let memory = host.memory();
    let full = mmio::attach(&mut host, memory, Box::new(Echo::new().0));
    assert_eq!(full, Err(HypervisorError::Exhausted("interrupt lines")));
    assert_eq!(guest.enumerate().unwrap().len(), 256);
}

#[test]
fn where_there_is_no_device_an_access_fails() {
    let (_host, guest, _death) = machine();
    for address in [0, RAM, DEVICES - 4, DEVICES + PLACE_SIZE, u64::MAX - 3] {
        assert!(guest.load(address, &mut [0; 4]).is_err(), "{address:#x}");
        assert!(guest.store(address, &[0; 4]).is_err(), "{address:#x}");
    }
    assert!(guest.load(DEVICES + 0xffc, &mut [0; 4]).is_ok());
}

#[test]
fn the_device_is_gone_when_both_halves_are() {
    let (host, guest, death) = machine();
    let mut driver = connect(&guest, Features::empty());
    driver_ok(&mut driver).unwrap();
    drop((host, driver));
    assert!(death.try_recv().is_err_and(|error| error == std::sync::mpsc::TryRecvError::Empty));
    drop(guest);
    assert!(death.recv_timeout(WATCHDOG).is_err_and(|error| error == std::sync::mpsc::RecvTimeoutError::Disconnected));
}
