//! What a process may do that serves.

use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use polyvirt_core::Features;
use polyvirt_transports::vhost_user::Connection;
use polyvirt_transports::vhost_user::messages::{Payload as _, Region, Request, VringAddr, VringState};

use super::injected::Injected;
use super::server::{Server, assert_mistake, refused, root, serve, serve_disk};
use super::{front, injected};

/// The value of `field` in the text of a status file.
fn field<'a>(status: &'a str, field: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("there is no {field}")).trim()
}

/// Every thread of `server` is confined.
fn assert_confined(server: &Server) {
    let privileged = nix::unistd::geteuid().is_root();
    for thread in server.threads() {
        let status = fs::read_to_string(thread).unwrap();
        let has = |name, value| assert_eq!(field(&status, name), value, "{name}: {status}");
        has("NoNewPrivs", "1");
        has("Seccomp", "2");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            has(set, "0000000000000000");
        }
        if privileged {
            has("CapBnd", "0000000000000000");
        }
    }
}

#[test]
fn a_served_disk_is_confined_and_serves() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("disk"), folder.path().join("socket"));
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let server = Server::start(&mut serve_disk(&image, &socket, &["--queues", "2"]));
    for round in 1..=2 {
        let mut disk = front::disk(&socket);
        disk.write(7, &[round; 1024]).unwrap();
        disk.flush().unwrap();
        let mut read = [0; 1024];
        disk.read(7, &mut read).unwrap();
        assert_eq!(read, [round; 1024]);
        disk.discard(100, 8).unwrap();
        disk.write_zeroes(8, 1, true).unwrap();
        disk.read(7, &mut read).unwrap();
        assert_eq!((read[511], read[512]), (round, 0));
        // A session and its memory are there: so are all threads.
        assert!(server.threads().len() > 1);
        assert_confined(&server);
    }
}

#[test]
fn every_served_device_is_confined() {
    for device in ["rng", "console"] {
        let folder = tempfile::tempdir().unwrap();
        assert_confined(&Server::start(&mut serve(&[device], &folder.path().join("socket"))));
    }
}

#[test]
fn a_server_that_was_taken_over_can_open_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (more, opens) in [(&[] as &[_], false), (&["--no-sandbox"], true)] {
        let server = Server::start(&mut serve(&[&["rng"], more].concat(), &folder.path().join("socket")));
        let Some(mut taken) = Injected::into(server.id()) else { return };
        let opened = taken.open(c"/");
        assert_eq!(opened.is_ok(), opens, "{opened:?}");
        if !opens {
            assert_eq!(opened, Err(Errno::ENOSYS));
            for (name, call) in injected::FORBIDDEN {
                assert_eq!(taken.call(*call, [0; 6]), Err(Errno::ENOSYS), "{name}");
            }
        }
    }
}

#[test]
fn memory_that_becomes_shorter_ends_a_session_not_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let mut server = Server::start(&mut serve(&["rng"], &socket));
    let mut front = Connection::new(UnixStream::connect(&socket).unwrap()).unwrap();
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(1 << 20).unwrap();
    let send = |request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]| {
        front.send(request as u32, 0, payload, fds).unwrap();
    };
    send(Request::SetFeatures, &(Features::VERSION_1.bits() as u64).to_bytes(), &[]);
    let region = Region { guest: 0, size: 1 << 20, user: 0, offset: 0 };
    send(Request::SetMemTable, &[1u64.to_bytes(), region.to_bytes()].concat(), &[memory.as_fd()]);
    send(Request::SetVringNum, &VringState { index: 0, num: 64 }.to_bytes(), &[]);
    send(Request::SetVringBase, &VringState { index: 0, num: 0 }.to_bytes(), &[]);
    let addresses = VringAddr { index: 0, flags: 0, descriptors: 0, used: 8192, available: 4096, log: 0 };
    send(Request::SetVringAddr, &addresses.to_bytes(), &[]);
    send(Request::GetFeatures, &[], &[]);
    // Once it answers, the memory is mapped.
    front.wait(front::WATCHDOG).unwrap();
    memory.set_len(0).unwrap();
    let kick = nix::sys::eventfd::EventFd::from_value(1).unwrap();
    // It may have seen the loss already.
    let _ = front.send(Request::SetVringKick as u32, 0, &0u64.to_bytes(), &[kick.as_fd()]);
    let said = server.said();
    assert!(said.contains("became shorter"), "{said}");
    assert_confined(&server);
    drop(UnixStream::connect(&socket).unwrap());
    assert_eq!(server.said(), "polyvirt: the front end left");
}

#[test]
fn without_a_sandbox_nothing_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&mut serve(&["rng", "--no-sandbox"], &folder.path().join("socket")));
    let own = fs::read_to_string("/proc/self/status").unwrap();
    for thread in server.threads() {
        let status = fs::read_to_string(thread).unwrap();
        for same in ["NoNewPrivs", "Seccomp", "CapEff", "CapBnd"] {
            assert_eq!(field(&status, same), field(&own, same), "{same}");
        }
    }
}

#[test]
fn a_server_becomes_the_user_that_it_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("disk"), folder.path().join("socket"));
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    if !root("to become another user") {
        let output = refused(&mut serve_disk(&image, &socket, &["--uid", "0:0"]));
        assert_mistake(&output, &["--uid 0:0"]);
        return assert!(!socket.exists(), "a socket was left");
    }
    for more in [&["--uid", "12345:54321"] as &[_], &["--uid", "12345:54321", "--no-sandbox"]] {
        let server = Server::start(&mut serve_disk(&image, &socket, more));
        for thread in server.threads() {
            let status = fs::read_to_string(thread).unwrap();
            assert_eq!(field(&status, "Uid"), "12345\t12345\t12345\t12345");
            assert_eq!(field(&status, "Gid"), "54321\t54321\t54321\t54321");
            assert_eq!(field(&status, "Groups"), "");
        }
        use std::os::unix::fs::MetadataExt as _;
        let owner = fs::symlink_metadata(&socket).unwrap();
        assert_eq!((owner.uid(), owner.gid()), (12345, 54321));
        // The image is root's.
        front::disk(&socket).write(0, &[1; 512]).unwrap();
    }
}

#[test]
fn a_user_that_is_none_is_a_mistake() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    assert_mistake(&refused(&mut serve(&["rng", "--uid", "nobody"], &socket)), &["--uid", "nobody", "UID:GID"]);
    assert!(!socket.exists());
}
