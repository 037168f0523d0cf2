//! What `polyvirt check` found, and the forms in which it is told.

mod escape;
mod facts;
mod from_suite;
mod html;
mod junit;
mod text;

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize, Serializer};

pub(crate) use facts::Facts;
pub(crate) use html::html;
pub(crate) use junit::junit;
pub(crate) use text::{Style, failures, matrix, mebibytes};

/// The result of one run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// What was run, in the order of the matrix.
    pub(crate) cells: Vec<Cell>,
    /// All of it in a few numbers.
    pub(crate) summary: Summary,
    /// The image that was carried through the block cells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) image: Option<ImageSource>,
}

/// One hypervisor × transport × device × ring format.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Cell {
    pub(crate) hypervisor: String,
    pub(crate) transport: String,
    pub(crate) device: String,
    /// The format of its rings: split or packed.
    pub(crate) ring: String,
    /// What the result is worth: real, emulated or model.
    pub(crate) evidence: String,
    /// What else took part, with its version: a guest's kernel, an emulator.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) versions: Vec<String>,
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// Malformed inputs that the device refused, staying alive.
    pub(crate) rejected: usize,
    pub(crate) wedged: usize,
    pub(crate) skipped: Vec<Skipped>,
    pub(crate) failures: Vec<Failure>,
    /// Wall time of the whole cell.
    #[serde(serialize_with = "milliseconds")]
    pub(crate) seconds: f64,
    /// Every case that was run or skipped.
    pub(crate) cases: Vec<Case>,
    /// What became of the image; only in cells with a block device that could be run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) image: Option<ImageResult>,
}

/// A case that was not run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Skipped {
    pub(crate) case: String,
    pub(crate) reason: String,
}

/// A case that failed or wedged.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Failure {
    pub(crate) case: String,
    pub(crate) outcome: Outcome,
    /// Ids of the spec's statements that the case judges.
    pub(crate) statements: Vec<String>,
    /// What should have happened.
    pub(crate) expected: String,
    /// What did.
    pub(crate) observed: String,
    /// The steps that lead there, one a line; empty if nothing is known.
    pub(crate) reproduction: String,
}

/// A case and what became of it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Case {
    pub(crate) case: String,
    /// What it checks, in a sentence.
    pub(crate) about: String,
    pub(crate) outcome: Outcome,
    pub(crate) statements: Vec<String>,
    #[serde(serialize_with = "milliseconds")]
    pub(crate) seconds: f64,
}

/// What became of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    Passed,
    Rejected,
    Failed,
    Wedged,
    Skipped,
}

/// Where the image came from.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ImageSource {
    /// The file as it was named; none if the image was generated.
    pub(crate) file: Option<String>,
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

/// An image carried through one block cell.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct ImageResult {
    pub(crate) ok: bool,
    /// What went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    /// Bytes read and written through the device.
    pub(crate) bytes: u64,
    #[serde(serialize_with = "milliseconds")]
    pub(crate) seconds: f64,
    pub(crate) mib_per_second: f64,
}

/// The whole run in a few numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) cells: usize,
    /// Cells of which at least one case was run.
    pub(crate) cells_run: usize,
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) rejected: usize,
    pub(crate) wedged: usize,
    pub(crate) skipped: usize,
    pub(crate) images: usize,
    pub(crate) images_failed: usize,
    #[serde(serialize_with = "milliseconds")]
    pub(crate) seconds: f64,
    /// Nothing failed or wedged.
    pub(crate) ok: bool,
}

impl Report {
    /// Sums up `cells`, which took `seconds` in all.
    pub(crate) fn new(cells: Vec<Cell>, image: Option<ImageSource>, seconds: f64) -> Self {
        let sum = |count: fn(&Cell) -> usize| cells.iter().map(count).sum();
        let mut summary = Summary {
            cells: cells.len(),
            cells_run: cells.iter().filter(|cell| cell.was_run()).count(),
            passed: sum(|cell| cell.passed),
            failed: sum(|cell| cell.failed),
            rejected: sum(|cell| cell.rejected),
            wedged: sum(|cell| cell.wedged),
            skipped: sum(|cell| cell.skipped.len()),
            images: sum(|cell| cell.image.is_some().into()),
            images_failed: sum(|cell| cell.image.as_ref().is_some_and(|image| !image.ok).into()),
            seconds,
            ok: false,
        };
        summary.ok = summary.failed + summary.wedged + summary.images_failed == 0;
        Self { cells, summary, image }
    }

    /// The rows of the matrix, each once, in the order of the cells.
    pub(crate) fn rows(&self) -> Vec<Row<'_>> {
        distinct(self.cells.iter().map(Cell::row))
    }

    /// The columns of the matrix: devices, each once, in the order of the cells.
    pub(crate) fn columns(&self) -> Vec<&str> {
        distinct(self.cells.iter().map(|cell| &*cell.device))
    }

    /// The cell at a row and column.
    pub(crate) fn cell(&self, row: Row<'_>, device: &str) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.row() == row && cell.device == device)
    }
}

/// A row of the matrix. Those of one hypervisor and transport are told together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row<'a> {
    pub(crate) hypervisor: &'a str,
    pub(crate) transport: &'a str,
    pub(crate) evidence: &'a str,
    pub(crate) ring: &'a str,
}

impl Row<'_> {
    /// Whether it differs from `other` in nothing but the ring.
    pub(crate) fn goes_with(self, other: Self) -> bool {
        Self { ring: other.ring, ..self } == other
    }
}

impl Cell {
    /// Whether any case was run.
    pub(crate) fn was_run(&self) -> bool {
        self.passed + self.failed + self.rejected + self.wedged > 0
    }

    /// The counts in the order in which they are told, zeros too.
    pub(crate) fn counts(&self) -> [(Outcome, usize); 5] {
        [
            (Outcome::Passed, self.passed),
            (Outcome::Rejected, self.rejected),
            (Outcome::Failed, self.failed),
            (Outcome::Wedged, self.wedged),
            (Outcome::Skipped, self.skipped.len()),
        ]
    }

    /// The worst that happened in the cell, image included; passed if nothing did.
    pub(crate) fn verdict(&self) -> Outcome {
        if self.wedged > 0 {
            Outcome::Wedged
        } else if self.failed > 0 || self.image.as_ref().is_some_and(|image| !image.ok) {
            Outcome::Failed
        } else if self.was_run() {
            Outcome::Passed
        } else {
            Outcome::Skipped
        }
    }

    /// The reason that all skipped cases share, if the cell was not run for one reason.
    pub(crate) fn unavailable(&self) -> Option<&str> {
        let first = &self.skipped.first()?.reason;
        (!self.was_run() && self.skipped.iter().all(|skipped| skipped.reason == *first)).then_some(first)
    }

    /// Its row of the matrix.
    pub(crate) fn row(&self) -> Row<'_> {
        let Self { hypervisor, transport, evidence, ring, .. } = self;
        Row { hypervisor, transport, evidence, ring }
    }

    /// `hypervisor/transport × device, ring`.
    pub(crate) fn name(&self) -> String {
        format!("{}/{} × {}, {}", self.hypervisor, self.transport, self.device, self.ring)
    }
}

impl Outcome {
    /// One word.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Rejected => "rejected",
            Self::Failed => "failed",
            Self::Wedged => "wedged",
            Self::Skipped => "skipped",
        }
    }
}

impl Display for Summary {
    /// The run in one sentence.
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { cells, cells_run, passed, failed, rejected, wedged, skipped, .. } = self;
        let ran = if cells == cells_run { format!("{cells}") } else { format!("{cells_run} of {cells}") };
        write!(
            formatter,
            "{ran} {} in {:.1} s: {passed} passed, {rejected} rejected, {failed} failed, {wedged} wedged, {skipped} skipped",
            if *cells == 1 { "cell" } else { "cells" },
            self.seconds
        )?;
        match (self.images, self.images_failed) {
            (0, _) => {}
            (images, 0) => write!(formatter, "; the image came through {images} of {images}")?,
            (images, bad) => write!(formatter, "; the image came through only {} of {images}", images - bad)?,
        }
        formatter.write_str(".")
    }
}

fn distinct<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    items.fold(Vec::new(), |mut seen, item| {
        if !seen.contains(&item) {
            seen.push(item);
        }
        seen
    })
}

/// Times are told to the millisecond: more digits are noise.
fn milliseconds<S: Serializer>(seconds: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((seconds * 1000.0).round() / 1000.0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A report with every kind of cell in it.
    pub(crate) fn example() -> Report {
        let cell = |hypervisor: &str, device: &str| Cell {
            hypervisor: hypervisor.into(),
            transport: "mmio".into(),
            device: device.into(),
            ring: "split".into(),
            evidence: "real".into(),
            versions: vec!["Linux <6.1>".into()],
            passed: 1,
            failed: 0,
            rejected: 1,
            wedged: 0,
            skipped: Vec::new(),
            failures: Vec::new(),
            seconds: 0.25,
            cases: vec![case("status/reset", Outcome::Passed), case("queue/loop", Outcome::Rejected)],
            image: None,
        };
        let mut good = cell("kvm", "blk");
        good.image = Some(ImageResult { ok: true, error: None, bytes: 4 << 20, seconds: 0.5, mib_per_second: 8.0 });
        let mut bad = cell("kvm", "rng");
        (bad.failed, bad.wedged) = (1, 1);
        bad.cases.extend([case("rng/<len>", Outcome::Failed), case("rng/stuck", Outcome::Wedged)]);
        bad.failures = ["rng/<len>", "rng/stuck"]
            .into_iter()
            .zip([Outcome::Failed, Outcome::Wedged])
            .map(|(case, outcome)| Failure {
                case: case.into(),
                outcome,
                statements: vec!["N0001".into()],
                expected: "1 & one".into(),
                observed: "<2>".into(),
                reproduction: "reset\nread \"0x70\"".into(),
            })
            .collect();
        let mut packed = cell("kvm", "blk");
        packed.ring = "packed".into();
        let mut absent = cell("xen", "blk");
        (absent.passed, absent.rejected, absent.seconds) = (0, 0, 0.0);
        absent.cases = vec![case("status/reset", Outcome::Skipped)];
        absent.skipped = vec![Skipped { case: "status/reset".into(), reason: "no <xen> here".into() }];
        let image = ImageSource { file: Some("a&b.img".into()), bytes: 4 << 20, sha256: "00ff".into() };
        Report::new(vec![good, bad, packed, absent], Some(image), 1.5)
    }

    fn case(name: &str, outcome: Outcome) -> Case {
        Case {
            case: name.into(),
            about: format!("{name} holds"),
            outcome,
            statements: vec!["N0001".into(), "N0002".into()],
            seconds: 0.01,
        }
    }

    #[test]
    fn the_summary_adds_up_and_is_one_sentence() {
        let report = example();
        assert_eq!(
            report.summary.to_string(),
            "3 of 4 cells in 1.5 s: 3 passed, 3 rejected, 1 failed, 1 wedged, 1 skipped; \
             the image came through 1 of 1."
        );
        assert!(!report.summary.ok);
        let fine = Report::new(report.cells[..1].to_vec(), None, 0.5);
        assert!(fine.summary.ok);
        let row = Row { hypervisor: "kvm", transport: "mmio", evidence: "real", ring: "split" };
        assert_eq!(fine.rows(), [row]);
    }

    #[test]
    fn an_image_that_did_not_come_through_is_a_failure() {
        let mut cells = example().cells[..1].to_vec();
        cells[0].image.as_mut().unwrap().ok = false;
        assert_eq!(cells[0].verdict(), Outcome::Failed);
        assert!(!Report::new(cells, None, 0.5).summary.ok);
    }

    #[test]
    fn a_cell_says_its_worst_outcome() {
        let verdicts: Vec<_> = example().cells.iter().map(Cell::verdict).collect();
        assert_eq!(verdicts, [Outcome::Passed, Outcome::Wedged, Outcome::Passed, Outcome::Skipped]);
        assert_eq!(example().cells[3].unavailable(), Some("no <xen> here"));
    }

    #[test]
    fn json_has_the_promised_keys() {
        let json = serde_json::to_value(example()).unwrap();
        for key in [
            "hypervisor",
            "transport",
            "device",
            "ring",
            "evidence",
            "passed",
            "failed",
            "rejected",
            "wedged",
            "skipped",
            "failures",
        ] {
            assert!(json["cells"][0].get(key).is_some(), "{key}");
        }
        assert_eq!(json["cells"][3]["skipped"][0]["reason"], "no <xen> here");
        assert_eq!(json["cells"][1]["failures"][1]["outcome"], "wedged");
        assert_eq!(json["summary"]["wedged"], 1);
    }
}
