//! The book and the pages beside it: every relative link leads somewhere, every page is in the table of contents.

use std::fs;
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
