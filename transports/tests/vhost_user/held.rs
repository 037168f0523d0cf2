//! A front end that makes what it shares wait for ever (the flags of an open file are its own, too): nobody is held up.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{UnixDatagram, UnixStream};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::EventFd;
use nix::unistd::{pipe2, read, write};
use polyvirt_core::Features;
use polyvirt_core::queue::Buffer;
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Connection, Ended, ServeError};

use crate::front::{Front, Queue, RAM, RAM_AT, Server, event, wait_for};

/// Whoever uses `fd` waits from now on.
fn wait_on(fd: &impl AsFd) {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
}

/// From now on one more event does not fit into `event`, and whoever writes it waits.
fn fill(event: &EventFd) {
    event.write(u64::MAX - 1).unwrap();
    wait_on(event);
}

fn begun(server: &Server, protocol: ProtocolFeatures) -> Front {
    let mut front = server.connect();
    front.begin(Features::VERSION_1, protocol);
    front
}

/// The session goes on, and ends when the front end wants it to.
fn goes_on(server: &Server, mut front: Front) {
    front.ask::<u64>(Request::GetFeatures, &[]);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
    server.check();
}

#[test]
fn a_call_that_is_full() {
    let server = Server::start();
    let mut front = begun(&server, ProtocolFeatures::empty());
    let mut queue = front.queue(0);
    fill(&queue.call);
    for slot in 0..2 {
        queue.send(&front.ram, slot, b"full");
        front.ask::<u64>(Request::GetFeatures, &[]);
    }
    queue.wait(2);
    queue.send(&front.ram, 0, b"not full any more");
    queue.wait(1);
    goes_on(&server, front);
}

#[test]
fn a_kick_that_is_empty() {
    let server = Server::start();
    let mut front = begun(&server, ProtocolFeatures::empty());
    // One event for two queues: both are told that there is one, and only one of them gets it.
    let mut queues = [Queue::new(&front, 0), Queue::new(&front, 1)];
    let kick = queues[0].kick.clone();
    queues[1].kick = kick.clone();
    for queue in &queues {
        front.start(queue, 0);
    }
    wait_on(&kick);
    for round in 0..3 {
        queues[0].add(&front.ram, round, b"one of two");
        queues[0].ring.kick().unwrap();
        kick.write(1).unwrap();
        queues[0].wait(1);
        front.ask::<u64>(Request::GetFeatures, &[]);
    }
    goes_on(&server, front);
}

#[test]
fn an_error_that_is_full() {
    let server = Server::start();
    let mut front = begun(&server, ProtocolFeatures::empty());
    let mut queue = front.queue(0);
    fill(&queue.error);
    let beyond = Buffer { address: RAM_AT + RAM - 8, len: 16 };
    queue.ring.add_buf(&[], &[beyond], 0).unwrap();
    queue.ring.kick().unwrap();
    goes_on(&server, front);
}

#[test]
fn a_log_event_that_is_full() {
    let server = Server::start();
    let mut front = begun(&server, ProtocolFeatures::LOG_SHMFD);
    let (log, _pages) = polyvirt_transports::vhost_user::memory_file("log", 0x1000).unwrap();
    front.send(Request::SetLogBase, &LogArea { size: 0x1000, offset: 0 }.to_bytes(), &[log.as_fd()]);
    front.answer();
    let logged = event();
    front.tell(Request::SetLogFd, &[], &[logged.as_fd()]);
    fill(&logged);
    let features = front.features.bits() as u64 | PROTOCOL_FEATURES | LOG_ALL;
    front.tell(Request::SetFeatures, &features.to_bytes(), &[]);
    let mut queue = front.queue(0);
    queue.send(&front.ram, 0, b"logged");
    queue.wait(1);
    goes_on(&server, front);
}

#[test]
fn a_socket_for_requests_that_nobody_reads() {
    let server = Server::start();
    let mut front = begun(&server, ProtocolFeatures::BACKEND_REQ | ProtocolFeatures::CONFIG);
    let (ours, theirs) = UnixStream::pair().unwrap();
    front.tell(Request::SetBackendReqFd, &[], &[theirs.as_fd()]);
    // Full but for less than a message.
    let unread = Connection::new(theirs.try_clone().unwrap()).unwrap();
    while unread.try_send(0, 0, &[]).unwrap() {}
    wait_on(&theirs);
    let mut queue = front.queue(0);
    for byte in 0..3 {
        server.device.set_config(byte);
        queue.send(&front.ram, 0, b"unread");
        queue.wait(1);
    }
    drop(ours);
    goes_on(&server, front);
}

#[test]
fn pipes_are_called_as_eventfds_are() {
    let server = Server::start();
    let mut front = begun(&server, ProtocolFeatures::empty());
    let queue = Queue::new(&front, 0);
    front.start(&queue, 0);
    let mut queue = queue;
    let (calls, theirs) = pipe2(OFlag::O_CLOEXEC).unwrap();
    front.tell(Request::SetVringCall, &0u64.to_bytes(), &[theirs.as_fd()]);
    let called = || {
        wait_for(&calls);
        let mut bytes = [0; 8];
        assert_eq!((read(&calls, &mut bytes), u64::from_ne_bytes(bytes)), (Ok(8), 1));
    };
    // Once because it is another than before.
    called();
    for slot in 0..3 {
        queue.send(&front.ram, slot, b"called by a pipe");
        called();
        assert_eq!(queue.ring.get_buf().unwrap(), Some((slot, 16)));
    }
    // Full.
    fcntl(&theirs, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while write(&theirs, &[0; 4096]).is_ok() {}
    wait_on(&theirs);
    for slot in 0..3 {
        queue.send(&front.ram, slot, b"full");
        front.ask::<u64>(Request::GetFeatures, &[]);
    }
    goes_on(&server, front);
}

#[test]
fn what_is_no_event_is_refused() {
    let server = Server::start();
    let (pipe, _written) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let file = tempfile::tempfile().unwrap();
    let name = File::options().read(true).custom_flags(OFlag::O_PATH.bits()).open("/dev/null").unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let datagrams = UnixDatagram::unbound().unwrap();
    // Without an internet, one of this machine again.
    let internet = std::net::TcpListener::bind("127.0.0.1:0")
        .map_or_else(|_| datagrams.try_clone().unwrap().into(), OwnedFd::from);
    let counter: OwnedFd = event().into();
    let [pipe, file, socket, name] = [pipe.as_fd(), file.as_fd(), socket.as_fd(), name.as_fd()];
    let [datagrams, internet] = [datagrams.as_fd(), internet.as_fd()];
    use Request as R;
    let refused: [(Request, &[BorrowedFd<'_>], &str); 5] = [
        (R::SetVringKick, &[pipe, file, socket, name], "no eventfd"),
        (R::SetVringCall, &[file, socket, name], "no eventfd"),
        (R::SetVringErr, &[file, socket, name], "no eventfd"),
        (R::SetLogFd, &[file, socket, name], "no eventfd"),
        (R::SetBackendReqFd, &[pipe, file, datagrams, internet, counter.as_fd()], "no stream socket"),
    ];
    for (request, fds, expected) in refused {
        for fd in fds {
            let mut front = server.connect();
            front.negotiate(Features::VERSION_1, ProtocolFeatures::LOG_SHMFD | ProtocolFeatures::BACKEND_REQ);
            let payload = if matches!(request, R::SetLogFd | R::SetBackendReqFd) { vec![] } else { 0u64.to_bytes() };
            front.send(request, &payload, &[*fd]);
            front.closed();
            let ended = server.ended();
            let Err(ServeError::Refused { reason, .. }) = &ended else { panic!("{ended:?}, {}", fd.as_raw_fd()) };
            assert!(reason.contains(expected), "{}: {reason}", request.name());
        }
    }
    server.check();
}
