//! What a device does to guest memory, seen from inside.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polyvirt_core::memory::{Access, Accessed, Faulty, GuestMemory, Log, MemoryError, ResolveError, Watched};

use super::Objection;

/// The most accesses that are recorded; what comes later is only counted.
const LIMIT: usize = 1 << 17;

/// Guest memory as a probed device sees it.
pub type Probed<M> = Watched<Faulty<M>>;

/// A record of the device's accesses to guest memory, and the power to refuse them. For devices in this process only.
#[derive(Clone, Default)]
pub struct Probe(Arc<Shared>);

/// A moment in a [`Probe`]'s record.
#[derive(Clone, Copy, Debug)]
pub struct Mark(usize);

#[derive(Default)]
struct Shared {
    record: Mutex<Record>,
    refused: Mutex<Vec<(u64, u64, Access)>>,
}

#[derive(Default)]
struct Record {
    accesses: Vec<Accessed>,
    lost: usize,
}

impl Probe {
    /// Puts the probe in front of `memory`.
    pub fn watch<M: GuestMemory>(&self, memory: M) -> Probed<M> {
        let shared = Arc::clone(&self.0);
        let judge = move |address, len, access| shared.judge(address, len, access);
        Watched::new(Faulty::new(memory, Arc::new(judge)), "device", Arc::clone(&self.0) as Arc<dyn Log>)
    }

    /// This moment.
    pub fn mark(&self) -> Mark {
        Mark(lock(&self.0.record).accesses.len())
    }

    /// The accesses after `mark`. An objection if there were more than can be recorded.
    pub fn since(&self, mark: Mark) -> Result<Vec<Accessed>, Objection> {
        let record = lock(&self.0.record);
        match record.lost {
            0 => Ok(record.accesses[mark.0.min(record.accesses.len())..].to_vec()),
            lost => Err(Objection::failed(
                format!("the device accesses guest memory at most {LIMIT} times"),
                format!("{} times", LIMIT + lost),
            )),
        }
    }

    /// Forgets what was recorded; earlier marks mean the beginning then.
    pub fn clear(&self) {
        *lock(&self.0.record) = Record::default();
    }

    /// From now on refuses what touches `address .. address + len` with any right of `access`.
    pub fn refuse(&self, address: u64, len: u64, access: Access) {
        lock(&self.0.refused).push((address, len, access));
    }

    /// Refuses nothing any more.
    pub fn relent(&self) {
        lock(&self.0.refused).clear();
    }
}

impl Shared {
    fn judge(&self, address: u64, len: u64, access: Access) -> Result<(), ResolveError> {
        let overlaps = |&(from, size, right): &(u64, u64, Access)| {
            access.intersects(right) && address < from.saturating_add(size) && from < address.saturating_add(len)
        };
        match lock(&self.refused).iter().any(overlaps) {
            true => Err(MemoryError::Forbidden { address, len, access }.into()),
            false => Ok(()),
        }
    }
}

impl Log for Shared {
    fn accessed(&self, access: Accessed) {
        let mut record = lock(&self.record);
        match record.accesses.len() < LIMIT {
            true => record.accesses.push(access),
            false => record.lost += 1,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
