//! The suite over every cell that this host can run.

use std::sync::Arc;

use polyvirt_conformance::cells::{Flaw, Flawed, Kind, Local, Loopback, Mmio};
use polyvirt_conformance::suite::{Outcome, Progress, RingFormat, Target, run_cell};
use polyvirt_conformance::{cases, cells};

fn run(targets: &[Arc<dyn Target>]) {
    let cases = cases::all();
    let mut bad = Vec::new();
    for target in targets {
        if let Err(reason) = target.available() {
            println!("skipped {}: {reason}", target.cell());
            continue;
        }
        let result = run_cell(target, &cases, &mut |progress| {
            if let Progress::Finished(case) = progress
                && let Outcome::Skipped { reason } = &case.outcome
            {
                println!("skipped {}: {reason}", case.case);
            }
        });
        println!(
            "{}: {} passed, {} rejected, {} failed, {} wedged in {:?}",
            result.cell, result.passed, result.rejected, result.failed, result.wedged, result.time
        );
        for case in result.cases.iter().filter(|case| case.time.as_millis() > 100) {
            println!("{:?} {}", case.time, case.case);
        }
        for failure in result.failures {
            bad.push(format!(
                "{} {}: expected {}, observed {}\n{}",
                result.cell, failure.case, failure.expected, failure.observed, failure.reproduction
            ));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n\n"));
}

#[test]
fn honest_devices_pass_every_case_on_the_loopback() {
    run(&cells::models());
}

#[test]
fn honest_devices_pass_every_case_on_every_hypervisor_of_this_host() {
    run(&cells::cells());
}

#[test]
fn no_verdict_depends_on_when_a_kick_is_heard() {
    let all: Vec<_> = RingFormat::of(false).iter().flat_map(|&ring| Kind::ALL.map(|kind| (kind, ring))).collect();
    let cases = cases::all();
    let outcomes = |target: Arc<dyn Target>| -> Vec<_> {
        let result = run_cell(&target, &cases, &mut |_| {});
        result.cases.into_iter().map(|case| (case.case, case.outcome)).collect()
    };
    std::thread::scope(|scope| {
        for (kind, ring) in all {
            scope.spawn(move || {
                let at_once = outcomes(Arc::new(Local::<Loopback, Mmio>::new(kind, ring)));
                let late = outcomes(Arc::new(Local::<Flawed<Loopback>, Mmio>::flawed(kind, ring, Flaw::Late)));
                assert_eq!(late, at_once, "{}, {ring}", kind.name());
            });
        }
    });
}
