//! The report as one HTML page that needs nothing beside itself: no script, no font, no network.

use std::fmt::Write as _;

use super::escape::Escaped;
use super::text::mebibytes;
use super::{Case, Cell, Facts, Failure, Outcome, Report, Row};
use crate::shims::{self, Shim};

const STYLE: &str = include_str!("style.css");

/// The page.
pub(crate) fn html(report: &Report, facts: &Facts) -> String {
    let mut out = String::new();
    _ = write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>polyvirt: {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n",
        Escaped(headline(report))
    );
    header(&mut out, report);
    out.push_str("<main>\n");
    matrix(&mut out, report);
    failures(&mut out, report);
    image(&mut out, report);
    cells(&mut out, report);
    sizes(&mut out);
    host(&mut out, facts);
    out.push_str("</main>\n<footer>Written by <code>polyvirt check --report</code>.</footer>\n</body>\n</html>\n");
    out
}

fn headline(report: &Report) -> String {
    let summary = &report.summary;
    let said = |count: usize, word: &str| if count == 0 { None } else { Some(format!("{count} {word}")) };
    let bad: Vec<_> = [
        said(summary.failed, "failed"),
        said(summary.wedged, "wedged"),
        said(summary.images_failed, if summary.images_failed == 1 { "image damaged" } else { "images damaged" }),
    ]
    .into_iter()
    .flatten()
    .collect();
    match () {
        () if !bad.is_empty() => bad.join(", "),
        () if summary.cells_run == 0 => "Nothing was run".to_owned(),
        () => "Nothing failed, nothing wedged".to_owned(),
    }
}

fn header(out: &mut String, report: &Report) {
    let summary = &report.summary;
    _ = write!(
        out,
        "<header>\n<p class=\"name\"><b>polyvirt</b> – one virtio core, every hypervisor</p>\n\
         <h1{}>{}</h1>\n<p class=\"lead\">{} of {} {} run in {:.1} s.</p>\n<ul class=\"totals\">\n",
        if summary.ok { "" } else { " class=\"failed\"" },
        Escaped(headline(report)),
        summary.cells_run,
        summary.cells,
        if summary.cells == 1 { "cell" } else { "cells" },
        summary.seconds,
    );
    for (outcome, count) in [
        (Outcome::Passed, summary.passed),
        (Outcome::Rejected, summary.rejected),
        (Outcome::Failed, summary.failed),
        (Outcome::Wedged, summary.wedged),
        (Outcome::Skipped, summary.skipped),
    ] {
        let word = outcome.word();
        let zero = if count == 0 { " class=\"zero\"" } else { "" };
        _ = writeln!(out, "<li{zero}><b class=\"{word}\">{count}</b><span>{word}</span></li>");
    }
    out.push_str("</ul>\n</header>\n");
}

fn matrix(out: &mut String, report: &Report) {
    let columns = report.columns();
    out.push_str("<h2>The matrix</h2>\n<div class=\"sheet\">\n<table class=\"matrix\">\n<thead><tr><th scope=\"col\">Hypervisor / transport</th><th scope=\"col\">Ring</th>");
    for device in &columns {
        _ = write!(out, "<th scope=\"col\">{}</th>", Escaped(device));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    let rows = report.rows();
    for (number, &row) in rows.iter().enumerate() {
        out.push_str("<tr>");
        let goes_on = |other: &&Row<'_>| other.goes_with(row);
        if number == 0 || !row.goes_with(rows[number - 1]) {
            _ = write!(
                out,
                "<th scope=\"rowgroup\" rowspan=\"{}\"><div>{}<span class=\"soft\"> / {}</span></div>\
                 <span class=\"badge {evidence}\">{evidence}</span></th>",
                rows[number..].iter().take_while(goes_on).count(),
                Escaped(row.hypervisor),
                Escaped(row.transport),
                evidence = Escaped(row.evidence),
            );
        }
        _ = writeln!(out, "<th scope=\"row\" class=\"ring\">{}</th>", Escaped(row.ring));
        for device in &columns {
            out.push_str("<td>");
            if let Some(cell) = report.cell(row, device) {
                matrix_cell(out, cell);
            }
            out.push_str("</td>\n");
        }
        out.push_str("</tr>\n");
    }
    out.push_str(
        "</tbody>\n</table>\n</div>\n<dl class=\"legend\">\n\
         <dt><span class=\"badge real\">real</span></dt><dd>a real hypervisor or kernel interface of this host did it</dd>\n\
         <dt><span class=\"badge emulated\">emulated</span></dt><dd>an unmodified hypervisor or guest kernel did it, on an emulated CPU</dd>\n\
         <dt><span class=\"badge model\">model</span></dt><dd>a model of what the hypervisor does below the shim, with its rules enforced</dd>\n\
         <dt class=\"rejected\">rejected</dt><dd>a malformed input was refused and the device is still alive</dd>\n\
         <dt class=\"wedged\">wedged</dt><dd>the device no longer answers</dd>\n</dl>\n",
    );
}

fn matrix_cell(out: &mut String, cell: &Cell) {
    let verdict = cell.verdict();
    let word = match verdict {
        Outcome::Passed | Outcome::Rejected => "ok",
        Outcome::Skipped => "not run",
        other => other.word(),
    };
    _ = write!(
        out,
        "<a class=\"cell is-{class}\" href=\"#{}\"><div class=\"verdict\" data-device=\"{}\"><span class=\"{class}\">{word}</span>",
        Escaped(anchor(cell)),
        Escaped(&cell.device),
        class = verdict.word(),
    );
    if cell.was_run() {
        _ = write!(out, "<span class=\"soft\">{:.2} s</span>", cell.seconds);
    }
    out.push_str("</div><div class=\"bar\" aria-hidden=\"true\">");
    let counts = cell.counts().into_iter().filter(|&(_, count)| count > 0);
    for (outcome, count) in counts.clone() {
        _ = write!(out, "<i class=\"{}\" style=\"flex-grow:{count}\"></i>", outcome.word());
    }
    out.push_str("</div><div class=\"counts\">");
    for (outcome, count) in counts {
        _ = write!(out, "<span class=\"{word}\">{count} {word}</span>", word = outcome.word());
    }
    if cell.image.as_ref().is_some_and(|image| !image.ok) {
        out.push_str("<span class=\"failed\">image damaged</span>");
    }
    out.push_str("</div></a>");
}

fn failures(out: &mut String, report: &Report) {
    let all: Vec<(&Cell, &Failure)> =
        report.cells.iter().flat_map(|cell| cell.failures.iter().map(move |failure| (cell, failure))).collect();
    if all.is_empty() {
        return;
    }
    out.push_str("<h2>Failures</h2>\n<div class=\"sheet\">\n");
    for (cell, failure) in all {
        let class = if failure.outcome == Outcome::Wedged { " wedged-one" } else { "" };
        _ = write!(
            out,
            "<div class=\"failure{class}\"><h3><span class=\"{word}\">{word}</span> <code>{}</code></h3>\
             <p class=\"soft\"><a href=\"#{}\">{}</a>, judges {}</p>\
             <dl class=\"facts\"><dt>expected</dt><dd>{}</dd><dt>observed</dt><dd>{}</dd></dl>",
            Escaped(&failure.case),
            Escaped(anchor(cell)),
            Escaped(cell.name()),
            Escaped(failure.statements.join(", ")),
            Escaped(&failure.expected),
            Escaped(&failure.observed),
            word = failure.outcome.word(),
        );
        if !failure.reproduction.is_empty() {
            _ = write!(out, "<pre>{}</pre>", Escaped(&failure.reproduction));
        }
        out.push_str("</div>\n");
    }
    out.push_str("</div>\n");
}

fn image(out: &mut String, report: &Report) {
    let Some(source) = &report.image else { return };
    _ = write!(
        out,
        "<h2>A disk image through every block device</h2>\n<p>{}, {:.1} MiB. The driver read all of it and its SHA-256 \
         was compared; then it wrote a pattern and flushed, and the host compared the copy that the device served.</p>\n\
         <p class=\"soft\"><code style=\"overflow-wrap:anywhere\">{}</code></p>\n\
         <div class=\"sheet\">\n<table>\n<thead><tr><th scope=\"col\">Cell</th><th scope=\"col\">Result</th>\
         <th scope=\"col\" class=\"number wide\">Seconds</th><th scope=\"col\" class=\"number\">MiB/s</th></tr></thead>\n<tbody>\n",
        source
            .file
            .as_deref()
            .map_or_else(|| "A generated image".to_owned(), |file| format!("<code>{}</code>", Escaped(file))),
        mebibytes(source.bytes),
        Escaped(&source.sha256),
    );
    for cell in &report.cells {
        let Some(image) = &cell.image else { continue };
        let class = if image.ok { "passed" } else { "failed" };
        let said = image.error.as_deref().unwrap_or("identical");
        _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td class=\"{class}\">{}</td><td class=\"number wide\">{:.2}</td><td class=\"number\">{:.0}</td></tr>",
            Escaped(cell.name()),
            Escaped(said),
            image.seconds,
            image.mib_per_second,
        );
    }
    out.push_str("</tbody>\n</table>\n</div>\n");
}

fn cells(out: &mut String, report: &Report) {
    out.push_str("<h2>Cell by cell</h2>\n<div class=\"sheet\">\n");
    for cell in &report.cells {
        let verdict = cell.verdict();
        let open = if matches!(verdict, Outcome::Failed | Outcome::Wedged) { " open" } else { "" };
        _ = write!(
            out,
            "<details{open}><summary><span class=\"title\">{}</span><span class=\"counts\">",
            Escaped(cell.name())
        );
        for (outcome, count) in cell.counts().into_iter().filter(|&(_, count)| count > 0) {
            _ = write!(out, "<span class=\"{word}\">{count} {word}</span>", word = outcome.word());
        }
        // The fragment is inside: browsers open the details around what a link leads to.
        _ = writeln!(out, "</span></summary>\n<div class=\"inside\" id=\"{}\">", Escaped(anchor(cell)));
        if !cell.versions.is_empty() {
            _ = write!(out, "<p>With {}</p>", Escaped(cell.versions.join(", ")));
        }
        if let Some(reason) = cell.unavailable() {
            _ = write!(out, "<p>Not run: {}</p>", Escaped(reason));
        }
        out.push_str(
            "<table class=\"cases\">\n<thead><tr><th scope=\"col\">Case</th><th scope=\"col\">Outcome</th>\
             <th scope=\"col\" class=\"ids\">Statements</th><th scope=\"col\" class=\"number wide\">ms</th></tr></thead>\n<tbody>\n",
        );
        for case in &cell.cases {
            case_row(out, cell, case);
        }
        out.push_str("</tbody>\n</table>\n</div></details>\n");
    }
    out.push_str("</div>\n");
}

fn case_row(out: &mut String, cell: &Cell, case: &Case) {
    _ = write!(
        out,
        "<tr><td><code>{}</code><br><span class=\"soft\">{}</span>",
        Escaped(&case.case),
        Escaped(&case.about)
    );
    // What a whole cell shares is said once, above its table.
    if cell.unavailable().is_none()
        && let Some(skipped) = cell.skipped.iter().find(|skipped| skipped.case == case.case)
    {
        _ = write!(out, "<br><span class=\"soft\">{}</span>", Escaped(&skipped.reason));
    }
    _ = write!(
        out,
        "</td><td class=\"{word}\">{word}</td><td class=\"ids mono\">{}</td><td class=\"number soft wide\">",
        Escaped(case.statements.join(" ")),
        word = case.outcome.word(),
    );
    if case.outcome != Outcome::Skipped {
        _ = write!(out, "{:.1}", case.seconds * 1000.0);
    }
    out.push_str("</td></tr>\n");
}

fn sizes(out: &mut String) {
    _ = write!(
        out,
        "<h2>What a hypervisor costs</h2>\n<p>Lines of code of each shim: blank lines, comments and tests not counted. \
         The bar ends at {}, the most that is allowed. What the ports share is {} lines more.</p>\n<div class=\"sheet\">\n<table>\n<thead><tr>\
         <th scope=\"col\">Hypervisor</th><th scope=\"col\" class=\"number\">Shim</th><th scope=\"col\" style=\"width:50%\"></th>\
         <th scope=\"col\" class=\"below\">Below it</th></tr></thead>\n<tbody>\n",
        shims::LIMIT,
        shims::shared(),
    );
    for shim in shims::SHIMS {
        size_row(out, shim);
    }
    out.push_str("</tbody>\n</table>\n</div>\n");
}

fn size_row(out: &mut String, shim: &Shim) {
    let lines = shim.lines();
    let over = if lines > shims::LIMIT { " over" } else { "" };
    let below: Vec<_> = shim.below().into_iter().map(|(part, lines)| format!("{part} {lines}")).collect();
    _ = writeln!(
        out,
        "<tr><th scope=\"row\">{}</th><td class=\"number\">{lines}</td><td><div class=\"size{over}\" aria-hidden=\"true\">\
         <i style=\"width:{}%\"></i></div></td><td class=\"below\">{}</td></tr>",
        Escaped(shim.hypervisor),
        (lines * 100 / shims::LIMIT).min(100),
        Escaped(below.join(", ")),
    );
}

fn host(out: &mut String, facts: &Facts) {
    out.push_str("<h2>This host</h2>\n<dl class=\"facts\">\n");
    for (label, value) in &facts.lines {
        _ = writeln!(out, "<dt>{}</dt><dd>{}</dd>", Escaped(label), Escaped(value));
    }
    out.push_str("</dl>\n");
}

/// The fragment that a cell's details are found under.
fn anchor(cell: &Cell) -> String {
    format!("{}-{}-{}-{}", cell.hypervisor, cell.transport, cell.device, cell.ring)
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    fn page() -> String {
        html(&example(), &Facts { lines: vec![("Kernel", "<Linux> & co".into())] })
    }

    #[test]
    fn the_page_refers_to_nothing_outside_itself() {
        let page = page();
        for outside in ["http:", "https:", "src=", "<script", "<link", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }

    #[test]
    fn nothing_that_was_measured_is_markup() {
        let page = page();
        for text in [
            "rng/&lt;len&gt;",
            "1 &amp; one</dd>",
            "<dd>&lt;2&gt;",
            "no &lt;xen&gt; here",
            "a&amp;b.img",
            "&lt;Linux&gt; &amp; co",
        ] {
            assert!(page.contains(text), "{text}");
        }
        assert!(!page.contains("<len>") && !page.contains("<xen>") && !page.contains("<Linux>"));
    }

    #[test]
    fn every_link_of_the_matrix_leads_to_a_cell() {
        let page = page();
        let links: Vec<_> = page.split("href=\"#").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert!(!links.is_empty());
        for link in links {
            assert!(page.contains(&format!("id=\"{link}\"")), "{link}");
        }
    }

    #[test]
    fn elements_are_closed() {
        let page = page();
        for element in ["div", "table", "tr", "td", "th", "details", "dl", "span", "p", "a", "h2"] {
            let opened = page.matches(&format!("<{element}>")).count() + page.matches(&format!("<{element} ")).count();
            assert_eq!(opened, page.matches(&format!("</{element}>")).count(), "{element}");
        }
    }

    #[test]
    fn the_headline_says_what_went_wrong() {
        assert_eq!(headline(&example()), "1 failed, 1 wedged");
        let cells = example().cells;
        assert_eq!(headline(&Report::new(cells[..1].to_vec(), None, 1.0)), "Nothing failed, nothing wedged");
        assert_eq!(headline(&Report::new(cells[3..].to_vec(), None, 1.0)), "Nothing was run");
    }
}
