//! Each driver in a kernel that cannot wait: it is polled, and interrupts are taken when they have come.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::yield_now;
use std::time::Duration;

use polyvirt_core::device::Device;
use polyvirt_core::hypervisor::{Guest, Host as _, HypervisorError, Share, WakeOnInterrupt};
use polyvirt_core::memory::{Access, FlatMemory, Pages};
use polyvirt_core::transport::{Interrupts, Transport};
use polyvirt_devices::blk::{self, Answer, MemoryBackend, Operation, RequestId, wire};
use polyvirt_devices::{console, rng};
use polyvirt_hypervisors::loopback;
use polyvirt_transports::mmio::{self, Place, Registers};

/// The register Status.
const STATUS: u64 = 0x70;

/// A guest of which nobody can wait for an interrupt.
struct Kernel {
    guest: loopback::Guest,
    /// How often the status still reads as it was before a reset.
    resetting: AtomicU32,
    shared: Mutex<BTreeSet<u64>>,
}

impl Share for Kernel {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        self.guest.allocate(len)
    }
    fn share(&self, pages: &Pages, access: Access) -> Result<u64, HypervisorError> {
        let address = self.guest.share(pages, access)?;
        self.shared.lock().unwrap().insert(address);
        Ok(address)
    }
    fn unshare(&self, address: u64) -> Result<(), HypervisorError> {
        self.shared.lock().unwrap().remove(&address);
        self.guest.unshare(address)
    }
}

impl Guest for Kernel {
    type Place = Place;

    fn notify(&self, doorbell: u64, value: u32) -> Result<(), HypervisorError> {
        self.guest.notify(doorbell, value)
    }
    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        self.guest.take(line)
    }
    fn enumerate(&self) -> Result<Vec<Place>, HypervisorError> {
        self.guest.enumerate()
    }
}

impl WakeOnInterrupt for Kernel {
    fn wake_on(&self, lines: &[u32], waker: &Waker) -> Result<(), HypervisorError> {
        self.guest.wake_on(lines, waker)
    }
}

impl Registers for Kernel {
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        let left = |left: u32| left.checked_sub(1);
        if address & 0xfff == STATUS && self.resetting.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left).is_ok() {
            data.fill(0xf);
            return Ok(());
        }
        self.guest.load(address, data)
    }
    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        self.guest.store(address, data)
    }
}

/// `device`, met and reset by a kernel.
fn plug(device: Box<dyn Device<Arc<FlatMemory>>>) -> (loopback::Host, Arc<Kernel>, mmio::Driver<Kernel>) {
    let (mut host, guest) = loopback::start(16 << 20).unwrap();
    let memory = host.memory();
    mmio::attach(&mut host, memory, device).unwrap();
    let (resetting, shared) = (AtomicU32::new(3), Mutex::default());
    let kernel = Arc::new(Kernel { guest, resetting, shared });
    let mut transport = mmio::Driver::connect(kernel.clone(), kernel.enumerate().unwrap()[0]).unwrap();
    transport.begin_reset().unwrap();
    let polls = (0..).find(|_| transport.poll_reset().unwrap()).unwrap();
    assert_eq!(polls, 3, "a reset in progress is looked after");
    (host, kernel, transport)
}

/// What an idle kernel does until an interrupt comes.
fn idle(transport: &mut impl Transport) {
    while transport.take_interrupts().unwrap() == Interrupts::default() {
        yield_now();
    }
}

/// The answer to `id`, of which nobody else waits for one.
fn answer(driver: &mut blk::Driver<mmio::Driver<Kernel>>, id: RequestId) -> Answer {
    loop {
        match driver.poll().unwrap() {
            Some(answer) => {
                assert_eq!((answer.id, answer.status), (id, wire::OK));
                return answer;
            }
            None if driver.arm() => idle(driver.transport()),
            None => {}
        }
    }
}

#[test]
fn a_disk_is_used_by_a_kernel_that_cannot_wait() {
    let (_host, _kernel, transport) =
        plug(Box::new(blk::Device::new(MemoryBackend::new(vec![0; 16 * 512]), blk::Options::default())));
    let mut driver = blk::Driver::start(transport).unwrap();
    let id = driver.submit(Operation::Write { sector: 3, data: &[0xa5; 512] }).unwrap().unwrap();
    answer(&mut driver, id);
    let id = driver.submit(Operation::Read { sector: 2, len: 1024 }).unwrap().unwrap();
    assert_eq!(answer(&mut driver, id).data, [[0; 512], [0xa5; 512]].concat());

    let id = driver.submit(Operation::Flush).unwrap().unwrap();
    driver.transport().begin_reset().unwrap();
    while !driver.transport().poll_reset().unwrap() {}
    driver.restart().unwrap();
    answer(&mut driver, id);
}

#[test]
fn entropy_is_had_by_a_kernel_that_cannot_wait() {
    let (_host, _kernel, transport) = plug(Box::new(rng::Device::new(rng::HostEntropy)));
    let mut driver = rng::Driver::start(transport).unwrap();
    let mut bytes = [[0; 32]; 2];
    for bytes in &mut bytes {
        assert_eq!(driver.submit(32), Ok(true));
        assert_eq!(driver.submit(32), Ok(false), "one request at a time");
        while driver.poll(bytes).unwrap().is_none() {
            if driver.arm() {
                idle(driver.transport());
            }
        }
    }
    assert_ne!(bytes[0], bytes[1]);
}

#[test]
fn a_console_is_used_by_a_kernel_that_cannot_wait() {
    let device = console::Device::new(80, 25);
    let far = device.handle();
    let (_host, _kernel, transport) = plug(Box::new(device));
    let mut driver = console::Driver::start(transport).unwrap();
    let mut rest: &[u8] = &[b'x'; 10_000];
    while !rest.is_empty() || !driver.poll_sent().unwrap() {
        rest = &rest[driver.submit(rest).unwrap()..];
        if driver.arm_sent() {
            idle(driver.transport());
        }
    }
    assert_eq!(far.take_output(), [b'x'; 10_000]);

    let mut into = [0; 16];
    assert_eq!(driver.poll(&mut into), Ok(0));
    far.type_in(b"hello");
    while driver.poll(&mut into[..5]).unwrap() == 0 {
        if driver.arm() {
            idle(driver.transport());
        }
    }
    assert_eq!(&into[..5], b"hello");
}

#[test]
fn what_a_device_may_still_use_does_not_return_to_the_guest_with_its_driver() {
    let disk = || Box::new(blk::Device::new(MemoryBackend::new(vec![0; 512]), blk::Options::default()));
    for never in [false, true] {
        let (_host, kernel, transport) = plug(disk());
        let mut driver = blk::Driver::start(transport).unwrap();
        let id = driver.submit(Operation::Flush).unwrap().unwrap();
        answer(&mut driver, id);
        let shared = kernel.shared.lock().unwrap().clone();
        assert_eq!(shared.len(), 3 + 4, "a ring, and a request");
        if never {
            kernel.resetting.store(u32::MAX, Ordering::SeqCst);
        }
        drop(driver);
        assert_eq!(*kernel.shared.lock().unwrap(), if never { shared } else { BTreeSet::new() });
    }
}

/// Wakes the thread that runs tasks; one message is enough.
struct Alarm(SyncSender<()>);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        let _ = self.0.try_send(());
    }
}

/// Runs the tasks on this thread, which sleeps when none can go on. Returns how often it slept.
fn run(tasks: Vec<Pin<Box<dyn Future<Output = ()> + '_>>>) -> u32 {
    let (alarm, alarms) = sync_channel(1);
    let waker = Waker::from(Arc::new(Alarm(alarm)));
    let (mut context, mut tasks, mut slept) = (Context::from_waker(&waker), tasks, 0);
    loop {
        tasks.retain_mut(|task| task.as_mut().poll(&mut context) == Poll::Pending);
        if tasks.is_empty() {
            return slept;
        }
        alarms.recv_timeout(Duration::from_secs(60)).expect("an interrupt wakes the tasks");
        slept += 1;
    }
}

#[test]
fn tasks_of_one_thread_use_their_devices_at_the_same_time() {
    let device = console::Device::new(80, 25);
    let far = device.handle();
    let (_first, _kernel, transport) = plug(Box::new(device));
    let mut console = console::Driver::start(transport).unwrap();
    let (_second, _kernel, transport) =
        plug(Box::new(blk::Device::new(MemoryBackend::new(vec![7; 64 * 512]), blk::Options::default())));
    let mut disk = blk::Driver::start(transport).unwrap();
    let (_third, _kernel, transport) = plug(Box::new(rng::Device::new(rng::HostEntropy)));
    let mut entropy = rng::Driver::start(transport).unwrap();

    let (mut typed, mut random) = ([0; 8], vec![0; 20_000]);
    let printer = far.clone();
    let talk = async {
        // Nothing is typed before the other tasks are done.
        assert_eq!(console.received(&mut typed).await, Ok(5));
        console.sent(&[b'y'; 10_000]).await.unwrap();
    };
    let read = async {
        for sector in 0..64 {
            let id = disk.submit(Operation::Read { sector, len: 512 }).unwrap();
            let Answer { id: answered, status, data } = disk.answer().await.unwrap();
            assert_eq!((Some(answered), status, data), (id, wire::OK, vec![7; 512]));
        }
        entropy.filled(&mut random).await.unwrap();
        far.type_in(b"hello");
    };
    assert!(run(vec![Box::pin(talk), Box::pin(read)]) > 0, "it slept");
    assert_eq!((&typed[..5], printer.take_output()), (&b"hello"[..], vec![b'y'; 10_000]));
    assert!(random.chunks(32).any(|chunk| chunk != [0; 32]));
}
