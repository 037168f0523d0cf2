//! Rings that no driver should write: what our device role says of each, and what rust-vmm's does.
//!
//! rust-vmm's queue hands out chains without having walked them, and ends a chain where it cannot go on: a device that
//! does not compare what it got with what the request needs takes half a chain for a whole one. Ours walks a chain when it
//! takes it, and latches the queue with a reason.

use std::mem::discriminant;

use polyvirt_core::memory::MemoryError;
use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, WRITE};
use polyvirt_core::queue::{INDIRECT_MAX, PopError, QueueError};
use proptest::prelude::*;
use proptest::sample::Index;
use virtio_queue::QueueT;

use crate::ring::{BUFFERS, Descriptor, END, Ring, TABLES, Theirs};

const SIZE: u16 = 16;

/// What rust-vmm's queue makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// No chain, now or later.
    Refused,
    /// A chain that ends before its last descriptor.
    CutShort,
    /// A whole chain, as if nothing were wrong.
    Whole,
}

impl Seen {
    fn of(chain: Option<&Theirs>) -> Self {
        match chain.map(|chain| chain.descriptors.last()) {
            None => Self::Refused,
            Some(Some(last)) if !last.has(NEXT) => Self::Whole,
            Some(_) => Self::CutShort,
        }
    }
}

/// One thing that is wrong with a ring that is right otherwise.
struct Defect {
    name: &'static str,
    /// Breaks `chain`, the descriptors that were written; of the `which`-th, where that matters.
    make: fn(&mut Ring, &Written, usize),
    /// What our device role says; of values, only which variant counts.
    ours: QueueError,
    theirs: Seen,
}

/// A chain as it was written: where the table of its descriptors is, and the descriptors.
struct Written {
    head: u16,
    /// The indirect table, or none if the descriptors are those of the ring.
    table: Option<u64>,
    entries: Vec<(u16, Descriptor)>,
}

impl Written {
    /// Writes entry `which` again, changed.
    fn change(&self, ring: &Ring, which: usize, change: impl FnOnce(&mut Descriptor)) {
        let (index, mut descriptor) = self.entries[which];
        change(&mut descriptor);
        match self.table {
            Some(table) => ring.put_in(table, index, descriptor),
            None => ring.put(index, descriptor),
        }
    }

    /// Writes the descriptor of the ring that names the table again, changed.
    fn change_table(&self, ring: &Ring, change: impl FnOnce(&mut Descriptor)) {
        let mut descriptor = ring.direct(self.head)[0];
        change(&mut descriptor);
        ring.put(self.head, descriptor);
    }
}

/// Defects that chains in the ring and in a table can have alike.
const ANYWHERE: &[Defect] = &[
    Defect {
        name: "the available index is further ahead than the queue is long",
        make: |ring, _, _| ring.jump(SIZE),
        ours: QueueError::IndexJump { last: 0, index: 0, size: 0 },
        theirs: Seen::Refused,
    },
    Defect {
        name: "a head beyond the ring",
        make: |ring, _, _| ring.rewrite_last(SIZE),
        ours: QueueError::Index { index: 0, size: 0 },
        theirs: Seen::CutShort,
    },
    Defect {
        name: "a next field beyond the table",
        make: |ring, chain, which| {
            chain
                .change(ring, which, |descriptor| (descriptor.flags, descriptor.next) = (descriptor.flags | NEXT, 400));
        },
        ours: QueueError::Index { index: 0, size: 0 },
        theirs: Seen::CutShort,
    },
    Defect {
        name: "a chain that loops",
        make: |ring, chain, _| {
            // The last of them: one that goes back from a writable piece to a readable one is out of order, too.
            let (back, _) = *chain.entries.last().unwrap();
            chain.change(ring, chain.entries.len() - 1, |descriptor| {
                (descriptor.flags, descriptor.next) = (descriptor.flags | NEXT, back);
            });
        },
        ours: QueueError::TooManyDescriptors { head: 0, limit: 0 },
        theirs: Seen::CutShort,
    },
    Defect {
        name: "a buffer that is not memory",
        make: |ring, chain, which| chain.change(ring, which, |descriptor| descriptor.address = END),
        ours: QueueError::Memory(MemoryError::Wraps { address: 0, len: 0 }),
        theirs: Seen::Whole,
    },
    Defect {
        name: "a buffer whose end wraps around",
        make: |ring, chain, which| chain.change(ring, which, |descriptor| descriptor.address = u64::MAX),
        ours: QueueError::Memory(MemoryError::Wraps { address: 0, len: 0 }),
        theirs: Seen::Whole,
    },
    Defect {
        name: "a readable piece after a writable one",
        make: |ring, chain, _| {
            let last = chain.entries.len() - 1;
            chain.change(ring, last - 1, |descriptor| descriptor.flags |= WRITE);
            chain.change(ring, last, |descriptor| descriptor.flags &= !WRITE);
        },
        ours: QueueError::Order { head: 0 },
        theirs: Seen::Whole,
    },
];

/// Defects that only chains with a table can have.
const IN_TABLES: &[Defect] = &[
    Defect {
        name: "a table of no bytes",
        make: |ring, chain, _| chain.change_table(ring, |descriptor| descriptor.len = 0),
        ours: QueueError::IndirectLength { head: 0, len: 0 },
        theirs: Seen::CutShort,
    },
    Defect {
        name: "a table with a part of a descriptor",
        make: |ring, chain, _| chain.change_table(ring, |descriptor| descriptor.len += 1),
        ours: QueueError::IndirectLength { head: 0, len: 0 },
        theirs: Seen::CutShort,
    },
    Defect {
        name: "a table that is not memory",
        make: |ring, chain, _| chain.change_table(ring, |descriptor| descriptor.address = END),
        ours: QueueError::Memory(MemoryError::Wraps { address: 0, len: 0 }),
        theirs: Seen::CutShort,
    },
    Defect {
        name: "a table in a table",
        make: |ring, chain, which| {
            chain.change(ring, which, |descriptor| {
                (descriptor.address, descriptor.len) = (TABLES, 16);
                descriptor.flags = INDIRECT;
            });
        },
        ours: QueueError::IndirectNested { head: 0 },
        theirs: Seen::CutShort,
    },
    Defect {
        name: "a descriptor with both INDIRECT and NEXT",
        make: |ring, chain, _| chain.change_table(ring, |descriptor| descriptor.flags |= NEXT),
        ours: QueueError::IndirectWithNext { head: 0 },
        theirs: Seen::Whole,
    },
    Defect {
        name: "a table with more descriptors than anyone puts into one",
        make: |ring, chain, _| {
            for index in 0..=INDIRECT_MAX {
                let flags = if index < INDIRECT_MAX { NEXT } else { 0 };
                ring.put_in(TABLES, index, Descriptor { address: BUFFERS, len: 1, flags, next: index + 1 });
            }
            chain.change_table(ring, |descriptor| descriptor.len = 16 * (u32::from(INDIRECT_MAX) + 1));
        },
        ours: QueueError::TooManyDescriptors { head: 0, limit: 0 },
        theirs: Seen::Whole,
    },
];

/// A chain of `count` pieces, of which the last is writable, in a table or not.
fn write(ring: &mut Ring, head: u16, count: u16, table: bool) -> Written {
    let entries = (0..count).map(|number| {
        let last = number + 1 == count;
        let index = if table { number } else { (head + number) % SIZE };
        let next = if table { number + 1 } else { (index + 1) % SIZE };
        let flags = if last { WRITE } else { NEXT };
        (index, Descriptor { address: BUFFERS + 0x100 * u64::from(number), len: 0x100, flags, next })
    });
    let written = Written { head, table: table.then_some(TABLES), entries: entries.collect() };
    (0..written.entries.len()).for_each(|which| written.change(ring, which, |_| {}));
    if table {
        ring.put(head, Descriptor { address: TABLES, len: 16 * u32::from(count), flags: INDIRECT, next: 0 });
    }
    ring.available(&[head]);
    written
}

/// What each makes of the next chain.
fn look(ring: &Ring) -> (Result<bool, QueueError>, Seen) {
    let (mut ours, mut theirs) = (ring.our_device(), ring.their_device());
    ours.begin_burst();
    let our = match ours.pop().map(drop) {
        Ok(()) => Ok(true),
        Err(PopError::Broken(reason)) => Err(reason),
        Err(_) => Ok(false),
    };
    let their = theirs.pop_descriptor_chain(&*ring.theirs).map(|chain| ring.walk(chain));
    (our, Seen::of(their.as_ref()))
}

/// Which kind of reason; memory's is looked at no further.
fn same(one: QueueError, other: QueueError) -> bool {
    discriminant(&one) == discriminant(&other)
}

proptest! {
    #[test]
    fn each_defect_is_told_by_ours_and_met_by_theirs_as_listed(
        head in 0..SIZE,
        count in 2u16..6,
        which in any::<Index>(),
        event_idx in any::<bool>(),
    ) {
        for (table, defect) in
            ANYWHERE.iter().flat_map(|defect| [(false, defect), (true, defect)]).chain(IN_TABLES.iter().map(|defect| (true, defect)))
        {
            let mut ring = Ring::new(SIZE, event_idx, true);
            let written = write(&mut ring, head, count, table);
            prop_assert_eq!(look(&ring), (Ok(true), Seen::Whole), "before");
            (defect.make)(&mut ring, &written, which.index(count.into()));
            let (ours, theirs) = look(&ring);
            let reason = ours.expect_err(defect.name);
            prop_assert!(same(reason, defect.ours), "{}: {}", defect.name, reason);
            prop_assert_eq!(theirs, defect.theirs, "{}, in a table: {}", defect.name, table);
        }
    }

    #[test]
    fn a_table_that_was_not_negotiated_is_followed_by_theirs_only(head in 0..SIZE, count in 1u16..6) {
        let mut ring = Ring::new(SIZE, false, false);
        write(&mut ring, head, count, true);
        let (ours, theirs) = look(&ring);
        prop_assert_eq!(ours, Err(QueueError::IndirectNotNegotiated { head }));
        prop_assert_eq!(theirs, Seen::Whole);
    }

    #[test]
    fn a_head_twice_in_flight_is_taken_twice_by_theirs_only(head in 0..SIZE, count in 1u16..6, table in any::<bool>()) {
        let mut ring = Ring::new(SIZE, false, true);
        write(&mut ring, head, count, table);
        ring.available(&[head]);
        let (mut ours, mut theirs) = (ring.our_device(), ring.their_device());
        ours.begin_burst();
        let _chain = ours.pop().unwrap();
        prop_assert_eq!(ours.pop().unwrap_err(), PopError::Broken(QueueError::InFlight { head }));
        for _ in 0..2 {
            let chain = theirs.pop_descriptor_chain(&*ring.theirs).map(|chain| ring.walk(chain));
            prop_assert_eq!(Seen::of(chain.as_ref()), Seen::Whole);
        }
    }

    /// Whatever stands in a ring: what ours takes, theirs takes, and it is the same.
    #[test]
    fn what_ours_takes_from_any_ring_theirs_sees_alike(
        descriptors in prop::collection::vec(descriptor(), usize::from(SIZE)),
        table in prop::collection::vec(descriptor(), 8),
        heads in prop::collection::vec(0..SIZE + 1, 0..usize::from(SIZE)),
        (event_idx, indirect) in any::<(bool, bool)>(),
    ) {
        let mut ring = Ring::new(SIZE, event_idx, indirect);
        for (index, descriptor) in descriptors.iter().enumerate() {
            ring.put(index as u16, *descriptor);
        }
        for (index, descriptor) in table.iter().enumerate() {
            ring.put_in(TABLES, index as u16, *descriptor);
        }
        ring.available(&heads);
        let (mut ours, mut theirs) = (ring.our_device(), ring.their_device());
        ours.begin_burst();
        let mut taken = Vec::new();
        while let Ok(chain) = ours.pop() {
            let their = theirs.pop_descriptor_chain(&*ring.theirs).map(|chain| ring.walk(chain));
            prop_assert_eq!(Seen::of(their.as_ref()), Seen::Whole);
            let their = their.unwrap();
            prop_assert_eq!(chain.head(), their.head);
            prop_assert_eq!(Some(ring.pieces(&chain)), their.pieces());
            taken.push(chain);
        }
        if ours.broken().is_none() {
            prop_assert!(theirs.pop_descriptor_chain(&*ring.theirs).is_none());
        }
    }
}

/// Any descriptor, mostly near what could be right.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let buffer = (BUFFERS..END, 0u32..0x200);
    let place = prop_oneof![
        8 => buffer,
        3 => (Just(TABLES), (1u32..9).prop_map(|entries| 16 * entries)),
        1 => any::<(u64, u32)>(),
    ];
    let flags = prop_oneof![Just(0), Just(NEXT), Just(WRITE), Just(NEXT | WRITE), Just(INDIRECT), any::<u16>()];
    (place, flags, 0..SIZE + 1).prop_map(|((address, len), flags, next)| Descriptor { address, len, flags, next })
}
