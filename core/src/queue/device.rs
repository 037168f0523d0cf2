//! The device's role, whatever the ring format.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::ControlFlow;

use super::observer::{Extra, Observer};
use super::order::Waiting;
use super::packed::device::Ring as Packed;
use super::split::device::Ring as Split;
use super::split::layout::{Big, Little};
use super::{Blocked, ByteOrder, Chain, Layout, PopError, QueueConfig, QueueError, QueueState, SavedQueue};
use crate::memory::{GuestMemory, Pending};

/// The most chains that a burst takes: enough for what surrounds a burst not to count.
pub const BURST: u16 = 1024;

/// A running virtqueue in the device's hands.
pub struct Queue<M: GuestMemory> {
    ring: Ring<M>,
    /// How many chains [`Queue::pop`] may take before it has to think: part of the burst's budget, and 0 as long as the
    /// driver was not asked to be quiet, or the queue is broken.
    ready: u16,
    /// Chains that this burst may still take besides.
    budget: u16,
    /// The most that a burst may take.
    burst: u16,
    /// Whether this burst found the queue empty.
    drained: bool,
    /// Whether the driver was asked not to kick.
    quiet: bool,
    /// Whether nothing is taken any more.
    held: bool,
    /// Heads of chains that were taken before the queue was restored, that could not be taken yet, or that were put back:
    /// they are taken again first, the last one here before all others.
    again: Vec<u16>,
    extra: Option<Box<Extra<M::Lease>>>,
}

/// Its tag is a byte of its own, which is faster to tell apart than what hides in a field.
#[repr(u8)]
enum Ring<M: GuestMemory> {
    Packed(Packed<M>),
    Split(Split<M, Little>),
    SplitBig(Split<M, Big>),
}

/// Calls the same method of whichever ring it is.
macro_rules! ring {
    ($ring:expr, $name:ident => $call:expr) => {
        match $ring {
            Ring::Packed($name) => $call,
            Ring::Split($name) => $call,
            Ring::SplitBig($name) => rarely(|| $call),
        }
    };
}

/// Keeps what `work` does out of the way of what is done often.
#[cold]
#[inline(never)]
fn rarely<T>(work: impl FnOnce() -> T) -> T {
    work()
}

impl<M: GuestMemory> Queue<M> {
    /// Resolves the ring areas of `config` and takes the queue into use, from index 0. If they are [pending](Blocked::Pending),
    /// it has to be tried again once they are there.
    pub fn new(memory: M, config: QueueConfig) -> Result<Self, Blocked> {
        let ring = match config.layout {
            Layout::Modern | Layout::Legacy(ByteOrder::Little) => Ring::Split(Split::new(memory, &config)?),
            Layout::Legacy(ByteOrder::Big) => Ring::SplitBig(Split::new(memory, &config)?),
            Layout::Packed => Ring::Packed(Packed::new(memory, &config)?),
        };
        let waiting = config.in_order.then(|| Waiting::new(config.size));
        let extra = waiting.map(|waiting| Box::new(Extra { waiting: Some(waiting), observer: None }));
        let (burst, again) = (config.size.min(BURST), Vec::new());
        Ok(Self { ring, ready: 0, budget: burst, burst, drained: false, quiet: false, held: false, again, extra })
    }

    /// As [`Queue::new`], going on where `state` says that the device was. A state that this ring cannot be in is refused.
    pub fn resume(memory: M, config: QueueConfig, state: QueueState) -> Result<Self, Blocked> {
        let mut queue = Self::new(memory, config)?;
        ring!(&mut queue.ring, ring => ring.resume(state))?;
        Ok(queue)
    }

    /// What [`Queue::restore`] goes on from. Ask for the [interrupt](Self::needs_interrupt) that is due before.
    ///
    /// On a packed ring a chain that is used overwrites the oldest one in flight, so if another is older still this is
    /// [`QueueError::Overwritten`]: [hold](Self::hold) the queue and finish first.
    pub fn save(&self) -> Result<SavedQueue, QueueError> {
        if self.extra.as_ref().is_some_and(|extra| extra.waiting.is_some()) {
            // The ring itself tells the order: go back to the oldest that is not used.
            let used = self.state().used;
            return Ok(SavedQueue { state: QueueState { available: used, used }, in_flight: Vec::new() });
        }
        let mut saved = ring!(&self.ring, ring => ring.save())?;
        // Those that wait to be taken again are in flight, but their order counts.
        let mut again = self.again.clone();
        again.sort_unstable();
        saved.in_flight.retain(|head| again.binary_search(head).is_err());
        saved.in_flight.extend(self.again.iter().rev());
        Ok(saved)
    }

    /// As [`Queue::new`], going on where [`Queue::save`] left: what was in flight is popped again, before anything else.
    /// Whatever `saved` says is checked: it may come from anywhere.
    pub fn restore(memory: M, config: QueueConfig, saved: &SavedQueue) -> Result<Self, Blocked> {
        let mut queue = Self::resume(memory, config, saved.state)?;
        ring!(&mut queue.ring, ring => ring.restore(saved))?;
        queue.again = saved.in_flight.iter().rev().copied().collect();
        Ok(queue)
    }

    /// From now on `observer` sees what is taken and given back. For a queue that has taken nothing yet: of what is in flight
    /// already it has to know itself.
    pub fn observe(&mut self, observer: Box<dyn Observer>) {
        let extra = self.extra.get_or_insert_with(|| Box::new(Extra { waiting: None, observer: None }));
        extra.observer = Some(observer);
    }

    /// Where the device is: complete once no chain is [in flight](Self::in_flight).
    pub fn state(&self) -> QueueState {
        let mut state = ring!(&self.ring, ring => ring.state());
        // What is to be taken again was taken last. On packed rings there is nothing like that.
        state.available = state.available.wrapping_sub(self.again.len() as u16);
        state
    }

    /// Whether the device has no chain but those that it has yet to take again.
    pub fn is_idle(&self) -> bool {
        ring!(&self.ring, ring => ring.taken()) == self.again.len()
    }

    /// How many chains the device has, without those that it has yet to take again. Counted by looking through all
    /// identities: not for the hot path.
    pub fn in_flight(&self) -> usize {
        ring!(&self.ring, ring => ring.in_flight()) - self.again.len()
    }

    /// From now on [`Queue::pop`] finds nothing, so that what is in flight can be finished; until
    /// [`release`](Self::release).
    pub fn hold(&mut self) {
        (self.held, self.ready, self.budget) = (true, 0, 0);
        if core::mem::take(&mut self.quiet) && self.broken().is_none() {
            // Whoever goes on with the ring looks at it first; an error breaks it, which tells itself.
            let _ = ring!(&mut self.ring, ring => ring.enable_kicks());
        }
    }

    /// Ends [`Queue::hold`].
    pub fn release(&mut self) {
        self.held = false;
    }

    /// Whether nothing is taken any more, so that what is in flight is to be finished soon.
    pub const fn is_held(&self) -> bool {
        self.held
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        ring!(&self.ring, ring => ring.size())
    }

    /// Takes the next available chain, or says why there is none. A fault [breaks](PopError::Broken) the queue, and every
    /// later call says so again; a chain that is [pending](PopError::Pending) is looked at again by the next call.
    #[inline(always)]
    pub fn pop(&mut self) -> Result<Chain<M::Lease>, PopError> {
        if self.ready == 0
            && let ControlFlow::Break(chain) = self.look()
        {
            return chain;
        }
        match ring!(&mut self.ring, ring => ring.pop()) {
            Ok(chain) => {
                self.ready -= 1;
                Ok(if self.extra.is_some() { self.tell_taken(chain) } else { chain })
            }
            Err(_) => Err(self.stopped()),
        }
    }

    /// Hands the chain through, so that it stays in a register where there is nobody to tell.
    #[cold]
    #[inline(never)]
    fn tell_taken(&mut self, mut chain: Chain<M::Lease>) -> Chain<M::Lease> {
        if let Some(extra) = &mut self.extra {
            extra.taken(&mut chain);
        }
        chain
    }

    /// There was no chain after all, or it cannot be taken now, or it broke the queue.
    #[cold]
    #[inline(never)]
    fn stopped(&mut self) -> PopError {
        self.budget += core::mem::take(&mut self.ready);
        let why = ring!(&self.ring, ring => ring.stopped());
        match why {
            PopError::Spent | PopError::Pending(_) => self.again.extend(ring!(&self.ring, ring => ring.left())),
            PopError::Empty | PopError::Broken(_) => self.drained = true,
        }
        why
    }

    /// Something kept the next chain from being taken: if that is no fault, and this burst goes on, it is looked at anew.
    #[cold]
    #[inline(never)]
    fn look_again(&mut self) -> Option<QueueError> {
        if self.budget > 0 {
            ring!(&mut self.ring, ring => ring.look_again());
        }
        self.broken()
    }

    /// Whether there may be a chain to take, or what there is instead.
    #[inline(never)]
    fn look(&mut self) -> ControlFlow<Result<Chain<M::Lease>, PopError>> {
        if ring!(&self.ring, ring => ring.is_blocked())
            && let Some(reason) = self.look_again()
        {
            return ControlFlow::Break(Err(PopError::Broken(reason)));
        }
        if self.budget == 0 {
            return ControlFlow::Break(Err(PopError::Spent));
        }
        if !self.quiet {
            self.quiet = true;
            ring!(&mut self.ring, ring => ring.disable_kicks());
        }
        if let Some(head) = self.again.pop() {
            let chain = ring!(&mut self.ring, ring => ring.take_again(head));
            let chain = match chain {
                Ok(chain) => chain,
                Err(_) => return ControlFlow::Break(Err(self.stopped())),
            };
            self.budget -= 1;
            return ControlFlow::Break(Ok(self.tell_taken(chain)));
        }
        let Ok(available) = ring!(&mut self.ring, ring => ring.available()) else {
            return ControlFlow::Break(Err(self.stopped()));
        };
        self.ready = available.min(self.budget);
        self.budget -= self.ready;
        self.drained |= self.ready == 0;
        if self.ready == 0 { ControlFlow::Break(Err(PopError::Empty)) } else { ControlFlow::Continue(()) }
    }

    /// Gives a chain back with [`Chain::written`] bytes written. If buffers have to be used in order (VIRTIO_F_IN_ORDER), it
    /// is used once all are that were taken before.
    ///
    /// A chain that does not belong to this run of the queue is refused ([`QueueError::Stale`]) and dropped.
    #[inline(always)]
    pub fn complete(&mut self, chain: Chain<M::Lease>) -> Result<(), QueueError> {
        if self.extra.is_some() {
            return self.complete_with_extra(chain);
        }
        // A broken queue takes no chain back either.
        ring!(&mut self.ring, ring => ring.complete(chain))
            .map_err(|head| self.broken().unwrap_or(QueueError::Stale { head }))
    }

    #[cold]
    #[inline(never)]
    fn complete_with_extra(&mut self, chain: Chain<M::Lease>) -> Result<(), QueueError> {
        let stale = QueueError::Stale { head: chain.head() };
        let Some(extra) = &mut self.extra else { return Err(stale) };
        if !ring!(&self.ring, ring => ring.owns(&chain)) {
            return Err(self.broken().unwrap_or(stale));
        }
        let done = extra.complete(chain, |chain| ring!(&mut self.ring, ring => ring.complete(chain)));
        done.map_err(|head| QueueError::Stale { head })
    }

    /// Puts the newest chain back, as if it had not been taken: [`Queue::pop`] finds it again, before any other. For a
    /// device that cannot go on with it now, and keeps nothing of the driver's meanwhile.
    ///
    /// The newest is what was taken last, with none completed that was taken after it; another leads whoever goes on with
    /// the queue elsewhere to the wrong place. A chain that does not belong to this run of the queue is refused
    /// ([`QueueError::Stale`]) and dropped.
    pub fn put_back(&mut self, chain: Chain<M::Lease>) -> Result<(), QueueError> {
        let head = chain.head();
        let again = ring!(&mut self.ring, ring => ring.put_back(chain))
            .map_err(|()| self.broken().unwrap_or(QueueError::Stale { head }))?;
        // It comes before what was found available.
        self.budget += core::mem::take(&mut self.ready);
        self.again.extend(again);
        if let Some(extra) = &mut self.extra {
            extra.put_back();
        }
        Ok(())
    }

    /// Whether the driver wants to be interrupted for what was completed since the last call.
    #[inline(always)]
    pub fn needs_interrupt(&mut self) -> bool {
        self.broken().is_none() && ring!(&mut self.ring, ring => ring.needs_interrupt())
    }

    /// Starts serving: allows [`Queue::pop`] to take at most as many chains as the queue is long, and no more than [`BURST`].
    /// From the first of them on the driver is asked not to kick.
    ///
    /// Chains of many descriptors, in tables or in many pieces of host memory, end the burst sooner: however long a queue
    /// and its chains are, a burst is over in a few milliseconds.
    pub fn begin_burst(&mut self) {
        ring!(&mut self.ring, ring => ring.begin_burst());
        self.ready = 0;
        self.budget = if self.held { 0 } else { self.burst };
        self.drained = false;
    }

    /// Whether this burst has taken or looked at all that a burst may.
    pub fn is_spent(&self) -> bool {
        !self.held && (self.ready + self.budget == 0 || ring!(&self.ring, ring => ring.is_exhausted()))
    }

    /// Ends serving: asks for kicks again. True if there is more to serve right now, because the budget is used up
    /// (kicks stay off) or because chains came after [`Queue::pop`] had found none. Chains that the device left although
    /// it could have taken them do not count: it has its reasons, and knows when to look again.
    pub fn end_burst(&mut self) -> bool {
        if self.broken().is_some() || !self.quiet {
            return false;
        }
        if self.is_spent() {
            return true;
        }
        self.ready = 0;
        self.quiet = false;
        ring!(&mut self.ring, ring => ring.enable_kicks()).is_ok_and(|available| available && self.drained)
    }

    /// Breaks the queue for `reason`; the first reason stays.
    pub fn fail(&mut self, reason: QueueError) {
        self.ready = 0;
        ring!(&mut self.ring, ring => ring.fail(reason));
    }

    /// What the next chain waits for: it is neither taken nor given up. None if it was not pending when [`Queue::pop`] looked
    /// last.
    pub fn pending(&self) -> Option<Pending> {
        ring!(&self.ring, ring => ring.pending())
    }

    /// Why the queue is broken; none while it works.
    pub fn broken(&self) -> Option<QueueError> {
        ring!(&self.ring, ring => ring.broken())
    }
}
