//! Fetches Debian packages with apt, from the archives that the host's apt uses and beside what the host has: lists and a
//! cache of its own, nothing installed, no root.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use super::{LabError, tool};

/// The keys that Debian's releases are signed with.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// What an archive with packages for a release adds to its name.
const KINDS: [&str; 3] = ["", "-updates", "-security"];
/// And one with later versions, which are taken only if they are asked for.
const BACKPORTS: &str = "-backports";
/// The fields of [`archives`].
const FIELDS: &str = "$(ORIGIN)|$(COMPONENT)|$(CODENAME)|$(REPO_URI)";

/// apt with a configuration of its own.
pub(super) struct Apt {
    /// Not in the cache: for root, apt downloads as a user who may not get there.
    folder: TempDir,
}

/// An archive of Debian's.
#[derive(Debug, PartialEq)]
struct Archive<'a> {
    /// Where it is.
    place: &'a str,
    /// What it adds to a release's name, one of [`KINDS`].
    kind: &'static str,
}

impl Apt {
    /// For packages of `sources`, pairs of a release and an architecture, on a host whose architecture is `host`.
    pub(super) fn new(host: &str, sources: &[(&str, &str)]) -> Result<Self, LabError> {
        if !Path::new(KEYS).exists() {
            return Err(LabError::Host(format!(
                "there is no {KEYS}: the lab is fetched with apt, on Debian with its debian-archive-keyring"
            )));
        }
        let apt = Self { folder: tempfile::tempdir().map_err(LabError::file(&std::env::temp_dir()))? };
        open(apt.folder.path())?;
        for inside in ["lists/partial", "archives/partial"] {
            let path = apt.folder.path().join(inside);
            fs::create_dir_all(&path).map_err(LabError::file(&path))?;
        }
        // What is installed: whatever the host has, all that a package depends on is fetched with it.
        apt.write("none", "")?;
        // The host's proxies and the like, and where its sources are.
        let system = ["Acquire", "Dir::Etc"].map(|what| tool::run(Command::new("apt-config").args(["dump", what])));
        let [acquire, places] = system;
        let configuration = without_targets(&acquire?) + &places? + &configuration(apt.folder.path(), host, sources);
        apt.write("apt.conf", &configuration)?;
        // Which of the host's archives are Debian's, they say themselves. One that cannot be reached may be another's.
        let failed = apt.get(&["update", "-q"]).err().map(|error| format!(": {error}")).unwrap_or_default();
        let told = apt.get(&["indextargets", "--format", FIELDS, "Created-By: Packages"])?;
        let archives = archives(&told);
        if archives.is_empty() {
            return Err(LabError::Host(format!("none of the host's apt sources is an archive of Debian's{failed}")));
        }
        apt.write("sources.list", &sources_list(&archives, sources))?;
        apt.write("apt.conf", &(configuration + &own_sources(apt.folder.path())))?;
        Ok(apt)
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

    /// Downloads one package; the folder that it is in.
    pub(super) fn download(&self, package: &str, architecture: &str) -> Result<TempDir, LabError> {
        let into = self.scratch()?;
        // Whom apt downloads as, who has to write there.
        let partial = self.folder.path().join("lists/partial");
        let owner = fs::metadata(&partial).map_err(LabError::file(&partial))?.uid();
        chown(into.path(), Some(owner), None).map_err(LabError::file(into.path()))?;
        let name = format!("{package}:{architecture}");
        tool::run(self.command("apt-get").args(["download", "-q", &name]).current_dir(into.path()))?;
        Ok(into)
    }

    /// Downloads `packages`, of `suite` where that has them, and all that they depend on; the folder that they are in.
    pub(super) fn download_whole(
        &self,
        packages: &[&str],
        architecture: &str,
        suite: &str,
    ) -> Result<TempDir, LabError> {
        let into = self.scratch()?;
        let partial = into.path().join("partial");
        fs::create_dir(&partial).map_err(LabError::file(&partial))?;
        let archives = format!("Dir::Cache::archives={}", into.path().display());
        let names: Vec<_> = packages.iter().map(|package| format!("{package}:{architecture}")).collect();
        let mut command = self.command("apt-get");
        command.args(["install", "-yq", "--download-only", "--no-install-recommends", "-o", &archives]);
        // Otherwise the archive with security's versions would count for less than the release itself.
        if suite.ends_with(BACKPORTS) {
            command.args(["-t", suite]);
        }
        tool::run(command.args(names))?;
        Ok(into)
    }

    /// A folder that goes with its value.
    fn scratch(&self) -> Result<TempDir, LabError> {
        let folder = TempDir::new_in(self.folder.path()).map_err(LabError::file(self.folder.path()))?;
        open(folder.path())?;
        Ok(folder)
    }

    fn write(&self, name: &str, content: &str) -> Result<(), LabError> {
        let path = self.folder.path().join(name);
        fs::write(&path, content).map_err(LabError::file(&path))
    }

    fn get(&self, arguments: &[&str]) -> Result<String, LabError> {
        tool::run(self.command("apt-get").args(arguments))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.folder.path().join("apt.conf"));
        command
    }
}

/// Lets everybody look into `folder`: what is in it is public.
fn open(folder: &Path) -> Result<(), LabError> {
    fs::set_permissions(folder, Permissions::from_mode(0o755)).map_err(LabError::file(folder))
}

/// The host's settings, but for what else than packages it fetches lists of.
fn without_targets(acquire: &str) -> String {
    acquire.split_inclusive('\n').filter(|line| !line.starts_with("Acquire::IndexTargets")).collect()
}

/// The archives of Debian's among those that apt told, a line of [`FIELDS`] for each.
fn archives(told: &str) -> Vec<Archive<'_>> {
    let mut found = Vec::new();
    for line in told.lines() {
        let fields: Vec<_> = line.splitn(4, '|').collect();
        let ["Debian", "main", release, place] = fields[..] else { continue };
        let (_, kind) = release.split_at(release.find('-').unwrap_or(release.len()));
        let Some(kind) = KINDS.into_iter().find(|known| *known == kind) else { continue };
        let archive = Archive { place, kind };
        // No disc: it has to be changed by hand.
        if !place.starts_with("cdrom:") && !found.contains(&archive) {
            found.push(archive);
        }
    }
    found
}

/// A line for each of `sources` in each of `archives`, which need not be used for that release on the host.
fn sources_list(archives: &[Archive<'_>], sources: &[(&str, &str)]) -> String {
    let mut lines = String::new();
    for (suite, architecture) in sources {
        for Archive { place, kind } in archives {
            // Backports are beside the release itself.
            if kind.is_empty() || !suite.ends_with(BACKPORTS) {
                lines += &format!("deb [arch={architecture} signed-by={KEYS}] {place} {suite}{kind} main\n");
            }
        }
    }
    lines
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
        "Dir::Etc::parts \"/dev/null\";\n\
         Dir::Etc::main \"/dev/null\";\n\
         Dir::Etc::preferences \"/dev/null\";\n\
         Dir::Etc::preferencesparts \"/dev/null\";\n\
         Dir::State \"{folder}\";\n\
         Dir::State::lists \"{folder}/lists\";\n\
         Dir::State::status \"{folder}/none\";\n\
         Dir::State::extended_states \"{folder}/none\";\n\
         Dir::Cache \"{folder}\";\n\
         Dir::Cache::archives \"{folder}/archives\";\n\
         Dir::Log \"{folder}\";\n\
         APT::Architecture \"{host}\";\n\
         APT::Architectures {{{architectures} }};\n\
         Acquire::GzipIndexes \"true\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::Retries \"2\";\n\
         Acquire::http::Timeout \"30\";\n"
    )
}

/// What is added to it once the sources are known.
fn own_sources(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "Dir::Etc::sourcelist \"{folder}/sources.list\";\n\
         Dir::Etc::sourceparts \"/dev/null\";\n\
         APT::Update::Error-Mode \"any\";\n"
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
    fn the_archives_are_those_of_debian_that_the_host_uses() {
        let told = "Debian|main|trixie|http://mirror/debian/\n\
            Debian|contrib|trixie|http://mirror/debian/\n\
            Debian|main|trixie-updates|http://mirror/debian/\n\
            Debian|main|trixie-security|mirror+file:/etc/apt/security|odd\n\
            Debian|main|trixie-proposed-updates|http://mirror/debian/\n\
            Debian|main|trixie|cdrom:[Debian]/\n\
            Another|main|trixie|http://another/debian/\n\
            $(ORIGIN)|main|$(CODENAME)|http://unreachable/debian/\n\n";
        let archive = |place, kind| Archive { place, kind };
        let expected = [
            archive("http://mirror/debian/", ""),
            archive("http://mirror/debian/", "-updates"),
            archive("mirror+file:/etc/apt/security|odd", "-security"),
        ];
        assert_eq!(archives(told), expected);
    }

    #[test]
    fn every_release_has_its_security_and_backports_are_beside_the_release() {
        let archives = [Archive { place: "a:", kind: "" }, Archive { place: "b:", kind: "-security" }];
        let list = sources_list(&archives, &[("one", "amd64"), ("one-backports", "amd64"), ("two", "s390x")]);
        let lines: Vec<_> = list.lines().map(|line| line.replace(&format!(" signed-by={KEYS}]"), "]")).collect();
        let expected = [
            "deb [arch=amd64] a: one main",
            "deb [arch=amd64] b: one-security main",
            "deb [arch=amd64] a: one-backports main",
            "deb [arch=s390x] a: two main",
            "deb [arch=s390x] b: two-security main",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn nothing_of_the_hosts_is_counted_as_there_and_every_architecture_is_named_once() {
        let sources = [("one", "amd64"), ("two", "s390x"), ("three", "s390x")];
        let configuration = configuration(Path::new("/lab"), "amd64", &sources);
        assert!(configuration.contains("APT::Architectures { \"amd64\"; \"s390x\"; };"), "{configuration}");
        assert!(configuration.contains("Dir::State::status \"/lab/none\";"), "{configuration}");
        assert!(!configuration.contains("Sandbox"), "{configuration}");
    }

    #[test]
    fn of_the_hosts_settings_the_lists_of_other_things_are_left_out() {
        let acquire = "Acquire \"\";\nAcquire::IndexTargets::deb::DEP-11 \"\";\nAcquire::http::Proxy \"http://p\";\n";
        assert_eq!(without_targets(acquire), "Acquire \"\";\nAcquire::http::Proxy \"http://p\";\n");
    }
}
