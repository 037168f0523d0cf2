//! A process that has as many file descriptors as it may: nothing is lost, nothing ends but the session that it is about.
//!
//! The limit is a whole process's, so the test calls itself with one.

use std::fs::{File, read_dir, read_to_string};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::thread::yield_now;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use polyvirt_core::Features;
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{ConnectionError, Ended, ServeError, memory_file};

use crate::front::{Front, Ram, Server};

/// Carries `inside` out in a process of its own, which may have few files; it is called again by the test named `test`.
fn crowded(test: &str, inside: impl FnOnce()) {
    if std::env::var_os("POLYVIRT_CROWDED").is_some() {
        return inside();
    }
    let this = std::env::current_exe().unwrap();
    let limited = "ulimit -n 64; exec \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", limited]).arg(this).args(["--exact", test, "--nocapture", "--test-threads=1"]);
    let output = command.env("POLYVIRT_CROWDED", "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

/// Opens files until no more than `left` can be opened.
fn fill(left: usize) -> Vec<File> {
    let mut files: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    files.truncate(files.len() - left);
    files
}

#[test]
fn memory_that_cannot_be_guarded_is_not_mapped() {
    crowded("crowded::memory_that_cannot_be_guarded_is_not_mapped", || {
        let server = Server::start();
        let mut front = server.connect();
        let file = tempfile::tempfile().unwrap();
        front.ram = Ram::of(&file);
        let maps: Vec<_> =
            std::iter::from_fn(|| memory_file("map", 4096).ok()).map(|(_, pages)| pages).take(5000).collect();
        front.negotiate(Features::VERSION_1, ProtocolFeatures::empty());
        let table = [1u64.to_bytes(), front.ram.region().to_bytes()].concat();
        front.send(Request::SetMemTable, &table, &[file.as_fd()]);
        front.closed();
        let ended = server.ended();
        let Err(ServeError::Refused { request: "SET_MEM_TABLE", reason }) = ended else { panic!("{ended:?}") };
        assert!(reason.ends_with("maps in use"), "{reason}");
        drop(maps);
        server.check();
    });
}

fn open_files() -> usize {
    read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn descriptors_for_which_there_is_no_room_end_their_session_and_none_stays_open() {
    crowded("crowded::descriptors_for_which_there_is_no_room_end_their_session_and_none_stays_open", || {
        let server = Server::start();
        for count in [8, 253] {
            let mut front = server.connect();
            front.begin(Features::VERSION_1, ProtocolFeatures::empty());
            let before = open_files();
            let files = fill(3);
            front.send(Request::GetFeatures, &[], &vec![files[0].as_fd(); count]);
            front.closed();
            assert_eq!(server.ended(), Err(ServeError::Connection(ConnectionError::NoRoom { got: 3 })));
            drop(files);
            // The session's connection and files are closed besides.
            assert!(open_files() < before);
        }
        server.check();
    });
}

/// What is known of the server's thread.
struct Thread(File);

impl Thread {
    fn of_server() -> Self {
        let mut tasks = read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        let server = tasks.find(|task| read_to_string(task.join("comm")).unwrap().trim() == "server").unwrap();
        Self(File::open(server.join("status")).unwrap())
    }

    fn says(&self, what: &str) -> String {
        let mut status = [0; 4096];
        // Nothing once it has ended.
        let len = self.0.read_at(&mut status, 0).unwrap_or(0);
        let status = String::from_utf8_lossy(&status[..len]);
        status.lines().find_map(|line| line.strip_prefix(what)).unwrap_or_default().trim().into()
    }

    /// How often it has waited, once it waits.
    fn waited(&self) -> String {
        while !self.says("State:").starts_with('S') {
            yield_now();
        }
        self.says("voluntary_ctxt_switches:")
    }
}

#[test]
fn a_front_end_for_which_there_is_no_room_waits_until_there_is() {
    crowded("crowded::a_front_end_for_which_there_is_no_room_waits_until_there_is", || {
        let server = Server::start();
        server.check();
        let (thread, ram) = (Thread::of_server(), Ram::new());
        let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let files = fill(0);
        let before = thread.waited();
        connect(socket.as_raw_fd(), &UnixAddr::new(&server.path).unwrap()).unwrap();
        // It has looked, and waits again.
        while thread.says("voluntary_ctxt_switches:") == before {
            yield_now();
        }
        drop(files);
        let mut front = Front::new(socket.into(), ram);
        front.begin(Features::VERSION_1, ProtocolFeatures::empty());
        let mut queue = front.queue(0);
        queue.send(&front.ram, 0, b"let in");
        queue.wait(1);
        drop((front, queue));
        assert_eq!(server.ended(), Ok(Ended::Closed));
        server.check();
    });
}
