//! The suite inside a guest: batch by batch, each on a machine of its own.

use std::error::Error;
use std::io::Write as _;
use std::num::NonZero;
use std::process::Command;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use serde::Deserialize;

use super::boot::boot;
use super::guests::Guest;
use super::judge::Wrong;
use super::run::{EVIDENCE, Step, empty_cell, failure, told_case};
use super::transcript::Transcript;
use super::{LabError, tool};
use crate::report::{Cell, Outcome, Skipped};
use crate::temporary;

/// Cells that one machine runs.
#[derive(Debug)]
pub(super) struct Batch {
    /// Of all of them.
    pub(super) transport: &'static str,
    /// A cell for each, in the order in which they are told.
    pub(super) devices: &'static [&'static str],
    /// Of all of them.
    pub(super) ring: &'static str,
}

/// The one case of a cell that was not run.
const START: (&str, &str) = ("lab/start", "the guest started, and the suite told its result");

/// What the suite tells.
#[derive(Deserialize)]
struct Report {
    cells: Vec<Cell>,
}

impl Batch {
    /// What the guest's kernel is told: the words that it does not know are in the environment of the first process.
    pub(super) fn words(&self) -> String {
        format!("transport={} device={} ring={}", self.transport, self.devices.join(","), self.ring)
    }

    /// A cell for each of its devices, of nothing but the case [`START`].
    fn cells(&self, guest: &Guest, outcome: Outcome, fill: impl Fn(&mut Cell)) -> Vec<Cell> {
        let cell = |device: &&str| {
            let mut cell = Cell { transport: self.transport.into(), ..empty_cell(guest, (device, self.ring)) };
            cell.cases.push(told_case(START.0, START.1, outcome, 0.0));
            fill(&mut cell);
            cell
        };
        self.devices.iter().map(cell).collect()
    }
}

/// Runs each of `batches` on the machine that `command` starts for it; as many at a time as there are processors. What
/// else a machine told of a cell is what `also` adds.
pub(super) fn run(
    guest: &Guest,
    batches: &[Batch],
    emulator: Option<&str>,
    command: &(dyn Fn(&Batch) -> Command + Sync),
    also: &(dyn Fn(&mut Cell, &Transcript) + Sync),
    progress: &mut dyn FnMut(Step),
) -> Result<Vec<Cell>, LabError> {
    let (send, heard) = channel();
    let waiting = Mutex::new(batches.iter().enumerate());
    let at_once = thread::available_parallelism().map_or(1, NonZero::get);
    let worker = |send: Sender<String>| {
        let turns = std::iter::from_fn(|| {
            let (number, batch) = waiting.lock().ok()?.next()?;
            let told = boot(&command(batch), None, &mut |event| {
                let Batch { transport, ring, .. } = batch;
                // Nobody listens only if the program ends.
                let _ = send.send(format!("{transport} {ring}: {} {}", event.subject, event.word));
            });
            Some((number, told.map(|told| cells(guest, batch, &told, emulator, also))))
        });
        turns.collect::<Vec<_>>()
    };
    let mut done = thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| send.clone()).map(|send| scope.spawn(|| worker(send))).collect();
        drop(send);
        for what in heard {
            progress(Step::At(format!("{}: {what}", guest.name)));
        }
        let joined = workers.into_iter().map(|worker| worker.join());
        joined.flat_map(|cells| cells.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect::<Vec<_>>()
    });
    done.sort_by_key(|(number, _)| *number);
    let cells = done.into_iter().map(|(_, cells)| cells).collect::<Result<Vec<_>, _>>()?;
    Ok(cells.into_iter().flatten().collect())
}

/// What the suite told of the cells of `batch`.
fn cells(
    guest: &Guest,
    batch: &Batch,
    told: &Transcript,
    emulator: Option<&str>,
    also: &dyn Fn(&mut Cell, &Transcript),
) -> Vec<Cell> {
    let base64: String = told.all("report", "part").collect();
    let (mut cells, wrong) = match report(&base64) {
        Ok(report) => (report.cells, String::new()),
        Err(error) => (Vec::new(), format!("no report: {error}")),
    };
    let complaints = told.complaints().join("; ");
    let whole = cells.iter().map(|cell| &*cell.device).eq(batch.devices.iter().copied());
    // The guest is there for the suite: what it has no place for is a failure, not something that is missing here.
    let idle = cells.iter().find(|cell| cell.passed + cell.failed + cell.rejected + cell.wedged == 0);
    let wrong = idle.map_or(wrong, |cell| {
        let reason = cell.skipped.first().map_or("nothing was run", |skipped| &skipped.reason);
        format!("of {} nothing was run: {reason}", cell.device)
    });
    if whole && wrong.is_empty() && told.ended() && complaints.is_empty() {
        for cell in &mut cells {
            cell.hypervisor = guest.name.into();
            cell.evidence = EVIDENCE.into();
            cell.versions.extend(emulator.map(str::to_owned));
            also(cell, told);
        }
        return cells;
    }
    let said: Vec<_> = told.all("suite", "said").collect();
    let observed = format!("{} {} {complaints} {wrong}", told.ending(), said.join("; "));
    batch.cells(guest, Outcome::Failed, |cell| {
        cell.failed = 1;
        let wrong = Wrong { expected: START.1.into(), observed: observed.trim().into() };
        cell.failures.push(failure(START.0, wrong, told));
    })
}

/// The cells, if none of `batches` could be run.
pub(super) fn without(guest: &Guest, batches: &[Batch], error: &LabError) -> Vec<Cell> {
    let cells = |batch: &Batch| {
        if !error.is_absence() {
            return cells(guest, batch, &Transcript::without_a_start(error), None, &|_, _| ());
        }
        let skipped = || Skipped { case: START.0.into(), reason: error.to_string() };
        batch.cells(guest, Outcome::Skipped, |cell| cell.skipped.push(skipped()))
    };
    batches.iter().flat_map(cells).collect()
}

/// The report that was told, packed, as `base64`.
fn report(base64: &str) -> Result<Report, Box<dyn Error>> {
    let mut packed = temporary::file()?;
    packed.write_all(&decode(base64).ok_or("what was told is no base64")?)?;
    let json = tool::run(Command::new("gzip").args(["--decompress", "--stdout"]).arg(packed.path()))?;
    Ok(serde_json::from_str(&json)?)
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

    const BATCH: Batch = Batch { transport: "xenbus", devices: &["rng"], ring: "split" };

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
        let json = r#"{"cells":[{"hypervisor":"xen","transport":"xenbus","device":"rng","ring":"split",
            "evidence":"real","versions":["Xen 4.17.7"],"passed":1,"failed":0,"rejected":0,"wedged":0,"skipped":[],
            "failures":[],"seconds":1.0,"cases":[]}]}"#;
        let encoded = encode(json);
        let (one, two) = encoded.split_at(100);
        let told = transcript(&[&format!("LAB report part {one}"), &format!("LAB report part {two}"), "LAB guest end"]);
        let cells = cells(guest(), &BATCH, &told, Some("QEMU 1"), &|cell, _| cell.passed += 1);
        let [cell] = &cells[..] else { panic!("{cells:?}") };
        assert_eq!((&*cell.hypervisor, &*cell.evidence, cell.passed), ("xen-dom0", "emulated", 2));
        assert_eq!(cell.versions, ["Xen 4.17.7", "QEMU 1"]);
    }

    /// As the guest's script does it.
    fn encode(json: &str) -> String {
        let mut file = temporary::file().unwrap();
        file.write_all(json.as_bytes()).unwrap();
        tool::run(Command::new("sh").args(["-c", "gzip <\"$0\" | base64 -w 0"]).arg(file.path())).unwrap()
    }

    #[test]
    fn a_suite_that_finds_no_place_in_its_guest_has_failed() {
        let json = r#"{"cells":[{"hypervisor":"xen","transport":"xenbus","device":"rng","ring":"split",
            "evidence":"real","versions":[],"passed":0,"failed":0,"rejected":0,"wedged":0,
            "skipped":[{"case":"init/any","reason":"no Xen here"}],"failures":[],"seconds":1.0,"cases":[]}]}"#;
        let told = transcript(&[&format!("LAB report part {}", encode(json)), "LAB guest end"]);
        let [cell] = &cells(guest(), &BATCH, &told, None, &|_, _| ())[..] else { panic!("{told:?}") };
        assert_eq!(cell.failed, 1);
        assert!(cell.failures[0].observed.ends_with("no Xen here"), "{:?}", cell.failures);
    }

    #[test]
    fn a_report_that_does_not_come_whole_is_a_failure_of_every_cell() {
        let batch = Batch { devices: &["blk", "rng"], ..BATCH };
        let empty = format!("LAB report part {}", encode(r#"{"cells":[]}"#));
        for lines in [
            &["LAB guest kernel 6.1", "LAB guest end"][..],
            &[&*empty, "LAB suite said no device", "LAB guest end"],
            &["LAB report part eyJjZWxscyI6W119", "LAB guest end"],
        ] {
            let cells = cells(guest(), &batch, &transcript(lines), None, &|_, _| ());
            assert_eq!(
                cells.iter().map(|cell| (&*cell.device, cell.failed)).collect::<Vec<_>>(),
                [("blk", 1), ("rng", 1)]
            );
        }
    }

    #[test]
    fn without_its_parts_every_cell_is_skipped() {
        let error = LabError::NotSetUp { what: "xen".into(), guest: "xen-dom0" };
        let cells = without(guest(), &[BATCH, BATCH], &error);
        assert!(cells.len() == 2 && cells.iter().all(|cell| cell.unavailable().is_some()));
    }
}
