//! Running the cases of a cell.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::session::panic_text;
use super::{Alarm, Case, Cell, Finding, NO_VARIANT, Objection, Outcome, Target, Trace, Verdict};

/// How long a case may take. Far more than any needs: it only bounds a hang.
pub const CASE_WATCHDOG: Duration = Duration::from_secs(20);

/// What came of a cell.
#[derive(Clone, Debug)]
pub struct CellResult {
    /// Which.
    pub cell: Cell,
    /// Cases that passed.
    pub passed: usize,
    /// Cases that failed.
    pub failed: usize,
    /// Malformed inputs that were refused.
    pub rejected: usize,
    /// Cases that did not come back.
    pub wedged: usize,
    /// Cases that were not run.
    pub skipped: Vec<Skipped>,
    /// What failed or wedged.
    pub failures: Vec<Failure>,
    /// Every case that applies, in order.
    pub cases: Vec<CaseResult>,
    /// Wall time.
    pub time: Duration,
}

/// A case that was not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Which.
    pub case: &'static str,
    /// Why.
    pub reason: String,
}

/// A case that failed or wedged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which.
    pub case: &'static str,
    /// The statements that it judges.
    pub statements: &'static [&'static str],
    /// Whether it wedged; otherwise it failed.
    pub wedged: bool,
    /// What should have happened.
    pub expected: String,
    /// What did.
    pub observed: String,
    /// The steps that lead there, one a line; empty if it wedged.
    pub reproduction: String,
}

/// What came of a case.
#[derive(Clone, Debug)]
pub struct CaseResult {
    /// Which.
    pub case: &'static str,
    /// The statements that it judges.
    pub statements: &'static [&'static str],
    /// What came of it.
    pub outcome: Outcome,
    /// Wall time.
    pub time: Duration,
}

/// How far a run is.
#[derive(Clone, Copy)]
pub enum Progress<'a> {
    /// A case begins.
    Started(&'a Case),
    /// A case ended.
    Finished(&'a CaseResult),
}

/// Runs those of `cases` that apply to `target`, each in a session of its own; `progress` hears of each.
pub fn run_cell(target: &Arc<dyn Target>, cases: &[Case], progress: &mut dyn FnMut(Progress<'_>)) -> CellResult {
    run_cell_within(target, cases, CASE_WATCHDOG, progress)
}

/// [`run_cell`] with another watchdog.
pub fn run_cell_within(
    target: &Arc<dyn Target>,
    cases: &[Case],
    watchdog: Duration,
    progress: &mut dyn FnMut(Progress<'_>),
) -> CellResult {
    let begun = Instant::now();
    let cell = target.cell();
    let mut result = CellResult {
        cell,
        passed: 0,
        failed: 0,
        rejected: 0,
        wedged: 0,
        skipped: Vec::new(),
        failures: Vec::new(),
        cases: Vec::new(),
        time: Duration::ZERO,
    };
    let available = target.available();
    for case in cases.iter().filter(|case| case.applies.includes(&cell)) {
        progress(Progress::Started(case));
        let begun = Instant::now();
        let outcome = match &available {
            Ok(()) => run_case(target, *case, watchdog),
            Err(reason) => Outcome::Skipped { reason: reason.clone() },
        };
        let statements = case.statements_with(cell.ring);
        let done = CaseResult { case: case.name, statements, outcome, time: begun.elapsed() };
        progress(Progress::Finished(&done));
        result.add(done, watchdog);
    }
    result.time = begun.elapsed();
    result
}

impl CellResult {
    fn add(&mut self, done: CaseResult, watchdog: Duration) {
        let failure = |wedged, expected, observed, reproduction| Failure {
            case: done.case,
            statements: done.statements,
            wedged,
            expected,
            observed,
            reproduction,
        };
        match done.outcome.clone() {
            Outcome::Passed => self.passed += 1,
            Outcome::Rejected => self.rejected += 1,
            Outcome::Failed { expected, observed, reproduction } => {
                self.failed += 1;
                self.failures.push(failure(false, expected, observed, reproduction));
            }
            Outcome::Wedged => {
                self.wedged += 1;
                let observed = format!("it did not come back in {watchdog:?}");
                self.failures.push(failure(true, "the case ends".into(), observed, String::new()));
            }
            Outcome::Skipped { reason } => self.skipped.push(Skipped { case: done.case, reason }),
        }
        self.cases.push(done);
    }
}

/// Runs `case` on a thread of its own, which is abandoned if it does not come back.
fn run_case(target: &Arc<dyn Target>, case: Case, watchdog: Duration) -> Outcome {
    let target = Arc::clone(target);
    let (send, receive) = mpsc::channel();
    // Linux makes folders by the names of threads that open event channels: a slash would end one there.
    let thread = Builder::new().name(case.name.replace('/', " ")).spawn(move || {
        // Nobody listens any more if the watchdog barked.
        // At every level: whoever asks for warnings only wants to know of which case.
        let span = tracing::error_span!("case", name = case.name, cell = %target.cell());
        let _ = send.send(span.in_scope(|| in_session(&*target, &case)));
    });
    match thread {
        Ok(_abandoned) => receive.recv_timeout(watchdog).unwrap_or(Outcome::Wedged),
        Err(error) => Outcome::Skipped { reason: format!("no thread for the case: {error}") },
    }
}

fn in_session(target: &dyn Target, case: &Case) -> Outcome {
    let (mut trace, mut alarm) = (Trace::default(), Alarm::default());
    let verdict = catch_unwind(AssertUnwindSafe(|| {
        let mut session = match target.session(case.variant) {
            Ok(session) => session,
            Err(reason) if reason == NO_VARIANT => return Err(Objection::Skipped(reason)),
            Err(reason) => return Err(Objection::failed("the machine starts", reason)),
        };
        (trace, alarm) = (session.trace.clone(), session.alarm.clone());
        session.watchdog = target.patience(case).unwrap_or(session.watchdog);
        (case.run)(&mut session)
    }));
    judge(verdict, &trace, alarm.rang())
}

/// A panic of the device counts before anything that the case says about it.
fn judge(verdict: std::thread::Result<Verdict>, trace: &Trace, device_panic: Option<String>) -> Outcome {
    let failed =
        |expected: String, observed| Outcome::Failed { expected, observed, reproduction: trace.reproduction() };
    match (device_panic, verdict) {
        (Some(panic), _) => failed("the device survives".into(), format!("it panicked: {panic}")),
        (None, Err(payload)) => failed("no panic".into(), format!("a panic: {}", panic_text(&*payload))),
        (None, Ok(Ok(Finding::Passed))) => Outcome::Passed,
        (None, Ok(Ok(Finding::Rejected))) => Outcome::Rejected,
        (None, Ok(Err(Objection::Failed { expected, observed }))) => failed(expected, observed),
        (None, Ok(Err(Objection::Skipped(reason)))) => Outcome::Skipped { reason },
    }
}
