//! Machines whose kernel is Xen. Domain 0 has the same kernel as the guest, if there is one, and is the host.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Archive;
use super::guests::Xen;
use super::kernel::Kept;
use super::parts::Part;
use super::{Cache, LabError, libraries, machine, tool};

/// Debian's packages: the hypervisor and its tools.
pub(super) const PACKAGES: [&str; 3] = ["xen-hypervisor-4.17-amd64", "xen-utils-4.17", "xenstore-utils"];
/// The release that they are from.
pub(super) const SUITE: &str = "bookworm";

/// The hypervisor, as it is in its package.
const COMPRESSED: &str = "boot/xen-4.17-amd64.gz";
/// Where the packages have the tools, which look for each other there.
const TOOLS: &str = "usr/lib/xen-4.17/bin";
const USED: [&str; 4] = ["xl", "xenstored", "xenconsoled", "xen-init-dom0"];
/// Domain 0's first process.
const INIT: &str = include_str!("scripts/dom0.sh");
/// What programs find there at the least.
const ACCOUNTS: [(&str, &str); 4] =
    [("passwd", "root:x:0:0::/:/bin/sh\n"), ("group", "root:x:0:\n"), ("fstab", ""), ("xen/xl.conf", "")];

/// What a boot needs.
pub(super) struct Boot<'a> {
    /// The kernel of both domains.
    pub(super) kernel: &'a Kept,
    /// The guest's first file system.
    pub(super) initramfs: &'a [u8],
    /// The static program that is domain 0's tools.
    pub(super) busybox: &'a Path,
    /// The disk.
    pub(super) image: &'a Path,
    /// A folder for what is made for this boot.
    pub(super) folder: &'a Path,
}

/// The command that boots the machine.
pub(super) fn command(xen: &Xen, cache: &Cache, boot: &Boot<'_>) -> Result<Command, LabError> {
    let kernel = vmlinux(boot.kernel, boot.folder)?;
    let mut archive = first_files(cache, boot.kernel, boot.busybox, INIT, &USED)?;
    archive.folder("guest");
    archive.file("guest/kernel", 0o644, &fs::read(&kernel).map_err(LabError::file(&kernel))?);
    archive.file("guest/initramfs", 0o644, boot.initramfs);
    archive.file("guest/domain.cfg", 0o644, xen.domain.as_bytes());
    let initramfs = write(boot.folder, "dom0", &archive.finish())?;
    let mut command = machine::emulator(&xen.emulator(), xen.program, cache);
    command.args(["-cpu", xen.cpu, "-m", "2048M"]);
    boots(&mut command, cache, "1024M", &kernel, "", &initramfs);
    let mut drive = std::ffi::OsString::from("if=none,id=disk,format=raw,file=");
    drive.push(boot.image);
    command.arg("-drive").arg(drive).args(["-device", "nvme,drive=disk,serial=lab"]);
    Ok(command)
}

/// Adds to `command`, a QEMU, that it boots Xen with a domain 0 of so much `memory`, whose kernel gets `words` besides.
pub(super) fn boots(command: &mut Command, cache: &Cache, memory: &str, kernel: &Path, words: &str, initramfs: &Path) {
    let mut modules = kernel.as_os_str().to_owned();
    // One comma ends a module, two are one.
    modules.push(format!(" console=hvc0 rdinit=/init quiet panic=-1 {},", words.replace(',', ",,")));
    modules.push(initramfs);
    command
        .args(["-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
        .arg("-kernel")
        .arg(Part::Xen.place(cache).join("xen"))
        .args(["-append", &format!("console=com1 com1=115200,8n1 dom0_mem={memory},max:{memory}")])
        .arg("-initrd")
        .arg(modules);
}

/// The kernel's own file, which is made in `folder` if the image is compressed: an emulated processor takes seconds to
/// unpack it, at each boot.
pub(super) fn vmlinux(kernel: &Kept, folder: &Path) -> Result<PathBuf, LabError> {
    let image = fs::read(&kernel.image).map_err(LabError::file(&kernel.image))?;
    let Some(payload) = payload(&image) else { return Ok(kernel.image.clone()) };
    let packed = write(folder, "vmlinux.xz", payload)?;
    tool::run(Command::new("xz").args(["--decompress", "--single-stream"]).arg(&packed))?;
    Ok(packed.with_extension(""))
}

pub(super) fn write(folder: &Path, name: &str, content: &[u8]) -> Result<PathBuf, LabError> {
    let path = folder.join(name);
    fs::write(&path, content).map_err(LabError::file(&path)).map(|()| path)
}

/// What is in a domain's first file system anyway: busybox, the modules, `tools` of Xen's, this program, the libraries
/// of all of them; `init` is the first process.
pub(super) fn first_files(
    cache: &Cache,
    kernel: &Kept,
    busybox: &Path,
    init: &str,
    tools: &[&str],
) -> Result<Archive, LabError> {
    if cfg!(not(target_arch = "x86_64")) {
        return Err(LabError::Host("the lab's Xen runs this program on x86_64 only".to_owned()));
    }
    let unpacked = Part::Xen.place(cache);
    let mut archive = Archive::default();
    for folder in ["bin", "etc", "etc/xen", "modules", "var", "var/lib", "var/log", "var/log/xen"] {
        archive.folder(folder);
    }
    for (end, _) in TOOLS.match_indices('/').chain([(TOOLS.len(), "")]) {
        archive.folder(&TOOLS[..end]);
    }
    let this = std::env::current_exe().map_err(LabError::file(Path::new("/proc/self/exe")))?;
    let paths: Vec<_> = tools.iter().map(|name| unpacked.join(TOOLS).join(name)).collect();
    let store = unpacked.join("usr/bin/xenstore");
    archive.copy("bin/busybox", 0o755, busybox)?;
    archive.copy("bin/polyvirt", 0o755, &this)?;
    // One program, which goes by the name it was called by.
    archive.copy("bin/xenstore-exists", 0o755, &store)?;
    for (name, path) in tools.iter().zip(&paths) {
        archive.copy(&format!("{TOOLS}/{name}"), 0o755, path)?;
    }
    let programs: Vec<&Path> = paths.iter().map(PathBuf::as_path).chain([&*store, &*this]).collect();
    libraries::add(&mut archive, Some(&unpacked), &programs)?;
    for module in &kernel.modules {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.copy(&format!("modules/{name}"), 0o644, module)?;
    }
    for (name, content) in ACCOUNTS {
        archive.file(&format!("etc/{name}"), 0o644, content.as_bytes());
    }
    archive.file("init", 0o755, init.as_bytes());
    Ok(archive)
}

/// The kernel's own file inside a bzImage, if it is compressed with xz (Documentation/x86/boot.rst).
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(*image.get(at..)?.first_chunk()?) as usize);
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + word(0x248)?;
    let payload = image.get(start..)?.get(..word(0x24c)?)?;
    payload.starts_with(b"\xfd7zXZ\0").then_some(payload)
}

/// Unpacks the hypervisor of the packages in `unpacked` to where [`command`] looks for it.
pub(super) fn unpack(unpacked: &Path) -> Result<(), LabError> {
    let packed = unpacked.join(COMPRESSED);
    if !packed.is_file() {
        return Err(LabError::Package { package: PACKAGES[0].to_owned(), missing: COMPRESSED.to_owned() });
    }
    tool::run(Command::new("gzip").args(["--decompress", "--force"]).arg(&packed))?;
    let (plain, place) = (packed.with_extension(""), unpacked.join("xen"));
    fs::rename(&plain, &place).map_err(LabError::file(&plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_found_inside_its_image_and_nothing_is_found_in_a_short_one() {
        const XZ: &[u8] = b"\xfd7zXZ\0kernel";
        let mut image = vec![0; 5 * 512 + 64];
        image[0x1f1] = 3;
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(XZ.len() as u32).to_le_bytes());
        let start = 4 * 512 + 16;
        assert_eq!(payload(&image), None, "not compressed with xz");
        image[start..start + XZ.len()].copy_from_slice(XZ);
        assert_eq!(payload(&image), Some(XZ));
        for len in [0, 0x1f2, 0x24e, start + XZ.len() - 1] {
            assert_eq!(payload(&image[..len]), None, "{len}");
        }
    }
}
