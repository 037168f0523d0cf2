//! `polyvirt boot` with kernels of a few instructions, which every KVM can run.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::spawn;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a machine may run. It is for those that never end.
const WATCHDOG: Duration = Duration::from_secs(300);

/// How a kernel ends, as instructions: it writes what switches the machine off into ACPI's control register (port 0x604),
/// has the keyboard controller (port 0x64) reset the machine, or does what there is no handler for.
const OFF: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef];
const RESTART: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64];
const CRASH: &[u8] = &[0x0f, 0x0b];

/// An ELF file whose code tells its command line on the serial port, and ends as `end` says.
fn kernel(end: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x10_0000;
    const HEADERS: u64 = 64 + 56;
    let tell = [
        &[0x8b, 0xb6, 0x28, 0x02, 0, 0][..], // mov esi, [rsi + 0x228]: the zero page's cmd_line_ptr
        &[0x66, 0xba, 0xf8, 0x03],           // mov dx, 0x3f8
        &[0xac, 0x84, 0xc0, 0x74, 3],        // lodsb; test al, al; jz behind the loop
        &[0xee, 0xeb, 0xf8],                 // out dx, al; jmp to lodsb
        end,
        &[0xf4, 0xeb, 0xfd], // hlt, for ever
    ]
    .concat();
    let len = tell.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let half = |file: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|value| file.extend(value.to_le_bytes()));
    let word = |file: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|value| file.extend(value.to_le_bytes()));
    let long = |file: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|value| file.extend(value.to_le_bytes()));
    half(&mut file, &[2, 62]); // executable, x86-64
    word(&mut file, &[1]);
    long(&mut file, &[BASE, 64, 0]); // entry, program headers, section headers
    word(&mut file, &[0]);
    half(&mut file, &[64, 56, 1, 0, 0, 0]);
    word(&mut file, &[1, 5]); // to be loaded, readable and executable
    long(&mut file, &[HEADERS, BASE, BASE, len, len, 0x1000]);
    file.extend(tell);
    file
}

/// Boots a kernel that ends as `end` says; none, and the reason told, where there is no KVM.
fn boot(name: &str, end: &[u8], arguments: &[&str]) -> Option<Output> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (path, disk) = (folder.join(format!("{name}.elf")), folder.join(format!("{name}.img")));
    fs::write(&path, kernel(end)).unwrap();
    fs::write(&disk, [0; 4096]).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_polyvirt"));
    command.args(["boot", "--mem", "32", "--append", "from outside", "--kernel"]).arg(path).arg("--disk").arg(disk);
    command.args(arguments).env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let machine = command.spawn().unwrap();
    let pid = Pid::from_raw(machine.id() as i32);
    let (running, ended) = channel::<()>();
    let watchdog = spawn(move || {
        let silent = ended.recv_timeout(WATCHDOG) == Err(RecvTimeoutError::Timeout);
        silent.then(|| kill(pid, Signal::SIGKILL)).is_some()
    });
    let output = machine.wait_with_output().unwrap();
    drop(running);
    assert!(!watchdog.join().unwrap(), "not ended after {WATCHDOG:?}: {output:?}");
    let told = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(2) && told.contains("/dev/kvm") {
        println!("skipped: {told}");
        return None;
    }
    Some(output)
}

#[test]
fn a_kernel_hears_its_command_line_is_heard_and_switches_the_machine_off() {
    for transport in ["pci", "pci-legacy", "mmio"] {
        let Some(output) = boot(transport, OFF, &["--transport", transport, "--packed"]) else { return };
        assert_eq!(output.status.code(), Some(0), "{transport}: {output:?}");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.starts_with("console=ttyS0") && said.ends_with("from outside"), "{transport}: {said}");
        assert!(output.stderr.is_empty(), "{transport}: {output:?}");
    }
}

#[test]
fn a_kernel_that_wants_to_start_again_ends_the_machine_in_order() {
    let Some(output) = boot("restart", RESTART, &["--cpus", "2"]) else { return };
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("wants to start again"), "{output:?}");
}

#[test]
fn a_kernel_that_crashes_is_a_failure() {
    let Some(output) = boot("crash", CRASH, &[]) else { return };
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("triple fault"), "{output:?}");
}
