//! Who has to know what becomes of a queue's chains, as it happens.

use alloc::boxed::Box;

use super::Chain;
use super::order::Waiting;
use super::packed::layout::Position;

/// A chain that a device takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// What the ring knows it by: the index of its first descriptor (split), its buffer id (packed).
    pub head: u16,
    /// (Packed) where its first descriptor is.
    pub start: Position,
    /// How many entries of the ring it takes: on a packed ring, its descriptors from `start` on.
    pub entries: u16,
}

/// Sees what a device takes from a queue and gives back, in time to write it down: whoever reads that after this process died
/// knows what was in flight. Of a chain that breaks the queue, or is pending, it hears nothing.
pub trait Observer: Send {
    /// The device takes `chain`, and does not have it yet. One that was put back, or was in flight when the queue was
    /// restored, is taken again.
    fn taken(&mut self, chain: Taken);

    /// The chain known as `head` is about to be used: the driver does not see it yet.
    fn using(&mut self, head: u16);

    /// That chain is used: the driver can see it.
    fn used(&mut self, head: u16);
}

/// What few queues have besides a ring: looked for once for each chain that is taken, and once for each that is given back.
pub(super) struct Extra<L> {
    /// If chains have to be used in the order in which they were taken: those that cannot be yet.
    pub(super) waiting: Option<Waiting<L>>,
    pub(super) observer: Option<Box<dyn Observer>>,
}

impl<L> Extra<L> {
    /// A chain was taken.
    pub(super) fn taken(&mut self, chain: &mut Chain<L>) {
        if let Some(waiting) = &mut self.waiting {
            waiting.number(chain);
        }
        if let Some(observer) = &mut self.observer {
            let parts = &chain.0;
            observer.taken(Taken { head: parts.head, start: parts.start, entries: parts.entries });
        }
    }

    /// A chain was put back.
    pub(super) fn put_back(&mut self) {
        if let Some(waiting) = &mut self.waiting {
            waiting.forget_newest();
        }
    }

    /// Uses chains, in their order if that counts, by `complete`. A chain that is finished may have to wait for others.
    pub(super) fn complete(
        &mut self,
        chain: Chain<L>,
        mut complete: impl FnMut(Chain<L>) -> Result<(), u16>,
    ) -> Result<(), u16> {
        let Self { waiting, observer } = self;
        let mut complete = |chain: Chain<L>| {
            let head = chain.0.head;
            if let Some(observer) = observer {
                observer.using(head);
            }
            complete(chain)?;
            if let Some(observer) = observer {
                observer.used(head);
            }
            Ok(())
        };
        let Some(waiting) = waiting else { return complete(chain) };
        waiting.keep(chain);
        while let Some(next) = waiting.next() {
            complete(next)?;
        }
        Ok(())
    }
}
