//! The suite notices what is broken on purpose.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use polyvirt_conformance::saboteurs::Saboteur;
use polyvirt_conformance::suite::{Case, Outcome, RingFormat, run_cell};
use polyvirt_conformance::{cases, saboteurs};

/// Runs `work` on several threads: most of the time a saboteur's case waits for something that does not come.
fn in_parallel<T: Send>(items: Vec<T>, work: impl Fn(T) + Sync) {
    let items = Mutex::new(items.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some(item) = { items.lock().unwrap().next() } {
                    work(item);
                }
            });
        }
    });
}

#[test]
fn every_saboteur_is_caught_by_the_cases_that_it_names() {
    let cases: BTreeMap<_, _> = cases::all().into_iter().map(|case| (case.name, case)).collect();
    let escaped = Mutex::new(Vec::new());
    let all =
        saboteurs::all().flat_map(|saboteur| saboteur.targets().into_iter().map(move |target| (saboteur, target)));
    in_parallel(all.collect(), |(saboteur, target)| {
        let cell = target.cell();
        if let Err(reason) = target.available() {
            println!("skipped: {} on {cell} ({reason})", saboteur.name);
            return;
        }
        for name in saboteur.breaks {
            let Some(case) = cases.get(name) else {
                escaped.lock().unwrap().push(format!("{}: there is no case {name}", saboteur.name));
                continue;
            };
            if !case.applies.includes(&cell) {
                continue;
            }
            let result = run_cell(&target, std::slice::from_ref(case), &mut |_| {});
            let outcome = result.cases.first().map(|result| result.outcome.clone());
            if !matches!(outcome, Some(Outcome::Failed { .. })) {
                escaped.lock().unwrap().push(format!("{} escaped {name} on {cell}: {outcome:?}", saboteur.name));
            }
        }
    });
    let escaped = escaped.into_inner().unwrap();
    assert!(escaped.is_empty(), "{}", escaped.join("\n"));
}

#[test]
fn saboteurs_violate_what_a_case_that_notices_them_judges() {
    let cases: BTreeMap<_, _> = cases::all().into_iter().map(|case| (case.name, case)).collect();
    for saboteur in saboteurs::all() {
        let judged: BTreeSet<_> =
            saboteur.breaks.iter().filter_map(|name| cases.get(name)).flat_map(|c| c.all_statements()).collect();
        for statement in saboteur.violates {
            assert!(judged.contains(statement), "{}: no case that it breaks judges {statement}", saboteur.name);
        }
    }
    assert!(saboteurs::all().count() >= 15);
}

/// Cases that nothing breaks, with the reason.
const UNBROKEN: &[(&str, &str)] =
    &[("config/never-settles", "the bound is in core's read_config, which the case calls as drivers do")];

/// The format of rings in each of its targets, for each case that a saboteur names.
fn broken() -> BTreeSet<(&'static str, &'static str)> {
    let each = |saboteur: &'static Saboteur| {
        let formats: Vec<_> = saboteur.targets().iter().map(|target| target.cell().ring.name()).collect();
        saboteur.breaks.iter().flat_map(move |&name| formats.clone().into_iter().map(move |format| (name, format)))
    };
    saboteurs::all().flat_map(each).collect()
}

#[test]
fn every_case_can_fail_with_each_format_of_rings_that_it_is_run_with() {
    let broken = broken();
    let excused: BTreeSet<_> = UNBROKEN.iter().map(|(name, _)| *name).collect();
    let all: Vec<Case> = cases::all();
    let never = all.iter().flat_map(|case| {
        let formats = RingFormat::of(false).iter().filter(|&&format| case.applies.rings.includes(format));
        formats.map(|format| (case.name, format.name())).filter(|pair| !broken.contains(pair)).collect::<Vec<_>>()
    });
    let never: Vec<_> = never.filter(|(name, format)| !(is_legacy(&all, name) && *format == "packed")).collect();
    let unexcused: Vec<_> = never.iter().filter(|(name, _)| !excused.contains(name)).collect();
    assert!(unexcused.is_empty(), "no saboteur breaks {unexcused:?}");
    let needless: Vec<_> = excused.iter().filter(|name| !never.iter().any(|(other, _)| other == *name)).collect();
    assert!(needless.is_empty(), "excused without need: {needless:?}");
}

/// Whether a case is about the legacy interface, which has no packed rings.
fn is_legacy(all: &[Case], name: &str) -> bool {
    all.iter().any(|case| case.name == name && case.applies.legacy == Some(true))
}
