//! Boots guests, and makes cells of what comes of it.

use std::fs;
use std::path::PathBuf;

use super::boot::boot;
use super::disk::{self, Image};
use super::guests::{Disk, Guest};
use super::judge::{CASES, Evidence, Wrong};
use super::kernel::Kept;
use super::parts::Part;
use super::server::Server;
use super::transcript::Transcript;
use super::{Cache, LabError, initramfs, machine};
use crate::report::{Case, Cell, Failure, Outcome, Skipped};

/// What the cells of the lab are worth: an unmodified kernel, on an emulated machine.
const EVIDENCE: &str = "emulated";
/// The one device of the lab.
const DEVICE: &str = "blk";

/// How far a run is.
pub(crate) enum Step {
    /// What a guest does now.
    At(String),
    /// A guest is done.
    Done,
}

/// Runs each of `guests`; a cell for each of its disks. What cannot be booted here is skipped, with the reason.
pub(crate) fn run(cache: &Cache, guests: &[&'static Guest], progress: &mut dyn FnMut(Step)) -> Vec<Cell> {
    let mut cells = Vec::new();
    for guest in guests {
        progress(Step::At(format!("{}: booting", guest.name)));
        match one(cache, guest, progress) {
            Ok(these) => cells.extend(these),
            Err(error) => cells.extend(guest.disks.iter().map(|disk| skipped(guest, disk, &error.to_string()))),
        }
        progress(Step::Done);
    }
    cells
}

/// One guest with all its disks.
fn one(cache: &Cache, guest: &'static Guest, progress: &mut dyn FnMut(Step)) -> Result<Vec<Cell>, LabError> {
    if let Some(missing) = Part::all(guest).into_iter().find(|part| !part.is_there(cache)) {
        return Err(LabError::NotSetUp { what: missing.name(), guest: guest.name });
    }
    let place = Part::Kernel(guest.kernel).place(cache);
    let not_there = || LabError::NotSetUp { what: place.display().to_string(), guest: guest.name };
    let kernel = Kept::open(&place, guest.kernel).ok_or_else(not_there)?;

    // Not in the cache: a socket's path is short.
    let folder = tempfile::tempdir().map_err(LabError::file(&std::env::temp_dir()))?;
    let folder = folder.path();
    let create = |disk: &'static Disk| Image::create(folder, disk.name).map_err(LabError::file(folder));
    let images = guest.disks.iter().map(create).collect::<Result<Vec<_>, _>>()?;
    let lines: String = images.iter().map(Image::line).collect();
    let busybox = Part::tools(guest).place(cache).join("busybox");
    let archive = initramfs::build(&kernel, &busybox, &lines, &disk::pattern())?;
    let initramfs = folder.join("initramfs");
    fs::write(&initramfs, archive).map_err(LabError::file(&initramfs))?;

    let sockets: Vec<_> = guest.disks.iter().map(|disk| (disk, folder.join(format!("{}.sock", disk.name)))).collect();
    let start = |(image, (_, socket)): (&Image, &(&Disk, PathBuf))| Server::start(&image.path, socket);
    let mut servers = images.iter().zip(&sockets).map(start).collect::<Result<Vec<_>, _>>()?;
    let boot_with = machine::Boot { kernel: &kernel.image, initramfs: &initramfs, disks: &sockets, folder };
    let command = machine::command(guest, cache, &boot_with)?;
    let told = boot(command, &mut |event| {
        progress(Step::At(format!("{}: {} {}", guest.name, event.subject, event.word)));
    })?;

    let versions: Vec<_> = [told.kernel().map(|version| format!("Linux {version}")), machine::version(guest, cache)]
        .into_iter()
        .flatten()
        .collect();
    let mut cells = Vec::new();
    for ((disk, image), server) in guest.disks.iter().zip(&images).zip(&mut servers) {
        let after = image.after().map_err(LabError::file(&image.path))?;
        let evidence = Evidence { disk, image, after: &after, told: &told, server_runs: server.runs() };
        cells.push(cell(guest, &evidence, &versions));
    }
    Ok(cells)
}

/// The cell of one disk.
fn cell(guest: &Guest, evidence: &Evidence<'_>, versions: &[String]) -> Cell {
    let mut cell = empty(guest, evidence.disk);
    cell.versions = versions.to_vec();
    for case in &CASES {
        let seconds = case.took(evidence).as_secs_f64();
        let outcome = match case.judge(evidence) {
            Ok(()) => {
                cell.passed += 1;
                Outcome::Passed
            }
            Err(wrong) => {
                cell.failed += 1;
                cell.failures.push(failure(case.name, wrong, evidence.told));
                Outcome::Failed
            }
        };
        cell.cases.push(told_case(case.name, case.about, outcome, seconds));
        cell.seconds += seconds;
    }
    cell
}

fn failure(case: &str, Wrong { expected, observed }: Wrong, told: &Transcript) -> Failure {
    // What else there was on the console is where a failed boot begins to be understood.
    Failure {
        case: case.into(),
        outcome: Outcome::Failed,
        statements: Vec::new(),
        expected,
        observed,
        reproduction: told.tail(),
    }
}

/// The cell of a disk whose guest was not booted, for `reason`.
fn skipped(guest: &Guest, disk: &Disk, reason: &str) -> Cell {
    let mut cell = empty(guest, disk);
    for case in &CASES {
        cell.cases.push(told_case(case.name, case.about, Outcome::Skipped, 0.0));
        cell.skipped.push(Skipped { case: case.name.into(), reason: reason.to_owned() });
    }
    cell
}

fn told_case(name: &str, about: &str, outcome: Outcome, seconds: f64) -> Case {
    Case { case: name.into(), about: about.into(), outcome, statements: Vec::new(), seconds }
}

/// A cell in which nothing has happened yet.
fn empty(guest: &Guest, disk: &Disk) -> Cell {
    Cell {
        hypervisor: guest.name.into(),
        transport: format!("{}-{}", guest.transport, disk.name),
        device: DEVICE.into(),
        evidence: EVIDENCE.into(),
        versions: Vec::new(),
        passed: 0,
        failed: 0,
        rejected: 0,
        wedged: 0,
        skipped: Vec::new(),
        failures: Vec::new(),
        seconds: 0.0,
        cases: Vec::new(),
        image: None,
    }
}
