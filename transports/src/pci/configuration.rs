//! A function's configuration space: header, base address registers, capabilities.

use super::registers::*;

/// A configuration space: 256 bytes, each with the bits that software may write.
pub(super) struct Configuration {
    bytes: [u8; CONFIG_LEN],
    writable: [u8; CONFIG_LEN],
    bars: Vec<Bar>,
    /// Where the next capability goes, and where the link to it is.
    next: (u16, u16),
}

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bar {
    index: u8,
    flags: u32,
    len: u64,
}

/// What a function answers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Decoded {
    /// The base address register.
    pub(super) bar: u8,
    /// Memory or ports.
    pub(super) space: Space,
    /// The first address.
    pub(super) base: u64,
    /// Bytes.
    pub(super) len: u64,
}

/// Who a function is.
pub(super) struct Identity {
    pub(super) vendor: u16,
    pub(super) device: u16,
    pub(super) revision: u8,
    pub(super) class: u32,
    pub(super) subsystem: (u16, u16),
}

impl Configuration {
    /// A function without base address registers and capabilities.
    pub(super) fn new(identity: &Identity) -> Self {
        let mut new = Self {
            bytes: [0; CONFIG_LEN],
            writable: [0; CONFIG_LEN],
            bars: Vec::new(),
            next: (FIRST_CAPABILITY, CAPABILITIES),
        };
        new.set(VENDOR_ID, &identity.vendor.to_le_bytes());
        new.set(DEVICE_ID, &identity.device.to_le_bytes());
        new.set(REVISION_ID, &[identity.revision]);
        new.set(CLASS_CODE, &identity.class.to_le_bytes()[..3]);
        new.set(SUBSYSTEM_VENDOR_ID, &identity.subsystem.0.to_le_bytes());
        new.set(SUBSYSTEM_ID, &identity.subsystem.1.to_le_bytes());
        let command = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_PIN;
        new.allow(COMMAND, &command.to_le_bytes());
        new.allow(INTERRUPT_LINE, &[0xff]);
        new
    }

    /// Interrupts by pin A.
    pub(super) fn with_pin(mut self) -> Self {
        self.set(INTERRUPT_PIN, &[1]);
        self
    }

    /// Base address register `index` is for `len` bytes, a power of two; `flags` says of what kind.
    pub(super) fn add_bar(&mut self, index: u8, flags: u32, len: u64) {
        let at = BARS + 4 * u16::from(index);
        let mask = !(len - 1);
        self.set(at, &flags.to_le_bytes());
        self.allow(at, &(mask as u32).to_le_bytes());
        if flags & (BAR_IO | BAR_64) == BAR_64 {
            self.allow(at + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        self.bars.push(Bar { index, flags, len });
    }

    /// Adds a capability: its id, and what follows the link. Returns where it is.
    pub(super) fn add_capability(&mut self, id: u8, body: &[u8]) -> u16 {
        let (at, link) = self.next;
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.set(link, &[at as u8]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.next = ((at + 2 + body.len() as u16).next_multiple_of(4), at + 1);
        at
    }

    /// Software may write these bits from `at` on.
    pub(super) fn allow(&mut self, at: u16, mask: &[u8]) {
        self.writable[usize::from(at)..][..mask.len()].copy_from_slice(mask);
    }

    /// Sets bytes from `at` on, whether software may or not.
    pub(super) fn set(&mut self, at: u16, bytes: &[u8]) {
        self.bytes[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Reads: what is beyond the end is 0.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).ok().and_then(|offset| self.bytes.get(offset..)).unwrap_or_default();
        data.fill(0);
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    /// Software writes.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let at = usize::try_from(offset).map_or(CONFIG_LEN, |offset| offset.min(CONFIG_LEN));
        for ((byte, mask), new) in self.bytes[at..].iter_mut().zip(&self.writable[at..]).zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// The 8 bits at `at`.
    pub(super) fn u8(&self, at: u16) -> u8 {
        self.bytes[usize::from(at)]
    }

    /// The 16 bits at `at`.
    pub(super) fn u16(&self, at: u16) -> u16 {
        u16::from_le_bytes([self.u8(at), self.u8(at + 1)])
    }

    /// The 32 bits at `at`.
    pub(super) fn u32(&self, at: u16) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    /// Bytes behind base address register `bar`; none if there is none.
    pub(super) fn bar_len(&self, bar: u8) -> Option<u64> {
        self.bars.iter().find(|found| found.index == bar).map(|found| found.len)
    }

    /// What the function answers to now, as software placed and enabled it.
    pub(super) fn decoded(&self) -> Vec<Decoded> {
        let command = self.u16(COMMAND);
        let mut decoded = Vec::new();
        for &Bar { index, flags, len } in &self.bars {
            let at = BARS + 4 * u16::from(index);
            let low = self.u32(at);
            let (space, enabled, base) = if flags & BAR_IO != 0 {
                (Space::Io, COMMAND_IO, u64::from(low & !3))
            } else {
                let high = if flags & BAR_64 != 0 { self.u32(at + 4) } else { 0 };
                (Space::Memory, COMMAND_MEMORY, u64::from(high) << 32 | u64::from(low & !0xf))
            };
            // At 0, and where the end wraps, is what was never placed.
            if command & enabled != 0 && base != 0 && base.checked_add(len).is_some() {
                decoded.push(Decoded { bar: index, space, base, len });
            }
        }
        decoded
    }
}
