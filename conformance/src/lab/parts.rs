//! What guests are put together from: each part is fetched once and kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::apt::Apt;
use super::guests::{Guest, Kernel, Machine};
use super::{Cache, LabError, kernel, tool, xen};

/// Something that is fetched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Part {
    /// A package of QEMU's, of a release, with what it depends on and the host does not have.
    Emulator(&'static str, &'static str),
    /// A kernel with its modules.
    Kernel(&'static Kernel),
    /// The guest's tools: one static program of a release, for an architecture.
    Tools(&'static str, &'static str),
    /// Xen with its tools.
    Xen,
}

/// The release that has a QEMU which knows `vhost-user-blk` on every machine of the lab.
pub(super) const EMULATORS: &str = "bookworm-backports";
const TOOLS: &str = "busybox-static";

impl Part {
    /// The parts of a guest.
    pub(super) fn all(guest: &'static Guest) -> Vec<Self> {
        let machine = match &guest.machine {
            Machine::Qemu(qemu) => vec![qemu.emulator()],
            Machine::Xen(xen) => vec![xen.emulator(), Self::Xen],
            Machine::Dom0(qemu) | Machine::DomU(qemu) => vec![qemu.emulator(), Self::Xen],
            Machine::Nested(host) | Machine::KvmHost(host) => vec![host.emulator(), Self::Kernel(host.kernel)],
            Machine::UserMode => Vec::new(),
        };
        machine.into_iter().chain([Self::Kernel(guest.kernel), Self::tools(guest)]).collect()
    }

    /// The tools of a guest.
    pub(super) fn tools(guest: &Guest) -> Self {
        Self::Tools(guest.kernel.suite, guest.kernel.architecture)
    }

    /// What it is called where it is told, and in the cache.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Emulator(package, EMULATORS) => format!("emulators/{package}"),
            Self::Emulator(package, suite) => format!("emulators/{package}-{suite}"),
            Self::Kernel(Kernel { package, purpose: "", .. }) => format!("kernels/{package}"),
            Self::Kernel(Kernel { package, purpose, .. }) => format!("kernels/{package}-{purpose}"),
            Self::Tools(_, architecture) => format!("tools/{TOOLS}-{architecture}"),
            Self::Xen => "xen".to_owned(),
        }
    }

    /// Where it is kept.
    pub(super) fn place(&self, cache: &Cache) -> PathBuf {
        cache.path(&self.name())
    }

    /// Whether it was fetched before.
    pub(super) fn is_there(&self, cache: &Cache) -> bool {
        let place = self.place(cache);
        match self {
            Self::Emulator(..) | Self::Tools(..) | Self::Xen => place.is_dir(),
            Self::Kernel(kernel) => kernel::Kept::open(&place, kernel).is_some(),
        }
    }

    /// The release and the architecture it comes from.
    pub(super) fn source<'a>(&self, host: &'a str) -> (&'static str, &'a str) {
        match self {
            Self::Emulator(_, suite) => (suite, host),
            Self::Kernel(kernel) => (kernel.suite, kernel.architecture),
            Self::Tools(suite, architecture) => (suite, architecture),
            Self::Xen => (xen::SUITE, "amd64"),
        }
    }

    /// Fetches it and keeps it.
    pub(super) fn fetch(&self, apt: &Apt, cache: &Cache) -> Result<(), LabError> {
        let scratch = cache.scratch()?;
        let folder = |name: &str| {
            let path = scratch.path().join(name);
            fs::create_dir(&path).map_err(LabError::file(&path)).map(|()| path)
        };
        let (packages, unpacked, made) = (folder("packages")?, folder("unpacked")?, folder("made")?);
        match self {
            Self::Emulator(package, suite) => apt.download_with_what_is_missing(package, suite, &packages)?,
            Self::Kernel(kernel) => {
                let current = apt.current(kernel.package, kernel.architecture)?;
                apt.download(&current, kernel.architecture, &packages)?;
            }
            Self::Tools(_, architecture) => apt.download(TOOLS, architecture, &packages)?,
            Self::Xen => xen::PACKAGES.iter().try_for_each(|package| apt.download(package, "amd64", &packages))?,
        }
        unpack(&packages, &unpacked)?;
        match self {
            Self::Emulator(..) => cache.keep(&unpacked, &self.name()),
            Self::Xen => {
                xen::unpack(&unpacked)?;
                cache.keep(&unpacked, &self.name())
            }
            Self::Kernel(kernel) => {
                kernel::keep(kernel, &unpacked, &made)?;
                cache.keep(&made, &self.name())
            }
            Self::Tools(..) => {
                // Not the first file of that name: the package also has a hook script called busybox.
                let busybox = ["bin/busybox", "usr/bin/busybox"].map(|path| unpacked.join(path));
                let busybox = busybox.iter().find(|path| path.is_file());
                let missing = || LabError::Package { package: TOOLS.to_owned(), missing: "bin/busybox".to_owned() };
                let busybox = busybox.ok_or_else(missing)?;
                fs::copy(busybox, made.join("busybox")).map_err(LabError::file(busybox))?;
                cache.keep(&made, &self.name())
            }
        }
    }
}

/// Unpacks every Debian package of the folder `packages`; nothing is installed and none of its scripts is run.
fn unpack(packages: &Path, into: &Path) -> Result<(), LabError> {
    for entry in fs::read_dir(packages).map_err(LabError::file(packages))? {
        let path = entry.map_err(LabError::file(packages))?.path();
        if path.extension().is_some_and(|end| end == "deb") {
            tool::run(Command::new("dpkg-deb").arg("--extract").arg(&path).arg(into))?;
        }
    }
    Ok(())
}
