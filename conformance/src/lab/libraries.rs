//! The shared libraries that programs need in a guest.

use std::env::consts;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::LabError;
use super::cpio::Archive;

/// Where the unpacked packages in `root` have their libraries.
pub(super) fn folders(root: &Path) -> [PathBuf; 2] {
    ["usr/lib", "lib"].map(|folder| root.join(folder).join(format!("{}-linux-gnu", consts::ARCH)))
}

/// Adds the shared libraries of `programs` to `archive`: those of the packages that are unpacked in `own`, the others
/// from the host. A static program has none.
pub(super) fn add(archive: &mut Archive, own: Option<&Path>, programs: &[&Path]) -> Result<(), LabError> {
    for folder in ["lib", "lib64"] {
        archive.folder(folder);
    }
    for library in find(own, programs)? {
        let name = library.file_name().unwrap_or_default().to_string_lossy();
        let folder = if name.starts_with("ld-linux") { "lib64" } else { "lib" };
        archive.copy(&format!("{folder}/{name}"), 0o755, &library)?;
    }
    Ok(())
}

fn find(own: Option<&Path>, programs: &[&Path]) -> Result<Vec<PathBuf>, LabError> {
    let mut found: Vec<PathBuf> = Vec::new();
    let mut list = Command::new("ldd");
    list.args(programs);
    if let Some(own) = own {
        list.env("LD_LIBRARY_PATH", std::env::join_paths(folders(own)).unwrap_or_default());
    }
    // It fails if one of them is static, and lists the others all the same.
    let told = list.output().map_err(|error| LabError::Missing { program: "ldd".to_owned(), error })?;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    if let Some(missing) = told.lines().find(|line| line.ends_with("=> not found")) {
        return Err(LabError::Failed { command: "ldd".to_owned(), said: missing.trim().to_owned() });
    }
    // The C library opens it when a thread ends.
    let unwinder = ["/lib/x86_64-linux-gnu/libgcc_s.so.1", "/usr/lib/x86_64-linux-gnu/libgcc_s.so.1"];
    let unwinder = unwinder.iter().map(Path::new).find(|path| path.exists());
    for path in told.lines().filter_map(library).chain(unwinder) {
        if !found.iter().any(|known| known.file_name() == path.file_name()) {
            found.push(path.to_owned());
        }
    }
    Ok(found)
}

/// The file that a line of ldd's names.
fn library(line: &str) -> Option<&Path> {
    // "  libz.so.1 => /lib/libz.so.1 (0x…)", or for the loader "  /lib64/ld-linux-x86-64.so.2 (0x…)"
    let (_, path) = line.split_once("=> ").unwrap_or(("", line.trim()));
    path.split(' ').next().map(Path::new).filter(|path| path.is_absolute() && path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_that_are_files() {
        let this = std::env::current_exe().unwrap();
        let (this, name) = (this.display(), "libany.so.1");
        assert_eq!(library(&format!("\t{name} => {this} (0x7f00)")), Some(Path::new(&this.to_string())));
        assert_eq!(library(&format!("\t{this} (0x7f00)")), Some(Path::new(&this.to_string())));
        for line in
            ["\tlinux-vdso.so.1 (0x7ffc)", "\tlibno.so => not found", "/bin/program:", "\tnot a dynamic executable", ""]
        {
            assert_eq!(library(line), None, "{line}");
        }
    }
}
