//! Broken devices.

use std::sync::Arc;

use polyvirt_core::Features;

use super::broken::{AllOrNothing, Hoarder, LongFeatures, Panics, Tamper, Wrapped, fill, serving, status, with};
use super::{Place, Saboteur};
use crate::cells::Kind;

pub(super) const SABOTEURS: &[Saboteur] = &[
    Saboteur {
        name: "offers a feature that nobody knows",
        violates: &["N0019"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["features/known-only"],
        make: || with(Tamper { features: Some(|honest| honest | Features::bit(19)), ..Tamper::NOTHING }),
    },
    Saboteur {
        name: "offers CONFIG_WCE without FLUSH",
        violates: &["N0016", "N0756", "N0757"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["features/dependencies", "blk/flush-offered"],
        make: || {
            let features = |honest: Features| honest.difference(Features::bit(9)) | Features::bit(11);
            with(Tamper { features: Some(features), ..Tamper::NOTHING })
        },
    },
    Saboteur {
        name: "offers a feature beyond the legacy word",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Legacy,
        breaks: &["features/legacy-word"],
        make: || Arc::new(LongFeatures),
    },
    Saboteur {
        name: "offers zones on the legacy interface",
        violates: &["N0761"],
        kind: Kind::Blk,
        place: Place::Legacy,
        breaks: &["blk/legacy-not-zoned"],
        make: || with(Tamper { features: Some(|honest| honest | Features::bit(17)), ..Tamper::NOTHING }),
    },
    Saboteur {
        name: "never shows that its configuration changed",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &[
            "config/change-is-told",
            "config/change-before-driver-ok",
            "blk/capacity-changes",
            "blk/capacity-before-driver-ok",
            "blk/writeback-mode",
        ],
        make: || with(Tamper::NOTHING),
    },
    Saboteur {
        name: "has a window of no size",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["console/size"],
        make: || with(Tamper { config: Some(|config| config.fill(0)), ..Tamper::NOTHING }),
    },
    Saboteur {
        name: "multiplies sectors without looking",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/driver-sectors", "blk/sector-overflows"],
        make: || {
            serving(|_, chain| {
                let mut header = [0; 16];
                let _ = chain.read(0, &mut header);
                let (_, sector) = header.split_at(8);
                let sector = u64::from_le_bytes(sector.try_into().unwrap_or_default());
                assert!(sector.checked_mul(512).is_some(), "overflow");
                status(chain, 0);
            })
        },
    },
    Saboteur {
        name: "has padding that is not 0",
        violates: &["N0759"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/padding"],
        make: || {
            with(Tamper {
                config: Some(|config| config.iter_mut().skip(33).for_each(|byte| *byte |= 1)),
                ..Tamper::NOTHING
            })
        },
    },
    Saboteur {
        name: "ignores writes to emerg_wr",
        violates: &["N0841", "N0842"],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["console/emergency-write"],
        make: || with(Tamper { ignores_config_writes: true, ..Tamper::NOTHING }),
    },
    Saboteur {
        name: "lets the driver write a read-only field",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["config/read-only"],
        make: || with(Tamper { takes_config_writes: true, ..Tamper::NOTHING }),
    },
    Saboteur {
        name: "lets the configuration drift",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["config/stable"],
        make: || with(Tamper { drifts: true, ..Tamper::NOTHING }),
    },
    Saboteur {
        name: "writes into device-readable buffers",
        violates: &["N0041"],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["ring/readable-untouched", "ring/only-what-is-given", "init/serves-a-request"],
        make: || {
            serving(|_, chain| {
                for segment in chain.readable() {
                    let _ = segment.fill(0, segment.len(), 0xee);
                }
            })
        },
    },
    Saboteur {
        name: "reads device-writable buffers",
        violates: &["N0042"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/writable-not-read"],
        make: || {
            serving(|_, chain| {
                for segment in chain.writable() {
                    let _ = segment.read(0, &mut [0]);
                }
                fill(chain, u32::MAX);
            })
        },
    },
    Saboteur {
        name: "claims to have written what it did not",
        violates: &["N0067"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/used-length"],
        make: || {
            serving(|_, chain| {
                fill(chain, 8);
                chain.set_written(chain.writable_len());
            })
        },
    },
    Saboteur {
        name: "returns empty buffers",
        violates: &["N0853"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["rng/at-least-a-byte", "rng/any-size", "rng/many", "init/serves-a-request"],
        make: || serving(|_, _| {}),
    },
    Saboteur {
        name: "gives the same bytes every time",
        violates: &["N0853"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["rng/random", "rng/many"],
        make: || {
            serving(|_, chain| {
                let _ = chain.write(0, &vec![7; chain.writable_len() as usize]);
            })
        },
    },
    Saboteur {
        name: "leaves large buffers as they are",
        violates: &["N0853"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["rng/any-size", "rng/large"],
        make: || {
            serving(|_, chain| {
                fill(chain, 32);
                chain.set_written(chain.writable_len());
            })
        },
    },
    Saboteur {
        name: "takes the first descriptor for the whole request",
        violates: &["N0037"],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &[
            "ring/any-arrangement",
            "console/output-in-pieces",
            "chains/queue-size",
            "ring/indirect-behind-direct",
        ],
        make: || {
            serving(|broken, chain| {
                let first = chain.readable().first().map_or(0, |segment| segment.len());
                let mut bytes = vec![0; first];
                let _ = chain.read(0, &mut bytes);
                broken.printed.extend(bytes);
            })
        },
    },
    Saboteur {
        name: "says that it did every request, and did none",
        violates: &["N0802", "N0804", "N0805", "N0808", "N0817"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &[
            "blk/read-only",
            "blk/unknown-flags",
            "blk/discard-unmap",
            "blk/write-zeroes",
            "blk/write-zeroes-beyond",
            "blk/zoned-requests",
            "blk/unknown-type",
            "blk/write-then-read",
            "blk/first-and-last-sector",
            "blk/large",
            "blk/many-in-flight",
            "blk/beyond-the-end",
            "blk/sector-overflows",
            "blk/odd-write",
            "blk/segment-odd",
            "blk/backend-fails",
            "blk/capacity",
            "blk/capacity-changes",
            "blk/flush",
            "blk/barrier-bit",
            "blk/seg-max",
        ],
        make: || serving(|_, chain| status(chain, 0)),
    },
    Saboteur {
        name: "puts the status in front of the data",
        violates: &["N0037"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/status-is-last-byte", "init/serves-a-request"],
        make: || {
            serving(|_, chain| {
                let _ = chain.write(0, &[0]);
                chain.set_written(chain.writable_len());
                let _ = chain.write(1, &vec![1; chain.writable_len() as usize - 1]);
            })
        },
    },
    Saboteur {
        name: "claims to have written nothing",
        violates: &["N0067"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/used-length-of-writes", "blk/get-id", "blk/discard"],
        make: || {
            serving(|_, chain| {
                if let Some(segment) = chain.writable().last() {
                    let _ = segment.write(segment.len() - 1, &[0]);
                }
            })
        },
    },
    Saboteur {
        name: "has an id of bytes that are no text",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/get-id"],
        make: || {
            serving(|_, chain| {
                let len = chain.writable_len() as usize;
                let _ = chain.write(0, &vec![0x80; len - 1]);
                status(chain, 0);
            })
        },
    },
    Saboteur {
        name: "fails every request",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/empty", "blk/status-is-last-byte", "init/serves-a-request", "features/none"],
        make: || serving(|_, chain| status(chain, 3)),
    },
    Saboteur {
        name: "keeps a buffer over a reset and writes it in the next run",
        violates: &["N0022"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["init/reset-during-requests"],
        make: || Arc::new(Wrapped(|honest| Box::new(Hoarder { honest, hoard: Vec::new() }))),
    },
    Saboteur {
        name: "returns receive buffers although nothing was typed",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["console/no-input"],
        make: || serving(|_, _| {}),
    },
    Saboteur {
        name: "completes the same buffer under another's name",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/many-in-flight"],
        make: || {
            serving(|broken, chain| {
                // Data of the request before.
                let len = chain.writable_len() as usize;
                let _ = chain.write(0, &vec![broken.count as u8; len - 1]);
                broken.count += 1;
                status(chain, 0);
            })
        },
    },
    Saboteur {
        name: "panics when it is reset",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["init/status-after-reset", "init/again-after-reset"],
        make: || Arc::new(Wrapped(|honest| Box::new(Panics(honest)))),
    },
    Saboteur {
        name: "serves nothing unless all its queues are set up",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["init/one-queue"],
        make: || Arc::new(Wrapped(|honest| Box::new(AllOrNothing(honest)))),
    },
];
