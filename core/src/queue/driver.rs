//! The driver's role, whatever the ring format: the paper's five operations (section 3.1).

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::mem;

use super::packed::driver::Ring as Packed;
use super::split::driver::Ring as Split;
use super::split::layout::{Big, Little};
use super::{ByteOrder, Layout, QueueError};
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
    /// The queue is latched.
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
    /// By head or buffer id.
    in_flight: Box<[InFlight<T>]>,
    count: usize,
    /// Counts what was added, to keep the order across a restart.
    sequence: u64,
    broken: Option<QueueError>,
    indirect: Option<Tables>,
    notify: N,
}

/// A buffer in the device's hands, and what it takes to add it again.
struct InFlight<T> {
    token: Option<T>,
    sequence: u64,
    writable: u32,
    readable_pieces: usize,
    /// Readable pieces, then writable ones. Its memory is kept for the next buffer.
    pieces: Vec<Buffer>,
}

impl<T> InFlight<T> {
    const fn empty() -> Self {
        Self { token: None, sequence: 0, writable: 0, readable_pieces: 0, pieces: Vec::new() }
    }
}

/// Memory for indirect tables, one for each entry of the queue.
pub(super) struct Tables {
    pages: Pages,
    address: u64,
    /// Entries of each table.
    entries: usize,
}

impl Tables {
    /// The memory and device-visible address of table `index`.
    pub(super) fn table(&self, index: u16) -> (&Pages, usize, u64) {
        let offset = usize::from(index) * self.entries * 16;
        (&self.pages, offset, self.address + offset as u64)
    }
}

pub(super) enum Ring {
    Split(Split<Little>),
    SplitBig(Split<Big>),
    Packed(Packed),
}

macro_rules! ring {
    ($ring:expr, $name:ident => $call:expr) => {
        match $ring {
            Ring::Split($name) => $call,
            Ring::SplitBig($name) => $call,
            Ring::Packed($name) => $call,
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
        let size = virtqueue.config.size;
        let (ring, notify) = Ring::new(virtqueue)?;
        Ok(Self {
            ring,
            in_flight: (0..size).map(|_| InFlight::empty()).collect(),
            count: 0,
            sequence: 0,
            broken: None,
            indirect: None,
            notify,
        })
    }

    /// Allows indirect descriptors, if they were negotiated: `tables`, shared at `address` for reading, is divided
    /// evenly among the entries of the queue. Buffers of several pieces that fit a table take one entry then.
    #[must_use]
    pub fn with_indirect(mut self, tables: Pages, address: u64) -> Self {
        let entries = tables.len() / 16 / self.in_flight.len();
        if entries > 1 && ring!(&self.ring, ring => ring.is_indirect()) {
            self.indirect = Some(Tables { pages: tables, address, entries });
        }
        self
    }

    /// Adds a buffer: `readable` pieces, then `writable` ones. It is published by [`DriverQueue::kick`].
    ///
    /// If the queue is full, publishes what was added before, kicks even if the device asked for no kicks, and says so.
    #[inline]
    pub fn add_buf(&mut self, readable: &[Buffer], writable: &[Buffer], token: T) -> Result<(), AddError<T>> {
        if let Some(reason) = self.broken {
            return Err(AddError::Broken(reason));
        }
        let (pieces, size) = (readable.len() + writable.len(), self.in_flight.len());
        let tables = self.indirect.as_ref().filter(|tables| pieces > 1 && pieces <= tables.entries);
        if pieces == 0 || pieces > size {
            return Err(AddError::Pieces { token, pieces, size: size as u16 });
        }
        let Some(head) = ring!(&mut self.ring, ring => ring.add(readable, writable, tables)) else {
            ring!(&mut self.ring, ring => ring.publish());
            return Err(self.notify.notify().map_or_else(AddError::Notify, |()| AddError::Full(token)));
        };
        let entry = &mut self.in_flight[usize::from(head)];
        entry.token = Some(token);
        entry.sequence = self.sequence;
        entry.writable = writable.iter().fold(0, |sum, piece| piece.len.saturating_add(sum));
        entry.readable_pieces = readable.len();
        entry.pieces.clear();
        entry.pieces.extend_from_slice(readable);
        entry.pieces.extend_from_slice(writable);
        self.sequence += 1;
        self.count += 1;
        Ok(())
    }

    /// Publishes what was added, and notifies the device unless it asked not to. True if it was notified.
    #[inline]
    pub fn kick(&mut self) -> Result<bool, TransportError> {
        let wanted = ring!(&mut self.ring, ring => ring.publish());
        if wanted {
            self.notify.notify()?;
        }
        Ok(wanted)
    }

    /// Takes back a used buffer: its token and how many bytes the device wrote. Out of order is normal. An error latches
    /// the queue.
    #[inline]
    pub fn get_buf(&mut self) -> Result<Option<(T, u32)>, QueueError> {
        if let Some(reason) = self.broken {
            return Err(reason);
        }
        let Some((id, len)) = ring!(&mut self.ring, ring => ring.used()) else { return Ok(None) };
        let used = match self.in_flight.get_mut(id as usize) {
            Some(entry) if len > entry.writable && entry.token.is_some() => {
                Err(QueueError::UsedLength { len, writable: entry.writable })
            }
            Some(entry) => entry.token.take().ok_or(QueueError::UsedId { id }),
            None => Err(QueueError::UsedId { id }),
        };
        match used {
            Ok(token) => {
                // The id is an index of `in_flight`, so it fits.
                ring!(&mut self.ring, ring => ring.release(id as u16));
                self.count -= 1;
                Ok(Some((token, len)))
            }
            Err(reason) => {
                self.broken = Some(reason);
                Err(reason)
            }
        }
    }

    /// Hints that no interrupts are wanted; one may come all the same.
    pub fn disable_cb(&mut self) {
        ring!(&mut self.ring, ring => ring.disable_interrupts());
    }

    /// Wants interrupts again. False if buffers were used meanwhile: the caller has to look again.
    pub fn enable_cb(&mut self) -> bool {
        ring!(&mut self.ring, ring => ring.enable_interrupts())
    }

    /// Buffers in flight.
    pub const fn in_flight(&self) -> usize {
        self.count
    }

    /// Free entries.
    pub fn free(&self) -> u16 {
        ring!(&self.ring, ring => ring.free())
    }

    /// Starts over on `virtqueue` (after a reset, or a reconnect to a new device side) and adds again, in their old
    /// order, all buffers that were in flight: no request is lost. The caller kicks.
    ///
    /// Fails, changing nothing, if the ring is unusable or has another size.
    pub fn restart(&mut self, virtqueue: Virtqueue<N>) -> Result<(), QueueError> {
        let size = virtqueue.config.size;
        if usize::from(size) != self.in_flight.len() {
            return Err(QueueError::Size { size: size.into(), max: self.in_flight.len() as u16 });
        }
        let (ring, notify) = Ring::new(virtqueue)?;
        self.ring = ring;
        self.notify = notify;
        for old in self.take_all() {
            let InFlight { token: Some(token), readable_pieces, pieces, .. } = old else { continue };
            let (readable, writable) = pieces.split_at(readable_pieces);
            // What fitted an empty ring of this size before fits again.
            if self.add_buf(readable, writable, token).is_err() {
                return Err(QueueError::Size { size: size.into(), max: size });
            }
        }
        Ok(())
    }

    /// Takes all tokens out after a reset, in the order in which they were added: their buffers belong to the driver
    /// again.
    pub fn drain(&mut self) -> Vec<T> {
        self.take_all().into_iter().filter_map(|entry| entry.token).collect()
    }

    fn take_all(&mut self) -> Vec<InFlight<T>> {
        let all = self.in_flight.iter_mut().filter(|entry| entry.token.is_some());
        let mut all: Vec<_> = all.map(|entry| mem::replace(entry, InFlight::empty())).collect();
        all.sort_by_key(|entry| entry.sequence);
        self.count = 0;
        self.broken = None;
        all
    }
}
