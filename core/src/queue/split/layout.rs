//! What both sides agree on: sizes, flags, byte order.

/// Bytes of a descriptor: 64-bit address, 32-bit length, 16-bit flags, 16-bit next.
pub const DESCRIPTOR_LEN: u64 = 16;
/// The buffer continues in descriptor `next`.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// The descriptor names a table of descriptors.
pub const INDIRECT: u16 = 4;
/// In the used ring's flags: the device asks for no kicks (2.7.10).
pub const NO_NOTIFY: u16 = 1;
/// In the available ring's flags: the driver asks for no interrupts (2.7.7).
pub const NO_INTERRUPT: u16 = 1;
/// Where the used ring of the legacy layout starts: at the next multiple of this.
pub const LEGACY_ALIGN: u64 = 4096;

/// The index, in 16-bit words, of `idx` in either ring.
pub const INDEX: usize = 1;

/// Bytes of the descriptor table.
pub const fn descriptors_len(size: u16) -> u64 {
    DESCRIPTOR_LEN * size as u64
}

/// Bytes of the available ring, with its event word.
pub const fn driver_len(size: u16) -> u64 {
    6 + 2 * size as u64
}

/// Bytes of the used ring, with its event word.
pub const fn device_len(size: u16) -> u64 {
    6 + 8 * size as u64
}

/// The index, in 16-bit words, of an entry of the available ring.
#[inline(always)]
pub const fn available_entry(slot: usize) -> usize {
    2 + slot
}

/// The index, in 16-bit words, of `used_event` at the end of the available ring.
#[inline(always)]
pub const fn used_event(size: u16) -> usize {
    2 + size as usize
}

/// The index, in 32-bit words, of an entry of the used ring: its id, followed by its length.
#[inline(always)]
pub const fn used_entry(slot: usize) -> usize {
    1 + 2 * slot
}

/// The index, in 16-bit words, of `avail_event` at the end of the used ring.
#[inline(always)]
pub const fn avail_event(size: u16) -> usize {
    2 + 4 * size as usize
}

/// Offsets of the available and the used ring, and the bytes of all, in the legacy layout (2.7.2).
pub const fn legacy(size: u16) -> (u64, u64, u64) {
    let driver = descriptors_len(size);
    // Without its event word the available ring may end before a page and with it beyond; the used ring starts after
    // both, as every legacy implementation has it.
    let device = (driver + driver_len(size)).next_multiple_of(LEGACY_ALIGN);
    (driver, device, device + device_len(size))
}

/// Whether moving an index from `old` to `new` passes `event` (2.7.10.1).
#[inline(always)]
pub const fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Device-visible address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next descriptor, if [`NEXT`].
    pub next: u16,
}

/// A byte order, chosen when the queue is made, so that the hot path has no branch for it.
pub(in crate::queue) trait Order: Copy {
    fn u16(raw: u16) -> u16;
    fn u32(raw: u32) -> u32;
    /// A descriptor from its two 64-bit words.
    fn descriptor(raw: (u64, u64)) -> Descriptor;
    /// The reverse of [`Order::descriptor`].
    fn words(descriptor: Descriptor) -> (u64, u64);
}

/// Least significant byte first: VIRTIO 1.0 and later, and legacy guests of that order.
#[derive(Clone, Copy, Debug)]
pub(in crate::queue) struct Little;

/// Most significant byte first: legacy guests of that order.
#[derive(Clone, Copy, Debug)]
pub(in crate::queue) struct Big;

impl Order for Little {
    #[inline(always)]
    fn u16(raw: u16) -> u16 {
        u16::from_le(raw)
    }
    #[inline(always)]
    fn u32(raw: u32) -> u32 {
        u32::from_le(raw)
    }
    #[inline(always)]
    fn descriptor(raw: (u64, u64)) -> Descriptor {
        let rest = u64::from_le(raw.1);
        Descriptor {
            address: u64::from_le(raw.0),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }
    #[inline(always)]
    fn words(d: Descriptor) -> (u64, u64) {
        let rest = u64::from(d.len) | u64::from(d.flags) << 32 | u64::from(d.next) << 48;
        (d.address.to_le(), rest.to_le())
    }
}

impl Order for Big {
    fn u16(raw: u16) -> u16 {
        u16::from_be(raw)
    }
    fn u32(raw: u32) -> u32 {
        u32::from_be(raw)
    }
    fn descriptor(raw: (u64, u64)) -> Descriptor {
        let rest = u64::from_be(raw.1);
        Descriptor {
            address: u64::from_be(raw.0),
            len: (rest >> 32) as u32,
            flags: (rest >> 16) as u16,
            next: rest as u16,
        }
    }
    fn words(d: Descriptor) -> (u64, u64) {
        let rest = u64::from(d.len) << 32 | u64::from(d.flags) << 16 | u64::from(d.next);
        (d.address.to_be(), rest.to_be())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legacy_layout_has_the_offsets_of_2008() {
        // Totals there did not count the event word of the used ring: two bytes less.
        for (size, used, total) in
            [(8, 4096, 4164), (16, 4096, 4228), (128, 4096, 5124), (256, 8192, 10244), (1024, 20480, 28676)]
        {
            let (_, device, end) = legacy(size);
            assert_eq!((device, end - 2), (used, total), "size {size}");
        }
    }

    #[test]
    fn descriptors_are_the_same_bytes_in_either_order_of_fields() {
        let d = Descriptor { address: 0x0102_0304_0506_0708, len: 0x0a0b_0c0d, flags: 3, next: 0x1122 };
        assert_eq!(Little::descriptor(Little::words(d)), d);
        assert_eq!(Big::descriptor(Big::words(d)), d);
        assert_eq!(Big::words(d).1.to_ne_bytes(), [0x0a, 0x0b, 0x0c, 0x0d, 0, 3, 0x11, 0x22]);
        assert_eq!(Little::words(d).1.to_ne_bytes(), [0x0d, 0x0c, 0x0b, 0x0a, 3, 0, 0x22, 0x11]);
    }

    #[test]
    fn an_event_is_passed_once_even_across_the_wrap() {
        assert!(passes(3, 4, 3));
        assert!(!passes(4, 4, 3));
        assert!(passes(65535, 0, 65535));
        assert!(!passes(65534, 0, 65535));
    }
}
