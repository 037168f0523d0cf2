//! Devices that treat rings in a way they must not.

use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, WRITE};
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio::registers::{QUEUE_NOTIFY, STATUS};

use super::bus::{Meddler, Plan};
use super::{Place, Saboteur};
use crate::cells::Kind;

/// A descriptor: address, length, flags, next.
type Entry = (u64, u32, u16, u16);

/// One that meddles before the device looks.
const fn before(work: fn(&mut Meddler, usize) -> bool) -> Plan {
    Plan { before: Some(work), ..Plan::NOTHING }
}

/// One that meddles after the device looked.
const fn after(work: fn(&mut Meddler, usize)) -> Plan {
    Plan { after: Some(work), ..Plan::NOTHING }
}

/// Puts a chain into the used ring in the device's place, with nothing done.
fn discard(meddler: &mut Meddler, queue: usize, head: u16) {
    let ring = meddler.ring(queue);
    let used = meddler.u16(ring.used);
    let element = ring.elements + 8 * u64::from(used % ring.size);
    meddler.put(element, &u32::from(head).to_le_bytes());
    meddler.put(element + 4, &[0; 4]);
    meddler.put(ring.used, &used.wrapping_add(1).to_le_bytes());
}

/// Whether any descriptor of the newest chain is as `is` says: flags, position.
fn any_descriptor(meddler: &Meddler, queue: usize, is: fn(u16, usize) -> bool) -> bool {
    let ring = meddler.ring(queue);
    let mut at = meddler.newest(queue);
    for position in 0..usize::from(ring.size) {
        let (_, _, flags, next) = meddler.descriptor(ring.table, at);
        if is(flags, position) {
            return true;
        }
        if flags & NEXT == 0 {
            return false;
        }
        at = next % ring.size;
    }
    false
}

/// Applies `change` to every entry of the descriptor table, and of the tables that it names.
fn each_descriptor(meddler: &Meddler, queue: usize, change: fn(&Meddler, u16, u16, Entry) -> Entry) {
    let ring = meddler.ring(queue);
    let walk = |table, size: u16| {
        for slot in 0..size {
            let old = meddler.descriptor(table, slot);
            let new = change(meddler, slot, size, old);
            if new != old {
                meddler.set_descriptor(table, slot, new);
            }
        }
    };
    walk(ring.table, ring.size);
    for slot in 0..ring.size {
        let (address, len, flags, _) = meddler.descriptor(ring.table, slot);
        if flags & INDIRECT != 0 {
            walk(address, (len / 16).min(64) as u16);
        }
    }
}

/// Whether guest memory is there.
fn mapped(meddler: &Meddler, address: u64, len: u32) -> bool {
    use polyvirt_core::memory::{Access, GuestMemory};
    meddler.memory.resolve(address, len.into(), Access::READ, |_| {}).is_ok()
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
                let at = meddler.ring(0).available;
                let index = meddler.u16(at);
                meddler.put(at, &[0, 0]);
                meddler.tell(STATUS, value);
                meddler.put(at, &index.to_le_bytes());
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
                let ring = meddler.ring(queue);
                let last = meddler.u16(ring.used).wrapping_sub(1) % ring.size.max(1);
                let element = ring.elements + 8 * u64::from(last);
                let id = meddler.u16(element);
                meddler.put(element, &(id ^ 1).to_le_bytes());
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
                let element = meddler.ring(queue).elements;
                let bytes: [u8; 8] = meddler.get(element).unwrap_or_default();
                meddler.put(element, &bytes);
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "marks descriptors that it has seen",
        violates: &["N0044"],
        kind: Kind::Rng,
        place: Place::Modern,
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
        breaks: &["notify/no-interrupt-when-not-wanted", "notify/wanted-again"],
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
                if !meddler.has(Features::EVENT_IDX) && meddler.u16(ring.used_event) != meddler.u16(ring.used) {
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
        breaks: &["notify/used-event-not-reached"],
        make: || {
            before(|meddler, queue| {
                let ring = meddler.ring(queue);
                let used = meddler.u16(ring.used);
                meddler.put(ring.used_event, &used.to_le_bytes());
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
        place: Place::Modern,
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
        place: Place::Modern,
        breaks: &["notify/used-flags"],
        make: || after(|meddler, queue| meddler.put(meddler.ring(queue).used_flags, &[2, 0])).sabotage(),
    },
    Saboteur {
        name: "sets the used flag with EVENT_IDX",
        violates: &["N0080"],
        kind: Kind::Rng,
        place: Place::Modern,
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
                let ring = meddler.ring(queue);
                if meddler.u16(ring.available) == meddler.queues[queue].available {
                    discard(meddler, queue, 0);
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
        breaks: &["notify/used-event-poisoned"],
        make: || {
            before(|meddler, queue| {
                let ring = meddler.ring(queue);
                let ahead = meddler.u16(ring.used_event).wrapping_sub(meddler.u16(ring.used));
                assert!(ahead <= ring.size, "used_event is {ahead} ahead");
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "stops when the 16-bit index wraps",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
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
        breaks: &["ring/wrap"],
        make: || {
            before(|meddler, queue| meddler.u16(meddler.ring(queue).available) <= meddler.ring(queue).size).sabotage()
        },
    },
    Saboteur {
        name: "takes INDIRECT with WRITE for something else",
        violates: &["N0052"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["ring/indirect-write-flag"],
        make: || {
            before(|meddler, queue| {
                let odd = any_descriptor(meddler, queue, |flags, _| flags & (INDIRECT | WRITE) == INDIRECT | WRITE);
                if odd {
                    discard(meddler, queue, meddler.newest(queue));
                }
                !odd
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "knows indirect descriptors only at the head",
        violates: &["N0053"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["ring/indirect-behind-direct"],
        make: || {
            before(|meddler, queue| {
                let odd = any_descriptor(meddler, queue, |flags, position| flags & INDIRECT != 0 && position > 0);
                if odd {
                    discard(meddler, queue, meddler.newest(queue));
                }
                !odd
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "offers indirect descriptors and does not know them",
        violates: &["N0053"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["ring/indirect", "ring/indirect-out-of-order"],
        make: || {
            before(|meddler, queue| {
                let odd = any_descriptor(meddler, queue, |flags, _| flags & INDIRECT != 0);
                if odd {
                    discard(meddler, queue, meddler.newest(queue));
                }
                !odd
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "takes what is beyond a table for its end",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &[
            "chains/next-beyond-table",
            "chains/loop",
            "chains/self-loop",
            "chains/indirect-loop",
            "chains/indirect-next-beyond-table",
        ],
        make: || {
            before(|meddler, queue| {
                each_descriptor(meddler, queue, |_, slot, size, (address, len, flags, next)| {
                    let ends = flags & NEXT != 0 && (next >= size || next <= slot);
                    (address, len, if ends { flags & !NEXT } else { flags }, next)
                });
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "takes heads and indices modulo something",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/head-beyond-table", "ring/index-jump", "ring/index-back"],
        make: || {
            before(|meddler, queue| {
                let ring = meddler.ring(queue);
                for slot in 0..u64::from(ring.size) {
                    let head = meddler.u16(ring.entries + 2 * slot) % ring.size;
                    meddler.put(ring.entries + 2 * slot, &head.to_le_bytes());
                }
                let (index, last) = (meddler.u16(ring.available), meddler.u16(ring.used));
                if index.wrapping_sub(last) > ring.size {
                    meddler.put(ring.available, &last.wrapping_add(1).to_le_bytes());
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "finds other memory where there is none",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["chains/nowhere", "chains/address-wraps", "chains/edge-of-memory", "chains/above-4-gib"],
        make: || {
            before(|meddler, queue| {
                each_descriptor(meddler, queue, |meddler, _, _, (address, len, flags, next)| {
                    let len = if mapped(meddler, address, len) { len } else { 16 };
                    let address = if mapped(meddler, address, len) { address } else { meddler.ring(0).table };
                    (address, len, flags, next)
                });
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "finds other memory where there is none, for block requests",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["chains/nowhere", "chains/edge-of-memory", "chains/address-wraps"],
        make: || {
            before(|meddler, queue| {
                each_descriptor(meddler, queue, |meddler, _, _, (address, len, flags, next)| {
                    let address = if mapped(meddler, address, len) { address } else { meddler.ring(0).table };
                    (address, 512.min(len), flags, next)
                });
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "writes where the driver asked it to read",
        violates: &["N0041"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["chains/wrong-direction"],
        make: || {
            before(|meddler, queue| {
                each_descriptor(meddler, queue, |_, _, _, (address, len, flags, next)| {
                    (address, len, flags | WRITE, next)
                });
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "serves requests that are too short",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["chains/blk-short-header", "chains/blk-odd-length"],
        make: || {
            before(|meddler, queue| {
                each_descriptor(meddler, queue, |_, _, _, (address, len, flags, next)| {
                    let len = match len {
                        15 => 16,
                        511 => 512,
                        len => len,
                    };
                    (address, len, flags, next)
                });
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "does not get to the last byte of memory",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["chains/last-byte-of-memory"],
        make: || {
            before(|meddler, queue| {
                let (address, len, _, _) = meddler.descriptor(meddler.ring(queue).table, 0);
                let last = !mapped(meddler, address, len + 1);
                if last {
                    discard(meddler, queue, 0);
                }
                !last
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "serves no chain as long as the queue",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["chains/queue-size"],
        make: || {
            before(|meddler, queue| {
                let long = any_descriptor(meddler, queue, |_, position| position > 6);
                if long {
                    discard(meddler, queue, 0);
                }
                !long
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "reads descriptors again and again, and falls over those that change",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/rewritten"],
        make: || {
            before(|meddler, queue| {
                let table = meddler.ring(queue).table;
                let first = meddler.descriptor(table, 0);
                for _ in 0..200 {
                    assert_eq!(meddler.descriptor(table, 0), first, "a descriptor changed");
                }
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "falls over a head that comes twice",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["ring/same-head-twice", "ring/same-head-in-flight"],
        make: || {
            before(|meddler, queue| {
                let ring = meddler.ring(queue);
                let (index, used) = (meddler.u16(ring.available), meddler.u16(ring.used));
                let count = index.wrapping_sub(used).min(ring.size);
                let entry = |number: u16| ring.entries + 2 * u64::from(used.wrapping_add(number) % ring.size);
                let mut heads: Vec<_> = (0..count).map(|number| meddler.u16(entry(number))).collect();
                heads.sort();
                assert!(heads.windows(2).all(|pair| pair[0] != pair[1]), "a head came twice");
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "falls over anything malformed",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &[
            "chains/above-queue-size",
            "chains/indirect-nested",
            "chains/indirect-with-next",
            "chains/indirect-empty",
            "chains/indirect-odd-length",
            "chains/indirect-huge",
            "chains/indirect-nowhere",
            "chains/indirect-at-the-edge",
            "chains/indirect-not-negotiated",
            "chains/length-zero",
            "chains/only-length-zero",
            "chains/aimed-at-descriptors",
            "chains/aimed-at-used-ring",
            "chains/writable-first",
        ],
        make: || {
            before(|meddler, queue| {
                each_descriptor(meddler, queue, |meddler, slot, size, (address, len, flags, next)| {
                    let ring = meddler.ring(0);
                    let used = address != 0 || len != 0 || flags != 0;
                    assert!(!used || len > 0 && mapped(meddler, address, len), "no memory");
                    assert!(flags & NEXT == 0 || next > slot && next < size, "a loop");
                    assert!(size <= ring.size, "a long table");
                    assert!(address != ring.table && address != ring.used_flags, "the ring itself");
                    if flags & INDIRECT != 0 {
                        assert!(meddler.has(Features::INDIRECT_DESC), "not negotiated");
                        assert!(flags & NEXT == 0 && len % 16 == 0, "an odd table");
                        let inner = (0..len / 16).map(|slot| meddler.descriptor(address, slot as u16));
                        assert!(inner.into_iter().all(|(_, _, flags, _)| flags & INDIRECT == 0), "nested");
                    } else if slot > 0 && flags & WRITE == 0 && used {
                        let (_, _, before, _) = meddler.descriptor(ring.table, slot - 1);
                        assert!(before & WRITE == 0 || before & NEXT == 0, "writable first");
                    }
                    (address, len, flags, next)
                });
                true
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "never comes back from a bad input",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["chains/blk-header-only", "chains/blk-no-status", "chains/memory-refused", "ring/head-beyond-table"],
        make: || {
            // A request that ended in a need for a reset, or used nothing, is the last one.
            let write = |meddler: &mut Meddler, register, value| {
                assert!(!meddler.flag || register != QUEUE_NOTIFY, "it never recovered");
                Some(value)
            };
            let after = |meddler: &mut Meddler, queue: usize| {
                let needs_reset = meddler.ask(STATUS) & u32::from(Status::DEVICE_NEEDS_RESET.bits()) != 0;
                let ring = meddler.ring(queue);
                let last = meddler.u16(ring.used).wrapping_sub(1) % ring.size.max(1);
                meddler.flag |= needs_reset || meddler.u16(ring.elements + 8 * u64::from(last) + 4) <= 1;
            };
            Plan { write: Some(write), after: Some(after), ..Plan::NOTHING }.sabotage()
        },
    },
];
