//! The four mechanisms on KVM, by a toy device. Skipped, with the reason, where no guest runs.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::{Duration, Instant};

use polyvirt_core::device;
use polyvirt_core::features::Features;
use polyvirt_core::hypervisor::{
    BusDevice, Cause, Guest as _, Host as _, HypervisorError, Interrupt, Share as _, WaitForInterrupt as _,
};
use polyvirt_core::memory::{Access, GuestMemory};
use polyvirt_core::queue::{Buffer, DriverQueue};
use polyvirt_core::transport::{self, BlockingTransport as _, Transport as _};
use polyvirt_hypervisors::kvm::{self, Guest, Host};
use polyvirt_transports::mmio::registers::QUEUE_NOTIFY;
use polyvirt_transports::mmio::{self, Place, Registers as _};

const WATCHDOG: Duration = Duration::from_secs(20);
const RAM: usize = 1 << 20;

/// What reached the toy.
#[derive(Debug, PartialEq)]
enum Call {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Kick(u16),
    Poll,
}

/// Answers a read with the bytes `offset`, `offset + 1` …, and reports every call; a kick raises its interrupt.
struct Toy {
    calls: Sender<Call>,
    interrupt: Arc<dyn Interrupt>,
    waker: Arc<Mutex<Option<Waker>>>,
}

impl BusDevice for Toy {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.iter_mut().zip(offset..).for_each(|(byte, value)| *byte = value as u8);
        let _ = self.calls.send(Call::Read(offset, data.len()));
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        let _ = self.calls.send(Call::Write(offset, data.to_vec()));
    }
    fn kick(&mut self, queue: u16) -> bool {
        let _ = self.calls.send(Call::Kick(queue));
        self.interrupt.raise(Cause::Queue(queue));
        false
    }
    fn poll(&mut self) -> bool {
        let _ = self.calls.send(Call::Poll);
        false
    }
    fn set_waker(&mut self, waker: Waker) {
        *self.waker.lock().unwrap() = Some(waker);
    }
}

struct Plugged {
    place: Place,
    calls: Receiver<Call>,
    interrupt: Arc<dyn Interrupt>,
    waker: Arc<Mutex<Option<Waker>>>,
}

fn start() -> Option<(Host, Guest)> {
    match kvm::available() {
        Ok(_) => Some(kvm::start(RAM).unwrap()),
        Err(reason) => {
            println!("skipped: {reason}");
            None
        }
    }
}

fn plug(host: &mut Host, queues: u16) -> Plugged {
    let place = host.place(0, queues).unwrap();
    let (sender, calls) = channel();
    let interrupt = host.interrupt(&place);
    let waker = Arc::default();
    let toy = Toy { calls: sender, interrupt: Arc::clone(&interrupt), waker: Arc::clone(&waker) };
    host.plug(place, Box::new(toy)).unwrap();
    Plugged { place, calls, interrupt, waker }
}

fn load<const N: usize>(guest: &Guest, address: u64) -> Result<[u8; N], HypervisorError> {
    let mut data = [0; N];
    guest.load(address, &mut data)?;
    Ok(data)
}

/// Waits for one of `lines`, a bit each, and takes those that are pending.
fn wait(guest: &Guest, lines: u64, watchdog: Duration) -> Result<u64, HypervisorError> {
    let all: Vec<u32> = (0..u64::BITS).filter(|line| lines & 1 << line != 0).collect();
    match guest.wait(&all, watchdog)? {
        true => all.iter().try_fold(0, |came, &line| Ok(came | u64::from(guest.take(line)?) << line)),
        false => Ok(0),
    }
}

#[test]
fn loads_of_every_width_reach_the_device() {
    let Some((mut host, guest)) = start() else { return };
    let device = plug(&mut host, 0);
    let base = device.place.base;
    assert_eq!(load(&guest, base + 0x13), Ok([0x13]));
    assert_eq!(load(&guest, base + 0x20), Ok([0x20, 0x21]));
    assert_eq!(load(&guest, base + 0x30), Ok([0x30, 0x31, 0x32, 0x33]));
    assert_eq!(load(&guest, base + 0xff8), Ok([0xf8, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff]));
    let calls: Vec<_> = device.calls.try_iter().collect();
    assert_eq!(calls, [Call::Read(0x13, 1), Call::Read(0x20, 2), Call::Read(0x30, 4), Call::Read(0xff8, 8)]);
}

#[test]
fn stores_of_every_width_reach_the_device() {
    let Some((mut host, guest)) = start() else { return };
    let device = plug(&mut host, 0);
    let bytes = [0x81, 0x92, 0xa3, 0xb4, 0xc5, 0xd6, 0xe7, 0xf8];
    for (offset, len) in [(1, 1), (0x102, 2), (QUEUE_NOTIFY, 4), (0xff8, 8)] {
        guest.store(device.place.base + offset, &bytes[..len]).unwrap();
        assert_eq!(device.calls.try_recv(), Ok(Call::Write(offset, bytes[..len].to_vec())));
    }
}

#[test]
fn an_access_of_a_width_that_no_instruction_has_is_refused_and_the_guest_lives() {
    let Some((mut host, guest)) = start() else { return };
    let base = plug(&mut host, 0).place.base;
    for len in [0, 3, 5, 9, 16] {
        assert!(matches!(guest.load(base, &mut vec![0; len]), Err(HypervisorError::Refused { call: "load", .. })));
        assert!(matches!(guest.store(base, &vec![0; len]), Err(HypervisorError::Refused { call: "store", .. })));
    }
    assert_eq!(load(&guest, base), Ok([0]));
}

#[test]
fn both_sides_see_the_same_memory() {
    let Some((host, guest)) = start() else { return };
    let pages = guest.allocate(4096).unwrap();
    let address = guest.share(&pages, Access::READ | Access::WRITE).unwrap();
    guest.store(address + 8, b"from the").unwrap();
    pages.write(16, b" guest").unwrap();
    let mut seen = [0; 14];
    let mut at = 0;
    host.memory()
        .resolve(address + 8, 14, Access::READ, |segment| {
            segment.read(0, &mut seen[at..at + segment.len()]).unwrap();
            at += segment.len();
        })
        .unwrap();
    assert_eq!(&seen, b"from the guest");
    host.memory().resolve(address, 4, Access::WRITE, |segment| segment.write(0, b"host").unwrap()).unwrap();
    assert_eq!(load(&guest, address), Ok(*b"host"));
    assert_eq!(guest.unshare(address), Ok(()));
    assert!(guest.unshare(address).is_err());
}

#[test]
fn memory_ends_where_it_should() {
    let Some((host, guest)) = start() else { return };
    let end = RAM as u64;
    guest.store(end - 8, &[7; 8]).unwrap();
    assert!(host.memory().resolve(end - 8, 8, Access::READ, |_| {}).is_ok());
    assert!(host.memory().resolve(end - 8, 9, Access::READ, |_| {}).is_err());
}

#[test]
fn memory_is_used_up_and_comes_back_zeroed() {
    let Some((_host, guest)) = start() else { return };
    let most = RAM - 4096;
    let pages = guest.allocate(most).unwrap();
    assert_eq!(guest.allocate(1).unwrap_err(), HypervisorError::Exhausted("guest memory"));
    let address = guest.share(&pages, Access::WRITE).unwrap();
    guest.store(address, &[0xff; 8]).unwrap();
    drop(pages);
    let again = guest.allocate(most).unwrap();
    assert_eq!(guest.share(&again, Access::WRITE), Ok(address));
    assert_eq!(load(&guest, address), Ok([0; 8]));
}

#[test]
fn a_kick_reaches_its_queue_and_is_no_register_access() {
    let Some((mut host, guest)) = start() else { return };
    let device = plug(&mut host, 3);
    let doorbell = device.place.base + QUEUE_NOTIFY;
    for queue in [2, 0, 1] {
        guest.notify(doorbell, queue.into()).unwrap();
        assert_eq!(device.calls.recv_timeout(WATCHDOG), Ok(Call::Kick(queue)));
    }
    // A queue that does not exist has no ioeventfd: the device decides.
    guest.notify(doorbell, 3).unwrap();
    assert_eq!(device.calls.recv_timeout(WATCHDOG), Ok(Call::Write(QUEUE_NOTIFY, vec![3, 0, 0, 0])));
}

#[test]
fn the_waker_has_the_device_polled() {
    let Some((mut host, _guest)) = start() else { return };
    let device = plug(&mut host, 1);
    device.waker.lock().unwrap().take().unwrap().wake();
    assert_eq!(device.calls.recv_timeout(WATCHDOG), Ok(Call::Poll));
}

#[test]
fn the_guest_sees_the_interrupt_of_what_it_kicked() {
    let Some((mut host, guest)) = start() else { return };
    let device = plug(&mut host, 1);
    let line = 1 << device.place.line;
    for _ in 0..100 {
        guest.notify(device.place.base + QUEUE_NOTIFY, 0).unwrap();
        assert_eq!(wait(&guest, line, WATCHDOG), Ok(line));
    }
}

#[test]
fn interrupts_raised_before_the_wait_are_kept_each_until_it_is_waited_for() {
    let Some((mut host, guest)) = start() else { return };
    let devices: Vec<_> = (0..3).map(|_| plug(&mut host, 0)).collect();
    devices.iter().for_each(|device| device.interrupt.raise(Cause::Config));
    assert_eq!(wait(&guest, 0b010, WATCHDOG), Ok(0b010));
    assert_eq!(wait(&guest, 0b010, Duration::ZERO), Ok(0));
    assert_eq!(wait(&guest, 0b101, WATCHDOG), Ok(0b101));
    assert_eq!(wait(&guest, u64::MAX, Duration::ZERO), Ok(0));
}

#[test]
fn a_wait_without_an_interrupt_ends_when_its_watchdog_runs_out() {
    let Some((mut host, guest)) = start() else { return };
    plug(&mut host, 0);
    let begun = Instant::now();
    assert_eq!(wait(&guest, u64::MAX, Duration::from_millis(30)), Ok(0));
    assert!(begun.elapsed() >= Duration::from_millis(30));
}

#[test]
fn an_interrupt_from_another_thread_ends_the_wait() {
    let Some((mut host, guest)) = start() else { return };
    let device = plug(&mut host, 0);
    let (waiting, begin) = channel();
    std::thread::scope(|scope| {
        let interrupt = &device.interrupt;
        scope.spawn(move || {
            begin.recv_timeout(WATCHDOG).unwrap();
            interrupt.raise(Cause::Queue(0));
        });
        waiting.send(()).unwrap();
        assert_eq!(wait(&guest, 1, WATCHDOG), Ok(1));
    });
}

#[test]
fn a_wait_lets_other_threads_use_the_guest() {
    let Some((mut host, guest)) = start() else { return };
    let device = plug(&mut host, 0);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| wait(&guest, 1, WATCHDOG));
        for _ in 0..200 {
            assert_eq!(load(&guest, device.place.base), Ok([0]));
        }
        device.interrupt.raise(Cause::Queue(0));
        assert_eq!(waiter.join().unwrap(), Ok(1));
    });
}

#[test]
fn as_many_devices_as_lines_are_found_and_answer_each_for_itself() {
    let Some((mut host, guest)) = start() else { return };
    let devices: Vec<_> = (0..64).map(|_| plug(&mut host, 1)).collect();
    assert_eq!(host.place(0, 1), Err(HypervisorError::Exhausted("interrupt lines")));
    let places: Vec<_> = devices.iter().map(|device| device.place).collect();
    assert_eq!(guest.enumerate(), Ok(places));
    for device in &devices {
        guest.store(device.place.base, &[device.place.line as u8]).unwrap();
        guest.notify(device.place.base + QUEUE_NOTIFY, 0).unwrap();
        let line = 1 << device.place.line;
        assert_eq!(wait(&guest, u64::MAX, WATCHDOG), Ok(line));
    }
    for device in &devices {
        let calls: Vec<_> = device.calls.try_iter().collect();
        assert_eq!(calls, [Call::Write(0, vec![device.place.line as u8]), Call::Kick(0)]);
    }
}

#[test]
fn an_access_where_nothing_is_stops_the_guest_and_says_where() {
    for (address, why) in [
        (RAM as u64 + 0x10_0000, "after RAM"),
        (0xcfff_fffc, "before the devices"),
        (0xd010_0000, "after the device"),
        (0xd00f_fffe, "half in the device"),
        (0x1_0000_0000, "beyond the page tables"),
        (u64::MAX - 3, "at the end of the address space"),
    ] {
        let Some((mut host, guest)) = start() else { return };
        let device = plug(&mut host, 1);
        let stopped = guest.store(address, &[1; 4]);
        let Err(HypervisorError::GuestStopped(reason)) = &stopped else { panic!("{why}: {stopped:?}") };
        assert!(reason.contains(&format!("{address:#x}")), "{why}: {reason}");
        // From now on everything says the same.
        assert_eq!(guest.load(device.place.base, &mut [0; 4]), stopped);
        assert_eq!(guest.notify(device.place.base + QUEUE_NOTIFY, 0), stopped);
        assert_eq!(wait(&guest, 1, WATCHDOG), stopped.clone().map(|()| 0));
        assert_eq!(guest.enumerate(), stopped.map(|()| vec![]));
    }
}

#[test]
fn what_drives_the_guest_is_out_of_reach_of_drivers_and_devices() {
    let Some((host, guest)) = start() else { return };
    let end = RAM as u64;
    for address in [end - 1, end, end + 0x1018, end + 0xafff, 0xc010_0000 - 1, 0xc010_0000, 0xc01f_ffff] {
        assert!(matches!(guest.store(address, &[1; 8]), Err(HypervisorError::Refused { .. })), "{address:#x}");
        assert!(host.memory().resolve(address, 8, Access::WRITE, |_| {}).is_err(), "{address:#x}");
    }
    guest.store(0x1000, &[1]).unwrap();
}

#[test]
fn a_device_goes_with_its_host() {
    let Some((mut host, guest)) = start() else { return };
    let device = plug(&mut host, 1);
    drop(host);
    assert!(device.calls.recv().is_err(), "the sender went with the device");
    assert_eq!(guest.enumerate(), Ok(vec![]));
}

#[test]
fn a_place_holds_one_device() {
    let Some((mut host, guest)) = start() else { return };
    let device = plug(&mut host, 1);
    let toy = || Toy { calls: channel().0, interrupt: Arc::clone(&device.interrupt), waker: Arc::default() };
    let foreign = Place { base: device.place.base + 0x1000, line: device.place.line + 1 };
    for place in [device.place, foreign] {
        assert!(matches!(host.plug(place, Box::new(toy())), Err(HypervisorError::Refused { call: "plug", .. })));
    }
    assert_eq!(guest.enumerate(), Ok(vec![device.place]));
}

#[test]
fn ram_of_a_size_that_cannot_be_is_refused() {
    for ram in [0, 1, 4095, 0x1801, 0xc000_1000, usize::MAX] {
        assert!(matches!(kvm::start(ram), Err(HypervisorError::Refused { call: "start", .. })), "{ram:#x}");
    }
}

/// Prints what the mechanisms cost here: `cargo test -p polyvirt-hypervisors --test kvm cost -- --nocapture`.
#[test]
fn cost() {
    let Some(_) = start() else { return };
    println!("{}", kvm::available().unwrap());
    let report = |name: &str, count: u32, work: &mut dyn FnMut()| {
        let mut runs: Vec<_> = (0..5)
            .map(|_| {
                let begun = Instant::now();
                (0..count).for_each(|_| work());
                begun.elapsed() / count
            })
            .collect();
        runs.sort();
        println!("{name:<55} min {:>9.2?} median {:>9.2?}", runs[0], runs[2]);
    };
    report("start a VM with hands, 1 MiB, and end it", 10, &mut || drop(kvm::start(RAM).unwrap()));
    let (mut host, guest) = kvm::start(RAM).unwrap();
    let device = plug(&mut host, 1);
    let (base, line) = (device.place.base, 1 << device.place.line);
    report("load from memory", 500, &mut || drop(load::<4>(&guest, 0x1000)));
    report("load from a device", 500, &mut || drop(load::<4>(&guest, base)));
    report("kick (ioeventfd, event loop not waited for)", 500, &mut || guest.notify(base + QUEUE_NOTIFY, 0).unwrap());
    while wait(&guest, line, Duration::from_millis(20)) != Ok(0) {}
    report("interrupt already raised, wait", 500, &mut || {
        device.interrupt.raise(Cause::Config);
        assert_eq!(wait(&guest, line, WATCHDOG), Ok(line));
    });
    report("wait with nothing pending, one round of spinning", 50, &mut || {
        assert_eq!(wait(&guest, line, Duration::ZERO), Ok(0));
    });
    report("kick, event loop, interrupt, wait", 500, &mut || {
        guest.notify(base + QUEUE_NOTIFY, 0).unwrap();
        assert_eq!(wait(&guest, line, WATCHDOG), Ok(line));
    });
}

/// A virtio device of one queue: writes what it reads, in capitals.
struct Capitals;

impl<M: GuestMemory> device::Device<M> for Capitals {
    fn device_type(&self) -> u32 {
        0x3f
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[8]
    }
    fn config(&self) -> &[u8] {
        b"capitals"
    }
    fn activate(&mut self, _: Features, _: Waker) {}
    fn kick(&mut self, index: u16, queues: &mut device::Queues<'_, M>) {
        let Some(queue) = queues.get(index) else { return };
        while let Ok(mut chain) = queue.pop() {
            let mut text = [0; 8];
            chain.read(0, &mut text).unwrap();
            chain.write(0, &text.to_ascii_uppercase()).unwrap();
            queue.complete(chain).unwrap();
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {}
}

#[test]
fn a_driver_and_a_device_that_know_no_kvm_work_over_mmio() {
    let Some((mut host, guest)) = start() else { return };
    let memory = host.memory();
    mmio::attach(&mut host, memory, Box::new(Capitals)).unwrap();
    let guest = Arc::new(guest);
    let place = guest.enumerate().unwrap()[0];
    let mut driver = mmio::Driver::connect(Arc::clone(&guest), place).unwrap();
    assert_eq!(driver.device_type(), 0x3f);
    transport::initialize(&mut driver, Features::EVENT_IDX).unwrap();
    let mut config = [0; 8];
    transport::read_config(&mut driver, 0, &mut config).unwrap();
    assert_eq!(&config, b"capitals");
    let mut queue = DriverQueue::new(driver.find_vq(0, None).unwrap()).unwrap();
    transport::driver_ok(&mut driver).unwrap();

    let pages = guest.allocate(4096).unwrap();
    let address = guest.share(&pages, Access::READ | Access::WRITE).unwrap();
    for round in 0..100u32 {
        let text = format!("round {:02}", round % 100);
        pages.write(0, text.as_bytes()).unwrap();
        let (readable, writable) = (Buffer { address, len: 8 }, Buffer { address: address + 8, len: 8 });
        queue.add_buf(&[readable], &[writable], round).unwrap();
        queue.kick().unwrap();
        let used = loop {
            if let Some(used) = queue.get_buf().unwrap() {
                break used;
            }
            if queue.enable_cb() {
                driver.wait(WATCHDOG).unwrap();
            }
        };
        assert_eq!(used, (round, 8));
        let mut answer = [0; 8];
        pages.read(8, &mut answer).unwrap();
        assert_eq!(answer, text.to_ascii_uppercase().as_bytes());
    }
    driver.reset().unwrap();
    drop(queue);
    guest.unshare(address).unwrap();
}
