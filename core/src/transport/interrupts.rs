//! What an interrupt was about.

use core::fmt;
use core::ops::{BitOr, BitOrAssign};

/// What interrupts that were taken were about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interrupts {
    /// Buffers were used in these queues.
    pub queues: QueueSet,
    /// The configuration changed, or the device needs a reset.
    pub config: bool,
}

impl Interrupts {
    /// Whether there is nothing to be done: no interrupt came, or it was another device's on the same line.
    pub const fn is_empty(self) -> bool {
        self.queues.is_empty() && !self.config
    }
}

/// Queues that may have used buffers: those that an interrupt named, or [`ALL`](Self::ALL) where the mechanism names none.
///
/// Never too few, but perhaps too many: it tells 64 queues apart, and queues whose numbers differ by 64 are in it together.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueSet(u64);

impl QueueSet {
    /// No queue.
    pub const NONE: Self = Self(0);
    /// Some queue, whichever it is.
    pub const ALL: Self = Self(u64::MAX);

    /// Queue `index`.
    pub const fn of(index: u16) -> Self {
        Self(1 << (index % 64))
    }

    /// Whether queue `index` may have used buffers.
    pub const fn contains(self, index: u16) -> bool {
        self.0 & Self::of(index).0 != 0
    }

    /// Whether no queue has.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The set as a number, for [`QueueSet::from_bits`].
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The set that was this number.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl BitOr for QueueSet {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for QueueSet {
    fn bitor_assign(&mut self, other: Self) {
        *self = *self | other;
    }
}

impl fmt::Display for QueueSet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NONE => formatter.write_str("none"),
            Self::ALL => formatter.write_str("any"),
            set => formatter.debug_set().entries((0..64).filter(|&index| set.contains(index))).finish(),
        }
    }
}

impl fmt::Debug for QueueSet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn a_set_of_queues_has_what_was_put_in_and_never_misses_one() {
        let set = QueueSet::of(1) | QueueSet::of(130);
        for index in [1, 130, 2, 65] {
            assert!(set.contains(index), "{index}");
        }
        assert!(!set.contains(0) && !set.contains(3) && !set.is_empty());
        assert!((0..=u16::MAX).all(|index| QueueSet::ALL.contains(index) && QueueSet::of(index).contains(index)));
        assert!((0..=u16::MAX).all(|index| !QueueSet::NONE.contains(index)));
        assert_eq!(QueueSet::from_bits(set.bits()), set);
        let shown = [QueueSet::NONE, QueueSet::ALL, set].map(|set| set.to_string());
        assert_eq!(shown, ["none", "any", "{1, 2}"]);
    }

    #[test]
    fn interrupts_about_nothing_are_empty() {
        assert!(Interrupts::default().is_empty());
        assert!(!Interrupts { queues: QueueSet::of(9), config: false }.is_empty());
        assert!(!Interrupts { queues: QueueSet::NONE, config: true }.is_empty());
    }
}
