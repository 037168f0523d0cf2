//! What the kernel of a domain does for [`Calls`]: its grant table, its event channels, its end of the xenstore ring.

use std::sync::Arc;

use polyvirt_core::hypervisor::{HypervisorError, Share};
use polyvirt_core::memory::{Access, Pages};

use super::super::abi::{Calls, PAGE_SIZE};
use super::events::Upcall;
use super::grants::{Pins, RESERVED_XENSTORE, TABLE, TABLE_FRAMES, Table};
use super::memory::Ram;
use super::ring::{Broken, Interface, REQUESTS, RESPONSES};
use super::xenstored::{Introduced, Xenstored};
use super::{Body, Hypervisor, refused};
use crate::flat_share::FlatShare;

/// The frame of the xenstore ring; frame 0 is the shared info page.
const STORE: u32 = TABLE + TABLE_FRAMES;
/// The first frame for allocations.
const HEAP: u32 = STORE + 1;

/// A domain on the model.
pub struct Domain {
    id: u16,
    hypervisor: Arc<Hypervisor>,
    pub(super) ram: Arc<Ram>,
    table: Table,
    upcall: Arc<Upcall>,
    heap: FlatShare,
    interface: Interface,
    /// The port of the xenstore ring; 0 before the domain was introduced.
    store_port: u32,
    /// Ends when the last domain does.
    xenstored: Option<Arc<Xenstored>>,
}

impl Domain {
    pub(super) fn new(hypervisor: &Arc<Hypervisor>, id: u16, heap: usize) -> Result<Self, HypervisorError> {
        let frames = u32::try_from(heap.div_ceil(PAGE_SIZE)).ok().and_then(|frames| frames.checked_add(HEAP));
        let ram = Arc::new(Ram::new(frames.ok_or(HypervisorError::Exhausted("guest memory"))?)?);
        let upcall = Arc::new(Upcall::new(ram.clone()));
        let body = Arc::new(Body { ram: ram.clone(), pins: Pins::new(), upcall: upcall.clone() });
        hypervisor.domains.write().unwrap_or_else(std::sync::PoisonError::into_inner).insert(id, body);
        let all = ram.frames();
        Ok(Self {
            id,
            hypervisor: hypervisor.clone(),
            table: Table::new(ram.clone()),
            heap: FlatShare::new(0, ram.frames_at(HEAP, all - HEAP)),
            interface: Interface::new(ram.frames_at(STORE, 1))?,
            ram,
            upcall,
            store_port: 0,
            xenstored: None,
        })
    }

    /// The domain's number.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// The toolstack: gives the domain a connection to xenstored, which runs in domain `store`.
    pub(super) fn introduce(&mut self, store: u16) -> Result<Introduced, HypervisorError> {
        self.table.enter(RESERVED_XENSTORE, STORE, store, false);
        self.store_port = self.hypervisor.alloc_unbound(self.id, store)?;
        self.upcall.set_store(self.store_port);
        Ok(Introduced { domain: self.id, port: self.store_port })
    }

    /// The domain, which keeps `xenstored` running.
    pub(super) fn with(mut self, xenstored: Arc<Xenstored>) -> Self {
        self.xenstored = Some(xenstored);
        self
    }

    /// Moves bytes over the xenstore ring by `step`, which is told how many are done and says how many more are, until
    /// there are `len`.
    fn exchange(&self, len: usize, mut step: impl FnMut(usize) -> Result<usize, Broken>) -> Result<(), &'static str> {
        let mut done = 0;
        while done < len {
            let seen = self.upcall.store_events();
            let moved = step(done).map_err(|_| "the indices of the ring are wrong")?;
            done += moved;
            if moved > 0 {
                // What was there, or the room for it, is news to the other side.
                self.hypervisor.send(self.id, self.store_port).map_err(|_| "not introduced")?;
            } else if self.interface.is_given_up() {
                return Err("xenstored has given this connection up");
            } else if !self.upcall.wait_for_store(seen) {
                return Err("stopped");
            }
        }
        Ok(())
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        self.stop();
        self.hypervisor.destroy(self.id);
    }
}

impl Calls for Domain {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        self.heap.allocate(len)
    }

    fn grant(&self, pages: &Pages, to: u16, read_only: bool) -> Result<u32, HypervisorError> {
        let frames = self.ram.frames_of(pages);
        let whole = || refused("grant", format!("expected pages of the domain, got {} bytes elsewhere", pages.len()));
        self.table.grant(frames.ok_or_else(whole)?, to, read_only)
    }

    fn end_access(&self, first: u32, count: u32) -> Result<(), HypervisorError> {
        self.table.end_access(first, count)
    }

    fn map(&self, of: u16, first: u32, count: u32, access: Access) -> Result<Pages, HypervisorError> {
        self.hypervisor.map(self.id, of, first, count, access)
    }

    fn alloc_unbound(&self, remote: u16) -> Result<u32, HypervisorError> {
        self.hypervisor.alloc_unbound(self.id, remote)
    }

    fn bind_interdomain(&self, remote: u16, port: u32) -> Result<u32, HypervisorError> {
        self.hypervisor.bind_interdomain(self.id, remote, port)
    }

    fn send(&self, port: u32) -> Result<(), HypervisorError> {
        self.hypervisor.send(self.id, port)
    }

    fn close(&self, port: u32) -> Result<(), HypervisorError> {
        self.hypervisor.close(self.id, port)
    }

    fn next_event(&self) -> Option<u32> {
        self.upcall.next()
    }

    fn unmask(&self, port: u32) -> Result<(), HypervisorError> {
        self.hypervisor.unmask(self.id, port)
    }

    fn store_send(&self, bytes: &[u8]) -> Result<(), HypervisorError> {
        let step = |done| self.interface.put(REQUESTS, &bytes[done..]);
        self.exchange(bytes.len(), step).map_err(|reason| refused("xenstore", reason))
    }

    fn store_receive(&self, bytes: &mut [u8]) -> bool {
        self.exchange(bytes.len(), |done| self.interface.take(RESPONSES, &mut bytes[done..])).is_ok()
    }

    fn stop(&self) {
        self.upcall.stop();
    }
}
