//! Devices and drivers that know no lguest, over a guest in a trapped process. Skipped, with the reason, where none runs.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use polyvirt_core::device::{Device, Queues};
use polyvirt_core::features::Features;
use polyvirt_core::hypervisor::{Guest as _, Host as _, HypervisorError, Share as _};
use polyvirt_core::memory::{Access, GuestMemory, MemoryError, ResolveError};
use polyvirt_core::queue::{Buffer, Chain, DriverQueue};
use polyvirt_core::status::Status;
use polyvirt_core::transport::{self, BlockingTransport as _, Transport as _, TransportError};
use polyvirt_hypervisors::lguest::{self, Guest, Host};
use polyvirt_transports::lguest::{Driver, attach};

const WATCHDOG: Duration = Duration::from_secs(60);
const RAM: usize = 1 << 20;

fn start() -> Option<(Host, Arc<Guest>)> {
    match lguest::available() {
        Ok(_) => lguest::start(RAM).map(|(host, guest)| Some((host, Arc::new(guest)))).unwrap(),
        Err(reason) => {
            println!("skipped: {reason}");
            None
        }
    }
}

/// Answers in capitals: on queue 0 at once, on queue 1 from another thread, by its waker.
struct Capitals<M: GuestMemory> {
    waker: Waker,
    waiting: Vec<Chain<M::Lease>>,
    features: Option<Features>,
}

impl<M: GuestMemory> Capitals<M> {
    fn new() -> Box<Self> {
        Box::new(Self { waker: Waker::noop().clone(), waiting: Vec::new(), features: None })
    }
}

fn answer<L: polyvirt_core::memory::Lease>(chain: &mut Chain<L>) {
    let mut text = vec![0; chain.readable_len() as usize];
    chain.read(0, &mut text).unwrap();
    chain.write(0, &text.to_ascii_uppercase()).unwrap();
}

impl<M: GuestMemory + Send> Device<M> for Capitals<M> {
    fn device_type(&self) -> u32 {
        0x3f
    }
    fn features(&self) -> Features {
        Features::bit(3)
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 16]
    }
    fn config(&self) -> &[u8] {
        b"capitals"
    }
    fn activate(&mut self, features: Features, waker: Waker) {
        (self.features, self.waker) = (Some(features), waker);
    }
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        let Some(queue) = queues.get(index) else { return };
        while let Ok(mut chain) = queue.pop() {
            if index == 0 {
                answer(&mut chain);
                queue.complete(chain).unwrap();
            } else {
                self.waiting.push(chain);
                let waker = self.waker.clone();
                std::thread::spawn(move || waker.wake());
            }
        }
    }
    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        let Some(queue) = queues.get(1) else { return };
        for mut chain in self.waiting.drain(..) {
            answer(&mut chain);
            queue.complete(chain).unwrap();
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {
        self.waiting.clear();
    }
}

/// Attaches a device and meets it.
fn capitals(host: &mut Host, guest: &Arc<Guest>) -> Driver<Guest> {
    let memory = host.memory();
    attach(host, memory, Capitals::new()).unwrap();
    Driver::connect(Arc::clone(guest), guest.enumerate().unwrap().pop().unwrap()).unwrap()
}

/// Sends `rounds` texts through `queue`, all that fit at once, and checks the answers.
fn converse(driver: &mut Driver<Guest>, queue: &mut DriverQueue<u64>, rounds: u64) {
    let share = driver.share();
    let pages = share.allocate(RAM / 4).unwrap();
    let address = share.share(&pages, Access::READ | Access::WRITE).unwrap();
    let text = |round: u64| format!("round {round:>10}").into_bytes();
    let (mut sent, mut received) = (0, 0);
    while received < rounds {
        while sent < rounds && sent < received + 7 {
            let at = sent % 16 * 64;
            pages.write(at as usize, &text(sent)).unwrap();
            let [from, to] = [0, 32].map(|offset| Buffer { address: address + at + offset, len: 16 });
            queue.add_buf(&[from], &[to], sent).unwrap();
            sent += 1;
        }
        queue.kick().unwrap();
        match queue.get_buf().unwrap() {
            Some((round, len)) => {
                let mut answer = [0; 16];
                pages.read((round % 16 * 64 + 32) as usize, &mut answer).unwrap();
                assert_eq!((len, &answer[..]), (16, &text(round).to_ascii_uppercase()[..]));
                received += 1;
            }
            None if queue.enable_cb() => drop(driver.wait(WATCHDOG).unwrap()),
            None => {}
        }
    }
    share.unshare(address).unwrap();
}

#[test]
fn a_driver_and_a_device_that_know_no_lguest_work_over_its_bus() {
    for features in [Features::bit(3), Features::EVENT_IDX | Features::INDIRECT_DESC] {
        let Some((mut host, guest)) = start() else { return };
        let mut driver = capitals(&mut host, &guest);
        assert_eq!((driver.device_type(), driver.is_legacy()), (0x3f, true));
        for _again in 0..2 {
            assert_eq!(transport::initialize(&mut driver, features), Ok(features));
            let mut config = [0; 8];
            transport::read_config(&mut driver, 0, &mut config).unwrap();
            assert_eq!(&config, b"capitals");
            let mut queues = [0, 1].map(|index| DriverQueue::new(driver.find_vq(index, None).unwrap()).unwrap());
            assert_eq!([0, 1].map(|index| driver.queue_max_size(index)), [Ok(128), Ok(16)]);
            transport::driver_ok(&mut driver).unwrap();
            queues.iter_mut().for_each(|queue| converse(&mut driver, queue, 300));
            driver.reset().unwrap();
        }
    }
}

#[test]
fn devices_share_one_guest_and_each_is_told_its_own() {
    let Some((mut host, guest)) = start() else { return };
    let drivers: Vec<_> = (0..3).map(|_| capitals(&mut host, &guest)).collect();
    assert_eq!(guest.enumerate().unwrap().len(), 3);
    std::thread::scope(|scope| {
        for mut driver in drivers {
            scope.spawn(move || {
                transport::initialize(&mut driver, Features::empty()).unwrap();
                let mut queue = DriverQueue::new(driver.find_vq(1, None).unwrap()).unwrap();
                transport::driver_ok(&mut driver).unwrap();
                converse(&mut driver, &mut queue, 100);
            });
        }
    });
}

#[test]
fn a_broken_ring_needs_a_reset_and_is_told_by_an_interrupt() {
    let Some((mut host, guest)) = start() else { return };
    let mut driver = capitals(&mut host, &guest);
    transport::initialize(&mut driver, Features::empty()).unwrap();
    let mut virtqueue = driver.find_vq(0, None).unwrap();
    transport::driver_ok(&mut driver).unwrap();
    virtqueue.driver.write(2, &129u16.to_le_bytes()).unwrap();
    virtqueue.notify.notify().unwrap();
    assert!(driver.wait(WATCHDOG).unwrap().config);
    assert!(driver.status().unwrap().contains(Status::DEVICE_NEEDS_RESET));
    driver.reset().unwrap();
    assert_eq!(driver.status(), Ok(Status::empty()));
}

#[test]
fn a_driver_whose_guest_is_killed_learns_it_from_every_call() {
    let Some((mut host, guest)) = start() else { return };
    let mut driver = capitals(&mut host, &guest);
    transport::initialize(&mut driver, Features::empty()).unwrap();
    let mut virtqueue = driver.find_vq(0, None).unwrap();
    kill(Pid::from_raw(host.process_id()), Signal::SIGKILL).unwrap();
    let results =
        [driver.wait(WATCHDOG).map(drop), virtqueue.notify.notify(), driver.reset(), driver.set_status(Status::DRIVER)];
    for result in results {
        let Err(TransportError::Hypervisor(HypervisorError::GuestStopped(reason))) = result else {
            panic!("expected a guest that stopped, got {result:?}");
        };
        assert!(reason.contains("SIGKILL"), "{reason}");
    }
    let memory = host.memory();
    let refused = attach(&mut host, memory, Capitals::new());
    assert!(matches!(refused, Err(HypervisorError::GuestStopped(_))));
}

#[test]
fn memory_is_ram_and_what_is_above_it_and_ends_there() {
    let Some((host, guest)) = start() else { return };
    let pages = guest.allocate(RAM).unwrap();
    assert_eq!(guest.allocate(1).unwrap_err(), HypervisorError::Exhausted("guest memory"));
    let address = guest.share(&pages, Access::READ | Access::WRITE).unwrap();
    let limit = address + RAM as u64 + 256 * 4096;
    let resolve = |address, len| host.memory().resolve(address, len, Access::WRITE, |_| {});
    assert_eq!(resolve(limit - 8, 8), Ok(()));
    assert!(matches!(resolve(limit - 8, 9), Err(ResolveError::Fault(MemoryError::NotMapped { .. }))));
    assert!(matches!(resolve(u64::MAX, 2), Err(ResolveError::Fault(MemoryError::Wraps { .. }))));

    host.memory().resolve(address, 4, Access::WRITE, |segment| segment.write(0, b"host").unwrap()).unwrap();
    let mut seen = [0; 4];
    pages.read(0, &mut seen).unwrap();
    assert_eq!(&seen, b"host");
    drop(pages);
    guest.allocate(RAM).unwrap().read(0, &mut seen).unwrap();
    assert_eq!(seen, [0; 4]);
}

/// Set in the process that plays the launcher in [`a_guest_does_not_outlive_its_launcher`].
const LAUNCHER: &str = "POLYVIRT_TEST_LAUNCHER";

#[test]
fn a_guest_does_not_outlive_its_launcher() {
    let Some((host, _guest)) = start() else { return };
    if std::env::var_os(LAUNCHER).is_some() {
        println!("\nguest {}", host.process_id());
        loop {
            std::thread::park();
        }
    }
    let mut launcher = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_guest_does_not_outlive_its_launcher", "--nocapture"])
        .env(LAUNCHER, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(launcher.stdout.take().unwrap()).lines();
    let guest = lines.find_map(|line| line.unwrap().strip_prefix("guest ").map(str::to_owned)).unwrap();
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    let began = Instant::now();
    // Gone, or dead and not buried yet by whoever inherited it.
    while std::fs::read_to_string(format!("/proc/{guest}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(began.elapsed() < WATCHDOG, "the guest lives");
        std::thread::yield_now();
    }
}
