//! The matrix and the failures as plain text.

use std::fmt::Write as _;

use super::{Cell, Outcome, Report, Row};

/// How text is set: with colours or without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// ANSI colours, for a terminal.
    Coloured,
    /// No escape sequences.
    Plain,
}

/// Width of the column with a device's results.
const COLUMN: usize = 18;

impl Style {
    /// `text`, padded to `width`, in the colour of `outcome`.
    fn paint(self, outcome: Outcome, text: &str, width: usize) -> String {
        let code = match outcome {
            Outcome::Passed => "32",
            Outcome::Rejected => "36",
            Outcome::Failed => "1;31",
            Outcome::Wedged => "1;35",
            Outcome::Skipped => "2",
        };
        self.wrap(code, text, width)
    }

    fn bold(self, text: &str, width: usize) -> String {
        self.wrap("1", text, width)
    }

    fn faint(self, text: &str, width: usize) -> String {
        self.wrap("2", text, width)
    }

    fn wrap(self, code: &str, text: &str, width: usize) -> String {
        let padding = " ".repeat(width.saturating_sub(text.chars().count()));
        match self {
            Self::Plain => format!("{text}{padding}"),
            Self::Coloured => format!("\x1b[{code}m{text}\x1b[0m{padding}"),
        }
    }
}

/// Width of the column with the ring's format.
const RING: usize = 8;

/// The matrix: rows for each hypervisor and transport, one for each format of rings, a column for each device; then the
/// image, and why anything was not run.
pub(crate) fn matrix(report: &Report, style: Style) -> String {
    let (rows, columns) = (report.rows(), report.columns());
    let width =
        |heading: &str, of: &dyn Fn(&Row<'_>) -> usize| rows.iter().map(of).max().unwrap_or(0).max(heading.len()) + 2;
    let label = width("hypervisor", &|row| row.hypervisor.len() + row.transport.len() + 1);
    let evidence = width("evidence", &|row| row.evidence.len());
    let headings = [("hypervisor", label), ("evidence", evidence), ("ring", RING)];
    let mut out: String = headings.into_iter().map(|(heading, width)| style.faint(heading, width)).collect();
    for device in &columns {
        out += &style.bold(device, COLUMN);
    }
    end_line(&mut out);
    let mut before = None;
    for &row in &rows {
        let first = !before.replace(row).is_some_and(|before| row.goes_with(before));
        if first {
            out.push('\n');
        }
        let cells: Vec<Vec<String>> = columns
            .iter()
            .map(|device| report.cell(row, device).map_or_else(Vec::new, |cell| told(cell, style)))
            .collect();
        for line in 0..cells.iter().map(Vec::len).max().unwrap_or(0) {
            match line {
                0 if first => {
                    out += &style.bold(&format!("{}/{}", row.hypervisor, row.transport), label);
                    out += &style.faint(row.evidence, evidence);
                }
                _ => out += &" ".repeat(label + evidence),
            }
            match line {
                0 => out += &style.faint(row.ring, RING),
                _ => out += &" ".repeat(RING),
            }
            for cell in &cells {
                match cell.get(line) {
                    Some(text) => out += text,
                    None => out += &" ".repeat(COLUMN),
                }
            }
            end_line(&mut out);
        }
    }
    out += &images(report, style);
    out += &skipped(report);
    out
}

/// A cell's lines in the matrix, each as wide as the column.
fn told(cell: &Cell, style: Style) -> Vec<String> {
    let verdict = cell.verdict();
    let word = match verdict {
        Outcome::Passed | Outcome::Rejected => "ok",
        Outcome::Failed => "FAILED",
        Outcome::Wedged => "WEDGED",
        Outcome::Skipped => "not run",
    };
    let mut lines = vec![match verdict {
        Outcome::Skipped => style.paint(verdict, word, COLUMN),
        _ => {
            let time = format!("{:.2} s", cell.seconds);
            style.paint(verdict, word, 8) + &style.faint(&time, COLUMN - 8)
        }
    }];
    for (outcome, count) in cell.counts() {
        if count > 0 {
            lines.push(style.paint(outcome, &format!("{count:>4} {}", outcome.word()), COLUMN));
        }
    }
    if cell.image.as_ref().is_some_and(|image| !image.ok) {
        lines.push(style.paint(Outcome::Failed, "     image damaged", COLUMN));
    }
    lines
}

/// What became of the image, a line for each cell.
fn images(report: &Report, style: Style) -> String {
    let Some(source) = &report.image else { return String::new() };
    let mut out = format!(
        "\nimage: {}, {:.1} MiB, SHA-256 {}…\n",
        source.file.as_deref().unwrap_or("generated"),
        mebibytes(source.bytes),
        source.sha256.get(..16).unwrap_or(&source.sha256)
    );
    let name = report
        .cells
        .iter()
        .filter(|cell| cell.image.is_some())
        .map(|cell| cell.name().chars().count())
        .max()
        .unwrap_or(0);
    for cell in &report.cells {
        let Some(image) = &cell.image else { continue };
        let (outcome, word) = if image.ok { (Outcome::Passed, "ok") } else { (Outcome::Failed, "FAILED") };
        let told = image.error.clone().unwrap_or_else(|| {
            format!("{:.1} MiB in {:.2} s, {:.0} MiB/s", mebibytes(image.bytes), image.seconds, image.mib_per_second)
        });
        _ = writeln!(out, "  {:name$}  {}{told}", cell.name(), style.paint(outcome, word, 8));
    }
    out
}

/// Why cases were not run: each reason once.
fn skipped(report: &Report) -> String {
    let mut reasons: Vec<(&str, usize, Vec<String>)> = Vec::new();
    for cell in &report.cells {
        for skipped in &cell.skipped {
            let at = reasons.iter().position(|(reason, ..)| *reason == skipped.reason).unwrap_or_else(|| {
                reasons.push((&skipped.reason, 0, Vec::new()));
                reasons.len() - 1
            });
            let (_, count, rows) = &mut reasons[at];
            *count += 1;
            let row = format!("{}/{}", cell.hypervisor, cell.transport);
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
    }
    let mut out = String::new();
    if !reasons.is_empty() {
        out.push_str("\nskipped:\n");
    }
    for (reason, count, rows) in reasons {
        _ = writeln!(out, "  {count:>4} on {}: {reason}", rows.join(", "));
    }
    out
}

/// Every failure with its reproduction; empty if there is none.
pub(crate) fn failures(report: &Report, style: Style) -> String {
    let mut out = String::new();
    for cell in &report.cells {
        for failure in &cell.failures {
            let judges = match failure.statements.join(", ") {
                none if none.is_empty() => none,
                statements => format!(" (judges {statements})"),
            };
            _ = writeln!(
                out,
                "{} {} on {}{judges}\n  expected: {}\n  observed: {}",
                style.paint(failure.outcome, &failure.outcome.word().to_uppercase(), 0),
                failure.case,
                cell.name(),
                failure.expected.replace('\n', "\n    "),
                failure.observed.replace('\n', "\n    "),
            );
            if !failure.reproduction.is_empty() {
                _ = writeln!(out, "  reproduction:\n    {}", failure.reproduction.trim_end().replace('\n', "\n    "));
            }
            out.push('\n');
        }
    }
    out
}

fn end_line(out: &mut String) {
    out.truncate(out.trim_end_matches(' ').len());
    out.push('\n');
}

pub(crate) fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    #[test]
    fn the_matrix_is_readable_without_colours() {
        let expected = "\
hypervisor  evidence  ring    blk               rng

kvm/mmio    real      split   ok      0.25 s    WEDGED  0.25 s
                                 1 passed          1 passed
                                 1 rejected        1 rejected
                                                   1 failed
                                                   1 wedged
                      packed  ok      0.25 s
                                 1 passed
                                 1 rejected

xen/mmio    real      split   not run
                                 1 skipped

image: a&b.img, 4.0 MiB, SHA-256 00ff…
  kvm/mmio × blk, split  ok      4.0 MiB in 0.50 s, 8 MiB/s

skipped:
     1 on xen/mmio: no <xen> here
";
        assert_eq!(matrix(&example(), Style::Plain), expected);
    }

    #[test]
    fn a_damaged_image_shows_in_the_matrix_and_below_it() {
        let mut cells = example().cells;
        let image = cells[0].image.as_mut().unwrap();
        (image.ok, image.error) = (false, Some("flush refused".into()));
        let text = matrix(&Report::new(cells, example().image, 1.0), Style::Plain);
        assert!(
            text.contains("kvm/mmio    real      split   FAILED  0.25 s") && text.contains(" image damaged"),
            "{text}"
        );
        assert!(text.contains("kvm/mmio × blk, split  FAILED  flush refused"), "{text}");
    }

    #[test]
    fn colours_change_nothing_but_escape_sequences() {
        let coloured = matrix(&example(), Style::Coloured);
        assert!(coloured.contains("\x1b[32mok\x1b[0m"));
        let mut stripped = String::new();
        for (at, piece) in coloured.split('\x1b').enumerate() {
            stripped += if at == 0 { piece } else { piece.split_once('m').unwrap().1 };
        }
        let trimmed: Vec<_> = stripped.lines().map(str::trim_end).collect();
        assert_eq!(trimmed.join("\n") + "\n", matrix(&example(), Style::Plain));
    }

    #[test]
    fn a_failure_comes_with_its_reproduction() {
        let text = failures(&example(), Style::Plain);
        assert!(text.starts_with(
            "FAILED rng/<len> on kvm/mmio × rng, split (judges N0001)\n  expected: 1 & one\n  observed: <2>\n  reproduction:\n    reset\n    read \"0x70\"\n"
        ), "{text}");
        assert!(text.contains("WEDGED rng/stuck"));
    }
}
