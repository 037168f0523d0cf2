//! What both sides agree on: requests, payloads, features (the vhost-user protocol of QEMU's `docs/interop/vhost-user.rst`).
//!
//! All numbers are in the machine's own byte order: both sides run on it.

/// Bytes of a header: request, flags, size of the payload, 32 bits each.
pub const HEADER_LEN: usize = 12;
/// The most bytes of payload that any message here has, with room to spare: a front end that announces more is refused.
pub const PAYLOAD_MAX: usize = 4096;
/// The most regions of a [`Request::SetMemTable`].
pub const MEM_TABLE_MAX: usize = 8;
/// The most memory slots that [`Request::AddMemReg`] fills: what [`Request::GetMaxMemSlots`] answers.
pub const MEM_SLOTS: u64 = 509;
/// The most bytes of configuration in one message.
pub const CONFIG_MAX: usize = 256;

/// Header flags: the version of the protocol, which is 1.
pub const VERSION: u32 = 1;
/// Header flags: the bits of the version.
pub const VERSION_MASK: u32 = 3;
/// Header flag: this is a reply.
pub const REPLY: u32 = 1 << 2;
/// Header flag: a reply is wanted ([`ProtocolFeatures::REPLY_ACK`]).
pub const NEED_REPLY: u32 = 1 << 3;

/// Feature bit of [`Request::GetFeatures`]: writes to guest memory are logged (VHOST_F_LOG_ALL).
pub const LOG_ALL: u64 = 1 << 26;
/// Feature bit of [`Request::GetFeatures`]: there are protocol features (VHOST_USER_F_PROTOCOL_FEATURES).
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// In [`VringAddr::flags`]: writes to the used ring are logged at [`VringAddr::log`] (VHOST_VRING_F_LOG).
pub const VRING_LOG: u32 = 1;

/// In the payload of [`Request::SetVringKick`] and its like: the queue.
pub const VRING_INDEX_MASK: u64 = 0xff;
/// In the payload of [`Request::SetVringKick`] and its like: no file descriptor comes with it.
pub const VRING_NOFD: u64 = 1 << 8;

bitflags::bitflags! {
    /// What the two sides can do beyond the oldest protocol.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ProtocolFeatures: u64 {
        /// Several queues, and a message that asks how many.
        const MQ = 1 << 0;
        /// The log of written pages is shared memory.
        const LOG_SHMFD = 1 << 1;
        /// Any message is acknowledged if its sender asks for that.
        const REPLY_ACK = 1 << 3;
        /// The back end may send requests, over a socket of its own.
        const BACKEND_REQ = 1 << 5;
        /// The configuration is with the back end.
        const CONFIG = 1 << 9;
        /// The back end's requests may carry file descriptors.
        const BACKEND_SEND_FD = 1 << 10;
        /// Descriptors in flight are known to shared memory, which outlives the connection.
        const INFLIGHT_SHMFD = 1 << 12;
        /// The device can be reset by a message.
        const RESET_DEVICE = 1 << 13;
        /// Kicks and calls are messages.
        const INBAND_NOTIFICATIONS = 1 << 14;
        /// Memory regions are added and removed one by one.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// The device status is with the back end.
        const STATUS = 1 << 16;

        const _ = !0;
    }
}

macro_rules! requests {
    ($(#[$doc:meta])* $name:ident { $($(#[$about:meta])* $request:ident = $code:literal, $told:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum $name {
            $($(#[$about])* $request = $code,)*
        }

        impl $name {
            /// The request of this number, if it is one.
            pub const fn from_code(code: u32) -> Option<Self> {
                match code {
                    $($code => Some(Self::$request),)*
                    _ => None,
                }
            }

            /// Its name in the protocol.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$request => $told,)*
                }
            }
        }
    };
}

requests! {
    /// What the front end asks for.
    Request {
        /// The features of device and back end, u64.
        GetFeatures = 1, "GET_FEATURES";
        /// The features accepted, u64.
        SetFeatures = 2, "SET_FEATURES";
        /// The session begins.
        SetOwner = 3, "SET_OWNER";
        /// Deprecated: everything stops.
        ResetOwner = 4, "RESET_OWNER";
        /// All memory regions, with a file descriptor each.
        SetMemTable = 5, "SET_MEM_TABLE";
        /// The log of written pages.
        SetLogBase = 6, "SET_LOG_BASE";
        /// What to signal when something was logged.
        SetLogFd = 7, "SET_LOG_FD";
        /// Entries of a queue.
        SetVringNum = 8, "SET_VRING_NUM";
        /// Where the parts of a queue are.
        SetVringAddr = 9, "SET_VRING_ADDR";
        /// Where the device begins in a queue.
        SetVringBase = 10, "SET_VRING_BASE";
        /// Stops a queue and asks where the device was.
        GetVringBase = 11, "GET_VRING_BASE";
        /// A queue's kicks.
        SetVringKick = 12, "SET_VRING_KICK";
        /// A queue's calls (interrupts).
        SetVringCall = 13, "SET_VRING_CALL";
        /// What to signal when a queue is broken.
        SetVringErr = 14, "SET_VRING_ERR";
        /// The protocol features offered, u64.
        GetProtocolFeatures = 15, "GET_PROTOCOL_FEATURES";
        /// The protocol features accepted, u64.
        SetProtocolFeatures = 16, "SET_PROTOCOL_FEATURES";
        /// How many queues there are, u64.
        GetQueueNum = 17, "GET_QUEUE_NUM";
        /// A queue is served, or not.
        SetVringEnable = 18, "SET_VRING_ENABLE";
        /// The socket for the back end's requests.
        SetBackendReqFd = 21, "SET_BACKEND_REQ_FD";
        /// A translation of device addresses.
        IotlbMsg = 22, "IOTLB_MSG";
        /// Reads configuration.
        GetConfig = 24, "GET_CONFIG";
        /// Writes configuration.
        SetConfig = 25, "SET_CONFIG";
        /// Asks for the memory that knows what is in flight.
        GetInflightFd = 31, "GET_INFLIGHT_FD";
        /// Hands over that memory.
        SetInflightFd = 32, "SET_INFLIGHT_FD";
        /// Resets the device.
        ResetDevice = 34, "RESET_DEVICE";
        /// A kick.
        VringKick = 35, "VRING_KICK";
        /// How many memory slots there are, u64.
        GetMaxMemSlots = 36, "GET_MAX_MEM_SLOTS";
        /// A memory region more.
        AddMemReg = 37, "ADD_MEM_REG";
        /// A memory region less.
        RemMemReg = 38, "REM_MEM_REG";
        /// The device status, u64.
        SetStatus = 39, "SET_STATUS";
        /// The device status, u64.
        GetStatus = 40, "GET_STATUS";
    }
}

requests! {
    /// What the back end asks for.
    BackendRequest {
        /// A translation is missing.
        IotlbMsg = 1, "BACKEND_IOTLB_MSG";
        /// The configuration changed.
        ConfigChange = 2, "BACKEND_CONFIG_CHANGE_MSG";
        /// A call (interrupt) of a queue.
        VringCall = 4, "BACKEND_VRING_CALL";
        /// A queue is broken.
        VringErr = 5, "BACKEND_VRING_ERR";
    }
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// [`Request`] or [`BackendRequest`].
    pub request: u32,
    /// [`VERSION`], [`REPLY`], [`NEED_REPLY`].
    pub flags: u32,
    /// Bytes of payload.
    pub size: u32,
}

/// A payload of fixed size.
pub trait Payload: Sized {
    /// Bytes.
    const LEN: usize;

    /// As it stands in a message.
    fn to_bytes(&self) -> Vec<u8>;

    /// From the first [`Payload::LEN`] bytes, which are there.
    fn from_bytes(bytes: &[u8]) -> Self;
}

/// Fields one after another.
macro_rules! payload {
    ($name:ident: $($field:ident: $type:ty),*; $padding:literal) => {
        impl Payload for $name {
            const LEN: usize = $padding $(+ size_of::<$type>())*;

            fn to_bytes(&self) -> Vec<u8> {
                let mut bytes = Vec::with_capacity(Self::LEN);
                $(bytes.extend(self.$field.to_ne_bytes());)*
                bytes.resize(Self::LEN, 0);
                bytes
            }

            fn from_bytes(bytes: &[u8]) -> Self {
                let mut at = 0;
                $(let $field = {
                    let mut field = [0; size_of::<$type>()];
                    let end = at + size_of::<$type>();
                    field.copy_from_slice(&bytes[at..end]);
                    at = end;
                    <$type>::from_ne_bytes(field)
                };)*
                let _ = at;
                Self { $($field),* }
            }
        }
    };
}

impl Payload for u64 {
    const LEN: usize = 8;

    fn to_bytes(&self) -> Vec<u8> {
        self.to_ne_bytes().into()
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let mut value = [0; 8];
        value.copy_from_slice(&bytes[..8]);
        Self::from_ne_bytes(value)
    }
}

payload!(Header: request: u32, flags: u32, size: u32; 0);

/// A number about a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringState {
    /// The queue.
    pub index: u32,
    /// What about it.
    pub num: u32,
}
payload!(VringState: index: u32, num: u32; 0);

/// Where the parts of a queue are: addresses of the front end, or device addresses with VIRTIO_F_ACCESS_PLATFORM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringAddr {
    /// The queue.
    pub index: u32,
    /// [`VRING_LOG`].
    pub flags: u32,
    /// Descriptor area.
    pub descriptors: u64,
    /// Device area (split: used ring).
    pub used: u64,
    /// Driver area (split: available ring).
    pub available: u64,
    /// Guest address under which the used ring is logged.
    pub log: u64,
}
payload!(VringAddr: index: u32, flags: u32, descriptors: u64, used: u64, available: u64, log: u64; 0);

/// A region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical start.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where it starts in the front end's address space.
    pub user: u64,
    /// Where it starts in its file, bytes.
    pub offset: u64,
}
payload!(Region: guest: u64, size: u64, user: u64, offset: u64; 0);

/// The log of written pages in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogArea {
    /// Bytes.
    pub size: u64,
    /// Where it starts in its file, bytes.
    pub offset: u64,
}
payload!(LogArea: size: u64, offset: u64; 0);

/// What precedes bytes of configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigArea {
    /// From the start of the configuration, bytes.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// 0: written by the driver; 1: restored when a guest moves in.
    pub flags: u32,
}
payload!(ConfigArea: offset: u32, size: u32, flags: u32; 0);

/// The memory that knows what is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightArea {
    /// Bytes.
    pub size: u64,
    /// Where it starts in its file, bytes.
    pub offset: u64,
    /// Queues.
    pub queues: u16,
    /// Entries of a queue.
    pub entries: u16,
}
payload!(InflightArea: size: u64, offset: u64, queues: u16, entries: u16; 4);

/// A translation of device addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Iotlb {
    /// Device address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Address of the front end.
    pub user: u64,
    /// Bit 0: the device may read; bit 1: it may write.
    pub access: u8,
    /// [`Iotlb::MISS`], …
    pub kind: u8,
}
payload!(Iotlb: iova: u64, size: u64, user: u64, access: u8, kind: u8; 6);

impl Iotlb {
    /// The back end lacks a translation.
    pub const MISS: u8 = 1;
    /// The front end has one.
    pub const UPDATE: u8 = 2;
    /// A translation is not valid any more.
    pub const INVALIDATE: u8 = 3;
    /// There is none.
    pub const ACCESS_FAIL: u8 = 4;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_have_the_sizes_of_the_protocol() {
        assert_eq!(Header::LEN, HEADER_LEN);
        assert_eq!((VringState::LEN, VringAddr::LEN, Region::LEN), (8, 40, 32));
        assert_eq!((LogArea::LEN, ConfigArea::LEN, InflightArea::LEN, Iotlb::LEN), (16, 12, 24, 32));
    }

    #[test]
    fn what_is_written_is_read_again() {
        let iotlb = Iotlb { iova: 1 << 40, size: 4096, user: 7, access: 3, kind: Iotlb::UPDATE };
        assert_eq!(iotlb.to_bytes().len(), Iotlb::LEN);
        assert_eq!(Iotlb::from_bytes(&iotlb.to_bytes()), iotlb);
        let inflight = InflightArea { size: 1, offset: 2, queues: 3, entries: 4 };
        assert_eq!(InflightArea::from_bytes(&inflight.to_bytes()), inflight);
    }

    #[test]
    fn every_request_has_its_number() {
        for code in 0..64 {
            assert!(Request::from_code(code).is_none_or(|request| request as u32 == code));
        }
        assert_eq!(Request::from_code(23), None, "SET_VRING_ENDIAN belongs to a feature that is not offered");
        assert_eq!(BackendRequest::from_code(4).map(BackendRequest::name), Some("BACKEND_VRING_CALL"));
    }
}
