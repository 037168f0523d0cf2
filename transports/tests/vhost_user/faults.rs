//! A front end that is broken or hostile: its session ends with a reason, and the server serves the next.

use std::fs::File;
use std::os::fd::AsFd;

use polyvirt_core::Features;
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{ConnectionError, Ended, ServeError};

use crate::front::{Front, Ram, SIZE, Server, event};

/// Everything but in-band notifications, which need others.
const ALL: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

/// Every request that the back end knows: its number, a payload that is right, how many file descriptors it takes.
fn requests() -> Vec<(Request, Vec<u8>, usize)> {
    use Request as R;
    let state = VringState { index: 0, num: 0 }.to_bytes();
    let ram = Ram::new();
    let region = [0u64.to_bytes(), ram.region().to_bytes()].concat();
    let table = [1u64.to_bytes(), ram.region().to_bytes()].concat();
    let config = [ConfigArea { offset: 0, size: 4, flags: 0 }.to_bytes(), vec![0; 4]].concat();
    let inflight = InflightArea { size: 4096, offset: 0, queues: 1, entries: SIZE }.to_bytes();
    let number = 0u64.to_bytes();
    vec![
        (R::GetFeatures, vec![], 0),
        (R::SetFeatures, PROTOCOL_FEATURES.to_bytes(), 0),
        (R::SetOwner, vec![], 0),
        (R::ResetOwner, vec![], 0),
        (R::SetMemTable, table, 1),
        (R::SetLogBase, LogArea { size: 4096, offset: 0 }.to_bytes(), 1),
        (R::SetLogFd, vec![], 1),
        (R::SetVringNum, VringState { index: 0, num: 8 }.to_bytes(), 0),
        (
            R::SetVringAddr,
            VringAddr { index: 0, flags: 0, descriptors: 0, used: 0, available: 0, log: 0 }.to_bytes(),
            0,
        ),
        (R::SetVringBase, state.clone(), 0),
        (R::GetVringBase, state.clone(), 0),
        (R::SetVringKick, number.clone(), 1),
        (R::SetVringCall, number.clone(), 1),
        (R::SetVringErr, number.clone(), 1),
        (R::GetProtocolFeatures, vec![], 0),
        (R::SetProtocolFeatures, ALL.bits().to_bytes(), 0),
        (R::GetQueueNum, vec![], 0),
        (R::SetVringEnable, state, 0),
        (R::SetBackendReqFd, vec![], 1),
        (R::IotlbMsg, Iotlb { iova: 0, size: 0, user: 0, access: 0, kind: Iotlb::INVALIDATE }.to_bytes(), 0),
        (R::GetConfig, config.clone(), 0),
        (R::SetConfig, config, 0),
        (R::GetInflightFd, inflight.clone(), 0),
        (R::SetInflightFd, inflight, 1),
        (R::ResetDevice, vec![], 0),
        (R::GetMaxMemSlots, vec![], 0),
        (R::AddMemReg, region.clone(), 1),
        (R::RemMemReg, region, 0),
        (R::SetStatus, number, 0),
        (R::GetStatus, vec![], 0),
    ]
}

/// A front end that has everything negotiated.
fn ready(server: &Server) -> Front {
    let mut front = server.connect();
    front.negotiate(Features::VERSION_1, ALL);
    front
}

/// Does `wrong` and expects the session to end with a reason, which it returns.
fn refused(server: &Server, mut front: Front, wrong: impl FnOnce(&mut Front)) -> ServeError {
    wrong(&mut front);
    front.closed();
    server.ended().expect_err("the session is ended")
}

/// The reason why `request` was refused.
#[track_caller]
fn reason_of(error: ServeError, expected: Request) -> String {
    match error {
        ServeError::Refused { request, reason } if request == expected.name() => reason,
        other => panic!("{other}"),
    }
}

#[test]
fn stray_and_missing_descriptors_end_the_session_whatever_the_request() {
    let server = Server::start();
    let file = File::open("/dev/null").unwrap();
    for (request, payload, takes) in requests() {
        for count in [0, 1, 2, 8] {
            // Some send the file of the region that goes away, too: it is closed unused.
            if count == takes || (request, count) == (Request::RemMemReg, 1) {
                continue;
            }
            let fds = vec![file.as_fd(); count];
            let reason = refused(&server, ready(&server), |front| front.send(request, &payload, &fds));
            assert_eq!(reason, ServeError::Descriptors { request: request.name(), expected: takes, got: count });
        }
    }
    server.check();
}

#[test]
fn a_descriptor_that_is_said_not_to_be_there_is_stray() {
    let server = Server::start();
    let kick = event();
    for request in [Request::SetVringKick, Request::SetVringCall, Request::SetVringErr] {
        let payload = VRING_NOFD.to_bytes();
        let reason = refused(&server, ready(&server), |front| front.send(request, &payload, &[kick.as_fd()]));
        assert_eq!(reason, ServeError::Descriptors { request: request.name(), expected: 0, got: 1 });
    }
    server.check();
}

#[test]
fn no_descriptor_stays_open_however_many_came() {
    let server = Server::start();
    let file = File::open("/dev/null").unwrap();
    // A pipe's end tells when all others are closed, whatever else this process opens meanwhile.
    let (watch, sent) = nix::unistd::pipe().unwrap();
    for count in [9, 253] {
        let mut fds = vec![file.as_fd(); count - 1];
        fds.push(sent.as_fd());
        let reason = refused(&server, ready(&server), |front| front.send(Request::GetFeatures, &[], &fds));
        assert_eq!(reason, ServeError::Connection(ConnectionError::TooManyDescriptors));
    }
    // With half a message.
    let front = ready(&server);
    front.connection.send_bytes(&[1, 0, 0], &[sent.as_fd()]);
    drop(front);
    let truncated = ConnectionError::Truncated { have: 3, expected: HEADER_LEN };
    assert_eq!(server.ended(), Err(ServeError::Connection(truncated)));
    server.check();
    drop(sent);
    assert_eq!(nix::unistd::read(&watch, &mut [0]), Ok(0), "one is still open");
}

#[test]
fn payloads_of_a_wrong_size_end_the_session_whatever_the_request() {
    let server = Server::start();
    let file = File::open("/dev/null").unwrap();
    for (request, payload, takes) in requests() {
        let fds = vec![file.as_fd(); takes];
        let long = [&payload[..], &[0; 300]].concat();
        for wrong in [&payload[..payload.len().saturating_sub(1)], &long] {
            if wrong == payload {
                continue;
            }
            let reason = refused(&server, ready(&server), |front| front.send(request, wrong, &fds));
            let ServeError::Size { request: of, got, .. } = reason else { panic!("{}: {reason}", request.name()) };
            assert_eq!((of, got), (request.name(), wrong.len()));
        }
    }
    server.check();
}

#[test]
fn requests_of_features_that_were_not_negotiated_end_the_session() {
    let server = Server::start();
    let file = File::open("/dev/null").unwrap();
    let inband = (Request::VringKick, VringState { index: 0, num: 0 }.to_bytes(), 0);
    let mut refusals = Vec::new();
    for (request, payload, takes) in requests().into_iter().chain([inband]) {
        let mut front = server.connect();
        front.negotiate(Features::VERSION_1, ProtocolFeatures::empty());
        front.send(request, &payload, &vec![file.as_fd(); takes]);
        // Those of no feature are answered, or refused for other reasons.
        drop(front);
        if let Err(ServeError::NotNegotiated { request: of }) = server.ended() {
            assert_eq!(of, request.name());
            refusals.push(request);
        }
    }
    use Request as R;
    let (log, memory) = ([R::SetLogBase, R::SetLogFd], [R::GetMaxMemSlots, R::AddMemReg, R::RemMemReg]);
    let (config, inflight) = ([R::GetConfig, R::SetConfig], [R::GetInflightFd, R::SetInflightFd]);
    let others = [R::GetQueueNum, R::SetBackendReqFd, R::ResetDevice, R::VringKick, R::SetStatus, R::GetStatus];
    let mut expected = [&log[..], &memory, &config, &inflight, &others].concat();
    expected.sort_by_key(|request| *request as u32);
    refusals.sort_by_key(|request| *request as u32);
    assert_eq!(refusals, expected);
    server.check();
}

#[test]
fn what_is_no_message_ends_the_session() {
    let server = Server::start();
    for request in [0, 19, 20, 23, 26, 41, u32::MAX] {
        let reason = refused(&server, ready(&server), |front| front.raw(request, 0, &[], &[]));
        assert_eq!(reason, ServeError::Unknown { request });
    }
    for flags in [2, 3] {
        let reason = refused(&server, ready(&server), |front| {
            front.connection.send_bytes(&Header { request: 1, flags, size: 0 }.to_bytes(), &[]);
        });
        let version = ConnectionError::Version { request: 1, version: flags };
        assert_eq!(reason, ServeError::Connection(version));
    }
    for size in [4097, u32::MAX] {
        let reason = refused(&server, ready(&server), |front| {
            front.connection.send_bytes(&Header { request: 1, flags: 1, size }.to_bytes(), &[]);
        });
        assert_eq!(reason, ServeError::Connection(ConnectionError::TooLong { request: 1, size }));
    }
    // What is lost in the middle.
    let front = ready(&server);
    front.connection.send_bytes(&Header { request: 2, flags: 1, size: 8 }.to_bytes(), &[]);
    drop(front);
    let truncated = ConnectionError::Truncated { have: HEADER_LEN, expected: HEADER_LEN + 8 };
    assert_eq!(server.ended(), Err(ServeError::Connection(truncated)));
    server.check();
}

#[test]
fn a_message_that_comes_byte_by_byte_is_one_message() {
    let server = Server::start();
    let mut front = ready(&server);
    let bytes = Header { request: Request::GetFeatures as u32, flags: VERSION, size: 0 }.to_bytes();
    bytes.iter().for_each(|byte| front.connection.send_bytes(&[*byte], &[]));
    assert_eq!(front.answer().header.request, Request::GetFeatures as u32);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn queues_that_are_not_there_end_the_session() {
    let server = Server::start();
    let kick = event();
    for index in [2, 255, u32::MAX] {
        let state = VringState { index, num: 1 }.to_bytes();
        let addresses = VringAddr { index, flags: 0, descriptors: 0, used: 0, available: 0, log: 0 }.to_bytes();
        for request in [Request::SetVringNum, Request::SetVringBase, Request::GetVringBase, Request::SetVringEnable] {
            let reason = refused(&server, ready(&server), |front| front.send(request, &state, &[]));
            assert_eq!(reason_of(reason, request), format!("queue {index} of 2"));
        }
        let reason = refused(&server, ready(&server), |front| front.send(Request::SetVringAddr, &addresses, &[]));
        assert_eq!(reason_of(reason, Request::SetVringAddr), format!("queue {index} of 2"));
    }
    for request in [Request::SetVringKick, Request::SetVringCall, Request::SetVringErr] {
        for value in [2u64, 255] {
            let fds = [kick.as_fd()];
            let reason = refused(&server, ready(&server), |front| front.send(request, &value.to_bytes(), &fds));
            assert_eq!(reason_of(reason, request), format!("queue {value} of 2"));
        }
        let reason = refused(&server, ready(&server), |front| {
            front.send(request, &(1u64 << 9).to_bytes(), &[kick.as_fd()]);
        });
        assert_eq!(reason_of(reason, request), "unknown flags in 0x200");
    }
    server.check();
}

#[test]
fn sizes_that_no_queue_has_end_the_session() {
    let server = Server::start();
    for num in [0, 3, 32769, 65536, u32::MAX] {
        let state = VringState { index: 0, num }.to_bytes();
        let reason = refused(&server, ready(&server), |front| front.send(Request::SetVringNum, &state, &[]));
        assert!(reason_of(reason, Request::SetVringNum).starts_with(&format!("{num} entries")));
    }
    for num in [0, 32769] {
        let mut front = server.connect();
        front.negotiate(Features::VERSION_1 | Features::RING_PACKED, ALL);
        let state = VringState { index: 0, num }.to_bytes();
        let reason = refused(&server, front, |front| front.send(Request::SetVringNum, &state, &[]));
        assert!(reason_of(reason, Request::SetVringNum).starts_with(&format!("{num} entries")));
    }
    let state = VringState { index: 0, num: 2 }.to_bytes();
    let reason = refused(&server, ready(&server), |front| front.send(Request::SetVringEnable, &state, &[]));
    assert_eq!(reason_of(reason, Request::SetVringEnable), "2, expected 0 or 1");
    server.check();
}

#[test]
fn configuration_beyond_what_a_message_holds_ends_the_session() {
    let server = Server::start();
    for (offset, size, bytes) in [(0, 257, 257), (256, 1, 1), (u32::MAX, 1, 1), (0, u32::MAX, 4)] {
        for request in [Request::GetConfig, Request::SetConfig] {
            let payload = [ConfigArea { offset, size, flags: 0 }.to_bytes(), vec![0; bytes]].concat();
            let reason = refused(&server, ready(&server), |front| front.send(request, &payload, &[]));
            assert_eq!(reason_of(reason, request), format!("{offset}+{size}, expected at most 256 bytes"));
        }
    }
    server.check();
}
