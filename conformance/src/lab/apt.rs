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

/// apt with a configuration of its own, for one architecture: where several are asked for and the list of one cannot be had,
/// apt takes none of that archive's.
pub(super) struct Apt {
    /// Not in the cache: for root, apt downloads as a user who may not get there.
    folder: TempDir,
}

/// An archive of Debian's.
#[derive(Debug, PartialEq)]
pub(super) struct Archive {
    /// Where it is.
    place: String,
    /// What it adds to a release's name, one of [`KINDS`].
    kind: &'static str,
}

impl Archive {
    /// Those that the host's apt uses. They say themselves that they are Debian's; the host's lists may not be there.
    pub(super) fn of_the_host(architecture: &str) -> Result<Vec<Self>, LabError> {
        let apt = Apt::empty()?;
        apt.configure(architecture, "")?;
        // One that cannot be reached may be another's.
        let failed = apt.get(&["update", "-q"]).err().map(|error| format!(": {error}")).unwrap_or_default();
        let archives = archives(&apt.get(&["indextargets", "--format", FIELDS, "Created-By: Packages"])?);
        if archives.is_empty() {
            return Err(LabError::Host(format!("none of the host's apt sources is an archive of Debian's{failed}")));
        }
        Ok(archives)
    }
}

impl Apt {
    /// For packages of the releases `suites` for `architecture`, from `archives`.
    pub(super) fn new(archives: &[Archive], architecture: &str, suites: &[&str]) -> Result<Self, LabError> {
        let apt = Self::empty()?;
        apt.write("sources.list", &sources_list(archives, suites))?;
        apt.configure(architecture, &own_sources(apt.folder.path()))?;
        Ok(apt)
    }

    /// Without a configuration.
    fn empty() -> Result<Self, LabError> {
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
        Ok(apt)
    }

    /// Writes the configuration, which ends with the lines `more`.
    fn configure(&self, architecture: &str, more: &str) -> Result<(), LabError> {
        // The host's proxies and the like, and where its sources are.
        let system = |what| tool::run(Command::new("apt-config").args(["dump", what]));
        let own = configuration(self.folder.path(), architecture);
        self.write("apt.conf", &(without_targets(&system("Acquire")?) + &system("Dir::Etc")? + &own + more))
    }

    /// Fetches the lists of packages; once more if that fails, since an archive may be in the middle of an update.
    pub(super) fn update(&self) -> Result<(), LabError> {
        self.get(&["update", "-q"]).or_else(|_| self.get(&["update", "-q"])).map(drop)
    }

    /// The package that `package` stands for now: of the packages without content, the kernel they depend on.
    pub(super) fn current(&self, package: &str) -> Result<String, LabError> {
        let told = tool::run(self.command("apt-cache").args(["depends", "--important", package]))?;
        Ok(depended_kernel(&told).unwrap_or(package).to_owned())
    }

    /// Downloads one package; the folder that it is in.
    pub(super) fn download(&self, package: &str) -> Result<TempDir, LabError> {
        let into = self.scratch()?;
        // Whom apt downloads as, who has to write there.
        let partial = self.folder.path().join("lists/partial");
        let owner = fs::metadata(&partial).map_err(LabError::file(&partial))?.uid();
        chown(into.path(), Some(owner), None).map_err(LabError::file(into.path()))?;
        tool::run(self.command("apt-get").args(["download", "-q", package]).current_dir(into.path()))?;
        Ok(into)
    }

    /// Downloads `packages`, of `suite` where that has them, and all that they depend on; the folder that they are in.
    pub(super) fn download_whole(&self, packages: &[&str], suite: &str) -> Result<TempDir, LabError> {
        let into = self.scratch()?;
        let partial = into.path().join("partial");
        fs::create_dir(&partial).map_err(LabError::file(&partial))?;
        let archives = format!("Dir::Cache::archives={}", into.path().display());
        let mut command = self.command("apt-get");
        command.args(["install", "-yq", "--download-only", "--no-install-recommends", "-o", &archives]);
        // Otherwise the archive with security's versions would count for less than the release itself.
        if suite.ends_with(BACKPORTS) {
            command.args(["-t", suite]);
        }
        tool::run(command.args(packages))?;
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
fn archives(told: &str) -> Vec<Archive> {
    let mut found = Vec::new();
    for line in told.lines() {
        let fields: Vec<_> = line.splitn(4, '|').collect();
        let ["Debian", "main", release, place] = fields[..] else { continue };
        let (_, kind) = release.split_at(release.find('-').unwrap_or(release.len()));
        let Some(kind) = KINDS.into_iter().find(|known| *known == kind) else { continue };
        let archive = Archive { place: place.to_owned(), kind };
        // No disc: it has to be changed by hand.
        if !place.starts_with("cdrom:") && !found.contains(&archive) {
            found.push(archive);
        }
    }
    found
}

/// A line for each of `suites` in each of `archives`, which need not be used for that release on the host.
fn sources_list(archives: &[Archive], suites: &[&str]) -> String {
    let mut lines = String::new();
    for suite in suites {
        for Archive { place, kind } in archives {
            // Backports are beside the release itself.
            if kind.is_empty() || !suite.ends_with(BACKPORTS) {
                lines += &format!("deb [signed-by={KEYS}] {place} {suite}{kind} main\n");
            }
        }
    }
    lines
}

/// apt's configuration, with everything it writes in `folder`.
fn configuration(folder: &Path, architecture: &str) -> String {
    let folder = folder.display();
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
         APT::Architecture \"{architecture}\";\n\
         APT::Architectures {{ \"{architecture}\"; }};\n\
         Acquire::GzipIndexes \"true\";\n\
         Acquire::Languages \"none\";\n\
         Acquire::Retries \"2\";\n\
         Acquire::http::Timeout \"30\";\n"
    )
}

/// What is added to it for sources of its own.
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
        let archive = |place: &str, kind| Archive { place: place.to_owned(), kind };
        let expected = [
            archive("http://mirror/debian/", ""),
            archive("http://mirror/debian/", "-updates"),
            archive("mirror+file:/etc/apt/security|odd", "-security"),
        ];
        assert_eq!(archives(told), expected);
    }

    #[test]
    fn every_release_has_its_security_and_backports_are_beside_the_release() {
        let archives = [("a:", ""), ("b:", "-security")];
        let archives = archives.map(|(place, kind)| Archive { place: place.to_owned(), kind });
        let list =
            sources_list(&archives, &["one", "one-backports", "two"]).replace(&format!("[signed-by={KEYS}] "), "");
        let expected = [
            "deb a: one main",
            "deb b: one-security main",
            "deb a: one-backports main",
            "deb a: two main",
            "deb b: two-security main",
        ];
        assert_eq!(list.lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn nothing_of_the_hosts_is_counted_as_there() {
        let configuration = configuration(Path::new("/lab"), "amd64");
        assert!(configuration.contains("Dir::State::status \"/lab/none\";"), "{configuration}");
        assert!(!configuration.contains("Sandbox"), "{configuration}");
    }

    #[test]
    fn of_the_hosts_settings_the_lists_of_other_things_are_left_out() {
        let acquire = "Acquire \"\";\nAcquire::IndexTargets::deb::DEP-11 \"\";\nAcquire::http::Proxy \"http://p\";\n";
        assert_eq!(without_targets(acquire), "Acquire \"\";\nAcquire::http::Proxy \"http://p\";\n");
    }
}
