//! What is known of someone else's implementation: which cases it fails, and why.

use std::collections::BTreeMap;

use crate::suite::{CellResult, Failure, Outcome, Skipped};

/// The known deviations of one implementation.
///
/// A text file: `peer:`, `version:` (one, or several with ` and ` between them) and `device:`, then a line
/// `case: reason` for each deviation; `#` begins a comment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expectations {
    /// Who deviates.
    pub peer: String,
    /// The versions that were seen to.
    pub version: String,
    /// The device, by its name here.
    pub device: String,
    /// The reason, by the case; one that begins with `sometimes: ` is of a race, which the case does not always meet.
    pub cases: BTreeMap<String, String>,
}

/// How the reason of a deviation begins that does not always show.
pub(super) const SOMETIMES: &str = "sometimes: ";

/// A line that says nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExpectationError {
    /// Neither a comment nor `name: value`.
    #[error("line {line}: expected 'case: reason', got '{text}'")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What it says.
        text: String,
    },
    /// There is no such case.
    #[error("line {line}: there is no case '{case}'")]
    NoCase {
        /// Its number, from 1.
        line: usize,
        /// What it says.
        case: String,
    },
    /// A field is missing.
    #[error("a line '{0}: …' is missing")]
    Missing(&'static str),
}

macro_rules! known {
    ($($name:literal),* $(,)?) => {
        /// The implementations whose deviations come with the program: name and text.
        const KNOWN: &[(&str, &str)] = &[$(($name, include_str!(concat!("../../expectations/", $name)))),*];
    };
}
known!("qemu-storage-daemon-blk", "vhost-device-rng");

impl Expectations {
    /// The names of those that come with the program.
    pub fn names() -> Vec<&'static str> {
        KNOWN.iter().map(|(name, _)| *name).collect()
    }

    /// The text of the one of this name, if it comes with the program.
    pub fn text(name: &str) -> Option<&'static str> {
        KNOWN.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
    }

    /// What `text` says about `cases`.
    pub fn parse(text: &str, cases: &[crate::suite::Case]) -> Result<Self, ExpectationError> {
        let mut fields = BTreeMap::new();
        let mut deviations = BTreeMap::new();
        for (number, line) in text.lines().enumerate() {
            let (line, number) = (line.trim(), number + 1);
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let error = || ExpectationError::Line { line: number, text: line.into() };
            let (name, value) = line.split_once(": ").ok_or_else(error)?;
            if let Some(field) = ["peer", "version", "device"].into_iter().find(|field| *field == name) {
                fields.insert(field, value.trim().to_owned());
            } else if cases.iter().any(|case| case.name == name) {
                deviations.insert(name.to_owned(), value.trim().to_owned());
            } else {
                return Err(ExpectationError::NoCase { line: number, case: name.into() });
            }
        }
        let mut field = |name| fields.remove(name).ok_or(ExpectationError::Missing(name));
        Ok(Self { peer: field("peer")?, version: field("version")?, device: field("device")?, cases: deviations })
    }

    /// Turns failures that are known into skipped cases with their reason, and known deviations that did not show into
    /// failures: either way a change shows.
    pub fn apply(&self, result: &mut CellResult) {
        for done in &mut result.cases {
            let Some(reason) = self.cases.get(done.case) else { continue };
            let known = format!("known of {} {}: {reason}", self.peer, self.version);
            match &done.outcome {
                Outcome::Failed { .. } | Outcome::Wedged => {
                    let wedged = done.outcome == Outcome::Wedged;
                    *(if wedged { &mut result.wedged } else { &mut result.failed }) -= 1;
                    result.failures.retain(|failure| failure.case != done.case);
                    result.skipped.push(Skipped { case: done.case, reason: known.clone() });
                    done.outcome = Outcome::Skipped { reason: known };
                }
                Outcome::Passed | Outcome::Rejected if reason.starts_with(SOMETIMES) => {}
                Outcome::Passed | Outcome::Rejected => {
                    let passed = done.outcome == Outcome::Passed;
                    *(if passed { &mut result.passed } else { &mut result.rejected }) -= 1;
                    result.failed += 1;
                    let (expected, observed) = (known, String::from("it does not deviate any more"));
                    result.failures.push(Failure {
                        case: done.case,
                        statements: done.statements,
                        wedged: false,
                        expected: expected.clone(),
                        observed: observed.clone(),
                        reproduction: String::new(),
                    });
                    done.outcome = Outcome::Failed { expected, observed, reproduction: String::new() };
                }
                // It could not be looked at.
                Outcome::Skipped { .. } => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;
    use crate::suite::{CaseResult, Cell, Evidence, RingFormat};
    use std::time::Duration;

    fn expectations(line: &str) -> Result<Expectations, ExpectationError> {
        let text = format!("# seen\npeer: toy\nversion: 1\ndevice: rng\n\n{line}\n");
        Expectations::parse(&text, &cases::of_daemons())
    }

    fn result(case: &'static str, outcome: Outcome) -> CellResult {
        let cell = Cell {
            hypervisor: "daemon",
            transport: "vhost-user",
            device: "rng",
            device_type: 4,
            legacy: false,
            ring: RingFormat::Split,
            evidence: Evidence::Real,
        };
        let count = |is: bool| usize::from(is);
        let failed = matches!(outcome, Outcome::Failed { .. });
        let failure = Failure {
            case,
            statements: &[],
            wedged: false,
            expected: String::new(),
            observed: String::new(),
            reproduction: String::new(),
        };
        CellResult {
            cell,
            passed: count(outcome == Outcome::Passed),
            failed: count(failed),
            rejected: 0,
            wedged: 0,
            skipped: Vec::new(),
            failures: if failed { vec![failure] } else { Vec::new() },
            cases: vec![CaseResult { case, statements: &[], outcome, time: Duration::ZERO }],
            time: Duration::ZERO,
        }
    }

    #[test]
    fn a_known_failure_is_not_counted_and_tells_its_reason() {
        let case = cases::of_daemons()[0].name;
        let failed = Outcome::Failed { expected: String::new(), observed: String::new(), reproduction: String::new() };
        let mut result = result(case, failed);
        expectations(&format!("{case}: it never did")).unwrap().apply(&mut result);
        assert_eq!((result.failed, result.failures.len(), result.skipped.len()), (0, 0, 1));
        assert_eq!(result.skipped[0].reason, "known of toy 1: it never did");
    }

    #[test]
    fn a_known_failure_that_passes_is_a_failure() {
        let case = cases::of_daemons()[0].name;
        let mut result = result(case, Outcome::Passed);
        expectations(&format!("{case}: it never did")).unwrap().apply(&mut result);
        assert_eq!((result.passed, result.failed, result.failures.len()), (0, 1, 1));
    }

    #[test]
    fn a_race_that_is_known_may_pass_and_may_fail() {
        let case = cases::of_daemons()[0].name;
        let known = expectations(&format!("{case}: sometimes: it is late")).unwrap();
        let failed = Outcome::Failed { expected: String::new(), observed: String::new(), reproduction: String::new() };
        let (mut passes, mut fails) = (result(case, Outcome::Passed), result(case, failed));
        known.apply(&mut passes);
        known.apply(&mut fails);
        assert_eq!((passes.passed, passes.failed), (1, 0));
        assert_eq!((fails.failed, fails.skipped.len()), (0, 1));
    }

    #[test]
    fn what_names_no_case_is_refused() {
        assert!(matches!(expectations("no/such: x"), Err(ExpectationError::NoCase { line: 6, .. })));
        assert!(matches!(expectations("words"), Err(ExpectationError::Line { line: 6, .. })));
        assert_eq!(Expectations::parse("peer: x\n", &[]), Err(ExpectationError::Missing("version")));
    }

    #[test]
    fn those_that_come_with_the_program_are_well_formed() {
        for (name, text) in KNOWN {
            let parsed = Expectations::parse(text, &cases::of_daemons());
            assert!(parsed.is_ok_and(|known| ["blk", "rng", "console"].contains(&&*known.device)), "{name}");
        }
    }
}
