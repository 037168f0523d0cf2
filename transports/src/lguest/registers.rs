//! What both sides agree on: the device page and the places on it (Linux 2.6.25, `include/linux/lguest_launcher.h`).
//!
//! The first page above RAM holds a descriptor for each device, one right after another, not aligned; type 0, or the
//! end of the page, ends the list. All numbers are little-endian.
//!
//! | bytes | content |
//! |---|---|
//! | 5 | type, number of queues, feature length, configuration length, status |
//! | 8 for each queue | u16 entries, u16 interrupt line, u32 page frame of the ring |
//! | feature length | the features that the device offers, bit 0 in the first byte |
//! | feature length | the features that the driver accepts |
//! | configuration length | the device configuration |

use alloc::vec::Vec;
use core::ops::Range;

use polyvirt_core::memory::{MemoryError, Pages};
use polyvirt_core::queue::split::layout::{driver_len, legacy};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// The most entries of a ring (`VIRTQUEUE_NUM`); the host allocates room for as many.
pub const RING_ENTRIES: u16 = 128;

/// Pages of a ring of [`RING_ENTRIES`]: descriptors and available ring in the first, the used ring in the second.
pub const RING_PAGES: usize = 2;

/// Where the device side of a device is.
///
/// A place is taken when its device is plugged in: the descriptor of the next one starts where this one ends.
#[derive(Clone, Debug)]
pub struct HostPlace {
    /// The device page.
    pub page: Pages,
    /// Where in the device page the descriptor starts.
    pub offset: usize,
    /// Bytes of the descriptor: 0 until the device side has written it.
    pub len: usize,
    /// The rings.
    pub rings: Vec<HostRing>,
}

/// A ring, allocated by the host above the guest's RAM.
#[derive(Clone, Debug)]
pub struct HostRing {
    /// Guest-physical address.
    pub address: u64,
    /// Its [`RING_PAGES`].
    pub pages: Pages,
    /// Its interrupt line.
    pub line: u16,
}

/// Where a device is, for its driver.
#[derive(Clone, Debug)]
pub struct GuestPlace {
    /// The memory above RAM: the device page, then the rings.
    pub memory: Pages,
    /// Guest-physical address of that memory.
    pub address: u64,
    /// Where in the device page the descriptor starts.
    pub offset: usize,
}

/// The first bytes of a descriptor (`struct lguest_device_desc`), and the offsets that follow from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceDescriptor {
    /// Virtio device type, one byte.
    pub device_type: u8,
    /// Number of queues.
    pub queues: u8,
    /// Bytes of each of the two feature fields.
    pub feature_len: u8,
    /// Bytes of the configuration.
    pub config_len: u8,
}

impl DeviceDescriptor {
    /// Where the status byte is.
    pub const STATUS: usize = 4;
    /// Bytes before the first queue.
    pub const HEADER: usize = 5;
    /// Bytes of a queue.
    pub const QUEUE: usize = 8;

    /// The first bytes of a descriptor, with a status of 0.
    pub const fn to_bytes(self) -> [u8; Self::HEADER] {
        [self.device_type, self.queues, self.feature_len, self.config_len, 0]
    }

    /// Reads the first bytes of the descriptor at `offset` of the device page. None if the list ends there: type 0,
    /// the end of the page, or a descriptor that would reach beyond it.
    pub fn read(page: &Pages, offset: usize) -> Result<Option<Self>, MemoryError> {
        if offset > PAGE - Self::HEADER {
            return Ok(None);
        }
        let mut header = [0; Self::HEADER];
        page.read(offset, &mut header)?;
        let [device_type, queues, feature_len, config_len, _] = header;
        let descriptor = Self { device_type, queues, feature_len, config_len };
        Ok((device_type != 0 && offset + descriptor.len() <= PAGE).then_some(descriptor))
    }

    /// Where queue `index` is.
    pub fn queue(&self, index: u16) -> Option<usize> {
        (index < self.queues.into()).then(|| Self::HEADER + Self::QUEUE * usize::from(index))
    }

    /// Where the offered features are.
    pub fn offered(&self) -> Range<usize> {
        let start = Self::HEADER + Self::QUEUE * usize::from(self.queues);
        start..start + usize::from(self.feature_len)
    }

    /// Where the accepted features are.
    pub fn accepted(&self) -> Range<usize> {
        let start = self.offered().end;
        start..start + usize::from(self.feature_len)
    }

    /// Where the configuration is.
    pub fn config(&self) -> Range<usize> {
        let start = self.accepted().end;
        start..start + usize::from(self.config_len)
    }

    /// Bytes of the descriptor.
    pub fn len(&self) -> usize {
        self.config().end
    }

    /// A descriptor has a header at least.
    pub const fn is_empty(&self) -> bool {
        false
    }
}

/// A queue in a descriptor (`struct lguest_vqconfig`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueEntry {
    /// Entries; 0 if the queue is not there.
    pub size: u16,
    /// Interrupt line.
    pub line: u16,
    /// Page frame of the ring: its guest-physical address / 4096.
    pub frame: u32,
}

impl QueueEntry {
    /// As it is in the device page.
    pub fn to_bytes(self) -> [u8; DeviceDescriptor::QUEUE] {
        let (size, line, frame) = (self.size.to_le_bytes(), self.line.to_le_bytes(), self.frame.to_le_bytes());
        [size[0], size[1], line[0], line[1], frame[0], frame[1], frame[2], frame[3]]
    }

    /// From the device page.
    pub fn from_bytes(bytes: [u8; DeviceDescriptor::QUEUE]) -> Self {
        let [size_0, size_1, line_0, line_1, frame @ ..] = bytes;
        let (size, line) = (u16::from_le_bytes([size_0, size_1]), u16::from_le_bytes([line_0, line_1]));
        Self { size, line, frame: u32::from_le_bytes(frame) }
    }
}

/// The areas of a ring with `size` entries, as offsets from its start: descriptor table, available ring, used ring
/// (the legacy layout, 2.7.2; both event words included).
pub const fn ring_areas(size: u16) -> [Range<usize>; 3] {
    let (driver, device, end) = legacy(size);
    [0..driver as usize, driver as usize..(driver + driver_len(size)) as usize, device as usize..end as usize]
}

/// The descriptors on a device page: where each starts.
pub fn descriptors(page: &Pages) -> Result<Vec<usize>, MemoryError> {
    let (mut found, mut offset) = (Vec::new(), 0);
    while let Some(descriptor) = DeviceDescriptor::read(page, offset)? {
        found.push(offset);
        offset += descriptor.len();
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec;

    #[test]
    fn a_descriptor_is_laid_out_to_the_byte() {
        let descriptor = DeviceDescriptor { device_type: 3, queues: 2, feature_len: 4, config_len: 8 };
        assert_eq!(descriptor.to_bytes(), [3, 2, 4, 8, 0]);
        assert_eq!((descriptor.queue(0), descriptor.queue(1), descriptor.queue(2)), (Some(5), Some(13), None));
        assert_eq!((descriptor.offered(), descriptor.accepted(), descriptor.config()), (21..25, 25..29, 29..37));
        assert_eq!(descriptor.len(), 37);
        let queue = QueueEntry { size: 128, line: 0x0102, frame: 0x0a0b_0c0d };
        assert_eq!(queue.to_bytes(), [128, 0, 2, 1, 0x0d, 0x0c, 0x0b, 0x0a]);
        assert_eq!(QueueEntry::from_bytes(queue.to_bytes()), queue);
    }

    #[test]
    fn a_full_ring_fills_the_pages_that_the_host_allocates() {
        // The legacy ring of 128 entries: 5124 bytes, and the used event word.
        assert_eq!(ring_areas(128), [0..2048, 2048..2310, 4096..5126]);
        assert_eq!(ring_areas(RING_ENTRIES)[2].end.div_ceil(PAGE), RING_PAGES);
        assert_eq!(ring_areas(8), [0..128, 128..150, 4096..4166]);
    }

    #[test]
    fn the_list_ends_at_type_0_at_the_end_of_the_page_and_before_a_descriptor_that_does_not_fit() {
        let page = Pages::allocate(PAGE);
        assert_eq!(descriptors(&page), Ok(vec![]));
        page.write(0, &[2, 1, 4, 8, 0]).unwrap();
        page.write(29, &[4, 0, 0, 0, 0]).unwrap();
        assert_eq!(descriptors(&page), Ok(vec![0, 29]));
        page.fill(0, PAGE, 0xff).unwrap();
        assert_eq!(descriptors(&page).unwrap(), [0], "2810 bytes each: the second does not fit");
        page.fill(0, PAGE, 1).unwrap();
        assert_eq!(descriptors(&page).unwrap().len(), PAGE / 16);
    }
}
