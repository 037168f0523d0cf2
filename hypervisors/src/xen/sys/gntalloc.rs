//! `/dev/xen/gntalloc`: pages of this domain that are granted from the moment they are allocated.
//!
//! References come as the kernel has them free, in no order, while consecutive pages need consecutive references:
//! pages are allocated until enough of them are, and the others are given back.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::Mutex;

use polyvirt_core::hypervisor::HypervisorError;
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ref};

use super::super::abi::PAGE_SHIFT;
use super::super::lock;
use super::abi::{
    AllocGref, DOMID_INVALID, DeallocGref, GNTALLOC_ALLOC_GREF, GNTALLOC_DEALLOC_GREF, GNTALLOC_FLAG_WRITABLE,
};
use super::privcmd::Privcmd;
use super::{open, refused};

/// Granted pages under consecutive references.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first reference.
    pub(super) first: u32,
    /// By reference, where `mmap` of the device finds the page.
    pub(super) offsets: Vec<u64>,
}

/// The device. What this handle granted is taken back with it.
pub(super) struct Gntalloc {
    file: File,
    privcmd: Privcmd,
    /// The reference of a page that nobody can map.
    spare: u32,
    /// By reference, where `mmap` finds the page.
    granted: Mutex<BTreeMap<u32, u64>>,
}

impl Gntalloc {
    pub(super) fn open() -> Result<Self, HypervisorError> {
        let (file, privcmd) = (open("gntalloc")?, Privcmd::open()?);
        let spare = allocate(&file, 1, DOMID_INVALID, true)?[0].0;
        Ok(Self { file, privcmd, spare, granted: Mutex::default() })
    }

    /// For `mmap`.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Allocates `count` pages, zeroed, and grants them to domain `to`, under consecutive references.
    pub(super) fn grant(&self, count: u32, to: u16, read_only: bool) -> Result<Run, HypervisorError> {
        let mut granted = lock(&self.granted);
        let mut held = Vec::new();
        let run = loop {
            match allocate(&self.file, count, to, read_only) {
                Ok(more) => held.extend(more),
                Err(error) => break Err(error),
            }
            // Bounded: the device allocates only so many pages.
            if let Some(run) = take_run(&mut held, count as usize) {
                break Ok(run);
            }
        };
        for (_, offset) in held {
            self.free(offset);
        }
        let run = run?;
        granted.extend((run.first..).zip(run.offsets.iter().copied()));
        Ok(run)
    }

    /// Takes back `count` grants from `first` on, if none of them is in use, and frees the pages.
    ///
    /// Should the other domain map one after it was looked at, the kernel takes it back as soon as it can, and keeps
    /// the page until then.
    pub(super) fn end_access(&self, first: u32, count: u32) -> Result<(), HypervisorError> {
        let mut granted = lock(&self.granted);
        let references = first..first.saturating_add(count);
        if references.is_empty() || !references.clone().all(|reference| granted.contains_key(&reference)) {
            return Err(refused("end_access", format!("{first}+{count} are not granted")));
        }
        for reference in references.clone() {
            if self.privcmd.in_use(reference, self.spare)? {
                return Err(HypervisorError::InUse { address: u64::from(reference) << PAGE_SHIFT });
            }
        }
        for offset in references.filter_map(|reference| granted.remove(&reference)) {
            self.free(offset);
        }
        Ok(())
    }

    fn free(&self, offset: u64) {
        let page = DeallocGref { index: offset, count: 1 };
        // SAFETY: the kernel only reads the structure. The page goes when nobody maps it any more.
        if unsafe { ioctl_with_ref(&self.file, GNTALLOC_DEALLOC_GREF, &page) } != 0 {
            tracing::error!(error = %io::Error::last_os_error(), "a granted page is not given back");
        }
    }
}

/// Allocates `count` pages: reference and offset of each.
fn allocate(file: &File, count: u32, to: u16, read_only: bool) -> Result<Vec<(u32, u64)>, HypervisorError> {
    const CALL: &str = "gntalloc";
    let flags = if read_only { 0 } else { GNTALLOC_FLAG_WRITABLE };
    let head = AllocGref { domid: to, flags, count, ..AllocGref::default() };
    // The head has room for one reference.
    let mut call = vec![head; 1 + (count as usize * size_of::<u32>()).div_ceil(size_of::<AllocGref>())];
    let at = call.as_mut_ptr();
    // SAFETY: the kernel reads the head, and writes it and `count` references from its `gref_ids` on, which lie inside
    // the vector.
    if unsafe { ioctl_with_mut_ptr(file, GNTALLOC_ALLOC_GREF, at) } != 0 {
        let error = io::Error::last_os_error();
        return Err(match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::OutOfMemory => HypervisorError::Exhausted("grant references"),
            _ => refused(CALL, error),
        });
    }
    let index = call[0].index;
    // SAFETY: as above; any bytes are a u32.
    let reference = |number: u32| unsafe { (&raw const (*at).gref_ids).cast::<u32>().add(number as usize).read() };
    Ok((0..count).map(|number| (reference(number), index + (u64::from(number) << PAGE_SHIFT))).collect())
}

/// Takes `count` consecutive references out of `held`.
fn take_run(held: &mut Vec<(u32, u64)>, count: usize) -> Option<Run> {
    held.sort_unstable();
    let whole = |run: &&[(u32, u64)]| run[run.len() - 1].0 - run[0].0 == run.len() as u32 - 1;
    let first = held.windows(count.max(1)).find(whole)?[0].0;
    let at = held.iter().position(|page| page.0 == first)?;
    Some(Run { first, offsets: held.drain(at..at + count.max(1)).map(|page| page.1).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consecutive_references_are_found_among_others_and_put_in_order() {
        let mut held = vec![(9, 0), (7, 1), (20, 2), (8, 3), (21, 4)];
        assert_eq!(take_run(&mut held, 4), None);
        assert_eq!(take_run(&mut held, 3), Some(Run { first: 7, offsets: vec![1, 3, 0] }));
        assert_eq!(held, [(20, 2), (21, 4)]);
        assert_eq!(take_run(&mut held, 1), Some(Run { first: 20, offsets: vec![2] }));
        assert_eq!(take_run(&mut held, 2), None);
    }
}
