//! A record of every access, to prove what a device does not touch.

use alloc::sync::Arc;

use super::{Access, GuestMemory, Lease, ResolveError, Segment};

/// One access to guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accessed {
    /// Device-visible address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// What the device did: read or wrote.
    pub direction: Access,
    /// Who did it: the name that [`Watched::new`] was given.
    pub by: &'static str,
}

/// Where accesses are recorded. Called by whichever thread touches the memory.
pub trait Log: Send + Sync {
    /// `access` is happening.
    fn accessed(&self, access: Accessed);
}

/// Guest memory that reports every access to a [`Log`]: each load and store, where it happens.
///
/// Resolving alone is not an access.
#[derive(Clone)]
pub struct Watched<M> {
    inner: M,
    by: &'static str,
    log: Arc<dyn Log>,
}

impl<M> Watched<M> {
    /// Watches `inner` for `by`.
    pub fn new(inner: M, by: &'static str, log: Arc<dyn Log>) -> Self {
        Self { inner, by, log }
    }

    fn watch<L>(&self, segment: Segment<L>, address: u64) -> Segment<WatchedLease<L>> {
        let (by, log) = (self.by, Arc::clone(&self.log));
        segment.wrap(|inner| WatchedLease { inner, address, by, log })
    }
}

impl<M: GuestMemory> GuestMemory for Watched<M> {
    type Lease = WatchedLease<M::Lease>;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        access: Access,
        mut segments: impl FnMut(Segment<Self::Lease>),
    ) -> Result<(), ResolveError> {
        let mut at = address;
        self.inner.resolve(address, len, access, |segment| {
            let address = at;
            at = at.wrapping_add(segment.len() as u64);
            segments(self.watch(segment, address));
        })
    }

    #[inline(always)]
    fn resolve_at_once(&self, address: u64, len: u64, access: Access) -> Option<Segment<Self::Lease>> {
        Some(self.watch(self.inner.resolve_at_once(address, len, access)?, address))
    }
}

/// The lease of a watched segment.
#[derive(Clone)]
pub struct WatchedLease<L> {
    inner: L,
    address: u64,
    by: &'static str,
    log: Arc<dyn Log>,
}

impl<L> WatchedLease<L> {
    fn log(&self, offset: usize, len: usize, direction: Access) {
        let address = self.address.wrapping_add(offset as u64);
        self.log.accessed(Accessed { address, len: len as u64, direction, by: self.by });
    }
}

impl<L: Lease> Lease for WatchedLease<L> {
    fn before_load(&self, offset: usize, len: usize) {
        self.log(offset, len, Access::READ);
        self.inner.before_load(offset, len);
    }

    fn after_store(&self, offset: usize, len: usize) {
        self.inner.after_store(offset, len);
        self.log(offset, len, Access::WRITE);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FlatMemory, Pages};
    use super::*;
    use core::sync::atomic::Ordering;
    use std::sync::Mutex;
    use std::vec::Vec;

    struct Record(Mutex<Vec<Accessed>>);
    impl Log for Record {
        fn accessed(&self, access: Accessed) {
            self.0.lock().unwrap().push(access);
        }
    }

    #[test]
    fn each_load_and_store_is_recorded_where_it_happens() {
        let record = Arc::new(Record(Mutex::default()));
        let flat = FlatMemory::new([(0x1000, Pages::allocate(4096)), (0x2000, Pages::allocate(4096))]);
        let memory = Watched::new(&flat, "device", record.clone());
        let mut parts = Vec::new();
        memory.resolve(0x1ff8, 16, Access::READ | Access::WRITE, |part| parts.push(part)).unwrap();
        assert!(record.0.lock().unwrap().is_empty(), "resolving is not an access");

        parts[0].read(4, &mut [0; 4]).unwrap();
        parts[1].write(2, &[1, 2]).unwrap();
        let words = memory.resolve_words::<u32>(0x1010, 16, Access::READ).unwrap();
        words.load::<u16>(3, Ordering::Relaxed);
        memory.resolve_at_once(0x2100, 8, Access::READ).unwrap().read(1, &mut [0; 2]).unwrap();
        let seen: Vec<_> = record.0.lock().unwrap().iter().map(|a| (a.address, a.len, a.direction, a.by)).collect();
        assert_eq!(
            seen,
            [
                (0x1ffc, 4, Access::READ, "device"),
                (0x2002, 2, Access::WRITE, "device"),
                (0x1016, 2, Access::READ, "device"),
                (0x2101, 2, Access::READ, "device"),
            ]
        );
    }
}
