//! The driver's role on a queue, as cases see it: the paper's five operations.

use polyvirt_core::memory::Pages;
use polyvirt_core::queue::{AddError, Buffer, DriverQueue, QueueError};
use polyvirt_core::transport::{TransportError, Virtqueue};

/// A driver's queue, which a case watches and lies to.
pub trait DriverRole: Send {
    /// Adds a buffer.
    fn add(&mut self, readable: &[Buffer], writable: &[Buffer], token: u32) -> Result<(), AddError<u32>>;
    /// Publishes what was added, and kicks if the device wants that.
    fn kick(&mut self) -> Result<bool, TransportError>;
    /// Takes back a used buffer.
    fn get(&mut self) -> Result<Option<(u32, u32)>, QueueError>;
    /// Hints that no interrupts are wanted.
    fn disable(&mut self);
    /// Wants interrupts again.
    fn enable(&mut self) -> bool;
    /// Allows indirect descriptors, with `tables` shared at `address`.
    fn allow_indirect(self: Box<Self>, tables: Pages, address: u64) -> Box<dyn DriverRole>;
    /// Buffers in flight.
    fn in_flight(&self) -> usize;
    /// Free entries.
    fn free(&self) -> u16;
    /// Takes all buffers back, after a reset.
    fn drain(&mut self) -> Vec<u32>;
}

/// Makes a driver's queue of what a transport set up.
pub type MakeRole = fn(Virtqueue) -> Result<Box<dyn DriverRole>, QueueError>;

/// Our own.
pub(super) fn honest(virtqueue: Virtqueue) -> Result<Box<dyn DriverRole>, QueueError> {
    Ok(Box::new(DriverQueue::new(virtqueue)?))
}

impl DriverRole for DriverQueue<u32> {
    fn add(&mut self, readable: &[Buffer], writable: &[Buffer], token: u32) -> Result<(), AddError<u32>> {
        self.add_buf(readable, writable, token)
    }

    fn kick(&mut self) -> Result<bool, TransportError> {
        DriverQueue::kick(self)
    }

    fn get(&mut self) -> Result<Option<(u32, u32)>, QueueError> {
        self.get_buf()
    }

    fn disable(&mut self) {
        self.disable_cb();
    }

    fn enable(&mut self) -> bool {
        self.enable_cb()
    }

    fn allow_indirect(self: Box<Self>, tables: Pages, address: u64) -> Box<dyn DriverRole> {
        Box::new(self.with_indirect(tables, address))
    }

    fn in_flight(&self) -> usize {
        DriverQueue::in_flight(self)
    }

    fn free(&self) -> u16 {
        DriverQueue::free(self)
    }

    fn drain(&mut self) -> Vec<u32> {
        DriverQueue::drain(self)
    }
}
