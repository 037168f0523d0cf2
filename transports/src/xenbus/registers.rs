//! What both sides agree on: the two directories of a device, and what a domain can do with them.
//!
//! Each side writes its own directory and watches the nodes of the other's that change. What the driver wants done it
//! writes as a numbered *request* of one or more operations; the device's side carries them out in their order, and
//! answers with a *reply* of the same number that says all there is to say of the device. A node costs a round trip to
//! xenstored, so there are few, and what belongs together changes at once. Words are separated by one space; numbers are
//! decimal, features, addresses and bytes hexadecimal.
//!
//! | backend's node | content |
//! |---|---|
//! | `state` | the backend's [`State`] |
//! | `device` | what does not change: device type, features offered, the most entries of each queue |
//! | `reply` | number of the request that was carried out last, device status, the configuration's generation and its bytes |
//! | `error` | what was wrong with a request |
//!
//! | frontend's node | content |
//! |---|---|
//! | `state` | the frontend's [`State`] |
//! | `request` | number, then operations with a `;` between two of them |
//!
//! | operation | means |
//! |---|---|
//! | `features F` | accepts features |
//! | `queue N SIZE DESCRIPTORS DRIVER DEVICE PORT` | enables a queue; an address is grant reference × 4096 + offset |
//! | `status S` | writes the device status; 0 resets the device |
//! | `config OFFSET BYTES` | writes the configuration |
//! | `reset N` | resets one queue |
//!
//! The connection opens once: the backend waits in [`State::InitWait`], the frontend says [`State::Connected`], and then
//! the backend does. A reset of the device is a request and leaves the connection as it is.
//!
//! The backend follows the frontend's state as it reads it, not each change: one at [`State::Closing`] or
//! [`State::Closed`] it follows there, one that is gone it lets go of, and for one at [`State::Initialising`] it passes
//! [`State::Closed`] and waits again. A frontend that finds the backend anywhere else than waiting goes through
//! [`State::Closed`] and [`State::Initialising`] itself, and waits for the backend to follow at each.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::task::Waker;

use polyvirt_core::hypervisor::{Guest, HypervisorError};
use polyvirt_core::{Features, Status};

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
    /// Its line, for [`Guest::take`].
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

    /// Watches `path`: a line for [`Guest::take`] that is pending once now and whenever `path` or a node below it changed.
    fn watch(&self, path: &str) -> Result<u32, HypervisorError>;
}

/// What a driver asks for: a part of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Accept features.
    Features(Features),
    /// Enable a queue.
    Queue(Setup),
    /// Write the device status.
    Status(Status),
    /// Write the configuration.
    Config {
        /// Bytes from its start.
        offset: u32,
        /// What to write.
        data: Vec<u8>,
    },
    /// Reset one queue.
    Reset(u16),
}

/// Where a queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Its number.
    pub index: u16,
    /// Entries.
    pub size: u32,
    /// The addresses of its descriptor, driver and device area.
    pub areas: [u64; 3],
    /// The frontend's port for its events.
    pub port: u32,
}

impl Operation {
    fn encode(&self) -> String {
        match self {
            Self::Features(features) => format!("features {:x}", features.bits()),
            Self::Queue(Setup { index, size, areas: [descriptors, driver, device], port }) => {
                format!("queue {index} {size} {descriptors:x} {driver:x} {device:x} {port}")
            }
            Self::Status(status) => format!("status {}", status.bits()),
            Self::Config { offset, data } => format!("config {offset} {}", encode_bytes(data)),
            Self::Reset(queue) => format!("reset {queue}"),
        }
    }

    fn decode(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let mut word = || words.next();
        let address = |word: &str| u64::from_str_radix(word, 16).ok();
        let operation = match word()? {
            "features" => Self::Features(decode_features(word()?)?),
            "queue" => Self::Queue(Setup {
                index: word()?.parse().ok()?,
                size: word()?.parse().ok()?,
                areas: [address(word()?)?, address(word()?)?, address(word()?)?],
                port: word()?.parse().ok()?,
            }),
            "status" => Self::Status(Status::from_bits_retain(word()?.parse().ok()?)),
            "config" => Self::Config { offset: word()?.parse().ok()?, data: decode_bytes(word()?)? },
            "reset" => Self::Reset(word()?.parse().ok()?),
            _ => return None,
        };
        word().is_none().then_some(operation)
    }
}

/// The value of the node `request`.
pub fn encode_request(number: u32, operations: &[Operation]) -> String {
    let operations: Vec<_> = operations.iter().map(Operation::encode).collect();
    format!("{number} {}", operations.join(";"))
}

/// The number of a request, and what is asked for: none if one of its operations cannot be understood.
pub type Request = (u32, Option<Vec<Operation>>);

/// The reverse of [`encode_request`].
pub fn decode_request(value: &str) -> Option<Request> {
    let (number, operations) = value.split_once(' ').unwrap_or((value, ""));
    Some((number.parse().ok()?, operations.split(';').map(Operation::decode).collect()))
}

/// What does not change about a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// Its type.
    pub device_type: u32,
    /// The features it offers.
    pub features: Features,
    /// The most entries of each queue.
    pub max_sizes: Vec<u16>,
}

impl Description {
    /// The value of the node `device`.
    pub fn encode(&self) -> String {
        let sizes: String = self.max_sizes.iter().map(|size| format!(" {size}")).collect();
        format!("{} {:x}{sizes}", self.device_type, self.features.bits())
    }

    /// The reverse of [`Description::encode`].
    pub fn decode(value: &str) -> Option<Self> {
        let mut words = value.split(' ');
        Some(Self {
            device_type: words.next()?.parse().ok()?,
            features: decode_features(words.next()?)?,
            max_sizes: words.map(|size| size.parse().ok()).collect::<Option<_>>()?,
        })
    }
}

/// What the device's side says after each request, and whenever something changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// The number of the request that was carried out last.
    pub number: u32,
    /// The device status.
    pub status: Status,
    /// The generation of the configuration.
    pub generation: u32,
    /// The configuration.
    pub config: Vec<u8>,
}

impl Reply {
    /// The value of the node `reply`.
    pub fn encode(&self) -> String {
        let Self { number, status, generation, config } = self;
        format!("{number} {} {generation} {}", status.bits(), encode_bytes(config))
    }

    /// The reverse of [`Reply::encode`].
    pub fn decode(value: &str) -> Option<Self> {
        let mut words = value.splitn(4, ' ');
        Some(Self {
            number: words.next()?.parse().ok()?,
            status: Status::from_bits_retain(words.next()?.parse().ok()?),
            generation: words.next()?.parse().ok()?,
            config: decode_bytes(words.next()?)?,
        })
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

/// A set of features, as one hexadecimal number.
fn decode_features(text: &str) -> Option<Features> {
    u128::from_str_radix(text, 16).ok().map(Features::from_bits_retain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    const QUEUE: Setup = Setup { index: 3, size: 256, areas: [0x1000, u64::MAX, 0], port: 17 };

    #[test]
    fn requests_survive_the_way_through_a_node() {
        let operations = [
            Operation::Features(Features::VERSION_1 | Features::bit(127)),
            Operation::Queue(QUEUE),
            Operation::Status(Status::from_bits_retain(15)),
            Operation::Config { offset: 8, data: vec![0, 0xff, 0x5a] },
            Operation::Config { offset: 0, data: vec![] },
            Operation::Reset(u16::MAX),
        ];
        for operation in &operations {
            let one = core::slice::from_ref(operation);
            assert_eq!(decode_request(&encode_request(7, one)), Some((7, Some(one.to_vec()))));
        }
        assert_eq!(decode_request(&encode_request(8, &operations)), Some((8, Some(operations.to_vec()))));
    }

    #[test]
    fn as_many_queues_as_a_domain_has_lines_fit_into_one_request() {
        // A grant reference has 32 bits, an offset 12.
        let setup = |index| Setup { index, size: 32768, areas: [(1 << 44) - 1; 3], port: u32::MAX };
        let queues: Vec<_> = (0..64).map(|index| Operation::Queue(setup(index))).collect();
        assert!(encode_request(u32::MAX, &queues).len() < PAYLOAD_MAX - 64);
    }

    #[test]
    fn what_a_device_says_survives_the_way_through_a_node() {
        for max_sizes in [vec![], vec![256, 16]] {
            let description = Description { device_type: 4, features: Features::VERSION_1, max_sizes };
            assert_eq!(Description::decode(&description.encode()), Some(description));
        }
        for config in [vec![], vec![1, 0xfe]] {
            let reply = Reply { number: 9, status: Status::DRIVER_OK, generation: u32::MAX, config };
            assert_eq!(Reply::decode(&reply.encode()), Some(reply));
        }
    }

    #[test]
    fn what_cannot_be_understood_is_none_of_them() {
        for text in ["", "x", "-1 status 1", "99999999999 status 1", "\u{1F980}"] {
            assert_eq!(decode_request(text), None, "{text}");
            assert_eq!(Reply::decode(text), None, "{text}");
            assert_eq!(Description::decode(text), None, "{text}");
        }
        for operation in [
            "",
            "status",
            "status 256",
            "status 1 2",
            "config 0 abc",
            "config 0 zz",
            "reset 65536",
            "features",
            "features 1ffffffffffffffffffffffffffffffffff",
            "queue 0 1 2 3 4",
            "queue 0 1 2 3 4 5 6",
            "queue 0 1 2 3 10000000000000000 5",
        ] {
            for text in [format!("1 {operation}"), format!("1 status 1;{operation}")] {
                assert_eq!(decode_request(&text), Some((1, None)), "{text}");
            }
        }
        assert_eq!(decode_bytes(&"00".repeat(PAYLOAD_MAX)), None);
    }
}
