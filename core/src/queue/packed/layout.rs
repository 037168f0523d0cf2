//! What both sides agree on: descriptors, wrap counters, event suppression (2.8.13, 2.8.14).

use core::fmt;

/// Bytes of a descriptor: le64 address, le32 length, le16 buffer id, le16 flags.
pub const DESCRIPTOR_LEN: u64 = 16;

/// Bytes of an event suppression structure: le16 offset and wrap counter, le16 flags.
pub const EVENT_LEN: u64 = 4;

/// The buffer continues in the next descriptor.
pub const NEXT: u16 = 1;
/// The device writes; in a used descriptor: the device wrote.
pub const WRITE: u16 = 2;
/// The descriptor names a table of descriptors.
pub const INDIRECT: u16 = 4;
/// Equals the driver's wrap counter if the descriptor is available.
pub const AVAILABLE: u16 = 1 << 7;
/// Equals [`AVAILABLE`] if the descriptor is used, the opposite if it is available.
pub const USED: u16 = 1 << 15;

/// Event suppression: events wanted.
pub const EVENTS_ON: u16 = 0;
/// Event suppression: no events wanted.
pub const EVENTS_OFF: u16 = 1;
/// Event suppression: an event wanted when the descriptor at the given place is reached (EVENT_IDX only).
pub const EVENTS_AT: u16 = 2;

/// The second 64-bit word of a descriptor: length, buffer id, flags, in one load or store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    /// Bytes; in a used descriptor: bytes written.
    pub len: u32,
    /// The buffer's id: in the last descriptor of a chain, and in a used one.
    pub id: u16,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`], [`AVAILABLE`], [`USED`].
    pub flags: u16,
}

impl Tail {
    /// From the word as it stands in memory.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        let word = u64::from_le(word);
        Self { len: word as u32, id: (word >> 32) as u16, flags: (word >> 48) as u16 }
    }

    /// The word as it stands in memory.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        (self.len as u64 | (self.id as u64) << 32 | flags(self.flags)).to_le()
    }
}

/// Flags where they are in the second word of a descriptor.
#[inline(always)]
const fn flags(flags: u16) -> u64 {
    (flags as u64) << 48
}

/// An event suppression structure, as one 32-bit word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Events {
    /// Where an event is wanted, if `flags` is [`EVENTS_AT`].
    pub at: Position,
    /// [`EVENTS_ON`], [`EVENTS_OFF`] or [`EVENTS_AT`].
    pub flags: u16,
}

impl Events {
    /// From the word as it stands in memory.
    #[inline(always)]
    pub const fn from_word(word: u32) -> Self {
        let word = u32::from_le(word);
        Self { at: Position::unpack(word as u16), flags: (word >> 16) as u16 & 3 }
    }

    /// The word as it stands in memory.
    #[inline(always)]
    pub const fn to_word(self) -> u32 {
        (self.at.pack() as u32 | (self.flags as u32) << 16).to_le()
    }

    /// Whether the other side wants an event after moving from `old` to `new`. Values that the spec does not define
    /// count as "on": an event too many is harmless, a lost one is not.
    #[inline(always)]
    pub const fn wanted(self, event_idx: bool, old: Position, new: Position, size: u16) -> bool {
        match self.flags {
            EVENTS_OFF => false,
            EVENTS_AT if event_idx => reaches(self.at, old, new, size),
            _ => true,
        }
    }
}

/// A place in the ring: an index and the wrap counter of that round.
///
/// One word: in its lower half twice the index, which is where the descriptor's words are; where the second of them has its
/// flags, those that make it available in that round: [`AVAILABLE`] if the wrap counter is 1, [`USED`] if it is 0. (Two
/// fields would be written one by one and read together, and such a read waits until what was written has left the
/// processor.)
///
/// Where an access beyond the last descriptor fails anyway, a place need not be compared with the size before: it may lie
/// behind all of them, and is settled when that shows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Position(u64);

/// Both flags that tell the round.
const ROUND: u16 = AVAILABLE | USED;

impl fmt::Debug for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Position").field("index", &self.index()).field("wrap", &self.wrap()).finish()
    }
}

impl Position {
    /// Where both sides start.
    pub const START: Self = Self::new(0, true);

    /// The place at `index` in a round with the wrap counter `wrap`.
    pub const fn new(index: u16, wrap: bool) -> Self {
        Self((2 * index as u64) | flags(if wrap { AVAILABLE } else { USED }))
    }

    /// Index into the ring.
    #[inline(always)]
    pub const fn index(self) -> u16 {
        (self.0 >> 1) as u16
    }

    /// Which of the ring's 64-bit words is the first of the descriptor.
    #[inline(always)]
    pub(super) const fn word(self) -> usize {
        self.0 as u32 as usize
    }

    /// The wrap counter: true in the first round.
    #[inline(always)]
    pub const fn wrap(self) -> bool {
        self.available_flags() == AVAILABLE
    }

    /// The place `count` descriptors further on in a ring of `size`; `count` is at most `size`.
    #[must_use]
    #[inline(always)]
    pub const fn advanced(self, count: u16, size: u16) -> Self {
        self.ahead(count).settled(size)
    }

    /// `count` descriptors further on in the same round, even if that is behind all of them, until it is
    /// [settled](Self::settled). `count` is at most the size of the ring.
    #[must_use]
    #[inline(always)]
    pub(super) const fn ahead(self, count: u16) -> Self {
        // Fits: the index is below the size, which is up to 32768.
        Self(self.0.wrapping_add(2 * count as u64))
    }

    /// The same place, in the next round if it is behind all `size` descriptors of this one.
    #[must_use]
    #[inline(always)]
    pub(super) const fn settled(self, size: u16) -> Self {
        if self.index() >= size { self.turned(self.index() - size) } else { self }
    }

    /// At `index` in the next round. Apart, so that it is a branch that is hardly ever taken and not arithmetic.
    #[cold]
    const fn turned(self, index: u16) -> Self {
        Self::new(index, !self.wrap())
    }

    /// The place at `index` in the same round.
    #[must_use]
    #[inline(always)]
    pub const fn at(self, index: u16) -> Self {
        Self::new(index, self.wrap())
    }

    /// The flags that make a descriptor available at this place.
    #[inline(always)]
    pub const fn available_flags(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// The flags that make a descriptor used at this place.
    #[inline(always)]
    pub const fn used_flags(self) -> u16 {
        // Both with a wrap counter of 1, none with 0.
        self.available_flags() ^ USED
    }

    /// The second word of a descriptor that is available at this place, as it stands in memory.
    #[inline(always)]
    pub(super) const fn available_word(self, tail: Tail) -> u64 {
        tail.to_word() | (self.0 >> 48 << 48).to_le()
    }

    /// The second word of a descriptor that is used at this place, as it stands in memory.
    #[inline(always)]
    pub(super) const fn used_word(self, tail: Tail) -> u64 {
        self.available_word(tail) ^ flags(USED).to_le()
    }

    /// Whether a descriptor with `flags` at this place is available.
    #[inline(always)]
    pub const fn is_available(self, flags: u16) -> bool {
        (flags ^ self.available_flags()) & ROUND == 0
    }

    /// The flags in the second word of a descriptor at this place, as it stands in memory; but [`AVAILABLE`] and [`USED`]
    /// only where they are not those of an available one.
    #[inline(always)]
    pub(super) const fn compared(self, word: u64) -> u16 {
        ((u64::from_le(word) ^ self.0) >> 48) as u16
    }

    /// Whether a descriptor with `flags` at this place is used.
    #[inline(always)]
    pub const fn is_used(self, flags: u16) -> bool {
        (flags ^ self.used_flags()) & ROUND == 0
    }

    /// As the event suppression structure and saved states hold it: the index in bits 0 to 14, the wrap counter in 15.
    #[inline(always)]
    pub const fn pack(self) -> u16 {
        self.index() | (self.wrap() as u16) << 15
    }

    /// The reverse of [`Position::pack`]; the index is not checked.
    #[inline(always)]
    pub const fn unpack(value: u16) -> Self {
        Self::new(value & 0x7fff, value & 0x8000 != 0)
    }
}

/// Whether moving from `old` to `new` passes the place where the other side wants an event.
///
/// Counted backwards from `new`: the event lies among the last descriptors that were written (2.8.10 event
/// suppression). A place that the other side made up is only ever in or not in that range.
#[inline]
pub const fn reaches(event: Position, old: Position, new: Position, size: u16) -> bool {
    let event_behind = distance(event, new, size);
    let moved = distance(old, new, size);
    event_behind != 0 && event_behind <= moved
}

/// How many descriptors `to` is ahead of `from`; wraps to a huge number if `from` is ahead.
#[inline(always)]
const fn distance(from: Position, to: Position, size: u16) -> u32 {
    let lap = if from.wrap() == to.wrap() { 0 } else { size as u32 };
    (to.index() as u32 + lap).wrapping_sub(from.index() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(index: u16, wrap: bool) -> Position {
        Position::new(index, wrap)
    }

    #[test]
    fn a_position_wraps_at_any_size_and_flips_its_counter() {
        assert_eq!(at(4, true).advanced(3, 7), at(0, false));
        assert_eq!(at(4, true).advanced(7, 7), at(4, false));
        assert_eq!(at(32767, false).advanced(32767, 32768), at(32766, true));
        assert_eq!(Position::unpack(at(32767, true).pack()), at(32767, true));
    }

    #[test]
    fn an_event_fires_only_when_its_place_is_passed() {
        let size = 5;
        assert!(reaches(at(3, true), at(3, true), at(4, true), size));
        assert!(!reaches(at(4, true), at(3, true), at(4, true), size), "not reached yet");
        assert!(!reaches(at(2, true), at(3, true), at(4, true), size), "passed before");
        assert!(reaches(at(4, true), at(3, true), at(1, false), size), "across the end");
        assert!(reaches(at(0, false), at(3, true), at(1, false), size));
        assert!(!reaches(at(1, false), at(3, true), at(1, false), size));
        assert!(reaches(at(2, true), at(2, true), at(2, false), size), "a whole round");
    }

    #[test]
    fn an_invented_place_never_fires_by_overflow() {
        assert!(!reaches(at(0x7fff, true), at(1, true), at(2, true), 4));
        assert!(!reaches(at(0x7fff, false), at(1, true), at(2, true), 4));
    }
}
