//! The suite in domain 0 of a real Xen: a machine for each format of rings.

use super::guests::{Guest, Qemu};
use super::judge::Wrong;
use super::kernel::Kept;
use super::parts::Part;
use super::run::{Step, failure, told_case};
use super::suite::{self, Batch};
use super::transcript::Transcript;
use super::{Cache, LabError, machine, xen};
use crate::report::{Cell, Outcome};

/// Domain 0's first process.
const INIT: &str = concat!(include_str!("scripts/dom0-suite.sh"), include_str!("scripts/suite.sh"));
/// The tools of Xen's that it starts.
const TOOLS: [&str; 2] = ["xenstored", "xen-init-dom0"];
/// The cells.
pub(super) const CELLS: [Batch; 2] = [cells("split"), cells("packed")];
/// What the kernel is not to start. Its own drivers' side and devices' side watch the whole of the store, and read three
/// times after each thing that the suite writes; the third waits for devices of theirs.
const NOT_STARTED: &str =
    "initcall_blacklist=xenbus_probe_frontend_init,xenbus_probe_backend_init,boot_wait_for_devices";

/// What Xen itself refuses: tried on each machine before the suite.
const REFUSALS: [(&str, &str, &str); 4] = [
    ("dom0/read-only-grant", "read-only-grant", "Xen does not map a read-only grant for writing"),
    ("dom0/bad-reference", "bad-reference", "Xen does not map a reference under which nothing is granted"),
    ("dom0/foreign-domain", "foreign-domain", "Xen does not map what is granted to another domain"),
    ("dom0/revocation-in-use", "revocation-in-use", "a grant that is mapped cannot be taken back, and then it can"),
];

const fn cells(ring: &'static str) -> Batch {
    Batch { transport: "xenbus", devices: &["blk", "rng", "console"], ring }
}

/// Runs the cells.
pub(super) fn run(
    cache: &Cache,
    guest: &Guest,
    qemu: &Qemu,
    progress: &mut dyn FnMut(Step),
) -> Result<Vec<Cell>, LabError> {
    let kernel = Kept::of(guest.kernel, guest, cache)?;
    let folder = crate::temporary::folder().map_err(LabError::file(&std::env::temp_dir()))?;
    let folder = folder.path();
    let busybox = Part::tools(guest).place(cache).join("busybox");
    let archive = xen::first_files(cache, &kernel, &busybox, INIT, &TOOLS)?;
    let initramfs = xen::write(folder, "initramfs", &archive.finish())?;
    let kernel = xen::vmlinux(&kernel, folder)?;
    let command = |batch: &Batch| {
        let mut command = machine::emulator(&qemu.emulator(), qemu.program, cache);
        command.args(["-M", qemu.machine, "-cpu", qemu.cpu, "-m", &format!("{}M", qemu.memory)]);
        let words = format!("{NOT_STARTED} {}", batch.words());
        xen::boots(&mut command, cache, "512M", &kernel, &words, &initramfs);
        command
    };
    suite::run(guest, &CELLS, machine::version(guest, cache).as_deref(), &command, &refusals, progress)
}

/// Adds what Xen refused to the cell.
fn refusals(cell: &mut Cell, told: &Transcript) {
    for (case, word, about) in REFUSALS {
        let observed = told.event("refusal", word).map_or("nothing was told", |event| &event.details);
        let outcome = if observed.starts_with("refused ") {
            cell.passed += 1;
            Outcome::Passed
        } else {
            cell.failed += 1;
            let wrong = Wrong { expected: about.to_owned(), observed: observed.to_owned() };
            cell.failures.push(failure(case, wrong, told));
            Outcome::Failed
        };
        cell.cases.push(told_case(case, about, outcome, 0.0));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::guests::guests;
    use super::super::run::empty_cell;
    use super::*;

    #[test]
    fn what_xen_did_not_refuse_is_a_failure() {
        let mut told = Transcript::default();
        for line in [
            "LAB refusal read-only-grant refused Err",
            "LAB refusal bad-reference refused Err",
            "LAB refusal foreign-domain allowed Ok",
        ] {
            told.line(Duration::ZERO, line);
        }
        let guest = guests().iter().find(|guest| guest.name == "xen-dom0").unwrap();
        let mut cell = empty_cell(guest, ("rng", "split"));
        refusals(&mut cell, &told);
        assert_eq!((cell.passed, cell.failed), (2, 2));
        let failures: Vec<_> = cell.failures.iter().map(|failure| &*failure.case).collect();
        assert_eq!(failures, ["dom0/foreign-domain", "dom0/revocation-in-use"]);
    }
}
