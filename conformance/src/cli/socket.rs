//! The socket that front ends connect to.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt as _, lchown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::stat::{Mode, umask};

use super::sandbox::User;

/// `--socket-mode`: rights in octal.
pub(super) fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("expected rights in octal, as 660".into()),
    }
}

/// Listens at `path`, with the rights `mode` from the first moment on, for `user` if there is one. A socket that nobody
/// listens on any more is replaced; anything else that is there stays.
pub(super) fn bind(path: &Path, mode: u32, user: Option<User>) -> io::Result<UnixListener> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // One at a time looks whether somebody listens, and takes the place: between the two nobody else is to.
    let turn = File::open(folder)?;
    turn.lock()?;
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(metadata) => {
            let left_behind = metadata.file_type().is_socket()
                && UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
            if !left_behind {
                return Err(ErrorKind::AddrInUse.into());
            }
            fs::remove_file(path)?;
        }
    }
    // Of the process, which has no other threads yet.
    let before = umask(Mode::from_bits_truncate(0o777 & !mode));
    let bound = UnixListener::bind(path);
    umask(before);
    let listener = bound?;
    if let Some(user @ User { uid, gid }) = user
        && let Err(error) = lchown(path, Some(uid), Some(gid))
    {
        // Nobody is going to listen.
        fs::remove_file(path)?;
        return Err(io::Error::other(format!("--uid {user}: {error}")));
    }
    Ok(listener)
}
