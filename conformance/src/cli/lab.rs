//! `polyvirt lab`.

use std::fmt::Write as _;
use std::time::Instant;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::check::{Page, end_cleanly, tell};
use super::output::Output;
use super::progress::Progress;
use super::select::Selection;
use super::{CheckFormat, CliError, FAILURE, Format, SUCCESS, TellArgs};
use crate::lab::{self, Cache, Fetched, Guest, LabError, Step};
use crate::report::{Cell, Report};

#[derive(Subcommand)]
pub(super) enum LabCommand {
    /// Fetch what guests are put together from, with apt; nothing is installed, no root is needed
    Setup {
        /// The guests; without a name, all of them
        #[arg(value_name = "NAME")]
        guests: Vec<String>,
        /// How to tell what became of it
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Boot guests, whose own drivers then use our devices
    Run(RunArgs),
}

#[derive(Args)]
pub(super) struct RunArgs {
    /// The guests; without a name, all of them
    #[arg(value_name = "NAME")]
    guests: Vec<String>,
    /// A guest that cannot be booted here has failed; otherwise it is skipped
    #[arg(long)]
    require: bool,
    #[command(flatten)]
    tell: TellArgs,
}

impl From<LabError> for CliError {
    fn from(error: LabError) -> Self {
        Self::Mistake(error.to_string())
    }
}

/// Does what `command` says, tells what came of it, and returns the exit code.
pub(super) fn run(command: &LabCommand, output: &mut Output) -> Result<u8, CliError> {
    end_cleanly()?;
    match command {
        LabCommand::Setup { guests, format } => setup(&select(guests)?, *format, output),
        LabCommand::Run(args) => boot(&select(&args.guests)?, args.require, &args.tell, output),
    }
}

/// The guests that were asked for, in the order of the lab.
fn select(asked: &[String]) -> Result<Vec<&'static Guest>, CliError> {
    let mut names: Vec<_> = lab::guests().iter().map(|guest| guest.name).collect();
    // A name may stand for several.
    names.dedup();
    let selection = Selection::new("guest", asked, &names)?;
    Ok(lab::guests().iter().filter(|guest| selection.has(guest.name)).collect())
}

/// Boots all guests; their cells.
pub(super) fn cells(quiet: bool) -> Result<Vec<Cell>, CliError> {
    cells_of(&select(&[])?, false, quiet)
}

fn cells_of(guests: &[&'static Guest], required: bool, quiet: bool) -> Result<Vec<Cell>, CliError> {
    let cache = Cache::of_the_user()?;
    let progress = Progress::new(guests.len(), quiet);
    let cells = lab::run(&cache, guests, required, &mut |step| match step {
        Step::At(what) => progress.at(what),
        Step::Done => progress.step(),
    });
    progress.finish();
    Ok(cells)
}

fn boot(guests: &[&'static Guest], required: bool, args: &TellArgs, output: &mut Output) -> Result<u8, CliError> {
    let begun = Instant::now();
    let page = args.report.as_deref().map(Page::create).transpose()?;
    let cells = cells_of(guests, required, args.quiet)?;
    if args.format == CheckFormat::Text && !args.quiet {
        output.text(&versions(guests, &cells))?;
    }
    tell(&Report::new(cells, None, begun.elapsed().as_secs_f64()), args, page, output)
}

/// A line for each guest: what it is, and what ran.
fn versions(guests: &[&'static Guest], cells: &[Cell]) -> String {
    let width = guests.iter().map(|guest| guest.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for guest in guests {
        let cell = cells.iter().find(|cell| cell.hypervisor == guest.name && !cell.versions.is_empty());
        let ran = cell.map_or_else(|| "not booted".to_owned(), |cell| cell.versions.join(", "));
        _ = writeln!(out, "{:width$}  {ran}: {}", guest.name, guest.about);
    }
    out.push('\n');
    out
}

fn setup(guests: &[&'static Guest], format: Format, output: &mut Output) -> Result<u8, CliError> {
    let cache = Cache::of_the_user()?;
    let progress = Progress::new(0, false);
    let parts = lab::setup(&cache, guests, &mut |part| progress.at(format!("fetching {part}")))?;
    progress.finish();
    match format {
        Format::Json => output.json(&Parts { parts: parts.iter().map(Told::from).collect() })?,
        Format::Text => output.text(&parts.iter().map(line).collect::<String>())?,
    }
    Ok(if parts.iter().all(|part| part.outcome.is_ok()) { SUCCESS } else { FAILURE })
}

#[derive(Serialize)]
struct Parts {
    parts: Vec<Told>,
}

/// What became of one part.
#[derive(Serialize)]
struct Told {
    part: String,
    guests: Vec<&'static str>,
    /// It is there now.
    ok: bool,
    /// Why it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl From<&Fetched> for Told {
    fn from(fetched: &Fetched) -> Self {
        Self {
            part: fetched.part.clone(),
            guests: fetched.guests.clone(),
            ok: fetched.outcome.is_ok(),
            reason: fetched.outcome.as_ref().err().map(ToString::to_string),
        }
    }
}

fn line(fetched: &Fetched) -> String {
    let Fetched { part, guests, outcome } = fetched;
    let guests = guests.join(", ");
    match outcome {
        Ok(true) => format!("there     {part} ({guests})\n"),
        Ok(false) => format!("fetched   {part} ({guests})\n"),
        Err(error) => format!("missing   {part} ({guests}): {error}\n"),
    }
}
