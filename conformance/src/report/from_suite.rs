//! What the suite found, as a report tells it.

use polyvirt_conformance::suite::{self, CaseResult, CellResult};

use super::{Case, Cell, Failure, Outcome, Skipped};

impl Cell {
    /// The report of one cell, with what its `cases` are about.
    pub(crate) fn new(result: &CellResult, cases: &[suite::Case]) -> Self {
        let about = |name| cases.iter().find(|case| case.name == name).map_or("", |case| case.about);
        Self {
            hypervisor: result.cell.hypervisor.into(),
            transport: result.cell.transport.into(),
            device: result.cell.device.into(),
            ring: result.cell.ring.to_string(),
            evidence: result.cell.evidence.to_string(),
            versions: Vec::new(),
            passed: result.passed,
            failed: result.failed,
            rejected: result.rejected,
            wedged: result.wedged,
            skipped: result
                .skipped
                .iter()
                .map(|skipped| Skipped { case: skipped.case.into(), reason: skipped.reason.clone() })
                .collect(),
            failures: result.failures.iter().map(failure).collect(),
            seconds: result.time.as_secs_f64(),
            cases: result.cases.iter().map(|case| told(case, about(case.case))).collect(),
            image: None,
        }
    }
}

fn failure(failure: &suite::Failure) -> Failure {
    Failure {
        case: failure.case.into(),
        outcome: if failure.wedged { Outcome::Wedged } else { Outcome::Failed },
        statements: owned(failure.statements),
        expected: failure.expected.clone(),
        observed: failure.observed.clone(),
        reproduction: failure.reproduction.clone(),
    }
}

fn told(result: &CaseResult, about: &str) -> Case {
    Case {
        case: result.case.into(),
        about: about.into(),
        outcome: match result.outcome {
            suite::Outcome::Passed => Outcome::Passed,
            suite::Outcome::Failed { .. } => Outcome::Failed,
            suite::Outcome::Rejected => Outcome::Rejected,
            suite::Outcome::Wedged => Outcome::Wedged,
            suite::Outcome::Skipped { .. } => Outcome::Skipped,
        },
        statements: owned(result.statements),
        seconds: result.time.as_secs_f64(),
    }
}

fn owned(ids: &[&str]) -> Vec<String> {
    ids.iter().map(|&id| id.to_owned()).collect()
}
