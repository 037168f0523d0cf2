//! Machines whose stock kernel is a host with KVM: the suite runs there, or a guest of this program's own VMM.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Archive;
use super::guests::{Guest, Nested};
use super::kernel::Kept;
use super::parts::Part;
use super::run::Step;
use super::suite::{self, Batch};
use super::transcript::Transcript;
use super::{Cache, LabError, libraries, machine, xen};
use crate::report::Cell;

/// The host's first process where the suite runs.
const SUITE: &str =
    concat!(include_str!("scripts/kvm.sh"), include_str!("scripts/kvm-suite.sh"), include_str!("scripts/suite.sh"));
/// And where a guest does.
const BOOT: &str = concat!(include_str!("scripts/kvm.sh"), include_str!("scripts/kvm-boot.sh"));

const DEVICES: &[&str] = &["blk", "rng", "console"];
/// The cells, longest first.
pub(super) const CELLS: [Batch; 6] = [
    cells("mmio", "split"),
    cells("pci", "split"),
    cells("mmio", "packed"),
    cells("pci", "packed"),
    cells("pci-legacy", "split"),
    cells("mmio-legacy", "split"),
];

const fn cells(transport: &'static str, ring: &'static str) -> Batch {
    Batch { transport, devices: DEVICES, ring }
}

/// What a boot needs.
pub(super) struct Boot<'a> {
    /// The guest's kernel.
    pub(super) kernel: &'a Kept,
    /// Its first file system.
    pub(super) initramfs: &'a [u8],
    /// The disks.
    pub(super) disks: &'a [&'a Path],
    /// A folder for what is made for this boot.
    pub(super) folder: &'a Path,
}

/// The command that boots the host, which then boots `guest`.
pub(super) fn command(guest: &Guest, nested: &Nested, cache: &Cache, boot: &Boot<'_>) -> Result<Command, LabError> {
    let mut archive = host(guest, nested, cache, BOOT)?;
    archive.folder("guest");
    archive.copy("guest/kernel", 0o644, &boot.kernel.image)?;
    archive.file("guest/initramfs", 0o644, boot.initramfs);
    let initramfs = xen::write(boot.folder, "host", &archive.finish())?;
    let packed = if nested.packed { " packed=--packed" } else { "" };
    let words = format!("transport={}{packed}", guest.transport);
    let mut command = boots(nested, cache, &kernel(guest, nested, cache)?.image, &initramfs, &words);
    for (number, disk) in boot.disks.iter().enumerate() {
        let mut drive = OsString::from(format!("if=none,id=disk{number},format=raw,file="));
        drive.push(disk);
        command.arg("-drive").arg(drive);
        command.args(["-device", &format!("nvme,drive=disk{number},serial={number}")]);
    }
    Ok(command)
}

/// Runs the suite, each batch of its cells on a machine of its own.
pub(super) fn run(
    cache: &Cache,
    guest: &Guest,
    nested: &Nested,
    progress: &mut dyn FnMut(Step),
) -> Result<Vec<Cell>, LabError> {
    let folder = crate::temporary::folder().map_err(LabError::file(&std::env::temp_dir()))?;
    let archive = host(guest, nested, cache, SUITE)?;
    let initramfs = xen::write(folder.path(), "host", &archive.finish())?;
    let kernel = kernel(guest, nested, cache)?.image;
    let command = |batch: &Batch| boots(nested, cache, &kernel, &initramfs, &batch.words());
    let host = |cell: &mut Cell, told: &Transcript| {
        cell.versions.extend(told.kernel().map(|version| format!("KVM of Linux {version}")));
    };
    suite::run(guest, &CELLS, machine::version(guest, cache).as_deref(), &command, &host, progress)
}

fn kernel(guest: &Guest, nested: &Nested, cache: &Cache) -> Result<Kept, LabError> {
    Kept::of(nested.kernel, guest, cache)
}

/// QEMU with a host whose `kernel` gets `words` besides.
fn boots(nested: &Nested, cache: &Cache, kernel: &PathBuf, initramfs: &Path, words: &str) -> Command {
    let mut command = machine::emulator(&nested.emulator(), nested.program, cache);
    // Without -icount: with it an interrupt now and then comes to a guest that has them off.
    command
        .args(["-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-M", "q35", "-cpu", nested.cpu, "-m", "1024M"])
        .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &format!("console=ttyS0 rdinit=/init quiet panic=-1 no_timer_check {words}")]);
    command
}

/// The host's first file system: busybox, the modules, this program with its libraries; `init` is the first process.
fn host(guest: &Guest, nested: &Nested, cache: &Cache, init: &str) -> Result<Archive, LabError> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(LabError::Host("the lab's host with KVM runs this program on x86_64 only".to_owned()));
    }
    let this = std::env::current_exe().map_err(LabError::file(Path::new("/proc/self/exe")))?;
    let mut archive = Archive::default();
    for folder in ["bin", "modules"] {
        archive.folder(folder);
    }
    archive.copy("bin/busybox", 0o755, &Part::tools(guest).place(cache).join("busybox"))?;
    archive.copy("bin/polyvirt", 0o755, &this)?;
    libraries::add(&mut archive, None, &[&this])?;
    for module in &kernel(guest, nested, cache)?.modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.copy(&format!("modules/{name}"), 0o644, module)?;
    }
    archive.file("init", 0o755, init.as_bytes());
    Ok(archive)
}
