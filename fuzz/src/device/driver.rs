//! A driver that knows the ring's format, and abuses it.

use polyvirt_core::queue::{ByteOrder, Layout, QueueConfig, packed};

use crate::input::Input;
use crate::ram::{self, Ram};

pub(super) struct Driver {
    config: QueueConfig,
    next: u16,
    position: packed::layout::Position,
}

impl Driver {
    pub(super) const fn new(config: QueueConfig) -> Self {
        Self { config, next: 0, position: packed::layout::Position::START }
    }

    const fn is_big(&self) -> bool {
        matches!(self.config.layout, Layout::Legacy(ByteOrder::Big))
    }

    fn put16(&self, ram: &Ram, address: u64, value: u16) {
        ram.poke(address, &if self.is_big() { value.to_be_bytes() } else { value.to_le_bytes() });
    }

    /// A 16-bit field of a split ring.
    pub(super) fn get16(&self, ram: &Ram, address: u64) -> u16 {
        let bytes = ram.peek(address);
        if self.is_big() { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) }
    }

    /// A 32-bit field of a split ring.
    pub(super) fn get32(&self, ram: &Ram, address: u64) -> u32 {
        let bytes = ram.peek(address);
        if self.is_big() { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }
    }

    /// Writes a descriptor: address, length, and two fields of 16 bits.
    fn put(&self, ram: &Ram, at: u64, address: u64, len: u32, [third, fourth]: [u16; 2]) {
        ram.poke(at, &if self.is_big() { address.to_be_bytes() } else { address.to_le_bytes() });
        ram.poke(at.wrapping_add(8), &if self.is_big() { len.to_be_bytes() } else { len.to_le_bytes() });
        self.put16(ram, at.wrapping_add(12), third);
        self.put16(ram, at.wrapping_add(14), fourth);
    }

    /// Writes a descriptor of the ring.
    pub(super) fn descriptor(&mut self, ram: &Ram, input: &mut Input<'_>) {
        let at = self.config.descriptors.wrapping_add(16 * u64::from(input.byte()));
        let (address, len, flags, next) = (ram::address(input), input.len(), input.byte(), input.byte());
        self.put(ram, at, address, len, [u16::from(flags & 7), next.into()]);
    }

    /// Writes an entry of what may be an indirect table.
    pub(super) fn table(&mut self, ram: &Ram, input: &mut Input<'_>) {
        let at = 16 * u64::from(input.byte());
        let (address, len, flags, next) = (ram::address(input), input.len(), input.byte(), input.byte());
        let (flags, other) = (u16::from(flags & 7), u16::from(next));
        let fields = if self.config.layout == Layout::Packed { [other, flags] } else { [flags, other] };
        self.put(ram, at, address, len, fields);
    }

    /// Makes something available at the right place.
    pub(super) fn offer(&mut self, ram: &Ram, input: &mut Input<'_>) {
        let QueueConfig { size, descriptors, driver, .. } = self.config;
        if self.config.layout == Layout::Packed {
            let (address, len, id, flags) = (ram::address(input), input.len(), input.byte(), input.byte());
            let at = descriptors.wrapping_add(16 * u64::from(self.position.index()));
            let flags = u16::from(flags & 7) | self.position.available_flags();
            self.put(ram, at, address, len, [id.into(), flags]);
            self.position = self.position.advanced(1, size);
        } else {
            let slot = u64::from(self.next % size);
            self.put16(ram, driver.wrapping_add(4 + 2 * slot), input.byte().into());
            self.next = self.next.wrapping_add(1);
            self.put16(ram, driver.wrapping_add(2), self.next);
        }
    }
}
