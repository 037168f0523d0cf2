//! The device's role, whatever the ring format.

use super::{Chain, QueueConfig, QueueError};
use crate::memory::GuestMemory;

/// A running virtqueue in the device's hands.
pub struct Queue<M: GuestMemory> {
    memory: M,
}

#[allow(unused_variables, clippy::todo)]
impl<M: GuestMemory> Queue<M> {
    /// Resolves the ring areas of `config` and takes the queue into use, from index 0.
    pub fn new(memory: M, config: QueueConfig) -> Result<Self, QueueError> {
        todo!()
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        todo!()
    }

    /// Takes the next available chain; none if there is none, or this burst's budget is used up. An error latches the
    /// queue and is returned again by every later call.
    pub fn pop(&mut self) -> Result<Option<Chain<M::Lease>>, QueueError> {
        todo!()
    }

    /// Gives a chain back with [`Chain::written`] bytes written.
    pub fn complete(&mut self, chain: Chain<M::Lease>) -> Result<(), QueueError> {
        todo!()
    }

    /// Whether the driver wants to be interrupted for what was completed since the last call.
    pub fn needs_interrupt(&mut self) -> bool {
        todo!()
    }

    /// Starts serving: asks the driver not to kick, and allows [`Queue::pop`] to take at most as many chains as the
    /// queue is long.
    pub fn begin_burst(&mut self) {
        todo!()
    }

    /// Ends serving: asks for kicks again. True if there is more to serve right now, because the budget is used up
    /// (kicks stay off) or because chains came after [`Queue::pop`] had found none.
    pub fn end_burst(&mut self) -> bool {
        todo!()
    }

    /// Latches the queue with `reason`.
    pub fn fail(&mut self, reason: QueueError) {
        todo!()
    }

    /// Why the queue is latched; none while it works.
    pub fn broken(&self) -> Option<QueueError> {
        todo!()
    }
}
