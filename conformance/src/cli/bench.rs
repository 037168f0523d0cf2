//! `polyvirt bench`.

use std::fmt::Write as _;

use polyvirt_conformance::bench::{Effort, Row, rings};
use serde::Serialize;

use super::output::Output;
use super::{CliError, Format, SUCCESS};

/// The comparisons.
#[derive(Serialize)]
struct Rows {
    rows: Vec<Row>,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub(super) enum What {
    /// The rings, in both roles and formats
    #[default]
    Rings,
}

/// Measures the rows whose name contains `rows`, and tells the comparisons.
pub(super) fn run(what: What, rows: &str, format: Format, output: &mut Output) -> Result<u8, CliError> {
    let rows = match what {
        What::Rings => rings::run(Effort::default(), rows, |name| tracing::info!(name, "measuring")),
    };
    match format {
        Format::Json => output.json(&Rows { rows })?,
        Format::Text => output.text(&text(&rows))?,
    }
    Ok(SUCCESS)
}

fn text(rows: &[Row]) -> String {
    let mut out = String::from("ratio  ours      theirs    what\n");
    for row in rows {
        _ = writeln!(
            out,
            "{:>5.2}  {:>7.2}M  {:>7.2}M  {} ({}, against {})",
            row.ratio,
            row.ours / 1e6,
            row.peer / 1e6,
            row.name,
            row.unit,
            row.peer_version,
        );
    }
    out.push_str("\nA ratio above 1 means that polyvirt is better.\n");
    out
}
