//! Rings written by hand, split or packed: any descriptor, any index, at any time.
//!
//! What both formats have goes through [`Ring`], so that a case is written once: descriptors are put into a table, from
//! which chains are offered; used buffers are taken; each side says when it wants to be told. What only one format has is
//! behind [`Ring::split`] and [`Ring::packed`].

mod memory;
mod packed;
mod session;
mod split;

use std::mem::swap;
use std::sync::atomic::Ordering;

use polyvirt_core::memory::Access;
use polyvirt_core::queue::packed::layout::{EVENTS_OFF, EVENTS_ON, Position};
use polyvirt_core::queue::{Layout, QueueConfig};
use polyvirt_core::transport::{Notify, TransportError, Virtqueue};

use crate::suite::{Objection, Trace};

pub use memory::Memory;
pub use packed::{Packed, is_event_structure};
/// A descriptor as cases write it. On a packed ring `next` is where the chain goes on in the case's own table.
pub use polyvirt_core::queue::split::layout::Descriptor;
pub use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, WRITE};
pub use split::{NO_INTERRUPT, NO_NOTIFY, Split};

/// A ring in the driver's hands, or in the device's, without any rules.
pub struct Ring {
    /// Where it is.
    pub config: QueueConfig,
    /// Its index.
    pub index: u16,
    /// How many chains were offered, modulo 2^16.
    pub offered: u16,
    format: Format,
    notify: Box<dyn Notify>,
    trace: Trace,
}

enum Format {
    Split(Split),
    Packed(Packed),
}

/// A chain that a driver made available.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Its head (split) or buffer id (packed).
    pub id: u16,
    /// Its descriptors, without what says who owns them.
    pub chain: Vec<Descriptor>,
}

macro_rules! either {
    ($ring:expr, $name:ident => $call:expr) => {
        match $ring {
            Format::Split($name) => $call,
            Format::Packed($name) => $call,
        }
    };
}

impl Ring {
    /// Takes over `virtqueue`, and clears it.
    pub fn new(virtqueue: Virtqueue, index: u16, trace: Trace) -> Result<Self, Objection> {
        let Virtqueue { config, descriptors, driver, device, notify } = virtqueue;
        for pages in [&descriptors, &driver, &device] {
            pages.fill(0, pages.len(), 0)?;
        }
        let areas = Virtqueue { config, descriptors, driver, device, notify: () };
        let format = match config.layout {
            Layout::Packed => Format::Packed(Packed::new(areas, index, trace.clone())?),
            Layout::Modern | Layout::Legacy(_) => Format::Split(Split::new(areas, index, trace.clone())?),
        };
        Ok(Self { config, index, offered: 0, format, notify, trace })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.config.size
    }

    /// Whether it is packed.
    pub fn is_packed(&self) -> bool {
        matches!(self.format, Format::Packed(_))
    }

    /// What only a split ring has.
    ///
    /// # Panics
    /// If it is packed.
    pub fn split(&mut self) -> &mut Split {
        match &mut self.format {
            Format::Split(split) => split,
            Format::Packed(_) => panic!("a case about split rings, with a packed one"),
        }
    }

    /// What only a packed ring has.
    ///
    /// # Panics
    /// If it is split.
    pub fn packed(&mut self) -> &mut Packed {
        match &mut self.format {
            Format::Packed(packed) => packed,
            Format::Split(_) => panic!("a case about packed rings, with a split one"),
        }
    }

    /// Writes entry `slot` of the table of descriptors.
    ///
    /// # Panics
    /// If the table has no such entry.
    pub fn set_descriptor(&mut self, slot: u16, descriptor: Descriptor) {
        self.trace.note(format!("descriptor {slot} of queue {}: {}", self.index, shown(descriptor)));
        self.set_descriptor_quietly(slot, descriptor);
    }

    /// [`Ring::set_descriptor`] without a trace.
    pub fn set_descriptor_quietly(&mut self, slot: u16, descriptor: Descriptor) {
        either!(&mut self.format, ring => ring.set_descriptor(slot, descriptor));
    }

    /// The bytes of the whole descriptor area.
    pub fn descriptor_bytes(&self) -> Result<Vec<u8>, Objection> {
        let mut bytes = vec![0; 16 * usize::from(self.size())];
        either!(&self.format, ring => ring.descriptors()).segment().read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// The bytes of an indirect table of `descriptors`; on a packed ring they follow one another, without links.
    pub fn table(&self, descriptors: &[Descriptor]) -> Vec<u8> {
        let all: Vec<_> = descriptors.iter().copied().map(shown).collect();
        self.trace.note(format!("a table of [{}]", all.join("; ")));
        let words = |&descriptor| either!(&self.format, ring => ring.words(descriptor));
        descriptors.iter().flat_map(words).flat_map(u64::to_ne_bytes).collect()
    }

    /// The reverse of [`Ring::table`].
    pub fn parse_table(&self, bytes: &[u8]) -> Vec<Descriptor> {
        let words: Vec<_> =
            bytes.chunks(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default())).collect();
        let parse = |entry: &[u64]| either!(&self.format, ring => ring.parse([entry[0], entry[1]]));
        words.chunks_exact(2).map(parse).collect()
    }

    /// Links `pieces` (memory, device-writable) to a chain in consecutive entries of the table from `head` on.
    pub fn chain(&mut self, head: u16, pieces: &[(Memory, bool)]) {
        let last = pieces.len() - 1;
        for (number, (memory, writable)) in pieces.iter().enumerate() {
            let slot = (head + number as u16) % self.size();
            let next = (slot + 1) % self.size();
            self.set_descriptor(slot, link(memory, *writable, (number < last).then_some(next)));
        }
    }

    /// Makes the chain at `head` available; on a packed ring `head` is its buffer id.
    pub fn offer(&mut self, head: u16) {
        self.offer_all(&[head]);
    }

    /// Makes the chains at `heads` available at once.
    pub fn offer_all(&mut self, heads: &[u16]) {
        self.trace.note(format!("make {heads:?} available in queue {}", self.index));
        self.offered = self.offered.wrapping_add(heads.len() as u16);
        either!(&mut self.format, ring => ring.offer_all(heads));
    }

    /// Makes available what no device can make sense of: a head that there is no descriptor for (split), a chain that
    /// has no end (packed).
    pub fn offer_nonsense(&mut self) {
        let size = self.size();
        match &self.format {
            Format::Split(_) => self.offer(size),
            Format::Packed(_) => {
                for slot in 0..size {
                    let next = (slot + 1) % size;
                    self.set_descriptor_quietly(slot, Descriptor { address: 0, len: 0, flags: NEXT, next });
                }
                self.offer(0);
            }
        }
    }

    /// After [`Ring::offer_nonsense`] as the first thing: makes the chain at `head` available in its place, and behind it
    /// where there is room.
    pub fn offer_instead(&mut self, head: u16) {
        match &mut self.format {
            Format::Split(split) => {
                split.set_entry(0, head);
                split.offer_all(&[head]);
            }
            Format::Packed(packed) => {
                packed.available = Position::START;
                packed.offer_all(&[head]);
            }
        }
    }

    /// Rings the doorbell, and says where the ring goes on.
    pub fn kick(&mut self) -> Result<(), TransportError> {
        self.notify.notify_at(match &self.format {
            Format::Split(split) => split.available,
            Format::Packed(packed) => packed.available.pack(),
        })
    }

    /// Wants to be interrupted for every used buffer, or for none. With EVENT_IDX a split ring does not say so.
    pub fn want_interrupts(&mut self, wanted: bool) {
        match &mut self.format {
            Format::Split(split) => split.set_flags(if wanted { 0 } else { NO_INTERRUPT }),
            Format::Packed(packed) => packed.set_driver_events(0, if wanted { EVENTS_ON } else { EVENTS_OFF }),
        }
    }

    /// (With EVENT_IDX) wants to be interrupted when so many more chains, and one, are used, each of `descriptors`.
    pub fn want_interrupt_after(&mut self, chains: u16, descriptors: usize) {
        match &mut self.format {
            Format::Split(split) => split.set_used_event(split.taken.wrapping_add(chains)),
            Format::Packed(packed) => packed.want_interrupt_behind(u32::from(chains) * descriptors as u32),
        }
    }

    /// Writes the word that says at what an interrupt is wanted: used_event, or the driver's event offset and wrap
    /// counter. What says whether that means anything stays.
    pub fn set_interrupt_event(&mut self, event: u16) {
        match &mut self.format {
            Format::Split(split) => split.set_used_event(event),
            Format::Packed(packed) => packed.set_driver_events(event, packed.driver_events().1),
        }
    }

    /// Whether the device asks to be kicked whatever is offered. (Without EVENT_IDX.)
    pub fn asks_for_kicks(&self) -> bool {
        match &self.format {
            Format::Split(split) => split.used_flags() == 0,
            Format::Packed(packed) => packed.device_events().1 == EVENTS_ON,
        }
    }

    /// Whether something was used that was not taken.
    pub fn has_used(&self) -> bool {
        match &self.format {
            Format::Split(split) => split.used_index() != split.taken,
            Format::Packed(packed) => packed.has_used(),
        }
    }

    /// Whether it looks as if nothing had ever been used: the host may clear rings that it owns.
    pub fn is_rewound(&self) -> bool {
        match &self.format {
            Format::Split(split) => split.used_index() == 0,
            Format::Packed(_) => false,
        }
    }

    /// The bytes of the area in which the device says what it used.
    pub fn used_bytes(&self) -> Result<Vec<u8>, Objection> {
        match &self.format {
            Format::Split(split) => Ok(split.device_bytes()?),
            Format::Packed(_) => self.descriptor_bytes(),
        }
    }

    /// Whether a device may return `id`.
    pub fn knows(&self, id: u32) -> bool {
        match &self.format {
            Format::Split(_) => id < self.config.size.into(),
            Format::Packed(packed) => packed.knows(id),
        }
    }

    /// The next used buffer, if there is one: its head or id, and how many bytes were written.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        let (id, len) = either!(&mut self.format, ring => ring.take())?;
        self.trace.note(format!("queue {}: used id {id}, length {len}", self.index));
        Some((id, len))
    }

    /// Device-visible ranges of the ring, and what the device may do there.
    pub fn areas(&self) -> [(u64, u64, Access); 3] {
        either!(&self.format, ring => ring.areas())
    }

    /// Where the next used buffer will be told, and what says then that it is: address and length of each.
    pub fn next_used(&self) -> [(u64, u64); 2] {
        either!(&self.format, ring => ring.next_used())
    }

    /// What turns a descriptor into `bad` and, the next time, back to `good`, at any time, from any thread, and leaves
    /// alone who owns it: the one in entry 0 of a split ring's table, every one with `good`'s address in a packed ring.
    pub fn spoiler(&self, good: Descriptor, bad: Descriptor) -> Box<dyn FnMut() + Send> {
        match &self.format {
            Format::Split(split) => {
                let ([mut next, mut other], table) =
                    ([bad, good].map(|it| split.words(it)), split.descriptors().clone());
                Box::new(move || {
                    table.store(0, next[0], Ordering::SeqCst);
                    table.store(1, next[1], Ordering::SeqCst);
                    swap(&mut next, &mut other);
                })
            }
            Format::Packed(packed) => {
                // A slot's second word changes hands, its address does not.
                let (ring, size) = (packed.descriptors().clone(), usize::from(self.config.size));
                let [mut next, mut other] = [bad.address.to_le(), good.address.to_le()];
                Box::new(move || {
                    for at in (0..2 * size).step_by(2).filter(|&at| ring.load::<u64>(at, Ordering::SeqCst) == other) {
                        ring.store(at, next, Ordering::SeqCst);
                    }
                    swap(&mut next, &mut other);
                })
            }
        }
    }

    /// (In the device's place) the next chain that the driver made available, if there is one.
    pub fn next_chain(&mut self) -> Result<Option<Made>, Objection> {
        either!(&mut self.format, ring => ring.next_chain())
    }

    /// (In the device's place) gives a buffer back.
    pub fn put_used(&mut self, id: u32, len: u32) {
        self.trace.note(format!("use in queue {}: id {id}, length {len}", self.index));
        self.put_used_quietly(id, len);
    }

    /// [`Ring::put_used`] without a trace.
    pub fn put_used_quietly(&mut self, id: u32, len: u32) {
        match &mut self.format {
            Format::Split(split) => split.put_used(id, len),
            Format::Packed(packed) => packed.put_used(id as u16, len),
        }
    }

    /// (In the device's place) asks to be kicked for every chain, or for none. With EVENT_IDX a split ring does not say so.
    pub fn ask_for_kicks(&mut self, wanted: bool) {
        match &mut self.format {
            Format::Split(split) => split.set_used_flags(if wanted { 0 } else { NO_NOTIFY }),
            Format::Packed(packed) => packed.set_device_events(0, if wanted { EVENTS_ON } else { EVENTS_OFF }),
        }
    }

    /// (In the device's place, with EVENT_IDX) asks to be kicked when so many more chains, and one, are available than
    /// were seen, each of one descriptor.
    pub fn ask_for_kick_after(&mut self, chains: u16) {
        match &mut self.format {
            Format::Split(split) => split.set_avail_event(split.seen.wrapping_add(chains)),
            Format::Packed(packed) => packed.ask_for_kick_behind(chains.into()),
        }
    }

    /// (In the device's place) writes the word that says at what a kick is wanted: avail_event, or the device's event
    /// offset and wrap counter. What says whether that means anything stays.
    pub fn set_kick_event(&mut self, event: u16) {
        match &mut self.format {
            Format::Split(split) => split.set_avail_event(event),
            Format::Packed(packed) => packed.set_device_events(event, packed.device_events().1),
        }
    }

    /// (In the device's place) overwrites every descriptor, but not who owns it.
    pub fn deface(&mut self) {
        match &mut self.format {
            Format::Split(split) => {
                let nonsense = Descriptor { address: u64::MAX, len: u32::MAX, flags: u16::MAX, next: u16::MAX };
                (0..self.config.size).for_each(|slot| split.set_descriptor(slot, nonsense));
            }
            Format::Packed(packed) => packed.deface(),
        }
    }

    /// (In the device's place) whether the ring says nothing: no chain, no used buffer, no wish of either side.
    pub fn is_blank(&mut self) -> bool {
        match &mut self.format {
            Format::Split(split) => {
                [split.flags(), split.available_index(), split.used_flags(), split.used_index()] == [0; 4]
            }
            Format::Packed(packed) => {
                let wishes = [packed.driver_events(), packed.device_events()];
                wishes == [(0, 0); 2] && (0..self.config.size).all(|slot| packed.slot(slot).1.flags == 0)
            }
        }
    }
}

/// A descriptor of `memory`, linked to `next`.
pub fn link(memory: &Memory, writable: bool, next: Option<u16>) -> Descriptor {
    let write = if writable { WRITE } else { 0 };
    let link = if next.is_some() { NEXT } else { 0 };
    Descriptor { address: memory.address, len: memory.len, flags: write | link, next: next.unwrap_or(0) }
}

fn shown(Descriptor { address, len, flags, next }: Descriptor) -> String {
    format!("{address:#x}+{len:#x}, flags {flags}, next {next}")
}
