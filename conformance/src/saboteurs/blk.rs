//! Disks that do not keep what they say.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Waker;

use polyvirt_core::Features;
use polyvirt_core::device::{Device, Queues};

use super::broken::{Made, Tamper, Wrapped, honest, with};
use super::{Memory, Place, Saboteur};
use crate::cells::{Kind, Sabotage};
use crate::suite::{FarSide, Objection};

/// VIRTIO_BLK_F_FLUSH.
const FLUSH: Features = Features::bit(9);

pub(super) const SABOTEURS: &[Saboteur] = &[
    Saboteur {
        name: "takes every driver for one that flushes",
        violates: &["N0758", "N0812"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/write-through", "blk/writeback-without-flush"],
        make: || Arc::new(Wrapped(|honest| Box::new(Volatile(honest)))),
    },
    Saboteur {
        name: "says more segments than it serves",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/seg-max"],
        make: || with(Tamper { config: Some(|config| say(config, 12, 1100)), ..Tamper::NOTHING }),
    },
    Saboteur {
        name: "says more segments of a discard than it takes",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/discard-limits"],
        make: || with(Tamper { config: Some(|config| say(config, 40, 256)), ..Tamper::NOTHING }),
    },
    Saboteur {
        name: "says no alignment of discards",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/discard-limits"],
        make: || with(Tamper { config: Some(|config| say(config, 44, 0)), ..Tamper::NOTHING }),
    },
    Saboteur {
        name: "says more segments of zeroes than it takes",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/write-zeroes-limits"],
        make: || with(Tamper { config: Some(|config| say(config, 52, 16)), ..Tamper::NOTHING }),
    },
    Saboteur {
        name: "reads its capacity only when it is told of another",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/capacity-before-driver-ok"],
        make: || Arc::new(Wrapped(|honest| Box::new(Late(honest)))),
    },
    Saboteur {
        name: "forgets at a reset what its backend still has",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["blk/resets-with-slow-backend"],
        make: || Arc::<Pile>::default(),
    },
];

/// A configuration that says `value` at `at`.
fn say(config: &mut [u8], at: usize, value: u32) {
    config[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Has writes durable at the next flush, for all drivers.
struct Volatile(Made);

impl Device<Memory> for Volatile {
    honest!(0);

    fn refresh(&mut self) -> bool {
        self.0.refresh()
    }
    fn negotiated(&mut self, features: Features) {
        self.0.negotiated(features | FLUSH);
    }
    fn activate(&mut self, features: Features, waker: Waker) {
        self.0.activate(features | FLUSH, waker);
    }
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, Memory>) {
        self.0.kick(index, queues);
    }
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// Looks at its medium when something is running only.
struct Late(Made);

impl Device<Memory> for Late {
    honest!(0);

    fn negotiated(&mut self, features: Features) {
        self.0.negotiated(features);
    }
    fn activate(&mut self, features: Features, waker: Waker) {
        self.0.activate(features, waker);
    }
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, Memory>) {
        self.0.kick(index, queues);
    }
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// What a backend that hangs has been given by a device that counts only what its queues have.
#[derive(Default)]
struct Pile {
    hangs: Arc<AtomicBool>,
    held: Arc<AtomicUsize>,
}

impl Sabotage<Memory> for Pile {
    fn device(&self, honest: Made) -> Made {
        Box::new(Forgetful { honest, hangs: self.hangs.clone(), held: self.held.clone() })
    }

    fn far_side(&self, honest: Box<dyn FarSide>) -> Box<dyn FarSide> {
        Box::new(Hanging { honest, hangs: self.hangs.clone(), held: self.held.clone() })
    }
}

struct Forgetful {
    honest: Made,
    hangs: Arc<AtomicBool>,
    held: Arc<AtomicUsize>,
}

impl Device<Memory> for Forgetful {
    honest!(honest);

    fn activate(&mut self, features: Features, waker: Waker) {
        self.honest.activate(features, waker);
    }
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, Memory>) {
        if !self.hangs.load(Ordering::Relaxed) {
            return self.honest.kick(index, queues);
        }
        let Some(queue) = queues.get(index) else { return };
        while queue.pop().is_ok() {
            self.held.fetch_add(1, Ordering::Relaxed);
        }
    }
    fn reset(&mut self) {
        self.honest.reset();
    }
}

struct Hanging {
    honest: Box<dyn FarSide>,
    hangs: Arc<AtomicBool>,
    held: Arc<AtomicUsize>,
}

impl FarSide for Hanging {
    fn hang_io(&mut self, hangs: bool) -> Result<(), Objection> {
        self.hangs.store(hangs, Ordering::Relaxed);
        self.honest.hang_io(hangs)
    }
    fn held_io(&mut self) -> Result<usize, Objection> {
        Ok(self.honest.held_io()? + self.held.load(Ordering::Relaxed))
    }
}
