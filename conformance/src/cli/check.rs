//! `polyvirt check`.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::num::NonZero;
use std::os::unix::fs::PermissionsExt as _;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use polyvirt_conformance::cells::{Port as _, Xen};
use polyvirt_conformance::daemon::Expectations;
use polyvirt_conformance::suite::{self, BLK, Case, Evidence, Progress as Step, Target, run_cell_within};
use polyvirt_conformance::{cases, cells};
use tempfile::NamedTempFile;

use super::daemon;
use super::limits::need_open_files;
use super::output::Output;
use super::progress::Progress;
use super::select::{Selection, matches};
use super::{CheckArgs, CheckFormat, CliError, External, FAILURE, SUCCESS, TellArgs};
use crate::image::{self, Image, ImageError};
use crate::report::{self, Cell, Facts, ImageSource, Report};
use crate::temporary::{self, Temporary};

/// How long a case may take with a daemon, where every kick wakes another process, and on an emulated processor.
const FAR_WATCHDOG: Duration = Duration::from_secs(300);
/// How many files a run may have open by itself, and with each cell that is run at the same time: twice what was seen.
const OPEN_FILES: u64 = 24;
const OPEN_FILES_OF_A_CELL: u64 = 24;
/// The page's name inside the directory of `--report`.
const PAGE: &str = "report.html";

impl From<ImageError> for CliError {
    fn from(error: ImageError) -> Self {
        Self::Mistake(error.to_string())
    }
}

/// Runs the cells that `args` selects, tells the result, and returns the exit code.
///
/// `external` is a device that is not ours.
pub(super) fn run(args: &CheckArgs, external: Option<External<'_>>, output: &mut Output) -> Result<u8, CliError> {
    end_cleanly()?;
    need_open_files(OPEN_FILES + OPEN_FILES_OF_A_CELL * at_once() as u64)?;
    let (targets, expected) = match external {
        Some(external) => daemon::select(args, external)?,
        None => (select(args)?, None),
    };
    let image = the_image(args, &targets)?;
    let page = args.tell.report.as_deref().map(Page::create).transpose()?;

    let begun = Instant::now();
    let (mut cells, source) = run_cells(&targets, image.as_ref(), expected.as_ref(), (&args.case, args.tell.quiet))?;
    if args.lab {
        cells.extend(super::lab::cells(args.tell.quiet)?);
    }
    tell(&Report::new(cells, source, begun.elapsed().as_secs_f64()), &args.tell, page, output)
}

/// Tells `report` in the form that `args` ask for, and on `page`; returns the exit code.
pub(super) fn tell(report: &Report, args: &TellArgs, page: Option<Page>, output: &mut Output) -> Result<u8, CliError> {
    match args.format {
        CheckFormat::Json => output.json(report)?,
        CheckFormat::Junit => output.text(&report::junit(report))?,
        CheckFormat::Text => {
            if !args.quiet {
                output.text(&format!("{}\n", report::matrix(report, output.style)))?;
            }
            output.text(&report::failures(report, output.style))?;
            output.text(&format!("{}\n", report.summary))?;
        }
    }
    if let Some(page) = page {
        let path = page.write(&report::html(report, &Facts::of_this_host()))?;
        if args.format == CheckFormat::Text && !args.quiet {
            output.text(&format!("The page is {}.\n", path.display()))?;
        }
    }
    Ok(if report.summary.ok { SUCCESS } else { FAILURE })
}

/// How many cells are run at the same time.
fn at_once() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

/// Leaves nothing behind when a signal ends the program. Before there are other threads.
pub(super) fn end_cleanly() -> Result<(), CliError> {
    temporary::remove_on_signals().map_err(|error| CliError::Mistake(format!("signals: {error}")))
}

/// The cells that were asked for. Models that only stand in for a hypervisor have to be asked for by name.
fn select(args: &CheckArgs) -> Result<Vec<Arc<dyn Target>>, CliError> {
    let mut targets = cells::cells();
    let by_default = targets.len();
    targets.extend(cells::models());
    let names = |name: fn(suite::Cell) -> &'static str| super::list::names(&targets, name);
    let hypervisors = Selection::new("hypervisor", &args.hypervisor, &names(|cell| cell.hypervisor))?;
    let transports = Selection::new("transport", &args.transport, &names(|cell| cell.transport))?;
    let devices = Selection::new("device", &args.device, &names(|cell| cell.device))?;
    let rings = Selection::new("ring format", &args.ring, &names(|cell| cell.ring.name()))?;
    if args.hypervisor.is_empty() {
        targets.truncate(by_default);
    }
    targets.retain(|target| {
        let cell = target.cell();
        hypervisors.has(cell.hypervisor)
            && transports.has(cell.transport)
            && devices.has(cell.device)
            && rings.has(cell.ring.name())
    });
    if targets.is_empty() {
        return Err(CliError::Mistake(format!(
            "no cell has {}: polyvirt list tells which transports a hypervisor has, and which rings a transport",
            [&args.hypervisor, &args.transport, &args.device, &args.ring]
                .into_iter()
                .filter(|asked| !asked.is_empty())
                .map(|asked| asked.join(" or "))
                .collect::<Vec<_>>()
                .join(" with ")
        )));
    }
    Ok(targets)
}

/// The image for the block cells, if there are any.
fn the_image(args: &CheckArgs, targets: &[Arc<dyn Target>]) -> Result<Option<Image>, CliError> {
    // A daemon has a disk of its own already.
    let carries = |cell: suite::Cell| cell.device_type == BLK && cell.hypervisor != daemon::HYPERVISOR;
    let needed = targets.iter().any(|target| carries(target.cell()));
    match &args.image {
        Some(_) if !needed => {
            Err(CliError::Mistake("--image needs a cell with a block device: none is selected".into()))
        }
        Some(path) => Ok(Some(Image::given(path)?)),
        None if needed => Ok(Some(Image::generated()?)),
        None => Ok(None),
    }
}

/// Runs every target; what came of it, and the image that was carried through the block cells.
fn run_cells(
    targets: &[Arc<dyn Target>],
    image: Option<&Image>,
    expected: Option<&Expectations>,
    (asked, quiet): (&[String], bool),
) -> Result<(Vec<Cell>, Option<ImageSource>), CliError> {
    let daemons = targets.iter().any(|target| target.cell().hypervisor == daemon::HYPERVISOR);
    let mut cases = if daemons { cases::of_daemons() } else { cases::all() };
    if !asked.is_empty() {
        cases.retain(|case| asked.iter().any(|pattern| matches(pattern, case.name)));
        if cases.is_empty() {
            let known = cases::of_daemons();
            if known.iter().any(|case| asked.iter().any(|pattern| matches(pattern, case.name))) {
                let asked = asked.join(" or ");
                return Err(CliError::Mistake(format!("{asked} judges a daemon: name one as TARGET, vhost-user:PATH")));
            }
            return Err(CliError::Mistake(format!("there is no case {}", asked.join(" or "))));
        }
    }
    let steps: usize = targets.iter().map(|target| steps(&**target, &cases)).sum();
    let progress = Progress::new(steps, quiet);
    let run = |target: &Arc<dyn Target>| {
        let cell = target.cell();
        let far = cell.hypervisor == daemon::HYPERVISOR || cell.evidence == Evidence::Emulated;
        let watchdog = if far { FAR_WATCHDOG } else { suite::CASE_WATCHDOG };
        let mut result = run_cell_within(target, &cases, watchdog, &mut |step| match step {
            Step::Started(case) => progress.at(format!("{cell}: {}", case.name)),
            Step::Finished(_) => progress.step(),
        });
        if let Some(expected) = expected {
            expected.apply(&mut result);
        }
        let mut told = Cell::new(&result, &cases);
        told.versions = target.versions();
        told
    };
    // A daemon has one driver at a time, and so has the bus of a real Xen's domain 0.
    let alone = |cell: suite::Cell| match cell.hypervisor {
        daemon::HYPERVISOR => true,
        Xen::NAME => cell.evidence != Evidence::Model,
        _ => false,
    };
    let alone = targets.iter().any(|target| alone(target.cell()));
    let at_once = if alone { 1 } else { at_once() };
    let mut cells = in_order(targets, at_once, run);
    // Alone, since it is about speed too.
    for (target, cell) in targets.iter().zip(&mut cells) {
        let carries = target.cell().device_type == BLK && target.available().is_ok();
        let Some(image) = image.filter(|_| carries) else { continue };
        progress.at(format!("{}: the image", target.cell()));
        cell.image = image::through(&**target, image)?;
        progress.step();
    }
    progress.finish();
    let source = image.filter(|_| cells.iter().any(|cell| cell.image.is_some())).map(Image::source);
    Ok((cells, source))
}

/// What `work` makes of each of `items`, in their order; `at_once` of them are worked on at the same time.
fn in_order<T: Sync, R: Send>(items: &[T], at_once: usize, work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let turns = std::iter::from_fn(|| {
            let number = next.fetch_add(1, Ordering::Relaxed);
            items.get(number).map(|item| (number, work(item)))
        });
        turns.collect::<Vec<_>>()
    };
    let mut done: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(worker)).collect();
        // A panic of a worker is one of the program's own: cases catch theirs.
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, result)| result).collect()
}

fn steps(target: &dyn Target, cases: &[Case]) -> usize {
    let cell = target.cell();
    cases.iter().filter(|case| case.applies.includes(&cell)).count() + usize::from(cell.device_type == BLK)
}

/// The page of `--report`: its place is taken before anything is run, and filled in one go at the end.
pub(super) struct Page {
    file: Temporary<NamedTempFile>,
    path: PathBuf,
}

impl Page {
    pub(super) fn create(folder: &Path) -> Result<Self, CliError> {
        let mistake = |error| CliError::Mistake(format!("report {}: {error}", folder.display()));
        fs::create_dir_all(folder).map_err(mistake)?;
        let path = folder.join(PAGE);
        if path.is_dir() {
            return Err(CliError::Mistake(format!("report {}: a directory", path.display())));
        }
        // As any other new file: the process's umask takes its share of the rights.
        let mut builder = tempfile::Builder::new();
        let file = temporary::file_in(builder.permissions(Permissions::from_mode(0o666)), folder).map_err(mistake)?;
        Ok(Self { file, path })
    }

    fn write(mut self, page: &str) -> Result<PathBuf, CliError> {
        let mistake = |error| CliError::Mistake(format!("report {}: {error}", self.path.display()));
        self.file.write_all(page.as_bytes()).map_err(mistake)?;
        self.file.hand_over(|file| file.persist(&self.path)).map_err(|error| mistake(error.error))?;
        Ok(self.path)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn results_come_in_the_order_of_their_items_whoever_works_on_them() {
        // The first item is done only when the second is: two are worked on at once.
        let both = Barrier::new(2);
        let doubled = in_order(&[1, 2, 3, 4, 5], 2, |&item| {
            if item < 3 {
                both.wait();
            }
            2 * item
        });
        assert_eq!(doubled, [2, 4, 6, 8, 10]);
        assert_eq!(in_order(&[] as &[u8], 3, |_| ()), []);
    }
}
