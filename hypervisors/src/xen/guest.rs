//! The guest half: drives devices.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use polyvirt_core::hypervisor::{self, HypervisorError, Share};
use polyvirt_core::memory::{Access, Pages};
use polyvirt_transports::xenbus::{self, Channel, GuestPlace, Store};

use super::abi::{Calls, PAGE_SHIFT};
use super::kernel::{Domain, Lines};
use super::lock;

/// The guest half. Each open event channel and each watch has a line of its own.
pub struct Guest {
    domain: Domain,
    host: u16,
    lines: Arc<Lines>,
    /// What is granted, by first reference. It stays allocated until it was taken back, whoever lets go of it.
    granted: Mutex<BTreeMap<u32, Pages>>,
    /// The lines of watches, by path.
    watches: Mutex<BTreeMap<String, u32>>,
}

impl Guest {
    /// The guest half in the domain that makes `calls`, for devices that domain `host` serves.
    pub fn new(calls: Arc<dyn Calls>, host: u16) -> Self {
        let (lines, granted, watches) = Default::default();
        Self { domain: Domain::new(calls), host, lines, granted, watches }
    }

    fn calls(&self) -> &dyn Calls {
        &*self.domain.calls
    }
}

impl Share for Guest {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        self.calls().allocate(len)
    }

    /// What the device may write it may read too: there is no such grant.
    fn share(&self, pages: &Pages, access: Access) -> Result<u64, HypervisorError> {
        let first = self.calls().grant(pages, self.host, !access.contains(Access::WRITE))?;
        lock(&self.granted).insert(first, pages.clone());
        Ok(u64::from(first) << PAGE_SHIFT)
    }

    fn unshare(&self, address: u64) -> Result<(), HypervisorError> {
        let mut granted = lock(&self.granted);
        let first = (address >> PAGE_SHIFT) as u32;
        let Some(pages) = granted.get(&first).filter(|_| u64::from(first) << PAGE_SHIFT == address) else {
            let reason = format!("nothing is granted from {address:#x} on");
            return Err(HypervisorError::Refused { call: "unshare", reason });
        };
        self.calls().end_access(first, (pages.len() >> PAGE_SHIFT) as u32)?;
        granted.remove(&first);
        Ok(())
    }
}

impl hypervisor::Guest for Guest {
    type Place = GuestPlace;

    /// The doorbell is a port; an event carries no value.
    fn notify(&self, doorbell: u64, _value: u32) -> Result<(), HypervisorError> {
        self.calls().send(u32::try_from(doorbell).unwrap_or(u32::MAX))
    }

    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        Ok(self.lines.take_pending(line))
    }

    fn enumerate(&self) -> Result<Vec<GuestPlace>, HypervisorError> {
        let store = &self.domain.store;
        let mut places = Vec::new();
        for index in store.list("device/virtio")? {
            let frontend = format!("device/virtio/{index}");
            // A directory without a backend is about to come or to go.
            let Some(backend) = store.read(&format!("{frontend}/backend"))? else { continue };
            if store.read(&format!("{backend}/state"))?.is_some() {
                places.push(GuestPlace { frontend, backend });
            }
        }
        Ok(places)
    }
}

impl hypervisor::WaitForInterrupt for Guest {
    fn wait(&self, lines: &[u32], most: Duration) -> Result<bool, HypervisorError> {
        Ok(self.lines.wait(lines, most))
    }
}

impl xenbus::Domain for Guest {
    fn store(&self) -> &dyn Store {
        &*self.domain.store
    }

    fn open_channel(&self) -> Result<Channel, HypervisorError> {
        let line = self.lines.open();
        let port = self.calls().alloc_unbound(self.host).inspect_err(|_| self.lines.close(line))?;
        lock(&self.domain.listeners).insert(port, self.lines.waker(line));
        Ok(Channel { port, line })
    }

    fn close_channel(&self, channel: Channel) -> Result<(), HypervisorError> {
        lock(&self.domain.listeners).remove(&channel.port);
        self.calls().close(channel.port)?;
        self.lines.close(channel.line);
        Ok(())
    }

    /// A path that is watched already keeps its line.
    fn watch(&self, path: &str) -> Result<u32, HypervisorError> {
        let mut watches = lock(&self.watches);
        if let Some(&line) = watches.get(path) {
            self.lines.waker(line).wake();
            return Ok(line);
        }
        let line = self.lines.open();
        self.domain.store.watch(path, self.lines.waker(line)).inspect_err(|_| self.lines.close(line))?;
        watches.insert(path.into(), line);
        Ok(line)
    }
}
