//! A guest's first file system: busybox, the modules, the scripts.

use std::fs;
use std::path::Path;

use super::LabError;
use super::cpio::Archive;
use super::kernel::Kept;

/// The guest's first process, and what it does with each device.
const INIT: &str = include_str!("scripts/init.sh");
const DEVICES: [(&str, &str); 2] =
    [("blk.sh", include_str!("scripts/blk.sh")), ("rng.sh", include_str!("scripts/rng.sh"))];

/// The archive for a guest whose kernel is `kernel` and whose tools are the program `busybox`. The file `/devices` has the
/// lines `devices`, the file `/pattern` is what the guest writes.
pub(super) fn build(kernel: &Kept, busybox: &Path, devices: &str, pattern: &[u8]) -> Result<Vec<u8>, LabError> {
    let mut archive = Archive::default();
    for folder in ["bin", "modules", "scripts"] {
        archive.folder(folder);
    }
    archive.file("bin/busybox", 0o755, &fs::read(busybox).map_err(LabError::file(busybox))?);
    for module in &kernel.modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("modules/{name}"), 0o644, &fs::read(module).map_err(LabError::file(module))?);
    }
    archive.file("init", 0o755, INIT.as_bytes());
    for (name, script) in DEVICES {
        archive.file(&format!("scripts/{name}"), 0o644, script.as_bytes());
    }
    archive.file("devices", 0o644, devices.as_bytes());
    archive.file("pattern", 0o644, pattern);
    Ok(archive.finish())
}
