//! The front end's IOMMU: what drivers share is at device addresses of its own, and the back end learns them one by one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use polyvirt_core::hypervisor::{HypervisorError, Share};
use polyvirt_core::memory::{Access, Pages};

use super::link::Link;
use super::messages::{Iotlb, Payload, Request};

/// How far device addresses are from guest-physical ones: nobody takes the ones for the others.
const AWAY: u64 = 1 << 40;

/// An IOMMU in front of `inner`. Taking back what was shared returns when the back end has forgotten it.
pub(super) struct Iommu {
    inner: Arc<dyn Share>,
    /// By device address: bytes, address of the front end, rights.
    mappings: Mutex<BTreeMap<u64, (u64, u64, u8)>>,
    /// Whom to tell what is not valid any more.
    link: Mutex<Weak<Link>>,
}

impl Iommu {
    pub(super) fn new(inner: Arc<dyn Share>) -> Self {
        Self { inner, mappings: Mutex::default(), link: Mutex::default() }
    }

    /// The back end is behind `link`.
    pub(super) fn connect(&self, link: &Arc<Link>) {
        *lock(&self.link) = Arc::downgrade(link);
    }

    /// The translation that covers `iova`.
    pub(super) fn translation(&self, iova: u64) -> Option<Iotlb> {
        let mappings = lock(&self.mappings);
        let (&start, &(size, user, access)) = mappings.range(..=iova).next_back()?;
        (iova - start < size).then_some(Iotlb { iova: start, size, user, access, kind: Iotlb::UPDATE })
    }
}

impl Share for Iommu {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        self.inner.allocate(len)
    }

    fn share(&self, pages: &Pages, access: Access) -> Result<u64, HypervisorError> {
        let address = self.inner.share(pages, access)? + AWAY;
        let mapping = (pages.len() as u64, pages.as_ptr().addr() as u64, access.bits());
        lock(&self.mappings).insert(address, mapping);
        Ok(address)
    }

    fn unshare(&self, address: u64) -> Result<(), HypervisorError> {
        if let Some((size, ..)) = lock(&self.mappings).remove(&address) {
            let link = lock(&self.link).upgrade();
            let gone = Iotlb { iova: address, size, user: 0, access: 0, kind: Iotlb::INVALIDATE };
            if let Some(link) = link
                && let Err(error) = link.tell(Request::IotlbMsg, &gone.to_bytes(), &[])
            {
                // Without a back end there is nobody who could use it.
                tracing::debug!(%error, "an invalidation was not delivered");
            }
        }
        self.inner.unshare(address.wrapping_sub(AWAY))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
