//! The suite in domain 0 of a real Xen: cell by cell, each on a machine of its own.

use super::guests::{Guest, Qemu};
use super::kernel::Kept;
use super::parts::Part;
use super::run::Step;
use super::suite::{self, Batch};
use super::{Cache, LabError, machine, xen};
use crate::report::Cell;

/// Domain 0's first process.
const INIT: &str = concat!(include_str!("scripts/dom0-suite.sh"), include_str!("scripts/suite.sh"));
/// The tools of Xen's that it starts.
const TOOLS: [&str; 2] = ["xenstored", "xen-init-dom0"];
/// The cells, longest first.
pub(super) const CELLS: [Batch; 6] = [
    cell(&["blk"], "split"),
    cell(&["blk"], "packed"),
    cell(&["console"], "split"),
    cell(&["rng"], "split"),
    cell(&["console"], "packed"),
    cell(&["rng"], "packed"),
];

const fn cell(devices: &'static [&'static str], ring: &'static str) -> Batch {
    Batch { transport: "xenbus", devices, ring }
}

/// Runs each cell on a machine of its own.
pub(super) fn run(
    cache: &Cache,
    guest: &Guest,
    qemu: &Qemu,
    progress: &mut dyn FnMut(Step),
) -> Result<Vec<Cell>, LabError> {
    let kernel = Kept::of(guest.kernel, guest, cache)?;
    let folder = tempfile::tempdir().map_err(LabError::file(&std::env::temp_dir()))?;
    let folder = folder.path();
    let busybox = Part::tools(guest).place(cache).join("busybox");
    let archive = xen::first_files(cache, &kernel, &busybox, INIT, &TOOLS)?;
    let initramfs = xen::write(folder, "initramfs", &archive.finish())?;
    let kernel = xen::vmlinux(&kernel, folder)?;
    let command = |batch: &Batch| {
        let mut command = machine::program(&qemu.emulator(), qemu.program, cache);
        command.args(["-M", qemu.machine, "-cpu", qemu.cpu, "-m", &format!("{}M", qemu.memory)]);
        xen::boots(&mut command, cache, "512M", &kernel, &batch.words(), &initramfs);
        command
    };
    suite::run(guest, &CELLS, machine::version(guest, cache).as_deref(), &command, progress)
}
