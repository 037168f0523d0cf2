//! The suite over every cell that this host can run.

use std::sync::Arc;

use polyvirt_conformance::suite::{Outcome, Progress, Target, run_cell};
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
