//! Grants (version 1 of the table): a domain's own table, and what the hypervisor does with it.
//!
//! An entry is 8 bytes: u16 flags, u16 domain, u32 frame (`grant_table.h`).

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{Access, Pages};

use super::super::abi::{PAGE_SHIFT, PAGE_SIZE};
use super::super::lock;
use super::memory::Ram;
use super::{Hypervisor, refused};

/// The first frame of the table in a domain's memory.
pub(super) const TABLE: u32 = 1;
/// Frames of the table.
pub(super) const TABLE_FRAMES: u32 = 64;
/// Entries of the table.
pub(super) const ENTRIES: u32 = TABLE_FRAMES * (PAGE_SIZE / 8) as u32;
/// The reference of the xenstore ring (GNTTAB_RESERVED_XENSTORE).
pub(super) const RESERVED_XENSTORE: u32 = 1;
/// References below this have fixed uses.
const RESERVED: u32 = 8;

/// The other domain may map the frame (GTF_permit_access).
pub(super) const PERMIT_ACCESS: u16 = 1;
/// Not for writing (GTF_readonly).
pub(super) const READONLY: u16 = 4;
/// The hypervisor: mapped (GTF_reading).
pub(super) const READING: u16 = 8;
/// The hypervisor: mapped for writing (GTF_writing).
pub(super) const WRITING: u16 = 16;
const TYPE: u16 = 3;

const MAP: &str = "GNTTABOP_map_grant_ref";

/// Where the entry of `reference` is in a domain's memory, in bytes.
pub(super) const fn entry(reference: u32) -> usize {
    TABLE as usize * PAGE_SIZE + reference as usize * 8
}

/// The domain's side: which references are free, and the writing of entries.
pub(super) struct Table {
    ram: Arc<Ram>,
    references: Mutex<References>,
}

struct References {
    used: Vec<bool>,
    /// Where to look first.
    next: usize,
}

impl Table {
    pub(super) fn new(ram: Arc<Ram>) -> Self {
        let used = (0..ENTRIES).map(|reference| reference < RESERVED).collect();
        Self { ram, references: Mutex::new(References { used, next: RESERVED as usize }) }
    }

    /// Grants `frames` to domain `to`, under consecutive references.
    pub(super) fn grant(&self, frames: std::ops::Range<u32>, to: u16, read_only: bool) -> Result<u32, HypervisorError> {
        let first = lock(&self.references).take(frames.len()).ok_or(HypervisorError::Exhausted("grant references"))?;
        for (reference, frame) in (first..).zip(frames) {
            self.enter(reference, frame, to, read_only);
        }
        Ok(first)
    }

    /// Grants `frame` under `reference`, which is the caller's.
    pub(super) fn enter(&self, reference: u32, frame: u32, to: u16, read_only: bool) {
        let at = entry(reference);
        self.ram.u16(at + 2).store(to, Ordering::Relaxed);
        self.ram.u32(at + 4).store(frame, Ordering::Relaxed);
        let flags = if read_only { PERMIT_ACCESS | READONLY } else { PERMIT_ACCESS };
        // The barrier: whoever sees the flags sees the rest.
        self.ram.u16(at).store(flags, Ordering::Release);
    }

    /// Takes back `count` grants from `first` on, or none of them.
    pub(super) fn end_access(&self, first: u32, count: u32) -> Result<(), HypervisorError> {
        let end = first.checked_add(count).filter(|&end| first >= RESERVED && end <= ENTRIES);
        let mut references = lock(&self.references);
        let Some(end) = end.filter(|&end| (first..end).all(|reference| references.used[reference as usize])) else {
            return Err(refused("end_access", format!("{first}+{count} are not granted")));
        };
        let mut taken = Vec::new();
        for reference in first..end {
            match self.revoke(reference) {
                Some(flags) => taken.push((reference, flags)),
                None => {
                    for (reference, flags) in taken {
                        self.ram.u16(entry(reference)).store(flags, Ordering::Release);
                    }
                    return Err(HypervisorError::InUse { address: u64::from(reference) << PAGE_SHIFT });
                }
            }
        }
        references.used[first as usize..end as usize].fill(false);
        Ok(())
    }

    /// Takes one grant back, and returns its flags; none while it is mapped.
    fn revoke(&self, reference: u32) -> Option<u16> {
        let flags = self.ram.u16(entry(reference));
        let mut seen = flags.load(Ordering::Acquire);
        while seen & (READING | WRITING) == 0 {
            match flags.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(seen),
                Err(now) => seen = now,
            }
        }
        None
    }
}

impl References {
    /// Takes `count` free references in a row.
    fn take(&mut self, count: usize) -> Option<u32> {
        let len = self.used.len();
        let first = self.find(self.next, len, count).or_else(|| self.find(RESERVED as usize, len, count))?;
        self.used[first..first + count].fill(true);
        self.next = first + count;
        Some(first as u32)
    }

    fn find(&self, from: usize, to: usize, count: usize) -> Option<usize> {
        let mut start = from;
        while start.checked_add(count)? <= to {
            match self.used[start..start + count].iter().rposition(|&used| used) {
                Some(used) => start += used + 1,
                None => return Some(start),
            }
        }
        None
    }
}

/// The hypervisor's side: what is mapped of a domain, by reference.
pub(super) struct Pins(Mutex<Vec<Pin>>);

#[derive(Clone, Copy, Default)]
struct Pin {
    domain: u16,
    frame: u32,
    readers: u32,
    writers: u32,
}

impl Pins {
    pub(super) fn new() -> Self {
        Self(Mutex::new(vec![Pin::default(); ENTRIES as usize]))
    }

    /// Pins a grant for domain `by`, and says so in its entry. The frame, or what Xen says.
    fn pin(&self, ram: &Ram, reference: u32, by: u16, writable: bool) -> Result<u32, &'static str> {
        let mut pins = lock(&self.0);
        let Some(pin) = pins.get_mut(reference as usize) else { return Err("GNTST_bad_gntref (-3)") };
        let combined = ram.u32(entry(reference));
        let mut seen = combined.load(Ordering::Acquire);
        let pinned = pin.readers + pin.writers > 0;
        // The domain may change its entry meanwhile, so this may fail, but not for ever.
        for _ in 0..5 {
            let [flags, domain] = split(seen);
            let mine = if pinned { pin.domain == by } else { flags & TYPE == PERMIT_ACCESS && domain == by };
            if !mine || writable && flags & READONLY != 0 {
                return Err("GNTST_general_error (-1)");
            }
            let new = join([flags | READING | if writable { WRITING } else { 0 }, domain]);
            match combined.compare_exchange(seen, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    if !pinned {
                        (pin.domain, pin.frame) = (by, ram.u32(entry(reference) + 4).load(Ordering::Relaxed));
                    }
                    *(if writable { &mut pin.writers } else { &mut pin.readers }) += 1;
                    return Ok(pin.frame);
                }
                Err(now) => seen = now,
            }
        }
        Err("GNTST_general_error (-1)")
    }

    fn unpin(&self, ram: &Ram, reference: u32, writable: bool) {
        let mut pins = lock(&self.0);
        let pin = &mut pins[reference as usize];
        let count = if writable { &mut pin.writers } else { &mut pin.readers };
        *count = count.saturating_sub(1);
        let mut over = 0;
        if pin.writers == 0 {
            over |= WRITING;
            if pin.readers == 0 {
                over |= READING;
            }
        }
        ram.u16(entry(reference)).fetch_and(!over, Ordering::AcqRel);
    }
}

impl Hypervisor {
    /// GNTTABOP_map_grant_ref, for `count` grants of domain `of` from `first` on.
    pub(super) fn map(
        &self,
        by: u16,
        of: u16,
        first: u32,
        count: u32,
        access: Access,
    ) -> Result<Pages, HypervisorError> {
        let body = self.domain(of).ok_or_else(|| refused(MAP, "GNTST_bad_domain (-2)"))?;
        let writable = access.contains(Access::WRITE);
        let mut pinned = Pinned { body, first, count: 0, writable };
        let mut frames = Vec::new();
        for reference in (first..=u32::MAX).take(count as usize) {
            let frame = pinned.body.pins.pin(&pinned.body.ram, reference, by, writable);
            pinned.count += u32::from(frame.is_ok());
            frames.push(frame.map_err(|status| refused(MAP, status))?);
            if frames.last() >= Some(&pinned.body.ram.frames()) {
                return Err(refused(MAP, "GNTST_bad_page (-9)"));
            }
        }
        let ram = pinned.body.ram.clone();
        ram.map(&frames, writable, pinned).map_err(|error| refused(MAP, error))
    }
}

/// Grants that are in use until this is dropped.
struct Pinned {
    body: Arc<super::Body>,
    first: u32,
    count: u32,
    writable: bool,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for reference in self.first..self.first + self.count {
            self.body.pins.unpin(&self.body.ram, reference, self.writable);
        }
    }
}

/// Flags and domain of an entry, whose first four bytes the hypervisor changes as one word.
fn split(word: u32) -> [u16; 2] {
    let [a, b, c, d] = word.to_ne_bytes();
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
}

fn join([flags, domain]: [u16; 2]) -> u32 {
    let ([a, b], [c, d]) = (flags.to_ne_bytes(), domain.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}
