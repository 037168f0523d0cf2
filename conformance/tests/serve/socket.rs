//! The socket, and what is told of those who come to it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;
use std::thread;

use polyvirt_core::Features;
use polyvirt_transports::vhost_user::Connection;
use polyvirt_transports::vhost_user::messages::{Payload as _, Request, VringAddr, VringState};

use super::server::{Server, assert_mistake, refused, serve};

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn only_who_started_it_may_connect_unless_others_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    // A shell sets the process's own umask, whatever this one has.
    let under = |mask: &str, more: &str| {
        let mut command = Command::new("/bin/sh");
        let program = env!("CARGO_BIN_EXE_polyvirt");
        let line = format!("umask {mask}; exec '{program}' serve rng {more} --socket '{}'", socket.display());
        command.arg("-c").arg(line).env_remove("RUST_LOG");
        let server = Server::start(&mut command);
        let status = fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap();
        let kept = status.lines().find_map(|line| line.strip_prefix("Umask:")).unwrap().trim();
        assert_eq!(u32::from_str_radix(kept, 8), u32::from_str_radix(mask, 8), "the umask is not as it was");
        mode(&socket)
    };
    for mask in ["0", "077", "0777", "022"] {
        assert_eq!(under(mask, ""), 0o600, "{mask}");
        assert_eq!(under(mask, "--socket-mode 660"), 0o660, "{mask}");
    }
    for wrong in ["rw", "1777", "8", ""] {
        let output = refused(&mut serve(&["rng", "--socket-mode", wrong], &socket));
        assert_mistake(&output, &["--socket-mode"]);
    }
}

#[test]
fn a_socket_that_somebody_listens_on_stays() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let _server = Server::start(&mut serve(&["rng"], &socket));
    assert_mistake(&refused(&mut serve(&["rng"], &socket)), &["socket", "in use"]);
    UnixStream::connect(&socket).unwrap();
    let file = folder.path().join("file");
    fs::write(&file, b"kept").unwrap();
    assert_mistake(&refused(&mut serve(&["rng"], &file)), &["file", "in use"]);
    assert_eq!(fs::read(&file).unwrap(), b"kept");
    assert_mistake(&refused(&mut serve(&["rng"], &folder.path().join("no/socket"))), &["no/socket", "No such"]);
}

#[test]
fn of_two_that_start_at_once_one_serves() {
    for stale in [false, true] {
        for _ in 0..5 {
            let folder = tempfile::tempdir().unwrap();
            let socket = folder.path().join("socket");
            if stale {
                // Whoever listened is gone.
                drop(UnixListener::bind(&socket).unwrap());
            }
            let both = Barrier::new(2);
            let start = || {
                both.wait();
                let mut command = serve(&["rng"], &socket);
                let child = command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
                let mut child = child.stderr(std::process::Stdio::piped()).spawn().unwrap();
                let mut line = String::new();
                let out = child.stdout.take().unwrap();
                std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).unwrap();
                (child, line)
            };
            let ends: Vec<_> = thread::scope(|scope| {
                let threads = [scope.spawn(start), scope.spawn(start)];
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let serving = ends.iter().filter(|(_, line)| line.contains("ready")).count();
            for (mut child, line) in ends {
                if line.is_empty() {
                    assert_mistake(&child.wait_with_output().unwrap(), &["in use"]);
                } else {
                    child.kill().unwrap();
                    child.wait().unwrap();
                }
            }
            assert_eq!(serving, 1, "stale: {stale}");
        }
    }
}

#[test]
fn how_a_session_ended_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let mut server = Server::start(&mut serve(&["rng"], &socket));
    drop(UnixStream::connect(&socket).unwrap());
    assert_eq!(server.said(), "polyvirt: the front end left");
    let front = Connection::new(UnixStream::connect(&socket).unwrap()).unwrap();
    front.send(99, 0, &[], &[]).unwrap();
    assert_eq!(server.said(), "polyvirt: the session was ended: request 99 is not known");
}

#[test]
fn a_front_end_whose_guest_drives_a_legacy_device_is_told_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let mut server = Server::start(&mut serve(&["rng"], &socket));
    let front = Connection::new(UnixStream::connect(&socket).unwrap()).unwrap();
    let send = |request: Request, payload: &[u8]| front.send(request as u32, 0, payload, &[]).unwrap();
    // As QEMU's transitional device, whose driver does not know VERSION_1, and without the protocol's own features.
    send(Request::SetFeatures, &(Features::EVENT_IDX.bits() as u64).to_bytes());
    send(Request::SetVringNum, &VringState { index: 0, num: 64 }.to_bytes());
    send(Request::SetVringBase, &VringState { index: 0, num: 0 }.to_bytes());
    let addresses = VringAddr { index: 0, flags: 0, descriptors: 0, used: 0, available: 0, log: 0 };
    send(Request::SetVringAddr, &addresses.to_bytes());
    let kick = nix::sys::eventfd::EventFd::new().unwrap();
    let kick = [std::os::fd::AsFd::as_fd(&kick)];
    front.send(Request::SetVringKick as u32, 0, &0u64.to_bytes(), &kick).unwrap();
    let said = server.said();
    assert!(said.contains("VIRTIO_F_VERSION_1") && said.contains("disable-legacy=on"), "{said}");
}
