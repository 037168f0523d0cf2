//! The book and the pages beside it: every relative link leads somewhere, every page is in the table of contents.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

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
            let of_the_book = page.parent().unwrap().ends_with("docs");
            assert!(!of_the_book || !target.starts_with(".."), "{}: {target} is not in the book", page.display());
        }
    }
    assert!(seen > 10, "only {seen} links: are they still found?");
}

/// The values of attribute `name` in a page of HTML.
fn attributes<'a>(html: &'a str, name: &str) -> impl Iterator<Item = String> + use<'a> {
    let begin = format!(" {name}=\"");
    html.match_indices(&begin)
        .map(|(at, found)| &html[at + found.len()..])
        .filter_map(|rest| rest.split('"').next())
        .map(|value| value.replace("&amp;", "&"))
        .collect::<Vec<_>>()
        .into_iter()
}

/// `mdbook`, where `.ci/run` installs it, or in the path.
fn mdbook() -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(target.join("tools/bin")).chain(std::env::split_paths(&path));
    folders.map(|folder| folder.join("mdbook")).find(|program| program.is_file())
}

/// The links of a built book that lead nowhere: the page, the link, and why.
fn dead_links(book: &Path) -> Vec<String> {
    let mut pages = BTreeMap::new();
    let mut folders = vec![book.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.extension().is_some_and(|end| end == "html") {
                pages.insert(entry.canonicalize().unwrap(), fs::read_to_string(entry).unwrap());
            }
        }
    }
    assert!(pages.len() > 5, "only {} pages: are they still found?", pages.len());
    let anchors: BTreeMap<_, BTreeSet<_>> =
        pages.iter().map(|(page, html)| (page, attributes(html, "id").collect())).collect();
    let (mut dead, mut seen) = (Vec::new(), 0);
    for (page, html) in &pages {
        for link in attributes(html, "href").chain(attributes(html, "src")) {
            let elsewhere = link.starts_with("//") || link.split(['/', '#', '?']).next().unwrap().contains(':');
            if elsewhere || link.is_empty() {
                continue;
            }
            seen += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let file = file.split('?').next().unwrap();
            let to = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            let why = match to.canonicalize() {
                Err(_) => "is not there",
                Ok(to) if !to.starts_with(book) => "is not in the book",
                Ok(to) => match anchors.get(&to) {
                    Some(anchors) if !anchor.is_empty() && !anchors.contains(anchor) => "has no such anchor",
                    _ => continue,
                },
            };
            dead.push(format!("{}: {link} {why}", page.strip_prefix(book).unwrap().display()));
        }
    }
    assert!(seen > 50, "only {seen} links: are they still found?");
    dead
}

#[test]
fn links_of_the_built_book_lead_to_pages_of_it() {
    let Some(mdbook) = mdbook() else { return println!("skipped: mdbook is not installed") };
    let book = tempfile::tempdir().unwrap();
    let built = Command::new(mdbook).arg("build").arg(root().join("docs")).arg("--dest-dir").arg(book.path()).output();
    let built = built.unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let dead = dead_links(&book.path().canonicalize().unwrap());
    assert!(dead.is_empty(), "{dead:#?}");
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
fn files_that_the_pages_name_exist() {
    let mut seen = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for name in text.split('`').skip(1).step_by(2) {
            let rooms = ["core/", "transports/", "hypervisors/", "devices/", "conformance/", "fuzz/", ".ci/"];
            // What is in capitals stands for a name of the reader's; `fuzz/run` has arguments.
            let name = name.split(' ').next().unwrap();
            let is_path =
                rooms.iter().any(|room| name.starts_with(room)) || name.starts_with("docs/") && name.ends_with(".md");
            // Written by a run of the fuzzer, and by nothing else.
            let made = name == "fuzz/artifacts/";
            if is_path && !name.contains(char::is_uppercase) && !made {
                seen += 1;
                assert!(root().join(name).exists(), "{}: {name} is not there", page.display());
            }
        }
    }
    assert!(seen > 50, "only {seen} names: are they still found?");
}

/// Names of functions and types that a page gives with the file they are in: `` `name` in `file` ``.
fn named(text: &str) -> Vec<(Vec<&str>, &str)> {
    let mut found = Vec::new();
    for (before, rest) in text.match_indices("` in `").map(|(at, joint)| (&text[..at], &text[at + joint.len()..])) {
        let file = rest.split('`').next().unwrap();
        // One name, or several with commas between them.
        let mut names = vec![before.rsplit('`').next().unwrap()];
        let mut before = &before[..before.len() - names[0].len() - 1];
        while let Some(more) = before.strip_suffix("`, ").or_else(|| before.strip_suffix("` and ")) {
            let name = more.rsplit('`').next().unwrap();
            names.push(name);
            before = &more[..more.len() - name.len() - 1];
        }
        found.push((names, file));
    }
    found
}

#[test]
fn what_the_paper_s_page_names_is_in_the_file_that_it_names() {
    let text = fs::read_to_string(root().join("docs/paper.md")).unwrap();
    let mut seen = 0;
    for (names, file) in named(&text) {
        let source = fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        for name in names {
            seen += 1;
            let item = name.rsplit("::").next().unwrap();
            let defines = |kind: &str| {
                source.match_indices(&format!("{kind} {item}")).any(|(at, found)| {
                    !source[at + found.len()..].starts_with(|next: char| next.is_alphanumeric() || next == '_')
                })
            };
            let kinds = ["fn", "struct", "enum", "trait", "const", "type"];
            assert!(kinds.into_iter().any(defines), "docs/paper.md: {name} is not in {file}");
        }
    }
    assert!(seen > 20, "only {seen} names: are they still found?");
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
