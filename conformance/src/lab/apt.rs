//! Fetches Debian packages with apt, beside the system's own packages: its own lists, its own cache, nothing installed,
//! no root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{LabError, tool};

/// Debian's archive, and the keys that its releases are signed with.
const ARCHIVE: &str = "http://deb.debian.org/debian";
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// What the host has installed.
const INSTALLED: &str = "/var/lib/dpkg/status";

/// apt with a configuration of its own.
pub(super) struct Apt {
    configuration: PathBuf,
}

impl Apt {
    /// For packages of `sources`, pairs of a release and an architecture, on a host whose architecture is `host`; works
    /// in the existing folder `folder`, which is kept from run to run.
    pub(super) fn new(folder: &Path, host: &str, sources: &[(&str, &str)]) -> Result<Self, LabError> {
        for needed in [KEYS, INSTALLED] {
            if !Path::new(needed).exists() {
                return Err(LabError::Host(format!(
                    "there is no {needed}: the lab is fetched with apt, on Debian with its debian-archive-keyring"
                )));
            }
        }
        for inside in ["lists/partial", "archives/partial"] {
            let path = folder.join(inside);
            fs::create_dir_all(&path).map_err(LabError::file(&path))?;
        }
        let write = |name: &str, content: String| {
            let path = folder.join(name);
            fs::write(&path, content).map_err(LabError::file(&path)).map(|()| path)
        };
        write("sources.list", sources_list(sources))?;
        write("none", String::new())?;
        // A copy: apt takes its locks beside it.
        let installed = fs::read(INSTALLED).map_err(LabError::file(Path::new(INSTALLED)))?;
        write("installed", without_emulators(&String::from_utf8_lossy(&installed)))?;
        // The system's proxies and the like.
        let system = tool::run(Command::new("apt-config").args(["dump", "Acquire"]))?;
        let configuration = write("apt.conf", system + &configuration(folder, host, sources))?;
        Ok(Self { configuration })
    }

    /// Fetches the lists of packages; once more if that fails, since an archive may be in the middle of an update.
    pub(super) fn update(&self) -> Result<(), LabError> {
        self.get(&["update", "-q"]).or_else(|_| self.get(&["update", "-q"])).map(drop)
    }

    /// The package that `package` stands for now: of the packages without content, the kernel they depend on.
    pub(super) fn current(&self, package: &str, architecture: &str) -> Result<String, LabError> {
        let name = format!("{package}:{architecture}");
        let told = tool::run(self.command("apt-cache").args(["depends", "--important", &name]))?;
        Ok(depended_kernel(&told).unwrap_or(package).to_owned())
    }

    /// Downloads one package into the folder `into`.
    pub(super) fn download(&self, package: &str, architecture: &str, into: &Path) -> Result<(), LabError> {
        let name = format!("{package}:{architecture}");
        tool::run(self.command("apt-get").args(["download", "-q", &name]).current_dir(into)).map(drop)
    }

    /// Downloads a package for the host, and what it depends on and the host does not have, into the folder `into`.
    pub(super) fn download_with_what_is_missing(
        &self,
        package: &str,
        suite: &str,
        into: &Path,
    ) -> Result<(), LabError> {
        let archives = into.join("partial");
        fs::create_dir_all(&archives).map_err(LabError::file(&archives))?;
        let into = format!("Dir::Cache::archives={}", into.display());
        // Reinstall: what the host has itself is fetched too.
        let download = ["install", "-yq", "--download-only", "--reinstall", "--no-install-recommends"];
        self.get(&[&download as &[_], &["-t", suite, "-o", &into, package]].concat()).map(drop)
    }

    fn get(&self, arguments: &[&str]) -> Result<String, LabError> {
        tool::run(self.command("apt-get").args(arguments))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.configuration);
        command
    }
}

/// What is installed, but for QEMU's packages: beside those of one release, apt has none of another's.
fn without_emulators(installed: &str) -> String {
    installed.split_inclusive("\n\n").filter(|package| !package.starts_with("Package: qemu-")).collect()
}

fn sources_list(sources: &[(&str, &str)]) -> String {
    sources
        .iter()
        .map(|(suite, architecture)| format!("deb [arch={architecture} signed-by={KEYS}] {ARCHIVE} {suite} main\n"))
        .collect()
}

/// apt's configuration, with everything it writes in `folder`.
fn configuration(folder: &Path, host: &str, sources: &[(&str, &str)]) -> String {
    let folder = folder.display();
    let mut architectures = vec![host];
    for (_, architecture) in sources {
        if !architectures.contains(architecture) {
            architectures.push(architecture);
        }
    }
    let architectures: String = architectures.iter().map(|name| format!(" \"{name}\";")).collect();
    format!(
        "Dir::Etc::sourcelist \"{folder}/sources.list\";\n\
         Dir::Etc::sourceparts \"/dev/null\";\n\
         Dir::Etc::parts \"/dev/null\";\n\
         Dir::Etc::main \"/dev/null\";\n\
         Dir::Etc::preferences \"/dev/null\";\n\
         Dir::Etc::preferencesparts \"/dev/null\";\n\
         Dir::State \"{folder}\";\n\
         Dir::State::lists \"{folder}/lists\";\n\
         Dir::State::status \"{folder}/installed\";\n\
         Dir::State::extended_states \"{folder}/none\";\n\
         Dir::Cache \"{folder}\";\n\
         Dir::Cache::archives \"{folder}/archives\";\n\
         Dir::Log \"{folder}\";\n\
         APT::Architecture \"{host}\";\n\
         APT::Architectures {{{architectures} }};\n\
         APT::Sandbox::User \"root\";\n\
         APT::Update::Error-Mode \"any\";\n\
         Acquire::GzipIndexes \"true\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::Retries \"2\";\n\
         Acquire::http::Timeout \"30\";\n"
    )
}

/// The kernel that `apt-cache depends` names.
fn depended_kernel(told: &str) -> Option<&str> {
    let depends = told.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let names = depends.map(|name| name.split(':').next().unwrap_or(name));
    names.into_iter().find(|name| name.starts_with("linux-image-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_without_content_stands_for_its_kernel() {
        let told = "linux-image-s390x:s390x\n  Depends: linux-image-6.1.0-50-s390x:s390x\n";
        assert_eq!(depended_kernel(told), Some("linux-image-6.1.0-50-s390x"));
        assert_eq!(depended_kernel("user-mode-linux\n  Depends: libc6\n"), None);
    }

    #[test]
    fn every_source_is_signed_and_every_architecture_is_named_once() {
        let sources = [("one", "amd64"), ("two", "s390x"), ("three", "s390x")];
        let list = sources_list(&sources);
        assert_eq!(list.lines().filter(|line| line.contains("signed-by=/usr/share/keyrings/")).count(), 3);
        let configuration = configuration(Path::new("/lab"), "amd64", &sources);
        assert!(configuration.contains("APT::Architectures { \"amd64\"; \"s390x\"; };"), "{configuration}");
    }

    #[test]
    fn what_the_host_has_of_qemu_is_not_told() {
        let installed = "Package: qemu-utils\nVersion: 10\n\nPackage: xz-utils\nVersion: 5\n\nPackage: qemu-user\n";
        assert_eq!(without_emulators(installed), "Package: xz-utils\nVersion: 5\n\n");
    }
}
