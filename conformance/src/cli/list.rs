//! `polyvirt list`.

use std::fmt::Write as _;
use std::sync::Arc;

use polyvirt_conformance::cells;
use polyvirt_conformance::suite::{Cell, Target};
use serde::Serialize;

use super::output::Output;
use super::{CliError, Format, SUCCESS};
use crate::shims;

/// What there is.
#[derive(Serialize)]
struct Listing {
    hypervisors: Vec<Hypervisor>,
    transports: Vec<&'static str>,
    devices: Vec<&'static str>,
    /// The most lines of code that a shim may have.
    shim_limit: usize,
    /// Lines of code that shims share.
    shared_lines: usize,
}

#[derive(Serialize)]
struct Hypervisor {
    name: &'static str,
    /// Whether its cells can be run on this host.
    available: bool,
    /// Why not.
    reason: Option<String>,
    /// What its results are worth.
    evidence: String,
    /// Whether it is run without being asked for by name.
    by_default: bool,
    transports: Vec<&'static str>,
    devices: Vec<&'static str>,
    /// Formats of rings.
    rings: Vec<&'static str>,
    /// Lines of code of the shim.
    shim_lines: usize,
    /// Lines of code of each part below the shim.
    below: Vec<Part>,
}

#[derive(Serialize)]
struct Part {
    part: &'static str,
    lines: usize,
}

/// Tells what there is.
pub(super) fn run(format: Format, output: &mut Output) -> Result<u8, CliError> {
    let listing = listing();
    match format {
        Format::Json => output.json(&listing)?,
        Format::Text => output.text(&text(&listing))?,
    }
    Ok(SUCCESS)
}

/// Each name that `name` finds in the cells of `targets`, once, in their order.
pub(super) fn names(targets: &[Arc<dyn Target>], name: fn(Cell) -> &'static str) -> Vec<&'static str> {
    let mut names = Vec::new();
    for target in targets {
        let name = name(target.cell());
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn listing() -> Listing {
    let mut targets = cells::cells();
    let by_default = names(&targets, |cell| cell.hypervisor);
    targets.extend(cells::models());
    let hypervisors = names(&targets, |cell| cell.hypervisor)
        .into_iter()
        .map(|name| {
            let own: Vec<_> = targets.iter().filter(|target| target.cell().hypervisor == name).cloned().collect();
            hypervisor(name, &own, by_default.contains(&name))
        })
        .collect();
    Listing {
        hypervisors,
        transports: names(&targets, |cell| cell.transport),
        devices: names(&targets, |cell| cell.device),
        shim_limit: shims::LIMIT,
        shared_lines: shims::shared(),
    }
}

fn hypervisor(name: &'static str, targets: &[Arc<dyn Target>], by_default: bool) -> Hypervisor {
    let reason = targets.first().and_then(|target| target.available().err());
    let shim = shims::find(name);
    Hypervisor {
        name,
        available: reason.is_none(),
        reason,
        evidence: targets.first().map(|target| target.cell().evidence.to_string()).unwrap_or_default(),
        by_default,
        transports: names(targets, |cell| cell.transport),
        devices: names(targets, |cell| cell.device),
        rings: names(targets, |cell| cell.ring.name()),
        shim_lines: shim.map_or(0, shims::Shim::lines),
        below: shim
            .map_or_else(Vec::new, shims::Shim::below)
            .into_iter()
            .map(|(part, lines)| Part { part, lines })
            .collect(),
    }
}

fn text(listing: &Listing) -> String {
    let row = |hypervisor: &Hypervisor| {
        let below: Vec<_> = hypervisor.below.iter().map(|part| format!("{} {}", part.part, part.lines)).collect();
        [
            hypervisor.name.to_owned(),
            hypervisor.evidence.clone(),
            hypervisor.transports.join(", "),
            hypervisor.rings.join(", "),
            hypervisor.shim_lines.to_string(),
            below.join(", "),
        ]
    };
    let head = ["hypervisor", "evidence", "transports", "rings", "shim", "below it"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(head).chain(listing.hypervisors.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let [first, second, third, fourth, fifth] = [0, 1, 2, 3, 4].map(width);
    let mut lines = rows.iter().map(|[name, evidence, transports, rings, shim, below]| {
        let line =
            format!("{name:first$}  {evidence:second$}  {transports:third$}  {rings:fourth$}  {shim:>fifth$}  {below}");
        format!("{}\n", line.trim_end())
    });
    let mut out = lines.next().unwrap_or_default();
    for (hypervisor, line) in listing.hypervisors.iter().zip(lines) {
        out.push_str(&line);
        if let Some(reason) = &hypervisor.reason {
            _ = writeln!(out, "            not here: {reason}");
        }
        if !hypervisor.by_default {
            out.push_str("            only when asked for: --hypervisor ");
            out.push_str(hypervisor.name);
            out.push('\n');
        }
    }
    _ = write!(
        out,
        "\nShims are counted in lines of code; at most {} are allowed. What they share: {} lines.\n\
         Transports: {}.\nDevices: {}.\n",
        listing.shim_limit,
        listing.shared_lines,
        listing.transports.join(", "),
        listing.devices.join(", "),
    );
    out
}
