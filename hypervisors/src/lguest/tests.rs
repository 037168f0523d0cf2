use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::task::Waker;
use std::time::{Duration, Instant};

use polyvirt_core::hypervisor::{
    BusDevice, Cause, Guest as _, Host as _, HypervisorError, Interrupt, Share as _, WaitForInterrupt as _,
};
use polyvirt_core::memory::Access;
use polyvirt_transports::lguest::registers::DeviceDescriptor;

use super::abi::*;
use super::*;

/// Longer than anything here takes.
const WATCHDOG: Duration = Duration::from_secs(60);
/// Long enough that what is to come would have come, if it came wrongly.
const SHORT: Duration = Duration::from_millis(20);
const RAM: usize = 0x10000;
const RAM_END: u64 = RAM as u64 + hands::PAGES * PAGE;
const LIMIT: u64 = RAM_END + DEVICE_PAGES * PAGE;

/// A guest, or none with a line that says why this host runs none.
fn guest() -> Option<(Host, Guest)> {
    static UNAVAILABLE: OnceLock<Option<String>> = OnceLock::new();
    let reason = UNAVAILABLE.get_or_init(|| available().err().map(|error| error.to_string()));
    if let Some(reason) = reason {
        println!("skipped: {reason}");
        return None;
    }
    Some(start(RAM).unwrap())
}

fn stopped<T: std::fmt::Debug>(result: Result<T, HypervisorError>) -> String {
    match result {
        Err(HypervisorError::GuestStopped(reason)) => reason,
        other => panic!("expected a guest that stopped, got {other:?}"),
    }
}

/// What happened to a device.
#[derive(Debug, PartialEq)]
enum Happened {
    Written(u64, Vec<u8>),
    Kicked(u16),
    Polled,
}

struct Toy {
    happened: Sender<Happened>,
    waker: Arc<Mutex<Option<Waker>>>,
    /// How often queue 0 has more to do.
    more: usize,
    on_kick: Option<Arc<dyn Interrupt>>,
}

impl BusDevice for Toy {
    fn read(&mut self, _: u64, _: &mut [u8]) {}
    fn write(&mut self, offset: u64, data: &[u8]) {
        let _ = self.happened.send(Happened::Written(offset, data.into()));
    }
    fn kick(&mut self, queue: u16) -> bool {
        let _ = self.happened.send(Happened::Kicked(queue));
        if let Some(interrupt) = &self.on_kick {
            interrupt.raise(Cause::Queue(queue));
        }
        let more = queue == 0 && self.more > 0;
        self.more -= usize::from(more);
        more
    }
    fn poll(&mut self) -> bool {
        let _ = self.happened.send(Happened::Polled);
        false
    }
    fn set_waker(&mut self, waker: Waker) {
        *self.waker.lock().unwrap() = Some(waker);
    }
}

struct Plugged {
    happened: Receiver<Happened>,
    waker: Waker,
    interrupt: Arc<dyn Interrupt>,
    lines: u64,
    descriptor: u64,
    rings: Vec<u64>,
}

/// Plugs in a toy with `queues` queues.
fn plug(host: &mut Host, queues: u8, more: usize, interrupts: bool) -> Plugged {
    let mut place = host.place(4, queues.into()).unwrap();
    let descriptor = DeviceDescriptor { device_type: 4, queues, feature_len: 4, config_len: 3 };
    place.page.write(place.offset, &descriptor.to_bytes()).unwrap();
    place.len = descriptor.len();
    let (sender, happened) = channel();
    let waker = Arc::new(Mutex::new(None));
    let interrupt = host.interrupt(&place);
    let on_kick = interrupts.then(|| Arc::clone(&interrupt));
    let toy = Toy { happened: sender, waker: Arc::clone(&waker), more, on_kick };
    let lines = place.rings.iter().fold(0, |bits, ring| bits | 1 << ring.line);
    let (address, rings) = (RAM_END + place.offset as u64, place.rings.iter().map(|ring| ring.address).collect());
    host.plug(place, Box::new(toy)).unwrap();
    let waker = waker.lock().unwrap().clone().unwrap();
    Plugged { happened, waker, interrupt, lines, descriptor: address, rings }
}

/// Writes `value` to the word of the payload's `lguest_data` at `offset`.
fn set_lguest_data(host: &Host, offset: u64, value: u32) {
    let word = host.memory().pages(hands::LGUEST_DATA + offset, 4).unwrap();
    word.write(0, &value.to_le_bytes()).unwrap();
}

/// Puts `code` where the payload goes on after its next HALT.
fn corrupt(host: &Host, code: &[u8]) {
    let mut payload = vec![0; 0x800];
    let memory = host.memory().pages(0, payload.len()).unwrap();
    memory.read(0, &mut payload).unwrap();
    // mov eax, HALT; int 0x1f
    let halt = [0xb8, LHCALL_HALT as u8, 0, 0, 0, 0xcd, 0x1f];
    let at = payload.windows(halt.len()).position(|window| window == halt).unwrap();
    memory.write(at + halt.len(), code).unwrap();
}

/// The state of the guest's process; none if it is gone.
fn process_state(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
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
fn a_hypercall_goes_to_the_launcher_and_its_result_comes_back() {
    let Some((_host, guest)) = guest() else { return };
    assert_eq!(guest.hypercall(LHCALL_FLUSH_ASYNC, [1, 2, 3]), Ok(0));
    for unknown in [18, 0x1000, u64::MAX] {
        assert_eq!(guest.hypercall(unknown, [0; 3]), Ok(UNKNOWN_CALL), "{unknown:#x}");
    }
}

#[test]
fn hypercalls_from_several_threads_take_turns() {
    let Some((mut host, guest)) = guest() else { return };
    let toy = plug(&mut host, 2, 0, false);
    std::thread::scope(|scope| {
        let guest = &guest;
        for ring in &toy.rings {
            scope.spawn(move || (0..100).for_each(|_| guest.notify(*ring, 0).unwrap()));
        }
    });
    let kicks: Vec<_> = toy.happened.try_iter().collect();
    assert_eq!(kicks.iter().filter(|&kick| *kick == Happened::Kicked(0)).count(), 100);
    assert_eq!(kicks.len(), 200);
}

#[test]
fn notify_means_what_its_address_does() {
    let Some((mut host, guest)) = guest() else { return };
    let first = plug(&mut host, 2, 0, false);
    let second = plug(&mut host, 1, 0, false);
    assert_eq!((first.descriptor, second.descriptor), (RAM_END, RAM_END + 5 + 16 + 8 + 3));
    assert_eq!(first.rings, [RAM_END + PAGE, RAM_END + 3 * PAGE], "after the device page, two pages each");
    assert_eq!(second.rings, [RAM_END + 5 * PAGE]);
    assert_eq!((first.lines, second.lines), (0b110, 0b1000), "0 is the timer");

    guest.notify(second.descriptor, 0).unwrap();
    assert_eq!(second.happened.try_recv(), Ok(Happened::Written(0, vec![])));
    guest.notify(first.rings[1], 0).unwrap();
    assert_eq!(first.happened.try_recv(), Ok(Happened::Kicked(1)));
    guest.notify(second.rings[0], 0).unwrap();
    assert_eq!(second.happened.try_recv(), Ok(Happened::Kicked(0)));

    // One byte off, or a ring's second page: something to print, which is empty.
    for address in [second.descriptor + 1, first.rings[0] + 1, first.rings[0] + PAGE] {
        guest.notify(address, 0).unwrap();
    }
    assert!(first.happened.try_recv().is_err() && second.happened.try_recv().is_err());
}

#[test]
fn what_notify_points_at_elsewhere_is_printed_up_to_its_end_and_the_limit() {
    let Some((host, guest)) = guest() else { return };
    let string = guest.allocate(3 * PAGE as usize).unwrap();
    let address = guest.share(&string, Access::READ).unwrap();
    string.write(0, b"early\0late").unwrap();
    guest.notify(address, 0).unwrap();
    string.write(0, &[0xff, 0]).unwrap();
    guest.notify(address, 0).unwrap();
    assert_eq!(host.early_console(), "early\u{fffd}");

    string.fill(0, string.len(), b'x').unwrap();
    guest.notify(address, 0).unwrap();
    assert_eq!(host.early_console().len(), 8 + 4096, "a string without an end is cut");
    for _ in 0..32 {
        guest.notify(address, 0).unwrap();
    }
    assert_eq!(host.early_console().len(), 64 * 1024, "the log keeps the end");

    // The last byte of memory is not beyond the limit.
    guest.notify(LIMIT - 1, 0).unwrap();
}

#[test]
fn a_notify_at_or_above_the_limit_stops_the_guest() {
    for address in [LIMIT, LIMIT + 1, u64::MAX] {
        let Some((_host, guest)) = guest() else { return };
        let reason = stopped(guest.notify(address, 0));
        assert!(reason.contains(&format!("NOTIFY for {address:#x}")), "{reason}");
        assert_eq!(stopped(wait(&guest, 2, WATCHDOG)), reason, "and every later call says the same");
        assert_eq!(stopped(guest.enumerate().map(drop)), reason);
    }
}

#[test]
fn an_interrupt_is_delivered_once_whether_raised_before_or_during_the_wait() {
    let Some((mut host, guest)) = guest() else { return };
    let toy = plug(&mut host, 2, 0, false);
    toy.interrupt.raise(Cause::Queue(1));
    assert_eq!(wait(&guest, toy.lines, WATCHDOG), Ok(0b100));
    assert_eq!(wait(&guest, toy.lines, SHORT), Ok(0), "acknowledged");

    toy.interrupt.raise(Cause::Config);
    assert_eq!(wait(&guest, 0b100, SHORT), Ok(0), "of another line");
    assert_eq!(wait(&guest, toy.lines, WATCHDOG), Ok(0b010));

    let waiting = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while waiting.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            toy.interrupt.raise(Cause::Queue(0));
        });
        waiting.store(1, Ordering::SeqCst);
        assert_eq!(wait(&guest, u64::MAX, WATCHDOG), Ok(0b010));
    });
}

#[test]
fn an_interrupt_that_a_device_raises_while_it_is_kicked_is_there_when_notify_returns() {
    let Some((mut host, guest)) = guest() else { return };
    let toy = plug(&mut host, 1, 0, true);
    for _ in 0..100 {
        guest.notify(toy.rings[0], 0).unwrap();
        assert_eq!(wait(&guest, toy.lines, Duration::ZERO), Ok(toy.lines));
    }
}

#[test]
fn a_blocked_interrupt_waits_until_its_line_is_open_and_stops_no_other() {
    let Some((mut host, guest)) = guest() else { return };
    let toy = plug(&mut host, 2, 0, false);
    set_lguest_data(&host, BLOCKED_INTERRUPTS, 0b010);
    toy.interrupt.raise(Cause::Queue(0));
    toy.interrupt.raise(Cause::Queue(1));
    assert_eq!(wait(&guest, 0b100, WATCHDOG), Ok(0b100));
    assert_eq!(wait(&guest, 0b010, SHORT), Ok(0), "blocked");
    set_lguest_data(&host, BLOCKED_INTERRUPTS, 0);
    guest.hypercall(LHCALL_FLUSH_ASYNC, [0; 3]).unwrap();
    assert_eq!(wait(&guest, 0b010, WATCHDOG), Ok(0b010));
}

#[test]
fn a_line_without_a_gate_is_not_delivered_until_it_has_one() {
    let Some((mut host, guest)) = guest() else { return };
    let toy = plug(&mut host, 1, 0, false);
    // The gate of line 1 as the payload loaded it: the second of its handlers, which are eight bytes each.
    let mut payload = vec![0; 0x800];
    host.memory().pages(0, 0x800).unwrap().read(0, &mut payload).unwrap();
    let is_first = |handlers: &[u8]| handlers[..2] == [0x6a, 0] && handlers[8..10] == [0x6a, 1]; // push 0, push 1
    let handlers = (0..0x700).step_by(8).find(|&at| is_first(&payload[at..])).unwrap();
    guest.hypercall(LHCALL_LOAD_IDT_ENTRY, [33, 0, 0]).unwrap();
    toy.interrupt.raise(Cause::Queue(0));
    assert_eq!(wait(&guest, toy.lines, SHORT), Ok(0));
    guest.hypercall(LHCALL_LOAD_IDT_ENTRY, [33, handlers as u64 + 8, 0x8e00]).unwrap();
    assert_eq!(wait(&guest, toy.lines, WATCHDOG), Ok(toy.lines));
    // Vectors that are no lines change nothing.
    for vector in [0, 31, 64, u64::MAX] {
        assert_eq!(guest.hypercall(LHCALL_LOAD_IDT_ENTRY, [vector, 0, 0]), Ok(0));
    }
}

#[test]
fn a_kick_with_more_to_do_is_served_again_without_starving_others() {
    let Some((mut host, guest)) = guest() else { return };
    let greedy = plug(&mut host, 1, usize::MAX, false);
    let other = plug(&mut host, 1, 0, false);
    guest.notify(greedy.rings[0], 0).unwrap();
    guest.notify(other.rings[0], 0).unwrap();
    assert_eq!(other.happened.try_recv(), Ok(Happened::Kicked(0)));
    other.waker.wake_by_ref();
    assert_eq!(other.happened.recv_timeout(WATCHDOG), Ok(Happened::Polled));
    other.interrupt.raise(Cause::Queue(0));
    assert_eq!(wait(&guest, other.lines, WATCHDOG), Ok(other.lines));
    let (before, more) = (greedy.happened.try_iter().count(), greedy.happened.recv_timeout(WATCHDOG));
    assert!(before > 1 && more == Ok(Happened::Kicked(0)));
}

#[test]
fn a_waker_has_its_device_polled_from_any_thread() {
    let Some((mut host, _guest)) = guest() else { return };
    let toy = plug(&mut host, 0, 0, false);
    std::thread::scope(|scope| scope.spawn(|| toy.waker.wake_by_ref()).join().unwrap());
    assert_eq!(toy.happened.recv_timeout(WATCHDOG), Ok(Happened::Polled));
    drop(host);
    toy.waker.wake_by_ref();
    assert!(toy.happened.recv().is_err(), "the device is gone with its host");
}

#[test]
fn what_a_guest_must_not_do_stops_it_and_is_reported() {
    let cases: [(&[u8], &str); 8] = [
        (&[0x0f, 0x0b], "SIGILL"),                            // ud2
        (&[0x0f, 0x05], "system call"),                       // syscall
        (&[0xcd, 0x80], "system call"),                       // int 0x80
        (&[0xb8, 60, 0, 0, 0, 0x0f, 0x05], "system call 60"), // exit
        (&[0xcd, 0x1e], "SIGSEGV"),                           // another int
        (&[0xcc], "SIGTRAP"),                                 // int3
        (&[0xf4], "SIGSEGV"),                                 // hlt
        (&[0x48, 0xa1, 0, 0, 0, 0, 0, 0, 0, 0], "SIGSEGV"),   // mov rax, [0]
    ];
    for (code, expected) in cases {
        let Some((host, guest)) = guest() else { return };
        corrupt(&host, code);
        let reason = stopped(guest.hypercall(LHCALL_FLUSH_ASYNC, [0; 3]));
        assert!(reason.contains(expected), "{code:x?}: {reason}");
        assert_eq!(stopped(wait(&guest, 2, WATCHDOG)), reason);
    }
}

#[test]
fn a_guest_has_no_memory_but_its_own() {
    let Some((host, guest)) = guest() else { return };
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", host.process_id())).unwrap();
    let start = host.memory().pages(0, 1).unwrap().as_ptr().addr();
    let own = format!("{start:x}-{:x} rwxs", start + LIMIT as usize);
    // The kernel shows its vsyscall page in every process; it is not mapped.
    let maps: Vec<_> = maps.lines().filter(|line| !line.ends_with("[vsyscall]")).collect();
    assert!(maps.len() == 1 && maps[0].starts_with(&own), "{maps:#?}");
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", host.process_id())).unwrap().count();
    assert_eq!(descriptors, 0);
    drop(guest);
}

#[test]
fn a_guest_that_is_killed_is_reported_to_who_waits_and_to_who_calls() {
    let Some((host, guest)) = guest() else { return };
    let began = Instant::now();
    let pid = nix::unistd::Pid::from_raw(host.process_id());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| wait(&guest, 2, WATCHDOG));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        assert!(stopped(waiting.join().unwrap()).contains("SIGKILL"));
    });
    assert!(began.elapsed() < WATCHDOG, "not by the watchdog");
    assert!(stopped(guest.notify(RAM_END, 0)).contains("SIGKILL"));
}

#[test]
fn signals_from_outside_are_not_the_guests_business() {
    let Some((host, guest)) = guest() else { return };
    let pid = nix::unistd::Pid::from_raw(host.process_id());
    for signal in
        [nix::sys::signal::Signal::SIGINT, nix::sys::signal::Signal::SIGTERM, nix::sys::signal::Signal::SIGSTOP]
    {
        nix::sys::signal::kill(pid, signal).unwrap();
    }
    assert_eq!(guest.hypercall(LHCALL_FLUSH_ASYNC, [0; 3]), Ok(0));
}

#[test]
fn a_guest_that_shuts_down_or_has_no_room_for_interrupts_is_reported() {
    let Some((host, guest)) = guest() else { return };
    let last_words = host.memory().pages(0x2000, 4).unwrap();
    last_words.write(0, b"bye\0").unwrap();
    assert!(stopped(guest.hypercall(LHCALL_SHUTDOWN, [0x2000, 1, 0])).contains("shut down: bye"));

    for (data, good) in [(RAM_END - 8, true), (RAM_END - 4, false), (0x1002, false), (u64::MAX - 3, false)] {
        let (_host, guest) = start(RAM).unwrap();
        let result = guest.hypercall(LHCALL_LGUEST_INIT, [data, 0, 0]);
        assert_eq!(result.is_ok(), good, "{data:#x}: {result:?}");
    }

    let (mut host, guest) = start(RAM).unwrap();
    let toy = plug(&mut host, 1, 0, false);
    let mut code = vec![0x31, 0xe4]; // xor esp, esp
    code.extend([0x41, 0xc7, 0x87, 0, 0x18, 0, 0, 0, 0, 0, 0]); // mov dword ptr [r15 + COMMAND], 0
    code.extend([0xb8, LHCALL_HALT as u8, 0, 0, 0, 0xcd, 0x1f]); // mov eax, HALT; int 0x1f
    corrupt(&host, &code);
    guest.hypercall(LHCALL_FLUSH_ASYNC, [0; 3]).unwrap();
    toy.interrupt.raise(Cause::Queue(0));
    let reason = stopped(wait(&guest, 2, WATCHDOG));
    assert!(reason.contains("stack pointer"), "{reason}");
}

#[test]
fn a_guest_that_ignores_its_mailbox_is_reported() {
    let Some((host, guest)) = guest() else { return };
    corrupt(&host, &[0xb8, LHCALL_HALT as u8, 0, 0, 0, 0xcd, 0x1f, 0xeb, 0xf7]); // mov eax, HALT; int 0x1f; again
    let reason = stopped(guest.hypercall(LHCALL_FLUSH_ASYNC, [0; 3]));
    assert!(reason.contains("mailbox"), "{reason}");
}

#[test]
fn a_guest_that_runs_for_ever_does_not_keep_its_host() {
    let Some((host, guest)) = guest() else { return };
    corrupt(&host, &[0xeb, 0xfe]); // jmp to itself
    let pid = host.process_id();
    std::thread::scope(|scope| {
        let calling = scope.spawn(|| guest.hypercall(LHCALL_FLUSH_ASYNC, [0; 3]));
        while process_state(pid) != Some('R') {
            std::thread::yield_now();
        }
        drop(host);
        assert!(stopped(calling.join().unwrap()).contains("host is gone"));
    });
    assert_eq!(process_state(pid), None);
}

#[test]
fn a_guest_that_runs_for_ever_is_reported_to_who_calls() {
    let Some((host, guest)) = guest() else { return };
    corrupt(&host, &[0xeb, 0xfe]); // jmp to itself
    let reason = stopped(guest.hypercall(LHCALL_FLUSH_ASYNC, [0; 3]));
    assert!(reason.contains("without a hypercall"), "{reason}");
}

#[test]
fn an_idle_guest_is_stopped_and_is_gone_when_its_host_is() {
    let Some((host, guest)) = guest() else { return };
    let pid = host.process_id();
    let began = Instant::now();
    while process_state(pid) != Some('t') {
        assert!(began.elapsed() < WATCHDOG, "expected a tracing stop, got {:?}", process_state(pid));
        std::thread::yield_now();
    }
    drop(host);
    assert_eq!(process_state(pid), None);
    assert!(stopped(wait(&guest, 1, WATCHDOG)).contains("host is gone"));
    assert!(guest.allocate(1).is_ok(), "its memory stays for who holds it");
}

#[test]
fn places_run_out_and_are_taken_in_order() {
    let Some((mut host, guest)) = guest() else { return };
    assert_eq!(host.place(4, 32).map(drop), Err(HypervisorError::Exhausted("interrupt lines")));
    let (first, second) = (host.place(4, 1).unwrap(), host.place(4, 1).unwrap());
    let toy = || Box::new(Toy { happened: channel().0, waker: Arc::default(), more: 0, on_kick: None });
    assert!(host.plug(first.clone(), toy()).is_err(), "no descriptor was written");
    let with_len = |mut place: polyvirt_transports::lguest::HostPlace| {
        place.len = 13;
        place
    };
    host.plug(with_len(first), toy()).unwrap();
    assert!(host.plug(with_len(second), toy()).is_err(), "taken");
    assert_eq!(host.place(4, 31).map(drop), Err(HypervisorError::Exhausted("interrupt lines")));
    plug(&mut host, 30, 0, false);
    assert!(host.place(4, 1).is_err() && host.place(4, 0).is_ok());
    assert_eq!(guest.enumerate().unwrap().len(), 0, "the first has no type: the list ends there");
}
