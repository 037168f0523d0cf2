//! A function as a driver sees it: configuration space, what is behind base address registers, interrupts.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::transport::{Interrupts, QueueSet, TransportError};

use super::bus::Functions;
use super::registers::*;

/// The most interrupt lines of one function: more queues than that share them.
pub(super) const MSIX_LINES: u32 = 4;
/// The most capabilities that fit into configuration space: a list that is longer loops.
const MOST_CAPABILITIES: usize = 48;

/// What a driver wants its device to interrupt by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signalling {
    /// Messages (MSI-X); the pin where there are none.
    Messages,
    /// The pin (INTx).
    Pin,
}

/// Configuration space of one function.
pub(super) struct Config<'a, G> {
    pub(super) guest: &'a G,
    pub(super) function: u8,
}

impl<G: Functions> Config<'_, G> {
    pub(super) fn u8(&self, offset: u16) -> Result<u8, HypervisorError> {
        let mut data = [0];
        self.guest.read_config(self.function, offset, &mut data).map(|()| data[0])
    }

    pub(super) fn u16(&self, offset: u16) -> Result<u16, HypervisorError> {
        let mut data = [0; 2];
        self.guest.read_config(self.function, offset, &mut data).map(|()| u16::from_le_bytes(data))
    }

    pub(super) fn u32(&self, offset: u16) -> Result<u32, HypervisorError> {
        let mut data = [0; 4];
        self.guest.read_config(self.function, offset, &mut data).map(|()| u32::from_le_bytes(data))
    }

    pub(super) fn set_u16(&self, offset: u16, value: u16) -> Result<(), HypervisorError> {
        self.guest.write_config(self.function, offset, &value.to_le_bytes())
    }

    pub(super) fn set_u32(&self, offset: u16, value: u32) -> Result<(), HypervisorError> {
        self.guest.write_config(self.function, offset, &value.to_le_bytes())
    }

    /// The capabilities with `id`, in their order. A device may link them as it likes: what is not inside configuration
    /// space, or comes again, ends the list.
    pub(super) fn capabilities(&self, id: u8) -> Result<Vec<u16>, HypervisorError> {
        let mut found = Vec::new();
        if self.u16(STATUS)? & STATUS_CAPABILITIES == 0 {
            return Ok(found);
        }
        let mut at = u16::from(self.u8(CAPABILITIES)? & !3);
        for _ in 0..MOST_CAPABILITIES {
            if at < FIRST_CAPABILITY {
                break;
            }
            if self.u8(at)? == id {
                found.push(at);
            }
            at = u16::from(self.u8(at + 1)? & !3);
        }
        Ok(found)
    }

    /// How many vectors its MSI-X table has; 0 if it has none.
    pub(super) fn vectors(&self) -> Result<u16, HypervisorError> {
        let Some(at) = self.capabilities(CAP_MSIX)?.first().copied() else { return Ok(0) };
        Ok((self.u16(at + MSIX_CONTROL)? & MSIX_LEN) + 1)
    }

    /// Where base address register `bar` is; none if it does not exist, or is not placed.
    pub(super) fn bar(&self, bar: u8) -> Result<Option<(Space, u64)>, HypervisorError> {
        if bar >= BAR_COUNT {
            return Ok(None);
        }
        let at = BARS + 4 * u16::from(bar);
        let low = self.u32(at)?;
        let (space, base) = match low {
            _ if low & BAR_IO != 0 => (Space::Io, u64::from(low & !3)),
            _ if low & BAR_64 != 0 && bar + 1 < BAR_COUNT => {
                (Space::Memory, u64::from(self.u32(at + 4)?) << 32 | u64::from(low & !0xf))
            }
            _ => (Space::Memory, u64::from(low & !0xf)),
        };
        Ok((base != 0).then_some((space, base)))
    }
}

/// A structure behind a base address register.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub(super) space: Space,
    pub(super) address: u64,
    /// Bytes.
    pub(super) len: u64,
}

impl Region {
    /// The address of `len` bytes at `offset`, if they are inside.
    pub(super) fn at(&self, offset: u64, len: u64) -> Result<u64, TransportError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.address + offset),
            _ => Err(TransportError::NotADevice { expected: "a structure that is long enough", found: self.len }),
        }
    }
}

/// A function in use.
pub(super) struct Function<G> {
    pub(super) guest: Arc<G>,
    pub(super) place: GuestPlace,
    /// How many vectors are in use; 0 if the function interrupts by its pin.
    pub(super) vectors: u32,
}

impl<G: Functions> Function<G> {
    /// The function at `place`, interrupting as `signalling` says.
    pub(super) fn new(guest: Arc<G>, place: GuestPlace, signalling: Signalling) -> Result<Self, TransportError> {
        let mut function = Self { guest, place, vectors: 0 };
        function.set_up_messages(signalling)?;
        Ok(function)
    }

    pub(super) fn config(&self) -> Config<'_, G> {
        Config { guest: &*self.guest, function: self.place.function }
    }

    /// The device type of a virtio function of one of `ids`.
    pub(super) fn device_type(&self) -> Result<u32, TransportError> {
        let config = self.config();
        let (vendor, id) = (config.u16(VENDOR_ID)?, config.u16(DEVICE_ID)?);
        let found = u64::from(id) << 16 | u64::from(vendor);
        if vendor != VIRTIO_VENDOR || !IDS.contains(&id) {
            return Err(TransportError::NotADevice { expected: "vendor 0x1af4 with an id of virtio's", found });
        }
        let device_type = if id >= MODERN_ID { id - MODERN_ID } else { config.u16(SUBSYSTEM_ID)? };
        if device_type == 0 {
            return Err(TransportError::NotADevice { expected: "a device type other than 0", found });
        }
        Ok(device_type.into())
    }

    /// Fills the MSI-X table and enables it, or leaves it disabled.
    fn set_up_messages(&mut self, signalling: Signalling) -> Result<(), TransportError> {
        let config = self.config();
        let Some(at) = config.capabilities(CAP_MSIX)?.first().copied() else { return Ok(()) };
        let control = config.u16(at + MSIX_CONTROL)? & !(MSIX_ENABLE | MSIX_MASK);
        let vectors = u32::from(config.vectors()?).min(self.place.lines);
        if signalling == Signalling::Pin || vectors == 0 {
            return Ok(config.set_u16(at + MSIX_CONTROL, control)?);
        }
        let table = config.u32(at + MSIX_TABLE)?;
        let (bar, offset) = ((table & 7) as u8, u64::from(table & !7));
        let placed = config.bar(bar)?.and_then(|(space, base)| Some((space, base.checked_add(offset)?)));
        let Some((space, table)) = placed else {
            return Err(TransportError::NotADevice { expected: "an MSI-X table that is placed", found: bar.into() });
        };
        config.set_u16(at + MSIX_CONTROL, control | MSIX_ENABLE | MSIX_MASK)?;
        for vector in 0..vectors {
            let Message { address, data } = self.guest.message(self.place.line + vector);
            // Where the device says; no sum of it may stop the driver.
            let entry = table.wrapping_add(MSIX_ENTRY * u64::from(vector));
            for (at, word) in [(0, address as u32), (4, (address >> 32) as u32), (8, data), (12, 0)] {
                self.guest.store(space, entry.wrapping_add(at), &word.to_le_bytes())?;
            }
        }
        config.set_u16(at + MSIX_CONTROL, control | MSIX_ENABLE)?;
        self.vectors = vectors;
        Ok(())
    }

    /// The vector of configuration changes.
    pub(super) const CONFIG_VECTOR: u16 = 0;

    /// The vector of queue `index`: the queues share those that the configuration does not have, or the only one.
    pub(super) fn queue_vector(&self, index: u16) -> u16 {
        match self.vectors {
            0 | 1 => 0,
            vectors => 1 + (u32::from(index) % (vectors - 1)) as u16,
        }
    }

    /// The lines on which it interrupts.
    pub(super) fn lines(&self) -> Vec<u32> {
        match self.vectors {
            0 => vec![self.place.pin],
            vectors => (0..vectors).map(|vector| self.place.line + vector).collect(),
        }
    }

    /// Takes its interrupts, of which each vector is about those of `queues` that have it; `isr` reads the interrupt status
    /// register, where that says what they are about.
    pub(super) fn take_interrupts(
        &self,
        queues: impl Iterator<Item = u16> + Clone,
        isr: impl FnOnce() -> Result<u8, TransportError>,
    ) -> Result<Interrupts, TransportError> {
        let all = |some| if some { QueueSet::ALL } else { QueueSet::NONE };
        if self.vectors == 0 {
            let isr = if self.guest.take(self.place.pin)? { isr()? } else { 0 };
            return Ok(Interrupts { queues: all(isr & ISR_QUEUE != 0), config: isr & ISR_CONFIG != 0 });
        }
        let config = self.guest.take(self.place.line)?;
        // Where there is one vector, it is for everything.
        let mut came = Interrupts { queues: all(config && self.vectors == 1), config };
        for vector in 1..self.vectors {
            if self.guest.take(self.place.line + vector)? {
                let has = |index: &u16| u32::from(self.queue_vector(*index)) == vector;
                queues.clone().filter(has).for_each(|index| came.queues |= QueueSet::of(index));
            }
        }
        Ok(came)
    }
}

/// Reads from or writes to `address` field by field, as its own width wants it (4.1.3.1): 2, 4 or 8 bytes at a multiple of
/// that are a number, of at most 32 bits an access; anything else is an array of bytes.
pub(super) fn width(offset: u32, len: usize) -> usize {
    let aligned = |width| offset.is_multiple_of(width);
    match len {
        2 if aligned(2) => 2,
        4 | 8 if aligned(4) => 4,
        _ => 1,
    }
}
