//! Processes that are killed (-9) in mid-flight, the front end or the back end. What is in flight is known to memory that
//! outlives both (INFLIGHT_SHMFD): no acknowledged write is lost, and none is done twice.
#![cfg(target_os = "linux")]

mod driver;
mod session;

use std::env;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use polyvirt_transports::vhost_user::messages::InflightArea;
use polyvirt_transports::vhost_user::{map, memory_file};

use driver::{Driver, MOST, RAM};
use session::{Counts, Session, append, open_of, serve};

/// How often somebody is killed.
const ROUNDS: u64 = 12;
/// Requests that are acknowledged before that.
const REQUESTS: u64 = 200;
/// What a process that is to be killed is told: what it is, and of what.
const ROLE: &str = "POLYVIRT_KILLED";

/// This test, as a process of its own that is killed when it is dropped.
struct Process(Child);

impl Process {
    fn start(test: &str, told: &[String]) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args([test, "--exact", "--nocapture", "--quiet"]).env(ROLE, told.join(" "));
        Self(command.stdout(Stdio::piped()).spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// What this process was told, if it is one that is to be killed.
fn role() -> Option<Vec<String>> {
    Some(env::var(ROLE).ok()?.split(' ').map(String::from).collect())
}

/// Drives the disk at `told[0]` in the memory that `told[1]` names, until it is killed; tells what is in flight, and each
/// time when something was acknowledged.
fn drive_until_killed(told: &[String], packed: bool) -> ! {
    let [socket, ram, before @ ..] = told else { panic!("{told:?}") };
    let ram = File::options().read(true).write(true).open(ram).unwrap();
    let pages = map(ram.try_clone().unwrap().into(), 0, RAM).unwrap();
    let before = before.first().map(|inflight| {
        let file = File::options().read(true).write(true).open(inflight).unwrap();
        let size = file.metadata().unwrap().len();
        (file.into(), InflightArea { size, offset: 0, queues: 1, entries: driver::SIZE })
    });
    let goes_on = before.is_some();
    let mut driver = Driver::new(&pages, packed);
    let mut session = Session::start(Path::new(socket), ram.as_fd(), packed, driver.base(), before);
    let mut out = std::io::stdout();
    writeln!(out, "inflight {}", session.inflight.as_raw_fd()).unwrap();
    // As a driver does that has all in flight that it can: what was used before this began is called for once more.
    assert!(!goes_on || session.wait(), "the back end is gone");
    loop {
        writeln!(out, "acknowledged {}", driver.reap()).unwrap();
        driver.submit(MOST);
        session.kick();
        assert!(session.wait(), "the back end is gone");
    }
}

fn front_end_is_killed(test: &str, packed: bool) {
    if let Some(told) = role() {
        drive_until_killed(&told, packed);
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let counts = Counts::default();
    let counted = counts.clone();
    let at = socket.clone();
    std::thread::spawn(move || serve(&at, move |number| counted.count(number)));
    let (ram, pages) = memory_file("ram", RAM).unwrap();
    let ours = |fd: &OwnedFd| format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
    let mut kept: Option<OwnedFd> = None;
    for round in 0..ROUNDS {
        let mut told = vec![socket.display().to_string(), ours(&ram)];
        told.extend(kept.as_ref().map(ours));
        let mut process = Process::start(test, &told);
        let mut acknowledged = 0;
        for line in BufReader::new(process.0.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            match line.split_once(' ') {
                Some(("inflight", fd)) => {
                    kept.get_or_insert_with(|| open_of(process.0.id(), fd.parse().unwrap()));
                }
                Some(("acknowledged", count)) => acknowledged += count.parse::<u64>().unwrap(),
                // The harness has something to say, too.
                _ => {}
            }
            if acknowledged >= REQUESTS {
                break;
            }
        }
        assert!(acknowledged >= REQUESTS, "round {round}: the front end ended by itself");
    }
    // The last one ends in order.
    let mut driver = Driver::new(&pages, packed);
    let inflight = kept.unwrap();
    let size = File::from(inflight.try_clone().unwrap()).metadata().unwrap().len();
    let area = InflightArea { size, offset: 0, queues: 1, entries: driver::SIZE };
    let mut session = Session::start(&socket, ram.as_fd(), packed, driver.base(), Some((inflight, area)));
    while !driver.is_idle() {
        assert!(session.wait());
        driver.reap();
    }
    assert!(driver.count() >= ROUNDS * REQUESTS);
    let mut never = 0;
    for number in 0..driver.count() {
        match (driver.is_acknowledged(number), counts.of(number)) {
            (true, 1) => {}
            // It was killed before it made this one available.
            (false, 0) => never += 1,
            (acknowledged, times) => panic!("request {number}: acknowledged {acknowledged}, done {times} times"),
        }
    }
    assert!(never <= ROUNDS, "{never} requests were never made available");
}

fn back_end_is_killed(test: &str, packed: bool) {
    if let Some(told) = role() {
        let mut log = File::options().append(true).open(&told[1]).unwrap();
        serve(Path::new(&told[0]), move |number| append(&mut log, number).unwrap());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    File::create(&log).unwrap();
    let (ram, pages) = memory_file("ram", RAM).unwrap();
    let mut driver = Driver::new(&pages, packed);
    let mut before = None;
    // How many requests were acknowledged, and how often each was done, when a back end was killed.
    let mut done: Vec<u32> = Vec::new();
    for round in 1..=ROUNDS {
        let socket = folder.path().join(format!("socket{round}"));
        let process = Process::start(test, &[socket.display().to_string(), log.display().to_string()]);
        let mut session = Session::start(&socket, ram.as_fd(), packed, driver.base(), before.take());
        let last = round == ROUNDS;
        // It does not look before it is called: what it waits for may be used already, by one that was killed before it
        // called.
        assert!(round == 1 || session.wait(), "the back end is gone");
        // Whoever is killed is killed with requests in flight; the last one finishes them.
        loop {
            driver.reap();
            driver.submit(round * REQUESTS);
            session.kick();
            if if last { driver.is_idle() } else { driver.count() == round * REQUESTS } {
                break;
            }
            assert!(session.wait(), "the back end is gone");
        }
        // Or, every other one, with all of them used and none of that seen, as if it had not called.
        while !last && round.is_multiple_of(2) && !driver.is_all_used() {
            assert!(session.wait(), "the back end is gone");
        }
        let acknowledged: Vec<_> = (0..driver.count()).map(|number| driver.is_acknowledged(number)).collect();
        drop(process);
        let counts = counts(&log);
        for (number, before) in done.iter().enumerate().filter(|(_, times)| **times > 0) {
            assert_eq!(counts.of(number as u64), *before, "acknowledged request {number} was done again");
        }
        let count = |(number, acknowledged): (usize, &bool)| if *acknowledged { counts.of(number as u64) } else { 0 };
        done = acknowledged.iter().enumerate().map(count).collect();
        let lost = acknowledged.iter().zip(&done).position(|(acknowledged, times)| *acknowledged && *times == 0);
        assert_eq!(lost, None, "an acknowledged request was never done");
        before = Some((session.inflight.try_clone().unwrap(), session.area));
    }
    assert_eq!(driver.count(), ROUNDS * REQUESTS);
    assert!((0..driver.count()).all(|number| driver.is_acknowledged(number)), "a request was lost");
}

/// What `log` says was done.
fn counts(log: &Path) -> Counts {
    let counts = Counts::default();
    let bytes = std::fs::read(log).unwrap();
    bytes.chunks_exact(8).for_each(|number| counts.count(u64::from_le_bytes(number.try_into().unwrap())));
    counts
}

#[test]
fn a_front_end_killed_on_split_rings_loses_no_write_and_none_is_done_twice() {
    front_end_is_killed("a_front_end_killed_on_split_rings_loses_no_write_and_none_is_done_twice", false);
}

#[test]
fn a_front_end_killed_on_packed_rings_loses_no_write_and_none_is_done_twice() {
    front_end_is_killed("a_front_end_killed_on_packed_rings_loses_no_write_and_none_is_done_twice", true);
}

#[test]
fn a_back_end_killed_on_split_rings_loses_no_write_and_does_none_again() {
    back_end_is_killed("a_back_end_killed_on_split_rings_loses_no_write_and_does_none_again", false);
}

#[test]
fn a_back_end_killed_on_packed_rings_loses_no_write_and_does_none_again() {
    back_end_is_killed("a_back_end_killed_on_packed_rings_loses_no_write_and_does_none_again", true);
}
