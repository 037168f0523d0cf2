//! Device addresses that the front end translates, one by one (VIRTIO_F_ACCESS_PLATFORM).

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use polyvirt_core::Features;
use polyvirt_core::queue::Buffer;
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Connection, Ended, ServeError};

use crate::front::{Front, Queue, RAM, Server, WATCHDOG, wait_for};
use crate::toy::FILL;

const FORMATS: [Features; 2] = [Features::empty(), Features::RING_PACKED];
/// Where guest memory is for the device.
const DEVICE_AT: u64 = 0x7f_0000_0000;
const READ: u8 = 1;
const BOTH: u8 = 3;

/// A front end whose device addresses are not guest-physical, with the back end's requests.
fn begun(server: &Server, format: Features) -> (Front, Connection) {
    let mut front = server.connect();
    front.device_at = DEVICE_AT;
    let features = Features::VERSION_1 | Features::ACCESS_PLATFORM | format;
    front.begin(features, ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK);
    let (ours, theirs) = UnixStream::pair().unwrap();
    front.tell(Request::SetBackendReqFd, &[], &[theirs.as_fd()]);
    (front, Connection::new(ours).unwrap())
}

/// The next translation that is missing.
fn miss(requests: &mut Connection) -> Iotlb {
    let message = requests.wait(WATCHDOG).unwrap();
    assert_eq!(message.header.request, BackendRequest::IotlbMsg as u32);
    let miss = Iotlb::from_bytes(&message.payload);
    assert_eq!(miss.kind, Iotlb::MISS);
    miss
}

/// Translates `size` bytes at `iova` to where they are.
fn update(front: &mut Front, iova: u64, size: u64, access: u8) {
    let user = front.ram.user(iova - DEVICE_AT);
    front.tell(Request::IotlbMsg, &Iotlb { iova, size, user, access, kind: Iotlb::UPDATE }.to_bytes(), &[]);
}

fn invalidate(front: &mut Front, iova: u64, size: u64) {
    let gone = Iotlb { iova, size, user: 0, access: 0, kind: Iotlb::INVALIDATE };
    front.tell(Request::IotlbMsg, &gone.to_bytes(), &[]);
}

/// Answers what is missing, page by page, until `done`; the pages.
fn answer_until(front: &mut Front, requests: &mut Connection, mut done: impl FnMut() -> bool) -> Vec<u64> {
    let mut pages = Vec::new();
    while !done() {
        match requests.receive().unwrap() {
            None => drop(front.ask::<u64>(Request::GetFeatures, &[])),
            Some(message) => {
                let page = Iotlb::from_bytes(&message.payload).iova & !0xfff;
                update(front, page, 0x1000, BOTH);
                pages.push((page - DEVICE_AT) / 0x1000);
            }
        }
    }
    pages
}

#[test]
fn every_page_is_asked_for_and_used_from_then_on() {
    let server = Server::with(Features::ACCESS_PLATFORM);
    for format in FORMATS {
        let (mut front, mut requests) = begun(&server, format);
        let mut queue = front.queue(0);
        queue.send(&front.ram, 3, b"translated");
        let mut used = None;
        let mut pages = answer_until(&mut front, &mut requests, || {
            used = queue.ring.get_buf().unwrap();
            used.is_some()
        });
        assert_eq!(used, Some((3, 16)));
        assert!(queue.is_filled(&front.ram, 3));
        // The three areas, asked for at once, then the buffer. The kick may have asked for some of them again.
        let buffer = queue.buffer(3) / 0x1000;
        assert!(pages.len() <= 7, "{pages:?}");
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(pages, [0, 1, 2, buffer]);
        queue.send(&front.ram, 3, b"known by now");
        assert_eq!(queue.wait(1), [3]);
        assert!(requests.receive().unwrap().is_none());
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn a_miss_names_the_access_that_is_wanted() {
    let server = Server::with(Features::ACCESS_PLATFORM);
    let (mut front, mut requests) = begun(&server, Features::empty());
    let queue = Queue::new(&front, 0);
    front.start(&queue, 0);
    let misses: Vec<_> = (0..3).map(|_| miss(&mut requests)).map(|miss| (miss.iova, miss.access)).collect();
    let areas = [(queue.config.descriptors, READ), (queue.config.driver, READ), (queue.config.device, BOTH)];
    assert_eq!(misses, areas);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn what_is_granted_for_reading_is_not_written() {
    let server = Server::with(Features::ACCESS_PLATFORM);
    for format in FORMATS {
        let (mut front, _requests) = begun(&server, format);
        update(&mut front, DEVICE_AT, 0x20000, BOTH);
        update(&mut front, DEVICE_AT + 0x20000, RAM - 0x20000, READ);
        let mut queue = front.queue(0);
        let at = DEVICE_AT + queue.buffer(0);
        queue.ring.add_buf(&[Buffer { address: at, len: 16 }], &[], 0).unwrap();
        queue.ring.kick().unwrap();
        assert_eq!(wait_used(&mut queue), (0, 0), "to read is right");
        queue.ring.add_buf(&[], &[Buffer { address: at, len: 16 }], 1).unwrap();
        queue.ring.kick().unwrap();
        wait_for(&queue.error);
        assert_ne!(front.ram.bytes(queue.buffer(0), 16), [FILL; 16]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

fn wait_used(queue: &mut Queue) -> (u16, u32) {
    loop {
        if let Some(used) = queue.ring.get_buf().unwrap() {
            return used;
        }
        queue.called();
    }
}

#[test]
fn what_is_taken_back_is_asked_for_again_and_not_touched() {
    let server = Server::with(Features::ACCESS_PLATFORM);
    for format in FORMATS {
        let (mut front, mut requests) = begun(&server, format);
        update(&mut front, DEVICE_AT, RAM, BOTH);
        let mut queue = front.queue(0);
        queue.send(&front.ram, 0, b"all is known");
        queue.wait(1);
        // One page in the middle.
        let buffer = DEVICE_AT + queue.buffer(1);
        invalidate(&mut front, buffer, 0x1000);
        queue.send(&front.ram, 1, b"not known");
        let first = miss(&mut requests);
        assert_eq!(first.iova & !0xfff, buffer);
        assert!(!queue.is_filled(&front.ram, 1));
        // Another page for the same address.
        let other = front.ram.user(0x3f000);
        front.ram.pages.fill(0x3f000, 0x1000, 0).unwrap();
        let moved = Iotlb { iova: buffer, size: 0x1000, user: other, access: BOTH, kind: Iotlb::UPDATE };
        front.tell(Request::IotlbMsg, &moved.to_bytes(), &[]);
        assert_eq!(queue.wait(1), [1]);
        assert!(!queue.is_filled(&front.ram, 1));
        assert_eq!(front.ram.bytes(0x3f800, 16), [FILL; 16]);
        // Its own ring: the queue rests, and goes on when that is known again.
        invalidate(&mut front, queue.config.descriptors, 0x1000);
        queue.send(&front.ram, 2, b"no ring");
        assert_eq!(miss(&mut requests).iova & !0xfff, queue.config.descriptors);
        update(&mut front, queue.config.descriptors, 0x1000, BOTH);
        assert_eq!(queue.wait(1), [2]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn what_was_not_answered_is_asked_for_again_when_the_driver_kicks() {
    let server = Server::with(Features::ACCESS_PLATFORM);
    for format in FORMATS {
        let (mut front, mut requests) = begun(&server, format);
        update(&mut front, DEVICE_AT, 0x20000, BOTH);
        let mut queue = front.queue(0);
        queue.send(&front.ram, 0, b"not mapped yet");
        let first = miss(&mut requests);
        queue.kick.write(1).unwrap();
        assert_eq!(miss(&mut requests), first);
        update(&mut front, DEVICE_AT + queue.buffer(0), 0x1000, BOTH);
        assert_eq!(queue.wait(1), [0]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn however_often_a_front_end_that_reads_nothing_is_kicked_for_it_is_asked_for_little() {
    let server = Server::with(Features::ACCESS_PLATFORM);
    let mut front = server.connect();
    front.device_at = DEVICE_AT;
    front.begin(Features::VERSION_1 | Features::ACCESS_PLATFORM, ProtocolFeatures::BACKEND_REQ);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let filled = Connection::new(theirs.try_clone().unwrap()).unwrap();
    while filled.try_send(0, 0, &[0; 32]).unwrap() {}
    while filled.try_send(0, 0, &[]).unwrap() {}
    front.send(Request::SetBackendReqFd, &[], &[theirs.as_fd()]);
    drop(theirs);
    let queue = front.queue(0);
    for _ in 0..1000 {
        queue.kick.write(1).unwrap();
        front.ask::<u64>(Request::GetFeatures, &[]);
    }
    let mut requests = Connection::new(ours).unwrap();
    let mut asked = 0;
    let mut silent = 0;
    while silent < 3 {
        match requests.receive().unwrap() {
            Some(message) => asked += usize::from(message.header.request != 0),
            // Whatever is to come is there once this is answered.
            None => {
                silent += 1;
                front.ask::<u64>(Request::GetFeatures, &[]);
            }
        }
    }
    // The three areas: what waited for room, and what was wanted again meanwhile.
    assert!((3..=6).contains(&asked), "{asked}");
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn translations_to_nowhere_end_the_session() {
    let server = Server::with(Features::ACCESS_PLATFORM);
    let wrong = |front: &Front| {
        let user = front.ram.user(0);
        let right = Iotlb { iova: DEVICE_AT, size: 0x1000, user, access: BOTH, kind: Iotlb::UPDATE };
        vec![
            Iotlb { user: user.wrapping_sub(1), ..right },
            Iotlb { user: user + RAM, ..right },
            Iotlb { size: RAM + 1, ..right },
            Iotlb { size: 0, ..right },
            Iotlb { iova: u64::MAX - 0xffe, ..right },
            Iotlb { kind: Iotlb::MISS, ..right },
            Iotlb { kind: Iotlb::ACCESS_FAIL, ..right },
            Iotlb { kind: 99, ..right },
        ]
    };
    for index in 0..8 {
        let (mut front, _requests) = begun(&server, Features::empty());
        front.send(Request::IotlbMsg, &wrong(&front)[index].to_bytes(), &[]);
        front.closed();
        let ended = server.ended();
        assert!(matches!(ended, Err(ServeError::Refused { request: "IOTLB_MSG", .. })), "{ended:?}");
    }
    server.check();
}

#[test]
fn without_a_socket_to_ask_on_a_queue_waits_for_its_translations() {
    let server = Server::with(Features::ACCESS_PLATFORM);
    let mut front = server.connect();
    front.device_at = DEVICE_AT;
    front.begin(Features::VERSION_1 | Features::ACCESS_PLATFORM, ProtocolFeatures::empty());
    let mut queue = front.queue(0);
    queue.send(&front.ram, 0, b"unasked");
    front.ask::<u64>(Request::GetFeatures, &[]);
    let user = front.ram.user(0);
    let all = Iotlb { iova: DEVICE_AT, size: RAM, user, access: BOTH, kind: Iotlb::UPDATE };
    front.tell(Request::IotlbMsg, &all.to_bytes(), &[]);
    assert_eq!(queue.wait(1), [0]);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}
