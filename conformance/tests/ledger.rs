//! The ledger knows what cases judge, and agrees with the catalogue of the spec where that is at hand.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use polyvirt_conformance::{cases, ledger};

#[test]
fn every_statement_that_a_case_judges_is_in_the_ledger_and_every_one_in_it_is_judged() {
    let judged: BTreeSet<_> = cases::all().into_iter().flat_map(|case| case.all_statements()).collect();
    let known: BTreeSet<_> = ledger::statements().map(|statement| statement.id).collect();
    assert_eq!(judged, known);
}

#[test]
fn the_ledger_is_sorted_and_whole() {
    let all: Vec<_> = ledger::statements().collect();
    let lines = include_str!("../ledger/statements.tsv").lines().count();
    assert_eq!(all.len() + 1, lines, "a line without all its fields");
    assert!(all.is_sorted_by(|one, other| one.id < other.id));
    for statement in all {
        assert!(matches!(statement.side, "driver" | "device"), "{statement:?}");
        assert!(statement.about.ends_with('.') && !statement.about.contains(" MUST "), "{statement:?}");
    }
}

#[test]
fn case_names_are_unique_and_say_their_area() {
    let all = cases::all();
    let names: BTreeSet<_> = all.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), all.len());
    assert!(all.iter().all(|case| case.name.contains('/') && !case.about.is_empty()));
    assert!(all.len() >= 60, "{} cases", all.len());
}

#[test]
fn the_classes_of_bad_input_that_these_devices_can_meet_are_covered() {
    let covered: BTreeSet<_> = cases::all().into_iter().flat_map(|case| case.class).copied().collect();
    // 17 and 18 are about network and socket headers, 37 to 41 about vhost-user.
    let wanted = (1..=16).chain(19..=36).chain(101..=106);
    let missing: Vec<_> = wanted.filter(|class| !covered.contains(class)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_ledger_agrees_with_the_catalogue() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/reference/normative.tsv");
    let Ok(catalogue) = std::fs::read_to_string(&path) else {
        println!("skipped: there is no {}", path.display());
        return;
    };
    let rows: BTreeMap<_, Vec<_>> =
        catalogue.lines().filter_map(|line| Some((line.split('\t').next()?, line.split('\t').collect()))).collect();
    for statement in ledger::statements() {
        let row = &rows[statement.id];
        assert_eq!([statement.section, statement.side, statement.keyword], row[2..5], "{}", statement.id);
    }
}
