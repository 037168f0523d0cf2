//! Files that the user names.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Opens a regular file for reading.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let file = without_waiting(path, false)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("not a regular file")),
    }
}

/// Opens a disk, a regular file or a block device: the file and its bytes.
pub(super) fn open_disk(path: &Path, write: bool) -> io::Result<(File, u64)> {
    let mut file = without_waiting(path, write)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("neither a regular file nor a block device"));
    }
    // What the metadata say of a device is 0.
    let size = file.seek(SeekFrom::End(0))?;
    Ok((file, size))
}

/// Opening a pipe would wait for its other end, and a terminal for its line.
fn without_waiting(path: &Path, write: bool) -> io::Result<File> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let opened = File::options().read(true).write(write).custom_flags(flags.bits()).open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        // A socket.
        Some(nix::libc::ENXIO) => io::Error::other("neither a file nor a device"),
        _ => error,
    })?;
    let before = fcntl(file.as_fd(), FcntlArg::F_GETFL).map(OFlag::from_bits_retain)?;
    fcntl(file.as_fd(), FcntlArg::F_SETFL(before - OFlag::O_NONBLOCK))?;
    Ok(file)
}
