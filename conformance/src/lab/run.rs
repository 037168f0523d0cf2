//! Boots guests, and makes cells of what comes of it.

use std::fs;
use std::path::{Path, PathBuf};

use super::boot::boot;
use super::disk::{self, Image};
use super::guests::{Device, Guest, Kind, Machine};
use super::judge::{Evidence, Wrong, cases};
use super::kernel::Kept;
use super::parts::Part;
use super::server::Server;
use super::transcript::Transcript;
use super::{Cache, LabError, dom0, domu, firmware, initramfs, machine, nested, suite, xen};
use crate::report::{Case, Cell, Failure, Outcome, Skipped};

/// What the cells of the lab are worth: an unmodified kernel, on an emulated machine.
pub(super) const EVIDENCE: &str = "emulated";

/// How far a run is.
pub(crate) enum Step {
    /// What a guest does now.
    At(String),
    /// A guest is done.
    Done,
}

/// Runs each of `guests`; a cell for each of its devices. What cannot be booted here is skipped, with the reason, or, if
/// it is `required`, has failed.
pub(crate) fn run(
    cache: &Cache,
    guests: &[&'static Guest],
    required: bool,
    progress: &mut dyn FnMut(Step),
) -> Vec<Cell> {
    let mut cells = Vec::new();
    for guest in guests {
        progress(Step::At(format!("{}: booting", guest.name)));
        match one(cache, guest, progress) {
            Ok(these) => cells.extend(these),
            Err(error) => {
                let error = if required { error.in_place_of_a_boot() } else { error };
                let told = Transcript::without_a_start(&error);
                match guest.machine {
                    Machine::Dom0(_) => cells.extend(suite::without(guest, &dom0::CELLS, &error)),
                    Machine::DomU(_) => cells.push(domu::without(guest, &error)),
                    Machine::Firmware(_) => cells.push(firmware::without(guest, &error)),
                    Machine::KvmHost(_) => cells.extend(suite::without(guest, &nested::CELLS, &error)),
                    _ => {}
                }
                cells.extend(guest.devices.iter().map(|device| match error.is_absence() {
                    true => skipped(guest, device, &error.to_string()),
                    false => broken(guest, device, &told),
                }));
            }
        }
        progress(Step::Done);
    }
    cells
}

/// A device of a guest, and what stands behind it.
struct Served {
    device: &'static Device,
    image: Option<Image>,
    socket: PathBuf,
    /// None where the guest's machine runs it.
    server: Option<Server>,
}

impl Served {
    fn start(folder: &Path, device: &'static Device, guest: &Guest) -> Result<Self, LabError> {
        let image = match device.kind {
            Kind::Blk => Some(Image::create(folder, device.variant).map_err(LabError::file(folder))?),
            Kind::Rng => None,
        };
        let socket = folder.join(format!("{device}.sock"));
        let server = match &guest.machine {
            Machine::Xen(_)
            | Machine::Dom0(_)
            | Machine::DomU(_)
            | Machine::Nested(_)
            | Machine::KvmHost(_)
            | Machine::Firmware(_) => None,
            Machine::Qemu(_) | Machine::UserMode => {
                let image = image.as_ref().map(|image| &*image.path);
                Some(Server::start(device, image, guest.queues(), &socket)?)
            }
        };
        Ok(Self { device, image, socket, server })
    }

    /// What the guest has to know.
    fn line(&self) -> String {
        let Device { kind, variant, .. } = self.device;
        format!("{} {variant} {}\n", kind.name(), self.image.as_ref().map(Image::places).unwrap_or_default())
    }
}

/// One guest with all its devices.
fn one(cache: &Cache, guest: &'static Guest, progress: &mut dyn FnMut(Step)) -> Result<Vec<Cell>, LabError> {
    if let Some(missing) = Part::all(guest).into_iter().find(|part| !part.is_there(cache)) {
        return Err(LabError::NotSetUp { what: missing.name(), guest: guest.name });
    }
    match &guest.machine {
        Machine::Dom0(machine) => return dom0::run(cache, guest, machine, progress),
        Machine::DomU(machine) => return domu::run(cache, guest, machine, progress),
        Machine::KvmHost(machine) => return nested::run(cache, guest, machine, progress),
        Machine::Firmware(machine) => return firmware::run(cache, guest, machine, progress),
        _ => {}
    }
    let kernel = Kept::of(guest.kernel, guest, cache)?;

    // Not in the cache: a socket's path is short.
    let folder = crate::temporary::folder().map_err(LabError::file(&std::env::temp_dir()))?;
    let folder = folder.path();
    let (driven, lacking): (Vec<_>, Vec<_>) = guest.devices.iter().partition(|device| kernel.drives(device.kind));
    let mut served =
        driven.iter().map(|device| Served::start(folder, device, guest)).collect::<Result<Vec<_>, LabError>>()?;
    let lines: String = served.iter().map(Served::line).collect();
    let busybox = Part::tools(guest).place(cache).join("busybox");
    let archive = initramfs::build(&kernel, &busybox, &lines, &disk::pattern())?;
    let command = if let Machine::Xen(xen) = &guest.machine {
        let disk = served.iter().find_map(|served| served.image.as_ref());
        let image = &*disk.ok_or_else(|| LabError::Host("a guest on Xen needs a disk".to_owned()))?.path;
        let boot = xen::Boot { kernel: &kernel, initramfs: &archive, busybox: &busybox, image, folder };
        xen::command(xen, cache, &boot)?
    } else if let Machine::Nested(host) = &guest.machine {
        let disks: Vec<_> = served.iter().filter_map(|served| Some(&*served.image.as_ref()?.path)).collect();
        let boot = nested::Boot { kernel: &kernel, initramfs: &archive, disks: &disks, folder };
        nested::command(guest, host, cache, &boot)?
    } else {
        let initramfs = folder.join("initramfs");
        fs::write(&initramfs, archive).map_err(LabError::file(&initramfs))?;
        let devices: Vec<_> = served.iter().map(|served| (served.device, served.socket.clone())).collect();
        let boot = machine::Boot { kernel: &kernel.image, initramfs: &initramfs, devices: &devices, folder };
        machine::command(guest, cache, &boot)?
    };
    let firmware = match &guest.machine {
        Machine::Qemu(machine) => machine.firmware,
        _ => None,
    };
    let told = boot(&command, firmware, &mut |event| {
        progress(Step::At(format!("{}: {} {}", guest.name, event.subject, event.word)));
    })?;

    let Some(version) = told.kernel() else {
        return Ok(guest.devices.iter().map(|device| broken(guest, device, &told)).collect());
    };
    let xen = told.event("dom0", "xen").map(|event| format!("Xen {}", event.details));
    let kvm = told.event("host", "kvm").map(|event| format!("KVM of Linux {}", event.details));
    let linux = Some(format!("Linux {version}"));
    let versions: Vec<_> = linux.into_iter().chain(xen).chain(kvm).chain(machine::version(guest, cache)).collect();
    let disks = driven.iter().filter(|device| device.kind == Kind::Blk).count();
    let mut cells = Vec::new();
    for Served { device, image, server, .. } in &mut served {
        let after = image.as_ref().map(|image| image.after().map_err(LabError::file(&image.path))).transpose()?;
        let disk = image.as_ref().zip(after.as_ref());
        let served = ["dom0", "host"].iter().find_map(|host| told.event(host, "served"));
        let in_order = || served.is_some_and(|event| event.details == "0");
        let (queues, server_runs) = (guest.queues(), server.as_mut().map_or_else(in_order, Server::runs));
        cells.push(cell(guest, &Evidence { device, queues, disks, disk, told: &told, server_runs }, &versions));
    }
    let why = |kind: Kind| format!("{} has no driver {}", guest.kernel.package, kind.driver());
    cells.extend(lacking.into_iter().map(|device| skipped(guest, device, &why(device.kind))));
    Ok(cells)
}

/// The cell of one device.
fn cell(guest: &Guest, evidence: &Evidence<'_>, versions: &[String]) -> Cell {
    let mut cell = empty(guest, evidence.device);
    cell.versions = versions.to_vec();
    for case in cases(guest, evidence.device) {
        let seconds = case.took(evidence).as_secs_f64();
        judged(&mut cell, case.name, case.about, case.judge(evidence), evidence.told);
        cell.cases.last_mut().into_iter().for_each(|case| case.seconds = seconds);
        cell.seconds += seconds;
    }
    cell
}

/// Adds a case that was judged.
pub(super) fn judged(cell: &mut Cell, name: &str, about: &str, verdict: Result<(), Wrong>, told: &Transcript) {
    let outcome = match verdict {
        Ok(()) => {
            cell.passed += 1;
            Outcome::Passed
        }
        Err(wrong) => {
            cell.failed += 1;
            cell.failures.push(failure(name, wrong, told));
            Outcome::Failed
        }
    };
    cell.cases.push(told_case(name, about, outcome, 0.0));
}

/// The cell with the names and meanings `cases`, of a guest that could not be booted for `error`.
pub(super) fn untried<'a>(mut cell: Cell, cases: impl Iterator<Item = (&'a str, &'a str)>, error: &LabError) -> Cell {
    for (name, about) in cases {
        if error.is_absence() {
            cell.cases.push(told_case(name, about, Outcome::Skipped, 0.0));
            cell.skipped.push(Skipped { case: name.into(), reason: error.to_string() });
        } else {
            let wrong = Wrong { expected: about.to_owned(), observed: error.to_string() };
            judged(&mut cell, name, about, Err(wrong), &Transcript::without_a_start(error));
        }
    }
    cell
}

pub(super) fn failure(case: &str, Wrong { expected, observed }: Wrong, told: &Transcript) -> Failure {
    // What else there was on the console is where a failed boot begins to be understood.
    Failure {
        case: case.into(),
        outcome: Outcome::Failed,
        statements: Vec::new(),
        expected,
        observed,
        reproduction: told.tail(),
    }
}

/// The cell of a device that was not tried, for `reason`.
fn skipped(guest: &Guest, device: &Device, reason: &str) -> Cell {
    let mut cell = empty(guest, device);
    for case in cases(guest, device) {
        cell.cases.push(told_case(case.name, case.about, Outcome::Skipped, 0.0));
        cell.skipped.push(Skipped { case: case.name.into(), reason: reason.to_owned() });
    }
    cell
}

/// The cell of a device whose guest was not started, or `told` nothing, though everything is there.
fn broken(guest: &Guest, device: &Device, told: &Transcript) -> Cell {
    let (case, about) = ("lab/start", "the device is served, and the guest's kernel started");
    let mut cell = empty(guest, device);
    cell.failed = 1;
    cell.cases.push(told_case(case, about, Outcome::Failed, 0.0));
    let wrong = Wrong { expected: about.to_owned(), observed: told.ending() };
    cell.failures.push(failure(case, wrong, told));
    cell
}

pub(super) fn told_case(name: &str, about: &str, outcome: Outcome, seconds: f64) -> Case {
    Case { case: name.into(), about: about.into(), outcome, statements: Vec::new(), seconds }
}

/// A cell in which nothing has happened yet.
fn empty(guest: &Guest, device: &Device) -> Cell {
    Cell { transport: device.transport(guest), ..empty_cell(guest, (device.kind.name(), device.ring())) }
}

/// As [`empty`], for a device with a format of rings.
pub(super) fn empty_cell(guest: &Guest, (device, ring): (&str, &str)) -> Cell {
    Cell {
        hypervisor: guest.name.into(),
        transport: guest.transport.into(),
        device: device.into(),
        ring: ring.into(),
        evidence: EVIDENCE.into(),
        versions: Vec::new(),
        passed: 0,
        failed: 0,
        rejected: 0,
        wedged: 0,
        skipped: Vec::new(),
        failures: Vec::new(),
        seconds: 0.0,
        cases: Vec::new(),
        image: None,
    }
}
