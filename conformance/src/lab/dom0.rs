//! The suite in domain 0 of a real Xen: cell by cell, each on a machine of its own.

use std::num::NonZero;
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use serde::Deserialize;

use super::boot::boot;
use super::guests::{Guest, Qemu};
use super::kernel::Kept;
use super::parts::Part;
use super::run::{EVIDENCE, Step};
use super::transcript::Transcript;
use super::{Cache, LabError, machine, xen};
use crate::report::{Case, Cell, Failure, Outcome, Skipped};

/// Domain 0's first process.
const INIT: &str = include_str!("scripts/suite.sh");
/// The tools of Xen's that it starts.
const TOOLS: [&str; 2] = ["xenstored", "xen-init-dom0"];
/// The cells, longest first: device and ring format.
const CELLS: [(&str, &str); 6] = [
    ("blk", "split"),
    ("blk", "packed"),
    ("console", "split"),
    ("rng", "split"),
    ("console", "packed"),
    ("rng", "packed"),
];
/// The one case of a cell that was not run.
const START: (&str, &str) = ("lab/start", "domain 0 started, and the suite told its result");

/// What the suite tells.
#[derive(Deserialize)]
struct Report {
    cells: Vec<Cell>,
}

/// Runs each cell on a machine of its own; as many at a time as there are processors.
pub(super) fn run(
    cache: &Cache,
    guest: &Guest,
    qemu: &Qemu,
    progress: &mut dyn FnMut(Step),
) -> Result<Vec<Cell>, LabError> {
    let place = Part::Kernel(guest.kernel).place(cache);
    let not_there = || LabError::NotSetUp { what: place.display().to_string(), guest: guest.name };
    let kernel = Kept::open(&place, guest.kernel).ok_or_else(not_there)?;
    let folder = tempfile::tempdir().map_err(LabError::file(&std::env::temp_dir()))?;
    let folder = folder.path();
    let busybox = Part::tools(guest).place(cache).join("busybox");
    let archive = xen::domain0(cache, &kernel, &busybox, INIT, &TOOLS)?;
    let initramfs = xen::write(folder, "initramfs", &archive.finish())?;
    let kernel = xen::vmlinux(&kernel, folder)?;
    let emulator = machine::version(guest, cache);

    let (send, heard) = std::sync::mpsc::channel();
    let waiting = Mutex::new(CELLS.iter().enumerate());
    let at_once = thread::available_parallelism().map_or(1, NonZero::get);
    let worker = |send: std::sync::mpsc::Sender<String>| {
        let turns = std::iter::from_fn(|| {
            let (number, &(device, ring)) = waiting.lock().ok()?.next()?;
            let told = one(cache, qemu, (device, ring), &kernel, &initramfs, &send);
            Some((number, told.map(|told| cell(guest, device, ring, &told, emulator.as_deref()))))
        });
        turns.collect::<Vec<_>>()
    };
    let mut cells = thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| send.clone()).map(|send| scope.spawn(|| worker(send))).collect();
        drop(send);
        for what in heard {
            progress(Step::At(format!("{}: {what}", guest.name)));
        }
        let joined = workers.into_iter().map(|worker| worker.join());
        joined.flat_map(|cells| cells.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect::<Vec<_>>()
    });
    cells.sort_by_key(|(number, _)| *number);
    cells.into_iter().map(|(_, cell)| cell).collect()
}

/// One cell on one machine.
fn one(
    cache: &Cache,
    qemu: &Qemu,
    (device, ring): (&str, &str),
    kernel: &Path,
    initramfs: &Path,
    told: &std::sync::mpsc::Sender<String>,
) -> Result<Transcript, LabError> {
    let mut command = machine::program(&qemu.emulator(), qemu.program, cache);
    command.args(["-M", qemu.machine, "-cpu", qemu.cpu, "-m", &format!("{}M", qemu.memory)]);
    // What a kernel does not know is in the environment of the first process.
    xen::boots(&mut command, cache, "512M", kernel, &format!("device={device} ring={ring}"), initramfs);
    boot(&command, None, &mut |event| {
        // Nobody listens only if the program ends.
        let _ = told.send(format!("{device} {ring}: {} {}", event.subject, event.word));
    })
}

/// What the suite told of its cell.
fn cell(guest: &Guest, device: &str, ring: &str, told: &Transcript, emulator: Option<&str>) -> Cell {
    let base64: String = told.all("report", "part").collect();
    let report = decode(&base64).and_then(|json| serde_json::from_slice::<Report>(&json).ok());
    let cell = report.and_then(|report| report.cells.into_iter().next());
    let complaints = told.complaints().join("; ");
    match cell {
        Some(mut cell) if told.ended() && complaints.is_empty() => {
            cell.hypervisor = guest.name.into();
            cell.versions.extend(emulator.map(str::to_owned));
            cell
        }
        _ => {
            let said: Vec<_> = told.all("suite", "said").collect();
            let observed = format!("{} {} {complaints}", told.ending(), said.join("; "));
            let mut cell = empty(guest, device, ring, Outcome::Failed);
            cell.failed = 1;
            cell.failures.push(Failure {
                case: START.0.into(),
                outcome: Outcome::Failed,
                statements: Vec::new(),
                expected: START.1.into(),
                observed: observed.trim().into(),
                reproduction: told.tail(),
            });
            cell
        }
    }
}

/// The cells, if none of them could be run.
pub(super) fn without(guest: &Guest, error: &LabError) -> Vec<Cell> {
    let skipped = |&(device, ring): &(&str, &str)| {
        if !error.is_absence() {
            return cell(guest, device, ring, &Transcript::without_a_start(error), None);
        }
        let mut cell = empty(guest, device, ring, Outcome::Skipped);
        cell.skipped.push(Skipped { case: START.0.into(), reason: error.to_string() });
        cell
    };
    CELLS.iter().map(skipped).collect()
}

/// A cell that has only the case [`START`], and its outcome.
fn empty(guest: &Guest, device: &str, ring: &str, outcome: Outcome) -> Cell {
    let (case, about) = START;
    Cell {
        hypervisor: guest.name.into(),
        transport: guest.transport.into(),
        device: device.into(),
        ring: ring.into(),
        evidence: EVIDENCE.into(),
        versions: Vec::new(),
        passed: 0,
        failed: 0,
        rejected: 0,
        wedged: 0,
        skipped: Vec::new(),
        failures: Vec::new(),
        seconds: 0.0,
        cases: vec![Case { case: case.into(), about: about.into(), outcome, statements: Vec::new(), seconds: 0.0 }],
        image: None,
    }
}

/// The bytes that `base64` stands for (RFC 4648, 4); none if it is none.
fn decode(base64: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let mut bytes = Vec::new();
    for group in base64.trim_end_matches('=').as_bytes().chunks(4) {
        let digits = group.iter().map(|&byte| digit(byte)).collect::<Option<Vec<_>>>()?;
        let word = digits.iter().fold(0, |word, &digit| word << 6 | u32::from(digit)) << (6 * (4 - digits.len()));
        bytes.extend_from_slice(&word.to_be_bytes()[1..digits.len().max(1)]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::guests::guests;
    use super::*;

    fn guest() -> &'static Guest {
        guests().iter().find(|guest| guest.name == "xen-dom0").unwrap()
    }

    fn transcript(lines: &[&str]) -> Transcript {
        let mut told = Transcript::default();
        lines.iter().for_each(|line| drop(told.line(Duration::ZERO, line).cloned()));
        told
    }

    #[test]
    fn base64_is_read() {
        for (text, bytes) in
            [("", &b""[..]), ("Zg==", b"f"), ("Zm8=", b"fo"), ("Zm9v", b"foo"), ("+/+/", b"\xfb\xff\xbf")]
        {
            assert_eq!(decode(text).as_deref(), Some(bytes), "{text}");
        }
        assert_eq!(decode("Zm9\u{e9}"), None);
    }

    #[test]
    fn what_the_suite_told_is_the_cell_under_the_guests_name() {
        // {"cells":[{"hypervisor":"xen","transport":"xenbus","device":"rng","ring":"split","evidence":"emulated",
        // "versions":["Xen 4.17.7"],"passed":1,"failed":0,"rejected":0,"wedged":0,"skipped":[],"failures":[],
        // "seconds":1.0,"cases":[]}]}
        let json = r#"{"cells":[{"hypervisor":"xen","transport":"xenbus","device":"rng","ring":"split","evidence":"emulated","versions":["Xen 4.17.7"],"passed":1,"failed":0,"rejected":0,"wedged":0,"skipped":[],"failures":[],"seconds":1.0,"cases":[]}]}"#;
        let encoded = encode(json.as_bytes());
        let (one, two) = encoded.split_at(100);
        let told = transcript(&[&format!("LAB report part {one}"), &format!("LAB report part {two}"), "LAB guest end"]);
        let cell = cell(guest(), "rng", "split", &told, Some("QEMU 1"));
        assert_eq!((&*cell.hypervisor, &*cell.evidence, cell.passed), ("xen-dom0", "emulated", 1));
        assert_eq!(cell.versions, ["Xen 4.17.7", "QEMU 1"]);
    }

    fn encode(bytes: &[u8]) -> String {
        const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut out = String::new();
        for group in bytes.chunks(3) {
            let word = group.iter().chain([&0; 2]).take(3).fold(0usize, |word, &byte| word << 8 | usize::from(byte));
            (0..=group.len()).for_each(|at| out.push(DIGITS[word >> (18 - 6 * at) & 63].into()));
            out.push_str(&"=="[..3 - group.len()]);
        }
        out
    }

    #[test]
    fn a_report_that_does_not_come_whole_is_a_failure() {
        for lines in [
            &["LAB guest kernel 6.1", "LAB guest end"][..],
            &["LAB report part eyJjZWxscyI6W10=", "LAB suite said no device", "LAB guest end"],
        ] {
            let cell = cell(guest(), "blk", "packed", &transcript(lines), None);
            assert_eq!((cell.failed, &*cell.failures[0].case), (1, "lab/start"));
        }
    }

    #[test]
    fn without_its_parts_every_cell_is_skipped() {
        let cells = without(guest(), &LabError::NoCache);
        assert_eq!(cells.len(), CELLS.len());
        assert!(cells.iter().all(|cell| cell.skipped.len() == 1 && cell.failed == 0));
    }
}
