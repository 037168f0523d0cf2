//! What both sides agree on: requests, status, configuration.

use polyvirt_core::Features;

/// The virtio device type.
pub const DEVICE_TYPE: u32 = 2;
/// Bytes of a sector, whatever the block size.
pub const SECTOR_SIZE: u64 = 512;
/// Bytes of a request header: le32 type, le32 reserved (2008: priority), le64 sector.
pub const HEADER_LEN: u32 = 16;
/// Bytes of the answer to [`GET_ID`].
pub const ID_LEN: u32 = 20;
/// Bytes of a segment of [`DISCARD`] and [`WRITE_ZEROES`]: le64 sector, le32 sectors, le32 flags.
pub const SEGMENT_LEN: u32 = 16;
/// Bytes of the configuration up to the fields of write zeroes.
pub const CONFIG_LEN: usize = 60;

/// The most data segments of a request (VIRTIO_BLK_F_SEG_MAX).
pub const SEG_MAX: Features = Features::bit(2);
/// The medium cannot be written (VIRTIO_BLK_F_RO).
pub const RO: Features = Features::bit(5);
/// The configuration has a block size (VIRTIO_BLK_F_BLK_SIZE).
pub const BLK_SIZE: Features = Features::bit(6);
/// Writes can be made durable (VIRTIO_BLK_F_FLUSH).
pub const FLUSH_FEATURE: Features = Features::bit(9);
/// The driver can change the mode of the cache (VIRTIO_BLK_F_CONFIG_WCE).
pub const CONFIG_WCE: Features = Features::bit(11);
/// There are several queues (VIRTIO_BLK_F_MQ).
pub const MQ: Features = Features::bit(12);
/// Sectors can be discarded (VIRTIO_BLK_F_DISCARD).
pub const DISCARD_FEATURE: Features = Features::bit(13);
/// Sectors can be zeroed (VIRTIO_BLK_F_WRITE_ZEROES).
pub const WRITE_ZEROES_FEATURE: Features = Features::bit(14);

/// Read.
pub const IN: u32 = 0;
/// Write.
pub const OUT: u32 = 1;
/// Make durable what was written.
pub const FLUSH: u32 = 4;
/// The device's name, 20 bytes.
pub const GET_ID: u32 = 8;
/// Forget sectors.
pub const DISCARD: u32 = 11;
/// Zero sectors.
pub const WRITE_ZEROES: u32 = 13;

/// A bit of the type: what was a barrier in 2008.
pub const BARRIER: u32 = 1 << 31;

/// The request succeeded.
pub const OK: u8 = 0;
/// The device or the request was at fault.
pub const IOERR: u8 = 1;
/// The device does not know the request.
pub const UNSUPP: u8 = 2;

/// Flag of a segment of [`WRITE_ZEROES`]: the sectors may be deallocated.
pub const UNMAP: u32 = 1;

/// Offsets in the configuration.
pub mod config {
    /// le64: sectors.
    pub const CAPACITY: usize = 0;
    /// le32: data segments of a request.
    pub const SEG_MAX: usize = 12;
    /// le32: bytes of a block.
    pub const BLK_SIZE: usize = 20;
    /// u8: whether writes may be done before they are durable, until a flush (0: they may not).
    pub const WRITEBACK: usize = 32;
    /// le16: queues.
    pub const NUM_QUEUES: usize = 34;
    /// le32: sectors of a discard segment.
    pub const MAX_DISCARD_SECTORS: usize = 36;
    /// le32: segments of a discard request.
    pub const MAX_DISCARD_SEG: usize = 40;
    /// le32: sectors that a discard should be aligned to.
    pub const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    /// le32: sectors of a write zeroes segment.
    pub const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    /// le32: segments of a write zeroes request.
    pub const MAX_WRITE_ZEROES_SEG: usize = 52;
    /// u8: whether write zeroes may deallocate.
    pub const WRITE_ZEROES_MAY_UNMAP: usize = 56;
}

/// A request header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// [`IN`], [`OUT`], …
    pub kind: u32,
    /// The first sector.
    pub sector: u64,
}

impl Header {
    /// As it stands in memory.
    pub fn to_bytes(self) -> [u8; HEADER_LEN as usize] {
        let mut bytes = [0; HEADER_LEN as usize];
        bytes[..4].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..].copy_from_slice(&self.sector.to_le_bytes());
        bytes
    }

    /// From what stands in memory.
    pub fn from_bytes(bytes: [u8; HEADER_LEN as usize]) -> Self {
        let [a, b, c, d, _, _, _, _, sector @ ..] = bytes;
        Self { kind: u32::from_le_bytes([a, b, c, d]), sector: u64::from_le_bytes(sector) }
    }
}

/// A segment of a discard or write zeroes request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first sector.
    pub sector: u64,
    /// Sectors.
    pub count: u32,
    /// [`UNMAP`].
    pub flags: u32,
}

impl Segment {
    /// As it stands in memory.
    pub fn to_bytes(self) -> [u8; SEGMENT_LEN as usize] {
        let mut bytes = [0; SEGMENT_LEN as usize];
        bytes[..8].copy_from_slice(&self.sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.count.to_le_bytes());
        bytes[12..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }

    /// From what stands in memory.
    pub fn from_bytes(bytes: [u8; SEGMENT_LEN as usize]) -> Self {
        let [sector @ .., a, b, c, d, e, f, g, h] = bytes;
        Self {
            sector: u64::from_le_bytes(sector),
            count: u32::from_le_bytes([a, b, c, d]),
            flags: u32::from_le_bytes([e, f, g, h]),
        }
    }
}
