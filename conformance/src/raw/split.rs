//! Split rings by hand (2.7).

use std::sync::atomic::{Ordering, fence};

use polyvirt_core::memory::{Access, MemoryError, Owner, Pages, Words};
use polyvirt_core::queue::split::layout;
use polyvirt_core::queue::{ByteOrder, Layout, QueueConfig};
use polyvirt_core::transport::Virtqueue;

use super::{Descriptor, Made, Memory, NEXT, shown};
use crate::suite::{Objection, Trace};

pub use polyvirt_core::queue::split::layout::{NO_INTERRUPT, NO_NOTIFY};

/// A split ring in the driver's hands, or in the device's, without any rules.
pub struct Split {
    config: QueueConfig,
    index: u16,
    /// The next value of the available index, if the driver is honest.
    pub available: u16,
    /// The used index up to which elements were taken.
    pub taken: u16,
    /// (In the device's place) the available index up to which chains were seen.
    pub seen: u16,
    /// (In the device's place) the used index up to which elements were put.
    pub put: u16,
    descriptors: Words<u64, Owner>,
    driver: Words<u16, Owner>,
    device: Words<u32, Owner>,
    /// The pages in which the driver area and the device area begin.
    pages: [Pages; 2],
    big: bool,
    trace: Trace,
}

impl Split {
    pub(super) fn new<N>(virtqueue: Virtqueue<N>, index: u16, trace: Trace) -> Result<Self, Objection> {
        let Virtqueue { config, descriptors, driver, device, .. } = virtqueue;
        let big = config.layout == Layout::Legacy(ByteOrder::Big);
        let pages = [driver.clone(), device.clone()];
        let (descriptors, driver, device) = (Words::new(descriptors)?, Words::new(driver)?, Words::new(device)?);
        let (available, taken, seen, put) = (0, 0, 0, 0);
        Ok(Self { config, index, available, taken, seen, put, descriptors, driver, device, pages, big, trace })
    }

    fn size(&self) -> u16 {
        self.config.size
    }

    /// The bytes of `memory` once more, behind the area of the ring that the device may read or write as well; none if
    /// they have no room there.
    pub fn beside(&self, memory: &Memory, writable: bool) -> Result<Option<Memory>, Objection> {
        let size = self.size();
        let [driver, device] = &self.pages;
        let (pages, address, used) = match writable {
            true => (device, self.config.device, layout::device_len(size)),
            false => (driver, self.config.driver, layout::driver_len(size)),
        };
        let Some(offset) = pages.len().checked_sub(memory.len as usize).filter(|&offset| offset as u64 >= used) else {
            return Ok(None);
        };
        let place = pages.slice(offset, memory.len as usize).map(|pages| Memory::of(pages, address + offset as u64));
        let Some(place) = place else { return Ok(None) };
        place.pages.write(0, &memory.bytes()?)?;
        Ok(Some(place))
    }

    fn u16(&self, value: u16) -> u16 {
        if self.big { value.to_be() } else { value.to_le() }
    }

    fn u32(&self, value: u32) -> u32 {
        if self.big { value.to_be() } else { value.to_le() }
    }

    /// The two words of a descriptor as they are in memory.
    pub(super) fn words(&self, descriptor: Descriptor) -> [u64; 2] {
        let Descriptor { address, len, flags, next } = descriptor;
        let mut bytes = [0; 16];
        if self.big {
            bytes[..8].copy_from_slice(&address.to_be_bytes());
            bytes[8..12].copy_from_slice(&len.to_be_bytes());
            bytes[12..14].copy_from_slice(&flags.to_be_bytes());
            bytes[14..].copy_from_slice(&next.to_be_bytes());
        } else {
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
        }
        let (first, second) = bytes.split_at(8);
        [first, second].map(|half| u64::from_ne_bytes(half.try_into().expect("eight bytes")))
    }

    /// The reverse of [`Split::words`].
    pub(super) fn parse(&self, words: [u64; 2]) -> Descriptor {
        let rest = words[1].to_ne_bytes();
        let (len, flags, next) = ([rest[0], rest[1], rest[2], rest[3]], [rest[4], rest[5]], [rest[6], rest[7]]);
        match self.big {
            true => Descriptor {
                address: u64::from_be(words[0]),
                len: u32::from_be_bytes(len),
                flags: u16::from_be_bytes(flags),
                next: u16::from_be_bytes(next),
            },
            false => Descriptor {
                address: u64::from_le(words[0]),
                len: u32::from_le_bytes(len),
                flags: u16::from_le_bytes(flags),
                next: u16::from_le_bytes(next),
            },
        }
    }

    pub(super) fn set_descriptor(&self, slot: u16, descriptor: Descriptor) {
        let [first, second] = self.words(descriptor);
        self.descriptors.store(2 * usize::from(slot), first, Ordering::SeqCst);
        self.descriptors.store(2 * usize::from(slot) + 1, second, Ordering::SeqCst);
    }

    pub(super) fn descriptors(&self) -> &Words<u64, Owner> {
        &self.descriptors
    }

    /// Writes an entry of the available ring.
    pub fn set_entry(&self, slot: u16, head: u16) {
        self.driver.store(layout::available_entry(usize::from(slot % self.size())), self.u16(head), Ordering::SeqCst);
    }

    /// Writes the available index.
    pub fn set_available(&mut self, index: u16) {
        self.trace.note(format!("available index of queue {}: {index}", self.index));
        self.available = index;
        fence(Ordering::SeqCst);
        self.driver.store(layout::INDEX, self.u16(index), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    pub(super) fn offer_all(&mut self, heads: &[u16]) {
        for (number, &head) in heads.iter().enumerate() {
            self.set_entry(self.available.wrapping_add(number as u16), head);
        }
        self.set_available(self.available.wrapping_add(heads.len() as u16));
    }

    /// Writes the flags of the available ring.
    pub fn set_flags(&self, flags: u16) {
        self.trace.note(format!("available flags of queue {}: {flags}", self.index));
        self.driver.store(0, self.u16(flags), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Writes used_event.
    pub fn set_used_event(&self, event: u16) {
        self.trace.note(format!("used_event of queue {}: {event}", self.index));
        self.driver.store(layout::used_event(self.size()), self.u16(event), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The flags of the used ring.
    pub fn used_flags(&self) -> u16 {
        self.u16(self.device.load(0, Ordering::SeqCst))
    }

    /// The used index.
    pub fn used_index(&self) -> u16 {
        fence(Ordering::SeqCst);
        self.u16(self.device.load(layout::INDEX, Ordering::SeqCst))
    }

    /// avail_event.
    pub fn avail_event(&self) -> u16 {
        self.u16(self.device.load(layout::avail_event(self.size()), Ordering::SeqCst))
    }

    /// An element of the used ring: id and length.
    pub fn used_element(&self, slot: u16) -> (u32, u32) {
        let entry = layout::used_entry(usize::from(slot % self.size()));
        let load = |index| self.u32(self.device.load(index, Ordering::SeqCst));
        (load(entry), load(entry + 1))
    }

    pub(super) fn device_bytes(&self) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = vec![0; layout::device_len(self.size()) as usize];
        self.device.segment().read(0, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn take(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.taken {
            return None;
        }
        let element = self.used_element(self.taken);
        self.taken = self.taken.wrapping_add(1);
        Some(element)
    }

    /// (In the device's place) the available index.
    pub fn available_index(&self) -> u16 {
        fence(Ordering::SeqCst);
        self.u16(self.driver.load(layout::INDEX, Ordering::SeqCst))
    }

    /// (In the device's place) the flags of the available ring.
    pub fn flags(&self) -> u16 {
        self.u16(self.driver.load(0, Ordering::SeqCst))
    }

    /// (In the device's place) an entry of the available ring.
    pub fn entry(&self, slot: u16) -> u16 {
        self.u16(self.driver.load(layout::available_entry(usize::from(slot % self.size())), Ordering::SeqCst))
    }

    /// (In the device's place) an entry of the descriptor table.
    pub fn descriptor(&self, slot: u16) -> Descriptor {
        let at = 2 * usize::from(slot % self.size());
        let words: [u64; 2] = [at, at + 1].map(|at| self.descriptors.load(at, Ordering::SeqCst));
        self.parse(words)
    }

    pub(super) fn next_chain(&mut self) -> Result<Option<Made>, Objection> {
        if self.available_index() == self.seen {
            return Ok(None);
        }
        let id = self.entry(self.seen);
        let (size, mut chain, mut at) = (self.size(), Vec::new(), id);
        while at < size && chain.len() < usize::from(size) {
            let descriptor = self.descriptor(at);
            chain.push(descriptor);
            if descriptor.flags & NEXT == 0 {
                self.seen = self.seen.wrapping_add(1);
                return Ok(Some(Made { id, chain }));
            }
            at = descriptor.next;
        }
        let shown: Vec<_> = chain.into_iter().map(shown).collect();
        Err(Objection::failed("a chain that ends", shown.join("; ")))
    }

    /// (In the device's place) writes the flags of the used ring.
    pub fn set_used_flags(&self, flags: u16) {
        self.trace.note(format!("used flags of queue {}: {flags}", self.index));
        self.device.store(0, self.u16(flags), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// (In the device's place) writes avail_event.
    pub fn set_avail_event(&self, event: u16) {
        self.trace.note(format!("avail_event of queue {}: {event}", self.index));
        self.device.store(layout::avail_event(self.size()), self.u16(event), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    pub(super) fn put_used(&mut self, id: u32, len: u32) {
        let entry = layout::used_entry(usize::from(self.put % self.size()));
        self.device.store(entry, self.u32(id), Ordering::SeqCst);
        self.device.store(entry + 1, self.u32(len), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.put = self.put.wrapping_add(1);
        self.device.store(layout::INDEX, self.u16(self.put), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    pub(super) fn areas(&self) -> [(u64, u64, Access); 3] {
        let size = self.size();
        [
            (self.config.descriptors, layout::descriptors_len(size), Access::READ),
            (self.config.driver, layout::driver_len(size), Access::READ),
            (self.config.device, layout::device_len(size), Access::READ | Access::WRITE),
        ]
    }

    /// Where the next used element comes, and what says that it is there: address and length of each.
    pub(super) fn next_used(&self) -> [(u64, u64); 2] {
        let entry = layout::used_entry(usize::from(self.taken % self.size()));
        [(self.config.device + 4 * entry as u64, 8), (self.config.device + 2, 2)]
    }
}
