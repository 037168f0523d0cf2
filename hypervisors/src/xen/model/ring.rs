//! The page that a domain and xenstored share (`xenstore_domain_interface`, `io/xs_wire.h`).
//!
//! 1024 bytes of requests at 0, 1024 bytes of responses at 1024, then u32 `req_cons`, `req_prod`, `rsp_cons`, `rsp_prod`
//! from 2048 on; u32 `error` at 2072 came later than 2008.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{Pages, Words};

use super::refused;

/// Bytes of each ring.
pub(super) const RING_SIZE: u32 = 1024;
const ERROR: usize = 2072 / 4;

/// Why xenstored gave a connection up (`XENSTORE_ERROR_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// The domain does not take what it asked for.
    Communication = 1,
    /// Ring indices that cannot be.
    Indices = 2,
    /// A message that is too long.
    Protocol = 3,
}

/// The page, from either side.
pub(super) struct Interface {
    pages: Pages,
    words: Words<u32, Arc<dyn Any + Send + Sync>>,
}

/// One of the two rings of an [`Interface`]: offset of its bytes, indices of its counters.
#[derive(Clone, Copy)]
pub(super) struct Ring {
    data: usize,
    consumed: usize,
    produced: usize,
}

/// From the domain to xenstored.
pub(super) const REQUESTS: Ring = Ring { data: 0, consumed: 2048 / 4, produced: 2052 / 4 };
/// From xenstored to the domain.
pub(super) const RESPONSES: Ring = Ring { data: 1024, consumed: 2056 / 4, produced: 2060 / 4 };

impl Interface {
    pub(super) fn new(pages: Pages) -> Result<Self, HypervisorError> {
        let words = Words::new(pages.clone()).map_err(|error| refused("xenstore ring", error))?;
        Ok(Self { pages, words })
    }

    /// Puts as many of `bytes` into `ring` as there is room for: how many.
    pub(super) fn put(&self, ring: Ring, bytes: &[u8]) -> Result<usize, Broken> {
        let consumed: u32 = self.words.load(ring.consumed, Ordering::Acquire);
        let produced: u32 = self.words.load(ring.produced, Ordering::Relaxed);
        let room = RING_SIZE.checked_sub(produced.wrapping_sub(consumed)).ok_or(Broken::Indices)?;
        let bytes = &bytes[..bytes.len().min(room as usize)];
        let at = (produced % RING_SIZE) as usize;
        let (before, after) = bytes.split_at(bytes.len().min(RING_SIZE as usize - at));
        // Both lie inside the page: at + before is at most the ring's size, and after is shorter than at.
        let _ = self.pages.write(ring.data + at, before);
        let _ = self.pages.write(ring.data, after);
        self.words.store(ring.produced, produced.wrapping_add(bytes.len() as u32), Ordering::Release);
        Ok(bytes.len())
    }

    /// Takes as many bytes out of `ring` as there are and `into` has room for: how many.
    pub(super) fn take(&self, ring: Ring, into: &mut [u8]) -> Result<usize, Broken> {
        let produced: u32 = self.words.load(ring.produced, Ordering::Acquire);
        let consumed: u32 = self.words.load(ring.consumed, Ordering::Relaxed);
        let there = produced.wrapping_sub(consumed);
        if there > RING_SIZE {
            return Err(Broken::Indices);
        }
        let len = into.len().min(there as usize);
        let at = (consumed % RING_SIZE) as usize;
        let (before, after) = into[..len].split_at_mut(len.min(RING_SIZE as usize - at));
        let _ = self.pages.read(ring.data + at, before);
        let _ = self.pages.read(ring.data, after);
        self.words.store(ring.consumed, consumed.wrapping_add(len as u32), Ordering::Release);
        Ok(len)
    }

    /// xenstored: says that it listens no more.
    pub(super) fn give_up(&self, why: Broken) {
        self.words.store(ERROR, why as u32, Ordering::Release);
    }

    /// The domain: whether xenstored has given up.
    pub(super) fn is_given_up(&self) -> bool {
        self.words.load::<u32>(ERROR, Ordering::Acquire) != 0
    }
}
