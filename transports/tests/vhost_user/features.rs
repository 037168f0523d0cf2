//! What each protocol feature promises.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use polyvirt_core::queue::Buffer;
use polyvirt_core::{Features, Status};
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Connection, Ended, Message, ServeError, memory_file};

use crate::front::{Front, Queue, RAM, RAM_AT, Server, WATCHDOG, wait_for};
use crate::toy::{FEATURE, FILL, QUEUES};

const FORMATS: [Features; 2] = [Features::VERSION_1, Features::VERSION_1.union(Features::RING_PACKED)];

fn begun(server: &Server, features: Features, protocol: ProtocolFeatures) -> Front {
    let mut front = server.connect();
    front.begin(features, protocol);
    front
}

/// The socket of the back end's own requests, handed over.
fn requests(front: &mut Front) -> Connection {
    let (ours, theirs) = UnixStream::pair().unwrap();
    front.tell(Request::SetBackendReqFd, &[], &[theirs.as_fd()]);
    Connection::new(ours).unwrap()
}

fn config(offset: u32, data: &[u8]) -> Vec<u8> {
    [&ConfigArea { offset, size: data.len() as u32, flags: 0 }.to_bytes(), data].concat()
}

#[test]
fn mq_each_queue_runs_and_stops_by_itself() {
    let server = Server::start();
    for features in FORMATS {
        let mut front = begun(&server, features, ProtocolFeatures::MQ);
        assert_eq!(front.ask::<u64>(Request::GetQueueNum, &[]), QUEUES.into());
        let mut queues = [front.queue(0), front.queue(1)];
        for queue in &mut queues {
            queue.send(&front.ram, 2, b"both");
        }
        queues.iter_mut().for_each(|queue| assert_eq!(queue.wait(1), [2]));
        // Two descriptors were made available and used.
        let packed = features.contains(Features::RING_PACKED);
        assert_eq!(front.stop(0), if packed { 0x8002_8002 } else { 1 });
        let [stopped, other] = &mut queues;
        stopped.send(&front.ram, 3, b"not yet");
        other.send(&front.ram, 4, b"the other one");
        assert_eq!(other.wait(1), [4]);
        assert!(stopped.ring.get_buf().unwrap().is_none());
        front.start(stopped, if packed { 0x8002_8002 } else { 1 });
        assert_eq!(stopped.wait(1), [3]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn a_queue_that_is_disabled_rests_until_it_is_enabled() {
    let server = Server::start();
    for features in FORMATS {
        let mut front = begun(&server, features, ProtocolFeatures::MQ);
        let mut queue = front.queue(0);
        front.enable(0, 0);
        queue.send(&front.ram, 0, b"resting");
        front.ask::<u64>(Request::GetFeatures, &[]);
        assert!(queue.ring.get_buf().unwrap().is_none());
        front.enable(0, 1);
        assert_eq!(queue.wait(1), [0]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn a_queue_is_stopped_when_what_is_in_flight_is_done() {
    let server = Server::start();
    for features in FORMATS {
        let mut front = begun(&server, features, ProtocolFeatures::empty());
        let mut queue = front.queue(0);
        server.device.keep(true);
        queue.send(&front.ram, 0, b"one");
        queue.send(&front.ram, 1, b"two");
        front.send(Request::GetVringBase, &VringState { index: 0, num: 0 }.to_bytes(), &[]);
        assert!(front.connection.receive().unwrap().is_none(), "two are in flight");
        server.device.keep(false);
        let answer = VringState::from_bytes(&front.answer().payload);
        let packed = features.contains(Features::RING_PACKED);
        assert_eq!(answer.num, if packed { 0x8004_8004 } else { 2 });
        let mut used = queue.wait(2);
        used.sort_unstable();
        assert_eq!(used, [0, 1]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn reply_ack_says_of_each_message_that_asks_whether_it_was_done() {
    let server = Server::start();
    let mut front = begun(&server, Features::VERSION_1, ProtocolFeatures::REPLY_ACK);
    // One that does not ask gets none: the next answer is that of the next message.
    front.send(Request::SetVringNum, &VringState { index: 0, num: 8 }.to_bytes(), &[]);
    front.ask::<u64>(Request::GetFeatures, &[]);
    // One that has an answer of its own gets no other.
    front.raw(Request::GetFeatures as u32, NEED_REPLY, &[], &[]);
    assert_eq!(front.answer().payload.len(), 8);
    front.raw(Request::SetVringNum as u32, NEED_REPLY, &VringState { index: 0, num: 3 }.to_bytes(), &[]);
    let Message { header, payload, .. } = front.answer();
    assert_eq!((header.request, header.flags), (Request::SetVringNum as u32, VERSION | REPLY));
    assert_ne!(payload, [0; 8]);
    front.closed();
    assert!(matches!(server.ended(), Err(ServeError::Refused { request: "SET_VRING_NUM", .. })));
    // Who did not negotiate that is not answered.
    let mut front = begun(&server, Features::VERSION_1, ProtocolFeatures::empty());
    front.raw(Request::SetVringNum as u32, NEED_REPLY, &VringState { index: 0, num: 8 }.to_bytes(), &[]);
    front.ask::<u64>(Request::GetFeatures, &[]);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn config_is_read_and_written_in_pieces_and_its_change_is_told() {
    let server = Server::start();
    let mut front = begun(&server, Features::VERSION_1, ProtocolFeatures::CONFIG | ProtocolFeatures::BACKEND_REQ);
    let mut backend = requests(&mut front);
    let get = |front: &mut Front, offset, len| {
        front.send(Request::GetConfig, &config(offset, &vec![0xee; len]), &[]);
        let payload = front.answer().payload;
        assert_eq!(payload[..ConfigArea::LEN], config(offset, &vec![0; len])[..ConfigArea::LEN]);
        payload[ConfigArea::LEN..].to_vec()
    };
    assert_eq!(get(&mut front, 4, 3), [4, 5, 6]);
    assert_eq!(get(&mut front, 14, 4), [14, 15, 0, 0], "nothing is behind its end");
    front.tell(Request::SetConfig, &config(4, &[40, 50]), &[]);
    front.tell(Request::SetConfig, &config(15, &[1, 2]), &[]);
    assert_eq!(get(&mut front, 3, 4), [3, 40, 50, 6]);
    assert_eq!(get(&mut front, 15, 1), [15], "what reaches beyond its end is not written");
    // The device tells of changes while it is driven.
    let mut queue = front.queue(0);
    server.device.set_config(99);
    let message = backend.wait(WATCHDOG).unwrap();
    assert_eq!((message.header.request, message.payload.len()), (BackendRequest::ConfigChange as u32, 0));
    assert_eq!(get(&mut front, 0, 1), [99]);
    queue.send(&front.ram, 0, b"");
    queue.wait(1);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn backend_req_a_front_end_that_does_not_listen_stops_nothing() {
    let server = Server::start();
    let mut front = begun(&server, Features::VERSION_1, ProtocolFeatures::CONFIG | ProtocolFeatures::BACKEND_REQ);
    // None yet, one that is closed, one that is not read.
    let mut queue = front.queue(0);
    for round in 0..3u8 {
        server.device.set_config(round);
        queue.send(&front.ram, 0, b"while nobody listens");
        queue.wait(1);
        let unread = requests(&mut front);
        if round == 0 {
            drop(unread);
        }
    }
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
    server.check();
}

#[test]
fn reset_device_takes_everything_back_but_memory_and_descriptors() {
    let server = Server::start();
    for request in [Request::ResetDevice, Request::ResetOwner] {
        let mut front = begun(&server, Features::VERSION_1, ProtocolFeatures::RESET_DEVICE | ProtocolFeatures::STATUS);
        let mut queue = front.queue(0);
        queue.send(&front.ram, 0, b"before");
        queue.wait(1);
        assert_eq!(front.ask::<u64>(Request::GetStatus, &[]) as u8, DRIVEN.bits());
        front.tell(request, &[], &[]);
        assert_eq!(front.ask::<u64>(Request::GetStatus, &[]), 0);
        queue.send(&front.ram, 1, b"nobody there");
        front.ask::<u64>(Request::GetFeatures, &[]);
        assert!(queue.ring.get_buf().unwrap().is_none());
        // The driver begins anew, with other features; the memory is still there.
        front.negotiate(Features::VERSION_1 | FEATURE, ProtocolFeatures::RESET_DEVICE);
        let mut queue = front.queue(0);
        queue.send(&front.ram, 2, b"after");
        assert_eq!(queue.wait(1), [2]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

const READY: Status = Status::ACKNOWLEDGE.union(Status::DRIVER).union(Status::FEATURES_OK);
const DRIVEN: Status = READY.union(Status::DRIVER_OK);

#[test]
fn status_is_the_devices_own() {
    let server = Server::start();
    let mut front = begun(&server, Features::empty(), ProtocolFeatures::STATUS);
    let mut set = |status: Status| {
        front.tell(Request::SetStatus, &u64::from(status.bits()).to_bytes(), &[]);
        Status::from_bits_retain(front.ask::<u64>(Request::GetStatus, &[]) as u8)
    };
    assert_eq!(set(READY), Status::ACKNOWLEDGE | Status::DRIVER, "VERSION_1 was not accepted");
    assert_eq!(set(Status::empty()), Status::empty());
    front.negotiate(Features::VERSION_1, ProtocolFeatures::STATUS);
    let set = |front: &mut Front, status: Status| {
        front.tell(Request::SetStatus, &u64::from(status.bits()).to_bytes(), &[]);
        Status::from_bits_retain(front.ask::<u64>(Request::GetStatus, &[]) as u8)
    };
    assert_eq!(set(&mut front, READY), READY);
    assert_eq!(set(&mut front, DRIVEN), DRIVEN);
    let mut queue = front.queue(0);
    queue.send(&front.ram, 0, b"driven");
    queue.wait(1);
    // The driver breaks a queue, and learns of it.
    queue.ring.add_buf(&[Buffer { address: 0, len: 1 }], &[], 1).unwrap();
    queue.ring.kick().unwrap();
    wait_for(&queue.error);
    assert_eq!(set(&mut front, DRIVEN), DRIVEN | Status::DEVICE_NEEDS_RESET);
    assert_eq!(set(&mut front, Status::empty()), Status::empty());
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn memory_slots_come_and_go_one_by_one() {
    let server = Server::start();
    for features in FORMATS {
        let mut front = begun(&server, features, ProtocolFeatures::CONFIGURE_MEM_SLOTS);
        let (file, pages) = memory_file("more", 0x2000).unwrap();
        // Right behind the first, so that one buffer can be in both.
        let more = Region { guest: RAM_AT + RAM, size: 0x2000, user: pages.as_ptr().addr() as u64, offset: 0 };
        let payload = [0u64.to_bytes(), more.to_bytes()].concat();
        for with_file in [false, true] {
            front.tell(Request::AddMemReg, &payload, &[file.as_fd()]);
            let mut queue = front.queue(0);
            pages.fill(0, 16, 0).unwrap();
            queue.ring.add_buf(&[], &[Buffer { address: RAM_AT + RAM - 8, len: 16 }], 0).unwrap();
            queue.ring.kick().unwrap();
            assert_eq!(queue.wait(1), [0]);
            let mut bytes = [0; 16];
            pages.read(0, &mut bytes).unwrap();
            assert_eq!(bytes, [[FILL; 8], [0; 8]].concat()[..]);
            front.stop(0);
            // Some send the file again, some do not.
            let fds = [file.as_fd()];
            front.tell(Request::RemMemReg, &payload, if with_file { &fds } else { &[] });
            let mut queue = front.queue(0);
            queue.ring.add_buf(&[], &[Buffer { address: RAM_AT + RAM - 8, len: 16 }], 0).unwrap();
            queue.ring.kick().unwrap();
            wait_for(&queue.error);
            front.stop(0);
            front.negotiate(features, ProtocolFeatures::CONFIGURE_MEM_SLOTS);
        }
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn inband_notifications_are_messages_in_both_directions() {
    let server = Server::start();
    let protocol = ProtocolFeatures::INBAND_NOTIFICATIONS | ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::REPLY_ACK;
    for features in FORMATS {
        let mut front = begun(&server, features, protocol);
        let mut backend = requests(&mut front);
        let mut queue = Queue::new(&front, 1);
        front.set_up(&queue, if features.contains(Features::RING_PACKED) { 0x8000_8000 } else { 0 });
        front.enable(1, 1);
        let which = VringState { index: 1, num: 0 };
        for slot in 0..3 {
            queue.add(&front.ram, slot, b"in band");
            queue.ring.kick().unwrap();
            front.tell(Request::VringKick, &which.to_bytes(), &[]);
            // It was served when the kick was acknowledged, and the call is on its way.
            let call = backend.wait(WATCHDOG).unwrap();
            assert_eq!(call.header.request, BackendRequest::VringCall as u32);
            assert_eq!(VringState::from_bytes(&call.payload), which);
            assert_eq!(queue.ring.get_buf().unwrap(), Some((slot, 16)));
        }
        queue.ring.add_buf(&[Buffer { address: 0, len: 1 }], &[], 9).unwrap();
        queue.ring.kick().unwrap();
        front.tell(Request::VringKick, &which.to_bytes(), &[]);
        // That the device needs a reset is told first, as a change of the configuration would be if that were negotiated.
        let error = backend.wait(WATCHDOG).unwrap();
        assert_eq!(error.header.request, BackendRequest::VringErr as u32);
        assert_eq!(VringState::from_bytes(&error.payload), which);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}
