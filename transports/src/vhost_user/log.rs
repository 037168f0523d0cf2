//! The log of written pages (LOG_SHMFD): a bit for each page of guest memory, for whoever moves the guest elsewhere.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polyvirt_core::memory::Pages;

use super::events::Bell;
use super::map::is_lost;

/// Bytes of guest memory that a bit stands for.
pub(super) const LOGGED: u64 = 4096;

/// The log of a session.
#[derive(Default)]
pub(super) struct DirtyLog {
    /// Whether there is something to do at all.
    active: AtomicBool,
    parts: Mutex<Parts>,
}

#[derive(Default)]
struct Parts {
    /// Whether the front end wants writes logged (VHOST_F_LOG_ALL).
    wanted: bool,
    bits: Option<Pages>,
    /// What is told that there is something new.
    event: Option<Bell>,
    /// The used rings of running queues: which queue's, where it is for the guest, bytes, and where it is logged besides.
    used: Vec<(usize, u64, u64, Arc<UsedLog>)>,
}

impl DirtyLog {
    /// Forgets everything.
    pub(super) fn reset(&self) {
        self.change(|parts| *parts = Parts::default());
    }

    /// Whether the log's file became shorter.
    pub(super) fn is_lost(&self) -> bool {
        self.lock().bits.as_ref().is_some_and(is_lost)
    }

    /// Writes are logged from now on, or not.
    pub(super) fn want(&self, wanted: bool) {
        self.change(|parts| parts.wanted = wanted);
    }

    /// The log is in `bits`.
    pub(super) fn set(&self, bits: Pages) {
        self.change(|parts| parts.bits = Some(bits));
    }

    /// News are told to `event`.
    pub(super) fn set_event(&self, event: Bell) {
        self.change(|parts| parts.event = Some(event));
    }

    /// The used ring of queue `index`, `len` bytes at `address`, is logged in `besides`, too.
    pub(super) fn add_used(&self, index: usize, address: u64, len: u64, besides: Arc<UsedLog>) {
        self.forget_used(index);
        self.lock().used.push((index, address, len, besides));
    }

    /// Queue `index` has stopped.
    pub(super) fn forget_used(&self, index: usize) {
        self.lock().used.retain(|(queue, ..)| *queue != index);
    }

    /// Whether writes are logged.
    #[inline(always)]
    pub(super) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// `len` bytes of guest memory from `address` on were written. What the log has no bit for is not logged: its length
    /// is the front end's choice.
    #[cold]
    pub(super) fn mark(&self, address: u64, len: u64) {
        if len == 0 {
            return;
        }
        let parts = self.lock();
        parts.mark(address, len);
        for (_, start, size, besides) in &parts.used {
            let (from, to) = (address.max(*start), address.saturating_add(len).min(start.saturating_add(*size)));
            if let Some(at) = besides.address().filter(|_| from < to) {
                parts.mark(at.saturating_add(from - start), to - from);
            }
        }
        if let Some(event) = &parts.event {
            event.ring();
        }
    }

    fn change(&self, change: impl FnOnce(&mut Parts)) {
        let mut parts = self.lock();
        change(&mut parts);
        self.active.store(parts.wanted && parts.bits.is_some(), Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Parts {
    /// Sets the bits of `len` bytes, at least one, from `address` on.
    fn mark(&self, address: u64, len: u64) {
        let Some(bits) = &self.bits else { return };
        let last = address.saturating_add(len - 1) / LOGGED;
        for page in address / LOGGED..=last {
            let Some(byte) = usize::try_from(page / 8).ok().filter(|byte| *byte < bits.len()) else { break };
            // SAFETY: the byte is inside the mapping (checked), which `bits` keeps; everybody uses atomics on it.
            let byte = unsafe { AtomicU8::from_ptr(bits.as_ptr().add(byte)) };
            byte.fetch_or(1 << (page % 8), Ordering::AcqRel);
        }
    }
}

/// Where writes to a used ring are logged besides: the front end may have it elsewhere than where it is.
#[derive(Default)]
pub(super) struct UsedLog {
    wanted: AtomicBool,
    address: AtomicU64,
}

impl UsedLog {
    /// From now on at `address`; or nowhere.
    pub(super) fn set(&self, address: Option<u64>) {
        self.address.store(address.unwrap_or_default(), Ordering::Relaxed);
        self.wanted.store(address.is_some(), Ordering::Relaxed);
    }

    fn address(&self) -> Option<u64> {
        self.wanted.load(Ordering::Relaxed).then(|| self.address.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(pages: &Pages) -> Vec<u8> {
        let mut bytes = vec![0; pages.len()];
        pages.read(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_page_that_is_touched_has_its_bit_and_no_other() {
        let (log, bits) = (DirtyLog::default(), Pages::allocate(4096));
        log.set(bits.clone());
        assert!(!log.is_active(), "nobody wants it");
        log.want(true);
        assert!(log.is_active());
        log.mark(0x2fff, 2);
        log.mark(0x9000, 0);
        log.mark(0x8000, 1);
        assert_eq!(bytes(&bits)[..3], [0b1100, 0b1, 0]);
    }

    #[test]
    fn what_is_written_to_a_used_ring_is_logged_where_the_front_end_has_it_besides() {
        let (log, bits) = (DirtyLog::default(), Pages::allocate(4096));
        log.set(bits.clone());
        log.want(true);
        let take = || {
            let found = bytes(&bits)[..3].to_vec();
            bits.fill(0, 4096, 0).unwrap();
            found
        };
        let besides = Arc::new(UsedLog::default());
        // From the end of page 1 to that of page 2; besides, two pages from 8 on.
        log.add_used(0, 0x1ff0, 0x1010, besides.clone());
        log.mark(0x1ff0, 4);
        assert_eq!(take(), [0b10, 0, 0], "nobody wants it besides");
        besides.set(Some(0x8ff0));
        log.mark(0x1ff0, 4);
        assert_eq!(take(), [0b10, 0b1, 0]);
        log.mark(0x2000, 4);
        assert_eq!(take(), [0b100, 0b10, 0]);
        log.mark(0, 0x4000);
        assert_eq!(take(), [0b1111, 0b11, 0], "no more than the ring");
        for outside in [0x1fef, 0x3000] {
            log.mark(outside, 1);
            assert_eq!(take()[1], 0, "{outside:#x}");
        }
        log.mark(u64::MAX, u64::MAX);
        // The same queue elsewhere, then nowhere.
        log.add_used(0, 0x5000, 0x1000, besides);
        log.mark(0x1ff0, 4);
        assert_eq!(take(), [0b10, 0, 0]);
        log.mark(0x5000, 1);
        assert_eq!(take(), [0b10_0000, 0b1, 0]);
        log.forget_used(0);
        log.mark(0x5000, 1);
        assert_eq!(take(), [0b10_0000, 0, 0]);
    }

    #[test]
    fn what_is_behind_the_end_of_the_log_is_not_written() {
        let (log, bits) = (DirtyLog::default(), Pages::allocate(4096).slice(0, 2).unwrap());
        let behind = bits.clone();
        log.set(bits);
        log.want(true);
        log.mark(15 * LOGGED, 4 * LOGGED);
        log.mark(u64::MAX, u64::MAX);
        assert_eq!(bytes(&behind), [0, 0x80]);
    }
}
