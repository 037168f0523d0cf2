//! Memory that knows what is in flight, as it is handed over; `conformance/tests/killed` shows what it is for.

use std::os::fd::AsFd;

use polyvirt_core::Features;
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Ended, ServeError, map, memory_file};

use crate::front::{Front, Queue, SIZE, Server, event, wait_for};

const FORMATS: [Features; 2] = [Features::VERSION_1, Features::VERSION_1.union(Features::RING_PACKED)];

fn begun(server: &Server, features: Features) -> Front {
    let mut front = server.connect();
    front.begin(features, ProtocolFeatures::INFLIGHT_SHMFD | ProtocolFeatures::RESET_DEVICE);
    front
}

/// What is asked for.
const ASKED: InflightArea = InflightArea { size: 0, offset: 0, queues: 2, entries: SIZE };

#[test]
fn it_is_as_large_as_the_protocol_says_and_knows_what_was_taken() {
    let server = Server::start();
    for (features, size, first) in [(FORMATS[0], 2 * 192, 16), (FORMATS[1], 2 * 320, 32)] {
        let mut front = begun(&server, features);
        front.send(Request::GetInflightFd, &ASKED.to_bytes(), &[]);
        let mut answer = front.answer();
        assert_eq!(InflightArea::from_bytes(&answer.payload), InflightArea { size, ..ASKED });
        let pages = map(answer.fds.remove(0), 0, size).unwrap();
        let mut queue = front.queue(1);
        server.device.keep(true);
        queue.send(&front.ram, 5, b"in flight");
        // Answered after the kick was seen.
        while server.device.read().len() < FORMATS.iter().position(|format| *format == features).unwrap() + 1 {
            front.ask::<u64>(Request::GetFeatures, &[]);
        }
        let mut bytes = vec![0; size as usize];
        pages.read(0, &mut bytes).unwrap();
        let (none, part) = bytes.split_at(size as usize / 2);
        assert!(none.iter().all(|byte| *byte == 0), "queue 0 does not run");
        assert_eq!(part[8..12], [1, 0, SIZE as u8, 0], "version, entries");
        assert_eq!(part[first], 1, "in flight");
        server.device.keep(false);
        queue.wait(1);
        front.stop(1);
        pages.read(size as usize / 2, &mut bytes[..64]).unwrap();
        assert_eq!(bytes[first], 0, "nothing is");
        // A reset forgets it.
        front.tell(Request::ResetDevice, &[], &[]);
        pages.read(size as usize / 2 + 8, &mut bytes[..2]).unwrap();
        assert_eq!(bytes[..2], [0, 0]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn what_is_too_small_or_for_queues_that_are_not_there_is_refused() {
    let server = Server::start();
    let (file, _pages) = memory_file("inflight", 4096).unwrap();
    for features in FORMATS {
        for area in [
            InflightArea { size: 100, ..ASKED },
            InflightArea { size: 1024, offset: 4, ..ASKED },
            InflightArea { size: 1024, offset: 4096, ..ASKED },
            InflightArea { size: 1024, queues: 0, ..ASKED },
            InflightArea { size: 1024, queues: 3, ..ASKED },
            InflightArea { size: 1024, entries: 0, ..ASKED },
            InflightArea { size: 1024, entries: u16::MAX, ..ASKED },
            InflightArea { size: u64::MAX, offset: 8, ..ASKED },
        ] {
            let mut front = begun(&server, features);
            front.send(Request::SetInflightFd, &area.to_bytes(), &[file.as_fd()]);
            front.closed();
            let ended = server.ended();
            assert!(matches!(ended, Err(ServeError::Refused { request: "SET_INFLIGHT_FD", .. })), "{ended:?}");
        }
    }
    server.check();
}

#[test]
fn it_is_not_exchanged_under_a_queue_that_runs() {
    let server = Server::start();
    let mut front = begun(&server, FORMATS[0]);
    let _queue = front.queue(0);
    let (file, _pages) = memory_file("inflight", 4096).unwrap();
    front.send(Request::SetInflightFd, &InflightArea { size: 4096, ..ASKED }.to_bytes(), &[file.as_fd()]);
    front.closed();
    let reason = String::from("a queue runs");
    assert_eq!(server.ended(), Err(ServeError::Refused { request: "SET_INFLIGHT_FD", reason }));
    server.check();
}

#[test]
fn a_queue_that_begins_elsewhere_than_it_ended_begins_anew() {
    let server = Server::start();
    for features in FORMATS {
        let mut front = begun(&server, features);
        front.send(Request::GetInflightFd, &ASKED.to_bytes(), &[]);
        front.answer();
        for _ in 0..3 {
            // The driver has reset the queue: its memory is zeroed.
            front.ram.pages.fill(0, 0x4000, 0).unwrap();
            let mut queue = front.queue(0);
            for slot in 0..3 {
                queue.send(&front.ram, slot, b"again");
                assert_eq!(queue.wait(1), [slot]);
            }
            front.stop(0);
        }
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn a_queue_that_goes_on_is_called_once_for_what_was_used_before() {
    for features in FORMATS {
        for features in [features, features | Features::EVENT_IDX] {
            for kept in [false, true] {
                let server = Server::start();
                let mut front = begun(&server, features);
                let book = kept.then(|| {
                    front.send(Request::GetInflightFd, &ASKED.to_bytes(), &[]);
                    let mut answer = front.answer();
                    (answer.fds.remove(0), InflightArea::from_bytes(&answer.payload))
                });
                let mut queue = front.queue(0);
                queue.send(&front.ram, 0, b"used");
                // As if its back end had died before it called.
                queue.called();
                let ram = front.ram.again();
                drop(front);
                assert_eq!(server.ended(), Ok(Ended::Closed));
                let mut front = server.connect();
                front.ram = ram;
                front.begin(features, ProtocolFeatures::INFLIGHT_SHMFD);
                if let Some((book, area)) = &book {
                    front.tell(Request::SetInflightFd, &area.to_bytes(), &[book.as_fd()]);
                }
                front.start(&queue, if features.contains(Features::RING_PACKED) { 0x8002_8002 } else { 1 });
                queue.called();
                assert_eq!(queue.wait(1), [0]);
                drop(front);
                assert_eq!(server.ended(), Ok(Ended::Closed));
            }
        }
    }
}

#[test]
fn a_queue_that_begins_is_not_called_for_nothing() {
    let server = Server::start();
    for features in FORMATS {
        let mut front = begun(&server, features);
        front.send(Request::GetInflightFd, &ASKED.to_bytes(), &[]);
        front.answer();
        let queue = front.queue(0);
        front.ask::<u64>(Request::GetFeatures, &[]);
        assert!(queue.call.read().is_err());
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn who_listens_elsewhere_from_now_on_is_called_there() {
    let server = Server::start();
    let mut front = begun(&server, FORMATS[0]);
    let mut queue = front.queue(0);
    queue.send(&front.ram, 0, b"used");
    wait_for(&queue.call);
    // QEMU does not look at the descriptor that it had before.
    queue.call = event();
    front.tell(Request::SetVringCall, &0u64.to_bytes(), &[queue.call.as_fd()]);
    queue.called();
    assert_eq!(queue.wait(1), [0]);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

/// Fewer than the queue has.
const SHORT: InflightArea = InflightArea { entries: SIZE / 2, ..ASKED };

#[test]
fn of_a_split_ring_longer_than_the_memory_for_it_nothing_is_lost_or_done_twice() {
    let (killed, next) = (Server::start(), Server::start());
    let mut front = begun(&killed, FORMATS[0]);
    front.send(Request::GetInflightFd, &SHORT.to_bytes(), &[]);
    let mut answer = front.answer();
    let (book, area) = (answer.fds.remove(0), InflightArea::from_bytes(&answer.payload));
    let mut queue = front.queue(0);
    killed.device.keep(true);
    // Heads 0, 2 and 4, the last of which there is no room for.
    for slot in 0..3 {
        queue.send(&front.ram, slot, &[slot as u8]);
    }
    while killed.device.read().len() < 3 {
        front.ask::<u64>(Request::GetFeatures, &[]);
    }
    // One is done before its elders, and then the end comes.
    killed.device.release_last();
    front.ask::<u64>(Request::GetFeatures, &[]);
    let used = queue_used(&front, &queue);

    let mut after = next.connect();
    after.ram = front.ram.again();
    after.begin(FORMATS[0], ProtocolFeatures::INFLIGHT_SHMFD);
    after.tell(Request::SetInflightFd, &area.to_bytes(), &[book.as_fd()]);
    after.start(&queue, used.into());
    assert_eq!(queue.wait(3), [0, 1, 2]);
    assert_eq!(next.device.read(), [[0], [1], [2]]);
    drop(after);
    assert_eq!(next.ended(), Ok(Ended::Closed));
}

/// The used index, as it is in the ring.
fn queue_used(front: &Front, queue: &Queue) -> u16 {
    let bytes = front.ram.bytes(queue.config.device - front.device_at + 2, 2);
    u16::from_le_bytes([bytes[0], bytes[1]])
}

#[test]
fn memory_that_says_something_and_cannot_say_all_breaks_the_queue() {
    for features in FORMATS {
        let server = Server::start();
        let mut front = begun(&server, features);
        front.send(Request::GetInflightFd, &SHORT.to_bytes(), &[]);
        let mut answer = front.answer();
        let area = InflightArea::from_bytes(&answer.payload);
        // As a back end leaves it that does not care.
        map(answer.fds.remove(0), 0, area.size).unwrap().write(8, &1u16.to_ne_bytes()).unwrap();
        let queue = Queue::new(&front, 0);
        front.start(&queue, if features.contains(Features::RING_PACKED) { 0x8000_8000 } else { 0 });
        wait_for(&queue.error);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}
