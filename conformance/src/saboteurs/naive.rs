//! The driver that everyone writes first.

use std::time::Duration;

use polyvirt_core::memory::Pages;
use polyvirt_core::queue::packed::layout::{EVENTS_OFF, Position, Tail};
use polyvirt_core::queue::{AddError, Buffer, QueueError};
use polyvirt_core::transport::{TransportError, Virtqueue};

use crate::raw::{Descriptor, INDIRECT, NEXT, NO_NOTIFY, Ring, WRITE};
use crate::suite::{DriverRole, Trace};

/// What is wrong with a naive driver, besides that it believes the device.
#[derive(Clone, Copy)]
pub(super) struct Fault {
    /// Starts with rings that say something.
    pub(super) dirty: bool,
    /// Writes flags that do not exist when it wants no interrupts.
    pub(super) odd_flags: bool,
    /// Puts pieces the wrong way round.
    pub(super) reversed: bool,
    /// Makes chains of any length.
    pub(super) too_long: bool,
    /// Flags of the descriptor of an indirect table; 0 if there is none.
    pub(super) indirect: u16,
    /// Puts INDIRECT into tables.
    pub(super) nested: bool,
    /// (Packed) links the entries of tables.
    pub(super) linked: bool,
    /// (Split) the available index stays below this.
    pub(super) wraps_at: u16,
    /// Kicks always, or never.
    pub(super) kicks: Option<bool>,
    /// Kicks where the device's event says so, whatever was negotiated.
    pub(super) event_idx: bool,
    /// Takes what was not used.
    pub(super) eager: bool,
    /// (Packed) writes the slot before its own once more.
    pub(super) restless: bool,
    /// (Packed) makes the first descriptor of a list available before the others.
    pub(super) hasty: bool,
    /// (Packed) has the same id for every buffer.
    pub(super) one_id: bool,
    /// (Packed) does not turn its wrap counter.
    pub(super) one_round: bool,
}

impl Fault {
    pub(super) const NONE: Self = Self {
        dirty: false,
        odd_flags: false,
        reversed: false,
        too_long: false,
        indirect: 0,
        nested: false,
        linked: false,
        wraps_at: 0,
        kicks: None,
        event_idx: false,
        eager: false,
        restless: false,
        hasty: false,
        one_id: false,
        one_round: false,
    };
}

/// How long a list is incomplete: for anyone to see.
const HASTE: Duration = Duration::from_millis(20);

/// It keeps nothing for itself, and believes what the ring says.
pub(super) struct Naive {
    ring: Ring,
    fault: Fault,
    next: u16,
    pending: Vec<u16>,
    tokens: Vec<u32>,
    in_flight: usize,
    free: u16,
    tables: Option<(Pages, u64)>,
}

impl Naive {
    pub(super) fn make(virtqueue: Virtqueue, fault: Fault) -> Result<Box<dyn DriverRole>, QueueError> {
        let size = virtqueue.config.size;
        let mut ring = Ring::new(virtqueue, 0, Trace::default()).map_err(|_| QueueError::Size { size: 0, max: 0 })?;
        if fault.dirty {
            ring.ask_for_kicks(false);
        }
        let (tokens, pending) = (vec![0; size.into()], Vec::new());
        Ok(Box::new(Self { ring, fault, next: 0, pending, tokens, in_flight: 0, free: size, tables: None }))
    }

    /// The table of a chain, as it is in memory.
    fn table(&self, entries: &[Descriptor]) -> Vec<u8> {
        let mut bytes = self.ring.table(entries);
        if self.fault.linked && self.ring.is_packed() {
            bytes.iter_mut().skip(14).step_by(16).for_each(|flags| *flags |= NEXT as u8);
        }
        bytes
    }

    /// Makes the chain at `head` available in a packed ring.
    fn offer_packed(&mut self, head: u16) {
        let (size, fault) = (self.ring.size(), self.fault);
        let packed = self.ring.packed();
        let (chain, at) = (packed.staged(head), packed.available);
        let id = if fault.one_id { 0 } else { head };
        if fault.restless {
            let slot = (at.index() + size - 1) % size;
            let (address, tail) = packed.slot(slot);
            packed.set_slot(slot, address, Tail { len: tail.len ^ 1, ..tail });
        }
        if fault.hasty && chain.len() > 1 {
            packed.offer(id, &chain[..1]);
            std::thread::sleep(HASTE);
            packed.offer(id, &chain[1..]);
        } else {
            packed.offer(id, &chain);
        }
        if fault.one_round {
            packed.available = Position::new(packed.available.index(), true);
        }
    }

    /// Whether the device is to be kicked for chains that were published from `old` on.
    fn wanted(&mut self, old: u16) -> bool {
        if let Some(always) = self.fault.kicks {
            return always;
        }
        let heeds_event = self.fault.event_idx;
        if self.ring.is_packed() {
            let packed = self.ring.packed();
            let (at, flags) = packed.device_events();
            return if heeds_event { at == packed.available.pack() } else { flags != EVENTS_OFF };
        }
        let split = self.ring.split();
        if heeds_event { split.avail_event() == old } else { split.used_flags() & NO_NOTIFY == 0 }
    }

    /// Id and length of the next used buffer; how many descriptors it has is read back from the ring.
    fn used(&mut self) -> Option<(u32, u32)> {
        let size = self.ring.size();
        let eager = self.fault.eager;
        if self.ring.is_packed() {
            let packed = self.ring.packed();
            let at = packed.taken;
            let tail = packed.slot(at.index()).1;
            let used = self.ring.take();
            self.free = self.free.wrapping_add(1);
            return used.or(eager.then_some((0, 0))).map(|(id, _)| (id, tail.len));
        }
        let split = self.ring.split();
        if split.used_index() == split.taken && !eager {
            return None;
        }
        let (id, len) = split.used_element(split.taken);
        split.taken = split.taken.wrapping_add(1);
        let mut at = id as u16;
        for _ in 0..2 * size {
            let Descriptor { flags, next, .. } = split.descriptor(at);
            self.free = self.free.wrapping_add(1);
            at = next;
            if flags & NEXT == 0 {
                break;
            }
        }
        Some((id, len))
    }
}

impl DriverRole for Naive {
    fn add(&mut self, readable: &[Buffer], writable: &[Buffer], token: u32) -> Result<(), AddError<u32>> {
        let (pieces, size) = (readable.len() + writable.len(), self.ring.size());
        if pieces > size.into() && !self.fault.too_long {
            return Err(AddError::Pieces { token, pieces, size });
        }
        let head = self.next;
        let mut all: Vec<_> = readable.iter().map(|piece| (piece, 0)).collect();
        all.extend(writable.iter().map(|piece| (piece, WRITE)));
        if self.fault.reversed {
            all.reverse();
        }
        let last = all.len() - 1;
        let table = self.tables.as_ref().filter(|_| self.fault.indirect != 0).map_or(0, |(_, address)| *address);
        let mut inside = Vec::new();
        for (number, (piece, flags)) in all.into_iter().enumerate() {
            let flags = flags | if number < last { NEXT } else { 0 };
            let nested = if self.fault.nested { INDIRECT } else { 0 };
            if table != 0 {
                let next = number as u16 + 1;
                inside.push(Descriptor { address: piece.address, len: piece.len, flags: flags | nested, next });
                continue;
            }
            let (slot, next) = ((head + number as u16) % size, (head + number as u16 + 1) % size);
            self.ring.set_descriptor_quietly(slot, Descriptor { address: piece.address, len: piece.len, flags, next });
        }
        if let Some((pages, address)) = self.tables.as_ref().filter(|_| table != 0) {
            let bytes = self.table(&inside);
            let _ = pages.write(0, &bytes);
            let named = Descriptor { address: *address, len: bytes.len() as u32, flags: self.fault.indirect, next: 0 };
            self.ring.set_descriptor_quietly(head, named);
            self.next = (head + 1) % size;
        } else {
            self.next = (head + pieces as u16) % size;
        }
        self.free = self.free.wrapping_sub(pieces as u16);
        self.tokens[usize::from(head)] = token;
        self.pending.push(head);
        self.in_flight += 1;
        Ok(())
    }

    fn kick(&mut self) -> Result<bool, TransportError> {
        let old = self.ring.offered;
        let heads = std::mem::take(&mut self.pending);
        if self.fault.event_idx && self.ring.is_packed() {
            // Asked before the chains are there: where the first of them will be.
            let wanted = self.wanted(old);
            self.ring.offer_all(&heads);
            return if wanted { self.ring.kick().map(|()| true) } else { Ok(false) };
        }
        match self.ring.is_packed() {
            true => heads.into_iter().for_each(|head| self.offer_packed(head)),
            false => self.ring.offer_all(&heads),
        }
        if self.fault.wraps_at > 0 && !self.ring.is_packed() {
            let index = self.ring.offered % self.fault.wraps_at;
            self.ring.offered = index;
            self.ring.split().set_available(index);
        }
        let wanted = self.wanted(old);
        if wanted {
            self.ring.kick()?;
        }
        Ok(wanted)
    }

    fn get(&mut self) -> Result<Option<(u32, u32)>, QueueError> {
        let Some((id, len)) = self.used() else { return Ok(None) };
        self.in_flight = self.in_flight.saturating_sub(1);
        Ok(Some((self.tokens[id as usize % self.tokens.len()], len)))
    }

    fn disable(&mut self) {
        let odd = self.fault.odd_flags;
        match self.ring.is_packed() {
            true => self.ring.packed().set_driver_events(0, if odd { 3 } else { EVENTS_OFF }),
            false => self.ring.split().set_flags(if odd { 2 } else { 1 }),
        }
    }

    fn enable(&mut self) -> bool {
        self.ring.want_interrupts(true);
        true
    }

    fn allow_indirect(mut self: Box<Self>, tables: Pages, address: u64) -> Box<dyn DriverRole> {
        self.tables = Some((tables, address));
        self
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn free(&self) -> u16 {
        self.free
    }

    fn drain(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.tokens)
    }
}
