//! Meddlers between an MMIO bus and an honest device: they change what registers say, and what rings hold before and
//! after the device looks.

use std::sync::Arc;
use std::task::Waker;

use polyvirt_core::hypervisor::{BusDevice, Cause, Interrupt};
use polyvirt_core::memory::{Access, GuestMemory};
use polyvirt_core::queue::packed::layout::{Position, Tail};
use polyvirt_core::queue::split::layout::{self, NEXT};
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio::registers::*;

use super::Memory;
use crate::cells::Sabotage;

/// What becomes of a write to a register.
type Write = fn(&mut Meddler, u64, u32) -> Option<u32>;

/// What to do differently, and where.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    /// A register reads as this.
    pub(super) read: Option<fn(&mut Meddler, u64, u32) -> u32>,
    /// A register is written with this, or not at all.
    pub(super) write: Option<Write>,
    /// Any access: offset, bytes, whether it writes.
    pub(super) access: Option<fn(&mut Meddler, u64, usize, bool)>,
    /// Configuration reads as this: offset and bytes.
    pub(super) config: Option<fn(&mut Meddler, u64, &mut [u8])>,
    /// Before a kick of a queue; false keeps it from the device.
    pub(super) before: Option<fn(&mut Meddler, usize) -> bool>,
    /// After it.
    pub(super) after: Option<fn(&mut Meddler, usize)>,
    /// Which interrupts get through.
    pub(super) interrupt: Option<fn(Cause) -> bool>,
}

impl Plan {
    pub(super) const NOTHING: Self =
        Self { read: None, write: None, access: None, config: None, before: None, after: None, interrupt: None };

    pub(super) fn sabotage(self) -> Arc<dyn Sabotage<Memory>> {
        Arc::new(self)
    }
}

impl Sabotage<Memory> for Plan {
    fn bus_device(&self, honest: Box<dyn BusDevice>, memory: Memory) -> Box<dyn BusDevice> {
        Box::new(Meddler {
            honest,
            memory,
            plan: *self,
            status: Status::empty(),
            features_sel: 0,
            accepted: Features::empty(),
            sel: 0,
            queues: [QueueSeen::default(); 2],
            resets: 0,
            count: 0,
            flag: false,
        })
    }

    fn interrupt(&self, honest: Arc<dyn Interrupt>) -> Arc<dyn Interrupt> {
        match self.interrupt {
            Some(passes) => Arc::new(Filter { honest, passes }),
            None => honest,
        }
    }
}

struct Filter {
    honest: Arc<dyn Interrupt>,
    passes: fn(Cause) -> bool,
}

impl Interrupt for Filter {
    fn raise(&self, cause: Cause) {
        if (self.passes)(cause) {
            self.honest.raise(cause);
        }
    }
}

/// What the meddler saw the driver write about a queue.
#[derive(Clone, Copy, Default)]
pub(super) struct QueueSeen {
    pub(super) size: u16,
    /// Descriptor, driver and device area.
    pub(super) areas: [u64; 3],
    /// The available index at the last kick.
    pub(super) available: u16,
    pub(super) ready: bool,
    /// How many chains were made available for the last kick.
    pub(super) fresh: usize,
    /// (Packed) where the next chain begins, less `Position::START`.
    turned: u32,
    /// (Packed) the slot in which the newest chain begins: where it is used.
    pub(super) slot: u16,
}

/// A chain that was made available.
pub(super) struct Offered {
    /// Its head or buffer id.
    pub(super) id: u16,
    /// Its entries of the descriptor table, or its slots.
    pub(super) slots: Vec<u16>,
}

/// An honest device, and someone who is not.
pub(super) struct Meddler {
    honest: Box<dyn BusDevice>,
    pub(super) memory: Memory,
    plan: Plan,
    /// As the driver wrote it.
    pub(super) status: Status,
    pub(super) features_sel: u32,
    pub(super) accepted: Features,
    sel: usize,
    pub(super) queues: [QueueSeen; 2],
    pub(super) resets: usize,
    /// For plans that count, and for those that remember one thing.
    pub(super) count: usize,
    pub(super) flag: bool,
}

impl Meddler {
    /// What an honest register reads.
    pub(super) fn ask(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.honest.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes an honest register.
    pub(super) fn tell(&mut self, register: u64, value: u32) {
        self.honest.write(register, &value.to_le_bytes());
    }

    pub(super) fn get<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        let mut bytes = Vec::new();
        let resolved = self.memory.resolve(address, N as u64, Access::READ, |segment| {
            let mut part = vec![0; segment.len()];
            let _ = segment.read(0, &mut part);
            bytes.extend(part);
        });
        resolved.ok().and_then(|()| bytes.try_into().ok())
    }

    pub(super) fn put(&self, address: u64, bytes: &[u8]) {
        let mut at = 0;
        let _ = self.memory.resolve(address, bytes.len() as u64, Access::WRITE, |segment| {
            let _ = segment.write(0, &bytes[at..at + segment.len()]);
            at += segment.len();
        });
    }

    pub(super) fn u16(&self, address: u64) -> u16 {
        self.get(address).map_or(0, u16::from_le_bytes)
    }

    /// Whether rings are packed.
    pub(super) fn packed(&self) -> bool {
        self.has(Features::RING_PACKED)
    }

    /// The fields of an entry of a descriptor table, or of a packed ring: address, length, flags, next.
    pub(super) fn descriptor(&self, table: u64, slot: u16) -> (u64, u32, u16, u16) {
        let at = table + u64::from(slot) * layout::DESCRIPTOR_LEN;
        let [address, rest] = [at, at + 8].map(|at| self.get(at).map_or(0, u64::from_le_bytes));
        match self.packed() {
            true => (address, rest as u32, (rest >> 48) as u16, slot.wrapping_add(1)),
            false => (address, rest as u32, (rest >> 32) as u16, (rest >> 48) as u16),
        }
    }

    pub(super) fn set_descriptor(&self, table: u64, slot: u16, (address, len, flags, next): (u64, u32, u16, u16)) {
        let at = table + u64::from(slot) * layout::DESCRIPTOR_LEN;
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        // A packed ring has the id in front of the flags.
        match self.packed() {
            true => self.put(at + 14, &flags.to_le_bytes()),
            false => self.put(at + 12, &(u32::from(flags) | u32::from(next) << 16).to_le_bytes()),
        }
    }

    /// (Packed) what a slot holds beside an address.
    pub(super) fn tail(&self, queue: usize, slot: u16) -> Tail {
        let at = self.queues[queue].areas[0] + u64::from(slot) * layout::DESCRIPTOR_LEN;
        Tail::from_word(self.get(at + 8).map_or(0, u64::from_ne_bytes))
    }

    pub(super) fn set_tail(&self, queue: usize, slot: u16, tail: Tail) {
        let at = self.queues[queue].areas[0] + u64::from(slot) * layout::DESCRIPTOR_LEN;
        self.put(at + 8, &tail.to_word().to_ne_bytes());
    }

    /// (Packed) where the next chain begins.
    pub(super) fn place(&self, queue: usize) -> Position {
        let QueueSeen { size, turned, .. } = self.queues[queue];
        let size = u32::from(size.max(1));
        Position::new((turned % size) as u16, turned / size % 2 == 0)
    }

    /// The chains that were made available since the last kick. On a packed ring they end where nothing is available.
    pub(super) fn offered(&self, queue: usize) -> Vec<Offered> {
        let (ring, size) = (self.ring(queue), self.queues[queue].size);
        let mut all = Vec::new();
        if self.packed() {
            let mut at = self.place(queue);
            let mut slots = Vec::new();
            for _ in 0..size {
                let Tail { id, flags, .. } = self.tail(queue, at.index());
                if slots.is_empty() && !at.is_available(flags) {
                    break;
                }
                slots.push(at.index());
                at = at.advanced(1, size);
                if flags & NEXT == 0 {
                    all.push(Offered { id, slots: std::mem::take(&mut slots) });
                }
            }
            // One that does not end.
            all.extend((!slots.is_empty()).then_some(Offered { id: 0, slots }));
            return all;
        }
        let last = self.queues[queue].available;
        for number in 0..self.u16(ring.available).wrapping_sub(last).min(size) {
            let id = self.u16(ring.entries + 2 * u64::from(last.wrapping_add(number) % size));
            let (mut slots, mut at) = (Vec::new(), id);
            while slots.len() < size.into() && at < size {
                slots.push(at);
                let (_, _, flags, next) = self.descriptor(ring.table, at);
                if flags & NEXT == 0 {
                    break;
                }
                at = next;
            }
            all.push(Offered { id, slots });
        }
        all
    }

    /// Where what was used last says so: its id and its length, of so many bytes each.
    pub(super) fn used(&self, queue: usize) -> [(u64, usize); 2] {
        let ring = self.ring(queue);
        if self.packed() {
            let slot = ring.table + u64::from(self.queues[queue].slot) * layout::DESCRIPTOR_LEN;
            return [(slot + 12, 2), (slot + 8, 4)];
        }
        let last = self.u16(ring.used).wrapping_sub(1) % ring.size.max(1);
        let element = ring.elements + 8 * u64::from(last);
        [(element, 4), (element + 4, 4)]
    }

    /// Puts a buffer into the ring as used, in the device's place, with nothing done.
    pub(super) fn discard(&self, queue: usize) {
        let offered = self.offered(queue);
        if self.packed() {
            let at = self.place(queue);
            let id = offered.first().map_or(0, |chain| chain.id);
            return self.set_tail(queue, at.index(), Tail { len: 0, id, flags: at.used_flags() });
        }
        let (ring, id) = (self.ring(queue), offered.last().map_or(0, |chain| chain.id));
        let used = self.u16(ring.used);
        let element = ring.elements + 8 * u64::from(used % ring.size.max(1));
        self.put(element, &u32::from(id).to_le_bytes());
        self.put(element + 4, &[0; 4]);
        self.put(ring.used, &used.wrapping_add(1).to_le_bytes());
    }

    /// Addresses of words of a queue's rings.
    pub(super) fn ring(&self, queue: usize) -> Words {
        let QueueSeen { size, areas: [table, driver, device], .. } = self.queues[queue];
        let words = |index: usize| 2 * index as u64;
        if self.packed() {
            // What says so is in the other order, and the rest is in the descriptors.
            let (flags, used_event, used_flags) = (driver + 2, driver, device + 2);
            let none = driver;
            let (available, entries, used, elements) = (none, none, none, none);
            return Words { table, device, size, flags, available, entries, used_event, used_flags, used, elements };
        }
        Words {
            table,
            device,
            size,
            flags: driver,
            available: driver + 2,
            entries: driver + 4,
            used_event: driver + words(layout::used_event(size)),
            used_flags: device,
            used: device + 2,
            elements: device + 4,
        }
    }

    /// Whether the driver accepted `feature`.
    pub(super) fn has(&self, feature: Features) -> bool {
        self.accepted.contains(feature)
    }

    fn kick(&mut self, queue: usize, kick: impl FnOnce(&mut Self)) {
        let meddles = self.plan.before.is_some() || self.plan.after.is_some();
        if queue >= self.queues.len() || !meddles {
            return kick(self);
        }
        let goes_on = self.plan.before.is_none_or(|before| before(self, queue));
        let offered = self.offered(queue);
        if goes_on {
            kick(self);
        }
        let running = self.status.contains(Status::DRIVER_OK);
        let seen = &mut self.queues[queue];
        seen.fresh = offered.len();
        if let Some(newest) = offered.last().filter(|_| running) {
            seen.turned += offered.iter().map(|chain| chain.slots.len() as u32).sum::<u32>();
            seen.slot = newest.slots.first().copied().unwrap_or(0);
        }
        if let Some(after) = self.plan.after {
            after(self, queue);
        }
        if self.queues[queue].ready {
            self.queues[queue].available = self.u16(self.ring(queue).available);
        }
    }

    fn watch(&mut self, register: u64, value: u32) {
        let half = |old: u64, high: bool| match high {
            true => old & 0xffff_ffff | u64::from(value) << 32,
            false => old & !0xffff_ffff | u64::from(value),
        };
        let seen = self.queues.get_mut(self.sel);
        match (register, seen) {
            (STATUS, _) => {
                self.status = Status::from_bits_retain(value as u8);
                if value == 0 {
                    self.resets += 1;
                    self.accepted = Features::empty();
                    self.queues.iter_mut().for_each(|queue| {
                        (queue.available, queue.ready, queue.turned, queue.slot) = (0, false, 0, 0);
                    });
                }
            }
            (DRIVER_FEATURES_SEL | DEVICE_FEATURES_SEL, _) => self.features_sel = value,
            (DRIVER_FEATURES, _) => self.accepted = self.accepted.with_word(self.features_sel, value),
            (QUEUE_SEL, _) => self.sel = value as usize,
            (QUEUE_SIZE, Some(seen)) => seen.size = value as u16,
            (QUEUE_READY, Some(seen)) => seen.ready = value == 1,
            (QUEUE_DESC_LOW..=QUEUE_DEVICE_HIGH, Some(seen)) => {
                let area = &mut seen.areas[((register - QUEUE_DESC_LOW) / 0x10) as usize];
                *area = half(*area, !register.is_multiple_of(8));
            }
            _ => {}
        }
    }
}

/// Addresses of words of a ring. A packed one lacks what a split one has in rings: there they are harmless words of its
/// driver area.
pub(super) struct Words {
    pub(super) table: u64,
    pub(super) device: u64,
    pub(super) size: u16,
    pub(super) flags: u64,
    pub(super) available: u64,
    pub(super) entries: u64,
    pub(super) used_event: u64,
    pub(super) used_flags: u64,
    pub(super) used: u64,
    pub(super) elements: u64,
}

impl BusDevice for Meddler {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(access) = self.plan.access {
            access(self, offset, data.len(), false);
        }
        self.honest.read(offset, data);
        if offset >= CONFIG {
            if let Some(config) = self.plan.config {
                config(self, offset - CONFIG, data);
            }
        } else if let (Some(read), Ok(word)) = (self.plan.read, <[u8; 4]>::try_from(&*data)) {
            data.copy_from_slice(&read(self, offset, u32::from_le_bytes(word)).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(access) = self.plan.access {
            access(self, offset, data.len(), true);
        }
        let Some(mut value) = data.try_into().ok().map(u32::from_le_bytes).filter(|_| offset < CONFIG) else {
            return self.honest.write(offset, data);
        };
        if let Some(write) = self.plan.write {
            match write(self, offset, value) {
                Some(other) => value = other,
                None => return self.watch(offset, value),
            }
        }
        self.watch(offset, value);
        match offset {
            QUEUE_NOTIFY => self.kick(value as usize, |meddler| meddler.tell(offset, value)),
            _ => self.tell(offset, value),
        }
    }

    fn kick(&mut self, queue: u16) -> bool {
        let mut more = false;
        Meddler::kick(self, queue.into(), |meddler| more = meddler.honest.kick(queue));
        more
    }

    fn poll(&mut self) -> bool {
        self.honest.poll()
    }

    fn set_waker(&mut self, waker: Waker) {
        self.honest.set_waker(waker);
    }
}
