//! The seam: the calls that a domain makes of Xen and of xenstored. What carries them out is the model, or the real thing.

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{Access, Pages};

/// Bits of a device-visible address that are an offset in a granted page; those above are a grant reference.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of a page.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// The domain that carries the toolstack.
pub const DOM0: u16 = 0;

/// What a domain asks of the hypervisor and of xenstored.
///
/// Refusals are [`HypervisorError::Refused`] with the operation and what came of it, in Xen's own terms: a `GNTST_`
/// status or an errno.
pub trait Calls: Send + Sync {
    /// Takes `len` bytes, rounded up to whole pages and zeroed, of the domain's memory, until the last handle is dropped.
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError>;

    /// Grants each page of an allocation to domain `to`, under consecutive references; returns the first.
    fn grant(&self, pages: &Pages, to: u16, read_only: bool) -> Result<u32, HypervisorError>;

    /// Takes back `count` grants from `first` on. [`HypervisorError::InUse`], and nothing changes, while one of them is
    /// mapped.
    fn end_access(&self, first: u32, count: u32) -> Result<(), HypervisorError>;

    /// Maps `count` grants of domain `of` from `first` on, one after another, until the last handle is dropped: for
    /// writing too if `access` says so.
    fn map(&self, of: u16, first: u32, count: u32, access: Access) -> Result<Pages, HypervisorError>;

    /// Allocates an event channel that domain `remote` may bind (EVTCHNOP_alloc_unbound): the port, unmasked.
    fn alloc_unbound(&self, remote: u16) -> Result<u32, HypervisorError>;

    /// Binds `port` of domain `remote` (EVTCHNOP_bind_interdomain): the port on this side, unmasked, with one event
    /// pending.
    fn bind_interdomain(&self, remote: u16, port: u32) -> Result<u32, HypervisorError>;

    /// Sends an event (EVTCHNOP_send).
    fn send(&self, port: u32) -> Result<(), HypervisorError>;

    /// Closes a port (EVTCHNOP_close).
    fn close(&self, port: u32) -> Result<(), HypervisorError>;

    /// Waits for an event: its port, which is masked from now on. None once [`Calls::stop`] was called.
    fn next_event(&self) -> Option<u32>;

    /// Unmasks a port (EVTCHNOP_unmask); an event that came meanwhile is delivered.
    fn unmask(&self, port: u32) -> Result<(), HypervisorError>;

    /// Sends bytes to xenstored. A message may be sent in pieces, but only by one thread at a time.
    fn store_send(&self, bytes: &[u8]) -> Result<(), HypervisorError>;

    /// Waits until xenstored has sent as many bytes as `bytes` holds. False once [`Calls::stop`] was called, or the
    /// connection is lost.
    fn store_receive(&self, bytes: &mut [u8]) -> bool;

    /// Ends all waiting, for good.
    fn stop(&self);
}
