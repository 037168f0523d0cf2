//! `polyvirt check`.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use polyvirt_conformance::suite::{self, BLK, Case, Progress as Step, Target, run_cell};
use polyvirt_conformance::{cases, cells};
use tempfile::NamedTempFile;

use super::output::Output;
use super::progress::Progress;
use super::select::Selection;
use super::{CheckArgs, CheckFormat, CliError, FAILURE, SUCCESS, TellArgs};
use crate::image::{self, Image, ImageError};
use crate::report::{self, Cell, Facts, ImageSource, Report};

/// The page's name inside the directory of `--report`.
const PAGE: &str = "report.html";

impl From<ImageError> for CliError {
    fn from(error: ImageError) -> Self {
        Self::Mistake(error.to_string())
    }
}

/// Runs the cells that `args` selects, tells the result, and returns the exit code.
pub(super) fn run(args: &CheckArgs, output: &mut Output) -> Result<u8, CliError> {
    let targets = select(args)?;
    let image = the_image(args, &targets)?;
    let page = args.tell.report.as_deref().map(Page::create).transpose()?;

    let begun = Instant::now();
    let (mut cells, source) = run_cells(&targets, image.as_ref(), args.tell.quiet)?;
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
    let needed = targets.iter().any(|target| target.cell().device_type == BLK);
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
    quiet: bool,
) -> Result<(Vec<Cell>, Option<ImageSource>), CliError> {
    let cases = cases::all();
    let steps: usize = targets.iter().map(|target| steps(&**target, &cases)).sum();
    let progress = Progress::new(steps, quiet);
    let mut cells = Vec::new();
    for target in targets {
        let cell = target.cell();
        let result = run_cell(target, &cases, &mut |step| match step {
            Step::Started(case) => progress.at(format!("{cell}: {}", case.name)),
            Step::Finished(_) => progress.step(),
        });
        let mut cell_report = Cell::new(&result, &cases);
        cell_report.versions = target.versions();
        if let Some(image) = image.filter(|_| cell.device_type == BLK && target.available().is_ok()) {
            progress.at(format!("{cell}: the image"));
            cell_report.image = image::through(&**target, image)?;
            progress.step();
        }
        cells.push(cell_report);
    }
    progress.finish();
    let source = image.filter(|_| cells.iter().any(|cell| cell.image.is_some())).map(Image::source);
    Ok((cells, source))
}

fn steps(target: &dyn Target, cases: &[Case]) -> usize {
    let cell = target.cell();
    cases.iter().filter(|case| case.applies.includes(&cell)).count() + usize::from(cell.device_type == BLK)
}

/// The page of `--report`: its place is taken before anything is run, and filled in one go at the end.
pub(super) struct Page {
    file: NamedTempFile,
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
        let file =
            tempfile::Builder::new().permissions(Permissions::from_mode(0o666)).tempfile_in(folder).map_err(mistake)?;
        Ok(Self { file, path })
    }

    fn write(mut self, page: &str) -> Result<PathBuf, CliError> {
        let mistake = |error| CliError::Mistake(format!("report {}: {error}", self.path.display()));
        self.file.write_all(page.as_bytes()).map_err(mistake)?;
        self.file.persist(&self.path).map_err(|error| mistake(error.error))?;
        Ok(self.path)
    }
}
