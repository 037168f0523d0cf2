//! The driver's role, whatever the ring format: the paper's five operations (section 3.1).

use alloc::boxed::Box;

use super::QueueError;
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

/// Why [`DriverQueue::add_buf`] did not add; the token comes back.
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
    tokens: alloc::vec::Vec<Option<T>>,
    notify: N,
}

#[allow(unused_variables, clippy::todo)]
impl<T> DriverQueue<T> {
    /// Takes `virtqueue` into use, empty.
    pub fn new(virtqueue: Virtqueue) -> Result<Self, QueueError> {
        todo!()
    }
}

#[allow(unused_variables, clippy::todo)]
impl<T, N: Notify> DriverQueue<T, N> {
    /// Allows indirect descriptors: `tables`, shared at `address`, holds one table for each entry of the queue.
    /// Chains of several pieces that fit a table take one entry of the queue then.
    #[must_use]
    pub fn with_indirect(self, tables: Pages, address: u64) -> Self {
        todo!()
    }

    /// Adds a buffer: `readable` pieces, then `writable` ones. It is published by [`DriverQueue::kick`].
    ///
    /// If the queue is full, kicks even if the device asked for no kicks, and says so.
    pub fn add_buf(&mut self, readable: &[Buffer], writable: &[Buffer], token: T) -> Result<(), AddError<T>> {
        todo!()
    }

    /// Publishes what was added, and notifies the device unless it asked not to. True if it was notified.
    pub fn kick(&mut self) -> Result<bool, TransportError> {
        todo!()
    }

    /// Takes back a used buffer: its token and how many bytes the device wrote. Out of order is normal.
    pub fn get_buf(&mut self) -> Result<Option<(T, u32)>, QueueError> {
        todo!()
    }

    /// Hints that no interrupts are wanted; one may come all the same.
    pub fn disable_cb(&mut self) {
        todo!()
    }

    /// Wants interrupts again. False if buffers were used meanwhile: the caller has to look again.
    pub fn enable_cb(&mut self) -> bool {
        todo!()
    }

    /// Buffers in flight.
    pub fn in_flight(&self) -> usize {
        todo!()
    }

    /// Free entries.
    pub fn free(&self) -> u16 {
        todo!()
    }

    /// Starts over on `virtqueue` (after a reset, or a reconnect to a new device side) and adds again, in their old
    /// order, all buffers that were in flight: no request is lost. The caller kicks.
    pub fn restart(&mut self, virtqueue: Virtqueue) -> Result<(), QueueError> {
        todo!()
    }

    /// Takes all tokens out after a reset: their buffers belong to the driver again.
    pub fn drain(&mut self) -> alloc::vec::Vec<T> {
        todo!()
    }
}
