//! The fences of the rings, and under `cfg(loom)` a model of the memory that they order.
//!
//! Atomic accesses go through [`Words`](crate::memory::Words). In a model each word is one of loom's atomics, found by its
//! address; the code of the rings is the very same.

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::fence;

#[cfg(loom)]
pub(crate) use model::fence;

/// What loom models (tests only).
#[cfg(loom)]
pub mod model {
    use std::collections::{BTreeMap, BTreeSet};
    use std::panic::Location;
    use std::sync::{Arc, Mutex, PoisonError};
    use std::vec::Vec;

    use core::sync::atomic::Ordering;
    use loom::sync::atomic::AtomicU64;

    loom::lazy_static! {
        /// The words of one execution, by address.
        static ref WORDS: Mutex<BTreeMap<usize, Arc<AtomicU64>>> = Mutex::default();
    }

    /// A place in the source: file and line.
    pub type Site = (&'static str, u32);

    /// The places where something is ordered, and the one where it is not, to see whether a model notices.
    static SITES: Mutex<(BTreeSet<Site>, Option<Site>)> = Mutex::new((BTreeSet::new(), None));

    /// All places that ordered something so far.
    pub fn sites() -> Vec<Site> {
        SITES.lock().unwrap_or_else(PoisonError::into_inner).0.iter().copied().collect()
    }

    /// From now on nothing is ordered at `site`: its fence is none, its accesses are relaxed.
    pub fn weaken(site: Option<Site>) {
        SITES.lock().unwrap_or_else(PoisonError::into_inner).1 = site;
    }

    /// Whether what is asked for at `location` counts.
    fn counts(location: &'static Location<'static>) -> bool {
        let site = (location.file(), location.line());
        let mut sites = SITES.lock().unwrap_or_else(PoisonError::into_inner);
        sites.0.insert(site);
        sites.1 != Some(site)
    }

    fn word(address: usize, initial: impl FnOnce() -> u64) -> Arc<AtomicU64> {
        let mut words = WORDS.lock().unwrap_or_else(PoisonError::into_inner);
        words.entry(address).or_insert_with(|| Arc::new(AtomicU64::new(initial()))).clone()
    }

    /// Makes the words of the `len` bytes at `address`, all 0: before there are threads that could meet while they are made.
    pub fn prepare(address: usize, len: usize) {
        for at in (address..address + len).step_by(2) {
            word(at, || 0);
        }
    }

    #[track_caller]
    pub(crate) fn load(address: usize, initial: impl FnOnce() -> u64, order: Ordering) -> u64 {
        let strong = order == Ordering::Relaxed || counts(Location::caller());
        word(address, initial).load(if strong { order } else { Ordering::Relaxed })
    }

    #[track_caller]
    pub(crate) fn store(address: usize, value: u64, order: Ordering) {
        let strong = order == Ordering::Relaxed || counts(Location::caller());
        word(address, || 0).store(value, if strong { order } else { Ordering::Relaxed });
    }

    #[track_caller]
    pub(crate) fn fence(order: Ordering) {
        if counts(Location::caller()) {
            loom::sync::atomic::fence(order);
        }
    }
}
