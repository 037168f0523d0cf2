//! The device's role, whatever the ring format.

use super::packed::device::Ring as Packed;
use super::split::device::Ring as Split;
use super::split::layout::{Big, Little};
use super::{ByteOrder, Chain, Layout, QueueConfig, QueueError};
use crate::memory::GuestMemory;

/// A running virtqueue in the device's hands.
pub struct Queue<M: GuestMemory> {
    ring: Ring<M>,
    broken: Option<QueueError>,
    /// Chains that this burst may still take.
    budget: u16,
    /// Whether this burst found the queue empty.
    drained: bool,
    /// Whether the driver was asked not to kick.
    quiet: bool,
}

enum Ring<M: GuestMemory> {
    Split(Split<M, Little>),
    SplitBig(Split<M, Big>),
    Packed(Packed<M>),
}

/// Calls the same method of whichever ring it is.
macro_rules! ring {
    ($ring:expr, $name:ident => $call:expr) => {
        match $ring {
            Ring::Split($name) => $call,
            Ring::SplitBig($name) => $call,
            Ring::Packed($name) => $call,
        }
    };
}

impl<M: GuestMemory> Queue<M> {
    /// Resolves the ring areas of `config` and takes the queue into use, from index 0.
    pub fn new(memory: M, config: QueueConfig) -> Result<Self, QueueError> {
        let ring = match config.layout {
            Layout::Modern | Layout::Legacy(ByteOrder::Little) => Ring::Split(Split::new(memory, &config)?),
            Layout::Legacy(ByteOrder::Big) => Ring::SplitBig(Split::new(memory, &config)?),
            Layout::Packed => Ring::Packed(Packed::new(memory, &config)?),
        };
        Ok(Self { ring, broken: None, budget: config.size, drained: false, quiet: false })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        ring!(&self.ring, ring => ring.size())
    }

    /// Takes the next available chain; none if there is none, or this burst's budget is used up. An error latches the
    /// queue and is returned again by every later call.
    #[inline(always)]
    pub fn pop(&mut self) -> Result<Option<Chain<M::Lease>>, QueueError> {
        if let Some(reason) = self.broken {
            return Err(reason);
        }
        if self.budget == 0 {
            return Ok(None);
        }
        if !self.quiet {
            self.quiet = true;
            ring!(&mut self.ring, ring => ring.disable_kicks());
        }
        match ring!(&mut self.ring, ring => ring.pop()) {
            Ok(Some(chain)) => {
                self.budget -= 1;
                Ok(Some(chain))
            }
            Ok(None) => {
                self.drained = true;
                Ok(None)
            }
            Err(reason) => {
                self.fail(reason);
                Err(reason)
            }
        }
    }

    /// Gives a chain back with [`Chain::written`] bytes written.
    ///
    /// A chain that does not belong to this run of the queue is refused ([`QueueError::Stale`]) and dropped.
    #[inline(always)]
    pub fn complete(&mut self, chain: Chain<M::Lease>) -> Result<(), QueueError> {
        if let Some(reason) = self.broken {
            return Err(reason);
        }
        ring!(&mut self.ring, ring => ring.complete(chain))
    }

    /// Whether the driver wants to be interrupted for what was completed since the last call.
    #[inline(always)]
    pub fn needs_interrupt(&mut self) -> bool {
        self.broken.is_none() && ring!(&mut self.ring, ring => ring.needs_interrupt())
    }

    /// Starts serving: allows [`Queue::pop`] to take at most as many chains as the queue is long. From the first of them
    /// on the driver is asked not to kick.
    pub fn begin_burst(&mut self) {
        self.budget = self.size();
        self.drained = false;
    }

    /// Ends serving: asks for kicks again. True if there is more to serve right now, because the budget is used up
    /// (kicks stay off) or because chains came after [`Queue::pop`] had found none. Chains that the device left although
    /// it could have taken them do not count: it has its reasons, and knows when to look again.
    pub fn end_burst(&mut self) -> bool {
        if self.broken.is_some() || !self.quiet {
            return false;
        }
        if self.budget == 0 {
            return true;
        }
        self.quiet = false;
        match ring!(&mut self.ring, ring => ring.enable_kicks()) {
            Ok(available) => available && self.drained,
            Err(reason) => {
                self.fail(reason);
                false
            }
        }
    }

    /// Latches the queue with `reason`; the first reason stays.
    pub fn fail(&mut self, reason: QueueError) {
        self.broken = self.broken.or(Some(reason));
    }

    /// Why the queue is latched; none while it works.
    pub const fn broken(&self) -> Option<QueueError> {
        self.broken
    }
}
