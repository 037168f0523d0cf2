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
//! | `config` | its generation and its bytes, `NUMBER BYTES`: in one node, so that they change at once |
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

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::task::Waker;

use polyvirt_core::Features;
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

/// What a driver asks for, after the number of the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Write the device status.
    Status(u8),
    /// Write the configuration.
    Config {
        /// Bytes from its start.
        offset: u32,
        /// What to write.
        data: Vec<u8>,
    },
    /// Take a queue into use that was set up after DRIVER_OK.
    Enable(u16),
    /// Reset one queue.
    Reset(u16),
}

impl Request {
    /// The node's value for request `number`.
    pub fn encode(&self, number: u32) -> String {
        match self {
            Self::Status(status) => format!("{number} status {status}"),
            Self::Config { offset, data } => format!("{number} config {offset} {}", encode_bytes(data)),
            Self::Enable(queue) => format!("{number} enable {queue}"),
            Self::Reset(queue) => format!("{number} reset {queue}"),
        }
    }

    /// The number of the request in a node's value, and what is asked for: none if it cannot be understood.
    pub fn decode(value: &str) -> Option<(u32, Option<Self>)> {
        let mut words = value.splitn(4, ' ');
        let number = words.next()?.parse().ok()?;
        let mut request = || match (words.next()?, words.next()?, words.next()) {
            ("status", status, None) => Some(Self::Status(status.parse().ok()?)),
            ("config", offset, Some(data)) => {
                Some(Self::Config { offset: offset.parse().ok()?, data: decode_bytes(data)? })
            }
            ("enable", queue, None) => Some(Self::Enable(queue.parse().ok()?)),
            ("reset", queue, None) => Some(Self::Reset(queue.parse().ok()?)),
            _ => None,
        };
        Some((number, request()))
    }
}

/// Bytes as pairs of hexadecimal digits.
pub fn encode_bytes(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The reverse of [`encode_bytes`]; none for anything else, or for more than a node can hold.
pub fn decode_bytes(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) || digits.len() > PAYLOAD_MAX {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    digits.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// A configuration and its generation.
pub fn encode_config(generation: u32, bytes: &[u8]) -> String {
    format!("{generation} {}", encode_bytes(bytes))
}

/// The reverse of [`encode_config`].
pub fn decode_config(text: &str) -> Option<(u32, Vec<u8>)> {
    let (generation, bytes) = text.split_once(' ')?;
    Some((generation.parse().ok()?, decode_bytes(bytes)?))
}

/// A set of features as one hexadecimal number.
pub fn encode_features(features: Features) -> String {
    format!("{:x}", features.bits())
}

/// The reverse of [`encode_features`].
pub fn decode_features(text: &str) -> Option<Features> {
    u128::from_str_radix(text, 16).ok().map(Features::from_bits_retain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn requests_survive_the_way_through_a_node() {
        for request in [
            Request::Status(15),
            Request::Config { offset: 8, data: vec![0, 0xff, 0x5a] },
            Request::Enable(3),
            Request::Reset(u16::MAX),
        ] {
            assert_eq!(Request::decode(&request.encode(7)), Some((7, Some(request))));
        }
    }

    #[test]
    fn what_cannot_be_understood_is_none_of_them() {
        for text in ["", "x", "-1 status 1", "99999999999 status 1", "\u{1F980}"] {
            assert_eq!(Request::decode(text), None, "{text}");
        }
        for text in
            ["1", "1 status", "1 status 256", "1 config 0 abc", "1 config 0 zz", "1 reset 65536", "1 status 1 2"]
        {
            assert_eq!(Request::decode(text), Some((1, None)), "{text}");
        }
        assert_eq!(decode_bytes(&"00".repeat(PAYLOAD_MAX)), None);
        assert_eq!(decode_features("1ffffffffffffffffffffffffffffffffff"), None);
    }
}
