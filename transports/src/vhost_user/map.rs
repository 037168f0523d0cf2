//! Files of the other side, mapped.
#![allow(unsafe_code)]

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::stat::fstat;
use polyvirt_core::memory::Pages;

use super::guard::{MAPS, Mapping};

/// Why a file could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// It has no bytes to map.
    #[error("nothing to map")]
    Empty,
    /// Its end is beyond what can be addressed.
    #[error("{offset:#x}+{size:#x} wraps around")]
    Wraps {
        /// Where it starts in the file.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// The file has no bytes of its own, or not that many: touching what is missing would be fatal.
    #[error("{offset:#x}+{size:#x} is beyond the end of a file of {len:#x} bytes")]
    TooShort {
        /// Where it starts in the file.
        offset: u64,
        /// Bytes.
        size: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// It is a socket, a pipe, a device …
    #[error("a file descriptor that is no regular file (mode {mode:#o})")]
    NotAFile {
        /// What fstat says.
        mode: u32,
    },
    /// There are so many maps that this one could not be guarded against its file becoming shorter.
    #[error("more than {MAPS} maps in use")]
    TooMany,
    /// The system refused.
    #[error("{call}: {reason}")]
    System {
        /// The call.
        call: &'static str,
        /// What it said.
        reason: String,
    },
}

impl MapError {
    fn system(call: &'static str, reason: impl ToString) -> Self {
        Self::System { call, reason: reason.to_string() }
    }
}

/// Which file a descriptor is of, however it was opened: device and inode. For as long as the file is mapped.
pub(super) type FileId = (u64, u64);

pub(super) fn file_id(file: &OwnedFd) -> Result<FileId, MapError> {
    let about = fstat(file).map_err(|error| MapError::system("fstat", error))?;
    Ok((about.st_dev, about.st_ino))
}

/// Whether bytes of `pages`, which [`map`] made, went away since.
pub(super) fn is_lost(pages: &Pages) -> bool {
    pages.lease().downcast_ref::<Mapping>().is_some_and(Mapping::is_lost)
}

/// Maps `size` bytes from `offset` on, shared. All of them are in the file now; where the file allows that, they stay.
pub fn map(file: OwnedFd, offset: u64, size: u64) -> Result<Pages, MapError> {
    let file = File::from(file);
    let metadata = file.metadata().map_err(|error| MapError::system("fstat", error))?;
    if !metadata.is_file() {
        return Err(MapError::NotAFile { mode: metadata.mode() });
    }
    // A memfd that can be sealed does not shrink from here on; for others, the look at the length is all there is.
    let _ = fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK));
    let len = file.metadata().map_err(|error| MapError::system("fstat", error))?.len();
    let end = offset.checked_add(size).ok_or(MapError::Wraps { offset, size })?;
    if end > len {
        return Err(MapError::TooShort { offset, size, len });
    }
    // In whole pages of the file system, which are huge ones on some.
    let page = metadata.blksize().max(4096);
    let first = offset - offset % page;
    let whole = (end - first).checked_next_multiple_of(page).ok_or(MapError::Wraps { offset, size })?;
    let (Ok(whole), Ok(signed)) = (usize::try_from(whole), i64::try_from(first)) else {
        return Err(MapError::Wraps { offset, size });
    };
    if size == 0 {
        return Err(MapError::Empty);
    }
    let Some(map_len) = NonZeroUsize::new(whole) else { return Err(MapError::Empty) };
    let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
    // SAFETY: a new mapping wherever there is room harms nobody.
    let start = unsafe { mmap(None, map_len, rights, flags, &file, signed) }
        .map_err(|error| MapError::system("mmap", error))?;
    let owner = Arc::new(Mapping::new(start, whole).ok_or(MapError::TooMany)?);
    // SAFETY: `offset - first` is inside the mapping, and `size` bytes from there on too.
    let bytes = unsafe { start.cast::<u8>().add((offset - first) as usize) };
    // SAFETY: readable and writable until the owner is dropped; nobody has a reference to the bytes.
    Ok(unsafe { Pages::new(bytes, size as usize, owner) })
}

/// Memory of our own that the other side can map: `size` bytes, zeroed, of which none will go away.
pub fn memory_file(name: &str, size: u64) -> Result<(OwnedFd, Pages), MapError> {
    let file = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
        .map_err(|error| MapError::system("memfd_create", error))?;
    let file = File::from(file);
    file.set_len(size).map_err(|error| MapError::system("ftruncate", error))?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|error| MapError::system("fcntl", error))?;
    let ours = file.as_fd().try_clone_to_owned().map_err(|error| MapError::system("dup", error))?;
    Ok((file.into(), map(ours, 0, size)?))
}
