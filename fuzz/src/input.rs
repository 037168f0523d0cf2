//! A string of bytes, read as numbers. What is missing at its end is 0.

pub(crate) struct Input<'d>(&'d [u8]);

impl<'d> Input<'d> {
    pub(crate) fn new(data: &'d [u8]) -> Self {
        Self(data)
    }

    /// The next step of the script; none at the end.
    pub(crate) fn step(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn bytes<const LEN: usize>(&mut self) -> [u8; LEN] {
        std::array::from_fn(|_| self.byte())
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.step().unwrap_or(0)
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// At most 255 bytes.
    pub(crate) fn slice(&mut self) -> &'d [u8] {
        let len = usize::from(self.byte()).min(self.0.len());
        let (slice, rest) = self.0.split_at(len);
        self.0 = rest;
        slice
    }

    /// The length of a buffer: small, around a power of two, or anything.
    pub(crate) fn len(&mut self) -> u32 {
        match self.byte() {
            small @ 0..128 => small.into(),
            edge @ 128..192 => (1u64 << (edge % 33)).wrapping_add_signed(i64::from(self.byte() as i8)) as u32,
            _ => self.u32(),
        }
    }
}
