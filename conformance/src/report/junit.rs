//! The report as JUnit XML, which CI systems read.

use std::fmt::Write as _;

use super::escape::Escaped;
use super::{Cell, Outcome, Report};

/// The report as `testsuites`: a suite for each cell, a test case for each case, one more for the image.
pub(crate) fn junit(report: &Report) -> String {
    let summary = &report.summary;
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    _ = writeln!(
        out,
        "<testsuites name=\"polyvirt\" tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\" time=\"{:.3}\">",
        summary.passed + summary.rejected + summary.failed + summary.wedged + summary.skipped + summary.images,
        summary.failed + summary.images_failed,
        summary.wedged,
        summary.skipped,
        summary.seconds,
    );
    for cell in &report.cells {
        suite(&mut out, cell);
    }
    out.push_str("</testsuites>\n");
    out
}

fn suite(out: &mut String, cell: &Cell) {
    let class = format!("{}.{}.{}.{}", cell.hypervisor, cell.transport, cell.device, cell.ring);
    let image_failed = cell.image.as_ref().is_some_and(|image| !image.ok);
    _ = writeln!(
        out,
        "  <testsuite name=\"{}\" tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\" time=\"{:.3}\">\n    \
         <properties><property name=\"evidence\" value=\"{}\"/></properties>",
        Escaped(&class),
        cell.cases.len() + usize::from(cell.image.is_some()),
        cell.failed + usize::from(image_failed),
        cell.wedged,
        cell.skipped.len(),
        cell.seconds,
        Escaped(&cell.evidence),
    );
    for case in &cell.cases {
        _ = write!(
            out,
            "    <testcase classname=\"{}\" name=\"{}\" time=\"{:.3}\">",
            Escaped(&class),
            Escaped(&case.case),
            case.seconds
        );
        match case.outcome {
            Outcome::Passed => {}
            Outcome::Rejected => out.push_str("<system-out>rejected: refused, the device still alive</system-out>"),
            Outcome::Skipped => {
                let reason = cell.skipped.iter().find(|skipped| skipped.case == case.case);
                let reason = reason.map_or("", |skipped| &skipped.reason);
                _ = write!(out, "<skipped message=\"{}\"/>", Escaped(reason));
            }
            Outcome::Failed | Outcome::Wedged => {
                let element = if case.outcome == Outcome::Failed { "failure" } else { "error" };
                let failure = cell.failures.iter().find(|failure| failure.case == case.case);
                let (message, steps) = failure.map_or((String::new(), ""), |failure| {
                    (format!("expected {}; observed {}", failure.expected, failure.observed), &failure.reproduction)
                });
                _ = write!(
                    out,
                    "<{element} type=\"{}\" message=\"{}\">judges {}\n{}</{element}>",
                    case.outcome.word(),
                    Escaped(message),
                    Escaped(case.statements.join(", ")),
                    Escaped(steps),
                );
            }
        }
        out.push_str("</testcase>\n");
    }
    if let Some(image) = &cell.image {
        _ = write!(
            out,
            "    <testcase classname=\"{}\" name=\"image\" time=\"{:.3}\">",
            Escaped(&class),
            image.seconds
        );
        if let Some(error) = &image.error {
            _ = write!(out, "<failure type=\"failed\" message=\"{}\"/>", Escaped(error));
        }
        out.push_str("</testcase>\n");
    }
    out.push_str("  </testsuite>\n");
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    #[test]
    fn every_case_is_a_test_case_with_its_outcome() {
        let xml = junit(&example());
        assert!(xml.contains("<testsuites name=\"polyvirt\" tests=\"10\" failures=\"1\" errors=\"1\" skipped=\"1\""));
        assert_eq!(xml.matches("<testcase ").count(), 10);
        assert_eq!(xml.matches("</testcase>").count(), 10);
        assert!(xml.contains("<skipped message=\"no &lt;xen&gt; here\"/>"));
        assert!(
            xml.contains("<failure type=\"failed\" message=\"expected 1 &amp; one; observed &lt;2&gt;\">judges N0001")
        );
        assert!(xml.contains("read &quot;0x70&quot;</error>"));
        assert!(xml.contains("name=\"image\" time=\"0.500\"></testcase>"));
    }

    #[test]
    fn nothing_of_a_name_is_markup() {
        let xml = junit(&example());
        assert!(xml.contains("name=\"rng/&lt;len&gt;\"") && !xml.contains("<len>"));
    }
}
