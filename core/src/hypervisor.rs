//! What a hypervisor is, seen from virtio: four mechanisms, each with a guest half and a host half.
//!
//! | | [`Guest`] | [`Host`] |
//! |---|---|---|
//! | memory | [`Share::share`] | [`Host::memory`] |
//! | kick | [`Guest::notify`] | [`BusDevice::kick`] |
//! | interrupt | [`Guest::take`] | [`Host::interrupt`] |
//! | discovery | [`Guest::enumerate`] | [`Host::plug`] |
//!
//! A port implements these and nothing else: it names no device and touches no ring.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Waker;
use core::time::Duration;

use crate::memory::{Access, GuestMemory, Pages};

/// A hypervisor: its two halves.
pub trait Hypervisor {
    /// The half that serves devices.
    type Host: Host;
    /// The half that drives them.
    type Guest: Guest;
}

/// The host half.
pub trait Host {
    /// Guest memory as a device on this hypervisor sees it.
    type Memory: GuestMemory + Send + 'static;
    /// A place on the hypervisor's bus: what the device side of a transport has to know about where it is.
    type Place;

    /// Memory: a handle that resolves device-visible addresses.
    fn memory(&self) -> Self::Memory;

    /// Discovery: reserves a place for a device with `queues` queues.
    fn place(&mut self, device_type: u32, queues: u16) -> Result<Self::Place, HypervisorError>;

    /// Interrupt: what the device at `place` raises.
    fn interrupt(&self, place: &Self::Place) -> Arc<dyn Interrupt>;

    /// Discovery: puts `device` at `place`, where the guest finds it; its kicks and accesses are served from now on.
    fn plug(&mut self, place: Self::Place, device: Box<dyn BusDevice>) -> Result<(), HypervisorError>;
}

/// A device behind its transport, as a hypervisor's bus sees it.
pub trait BusDevice: Send {
    /// The guest read `data.len()` bytes at `offset` of the device's place. Any offset and length is answered.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest wrote `data` at `offset` of the device's place; `data` is empty if only the address is known.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// Kick: the guest rang the doorbell of `queue`. True if there is more to do: call again, others in between.
    fn kick(&mut self, queue: u16) -> bool;

    /// The [`Waker`] fired: a backend or the transport has news. True as in [`BusDevice::kick`].
    fn poll(&mut self) -> bool;

    /// Hands over what to wake when something outside the guest has news; [`BusDevice::poll`] is called then.
    fn set_waker(&mut self, waker: Waker);
}

/// The interrupts of one device.
pub trait Interrupt: Send + Sync {
    /// Tells the driver about `cause`. May be called from any thread.
    fn raise(&self, cause: Cause);
}

/// Why a device interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Buffers of this queue were used.
    Queue(u16),
    /// The configuration changed, or the device needs a reset.
    Config,
}

/// The guest's side of memory: what drivers allocate rings and buffers with.
pub trait Share: Send + Sync {
    /// Allocates zeroed memory that can be shared: `len` bytes rounded up to whole pages of 4096. It returns to the
    /// guest when the last handle to it is dropped.
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError>;

    /// Lets the device access `pages` (all of an allocation) as `access` says, until [`Share::unshare`].
    /// Returns the address for descriptors; the pages are contiguous there.
    fn share(&self, pages: &Pages, access: Access) -> Result<u64, HypervisorError>;

    /// Takes back what was shared at `address`. Fails while the device is using it, where the hypervisor can tell.
    fn unshare(&self, address: u64) -> Result<(), HypervisorError>;
}

/// The guest half.
pub trait Guest: Share {
    /// A place on the hypervisor's bus: what the driver side of a transport has to know about where the device is.
    type Place;

    /// Kick: rings `doorbell` (an address, a port, a queue's page: the transport knows) with `value`.
    fn notify(&self, doorbell: u64, value: u32) -> Result<(), HypervisorError>;

    /// Interrupt: whether the one on `line` is pending; if so it is taken, acknowledged. Never waits. An interrupt that came
    /// before is not lost: it stays pending until it is taken.
    fn take(&self, line: u32) -> Result<bool, HypervisorError>;

    /// Discovery: what is there.
    fn enumerate(&self) -> Result<Vec<Self::Place>, HypervisorError>;
}

/// A guest that can also wait: what calls that block are made of. Drivers that are polled, or run by an interrupt handler,
/// do without it.
pub trait WaitForInterrupt: Guest {
    /// Waits until an interrupt on one of `lines` is pending, and leaves it to [`Guest::take`]. False if none was within
    /// `most`; without lines, that is how long it waits.
    fn wait(&self, lines: &[u32], most: Duration) -> Result<bool, HypervisorError>;
}

/// A guest whose interrupt handler wakes tasks: what futures are made of.
pub trait WakeOnInterrupt: Guest {
    /// Has `waker` woken, once, when an interrupt on one of `lines` is pending; at once if one is. Whoever hands over a waker
    /// for the same lines again replaces the one before.
    fn wake_on(&self, lines: &[u32], waker: &Waker) -> Result<(), HypervisorError>;
}

/// Why a hypervisor did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HypervisorError {
    /// It cannot be used on this host.
    #[error("{0}")]
    Unavailable(String),
    /// The guest has no memory, grant, port or place left.
    #[error("out of {0}")]
    Exhausted(&'static str),
    /// It refused a call.
    #[error("{call}: {reason}")]
    Refused {
        /// The call or ioctl.
        call: &'static str,
        /// What it said.
        reason: String,
    },
    /// What was shared is in use by the other side.
    #[error("{address:#x} is in use by the device")]
    InUse {
        /// The address it was shared at.
        address: u64,
    },
    /// The guest is gone, or did what it must not.
    #[error("guest stopped: {0}")]
    GuestStopped(String),
}
