//! Memory that a driver shares with its device for as long as it needs it.

use alloc::sync::Arc;

use crate::hypervisor::{HypervisorError, Share};
use crate::memory::{Access, Pages};

/// An allocation that the device may access until this is dropped.
pub struct Shared {
    share: Arc<dyn Share>,
    pages: Pages,
    address: u64,
    leaked: bool,
}

impl Shared {
    /// Allocates `len` bytes, rounded up to whole pages, and shares them.
    pub fn new(share: &Arc<dyn Share>, len: usize, access: Access) -> Result<Self, HypervisorError> {
        let pages = share.allocate(len)?;
        let address = share.share(&pages, access)?;
        Ok(Self { share: share.clone(), pages, address, leaked: false })
    }

    /// Keeps the memory from the guest for ever: for a device that could not be made to let go of it.
    pub fn leak(&mut self) {
        self.leaked = true;
        core::mem::forget(self.pages.clone());
    }

    /// The memory.
    pub const fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Where the device sees it.
    pub const fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.leaked {
            return;
        }
        if let Err(error) = self.share.unshare(self.address) {
            tracing::debug!(%error, "memory stays shared");
        }
    }
}
