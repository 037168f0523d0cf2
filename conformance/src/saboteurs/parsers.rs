//! Devices that read chains in a way they must not: too strict, too lenient, or with their life.

use polyvirt_core::memory::{Access, GuestMemory};
use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, WRITE};
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio::registers::{QUEUE_NOTIFY, STATUS};

use super::bus::{Meddler, Plan};
use super::rings::before;
use super::{Place, Saboteur};
use crate::cells::Kind;

/// A descriptor: address, length, flags, next.
type Entry = (u64, u32, u16, u16);

/// Whether any descriptor of what was made available is as `is` says: flags, position.
fn any_descriptor(meddler: &Meddler, queue: usize, is: fn(u16, usize) -> bool) -> bool {
    let table = meddler.ring(queue).table;
    let flags = |&slot: &u16| meddler.descriptor(table, slot).2;
    let chains = meddler.offered(queue);
    chains.iter().any(|chain| chain.slots.iter().map(flags).enumerate().any(|(position, flags)| is(flags, position)))
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
    meddler.memory.resolve(address, len.into(), Access::READ, |_| {}).is_ok()
}

pub(super) const SABOTEURS: &[Saboteur] = &[
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
                    meddler.discard(queue);
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
        place: Place::Split,
        breaks: &["ring/indirect-behind-direct"],
        make: || {
            before(|meddler, queue| {
                let odd = any_descriptor(meddler, queue, |flags, position| flags & INDIRECT != 0 && position > 0);
                if odd {
                    meddler.discard(queue);
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
        breaks: &["ring/indirect", "ring/indirect-out-of-order", "packed/indirect-reserved"],
        make: || {
            before(|meddler, queue| {
                let odd = any_descriptor(meddler, queue, |flags, _| flags & INDIRECT != 0);
                if odd {
                    meddler.discard(queue);
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
        place: Place::Split,
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
                    meddler.discard(queue);
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
                    meddler.discard(queue);
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
                let mut heads: Vec<_> = meddler.offered(queue).iter().map(|chain| chain.id).collect();
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
            "blk/seg-max-small-queue",
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
            "packed/indirect-in-a-list",
        ],
        make: || {
            before(|meddler, queue| {
                each_descriptor(meddler, queue, |meddler, slot, size, (address, len, flags, next)| {
                    let ring = meddler.ring(0);
                    let used = address != 0 || len != 0 || flags != 0;
                    assert!(!used || len > 0 && mapped(meddler, address, len), "no memory");
                    assert!(flags & NEXT == 0 || next > slot && next < size, "a loop");
                    assert!(size <= ring.size, "a long table");
                    let own = ring.table..ring.table + 16 * u64::from(ring.size);
                    assert!(!own.contains(&address) && address != ring.device, "the ring itself");
                    if flags & INDIRECT != 0 {
                        assert!(meddler.has(Features::INDIRECT_DESC), "not negotiated");
                        assert!(flags & NEXT == 0 && len % 16 == 0, "an odd table");
                        assert!(len / 16 <= ring.size.into(), "a long table");
                        let inner = (0..len / 16).map(|slot| meddler.descriptor(address, slot as u16));
                        assert!(inner.into_iter().all(|(_, _, flags, _)| flags & INDIRECT == 0), "nested");
                        let before = slot.checked_sub(1).map_or(0, |slot| meddler.descriptor(ring.table, slot).2);
                        assert!(!meddler.packed() || before & NEXT == 0, "part of a list");
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
                let [_, (len, _)] = meddler.used(queue);
                meddler.flag |= needs_reset || meddler.u16(len) <= 1;
            };
            Plan { write: Some(write), after: Some(after), ..Plan::NOTHING }.sabotage()
        },
    },
];
