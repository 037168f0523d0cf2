//! Memory that is not what it is said to be, goes away, or becomes shorter.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use polyvirt_core::Features;
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Ended, ServeError, memory_file};

use crate::front::{Front, RAM, RAM_AT, Ram, SIZE, Server, event};

/// Hands `regions` over, with `file` for each, all at once and one by one; the session ends: why.
fn refused(server: &Server, regions: &[Region], file: BorrowedFd<'_>) -> String {
    let [reason, other] = [false, true].map(|one_by_one| {
        let mut front = server.connect();
        front.negotiate(Features::VERSION_1, ProtocolFeatures::CONFIGURE_MEM_SLOTS);
        if one_by_one {
            for region in regions {
                front.send(Request::AddMemReg, &[0u64.to_bytes(), region.to_bytes()].concat(), &[file]);
            }
        } else {
            let table: Vec<_> = regions.iter().flat_map(Region::to_bytes).collect();
            let table = [(regions.len() as u64).to_bytes(), table].concat();
            front.send(Request::SetMemTable, &table, &vec![file; regions.len()]);
        }
        front.closed();
        match server.ended() {
            Err(ServeError::Refused { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    });
    assert_eq!(reason, other);
    reason
}

const REGION: Region = Region { guest: 0, size: 0x1000, user: 0x1000, offset: 0 };

#[test]
fn regions_that_cannot_be_are_refused() {
    let server = Server::start();
    let (file, _pages) = memory_file("ram", 0x4000).unwrap();
    let file = file.as_fd();
    let overlapping = [Region { size: 0x2000, ..REGION }, Region { guest: 0x1000, ..REGION }];
    assert!(refused(&server, &overlapping, file).ends_with("overlaps another"));
    for wraps in [
        Region { guest: u64::MAX - 0xfff, ..REGION },
        Region { user: u64::MAX - 0xfff, ..REGION },
        Region { guest: 0x1000, size: u64::MAX - 0xfff, ..REGION },
    ] {
        let reason = refused(&server, &[wraps], file);
        assert!(reason.contains("beyond 2^64"), "{reason}");
    }
    for (region, expected) in [
        (Region { size: 0, ..REGION }, "nothing to map"),
        (Region { size: 0x5000, ..REGION }, "beyond the end of a file of 0x4000 bytes"),
        (Region { offset: 0x4000, ..REGION }, "beyond the end of a file of 0x4000 bytes"),
        (Region { offset: u64::MAX - 0xfff, ..REGION }, "wraps around"),
        (Region { offset: 1 << 62, ..REGION }, "beyond the end"),
        (Region { guest: 0x1001, ..REGION }, "not whole pages"),
        (Region { size: 1, ..REGION }, "not whole pages"),
        (Region { user: 0x1800, ..REGION }, "not whole pages"),
        (Region { offset: 8, ..REGION }, "not whole pages"),
    ] {
        let reason = refused(&server, &[region], file);
        assert!(reason.contains(expected), "{reason}");
    }
    server.check();
}

#[test]
fn descriptors_that_are_no_memory_are_refused() {
    let server = Server::start();
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    let event: OwnedFd = event().into();
    let device = File::open("/dev/zero").unwrap();
    for file in [pipe.as_fd(), event.as_fd(), device.as_fd()] {
        let reason = refused(&server, &[REGION], file);
        assert!(reason.contains("no regular file"), "{reason}");
    }
    // A file that may be read only.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ram");
    std::fs::write(&path, [0; 0x1000]).unwrap();
    let reason = refused(&server, &[REGION], File::open(&path).unwrap().as_fd());
    assert!(reason.contains("mmap"), "{reason}");
    server.check();
}

#[test]
fn a_table_has_as_many_regions_as_it_says() {
    let server = Server::start();
    let (file, _pages) = memory_file("ram", 0x4000).unwrap();
    let fds = |count| vec![file.as_fd(); count];
    for count in [9u64, 0xffff_ffff] {
        let mut front = server.connect();
        front.send(Request::SetMemTable, &[count.to_bytes(), REGION.to_bytes()].concat(), &fds(1));
        front.closed();
        let ended = server.ended();
        let Err(ServeError::Refused { reason, .. }) = ended else { panic!("{ended:?}") };
        assert_eq!(reason, format!("{count} regions, expected at most 8"));
    }
    let mut front = server.connect();
    front.send(Request::SetMemTable, &[2u64.to_bytes(), REGION.to_bytes()].concat(), &fds(2));
    front.closed();
    assert_eq!(server.ended(), Err(ServeError::Size { request: "SET_MEM_TABLE", expected: 72, got: 40 }));
    // User Mode Linux: one region in the payload of two.
    let mut front = server.connect();
    front.negotiate(Features::VERSION_1, ProtocolFeatures::empty());
    let table = [1u64.to_bytes(), front.ram.region().to_bytes(), vec![0xff; Region::LEN]].concat();
    let ram = front.ram.file.try_clone().unwrap();
    front.tell(Request::SetMemTable, &table, &[ram.as_fd()]);
    let mut queue = front.queue(0);
    queue.send(&front.ram, 0, b"from a longer table");
    assert_eq!(queue.wait(1), [0]);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
    server.check();
}

#[test]
fn slots_are_bounded() {
    let server = Server::start();
    let (file, _pages) = memory_file("ram", 0x1000).unwrap();
    let mut front = server.connect();
    front.negotiate(Features::VERSION_1, ProtocolFeatures::CONFIGURE_MEM_SLOTS);
    let slots: u64 = front.ask(Request::GetMaxMemSlots, &[]);
    assert_eq!(slots, MEM_SLOTS);
    for slot in 0..=slots {
        let region = Region { guest: slot << 12, user: slot << 12, ..REGION };
        front.send(Request::AddMemReg, &[0u64.to_bytes(), region.to_bytes()].concat(), &[file.as_fd()]);
    }
    front.closed();
    let reason = ServeError::Refused { request: "ADD_MEM_REG", reason: format!("more than {MEM_SLOTS} regions") };
    assert_eq!(server.ended(), Err(reason));
    server.check();
}

#[test]
fn a_region_that_is_not_there_cannot_be_taken_away() {
    let server = Server::start();
    let mut front = server.connect();
    front.begin(Features::VERSION_1, ProtocolFeatures::CONFIGURE_MEM_SLOTS);
    let wrong = Region { size: RAM - 0x1000, ..front.ram.region() };
    front.send(Request::RemMemReg, &[0u64.to_bytes(), wrong.to_bytes()].concat(), &[]);
    front.closed();
    let reason = format!("there is no region {RAM_AT:#x}+{:#x}", RAM - 0x1000);
    assert_eq!(server.ended(), Err(ServeError::Refused { request: "REM_MEM_REG", reason }));
    server.check();
}

/// A front end whose memory is in a file that can become shorter, with what else `protocol` says.
fn shrinking(server: &Server, protocol: ProtocolFeatures) -> (Front, File) {
    let file = tempfile::tempfile().unwrap();
    let mut front = server.connect();
    front.ram = Ram::of(&file);
    front.begin(Features::VERSION_1, protocol);
    (front, file)
}

#[test]
fn a_file_of_memory_that_becomes_shorter_ends_the_session() {
    let server = Server::start();
    // A ring, or only a buffer, is gone.
    for left in [0, 0x10000] {
        let (mut front, file) = shrinking(&server, ProtocolFeatures::empty());
        let mut queue = front.queue(0);
        queue.send(&front.ram, 0, b"still there");
        assert_eq!(queue.wait(1), [0]);
        queue.add(&front.ram, 1, b"going");
        if left > 0 {
            queue.ring.kick().unwrap();
        }
        file.set_len(left).unwrap();
        queue.kick.write(1).unwrap();
        front.closed();
        assert_eq!(server.ended(), Err(ServeError::Lost { what: format!("region {RAM_AT:#x}+{RAM:#x}") }));
        server.check();
    }
}

#[test]
fn a_log_that_becomes_shorter_ends_the_session() {
    let server = Server::start();
    let (mut front, _file) = shrinking(&server, ProtocolFeatures::LOG_SHMFD);
    let log = tempfile::tempfile().unwrap();
    log.set_len(4096).unwrap();
    let area = LogArea { size: 4096, offset: 0 };
    front.send(Request::SetLogBase, &area.to_bytes(), &[log.as_fd()]);
    front.answer();
    let logged = Features::VERSION_1.bits() as u64 | PROTOCOL_FEATURES | LOG_ALL;
    front.tell(Request::SetFeatures, &logged.to_bytes(), &[]);
    let mut queue = front.queue(0);
    log.set_len(0).unwrap();
    queue.send(&front.ram, 0, b"unlogged");
    front.closed();
    assert_eq!(server.ended(), Err(ServeError::Lost { what: "the log".into() }));
    server.check();
}

#[test]
fn what_is_in_flight_becoming_shorter_ends_the_session() {
    let server = Server::start();
    for packed in [Features::empty(), Features::RING_PACKED] {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let mut front = server.connect();
        front.begin(Features::VERSION_1 | packed, ProtocolFeatures::INFLIGHT_SHMFD);
        let area = InflightArea { size: 4096, offset: 0, queues: 1, entries: SIZE };
        front.tell(Request::SetInflightFd, &area.to_bytes(), &[file.as_fd()]);
        let mut queue = front.queue(0);
        file.set_len(0).unwrap();
        queue.send(&front.ram, 0, b"forgotten");
        front.closed();
        assert_eq!(server.ended(), Err(ServeError::Lost { what: "what is in flight".into() }));
    }
    server.check();
}

#[test]
fn logs_that_are_not_in_their_file_are_refused() {
    let server = Server::start();
    let (log, _pages) = memory_file("log", 4096).unwrap();
    for (size, offset, expected) in [
        (0, 0, "nothing to map"),
        (4097, 0, "beyond the end"),
        (4096, 1, "beyond the end"),
        (u64::MAX, 1, "wraps around"),
        (1, u64::MAX, "wraps around"),
    ] {
        let mut front = server.connect();
        front.negotiate(Features::VERSION_1, ProtocolFeatures::LOG_SHMFD);
        front.send(Request::SetLogBase, &LogArea { size, offset }.to_bytes(), &[log.as_fd()]);
        front.closed();
        let ended = server.ended();
        let Err(ServeError::Refused { request: "SET_LOG_BASE", reason }) = ended else { panic!("{ended:?}") };
        assert!(reason.contains(expected), "{reason}");
    }
    server.check();
}
