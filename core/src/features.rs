//! Feature bits (VIRTIO 1.4, 2.2 and chapter 6).

bitflags::bitflags! {
    /// A set of feature bits, offered by a device or accepted by a driver.
    ///
    /// Bits 0 to 23 and 50 to 127 belong to the device type and are named where the device is; the named bits here are
    /// those of chapter 6 (Reserved Feature Bits). Unknown bits are kept.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u128 {
        /// Legacy: the device interrupts when the available ring runs empty, even if interrupts are suppressed.
        const NOTIFY_ON_EMPTY = 1 << 24;
        /// Legacy: the device makes no assumption about the layout of descriptors (VIRTIO_F_ANY_LAYOUT).
        const ANY_LAYOUT = 1 << 27;
        /// Indirect descriptors (VIRTIO_F_INDIRECT_DESC).
        const INDIRECT_DESC = 1 << 28;
        /// Notification suppression by index (VIRTIO_F_EVENT_IDX).
        const EVENT_IDX = 1 << 29;
        /// The device follows VIRTIO 1.0 or later (VIRTIO_F_VERSION_1).
        const VERSION_1 = 1 << 32;
        /// Device addresses are translated or restricted by the platform (VIRTIO_F_ACCESS_PLATFORM).
        const ACCESS_PLATFORM = 1 << 33;
        /// Packed virtqueue layout (VIRTIO_F_RING_PACKED).
        const RING_PACKED = 1 << 34;
        /// Buffers are used in the order in which they were made available (VIRTIO_F_IN_ORDER).
        const IN_ORDER = 1 << 35;
        /// Memory accesses are ordered as the platform orders them (VIRTIO_F_ORDER_PLATFORM).
        const ORDER_PLATFORM = 1 << 36;
        /// Single root I/O virtualization (VIRTIO_F_SR_IOV).
        const SR_IOV = 1 << 37;
        /// The driver passes extra data in its notifications (VIRTIO_F_NOTIFICATION_DATA).
        const NOTIFICATION_DATA = 1 << 38;
        /// The driver uses the device's own data in its notifications (VIRTIO_F_NOTIF_CONFIG_DATA).
        const NOTIF_CONFIG_DATA = 1 << 39;
        /// One queue can be reset while others run (VIRTIO_F_RING_RESET).
        const RING_RESET = 1 << 40;
        /// The device has administration virtqueues (VIRTIO_F_ADMIN_VQ).
        const ADMIN_VQ = 1 << 41;
        /// The device can be suspended (VIRTIO_F_SUSPEND).
        const SUSPEND = 1 << 43;

        const _ = !0;
    }
}

impl Features {
    /// How many 32-bit words a set has.
    pub const WORDS: u32 = 4;

    /// The set that holds `bit` alone; empty if there is no such bit.
    pub const fn bit(bit: u32) -> Self {
        match 1u128.checked_shl(bit) {
            Some(bits) => Self::from_bits_retain(bits),
            None => Self::empty(),
        }
    }

    /// The 32 bits from `word * 32` on; 0 beyond the last word.
    pub const fn word(self, word: u32) -> u32 {
        if word < Self::WORDS { (self.bits() >> (word * 32)) as u32 } else { 0 }
    }

    /// This set with its word `word` replaced. A word beyond the last is ignored.
    #[must_use]
    pub const fn with_word(self, word: u32, value: u32) -> Self {
        if word >= Self::WORDS {
            return self;
        }
        let mask = (u32::MAX as u128) << (word * 32);
        Self::from_bits_retain((self.bits() & !mask) | ((value as u128) << (word * 32)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_take_apart_and_put_together() {
        let set = Features::VERSION_1 | Features::EVENT_IDX | Features::bit(127);
        let mut copy = Features::empty();
        for word in 0..Features::WORDS {
            copy = copy.with_word(word, set.word(word));
        }
        assert_eq!(copy, set);
        assert_eq!(set.word(1), 1);
    }

    #[test]
    fn words_and_bits_beyond_the_last_do_not_exist() {
        assert_eq!(Features::all().word(4), 0);
        assert_eq!(Features::empty().with_word(u32::MAX, 1), Features::empty());
        assert_eq!(Features::bit(128), Features::empty());
    }
}
