//! The two formats of a ring, as a dimension of the matrix.

use std::fmt;

use polyvirt_core::Features;

/// How a virtqueue lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingFormat {
    /// A descriptor table, an available ring and a used ring (2.7).
    Split,
    /// One ring of descriptors that both sides write (2.8).
    Packed,
}

impl RingFormat {
    /// Those that a device can be driven with; the legacy interface knows no packed ring.
    pub const fn of(legacy: bool) -> &'static [Self] {
        if legacy { &[Self::Split] } else { &[Self::Split, Self::Packed] }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::Packed => "packed",
        }
    }

    /// What a driver has to accept to get it.
    pub const fn feature(self) -> Features {
        match self {
            Self::Split => Features::empty(),
            Self::Packed => Features::RING_PACKED,
        }
    }

    /// What is kept from drivers, so that they get it: they take the packed ring wherever it is offered.
    pub const fn hidden(self) -> Features {
        match self {
            Self::Split => Features::RING_PACKED,
            Self::Packed => Features::empty(),
        }
    }
}

impl fmt::Display for RingFormat {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// What a case has to do with ring formats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rings {
    /// It holds for either, and is run with each.
    #[default]
    Either,
    /// It is about what only one of them has.
    Only(RingFormat),
    /// Nothing: it is run once, with split rings, which every device has.
    Neither,
}

impl Rings {
    /// Whether the case is run with `format`.
    pub fn includes(self, format: RingFormat) -> bool {
        match self {
            Self::Either => true,
            Self::Only(only) => only == format,
            Self::Neither => format == RingFormat::Split,
        }
    }
}
