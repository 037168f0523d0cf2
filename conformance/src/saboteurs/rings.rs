//! Devices that treat rings in a way they must not.

use polyvirt_core::queue::packed::layout::Position;
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio::registers::STATUS;

use super::bus::{Meddler, Plan};
use super::{Place, Saboteur};
use crate::cells::Kind;

/// One that meddles before the device looks.
pub(super) const fn before(work: fn(&mut Meddler, usize) -> bool) -> Plan {
    Plan { before: Some(work), ..Plan::NOTHING }
}

/// One that meddles after the device looked.
pub(super) const fn after(work: fn(&mut Meddler, usize)) -> Plan {
    Plan { after: Some(work), ..Plan::NOTHING }
}

/// (Packed) an event at the same place, of the next round.
pub(super) fn next_round(at: Position) -> u16 {
    Position::new(at.index(), !at.wrap()).pack()
}

pub(super) const SABOTEURS: &[Saboteur] = &[
    Saboteur {
        name: "looks at the ring before DRIVER_OK",
        violates: &["N0005"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["init/nothing-before-driver-ok", "init/driver-ok-alone"],
        make: || {
            before(|meddler, queue| {
                if !meddler.status.contains(Status::DRIVER_OK | Status::FEATURES_OK) {
                    meddler.u16(meddler.ring(queue).available);
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "does not look at what was there before DRIVER_OK",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["init/served-without-another-kick"],
        make: || {
            let write = |meddler: &mut Meddler, register, value: u32| {
                let starts = register == STATUS && value & 4 != 0 && !meddler.status.contains(Status::DRIVER_OK);
                if !starts {
                    return Some(value);
                }
                // What says that something is there: the available index, or the flags of the first descriptor.
                let ring = meddler.ring(0);
                let at = if meddler.packed() { ring.table + 14 } else { ring.available };
                let says = meddler.u16(at);
                meddler.put(at, &[0, 0]);
                meddler.tell(STATUS, value);
                meddler.put(at, &says.to_le_bytes());
                None
            };
            Plan { write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "looks at the ring after a reset",
        violates: &["N0022"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["init/silent-after-reset"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| {
                if register == STATUS && meddler.status.is_empty() && meddler.queues[0].size > 0 {
                    meddler.u16(meddler.ring(0).available);
                }
                value
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "looks at a broken queue again and again",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/malformed-not-retried", "init/needs-reset-lasts"],
        make: || {
            before(|meddler, queue| {
                meddler.u16(meddler.ring(queue).available);
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "returns another head",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/used-id", "ring/scattered-slots", "ring/whole-queue", "ring/wrap"],
        make: || {
            after(|meddler, queue| {
                let [(at, _), _] = meddler.used(queue);
                let id = meddler.u16(at);
                meddler.put(at, &(id ^ 1).to_le_bytes());
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "writes the used element behind the index that covers it",
        violates: &["N0066"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/length-before-index"],
        make: || {
            after(|meddler, queue| {
                for (at, len) in meddler.used(queue) {
                    let bytes: [u8; 4] = meddler.get(at).unwrap_or_default();
                    meddler.put(at, &bytes[..len]);
                }
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "marks descriptors that it has seen",
        violates: &["N0044"],
        kind: Kind::Rng,
        place: Place::Split,
        breaks: &["ring/descriptors-untouched", "ring/only-what-is-given"],
        make: || {
            after(|meddler, queue| {
                let table = meddler.ring(queue).table;
                let (address, len, flags, next) = meddler.descriptor(table, 0);
                meddler.set_descriptor(table, 0, (address, len, flags | 0x100, next));
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "reads what nobody gave it",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/only-what-is-given"],
        make: || {
            after(|meddler, queue| {
                let ring = meddler.ring(queue);
                let (address, len, _, _) = meddler.descriptor(ring.table, 0);
                meddler.get::<1>(address + u64::from(len));
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "interrupts whatever the available flags say",
        violates: &["N0061"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["notify/no-interrupt-when-not-wanted", "notify/wanted-again", "packed/events-on-and-off"],
        make: || {
            before(|meddler, queue| {
                meddler.put(meddler.ring(queue).flags, &[0, 0]);
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "heeds used_event although it was not negotiated",
        violates: &["N0060"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["notify/used-event-ignored"],
        make: || {
            before(|meddler, queue| {
                let ring = meddler.ring(queue);
                let next = if meddler.packed() { meddler.place(queue).pack() } else { meddler.u16(ring.used) };
                if !meddler.has(Features::EVENT_IDX) && meddler.u16(ring.used_event) != next {
                    meddler.put(ring.flags, &[1, 0]);
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "interrupts at every element although used_event is ahead",
        violates: &["N0065"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["notify/used-event-not-reached", "packed/event-next-round"],
        make: || {
            before(|meddler, queue| {
                let ring = meddler.ring(queue);
                let next = if meddler.packed() { meddler.place(queue).pack() } else { meddler.u16(ring.used) };
                meddler.put(ring.used_event, &next.to_le_bytes());
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "interrupts one element after used_event",
        violates: &["N0064"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["notify/used-event-reached"],
        make: || {
            before(|meddler, queue| {
                let ring = meddler.ring(queue);
                let event = meddler.u16(ring.used_event).wrapping_add(1);
                meddler.put(ring.used_event, &event.to_le_bytes());
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "heeds the available flags although used_event is negotiated",
        violates: &["N0063"],
        kind: Kind::Rng,
        place: Place::Split,
        breaks: &["notify/flags-ignored"],
        make: || {
            before(|meddler, queue| {
                let ring = meddler.ring(queue);
                if meddler.u16(ring.flags) == 1 {
                    let passed = meddler.u16(ring.used).wrapping_sub(1);
                    meddler.put(ring.used_event, &passed.to_le_bytes());
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "sets a used flag that does not exist",
        violates: &["N0078"],
        kind: Kind::Rng,
        place: Place::Split,
        breaks: &["notify/used-flags"],
        make: || after(|meddler, queue| meddler.put(meddler.ring(queue).used_flags, &[2, 0])).sabotage(),
    },
    Saboteur {
        name: "sets the used flag with EVENT_IDX",
        violates: &["N0080"],
        kind: Kind::Rng,
        place: Place::Split,
        breaks: &["notify/used-flags"],
        make: || {
            after(|meddler, queue| {
                if meddler.has(Features::EVENT_IDX) {
                    meddler.put(meddler.ring(queue).used_flags, &[1, 0]);
                }
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "asks for no kicks and does not look either",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["notify/kick-asked-for"],
        make: || after(|meddler, queue| meddler.put(meddler.ring(queue).used_flags, &[1, 0])).sabotage(),
    },
    Saboteur {
        name: "uses something at every kick",
        violates: &["N0082"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["notify/storm", "notify/kicks-for-other-queues"],
        make: || {
            after(|meddler, queue| {
                if meddler.queues[queue].fresh == 0 {
                    meddler.discard(queue);
                }
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "falls over any used_event but the next",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["notify/used-event-poisoned", "packed/event-odd"],
        make: || {
            before(|meddler, queue| {
                let ring = meddler.ring(queue);
                let event = meddler.u16(ring.used_event);
                let ahead = if meddler.packed() { event & 0x7fff } else { event.wrapping_sub(meddler.u16(ring.used)) };
                assert!(ahead <= ring.size, "an event at {event:#x}");
                assert!(!meddler.packed() || meddler.u16(ring.flags) < 3, "flags that nobody knows");
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "stops when the 16-bit index wraps",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Split,
        breaks: &["ring/index-wrap"],
        make: || {
            before(|meddler, queue| meddler.u16(meddler.ring(queue).available) >= meddler.queues[queue].available)
                .sabotage()
        },
    },
    Saboteur {
        name: "stops when the ring wraps",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/wrap", "packed/any-size"],
        make: || {
            before(|meddler, queue| match meddler.packed() {
                true => meddler.place(queue).wrap(),
                false => meddler.u16(meddler.ring(queue).available) <= meddler.ring(queue).size,
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "takes the first 64 KiB of a buffer for all of it",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["console/output-long"],
        make: || {
            before(|meddler, queue| {
                let table = meddler.ring(queue).table;
                for slot in meddler.offered(queue).into_iter().flat_map(|chain| chain.slots) {
                    let (address, len, flags, next) = meddler.descriptor(table, slot);
                    meddler.set_descriptor(table, slot, (address, len.min(0x10000), flags, next));
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "interrupts only if used_event is the element that was used last",
        violates: &["N0064"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["notify/used-event-in-a-batch"],
        make: || {
            before(|meddler, queue| {
                let (ring, offered) = (meddler.ring(queue), meddler.offered(queue));
                let Some((_, others)) = offered.split_last().filter(|_| meddler.has(Features::EVENT_IDX)) else {
                    return true;
                };
                let (last, passed) = if meddler.packed() {
                    let first = meddler.place(queue);
                    let before = others.iter().map(|chain| chain.slots.len() as u16).sum();
                    (first.advanced(before, ring.size).pack(), next_round(first))
                } else {
                    let used = meddler.u16(ring.used);
                    (used.wrapping_add(others.len() as u16), used.wrapping_sub(1))
                };
                if meddler.u16(ring.used_event) != last {
                    meddler.put(ring.used_event, &passed.to_le_bytes());
                }
                true
            })
            .sabotage()
        },
    },
];
