//! `polyvirt ledger`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use polyvirt_conformance::cases;
use serde::Serialize;

use super::output::Output;
use super::{CliError, Format, SUCCESS};

/// Normative statements of VIRTIO 1.4, N0001 to N1595.
const CATALOGUE: usize = 1595;

/// The statements that cases judge.
#[derive(Serialize)]
struct Ledger {
    statements: Vec<Statement>,
    /// How many statements cases judge.
    judged: usize,
    /// How many there are.
    catalogue: usize,
}

#[derive(Serialize)]
struct Statement {
    id: &'static str,
    /// The cases that judge it.
    cases: Vec<&'static str>,
}

/// Tells which statements are judged by what.
pub(super) fn run(format: Format, output: &mut Output) -> Result<u8, CliError> {
    let ledger = ledger();
    match format {
        Format::Json => output.json(&ledger)?,
        Format::Text => output.text(&text(&ledger))?,
    }
    Ok(SUCCESS)
}

fn ledger() -> Ledger {
    let mut judged = BTreeMap::<_, Vec<_>>::new();
    for case in cases::all() {
        for id in case.all_statements() {
            judged.entry(id).or_default().push(case.name);
        }
    }
    let statements: Vec<_> = judged.into_iter().map(|(id, cases)| Statement { id, cases }).collect();
    Ledger { judged: statements.len(), catalogue: CATALOGUE, statements }
}

fn text(ledger: &Ledger) -> String {
    let mut out = String::new();
    for statement in &ledger.statements {
        _ = writeln!(out, "{}  {}", statement.id, statement.cases.join(", "));
    }
    _ = writeln!(out, "\n{} of {} statements are judged.", ledger.judged, ledger.catalogue);
    out
}
