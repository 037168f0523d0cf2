//! Our device role and rust-vmm's see the same chains, write the same used ring, and answer the driver's wishes alike.

use polyvirt_core::queue::PopError;
use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, NO_INTERRUPT, NO_NOTIFY, WRITE};
use proptest::prelude::*;
use proptest::sample::Index;
use virtio_queue::QueueT;

use crate::ring::{BUFFERS, Descriptor, END, Ring, SEAM, TABLES};

/// A chain: its buffers as offset and length, how many of them the device reads, and from which on they are in a table.
#[derive(Clone, Debug)]
struct Chain {
    buffers: Vec<(u64, u32)>,
    readable: Index,
    table_from: Option<Index>,
    /// What a device says that it wrote, as far as there is room.
    written: u32,
}

/// What happens before the devices look again.
#[derive(Clone, Debug)]
struct Round {
    chains: Vec<Chain>,
    /// In which order the chains' descriptors lie in the ring, and in which order the chains are completed.
    shuffle: Vec<Index>,
    wish: (bool, u16),
}

fn chain() -> impl Strategy<Value = Chain> {
    // Mostly anywhere, often across the seam, sometimes empty or as large as can be.
    let seam = SEAM - BUFFERS;
    let buffer = prop_oneof![
        (0..seam * 2 - 0x100, 1u32..0x100),
        (seam - 0x80..seam, 1u32..0x100),
        Just((0, (END - BUFFERS) as u32)),
        Just((END - BUFFERS, 0)),
    ];
    let table = prop::option::of(any::<Index>());
    (prop::collection::vec(buffer, 1..6), any::<Index>(), table, 0u32..0x400)
        .prop_map(|(buffers, readable, table_from, written)| Chain { buffers, readable, table_from, written })
}

fn rounds() -> impl Strategy<Value = Vec<Round>> {
    let round = (
        prop::collection::vec(chain(), 0..8),
        prop::collection::vec(any::<Index>(), 32),
        (any::<bool>(), prop_oneof![Just(0u16), 0u16..64, any::<u16>()]),
    );
    prop::collection::vec(round.prop_map(|(chains, shuffle, wish)| Round { chains, shuffle, wish }), 1..8)
}

/// 0 to `count` in an order that `by` says.
fn shuffled(count: usize, by: &[Index]) -> Vec<usize> {
    let mut left: Vec<_> = (0..count).collect();
    by.iter().cycle().take(count).map(|index| left.remove(index.index(left.len()))).collect()
}

/// Writes as many of `chains` as the ring has room for, and makes them available: what of them is there.
fn offer(ring: &mut Ring, round: &Round) -> Vec<Chain> {
    let mut free = shuffled(ring.config.size.into(), &round.shuffle).into_iter().map(|index| index as u16);
    let mut tables = TABLES;
    let (mut heads, mut offered) = (Vec::new(), Vec::new());
    for chain in &round.chains {
        let count = chain.buffers.len();
        let readable = chain.readable.index(count + 1);
        let table_from = chain.table_from.filter(|_| ring.config.indirect).map_or(count, |index| index.index(count));
        // The buffers before, and the descriptor that names the table.
        let entries: Vec<_> = free.by_ref().take(table_from + usize::from(table_from < count)).collect();
        if entries.len() < table_from + usize::from(table_from < count) || count > ring.config.size.into() {
            break;
        }
        for (number, &(offset, len)) in chain.buffers.iter().enumerate() {
            let write = if number >= readable { WRITE } else { 0 };
            let more = if number + 1 < count { NEXT } else { 0 };
            let (address, flags) = (BUFFERS + offset, write | more);
            if number < table_from {
                let next = if more == 0 { 0 } else { entries[number + 1] };
                ring.put(entries[number], Descriptor { address, len, flags, next });
            } else {
                let index = (number - table_from) as u16;
                ring.put_in(tables, index, Descriptor { address, len, flags, next: index + 1 });
            }
        }
        if table_from < count {
            let len = 16 * (count - table_from) as u32;
            ring.put(entries[table_from], Descriptor { address: tables, len, flags: INDIRECT, next: 0 });
            tables += u64::from(len);
        }
        heads.push(entries[0]);
        offered.push(chain.clone());
    }
    ring.available(&heads);
    offered
}

proptest! {
    #[test]
    fn both_see_the_same_chains_and_say_the_same(
        log in 0u32..6,
        (event_idx, indirect) in any::<(bool, bool)>(),
        rounds in rounds(),
    ) {
        let mut ring = Ring::new(1 << log, event_idx, indirect);
        let (mut ours, mut theirs) = (ring.our_device(), ring.their_device());
        for round in &rounds {
            let offered = offer(&mut ring, round);
            let mut taken = Vec::new();
            ours.begin_burst();
            while let Ok(chain) = ours.pop() {
                let their = theirs.pop_descriptor_chain(&*ring.theirs).map(|chain| ring.walk(chain));
                let their = their.expect("they see a chain too");
                prop_assert_eq!(chain.head(), their.head);
                prop_assert_eq!(Some(ring.pieces(&chain)), their.pieces());
                taken.push(Some(chain));
            }
            prop_assert_eq!(ours.broken(), None);
            prop_assert!(theirs.pop_descriptor_chain(&*ring.theirs).is_none());
            prop_assert_eq!(taken.len(), offered.len());

            // Ours completes; then everything is as it was, and theirs does the same.
            let before = ring.used();
            let mut completed = Vec::new();
            for which in shuffled(taken.len(), &round.shuffle) {
                let mut chain = taken[which].take().unwrap();
                chain.set_written(offered[which].written);
                completed.push((chain.head(), chain.written()));
                ours.complete(chain).unwrap();
            }
            ring.wish_for_interrupts(if round.wish.0 { NO_INTERRUPT } else { 0 }, round.wish.1);
            let interrupt = ours.needs_interrupt();
            if ours.end_burst() {
                // As many as the queue is long: who knows whether there are more?
                ours.begin_burst();
                prop_assert!(matches!(ours.pop(), Err(PopError::Empty)));
                prop_assert!(!ours.end_burst(), "all was taken");
            }
            let (used, wish) = (ring.used(), ring.wish_for_kicks());
            ring.restore_used(&before);
            for &(head, written) in &completed {
                theirs.add_used(&*ring.theirs, head, written).unwrap();
            }
            let notification = theirs.needs_notification(&*ring.theirs).unwrap();
            if event_idx {
                prop_assert_eq!(interrupt, notification);
            } else {
                // rust-vmm's queue does not know the flag, and interrupts for nothing too.
                prop_assert!(notification);
                prop_assert_eq!(interrupt, !round.wish.0 && !completed.is_empty());
            }
            prop_assert!(!theirs.enable_notification(&*ring.theirs).unwrap(), "all was taken");
            if event_idx && completed.is_empty() {
                // Ours was not asked to be quiet by anything: its wish stands from before.
                prop_assert!(wish.1 == ring.wish_for_kicks().1);
            }
            prop_assert_eq!(wish.0 & NO_NOTIFY, ring.wish_for_kicks().0 & NO_NOTIFY);
            prop_assert_eq!(used, ring.used());
        }
    }
}
