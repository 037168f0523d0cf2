//! Keeps an image to one writer, or to readers: by the locks that QEMU's block layer takes (`block/file-posix.c`), so
//! that QEMU, its tools and we exclude each other.
//!
//! Each permission has two bytes of the file. A lock on the one says "I do this", a lock on the other "nobody else may do
//! this". All are shared locks: a conflict is found by asking whether the byte that speaks against it is locked.

use std::fs::File;
use std::os::fd::AsFd as _;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, flock, off_t};

/// Where the bytes of what is done begin.
const DONE: off_t = 100;
/// Where the bytes of what nobody else may do begin.
const UNSHARED: off_t = 200;

/// The permissions that matter here, by their number: reading what was written, and writing.
const READ: off_t = 0;
const WRITE: off_t = 1;

/// Why an image is not locked.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unlocked {
    /// Somebody else has it.
    Taken,
    /// The file system has no such locks, or something else is wrong.
    Failed(Errno),
}

/// Locks `image` for as long as it is open: against other writers, and, to write, against whoever counts on there being
/// none. That it grows or shrinks is for others to decide.
pub(super) fn lock(image: &File, write: bool) -> Result<(), Unlocked> {
    let done: &[off_t] = if write { &[READ, WRITE] } else { &[READ] };
    // First told, then asked: of two at once each sees the other, and at most one goes on.
    for at in done.iter().map(|permission| DONE + permission).chain([UNSHARED + WRITE]) {
        fcntl(image.as_fd(), FcntlArg::F_OFD_SETLK(&byte(at, F_RDLCK))).map_err(|reason| match reason {
            Errno::EACCES | Errno::EAGAIN => Unlocked::Taken,
            reason => Unlocked::Failed(reason),
        })?;
    }
    for at in done.iter().map(|permission| UNSHARED + permission).chain([DONE + WRITE]) {
        let mut asked = byte(at, F_WRLCK);
        fcntl(image.as_fd(), FcntlArg::F_OFD_GETLK(&mut asked)).map_err(Unlocked::Failed)?;
        if asked.l_type != F_UNLCK as i16 {
            return Err(Unlocked::Taken);
        }
    }
    Ok(())
}

fn byte(at: off_t, kind: i32) -> flock {
    flock { l_type: kind as i16, l_whence: SEEK_SET as i16, l_start: at, l_len: 1, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writes_or_several_read() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || image.reopen().unwrap();
        let writer = open();
        assert_eq!(lock(&writer, true), Ok(()));
        assert_eq!(lock(&open(), true), Err(Unlocked::Taken));
        assert_eq!(lock(&open(), false), Err(Unlocked::Taken));
        drop(writer);
        let readers = [open(), open()];
        for reader in &readers {
            assert_eq!(lock(reader, false), Ok(()));
        }
        assert_eq!(lock(&open(), true), Err(Unlocked::Taken));
        // What was tried in vain holds nothing.
        assert_eq!(lock(&open(), false), Ok(()));
        drop(readers);
        assert_eq!(lock(&open(), true), Ok(()));
    }
}
