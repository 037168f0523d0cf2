//! Guest memory in a case's hands.

use std::sync::Arc;

use polyvirt_core::hypervisor::Share;
use polyvirt_core::memory::{Access, MemoryError, Pages};
use polyvirt_core::transport::Transport;

use crate::suite::{Objection, Session};

/// A piece of guest memory that the device may access.
#[derive(Clone)]
pub struct Memory {
    /// The bytes, as the driver sees them.
    pub pages: Pages,
    /// Where the device sees them.
    pub address: u64,
    /// How many of them are meant.
    pub len: u32,
    /// None if someone else sees to it.
    share: Option<Arc<Shared>>,
}

struct Shared(Arc<dyn Share>, u64);

impl Drop for Shared {
    fn drop(&mut self) {
        // Refused while the device uses it: then it stays shared until the machine is gone.
        let _ = self.0.unshare(self.1);
    }
}

impl Memory {
    /// Shares `len` fresh bytes, all 0.
    pub fn new(session: &Session, len: u32, access: Access) -> Result<Self, Objection> {
        let share = session.transport.share();
        let pages = share.allocate(len as usize)?;
        let address = share.share(&pages, access)?;
        Ok(Self { pages, address, len, share: Some(Arc::new(Shared(share, address))) })
    }

    /// All of `pages`, which stay shared as long as they are used.
    pub(super) const fn of(pages: Pages, address: u64) -> Self {
        let len = pages.len() as u32;
        Self { pages, address, len, share: None }
    }

    /// For the device to read: `bytes`.
    pub fn readable(session: &Session, bytes: &[u8]) -> Result<Self, Objection> {
        let memory = Self::new(session, bytes.len() as u32, Access::READ)?;
        memory.pages.write(0, bytes)?;
        Ok(memory)
    }

    /// For the device to write: `len` bytes of `poison`.
    pub fn writable(session: &Session, len: u32, poison: u8) -> Result<Self, Objection> {
        let memory = Self::new(session, len, Access::WRITE)?;
        memory.pages.fill(0, len as usize, poison)?;
        Ok(memory)
    }

    /// The `len` bytes from `offset` on.
    ///
    /// # Panics
    /// If they reach beyond the end.
    pub fn part(&self, offset: u32, len: u32) -> Self {
        assert!(offset + len <= self.len);
        let pages = self.pages.slice(offset as usize, len as usize).expect("inside, as just checked");
        Self { pages, address: self.address + u64::from(offset), len, share: self.share.clone() }
    }

    /// What it holds.
    pub fn bytes(&self) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = vec![0; self.len as usize];
        self.pages.read(0, &mut bytes)?;
        Ok(bytes)
    }
}
