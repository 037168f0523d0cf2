//! What guests are put together from: each part is fetched once and kept.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::apt::Apt;
use super::guests::{Guest, Kernel, Machine, STABLE};
use super::{Cache, LabError, firmware, kernel, tool, xen};

/// Something that is fetched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Part {
    /// A package of QEMU's, of a release, with all that it depends on.
    Emulator(&'static str, &'static str),
    /// A kernel with its modules.
    Kernel(&'static Kernel),
    /// The guest's tools: one static program of a release, for an architecture.
    Tools(&'static str, &'static str),
    /// A package for machines or for this program, with all that it depends on.
    Support(&'static str),
    /// Xen with its tools, and all that they depend on.
    Xen,
}

/// The file that says what a part was made of, where a part of that name may have been made of something else.
const MADE_OF: &str = "made-of";

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
            Machine::Firmware(machine) => {
                return [machine.qemu.emulator()].into_iter().chain(firmware::parts(machine)).collect();
            }
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
            Self::Support(package) => format!("support/{package}"),
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
            Self::Emulator(..) | Self::Support(_) | Self::Xen => {
                fs::read_to_string(place.join(MADE_OF)).is_ok_and(|made_of| made_of == self.made_of())
            }
            Self::Tools(..) => place.is_dir(),
            Self::Kernel(kernel) => kernel::Kept::open(&place, kernel).is_some(),
        }
    }

    /// The release and the architecture it comes from.
    pub(super) fn source<'a>(&self, host: &'a str) -> (&'static str, &'a str) {
        match self {
            Self::Emulator(_, suite) => (suite, host),
            Self::Kernel(kernel) => (kernel.suite, kernel.architecture),
            Self::Tools(suite, architecture) => (suite, architecture),
            Self::Support(_) => (STABLE, host),
            Self::Xen => (xen::SUITE, "amd64"),
        }
    }

    /// The packages that are kept unpacked with all that they depend on, and their release; of any other part, none.
    fn whole(&self) -> Option<(&[&'static str], &'static str)> {
        match self {
            Self::Emulator(package, suite) => Some((std::slice::from_ref(package), suite)),
            Self::Support(package) => Some((std::slice::from_ref(package), STABLE)),
            Self::Xen => Some((&xen::PACKAGES, xen::SUITE)),
            Self::Kernel(_) | Self::Tools(..) => None,
        }
    }

    /// What is written beside them.
    fn made_of(&self) -> String {
        self.whole().map(|(packages, suite)| format!("{suite}: {}", packages.join(" "))).unwrap_or_default()
    }

    /// Fetches it with `apt`, which is for its architecture, and keeps it.
    pub(super) fn fetch(&self, apt: &Apt, cache: &Cache) -> Result<(), LabError> {
        let scratch = cache.scratch()?;
        let folder = |name: &str| {
            let path = scratch.path().join(name);
            fs::create_dir(&path).map_err(LabError::file(&path)).map(|()| path)
        };
        let (unpacked, made) = (folder("unpacked")?, folder("made")?);
        let packages = match self {
            Self::Emulator(..) | Self::Support(_) | Self::Xen => {
                let (packages, suite) = self.whole().unwrap_or_default();
                apt.download_whole(packages, suite)?
            }
            Self::Kernel(kernel) => {
                let current = apt.current(kernel.package)?;
                apt.download(&current)?
            }
            Self::Tools(..) => apt.download(TOOLS)?,
        };
        unpack(packages.path(), &unpacked, |package| {
            // Domain 0 has this program too, and so the C library that it was built with: the host's.
            *self != Self::Xen || !package.starts_with("libc6_")
        })?;
        match self {
            Self::Emulator(..) | Self::Support(_) | Self::Xen => {
                if *self == Self::Xen {
                    xen::unpack(&unpacked)?;
                }
                let made_of = unpacked.join(MADE_OF);
                fs::write(&made_of, self.made_of()).map_err(LabError::file(&made_of))?;
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

/// Unpacks the Debian packages of the folder `packages` that are `wanted` by their files' names; nothing is installed and
/// none of its scripts is run.
fn unpack(packages: &Path, into: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), LabError> {
    for entry in fs::read_dir(packages).map_err(LabError::file(packages))? {
        let path = entry.map_err(LabError::file(packages))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".deb") && wanted(&name) {
            tool::run(Command::new("dpkg-deb").arg("--extract").arg(&path).arg(into))?;
        }
    }
    plain(into).map_err(LabError::file(into))
}

/// Takes from everything below `folder` that who starts it becomes another user: it is nothing that is installed.
fn plain(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (kind, mode) = (entry.file_type()?, entry.metadata()?.permissions().mode());
        if kind.is_dir() {
            plain(&entry.path())?;
        } else if kind.is_file() && mode & 0o6000 != 0 {
            fs::set_permissions(entry.path(), Permissions::from_mode(mode & 0o777))?;
        }
    }
    Ok(())
}
