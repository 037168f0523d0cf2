//! Machines whose firmware uses a disk of ours with a driver of its own; no kernel follows.

use std::fs;
use std::path::{Path, PathBuf};

use super::boot::boot;
use super::disk::{self, Image};
use super::guests::{Device, Firmware, Guest, OFFERED_PACKED};
use super::judge::Wrong;
use super::parts::Part;
use super::run::{Step, empty_cell, judged, untried};
use super::server::Server;
use super::transcript::Transcript;
use super::{Cache, LabError, machine, tool};
use crate::report::Cell;

/// What UEFI's shell finds on the disk, and starts.
const SHELL: &str = include_str!("scripts/startup.nsh");
/// What Open Firmware does in place of booting.
const FORTH: &str = include_str!("scripts/boot.fs");
/// Where it writes the first KiB of the disk once more: behind what it keeps for a table of partitions.
const PLACE: usize = 0x2_0000;
const WRITTEN: usize = 0x400;
/// The disk, as it is offered; no firmware uses packed rings.
const OFFERED: Device = OFFERED_PACKED;
const DEVICE: (&str, &str) = ("blk", "split");

/// One judgement.
struct Case {
    name: &'static str,
    about: &'static str,
    judge: fn(&Evidence<'_>) -> Result<(), Wrong>,
}

/// What came of a boot.
struct Evidence<'a> {
    told: &'a Transcript,
    /// What the firmware has to tell of what it read.
    read: String,
    /// Whether what it was to write is on the disk.
    written: bool,
    /// Whether the device's process outlived it.
    server_runs: bool,
}

static CASES: [Case; 3] = [
    Case {
        name: "firmware/read",
        about: "what the firmware read is what is on the disk: a script that it ran, or the sum of all words",
        judge: |evidence| {
            let told = evidence.told.event(DEVICE.0, "read").map(|event| &*event.details);
            let ending = evidence.told.ending();
            expect(told == Some(&*evidence.read), &evidence.read, told.unwrap_or(&ending))
        },
    },
    Case {
        name: "firmware/write",
        about: "what the firmware copied on the disk is there",
        judge: |evidence| expect(evidence.written, "the copy", "another content"),
    },
    Case {
        name: "firmware/end",
        about: "the firmware's script comes to its end, and the device's process outlives it",
        judge: |evidence| {
            expect(evidence.told.ended(), "the end of the script", &evidence.told.ending())?;
            expect(evidence.server_runs, "a server that runs on", "it has ended")
        },
    },
];

fn expect(holds: bool, expected: &str, observed: &str) -> Result<(), Wrong> {
    let wrong = || Wrong { expected: expected.to_owned(), observed: observed.to_owned() };
    if holds { Ok(()) } else { Err(wrong()) }
}

/// The parts of such a machine besides QEMU.
pub(super) fn parts(firmware: &Firmware) -> Vec<Part> {
    let uefi = |(package, _)| [Part::Support(package), MTOOLS];
    firmware.uefi.map(uefi).into_iter().flatten().collect()
}

/// What makes the file system that UEFI reads.
const MTOOLS: Part = Part::Support("mtools");

/// Boots the machine; the cell of its disk.
pub(super) fn run(
    cache: &Cache,
    guest: &Guest,
    firmware: &Firmware,
    progress: &mut dyn FnMut(Step),
) -> Result<Vec<Cell>, LabError> {
    let folder = tempfile::tempdir().map_err(LabError::file(&std::env::temp_dir()))?;
    let folder = folder.path();
    let disk = match firmware.uefi {
        Some(_) => formatted(folder, cache)?,
        None => Image::create(folder, DEVICE.0).map_err(LabError::file(folder))?.path,
    };
    let content = || fs::read(&disk).map_err(LabError::file(&disk));
    let before = content()?;
    let socket = folder.join("socket");
    let mut server = Server::start(&OFFERED, Some(&disk), 1, &socket)?;

    let mut command = machine::bare(&firmware.qemu, cache);
    // How a version shows in what the firmware says.
    let version = match firmware.uefi {
        Some((package, file)) => {
            command.arg("-bios").arg(Part::Support(package).place(cache).join(file));
            "UEFI v"
        }
        None => {
            command.args(["-prom-env", &format!("boot-command={}", forth(before.len()))]);
            " FW Version"
        }
    };
    machine::connect(&mut command, 1, &socket);
    command.args(["-device", "vhost-user-blk-pci,chardev=socket1,disable-legacy=on,packed=on"]);
    let told = boot(&command, Some(version), &mut |event| {
        progress(Step::At(format!("{}: {} {}", guest.name, event.subject, event.word)));
    })?;

    let (read, written) = match firmware.uefi {
        Some(_) => ("script".to_owned(), copied(folder, &disk, cache).is_some_and(|bytes| bytes == disk::pattern())),
        None => (format!("{:x}", sum(&before)), content()? == with_copy(before)),
    };
    let mut cell = cell(guest, &Evidence { told: &told, read, written, server_runs: server.runs() });
    let said = told.noticed().first().map(|line| line.trim().to_owned());
    cell.versions = said.into_iter().chain(machine::version(guest, cache)).collect();
    Ok(vec![cell])
}

fn cell(guest: &Guest, evidence: &Evidence<'_>) -> Cell {
    let mut cell = empty_cell(guest, DEVICE);
    for Case { name, about, judge } in &CASES {
        judged(&mut cell, name, about, judge(evidence), evidence.told);
    }
    cell
}

/// The cell, if the machine could not be booted.
pub(super) fn without(guest: &Guest, error: &LabError) -> Cell {
    untried(empty_cell(guest, DEVICE), CASES.iter().map(|case| (case.name, case.about)), error)
}

/// A disk with a file system that has the script, and the file that is to be copied.
fn formatted(folder: &Path, cache: &Cache) -> Result<PathBuf, LabError> {
    let (disk, script, pattern) = (folder.join("disk"), folder.join("startup.nsh"), folder.join("pattern"));
    for (path, content) in [(&script, SHELL.as_bytes()), (&pattern, &disk::pattern())] {
        fs::write(path, content).map_err(LabError::file(path))?;
    }
    let size = disk::SECTORS.to_string();
    tool::run(mtools("mformat", &disk, cache).args(["-C", "-T", &size, "-h", "16", "-s", "63", "::"]))?;
    tool::run(mtools("mcopy", &disk, cache).args([&script, &pattern]).arg("::"))?;
    Ok(disk)
}

/// The file that the script makes, if it is there.
fn copied(folder: &Path, disk: &Path, cache: &Cache) -> Option<Vec<u8>> {
    let place = folder.join("copied");
    tool::run(mtools("mcopy", disk, cache).arg("::copied").arg(&place)).ok()?;
    fs::read(place).ok()
}

fn mtools(command: &str, disk: &Path, cache: &Cache) -> std::process::Command {
    let mut mtools = machine::program(&MTOOLS, "mtools", cache);
    mtools.args(["-c", command, "-i"]).arg(disk);
    mtools
}

/// The one line that Open Firmware gets, for a disk of so many bytes.
fn forth(len: usize) -> String {
    let line = FORTH.split_whitespace().collect::<Vec<_>>().join(" ");
    line.replace("LENGTH", &format!("{len:x}")).replace("PLACE", &format!("{PLACE:x}"))
}

/// The sum of all words, as the firmware's loop adds them.
fn sum(content: &[u8]) -> u64 {
    let words = content.chunks_exact(8).filter_map(|bytes| Some(u64::from_be_bytes(*bytes.first_chunk()?)));
    words.fold(0, u64::wrapping_add)
}

/// What is on the disk once the firmware has copied its beginning.
fn with_copy(mut content: Vec<u8>) -> Vec<u8> {
    content.copy_within(..WRITTEN, PLACE);
    content
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::guests::guests;
    use super::*;

    /// The cases that fail if a firmware told `lines`.
    fn failing(lines: &[&str], written: bool, server_runs: bool) -> Vec<String> {
        let guest = guests().iter().find(|guest| guest.name == "slof").unwrap();
        let mut told = Transcript::default();
        lines.iter().for_each(|line| drop(told.line(Duration::ZERO, line).cloned()));
        let cell = cell(guest, &Evidence { told: &told, read: "1f".into(), written, server_runs });
        cell.failures.into_iter().map(|failure| failure.case).collect()
    }

    #[test]
    fn a_good_firmware_passes_and_each_wrong_thing_fails_its_case() {
        let good = ["LAB blk read 1f ", "LAB guest end"];
        assert_eq!(failing(&good, true, true), [""; 0]);
        assert_eq!(failing(&["LAB blk read 1e", good[1]], true, true), ["firmware/read"]);
        assert_eq!(failing(&good, false, true), ["firmware/write"]);
        assert_eq!(failing(&good, true, false), ["firmware/end"]);
        assert_eq!(failing(&[], false, true).len(), CASES.len());
    }

    #[test]
    fn open_firmware_gets_one_line_with_the_disks_size() {
        let line = forth(0x100_0a00);
        assert!(line.contains(" 4000000 1000a00 s\" read\" "), "{line}");
        assert!(!line.contains('\n') && !line.contains("LENGTH") && !line.contains("PLACE"), "{line}");
    }

    #[test]
    fn words_are_added_as_a_big_endian_processor_does() {
        assert_eq!(sum(&[0, 0, 0, 0, 0, 0, 1, 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), 0x101);
    }
}
