//! The book and the pages beside it: every relative link leads somewhere, every page is in the table of contents.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn pages() -> Vec<PathBuf> {
    let in_folder = |folder: PathBuf| {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|end| end == "md")).collect::<Vec<_>>()
    };
    [in_folder(root()), in_folder(root().join("docs"))].concat()
}

/// The targets of inline links, without their anchors.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split(')').next()).map(|target| target.split('#').next().unwrap())
}

#[test]
fn relative_links_lead_to_files() {
    let mut seen = 0;
    for page in pages() {
        for target in links(&fs::read_to_string(&page).unwrap()) {
            if target.is_empty() || target.contains("://") {
                continue;
            }
            seen += 1;
            assert!(page.parent().unwrap().join(target).exists(), "{}: {target} is not there", page.display());
        }
    }
    assert!(seen > 10, "only {seen} links: are they still found?");
}

#[test]
fn every_page_of_the_book_is_in_its_table_of_contents() {
    let contents = fs::read_to_string(root().join("docs/SUMMARY.md")).unwrap();
    for page in pages().iter().filter(|page| page.parent().unwrap().ends_with("docs")) {
        let name = page.file_name().unwrap().to_str().unwrap();
        assert!(name == "SUMMARY.md" || contents.contains(&format!("]({name})")), "{name} is not in SUMMARY.md");
    }
}

#[test]
fn files_that_the_book_names_exist() {
    for page in pages().iter().filter(|page| page.parent().unwrap().ends_with("docs")) {
        let text = fs::read_to_string(page).unwrap();
        for name in text.split('`').skip(1).step_by(2) {
            let is_path = ["core/", "transports/", "hypervisors/", "devices/", "conformance/"];
            if is_path.iter().any(|room| name.starts_with(room)) && !name.contains(char::is_uppercase) {
                assert!(root().join(name).exists(), "{}: {name} is not there", page.display());
            }
        }
    }
}

/// Where `item` – a function, as `name` or `Type::name` – is in `source`: its first line and its last.
fn lines_of(item: &str, source: &str) -> Option<(usize, usize)> {
    let lines: Vec<&str> = source.lines().collect();
    let indentation = |line: &str| line.len() - line.trim_start().len();
    let end_of = |first: usize| {
        (first..lines.len()).find(|&at| lines[at] == format!("{}}}", " ".repeat(indentation(lines[first]))))
    };
    let function = |name: &str, mut within: Range<usize>| {
        within.find(|&at| lines[at].split("fn ").nth(1).is_some_and(|rest| rest.split(['(', '<']).next() == Some(name)))
    };
    let first = match item.split_once("::") {
        None => function(item, 0..lines.len())?,
        Some((of, name)) => {
            let is_of = |line: &str| line.starts_with("impl") && line.split([' ', '<']).any(|word| word == of);
            let bodies = (0..lines.len()).filter(|&at| is_of(lines[at])).filter_map(|at| Some(at..end_of(at)?));
            bodies.filter_map(|body| function(name, body)).next()?
        }
    };
    Some((first + 1, end_of(first)? + 1))
}

#[test]
fn the_lines_that_carry_out_a_mechanism_are_where_the_book_says() {
    let book = fs::read_to_string(root().join("docs/hypervisors.md")).unwrap();
    let (mut seen, mut wrong) = (0, Vec::new());
    for (before, rest) in book.match_indices("` at `").map(|(at, joint)| (&book[..at], &book[at + joint.len()..])) {
        let item = before.rsplit('`').next().unwrap();
        let place = rest.split('`').next().unwrap();
        let (file, said) = place.split_once(':').unwrap_or((place, "nothing"));
        let source =
            fs::read_to_string(root().join("hypervisors/src").join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        let (first, last) = lines_of(item, &source).unwrap_or_else(|| panic!("{item} is not in {file}"));
        seen += 1;
        if said != format!("{first}-{last}") {
            wrong.push(format!("`{item}` at `{file}:{first}-{last}`, not {said}"));
        }
    }
    assert!(seen > 30, "only {seen} places: are they still found?");
    assert!(wrong.is_empty(), "docs/hypervisors.md: {wrong:#?}");
}

#[test]
fn every_dependency_is_listed_with_its_reason() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let listed = fs::read_to_string(root().join("docs/dependencies.md")).unwrap();
    let section = manifest.split("[workspace.dependencies]").nth(1).and_then(|rest| rest.split("\n[").next()).unwrap();
    let names = section.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name.trim());
    let foreign: Vec<_> = names.filter(|name| !name.starts_with("polyvirt-") && !name.starts_with('#')).collect();
    assert!(foreign.len() > 10, "only {foreign:?}: are they still found?");
    let missing: Vec<_> = foreign.iter().filter(|name| !listed.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/dependencies.md does not say why there are {missing:?}");
}
