//! A PV domain of a real Xen whose disk domain 0 serves over grants, event channels and xenstore; and another one after it
//! was destroyed.

use std::fs;

use super::boot::boot;
use super::disk::Image;
use super::guests::{Guest, Qemu};
use super::judge::Wrong;
use super::kernel::Kept;
use super::parts::Part;
use super::run::{self, Step, empty_cell, untried};
use super::transcript::Transcript;
use super::{Cache, LabError, machine, xen};
use crate::report::Cell;

/// The first process of domain 0, and of the domain; the domain's configuration.
const DOM0: &str = include_str!("scripts/domains.sh");
const DOMU: &str = include_str!("scripts/domu.sh");
const DOMAIN: &str = include_str!("scripts/pv.cfg");
/// The tools of Xen's that domain 0 starts.
const TOOLS: [&str; 4] = ["xl", "xenstored", "xenconsoled", "xen-init-dom0"];
/// Its device and ring format.
const DEVICE: (&str, &str) = ("blk", "packed");

/// One judgement.
struct Case {
    name: &'static str,
    about: &'static str,
    judge: fn(&Transcript, &Image) -> Result<(), Wrong>,
}

static CASES: [Case; 5] = [
    Case {
        name: "domu/read",
        about: "the whole disk, read by a domain through what it grants, has the SHA-256 that the host computed",
        judge: |told, image| same(said(told, "first", "read"), Some(&image.sha256)),
    },
    Case {
        name: "domu/write",
        about: "what the domain wrote is on the disk, and nothing else is",
        judge: |told, _| {
            differ(said(told, "first", "wrote"), said(told, "first", "read"))?;
            same(said(told, "first", "disk"), said(told, "first", "wrote"))
        },
    },
    Case {
        name: "domu/destroyed",
        about: "the domain is destroyed while it writes, and no mapped grant, no port and no domain is left",
        judge: |told, _| {
            // Before: grants and ports.
            let holds = said(told, "first", "holds").unwrap_or_default();
            let used = holds.split(' ').filter(|count| count.parse().is_ok_and(|count: u32| count > 0)).count();
            expect(used == 2, "mapped grants and ports while the domain is there", holds)?;
            same(said(told, "first", "left"), Some("0 0 0"))
        },
    },
    Case {
        name: "domu/next",
        about: "the next domain reads what the destroyed one left, writes too, and ends",
        judge: |told, _| {
            same(said(told, "second", "read"), said(told, "first", "disk"))?;
            differ(said(told, "second", "wrote"), said(told, "second", "read"))?;
            same(said(told, "second", "disk"), said(told, "second", "wrote"))?;
            same(said(told, "second", "left"), Some("0 0 0"))
        },
    },
    Case {
        name: "domu/end",
        about: "domain 0 and the server end in order",
        judge: |told, _| {
            let complaints = told.complaints();
            expect(complaints.is_empty(), "no complaint", &complaints.join("; "))?;
            same(said(told, "dom0", "served"), Some("0"))?;
            expect(told.ended(), "the end of domain 0's script", &told.ending())
        },
    },
];

fn said<'a>(told: &'a Transcript, subject: &str, word: &str) -> Option<&'a str> {
    told.event(subject, word).map(|event| &*event.details)
}

fn expect(holds: bool, expected: &str, observed: &str) -> Result<(), Wrong> {
    let wrong = || Wrong { expected: expected.to_owned(), observed: observed.to_owned() };
    if holds { Ok(()) } else { Err(wrong()) }
}

/// Both were told, and are the same.
fn same(found: Option<&str>, expected: Option<&str>) -> Result<(), Wrong> {
    let holds = expected.is_some() && expected == found;
    let [expected, found] = [expected, found].map(|text| text.unwrap_or("nothing was told"));
    expect(holds, expected, found)
}

/// Both were told, and differ.
fn differ(found: Option<&str>, before: Option<&str>) -> Result<(), Wrong> {
    let holds = found.is_some() && before.is_some() && found != before;
    expect(holds, "another SHA-256 than before", found.unwrap_or("nothing was told"))
}

/// Boots domain 0 and has it run both domains; the cell of their disk.
pub(super) fn run(
    cache: &Cache,
    guest: &Guest,
    qemu: &Qemu,
    progress: &mut dyn FnMut(Step),
) -> Result<Vec<Cell>, LabError> {
    let place = Part::Kernel(guest.kernel).place(cache);
    let not_there = || LabError::NotSetUp { what: place.display().to_string(), guest: guest.name };
    let kernel = Kept::open(&place, guest.kernel).ok_or_else(not_there)?;
    let folder = crate::temporary::folder().map_err(LabError::file(&std::env::temp_dir()))?;
    let folder = folder.path();
    let busybox = Part::tools(guest).place(cache).join("busybox");
    let image = Image::create(folder, DEVICE.0).map_err(LabError::file(folder))?;
    let vmlinux = xen::vmlinux(&kernel, folder)?;
    let read = |path: &std::path::Path| fs::read(path).map_err(LabError::file(path));

    let domain = xen::first_files(cache, &kernel, &busybox, DOMU, &[])?.finish();
    let mut archive = xen::first_files(cache, &kernel, &busybox, DOM0, &TOOLS)?;
    archive.folder("guest");
    archive.file("guest/kernel", 0o644, &read(&vmlinux)?);
    archive.file("guest/initramfs", 0o644, &domain);
    archive.file("guest/domain.cfg", 0o644, DOMAIN.as_bytes());
    archive.file("disk.img", 0o644, &read(&image.path)?);
    let initramfs = xen::write(folder, "initramfs", &archive.finish())?;

    let mut command = machine::emulator(&qemu.emulator(), qemu.program, cache);
    command.args(["-M", qemu.machine, "-cpu", qemu.cpu, "-m", &format!("{}M", qemu.memory)]);
    xen::boots(&mut command, cache, "1024M", &vmlinux, "", &initramfs);
    let told = boot(&command, None, &mut |event| {
        progress(Step::At(format!("{}: {} {}", guest.name, event.subject, event.word)));
    })?;
    let versions = said(&told, "dom0", "xen").map(|version| format!("Xen {version}"));
    let linux = told.kernel().map(|version| format!("Linux {version}"));
    let mut cell = judged(guest, &told, &image);
    cell.versions = versions.into_iter().chain(linux).chain(machine::version(guest, cache)).collect();
    Ok(vec![cell])
}

fn judged(guest: &Guest, told: &Transcript, image: &Image) -> Cell {
    let mut cell = empty_cell(guest, DEVICE);
    for Case { name, about, judge } in &CASES {
        run::judged(&mut cell, name, about, judge(told, image), told);
    }
    cell
}

/// The cell, if it could not be run.
pub(super) fn without(guest: &Guest, error: &LabError) -> Cell {
    untried(empty_cell(guest, DEVICE), CASES.iter().map(|case| (case.name, case.about)), error)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::guests::guests;
    use super::*;

    fn failing(lines: &[String]) -> Vec<&'static str> {
        let folder = tempfile::tempdir().unwrap();
        let image = Image::create(folder.path(), DEVICE.0).unwrap();
        let mut told = Transcript::default();
        for line in lines {
            told.line(Duration::ZERO, &line.replace("IMAGE", &image.sha256));
        }
        let guest = guests().iter().find(|guest| guest.name == "xen-domu").unwrap();
        let cell = judged(guest, &told, &image);
        CASES.iter().map(|case| case.name).filter(|name| cell.failures.iter().any(|it| it.case == *name)).collect()
    }

    fn good() -> Vec<String> {
        [
            "first read IMAGE",
            "first wrote aa",
            "first holds 12 2",
            "first left 0 0 0",
            "first disk aa",
            "second read aa",
            "second wrote bb",
            "second left 0 0 0",
            "second disk bb",
            "dom0 served 0",
            "guest end",
        ]
        .map(|line| format!("LAB {line}"))
        .into()
    }

    #[test]
    fn good_domains_pass_and_each_wrong_thing_fails_its_case() {
        assert_eq!(failing(&good()), [""; 0]);
        for (line, wrong, cases) in [
            (0, "first read 00", &["domu/read"][..]),
            (1, "first wrote cc", &["domu/write"]),
            (2, "first holds 12 0", &["domu/destroyed"]),
            (3, "first left 1 0 0", &["domu/destroyed"]),
            (3, "first left 0 0 1", &["domu/destroyed"]),
            (5, "second read cc", &["domu/next"]),
            (8, "second disk aa", &["domu/next"]),
            (9, "dom0 served 1", &["domu/end"]),
            (10, "guest complaint oops", &["domu/end"]),
        ] {
            let mut lines = good();
            lines[line] = format!("LAB {wrong}");
            assert_eq!(failing(&lines), cases, "{wrong}");
        }
        assert_eq!(failing(&[]).len(), CASES.len());
    }
}
