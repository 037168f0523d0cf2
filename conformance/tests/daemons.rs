//! Other people's vhost-user daemons, judged: what is known of them holds, and nothing else.
//!
//! Where a daemon is not here, or of a version that was not looked at, that is told.
#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;

use polyvirt_conformance::cases;
use polyvirt_conformance::daemon::Expectations;
use serde_json::Value;

/// The program `name`, of one of the branches whose versions `expectations` are about; none is told. (A distribution
/// changes the last number with every correction.)
fn program(name: &str, expectations: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Where `.ci/run` installs what no distribution has.
    let target = Path::new(env!("CARGO_BIN_EXE_polyvirt")).ancestors().nth(2).unwrap();
    let folders = std::env::split_paths(&path).chain([target.join("tools/bin")]);
    let Some(program) = folders.map(|folder| folder.join(name)).find(|program| program.is_file()) else {
        println!("skipped: {name} is not installed");
        return None;
    };
    let told = Command::new(&program).arg("--version").output().unwrap().stdout;
    let told = String::from_utf8_lossy(&told).lines().next().unwrap_or_default().to_owned();
    let text = Expectations::text(expectations).unwrap();
    let versions = Expectations::parse(text, &cases::of_daemons()).unwrap().version;
    let branch = |version: &str| version.split('.').take(2).map(str::to_owned).collect::<Vec<_>>();
    let known: Vec<_> = versions.split(" and ").map(branch).collect();
    if !told.split_whitespace().any(|word| known.contains(&branch(word))) {
        println!("skipped: {told}: what is known is of {versions}");
        return None;
    }
    Some(program)
}

/// Judges the `device` that `command` starts at `socket`, as it is expected to be: its life, too.
fn judge(device: &str, socket: &Path, command: &str, expectations: Option<&str>) {
    let mut check = Command::new(env!("CARGO_BIN_EXE_polyvirt"));
    check.args(["check", "--quiet", "--format", "json", "--device", device, "--daemon", command]);
    check.args(expectations.iter().flat_map(|name| ["--expect", name])).env_remove("RUST_LOG");
    let output = check.arg(format!("vhost-user:{}", socket.display())).output().unwrap();
    let result: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let failures: Vec<_> = result["cells"].as_array().unwrap().iter().map(|cell| &cell["failures"]).collect();
    assert!(output.status.success(), "{failures:#?}");
    assert!(result["summary"]["passed"].as_u64().unwrap() > 10, "{}", result["summary"]);
}

#[test]
fn qemu_storage_daemon_is_as_it_is_known() {
    let expectations = "qemu-storage-daemon-blk";
    let Some(program) = program("qemu-storage-daemon", expectations) else { return };
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("disk"), folder.path().join("socket"));
    std::fs::write(&image, vec![0; 4 << 20]).unwrap();
    let file = format!("--blockdev driver=file,node-name=file,filename={}", image.display());
    let disk = "--blockdev driver=raw,node-name=disk,file=file";
    let export = "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket}";
    let command = format!("{} {file} {disk} --export {export} 2>/dev/null", program.display());
    judge("blk", &socket, &command, Some(expectations));
}

#[test]
fn vhost_device_rng_is_as_it_is_known() {
    let expectations = "vhost-device-rng";
    let Some(program) = program("vhost-device-rng", expectations) else { return };
    let folder = tempfile::tempdir().unwrap();
    // It numbers its sockets.
    let (path, socket) = (folder.path().join("socket"), folder.path().join("socket0"));
    let command = format!("{} --socket-path {} 2>/dev/null", program.display(), path.display());
    judge("rng", &socket, &command, Some(expectations));
}

/// Our own daemon, from which nothing is forgiven.
fn own(device: &str, more: &str) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let mut command = format!("{} serve {device} --socket {{socket}} {more}", env!("CARGO_BIN_EXE_polyvirt"));
    if device == "blk" {
        let image = folder.path().join("disk");
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
        command += &format!(" --image {}", image.display());
    }
    judge(device, &socket, &command, None);
}

#[test]
fn our_own_disk_does_nothing_wrong() {
    own("blk", "--queues 2");
}

#[test]
fn our_own_entropy_device_does_nothing_wrong() {
    own("rng", "");
}

#[test]
fn our_own_console_does_nothing_wrong() {
    own("console", "");
}

#[test]
fn what_serves_split_rings_only_offers_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let command = format!("{} serve rng --ring split --socket {{socket}}", env!("CARGO_BIN_EXE_polyvirt"));
    let mut check = Command::new(env!("CARGO_BIN_EXE_polyvirt"));
    check.args(["check", "--device", "rng", "--ring", "packed", "--daemon", &command]).env_remove("RUST_LOG");
    let output = check.arg(format!("vhost-user:{}", socket.display())).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}
