//! The cases about a daemon's life: our own daemon passes them, and daemons that are broken on purpose do not.
#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use polyvirt_conformance::cases::{self, life};
use polyvirt_conformance::cells::Kind;
use polyvirt_conformance::daemon::{Daemon, Process, SOCKET};
use polyvirt_conformance::saboteurs::{BrokenDaemon, DAEMONS};
use polyvirt_conformance::suite::{Case, Outcome, RingFormat, Target, run_cell};

/// Our own daemon, for a device of `kind`, in `folder`.
fn daemon(folder: &Path, kind: Kind) -> Arc<Process> {
    let image = folder.join("disk");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let mut command = format!("{} serve {} --socket {SOCKET}", env!("CARGO_BIN_EXE_polyvirt"), kind.name());
    if kind == Kind::Blk {
        command += &format!(" --image {}", image.display());
    }
    Arc::new(Process::new(command, folder.join("socket")))
}

/// Kills the daemon when a test is over, whoever else still has it.
struct Killed(Arc<Process>);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

fn passes(kind: Kind) {
    let folder = tempfile::tempdir().unwrap();
    let process = daemon(folder.path(), kind);
    let _killed = Killed(Arc::clone(&process));
    for ring in [RingFormat::Split, RingFormat::Packed] {
        let target = Daemon::new(folder.path().join("socket"), kind, ring).started_by(Some(Arc::clone(&process)));
        let target: Arc<dyn Target> = Arc::new(target);
        let result = run_cell(&target, &life::cases(), &mut |_| {});
        assert!(result.failures.is_empty(), "{kind:?}, {ring}: {:#?}", result.failures);
        assert!(result.skipped.is_empty(), "{kind:?}, {ring}: {:#?}", result.skipped);
        assert!(result.passed > 15, "{kind:?}, {ring}: {}", result.passed);
    }
}

#[test]
fn our_own_disk_lives_as_it_should() {
    passes(Kind::Blk);
}

#[test]
fn our_own_entropy_device_lives_as_it_should() {
    passes(Kind::Rng);
}

#[test]
fn our_own_console_lives_as_it_should() {
    passes(Kind::Console);
}

/// What escapes of `broken`.
fn escapes(broken: &BrokenDaemon) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let process = daemon(folder.path(), Kind::Rng);
    let _killed = Killed(Arc::clone(&process));
    let proxy = folder.path().join("proxy");
    broken.listen(&proxy, Arc::clone(&process)).unwrap();
    let mut escaped = Vec::new();
    for &ring in broken.formats {
        let target = Daemon::new(proxy.clone(), Kind::Rng, ring).started_by(Some(Arc::clone(&process)));
        let target: Arc<dyn Target> = Arc::new(target);
        for name in broken.breaks {
            let case = life::cases().into_iter().find(|case| case.name == *name).expect("a case of that name");
            let result = run_cell(&target, &[case], &mut |_| {});
            let outcome = result.cases.first().map(|result| &result.outcome);
            if !matches!(outcome, Some(Outcome::Failed { .. })) {
                escaped.push(format!("a daemon that {} escaped {name}, {ring}: {outcome:?}", broken.name));
            }
        }
    }
    escaped
}

#[test]
fn every_broken_daemon_is_caught_by_the_cases_that_it_names() {
    let (left, escaped) = (Mutex::new(DAEMONS.iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some(broken) = { left.lock().unwrap().next() } {
                    escaped.lock().unwrap().extend(escapes(broken));
                }
            });
        }
    });
    let escaped = escaped.into_inner().unwrap();
    assert!(escaped.is_empty(), "{}", escaped.join("\n"));
}

#[test]
fn every_case_can_fail_with_each_format_of_rings_that_it_is_run_with() {
    let broken: BTreeSet<_> = DAEMONS
        .iter()
        .flat_map(|daemon| daemon.formats.iter().map(move |format| (daemon, format.name())))
        .flat_map(|(daemon, format)| daemon.breaks.iter().map(move |name| (*name, format)))
        .collect();
    let runs = |case: &Case, format: RingFormat| case.applies.rings.includes(format);
    let never: Vec<_> = life::cases()
        .iter()
        .flat_map(|case| {
            let formats = RingFormat::of(false).iter().filter(|&&format| runs(case, format));
            formats.map(|format| (case.name, format.name())).collect::<Vec<_>>()
        })
        .filter(|pair| !broken.contains(pair))
        .collect();
    assert!(never.is_empty(), "no broken daemon fails {never:?}");
    assert!(cases::of_daemons().len() > cases::all().len());
}
