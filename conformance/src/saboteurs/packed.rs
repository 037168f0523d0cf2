//! Devices, and a driver, that treat packed rings in a way they must not.

use polyvirt_core::Features;
use polyvirt_core::queue::packed::layout::{AVAILABLE, EVENTS_AT, NEXT, Tail, USED, WRITE};
use polyvirt_core::queue::split::layout::INDIRECT;

use super::bus::Meddler;
use super::driver::role;
use super::naive::{Fault, Naive};
use super::rings::{after, before, next_round};
use super::{Place, Saboteur};
use crate::cells::Kind;

const OWNER: u16 = AVAILABLE | USED;

/// Swaps what two slots say, but for who owns them.
pub(super) fn swap(meddler: &Meddler, queue: usize, [one, other]: [u16; 2], addresses: bool) {
    let table = meddler.ring(queue).table;
    let [first, second] = [one, other].map(|slot| (meddler.descriptor(table, slot).0, meddler.tail(queue, slot)));
    for (slot, own, (address, tail)) in [(one, first.1, second), (other, second.1, first)] {
        if addresses {
            meddler.put(table + 16 * u64::from(slot), &address.to_le_bytes());
        }
        meddler.set_tail(queue, slot, Tail { flags: tail.flags & !OWNER | own.flags & OWNER, ..tail });
    }
}

/// Lets the used descriptor that is told last have WRITE or not.
fn say_written(meddler: &Meddler, queue: usize, says: fn(Tail) -> bool) {
    let slot = meddler.queues[queue].slot;
    let tail = meddler.tail(queue, slot);
    if matches!(tail.flags & OWNER, 0 | OWNER) {
        let flags = tail.flags & !WRITE | if says(tail) { WRITE } else { 0 };
        meddler.set_tail(queue, slot, Tail { flags, ..tail });
    }
}

pub(super) const SABOTEURS: &[Saboteur] = &[
    Saboteur {
        name: "takes buffer ids modulo the size of the ring",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Packed,
        breaks: &["packed/any-id"],
        make: || {
            before(|meddler, queue| {
                let size = meddler.ring(queue).size;
                for slot in meddler.offered(queue).into_iter().flat_map(|chain| chain.slots) {
                    let tail = meddler.tail(queue, slot);
                    meddler.set_tail(queue, slot, Tail { id: tail.id % size, ..tail });
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "begins with the buffer that came last",
        violates: &["N0086"],
        kind: Kind::Rng,
        place: Place::Packed,
        breaks: &["packed/order"],
        make: || {
            before(|meddler, queue| {
                let chains = meddler.offered(queue);
                if let [first, .., last] = &chains[..] {
                    swap(meddler, queue, [first.slots[0], last.slots[0]], true);
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "tells buffers in another order than it did them",
        violates: &["N0087"],
        kind: Kind::Rng,
        place: Place::Packed,
        breaks: &["packed/order"],
        make: || {
            after(|meddler, queue| {
                if meddler.queues[queue].fresh > 1 {
                    swap(meddler, queue, [0, 1], false);
                }
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "uses the pieces of a list in another order",
        violates: &["N0103"],
        kind: Kind::Blk,
        place: Place::Packed,
        breaks: &["packed/order", "ring/any-arrangement"],
        make: || {
            before(|meddler, queue| {
                let table = meddler.ring(queue).table;
                for chain in meddler.offered(queue) {
                    // Data and status, which go in the same direction.
                    let [.., data, status] = chain.slots[..] else { continue };
                    let [(one, len, ..), (other, last, ..)] =
                        [data, status].map(|slot| meddler.descriptor(table, slot));
                    for (slot, address, len) in [(data, other, last), (status, one, len)] {
                        let (_, _, flags, next) = meddler.descriptor(table, slot);
                        meddler.set_descriptor(table, slot, (address, len, flags, next));
                    }
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "tells every descriptor of a chain",
        violates: &["N0092"],
        kind: Kind::Rng,
        place: Place::Packed,
        breaks: &["packed/one-used-descriptor"],
        make: || {
            after(|meddler, queue| {
                let tail = meddler.tail(queue, 0);
                meddler.set_tail(queue, 1, Tail { len: 0, ..tail });
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "takes the used length for what was written",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Packed,
        breaks: &["packed/written-flag"],
        make: || after(|meddler, queue| say_written(meddler, queue, |tail| tail.len > 0)).sabotage(),
    },
    Saboteur {
        name: "says that it wrote what it can only read",
        violates: &[],
        kind: Kind::Console,
        place: Place::Packed,
        breaks: &["packed/written-flag"],
        make: || after(|meddler, queue| say_written(meddler, queue, |_| true)).sabotage(),
    },
    Saboteur {
        name: "looks at the flag AVAILABLE alone",
        violates: &["N0091"],
        kind: Kind::Rng,
        place: Place::Packed,
        breaks: &["packed/not-available"],
        make: || {
            before(|meddler, queue| {
                let at = meddler.place(queue);
                let tail = meddler.tail(queue, at.index());
                if tail.flags & AVAILABLE == at.available_flags() & AVAILABLE && tail.len > 0 {
                    let flags = tail.flags & !OWNER | at.available_flags();
                    meddler.set_tail(queue, at.index(), Tail { flags, ..tail });
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "does not look at the flags of what a list goes on with",
        violates: &["N0091"],
        kind: Kind::Blk,
        place: Place::Packed,
        breaks: &["packed/half-available"],
        make: || {
            before(|meddler, queue| {
                let size = meddler.ring(queue).size;
                let mut at = meddler.place(queue);
                let mut tail = meddler.tail(queue, at.index());
                while at.is_available(tail.flags) && tail.flags & NEXT != 0 {
                    at = at.advanced(1, size);
                    tail = meddler.tail(queue, at.index());
                    tail.flags = tail.flags & !OWNER | at.available_flags();
                    meddler.set_tail(queue, at.index(), tail);
                    if at == meddler.place(queue) {
                        break;
                    }
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "goes on behind a hole",
        violates: &["N0086", "N0091"],
        kind: Kind::Rng,
        place: Place::Packed,
        breaks: &["packed/hole"],
        make: || {
            before(|meddler, queue| {
                let (at, table) = (meddler.place(queue), meddler.ring(queue).table);
                let next = at.advanced(1, meddler.ring(queue).size);
                let tail = meddler.tail(queue, next.index());
                if next.is_available(tail.flags) && !at.is_available(meddler.tail(queue, at.index()).flags) {
                    let (address, ..) = meddler.descriptor(table, next.index());
                    meddler.put(table + 16 * u64::from(at.index()), &address.to_le_bytes());
                    meddler.set_tail(queue, at.index(), tail);
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "heeds links in indirect tables",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Packed,
        breaks: &["packed/indirect-reserved"],
        make: || {
            before(|meddler, queue| {
                let table = meddler.ring(queue).table;
                for slot in meddler.offered(queue).into_iter().flat_map(|chain| chain.slots) {
                    let (address, len, flags, _) = meddler.descriptor(table, slot);
                    let last = (len / 16).saturating_sub(1) as u16;
                    let linked = meddler.has(Features::INDIRECT_DESC) && flags & INDIRECT != 0;
                    assert!(!linked || meddler.descriptor(address, last).2 & NEXT == 0, "a link that leads nowhere");
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "(driver) links the entries of tables",
        violates: &["N0106"],
        kind: Kind::Rng,
        place: Place::Packed,
        breaks: &["driver/indirect-well-formed"],
        make: || role(|virtqueue| Naive::make(virtqueue, Fault { indirect: INDIRECT, linked: true, ..Fault::NONE })),
    },
    Saboteur {
        name: "asks for kicks at a place that the ring does not have",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Packed,
        breaks: &["packed/device-events"],
        make: || after(|meddler, queue| meddler.put(meddler.ring(queue).device, &[0xff, 0x7f, 2, 0])).sabotage(),
    },
    Saboteur {
        name: "compares the place of an event with those where it used something",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Packed,
        breaks: &["packed/event-in-a-list"],
        make: || {
            before(|meddler, queue| {
                let (ring, mut at) = (meddler.ring(queue), meddler.place(queue));
                let (event, passed) = (meddler.u16(ring.used_event), next_round(at));
                let mut written = Vec::new();
                for chain in meddler.offered(queue) {
                    written.push(at.pack());
                    at = at.advanced(chain.slots.len() as u16, ring.size);
                }
                if meddler.u16(ring.flags) == EVENTS_AT && !written.is_empty() && !written.contains(&event) {
                    meddler.put(ring.used_event, &passed.to_le_bytes());
                }
                true
            })
            .sabotage()
        },
    },
];
