//! The driver's role, whatever the ring format: the paper's five operations (section 3.1).

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::packed::driver::Ring as Packed;
use super::split::driver::Ring as Split;
use super::split::layout::{Big, Little};
use super::{ByteOrder, Layout, QueueConfig, QueueError};
use crate::memory::Pages;
use crate::transport::{Notify, TransportError, Virtqueue};

/// A piece of a buffer: memory that was shared with the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Device-visible address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

/// Why [`DriverQueue::add_buf`] did not add. Where the token can still be used, it comes back.
#[derive(Debug, thiserror::Error)]
pub enum AddError<T> {
    /// No room: the device was kicked, so that it makes some.
    #[error("the queue is full; the device was kicked")]
    Full(T),
    /// A buffer with no piece, or with more pieces than the queue has entries.
    #[error("a buffer of {pieces} pieces does not fit a queue of {size} entries")]
    Pieces {
        /// The token.
        token: T,
        /// Pieces.
        pieces: usize,
        /// Entries.
        size: u16,
    },
    /// The queue is broken.
    #[error(transparent)]
    Broken(QueueError),
    /// The kick failed.
    #[error(transparent)]
    Notify(TransportError),
}

/// A virtqueue in the driver's hands; `T` is the token that identifies a buffer.
///
/// What the device may rewrite is never read back: descriptors and their lengths are kept in private copies.
pub struct DriverQueue<T, N = Box<dyn Notify>> {
    ring: Ring,
    shadow: Shadow,
    /// By head or buffer id.
    in_flight: Box<[InFlight<T>]>,
    count: u32,
    /// Counts what was added, to keep the order across a restart.
    sequence: u64,
    broken: Option<QueueError>,
    /// Whether used lengths count only as far as a buffer has room: devices of before 1.0 often tell others (2.7.8.2).
    any_length: bool,
    in_order: Option<InOrder>,
    notify: N,
}

/// What buffers that are used in order need (VIRTIO_F_IN_ORDER, 2.7.9).
struct InOrder {
    /// By sequence number, modulo the size: the head or buffer id.
    heads: Box<[u16]>,
    /// The sequence number of the oldest buffer in flight.
    oldest: u64,
    /// The last buffer of a batch that the device used at once, and the length that it told of it.
    batch: Option<(u32, u32)>,
}

/// A buffer in the device's hands.
struct InFlight<T> {
    token: Option<T>,
    sequence: u64,
    writable: u32,
    /// Entries of the shadow that it takes, and the last of them; the first is its head.
    entries: u16,
    last: u16,
    /// How many of its pieces the device may only read.
    readable: u16,
    /// Pieces in the indirect table of its head; 0 if it has none.
    in_table: u16,
}

/// The driver's own copy of what it gave to the device: an entry for each descriptor, linked into chains and into a list
/// of free ones.
pub(super) struct Shadow {
    entries: Box<[Entry]>,
    first_free: u16,
    free: u16,
    /// Whether entries are taken and given back round and round (2.7.9): then they stay linked as they are.
    in_order: bool,
    tables: Option<Tables>,
}

/// Small, since many are looked at: whether the device may write the piece, [`InFlight::readable`] tells.
#[derive(Clone, Copy)]
struct Entry {
    address: u64,
    len: u32,
    /// Wider than it need be: it is read soon after it was written, and a 16-bit store next to another does not
    /// forward to the 32-bit load that a compiler makes of this.
    next: u32,
}

/// How far a chain is that takes its entries.
struct Taken {
    /// The entry to take next.
    next: u16,
    /// The one taken last.
    last: u16,
    /// How many are yet to be taken.
    left: usize,
}

/// Memory for indirect tables, one for each entry of the queue.
struct Tables {
    pages: Pages,
    address: u64,
    /// Entries of each table.
    entries: usize,
    /// The pieces in each table.
    shadow: Box<[Buffer]>,
}

/// Where a piece goes.
pub(super) struct Place {
    /// The entry of the shadow: on a split ring the descriptor's index.
    pub(super) index: u16,
    /// The next entry.
    pub(super) next: u16,
    pub(super) writable: bool,
    pub(super) last: bool,
}

impl InOrder {
    /// For a queue of `size` with nothing in flight, whose next buffer is number `oldest`.
    fn new(size: u16, oldest: u64) -> Self {
        Self { heads: (0..size).map(|_| 0).collect(), oldest, batch: None }
    }

    fn added(&mut self, sequence: u64, head: u16) {
        let slot = (sequence % self.heads.len() as u64) as usize;
        self.heads[slot] = head;
    }
}

impl Shadow {
    fn new(size: u16, in_order: bool) -> Self {
        let next = |next: u16| Entry { address: 0, len: 0, next: u32::from(next % size) };
        Self { entries: (1..=size).map(next).collect(), first_free: 0, free: size, in_order, tables: None }
    }

    /// Takes entries for a chain; `write` puts each piece into the ring. The caller has checked that they are there, and
    /// that there is a piece. Returns the last entry; the first was the first free one.
    #[inline(always)]
    fn take(&mut self, readable: &[Buffer], writable: &[Buffer], mut write: impl FnMut(Buffer, Place)) -> u16 {
        let left = readable.len() + writable.len();
        self.free -= left as u16;
        let mut taken = Taken { next: self.first_free, last: self.first_free, left };
        // Not a loop over both, which would be one only where a compiler finds it short enough to write out.
        self.take_part(readable, false, &mut taken, &mut write);
        self.take_part(writable, true, &mut taken, &mut write);
        self.first_free = taken.next;
        taken.last
    }

    #[inline(always)]
    fn take_part(
        &mut self,
        pieces: &[Buffer],
        writable: bool,
        taken: &mut Taken,
        write: &mut impl FnMut(Buffer, Place),
    ) {
        for &piece in pieces {
            let index = taken.next;
            let entry = &mut self.entries[usize::from(index)];
            (entry.address, entry.len) = (piece.address, piece.len);
            let next = entry.next as u16;
            let left = taken.left - 1;
            write(piece, Place { index, next, writable, last: left == 0 });
            *taken = Taken { next, last: index, left };
        }
    }

    /// Gives back a chain of `count` entries from `head` to `last`.
    #[inline(always)]
    fn release(&mut self, head: u16, last: u16, count: u16) {
        self.free += count;
        if !self.in_order {
            self.entries[usize::from(last)].next = self.first_free.into();
            self.first_free = head;
        }
    }
}

impl Tables {
    /// Writes the table of entry `index`; its address and length.
    fn write(
        &mut self,
        index: u16,
        readable: &[Buffer],
        writable: &[Buffer],
        words: impl Fn(Buffer, u16, bool, bool) -> (u64, u64),
    ) -> Buffer {
        let first = usize::from(index) * self.entries;
        let (offset, pieces) = (first * 16, readable.len() + writable.len());
        let all = readable.iter().map(|piece| (*piece, false)).chain(writable.iter().map(|piece| (*piece, true)));
        for (number, (piece, writable)) in all.enumerate() {
            self.shadow[first + number] = piece;
            let (low, high) = words(piece, number as u16 + 1, writable, number + 1 == pieces);
            // The table has room: the caller compared its entries with the pieces.
            let _ = self.pages.write(offset + 16 * number, &low.to_ne_bytes());
            let _ = self.pages.write(offset + 16 * number + 8, &high.to_ne_bytes());
        }
        Buffer { address: self.address + offset as u64, len: 16 * pieces as u32 }
    }
}

/// Bytes in all, as far as they can be counted.
#[inline(always)]
fn len(pieces: &[Buffer]) -> u32 {
    pieces.iter().fold(0, |sum, piece| piece.len.saturating_add(sum))
}

/// Its tag is a byte of its own, which is faster to tell apart than what hides in a field.
#[repr(u8)]
pub(super) enum Ring {
    Packed(Packed),
    Split(Split<Little>),
    SplitBig(Split<Big>),
}

macro_rules! ring {
    ($ring:expr, $name:ident => $call:expr) => {
        match $ring {
            Ring::Packed($name) => $call,
            Ring::Split($name) => $call,
            Ring::SplitBig($name) => $call,
        }
    };
}

impl Ring {
    fn new<N>(virtqueue: Virtqueue<N>) -> Result<(Self, N), QueueError> {
        let Virtqueue { config, descriptors, driver, device, notify } = virtqueue;
        let ring = match config.layout {
            Layout::Modern | Layout::Legacy(ByteOrder::Little) => {
                Self::Split(Split::new(&config, descriptors, driver, device)?)
            }
            Layout::Legacy(ByteOrder::Big) => Self::SplitBig(Split::new(&config, descriptors, driver, device)?),
            Layout::Packed => Self::Packed(Packed::new(&config, descriptors, driver, device)?),
        };
        Ok((ring, notify))
    }
}

impl<T, N: Notify> DriverQueue<T, N> {
    /// Takes `virtqueue` into use, empty.
    pub fn new(virtqueue: Virtqueue<N>) -> Result<Self, QueueError> {
        let QueueConfig { size, in_order, layout, .. } = virtqueue.config;
        let any_length = matches!(layout, Layout::Legacy(_));
        let (ring, notify) = Ring::new(virtqueue)?;
        let nothing =
            |_| InFlight { token: None, sequence: 0, writable: 0, entries: 0, last: 0, readable: 0, in_table: 0 };
        Ok(Self {
            ring,
            shadow: Shadow::new(size, in_order),
            in_flight: (0..size).map(nothing).collect(),
            count: 0,
            sequence: 0,
            broken: None,
            any_length,
            in_order: in_order.then(|| InOrder::new(size, 0)),
            notify,
        })
    }

    /// Allows indirect descriptors, if they were negotiated: `tables`, shared at `address` for reading, is divided
    /// evenly among the entries of the queue. Buffers of several pieces that fit a table take one entry then.
    #[must_use]
    pub fn with_indirect(mut self, tables: Pages, address: u64) -> Self {
        let size = self.in_flight.len();
        let entries = (tables.len() / 16 / size).min(u16::MAX.into());
        if entries > 1 && ring!(&self.ring, ring => ring.is_indirect()) {
            let shadow = (0..entries * size).map(|_| Buffer { address: 0, len: 0 }).collect();
            self.shadow.tables = Some(Tables { pages: tables, address, entries, shadow });
        }
        self
    }

    /// Adds a buffer: `readable` pieces, then `writable` ones. It is published by [`DriverQueue::kick`].
    ///
    /// If the queue is full, publishes what was added before, kicks even if the device asked for no kicks, and says so.
    #[inline(always)]
    pub fn add_buf(&mut self, readable: &[Buffer], writable: &[Buffer], token: T) -> Result<(), AddError<T>> {
        if let Some(reason) = self.broken {
            return Err(AddError::Broken(reason));
        }
        let (pieces, size) = (readable.len() + writable.len(), self.in_flight.len());
        if pieces == 0 || pieces > size {
            return Err(AddError::Pieces { token, pieces, size: size as u16 });
        }
        if pieces > 1 && self.shadow.tables.as_ref().is_some_and(|tables| pieces <= tables.entries) {
            return self.add_indirect(readable, writable, token);
        }
        let entries = pieces as u16;
        if entries > self.shadow.free {
            return Err(self.full(token));
        }
        let (head, shadow) = (self.shadow.first_free, &mut self.shadow);
        let last = ring!(&mut self.ring, ring => {
            let mut at = ring.cursor(head);
            let last = shadow.take(readable, writable, |piece, place| ring.write(&mut at, piece, place));
            ring.enter(at, head);
            last
        });
        self.given(
            head,
            InFlight {
                token: Some(token),
                sequence: 0,
                writable: len(writable),
                entries,
                last,
                readable: readable.len() as u16,
                in_table: 0,
            },
        );
        Ok(())
    }

    /// As [`DriverQueue::add_buf`], for pieces that fit a table.
    #[inline(never)]
    fn add_indirect(&mut self, readable: &[Buffer], writable: &[Buffer], token: T) -> Result<(), AddError<T>> {
        let (head, shadow) = (self.shadow.first_free, &mut self.shadow);
        let Some(tables) = shadow.tables.as_mut().filter(|_| shadow.free > 0) else { return Err(self.full(token)) };
        let last = ring!(&mut self.ring, ring => {
            let table = tables.write(head, readable, writable, ring.table_words());
            let mut at = ring.cursor(head);
            ring.write_table(&mut at, head, table);
            ring.enter(at, head);
            shadow.take(&[table], &[], |_, _| {})
        });
        let in_table = (readable.len() + writable.len()) as u16;
        self.given(
            head,
            InFlight {
                token: Some(token),
                sequence: 0,
                writable: len(writable),
                entries: 1,
                last,
                readable: readable.len() as u16,
                in_table,
            },
        );
        Ok(())
    }

    /// A buffer is in the device's hands from now on.
    #[inline(always)]
    fn given(&mut self, head: u16, buffer: InFlight<T>) {
        self.in_flight[usize::from(head)] = InFlight { sequence: self.sequence, ..buffer };
        if let Some(order) = &mut self.in_order {
            order.added(self.sequence, head);
        }
        self.sequence += 1;
        self.count += 1;
    }

    #[cold]
    fn full(&mut self, token: T) -> AddError<T> {
        ring!(&mut self.ring, ring => ring.publish());
        let next = ring!(&self.ring, ring => ring.next());
        self.notify.notify_at(next).map_or_else(AddError::Notify, |()| AddError::Full(token))
    }

    /// Publishes what was added, and notifies the device unless it asked not to. True if it was notified; a broken queue
    /// is left alone.
    #[inline(always)]
    pub fn kick(&mut self) -> Result<bool, TransportError> {
        let wanted = self.broken.is_none() && ring!(&mut self.ring, ring => ring.publish());
        if wanted {
            let next = ring!(&self.ring, ring => ring.next());
            self.notify.notify_at(next)?;
        }
        Ok(wanted)
    }

    /// Takes back a used buffer: its token and how many bytes the device wrote. Out of order is normal. An error latches
    /// the queue. More bytes than the buffer has room for are an error, but on the legacy interface all that it has: there
    /// devices often tell a wrong length.
    ///
    /// An interrupt can be relied on only for what is used after this has returned none (or [`DriverQueue::enable_cb`]
    /// true): look before waiting.
    #[inline(always)]
    pub fn get_buf(&mut self) -> Result<Option<(T, u32)>, QueueError> {
        if let Some(reason) = self.broken {
            return Err(reason);
        }
        let used =
            if self.in_order.is_some() { self.used_in_order()? } else { ring!(&mut self.ring, ring => ring.used()) };
        let Some((id, len)) = used else { return Ok(None) };
        let Some((entry, token)) =
            self.in_flight.get_mut(id as usize).and_then(|entry| entry.token.take().map(|token| (entry, token)))
        else {
            self.broken = Some(QueueError::UsedId { id });
            return Err(QueueError::UsedId { id });
        };
        if len > entry.writable && !self.any_length {
            let reason = QueueError::UsedLength { len, writable: entry.writable };
            entry.token = Some(token);
            self.broken = Some(reason);
            return Err(reason);
        }
        let (entries, last, len) = (entry.entries, entry.last, len.min(entry.writable));
        ring!(&mut self.ring, ring => ring.advance(entries));
        // The id is an index of `in_flight`, so it fits.
        self.shadow.release(id as u16, last, entries);
        self.count -= 1;
        Ok(Some((token, len)))
    }

    /// The oldest buffer, if it is used. The device may have used several at once by telling the last of them only: how much
    /// it wrote to the others is not known then, and taken for all.
    #[inline(never)]
    fn used_in_order(&mut self) -> Result<Option<(u32, u32)>, QueueError> {
        let Some(order) = &mut self.in_order else { return Ok(None) };
        let (fresh, (id, len)) = match order.batch {
            Some(last) => (false, last),
            None => match ring!(&mut self.ring, ring => ring.used()) {
                Some(used) => (true, used),
                None => return Ok(None),
            },
        };
        let named = self.in_flight.get(id as usize).filter(|buffer| buffer.token.is_some());
        let ahead = named.map(|buffer| buffer.sequence - order.oldest);
        let Some(ahead) = ahead.filter(|ahead| !fresh || ring!(&self.ring, ring => ring.covers(ahead + 1))) else {
            self.broken = Some(QueueError::UsedId { id });
            return Err(QueueError::UsedId { id });
        };
        let oldest = order.heads[(order.oldest % order.heads.len() as u64) as usize];
        order.oldest += 1;
        order.batch = (ahead > 0).then_some((id, len));
        let all = self.in_flight[usize::from(oldest)].writable;
        Ok(Some(if ahead > 0 { (oldest.into(), all) } else { (id, len) }))
    }

    /// Hints that no interrupts are wanted; one may come all the same.
    pub fn disable_cb(&mut self) {
        if self.broken.is_none() {
            ring!(&mut self.ring, ring => ring.disable_interrupts());
        }
    }

    /// Wants interrupts again. False if buffers were used meanwhile, or the queue is broken: the caller has to look
    /// again.
    pub fn enable_cb(&mut self) -> bool {
        let enabled = self.broken.is_none() && ring!(&mut self.ring, ring => ring.enable_interrupts());
        // What is left of a batch was used, too, though no descriptor says so.
        enabled && self.in_order.as_ref().is_none_or(|order| order.batch.is_none())
    }

    /// Entries.
    pub const fn size(&self) -> u16 {
        // At most 32768, the size that the queue was made with.
        self.in_flight.len() as u16
    }

    /// Buffers in flight.
    pub const fn in_flight(&self) -> usize {
        self.count as usize
    }

    /// Free entries.
    pub const fn free(&self) -> u16 {
        self.shadow.free
    }

    /// Starts over on `virtqueue` (after a reset, or a reconnect to a new device side) and adds again, in their old
    /// order, all buffers that were in flight: no request is lost. The caller kicks.
    ///
    /// Fails, changing nothing, if the ring is unusable, has another size, or lacks indirect descriptors for a buffer that
    /// used them.
    pub fn restart(&mut self, virtqueue: Virtqueue<N>) -> Result<(), QueueError> {
        let QueueConfig { size, indirect, in_order, layout, .. } = virtqueue.config;
        if usize::from(size) != self.in_flight.len() {
            return Err(QueueError::Size { size: size.into(), max: self.in_flight.len() as u16 });
        }
        if !indirect {
            let uses = |buffer: &InFlight<T>| buffer.token.is_some() && buffer.in_table > 0;
            if let Some(head) = self.in_flight.iter().position(uses) {
                return Err(QueueError::IndirectNotNegotiated { head: head as u16 });
            }
        }
        let (ring, notify) = Ring::new(virtqueue)?;
        (self.ring, self.notify, self.any_length) = (ring, notify, matches!(layout, Layout::Legacy(_)));
        self.in_order = in_order.then(|| InOrder::new(size, 0));
        let buffers = self.take_all();
        if !indirect {
            self.shadow.tables = None;
        }
        for (token, readable, writable) in buffers {
            // What fitted an empty ring of this size before fits again.
            if self.add_buf(&readable, &writable, token).is_err() {
                return Err(QueueError::Size { size: size.into(), max: size });
            }
        }
        Ok(())
    }

    /// Takes all tokens out after a reset, in the order in which they were added: their buffers belong to the driver
    /// again.
    pub fn drain(&mut self) -> Vec<T> {
        self.take_all().into_iter().map(|(token, _, _)| token).collect()
    }

    /// Empties the queue: tokens with their readable and writable pieces, oldest first.
    fn take_all(&mut self) -> Vec<(T, Vec<Buffer>, Vec<Buffer>)> {
        let mut all = Vec::new();
        for head in 0..self.in_flight.len() {
            let Some(token) = self.in_flight[head].token.take() else { continue };
            let (mut readable, mut writable) = (Vec::new(), Vec::new());
            let InFlight { entries, sequence, readable: only_read, in_table, .. } = self.in_flight[head];
            let mut sort = |number, piece| if number < only_read { readable.push(piece) } else { writable.push(piece) };
            match &self.shadow.tables {
                Some(tables) if in_table > 0 => {
                    let first = head * tables.entries;
                    (0..in_table).zip(&tables.shadow[first..]).for_each(|(number, &piece)| sort(number, piece));
                }
                _ => {
                    let mut at = head;
                    for number in 0..entries {
                        let Entry { address, len, next } = self.shadow.entries[at];
                        sort(number, Buffer { address, len });
                        at = next as usize;
                    }
                }
            }
            all.push((sequence, (token, readable, writable)));
        }
        all.sort_by_key(|(sequence, _)| *sequence);
        let tables = self.shadow.tables.take();
        let size = self.in_flight.len() as u16;
        self.shadow = Shadow { tables, ..Shadow::new(size, self.in_order.is_some()) };
        if self.in_order.is_some() {
            self.in_order = Some(InOrder::new(size, self.sequence));
        }
        self.count = 0;
        self.broken = None;
        all.into_iter().map(|(_, buffer)| buffer).collect()
    }
}
