//! A kernel out of its package: the image, and the modules that a guest loads.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::guests::{Guest, Kernel, Kind};
use super::parts::Part;
use super::{Cache, LabError, tool};

/// Files of a kernel that is kept: the image; the modules that were asked for; the drivers that it does not have.
const IMAGE: &str = "image";
const WANTED: &str = "wanted";
const LACKING: &str = "lacking";
/// The folder of its modules, whose names in order are the order of loading.
const MODULES: &str = "modules";

/// A kernel that was fetched.
#[derive(Debug)]
pub(super) struct Kept {
    /// The file that boots.
    pub(super) image: PathBuf,
    /// In the order of loading.
    pub(super) modules: Vec<PathBuf>,
    /// The drivers that it has neither built in nor as a module.
    lacking: String,
}

impl Kept {
    /// `kernel`, which was fetched for `guest`.
    pub(super) fn of(kernel: &'static Kernel, guest: &Guest, cache: &Cache) -> Result<Self, LabError> {
        let place = Part::Kernel(kernel).place(cache);
        let not_there = || LabError::NotSetUp { what: place.display().to_string(), guest: guest.name };
        Self::open(&place, kernel).ok_or_else(not_there)
    }

    /// What [`keep`] made of `kernel` in `folder`; none if it is not there, or was made for other modules.
    pub(super) fn open(folder: &Path, kernel: &Kernel) -> Option<Self> {
        let wanted = fs::read_to_string(folder.join(WANTED)).ok()?;
        if wanted != self::wanted(kernel).join(" ") {
            return None;
        }
        let entries = fs::read_dir(folder.join(MODULES)).ok()?;
        let mut modules: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        modules.sort();
        let lacking = fs::read_to_string(folder.join(LACKING)).ok()?;
        Some(Self { image: folder.join(IMAGE), modules, lacking })
    }

    /// Whether it has a driver for a device.
    pub(super) fn drives(&self, kind: Kind) -> bool {
        !self.lacking.split(' ').any(|module| module == kind.driver())
    }
}

/// Everything that is to be loaded if it is there: what the machine needs, and the drivers of the lab's devices.
fn wanted(kernel: &Kernel) -> Vec<&'static str> {
    kernel.modules.iter().copied().chain(Kind::ALL.map(Kind::driver)).collect()
}

/// Takes out of the unpacked package what a guest needs, and writes it to the new folder `made`.
pub(super) fn keep(kernel: &Kernel, unpacked: &Path, made: &Path) -> Result<(), LabError> {
    let missing = |missing: String| LabError::Package { package: kernel.package.to_owned(), missing };
    let (folder, prefix) = kernel.image;
    let image = files(&unpacked.join(folder))
        .into_iter()
        .find(|path| name(path).starts_with(prefix))
        .ok_or_else(|| missing(format!("{folder}/{prefix}…")))?;
    let tree = Tree::find(unpacked).ok_or_else(|| missing("kernel modules".to_owned()))?;
    let (wanted, lacking): (Vec<_>, Vec<_>) =
        wanted(kernel).into_iter().partition(|module| kernel.modules.contains(module) || tree.has(module));
    let order = tree.order(kernel.package, &wanted)?;

    let modules = made.join(MODULES);
    fs::create_dir_all(&modules).map_err(LabError::file(&modules))?;
    let place = made.join(IMAGE);
    fs::copy(&image, &place).map_err(LabError::file(&image))?;
    for (number, (module, content)) in order.iter().enumerate() {
        let place = modules.join(format!("{number:02}-{module}.ko"));
        fs::write(&place, content).map_err(LabError::file(&place))?;
    }
    for (file, names) in [(WANTED, self::wanted(kernel)), (LACKING, lacking)] {
        let place = made.join(file);
        fs::write(&place, names.join(" ")).map_err(LabError::file(&place))?;
    }
    Ok(())
}

/// The modules of one kernel.
struct Tree {
    /// Where each is, by its name with underscores.
    modules: BTreeMap<String, PathBuf>,
    /// The names of those that are part of the image.
    builtin: Vec<String>,
}

impl Tree {
    /// The first that is anywhere below `unpacked`.
    fn find(unpacked: &Path) -> Option<Self> {
        let root = ["lib/modules", "usr/lib/modules", "usr/lib/uml/modules"]
            .iter()
            .find_map(|path| entries(&unpacked.join(path)).into_iter().find(|path| path.join("kernel").is_dir()))?;
        let modules = below(&root)
            .into_iter()
            .filter(|path| [".ko", ".ko.xz"].iter().any(|end| name(path).ends_with(end)))
            .map(|path| (module_name(&path), path))
            .collect();
        let builtin = fs::read_to_string(root.join("modules.builtin")).unwrap_or_default();
        let builtin = builtin.lines().map(|line| module_name(Path::new(line))).collect();
        Some(Self { modules, builtin })
    }

    fn has(&self, module: &str) -> bool {
        self.modules.contains_key(module) || self.builtin.iter().any(|builtin| builtin == module)
    }

    /// Name and content of each module of `wanted` and of what it depends on, in the order of loading.
    fn order(&self, package: &str, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>, LabError> {
        let mut order: Vec<(String, Vec<u8>)> = Vec::new();
        // Depth first: a module is loaded once everything that it depends on has been.
        let mut stack: Vec<String> = wanted.iter().rev().map(|&module| module.to_owned()).collect();
        let mut opened: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        while let Some(module) = stack.pop() {
            if self.builtin.contains(&module) || order.iter().any(|(done, _)| *done == module) {
                continue;
            }
            if let Some(content) = opened.remove(&module) {
                order.push((module, content));
                continue;
            }
            let Some(path) = self.modules.get(&module) else {
                return Err(LabError::Package { package: package.to_owned(), missing: format!("module {module}") });
            };
            let content = load(path)?;
            let needs = dependencies(&content);
            opened.insert(module.clone(), content);
            stack.push(module);
            stack.extend(needs.into_iter().filter(|needed| !opened.contains_key(needed)));
        }
        Ok(order)
    }
}

/// A module's content, decompressed.
fn load(path: &Path) -> Result<Vec<u8>, LabError> {
    if !name(path).ends_with(".xz") {
        return fs::read(path).map_err(LabError::file(path));
    }
    // Into a file beside it: what `tool` returns is text.
    tool::run(Command::new("xz").args(["--decompress", "--keep", "--force"]).arg(path))?;
    let plain = path.with_extension("");
    fs::read(&plain).map_err(LabError::file(&plain))
}

/// The modules that a module says it depends on, in its section `.modinfo`.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = module[at + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// `virtio_blk` for `…/virtio_blk.ko.xz`; a dash is an underscore.
fn module_name(path: &Path) -> String {
    let name = name(path);
    name.split(".ko").next().unwrap_or_default().replace('-', "_")
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// What is in a folder, sorted; nothing if it is none.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

fn files(folder: &Path) -> Vec<PathBuf> {
    entries(folder).into_iter().filter(|path| path.is_file()).collect()
}

/// Every file below a folder. A package is not deep.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in entries(&folder) {
            if path.is_dir() && !path.is_symlink() {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    static KERNEL: Kernel = Kernel {
        package: "linux-image-test",
        purpose: "",
        architecture: "test",
        suite: "test",
        image: ("boot", "vmlinuz-"),
        modules: &["virtio_pci"],
    };

    /// A package with modules that depend on each other as the text after their names says.
    fn package(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("lib/modules/6.1.0-test");
        let drivers = tree.join("kernel/drivers");
        fs::create_dir_all(&drivers).unwrap();
        fs::create_dir(folder.path().join("boot")).unwrap();
        fs::write(folder.path().join("boot/System.map-6.1.0-test"), "").unwrap();
        fs::write(folder.path().join("boot/vmlinuz-6.1.0-test"), "kernel").unwrap();
        fs::write(tree.join("modules.builtin"), "kernel/drivers/virtio/virtio.ko\n").unwrap();
        for (module, depends) in modules {
            fs::write(drivers.join(module), format!("ELF\0license=GPL\0depends={depends}\0name=x\0")).unwrap();
        }
        folder
    }

    #[test]
    fn modules_come_after_what_they_depend_on_and_once() {
        let package = package(&[
            ("virtio_pci.ko", "virtio-pci-modern-dev,virtio,virtio_ring"),
            ("virtio-pci-modern-dev.ko", "virtio_ring"),
            ("virtio_ring.ko", ""),
            ("virtio_blk.ko", "virtio,virtio_ring"),
            ("unwanted.ko", ""),
        ]);
        let made = tempfile::tempdir().unwrap();
        keep(&KERNEL, package.path(), made.path()).unwrap();
        let kept = Kept::open(made.path(), &KERNEL).unwrap();
        assert_eq!(fs::read_to_string(kept.image).unwrap(), "kernel");
        let names: Vec<_> = kept.modules.iter().map(|path| name(path)).collect();
        assert_eq!(names, ["00-virtio_ring.ko", "01-virtio_pci_modern_dev.ko", "02-virtio_pci.ko", "03-virtio_blk.ko"]);
    }

    #[test]
    fn what_a_package_lacks_is_named() {
        let made = tempfile::tempdir().unwrap();
        let none = package(&[("virtio_blk.ko", "")]);
        let error = keep(&KERNEL, none.path(), made.path()).unwrap_err();
        assert_eq!(error.to_string(), "the package linux-image-test has no module virtio_pci");
        fs::remove_file(none.path().join("boot/vmlinuz-6.1.0-test")).unwrap();
        let error = keep(&KERNEL, none.path(), made.path()).unwrap_err();
        assert_eq!(error.to_string(), "the package linux-image-test has no boot/vmlinuz-…");
    }

    #[test]
    fn modules_that_depend_on_each_other_end() {
        let circle = package(&[("virtio_pci.ko", "virtio_blk"), ("virtio_blk.ko", "virtio_pci")]);
        let made = tempfile::tempdir().unwrap();
        keep(&KERNEL, circle.path(), made.path()).unwrap();
        let kept = Kept::open(made.path(), &KERNEL).unwrap();
        assert_eq!((kept.modules.len(), &*kept.lacking), (2, "virtio_rng"));
    }

    #[test]
    fn what_was_kept_for_other_modules_is_not_taken() {
        let package = package(&[("virtio_pci.ko", ""), ("virtio_blk.ko", "")]);
        let made = tempfile::tempdir().unwrap();
        keep(&KERNEL, package.path(), made.path()).unwrap();
        let other = Kernel { modules: &["virtio_mmio"], ..KERNEL };
        assert!(Kept::open(made.path(), &other).is_none());
        assert!(Kept::open(&made.path().join("nowhere"), &KERNEL).is_none());
    }
}
