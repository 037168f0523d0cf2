//! The runner: whatever a case does, its cell goes on.

use std::sync::Arc;
use std::time::Duration;

use polyvirt_conformance::cells;
use polyvirt_conformance::suite::{
    Applies, BLK, Case, Cell, Finding, NO_VARIANT, Objection, Outcome, RNG, Session, Target, Variant, Verdict,
    run_cell, run_cell_within,
};

fn rng() -> Arc<dyn Target> {
    cells::models().into_iter().find(|target| target.cell().device_type == RNG).unwrap()
}

fn passes(session: &mut Session) -> Verdict {
    session.bring_up(polyvirt_core::Features::empty())?;
    Ok(Finding::Passed)
}

fn refuses(_: &mut Session) -> Verdict {
    Ok(Finding::Rejected)
}

fn panics(session: &mut Session) -> Verdict {
    session.trace.note("a step");
    panic!("on purpose")
}

fn hangs(_: &mut Session) -> Verdict {
    loop {
        std::thread::park();
    }
}

fn objects(session: &mut Session) -> Verdict {
    session.trace.note("a step");
    session.trace.note("a step");
    Err(Objection::failed("one thing", "another"))
}

fn skips(session: &mut Session) -> Verdict {
    session.far_side.fail_next_io()?;
    Ok(Finding::Passed)
}

#[test]
fn every_outcome_is_told_and_none_stops_the_cell() {
    let cases = [
        Case::new("run/panics", "", panics),
        Case::new("run/hangs", "", hangs),
        Case::new("run/objects", "", objects).judges(&["N0001"]),
        Case::new("run/skips", "", skips),
        Case::new("run/variant", "", passes).with(Variant::ReadOnly),
        Case::new("run/elsewhere", "", passes).on(Applies::to(BLK)),
        Case::new("run/refuses", "", refuses),
        Case::new("run/passes", "", passes),
    ];
    let mut told = 0;
    let result = run_cell_within(&rng(), &cases, Duration::from_secs(2), &mut |_| told += 1);
    assert_eq!((result.passed, result.rejected, result.failed, result.wedged), (1, 1, 2, 1));
    assert_eq!(told, 2 * 7, "the case for another device is not even skipped");
    let skipped: Vec<_> = result.skipped.iter().map(|skipped| skipped.case).collect();
    assert_eq!(skipped, ["run/skips", "run/variant"]);
    assert_eq!(result.skipped[1].reason, NO_VARIANT);
    let failures: Vec<_> = result.failures.iter().map(|failure| (failure.case, failure.wedged)).collect();
    assert_eq!(failures, [("run/panics", false), ("run/hangs", true), ("run/objects", false)]);
    assert!(result.failures[0].observed.contains("on purpose"));
    assert_eq!(result.failures[2].statements, ["N0001"]);
    assert_eq!(result.failures[2].reproduction, "a step (2 times)");
}

#[test]
fn where_a_cell_cannot_run_every_case_is_skipped_with_the_one_reason() {
    struct Absent;
    impl Target for Absent {
        fn cell(&self) -> Cell {
            rng().cell()
        }
        fn available(&self) -> Result<(), String> {
            Err("it is not here".into())
        }
        fn session(&self, _: Variant<'_>) -> Result<Session, String> {
            unreachable!("nobody opens a session of what is not available")
        }
    }
    let target: Arc<dyn Target> = Arc::new(Absent);
    let result = run_cell(&target, &[Case::new("run/passes", "", passes)], &mut |_| {});
    assert_eq!(result.cases[0].outcome, Outcome::Skipped { reason: "it is not here".into() });
}

#[test]
fn a_machine_that_does_not_start_is_a_failure() {
    struct Broken;
    impl Target for Broken {
        fn cell(&self) -> Cell {
            rng().cell()
        }
        fn available(&self) -> Result<(), String> {
            Ok(())
        }
        fn session(&self, _: Variant<'_>) -> Result<Session, String> {
            Err("no memory".into())
        }
    }
    let target: Arc<dyn Target> = Arc::new(Broken);
    let result = run_cell(&target, &[Case::new("run/passes", "", passes)], &mut |_| {});
    assert_eq!((result.failed, result.failures[0].observed.as_str()), (1, "no memory"));
}
