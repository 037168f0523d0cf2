//! The image of a disk: what can be one, who else has it, how it grows.

use std::fs::{self, File};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use polyvirt_core::transport::BlockingTransport as _;
use polyvirt_devices::blk;
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{self, Connection};
use tempfile::TempDir;

use super::front::{self, WATCHDOG};
use super::server::{Server, assert_mistake, refused, root, serve_disk};

/// An image of `size` bytes, and where a socket may be.
fn image(size: u64) -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk");
    File::create(&image).unwrap().set_len(size).unwrap();
    let socket = folder.path().join("socket");
    (folder, image, socket)
}

#[test]
fn what_is_no_disk_is_a_mistake_and_nothing_is_waited_for() {
    let (folder, image, socket) = image(0);
    let pipe = folder.path().join("pipe");
    mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    for more in [&[] as &[_], &["--read-only"]] {
        assert_mistake(&refused(&mut serve_disk(&image, &socket, more)), &["disk: 0 bytes", "512"]);
        assert_mistake(&refused(&mut serve_disk(&pipe, &socket, more)), &["pipe: neither a regular file nor"]);
        let null = Path::new("/dev/null");
        assert_mistake(&refused(&mut serve_disk(null, &socket, more)), &["/dev/null: neither a regular file nor"]);
    }
    assert_mistake(&refused(&mut serve_disk(folder.path(), &socket, &["--read-only"])), &["neither"]);
    File::options().write(true).open(&image).unwrap().set_len(511).unwrap();
    assert_mistake(&refused(&mut serve_disk(&image, &socket, &[])), &["disk: 511 bytes"]);
    assert!(!socket.exists(), "a socket was left");
    let mut boot = Command::new(env!("CARGO_BIN_EXE_polyvirt"));
    let output = refused(boot.args(["boot", "--kernel"]).arg(&pipe));
    assert_mistake(&output, &["pipe: not a regular file"]);
}

#[test]
fn an_image_has_one_writer_or_readers() {
    let (folder, image, socket) = image(1 << 20);
    let second = folder.path().join("second");
    let taken = |more: &[&str]| assert_mistake(&refused(&mut serve_disk(&image, &second, more)), &["disk: in use"]);
    let writer = Server::start(&mut serve_disk(&image, &socket, &[]));
    taken(&[]);
    taken(&["--read-only"]);
    drop(writer);
    let reader = Server::start(&mut serve_disk(&image, &socket, &["--read-only"]));
    let another = Server::start(&mut serve_disk(&image, &second, &["--read-only"]));
    drop(another);
    taken(&[]);
    drop(reader);
    Server::start(&mut serve_disk(&image, &second, &[]));
}

/// Whether `program` can be run.
fn installed(program: &str) -> bool {
    let here = Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    if !here {
        println!("skipped: {program} is not installed");
    }
    here
}

#[test]
fn qemu_keeps_off_an_image_that_is_served() {
    if !installed("qemu-io") {
        return;
    }
    let (_folder, image, socket) = image(1 << 20);
    let io = |more: &[&str]| {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).args(more).arg(&image).output().unwrap()
    };
    let (write, read) = (["-c", "write 0 512"], ["-r", "-c", "read 0 512"]);
    let locked = |more: &[&str]| {
        let output = io(more);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && told.contains("lock"), "{output:?}");
    };
    // Its own tool reads a raw image beside a writer, QEMU's too.
    let writer = Server::start(&mut serve_disk(&image, &socket, &[]));
    locked(&write);
    drop(writer);
    let reader = Server::start(&mut serve_disk(&image, &socket, &["--read-only"]));
    locked(&write);
    assert!(io(&read).status.success());
    drop(reader);
    assert!(io(&write).status.success());
}

#[test]
fn an_image_that_qemu_has_is_not_served() {
    if !installed("qemu-storage-daemon") {
        return;
    }
    let (folder, image, socket) = image(1 << 20);
    let start = |read_only: &str| {
        let pid = folder.path().join(format!("pid-{read_only}"));
        let mut command = Command::new("qemu-storage-daemon");
        let file = format!("driver=file,node-name=file,read-only={read_only},filename={}", image.display());
        command.args(["--blockdev", &file]);
        let disk = format!("driver=raw,node-name=disk,file=file,read-only={read_only}");
        let writable = if read_only == "on" { "off" } else { "on" };
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable={writable},addr.type=unix,addr.path={}",
            folder.path().join(format!("theirs-{read_only}")).display()
        );
        command.args(["--blockdev", &disk, "--export", &export]);
        // It writes the file when everything is open.
        command.args(["--daemonize", "--pidfile"]).arg(&pid);
        assert!(command.stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap().success());
        Pid::from_raw(fs::read_to_string(&pid).unwrap().trim().parse().unwrap())
    };
    // What became a daemon is nobody's child: its lock is what ends with it.
    let end = |pid| {
        kill(pid, Signal::SIGKILL).unwrap();
        let begun = std::time::Instant::now();
        while Path::new(&format!("/proc/{pid}/fd/0")).exists() {
            assert!(begun.elapsed() < WATCHDOG, "it does not end");
            std::thread::yield_now();
        }
    };
    let theirs = start("off");
    assert_mistake(&refused(&mut serve_disk(&image, &socket, &[])), &["disk: in use"]);
    assert_mistake(&refused(&mut serve_disk(&image, &socket, &["--read-only"])), &["disk: in use"]);
    end(theirs);
    let theirs = start("on");
    Server::start(&mut serve_disk(&image, &socket, &["--read-only"]));
    end(theirs);
    Server::start(&mut serve_disk(&image, &socket, &[]));
}

/// Waits until `disk` is told of its new size.
fn resized(disk: &mut blk::Driver<vhost_user::Driver>, sectors: u64) {
    while disk.refresh().unwrap().capacity != sectors {
        let came = disk.transport().wait(WATCHDOG).unwrap();
        assert!(!came.is_empty(), "no size is told");
    }
}

#[test]
fn a_running_guest_is_told_that_its_image_grew_or_shrank() {
    let (_folder, image, socket) = image(1 << 20);
    let _server = Server::start(&mut serve_disk(&image, &socket, &[]));
    let file = File::options().write(true).open(&image).unwrap();
    let mut disk = front::disk(&socket);
    assert_eq!(disk.geometry().capacity, 2048);
    for sectors in [4096, 1024, 8192] {
        file.set_len(sectors * 512).unwrap();
        resized(&mut disk, sectors);
        disk.write(sectors - 1, &[7; 512]).unwrap();
        assert!(disk.write(sectors, &[7; 512]).is_err());
    }
    drop(disk);
    assert_eq!(front::disk(&socket).geometry().capacity, 8192);
}

#[test]
fn a_front_end_is_told_of_another_size_before_its_driver_is_ready() {
    let (_folder, image, socket) = image(1 << 20);
    let _server = Server::start(&mut serve_disk(&image, &socket, &[]));
    let mut connection = Connection::new(UnixStream::connect(&socket).unwrap()).unwrap();
    let send = |connection: &Connection, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]| {
        connection.send(request as u32, 0, payload, fds).unwrap();
    };
    let capacity = |connection: &mut Connection| {
        let area = ConfigArea { offset: 0, size: 8, flags: 0 };
        send(connection, Request::GetConfig, &[area.to_bytes(), vec![0; 8]].concat(), &[]);
        u64::from_bytes(&connection.wait(WATCHDOG).unwrap().payload[ConfigArea::LEN..])
    };
    send(&connection, Request::SetOwner, &[], &[]);
    let protocol = ProtocolFeatures::CONFIG | ProtocolFeatures::BACKEND_REQ;
    send(&connection, Request::SetProtocolFeatures, &protocol.bits().to_bytes(), &[]);
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&connection, Request::SetBackendReqFd, &[], &[theirs.as_fd()]);
    assert_eq!(capacity(&mut connection), 2048);
    // QEMU has read it by now, and its guest is yet to boot.
    File::options().write(true).open(&image).unwrap().set_len(2 << 20).unwrap();
    let told = Connection::new(ours).unwrap().wait(WATCHDOG).unwrap();
    assert_eq!(told.header.request, BackendRequest::ConfigChange as u32);
    assert_eq!(capacity(&mut connection), 4096);
}

#[test]
fn a_block_device_is_served_and_looked_at_when_asked() {
    if !root("a loop device") {
        return;
    }
    let (_folder, image, socket) = image(1 << 20);
    let attached = Command::new("losetup").args(["--find", "--show"]).arg(&image).output();
    let Some(attached) = attached.ok().filter(|output| output.status.success()) else {
        return println!("skipped: there are no loop devices here");
    };
    let device = String::from_utf8(attached.stdout).unwrap().trim().to_owned();
    let detach = Detach(device.clone());
    let server = Server::start(&mut serve_disk(Path::new(&device), &socket, &[]));
    assert!(server.ready.contains("1.0 MiB"), "{}", server.ready);
    assert_mistake(&refused(&mut serve_disk(Path::new(&device), &socket.with_extension("2"), &[])), &["in use"]);
    let mut disk = front::disk(&socket);
    disk.write(2047, &[9; 512]).unwrap();
    disk.flush().unwrap();
    File::options().write(true).open(&image).unwrap().set_len(2 << 20).unwrap();
    assert!(Command::new("losetup").args(["--set-capacity", &device]).status().unwrap().success());
    kill(Pid::from_raw(server.id() as i32), Signal::SIGUSR1).unwrap();
    resized(&mut disk, 4096);
    drop((disk, server, detach));
    assert_eq!(fs::read(&image).unwrap()[2047 * 512..][..512], [9; 512]);
}

/// Gives a loop device back.
struct Detach(String);

impl Drop for Detach {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}
