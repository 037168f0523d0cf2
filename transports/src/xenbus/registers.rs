//! What both sides agree on: the two directories of a device, and what a domain can do with them.
//!
//! Each side writes its own directory and watches the other's. What the driver wants done it writes as a numbered
//! *request*; the device's side answers with a *reply* of the same number. Numbers in nodes are decimal, features and
//! bytes hexadecimal.
//!
//! | backend's node | content |
//! |---|---|
//! | `state` | the backend's [`State`] |
//! | `device-type`, `num-queues` | numbers |
//! | `features` | offered, one hexadecimal number |
//! | `queue-N/max-size` | entries |
//! | `config`, `config-generation` | bytes, number |
//! | `status` | the device status |
//! | `reply` | number of the request that was carried out last |
//!
//! | frontend's node | content |
//! |---|---|
//! | `state` | the frontend's [`State`] |
//! | `driver-features` | accepted, one hexadecimal number |
//! | `queue-N/size`, `queue-N/descriptors`, `queue-N/driver`, `queue-N/device` | entries; addresses: grant reference × 4096 + offset |
//! | `queue-N/event-channel` | the frontend's port |
//! | `request` | number, then `status S`, `config OFFSET BYTES`, `enable N` or `reset N` |

use alloc::string::String;
use alloc::vec::Vec;
use core::task::Waker;

use polyvirt_core::hypervisor::{Guest, HypervisorError};

/// The most bytes of a node's value (XENSTORE_PAYLOAD_MAX); the path counts in a write.
pub const PAYLOAD_MAX: usize = 4096;

/// Where an end of the connection is (XenbusState of `xen/interface/io/xenbus.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Not set up at all.
    Unknown = 0,
    /// Getting ready.
    Initialising = 1,
    /// (Backend) waits for the frontend.
    InitWait = 2,
    /// (Frontend) rings and event channels are published.
    Initialised = 3,
    /// In use.
    Connected = 4,
    /// Going away.
    Closing = 5,
    /// Gone.
    Closed = 6,
}

impl State {
    /// From a node's value; anything else is [`State::Unknown`].
    pub fn parse(value: &str) -> Self {
        match value {
            "1" => Self::Initialising,
            "2" => Self::InitWait,
            "3" => Self::Initialised,
            "4" => Self::Connected,
            "5" => Self::Closing,
            "6" => Self::Closed,
            _ => Self::Unknown,
        }
    }
}

/// xenstore, as a domain reaches it. Paths are absolute.
pub trait Store: Send + Sync {
    /// The value of a node; none if it does not exist.
    fn read(&self, path: &str) -> Result<Option<String>, HypervisorError>;

    /// Sets a node, and creates it and those above it if needed.
    fn write(&self, path: &str, value: &str) -> Result<(), HypervisorError>;

    /// Removes a node and all below it; one that does not exist is no error.
    fn remove(&self, path: &str) -> Result<(), HypervisorError>;

    /// The names of the nodes below `path`; empty if it does not exist.
    fn list(&self, path: &str) -> Result<Vec<String>, HypervisorError>;

    /// Wakes `waker` once now, and whenever `path` or a node below it changes, until the store is dropped.
    fn watch(&self, path: &str, waker: Waker) -> Result<(), HypervisorError>;
}

/// The host half's event channels to one device's driver.
pub trait Ports: Send + Sync {
    /// Binds the frontend's `port`: its events are kicks of `queue` from now on, and the interrupts of `queue` go there.
    fn bind(&self, queue: u16, port: u32) -> Result<(), HypervisorError>;

    /// Closes the channel of `queue`, if it has one.
    fn close(&self, queue: u16);
}

/// Where the device side is.
#[derive(Clone)]
pub struct HostPlace {
    /// The backend's directory, which it may write: `/local/domain/0/backend/virtio/DOMAIN/INDEX`.
    pub backend: String,
    /// The frontend's directory: `/local/domain/DOMAIN/device/virtio/INDEX`.
    pub frontend: String,
    /// xenstore.
    pub store: alloc::sync::Arc<dyn Store>,
    /// Event channels.
    pub ports: alloc::sync::Arc<dyn Ports>,
}

/// Where the driver side is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestPlace {
    /// The frontend's directory, which it may write.
    pub frontend: String,
    /// The backend's directory.
    pub backend: String,
}

/// An event channel of the guest half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    /// Its port, for the other side to bind, and for [`Guest::notify`] as doorbell.
    pub port: u32,
    /// Its bit in [`Guest::wait`].
    pub line: u32,
}

/// The guest half of a hypervisor with xenstore and event channels.
pub trait Domain: Guest<Place = GuestPlace> {
    /// xenstore.
    fn store(&self) -> &dyn Store;

    /// Allocates an event channel that the host's domain may bind.
    fn open_channel(&self) -> Result<Channel, HypervisorError>;

    /// Closes a channel; its bit may mean another one afterwards.
    fn close_channel(&self, channel: Channel) -> Result<(), HypervisorError>;

    /// Watches `path`: a bit in [`Guest::wait`] that is pending once now and whenever `path` or a node below it changed.
    fn watch(&self, path: &str) -> Result<u32, HypervisorError>;
}
