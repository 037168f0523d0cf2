//! What a device does with chains that are finished too early, if they have to be used in order (VIRTIO_F_IN_ORDER, 2.7.9).

use alloc::boxed::Box;

use super::Chain;

/// The order in which chains were taken, and those that wait for an older one. Its memory is that of one slot for each
/// entry of the queue.
pub(super) struct Waiting<L> {
    /// By number, modulo their count.
    slots: Box<[Option<Chain<L>>]>,
    /// How many chains were taken.
    taken: u64,
    /// How many were used: the number of the next that may be.
    used: u64,
}

impl<L> Waiting<L> {
    /// For a queue of `size`.
    pub(super) fn new(size: u16) -> Self {
        Self { slots: (0..size.max(1)).map(|_| None).collect(), taken: 0, used: 0 }
    }

    /// Numbers a chain that was just taken.
    pub(super) fn number(&mut self, chain: &mut Chain<L>) {
        chain.0.number = self.taken;
        self.taken += 1;
    }

    /// The chain that was numbered last was not taken after all.
    pub(super) fn forget_newest(&mut self) {
        self.taken -= 1;
    }

    /// Keeps a chain that is finished. It is of this run, so its slot is free: no more are in flight than there are slots.
    pub(super) fn keep(&mut self, chain: Chain<L>) {
        let slot = self.slot(chain.0.number);
        self.slots[slot] = Some(chain);
    }

    /// The next chain that may be used, if it is finished.
    pub(super) fn next(&mut self) -> Option<Chain<L>> {
        let slot = self.slot(self.used);
        let chain = self.slots[slot].take()?;
        self.used += 1;
        Some(chain)
    }

    fn slot(&self, number: u64) -> usize {
        (number % self.slots.len() as u64) as usize
    }
}
