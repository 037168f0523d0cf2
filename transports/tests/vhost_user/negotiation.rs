//! Features that were not offered, taken back, or do not go together.

use polyvirt_core::{Features, Status};
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Ended, ServeError};

use crate::front::{Front, Queue, Server};

/// Why `request` was refused, which ended the last session of `server`.
#[track_caller]
fn refused(server: &Server, mut front: Front, expected: Request) -> String {
    front.closed();
    match server.ended() {
        Err(ServeError::Refused { request, reason }) if request == expected.name() => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn features_that_were_not_offered_end_the_session() {
    let server = Server::start();
    // ACCESS_PLATFORM is offered on demand only; bit 50 belongs to nobody here.
    for wrong in [Features::ACCESS_PLATFORM.bits() as u64, 1 << 50, u64::MAX] {
        let mut front = server.connect();
        let offered: u64 = front.ask(Request::GetFeatures, &[]);
        front.send(Request::SetFeatures, &wrong.to_bytes(), &[]);
        let reason = refused(&server, front, Request::SetFeatures);
        assert_eq!(reason, format!("{:#x} was not offered", wrong & !offered));
    }
    for wrong in [1 << 63, ProtocolFeatures::BACKEND_SEND_FD.bits(), u64::MAX] {
        let mut front = server.connect();
        let offered: u64 = front.ask(Request::GetProtocolFeatures, &[]);
        front.send(Request::SetProtocolFeatures, &wrong.to_bytes(), &[]);
        let reason = refused(&server, front, Request::SetProtocolFeatures);
        assert_eq!(reason, format!("{:#x} was not offered", wrong & !offered));
    }
    server.check();
}

#[test]
fn in_band_notifications_need_their_socket_and_acknowledgements() {
    let server = Server::start();
    for others in [ProtocolFeatures::empty(), ProtocolFeatures::BACKEND_REQ, ProtocolFeatures::REPLY_ACK] {
        let front = server.connect();
        let wrong = ProtocolFeatures::INBAND_NOTIFICATIONS | others;
        front.send(Request::SetProtocolFeatures, &wrong.bits().to_bytes(), &[]);
        let reason = refused(&server, front, Request::SetProtocolFeatures);
        assert_eq!(reason, "INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK");
    }
    server.check();
}

#[test]
fn a_queue_does_not_run_without_version_1() {
    let server = Server::start();
    let mut front = server.connect();
    front.begin(Features::empty(), ProtocolFeatures::empty());
    let queue = Queue::new(&front, 0);
    front.set_up(&queue, 0);
    front.send(Request::SetVringKick, &0u64.to_bytes(), &[std::os::fd::AsFd::as_fd(&*queue.kick)]);
    front.send(Request::SetVringEnable, &VringState { index: 0, num: 1 }.to_bytes(), &[]);
    front.closed();
    let Err(ServeError::Queue { index: 0, reason }) = server.ended() else { panic!() };
    assert!(reason.contains("VIRTIO_F_VERSION_1") && reason.contains("disable-legacy=on"), "{reason}");
    server.check();
}

#[test]
fn features_do_not_change_under_a_queue_that_runs() {
    let server = Server::start();
    let mut front = server.connect();
    front.begin(Features::VERSION_1, ProtocolFeatures::empty());
    let mut queue = front.queue(0);
    // The same ones again, with the log or without, are no change.
    for more in [0, LOG_ALL, 0] {
        let same = Features::VERSION_1.bits() as u64 | PROTOCOL_FEATURES | more;
        front.tell(Request::SetFeatures, &same.to_bytes(), &[]);
        queue.send(&front.ram, 0, b"as before");
        assert_eq!(queue.wait(1), [0]);
    }
    let other = (Features::VERSION_1 | Features::EVENT_IDX).bits() as u64 | PROTOCOL_FEATURES;
    front.send(Request::SetFeatures, &other.to_bytes(), &[]);
    assert_eq!(refused(&server, front, Request::SetFeatures), "other features than before while queues run");
    server.check();
}

#[test]
fn a_format_taken_back_takes_the_size_that_only_it_has() {
    let server = Server::start();
    let mut front = server.connect();
    front.begin(Features::VERSION_1 | Features::RING_PACKED, ProtocolFeatures::empty());
    let queue = Queue::new(&front, 0);
    front.set_up(&queue, 0x8000_8000);
    front.tell(Request::SetVringNum, &VringState { index: 0, num: 7 }.to_bytes(), &[]);
    let split = Features::VERSION_1.bits() as u64 | PROTOCOL_FEATURES;
    front.tell(Request::SetFeatures, &split.to_bytes(), &[]);
    front.send(Request::SetVringKick, &0u64.to_bytes(), &[std::os::fd::AsFd::as_fd(&*queue.kick)]);
    front.send(Request::SetVringEnable, &VringState { index: 0, num: 1 }.to_bytes(), &[]);
    front.closed();
    assert!(matches!(server.ended(), Err(ServeError::Queue { index: 0, .. })));
    server.check();
}

#[test]
fn a_front_end_of_old_that_knows_no_protocol_features_is_served() {
    let server = Server::start();
    let mut front = server.connect();
    front.send(Request::SetOwner, &[], &[]);
    let offered: u64 = front.ask(Request::GetFeatures, &[]);
    front.tell(Request::SetFeatures, &(offered & Features::VERSION_1.bits() as u64).to_bytes(), &[]);
    front.features = Features::VERSION_1;
    front.hand_over();
    let mut queue = Queue::new(&front, 0);
    front.set_up(&queue, 0);
    // There is nothing to enable: it runs from here on.
    front.tell(Request::SetVringKick, &0u64.to_bytes(), &[std::os::fd::AsFd::as_fd(&*queue.kick)]);
    queue.send(&front.ram, 3, b"as of old");
    assert_eq!(queue.wait(1), [3]);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn statuses_that_nobody_has_end_the_session_and_wrong_ones_do_not_stick() {
    let server = Server::start();
    let mut front = server.connect();
    front.negotiate(Features::VERSION_1, ProtocolFeatures::STATUS);
    // DRIVER_OK does not come without FEATURES_OK.
    for (status, expected) in [(Status::DRIVER_OK, Status::empty()), (Status::FAILED, Status::FAILED)] {
        front.tell(Request::SetStatus, &u64::from(status.bits()).to_bytes(), &[]);
        assert_eq!(front.ask::<u64>(Request::GetStatus, &[]), u64::from(expected.bits()));
    }
    front.send(Request::SetStatus, &256u64.to_bytes(), &[]);
    assert_eq!(refused(&server, front, Request::SetStatus), "a status of 0x100");
    server.check();
}
