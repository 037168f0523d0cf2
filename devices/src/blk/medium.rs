//! What is under a file backend: a file, or what a test puts in its place.

use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of zeroes that are written at once, where the file system cannot zero by itself.
const ZEROES: usize = 1 << 20;

/// Bytes at places. Several threads use it at once.
pub(super) trait Medium: Send + Sync {
    /// Bytes.
    fn size(&self) -> io::Result<u64>;
    /// Fills `data`.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes `data`.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes durable what was written.
    fn sync(&self) -> io::Result<()>;
    /// Makes a range read as zero without writing it. The size stays. [`ErrorKind::Unsupported`] if that cannot be done
    /// here.
    fn clear(&self, how: Clear, offset: u64, len: u64) -> io::Result<()>;
}

/// How a range becomes zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clear {
    /// It gives back the room that it takes.
    Punch,
    /// It keeps it.
    Keep,
}

impl Medium for File {
    fn size(&self) -> io::Result<u64> {
        // Of a block device the metadata do not tell.
        let mut file = self;
        file.seek(SeekFrom::End(0))
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(data, offset)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_all_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    #[cfg(target_os = "linux")]
    fn clear(&self, how: Clear, offset: u64, len: u64) -> io::Result<()> {
        use nix::errno::Errno;
        use nix::fcntl::{FallocateFlags, fallocate};

        let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) else {
            return Err(ErrorKind::Unsupported.into());
        };
        let mode = match how {
            Clear::Punch => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            Clear::Keep => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        loop {
            match fallocate(self, mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len) {
                Err(Errno::EINTR) => {}
                // A block device refuses what is no whole number of its blocks.
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::ENODEV) => {
                    return Err(ErrorKind::Unsupported.into());
                }
                result => return Ok(result?),
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn clear(&self, _: Clear, _: u64, _: u64) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }
}

/// Whether holes can be punched, seen by one behind the end at `end`, which changes nothing.
pub(super) fn can_punch(medium: &dyn Medium, end: u64) -> bool {
    let tried = medium.clear(Clear::Punch, end.next_multiple_of(4096), 4096);
    tried.map_or_else(|error| error.kind() != ErrorKind::Unsupported, |()| true)
}

/// Makes `len` bytes read as zero, by the medium's means if it has any.
pub(super) fn zero(medium: &dyn Medium, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let ways: &[Clear] = if deallocate { &[Clear::Punch, Clear::Keep] } else { &[Clear::Keep] };
    for &how in ways {
        match medium.clear(how, offset, len) {
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            result => return result,
        }
    }
    let zeroes = vec![0; usize::try_from(len).unwrap_or(ZEROES).min(ZEROES)];
    let mut done = 0;
    while done < len {
        let here = (len - done).min(zeroes.len() as u64);
        medium.write(offset + done, &zeroes[..here as usize])?;
        done += here;
    }
    Ok(())
}

/// Gives back the room of a range, if that can be done.
pub(super) fn discard(medium: &dyn Medium, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    match medium.clear(Clear::Punch, offset, len) {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
        result => result,
    }
}

/// Whether what was written can be made durable.
///
/// The kernel tells of pages that it could not write once, and takes them for clean afterwards: a flush after one that
/// failed says nothing about what was written before. So it is not asked again, until the file is opened anew.
#[derive(Default)]
pub(super) struct Durability {
    lost: AtomicBool,
}

impl Durability {
    /// As `sync` says, if it can still tell.
    pub(super) fn sync(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(io::Error::other("an earlier flush failed: what was written before it may be lost"));
        }
        sync().inspect_err(|error| {
            self.lost.store(true, Ordering::Relaxed);
            tracing::error!(%error, "a flush failed: from now on every flush does, until the disk is opened anew");
        })
    }
}
