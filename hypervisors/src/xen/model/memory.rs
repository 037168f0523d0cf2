//! A domain's memory, and mappings of it.
#![allow(unsafe_code)]

use std::any::Any;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use nix::unistd::ftruncate;
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::Pages;

use super::super::abi::PAGE_SIZE;
use super::refused;
use crate::mapping::Mapping;

/// A domain's memory: frames of [`PAGE_SIZE`] bytes, numbered from 0.
pub(super) struct Ram {
    file: OwnedFd,
    frames: u32,
    /// As the domain itself sees it.
    pages: Pages,
}

impl Ram {
    /// `frames` frames, zeroed.
    pub(super) fn new(frames: u32) -> Result<Self, HypervisorError> {
        let failed = |error: nix::Error| refused("memfd_create", error);
        let file = memfd_create(c"domain", MFdFlags::MFD_CLOEXEC).map_err(failed)?;
        ftruncate(&file, frames as i64 * PAGE_SIZE as i64).map_err(failed)?;
        let all: Vec<_> = (0..frames).collect();
        let mapping = map_file(&file, &all, true).map_err(failed)?;
        Ok(Self { file, frames, pages: pages(mapping.0.cast(), mapping.1, Arc::new(mapping)) })
    }

    /// Frames.
    pub(super) const fn frames(&self) -> u32 {
        self.frames
    }

    /// The domain's view of `count` frames from `first` on.
    ///
    /// # Panics
    /// If they are not there.
    pub(super) fn frames_at(&self, first: u32, count: u32) -> Pages {
        let pages = self.pages.slice(first as usize * PAGE_SIZE, count as usize * PAGE_SIZE);
        pages.expect("frames of the domain")
    }

    /// The frames that `pages`, a part of the domain's view, lies in; none if it is something else.
    pub(super) fn frames_of(&self, pages: &Pages) -> Option<std::ops::Range<u32>> {
        let offset = pages.as_ptr().addr().checked_sub(self.pages.as_ptr().addr())?;
        let end = offset.checked_add(pages.len()).filter(|&end| end <= self.pages.len())?;
        let whole = offset.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE);
        whole.then_some((offset / PAGE_SIZE) as u32..(end / PAGE_SIZE) as u32)
    }

    /// Maps `frames`, all of them inside the memory and at least one, one after another; `keep` is kept until after the
    /// last handle is dropped and they are unmapped.
    pub(super) fn map(&self, frames: &[u32], writable: bool, keep: impl Any + Send + Sync) -> nix::Result<Pages> {
        struct Mapped<K>(#[allow(dead_code)] Mapping, #[allow(dead_code)] K);
        let mapping = map_file(&self.file, frames, writable)?;
        // Fields are dropped in this order.
        Ok(pages(mapping.0.cast(), mapping.1, Arc::new(Mapped(mapping, keep))))
    }

    /// The word at `offset`, in bytes.
    ///
    /// # Panics
    /// If `offset` is beyond the memory or not aligned: it comes from a number that was checked.
    pub(super) fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: inside the memory and aligned, see `at`; mapped as long as `self`; everyone uses atomics here.
        unsafe { AtomicU16::from_ptr(self.at(offset)) }
    }

    /// As [`Ram::u16`].
    pub(super) fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }
    }

    /// As [`Ram::u16`].
    pub(super) fn u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(size_of::<T>()) && offset + size_of::<T>() <= self.pages.len());
        // SAFETY: inside the memory, checked above.
        unsafe { self.pages.as_ptr().add(offset).cast() }
    }
}

fn pages(start: NonNull<u8>, len: usize, owner: Arc<dyn Any + Send + Sync>) -> Pages {
    // SAFETY: the callers pass a mapping and its owner. Where it is read-only, whoever gets it asked for reading only.
    unsafe { Pages::new(start, len, owner) }
}

/// Maps `frames` of `file` one after another.
fn map_file(file: &OwnedFd, frames: &[u32], writable: bool) -> nix::Result<Mapping> {
    let rights = if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
    let bytes = |frames: &[u32]| NonZeroUsize::new(frames.len() * PAGE_SIZE).ok_or(nix::Error::EINVAL);
    let offset = |run: &[u32]| i64::from(run[0]) * PAGE_SIZE as i64;
    let len = bytes(frames)?;
    let mut runs = frames.chunk_by(|before, after| before + 1 == *after).peekable();
    if let Some(run) = runs.next_if(|run| run.len() == frames.len()) {
        // SAFETY: a new mapping wherever there is room harms nobody.
        let start = unsafe { mmap(None, len, rights, MapFlags::MAP_SHARED, file, offset(run)) }?;
        return Ok(Mapping(start, len.get()));
    }
    // SAFETY: as above.
    let start = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }?;
    let whole = Mapping(start, len.get());
    let mut at = start.addr();
    for run in runs {
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        // SAFETY: replaces a part of the mapping made above, which nobody has seen yet: all runs together are as long.
        unsafe { mmap(Some(at), bytes(run)?, rights, flags, file, offset(run)) }?;
        at = at.checked_add(run.len() * PAGE_SIZE).ok_or(nix::Error::EINVAL)?;
    }
    Ok(whole)
}
