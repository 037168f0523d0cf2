//! Devices whose registers are broken.

use polyvirt_core::hypervisor::Cause;
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio::registers::*;

use super::bus::{Meddler, Plan};
use super::{Place, Saboteur};
use crate::cells::Kind;

const NEEDS_RESET: u32 = Status::DEVICE_NEEDS_RESET.bits() as u32;
const FEATURES_OK: u32 = Status::FEATURES_OK.bits() as u32;
const DRIVER_OK: u32 = Status::DRIVER_OK.bits() as u32;
const FAILED: u32 = Status::FAILED.bits() as u32;

pub(super) const SABOTEURS: &[Saboteur] = &[
    Saboteur {
        name: "remembers a status bit over a reset",
        violates: &["N0021"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["init/status-after-reset"],
        make: || {
            // The first read after the reset is honest: the driver waits for it.
            let write = |meddler: &mut Meddler, register, value| {
                if register == STATUS {
                    meddler.count = 0;
                }
                Some(value)
            };
            let read = |meddler: &mut Meddler, register, value| {
                if register != STATUS || value != 0 || meddler.resets == 0 {
                    return value;
                }
                meddler.count += 1;
                u32::from(meddler.count > 1)
            };
            Plan { read: Some(read), write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "does not show the bit DRIVER",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["init/status-as-written"],
        make: || {
            Plan {
                read: Some(|_, register, value| if register == STATUS { value & !2 } else { value }),
                ..Plan::NOTHING
            }
            .sabotage()
        },
    },
    Saboteur {
        name: "accepts features that it does not offer",
        violates: &["N0018"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["features/not-offered"],
        make: || {
            let write = |meddler: &mut Meddler, register, value| {
                if register != DRIVER_FEATURES {
                    return Some(value);
                }
                let sel = meddler.features_sel;
                meddler.tell(DEVICE_FEATURES_SEL, sel);
                Some(value & meddler.ask(DEVICE_FEATURES))
            };
            Plan { write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "offers a feature that it refuses",
        violates: &["N0019", "N0018"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["features/all-offered", "features/each-alone"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| match register {
                // VIRTIO_F_SR_IOV.
                DEVICE_FEATURES if meddler.features_sel == 1 => value | 1 << 5,
                _ => value,
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "does not offer VERSION_1",
        violates: &["N1586"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["features/version-1"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| match register {
                DEVICE_FEATURES if meddler.features_sel == 1 => value & !1,
                _ => value,
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "wants all its features accepted",
        violates: &["N0017"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["features/none", "features/each-alone"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| match register {
                STATUS if !meddler.has(Features::INDIRECT_DESC | Features::EVENT_IDX) => value & !FEATURES_OK,
                _ => value,
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "negotiates once and never again",
        violates: &["N0020"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["features/again", "init/again-after-reset"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| match register {
                STATUS if meddler.resets > 1 => value & !FEATURES_OK,
                _ => value,
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "takes features until DRIVER_OK",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["features/frozen"],
        make: || {
            // FEATURES_OK reaches the device only with DRIVER_OK.
            let write = |meddler: &mut Meddler, register, value| {
                if register != STATUS || value & FEATURES_OK == 0 {
                    return Some(value);
                }
                if value & DRIVER_OK != 0 {
                    meddler.tell(STATUS, value & !DRIVER_OK);
                    return Some(value);
                }
                Some(value & !FEATURES_OK)
            };
            let read = |_: &mut Meddler, register, value| match register {
                STATUS if value & 3 == 3 => value | FEATURES_OK,
                _ => value,
            };
            Plan { read: Some(read), write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "goes on after FAILED",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["init/failed"],
        make: || {
            let write = |meddler: &mut Meddler, register, value| {
                if register == STATUS {
                    meddler.flag = value & FAILED != 0 || meddler.flag && value != 0;
                    return Some(value & !FAILED);
                }
                Some(value)
            };
            let read = |meddler: &mut Meddler, register, value| match register {
                STATUS if meddler.flag => value | FAILED,
                _ => value,
            };
            Plan { read: Some(read), write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "starts over at a second DRIVER_OK",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["init/driver-ok-twice"],
        make: || {
            let write = |meddler: &mut Meddler, register, value| {
                if register == STATUS && value & DRIVER_OK != 0 && meddler.status.contains(Status::DRIVER_OK) {
                    meddler.tell(STATUS, 0);
                }
                Some(value)
            };
            Plan { write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "hides that it needs a reset",
        violates: &["N0006"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["init/needs-reset-is-told"],
        make: || {
            let read = |_: &mut Meddler, register, value| match register {
                STATUS => value & !NEEDS_RESET,
                _ => value,
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "never notifies of configuration",
        violates: &["N0007", "N0801"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["init/needs-reset-is-told", "config/change-is-told", "blk/capacity-changes"],
        make: || Plan { interrupt: Some(|cause| cause != Cause::Config), ..Plan::NOTHING }.sabotage(),
    },
    Saboteur {
        name: "never notifies of used buffers",
        violates: &["N0062", "N0064"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["notify/interrupt-when-wanted", "notify/used-event-reached"],
        make: || Plan { interrupt: Some(|cause| cause == Cause::Config), ..Plan::NOTHING }.sabotage(),
    },
    Saboteur {
        name: "has one generation for all configurations",
        violates: &["N0394"],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["config/generation", "mmio/config-generation"],
        make: || {
            let read = |_: &mut Meddler, register, value| if register == CONFIG_GENERATION { 0 } else { value };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "mixes two configurations under one generation",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["config/changes-while-read"],
        make: || {
            let config = |meddler: &mut Meddler, offset, data: &mut [u8]| {
                if offset >= 2 && meddler.status.contains(Status::DRIVER_OK) {
                    data.iter_mut().for_each(|byte| *byte ^= 3);
                }
            };
            Plan { config: Some(config), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "has no configuration before FEATURES_OK",
        violates: &["N0029"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["config/before-features-ok"],
        make: || {
            let config = |meddler: &mut Meddler, _, data: &mut [u8]| {
                if !meddler.status.contains(Status::FEATURES_OK) {
                    data.fill(0);
                }
            };
            Plan { config: Some(config), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "answers only words of configuration",
        violates: &[],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["config/width-makes-no-difference"],
        make: || {
            let config = |_: &mut Meddler, _, data: &mut [u8]| {
                if data.len() < 4 {
                    data.fill(0xff);
                }
            };
            Plan { config: Some(config), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "has configuration without end",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/config-beyond-end"],
        make: || Plan { config: Some(|_, _, data| data.fill(0xff)), ..Plan::NOTHING }.sabotage(),
    },
    Saboteur {
        name: "changes its magic value",
        violates: &["N0389"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/identity"],
        make: || {
            // The first reader is the driver, who would turn away.
            let read = |meddler: &mut Meddler, register, value| {
                meddler.count += usize::from(register == MAGIC_VALUE);
                if register == MAGIC_VALUE && meddler.count > 1 { value + 1 } else { value }
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "changes its version",
        violates: &["N0390"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/identity"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| {
                meddler.count += usize::from(register == VERSION);
                if register == VERSION && meddler.count > 1 { 1 } else { value }
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "sets bits of InterruptStatus for nothing",
        violates: &["N0392"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/interrupt-status"],
        make: || {
            let read = |_: &mut Meddler, register, value| {
                if register == INTERRUPT_STATUS { value | 2 } else { value }
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "acknowledges everything at any acknowledgement",
        violates: &["N0391"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/acknowledge-nothing"],
        make: || {
            let write = |_: &mut Meddler, register, value| Some(if register == INTERRUPT_ACK { 3 } else { value });
            Plan { write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "keeps InterruptStatus over a reset",
        violates: &["N0393"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/reset-clears"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| {
                if register != INTERRUPT_STATUS {
                    return value;
                }
                meddler.flag |= value != 0;
                if meddler.status.is_empty() { u32::from(meddler.flag) } else { value }
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "says that no queue is ready",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/queue-ready-reads-back"],
        make: || {
            let read = |_: &mut Meddler, register, value| if register == QUEUE_READY { 0 } else { value };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "goes on with a queue that is not ready",
        violates: &["N0395"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/queue-ready-0", "mmio/queue-ready-back-to-0"],
        make: || {
            let write = |_: &mut Meddler, register, value| match (register, value) {
                (QUEUE_READY, 0) => None,
                _ => Some(value),
            };
            let read = |meddler: &mut Meddler, register, value| match register {
                QUEUE_READY if !meddler.queues[0].ready => 0,
                _ => value,
            };
            Plan { read: Some(read), write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "says that it reset a queue, and goes on with it",
        violates: &["N0030", "N0031", "N0398", "N0400"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/reset-alone", "mmio/queue-reset"],
        make: || {
            let write = |_: &mut Meddler, register, value| (register != QUEUE_RESET).then_some(value);
            Plan { write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "says that a queue is being reset when it is not",
        violates: &["N0396", "N0397"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/queue-reset"],
        make: || {
            let read = |_: &mut Meddler, register, value| if register == QUEUE_RESET { 1 } else { value };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "does not look at the size of a queue that was reset",
        violates: &["N0034"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/reset-and-resized"],
        make: || {
            let write = |meddler: &mut Meddler, register, value| {
                meddler.flag |= register == QUEUE_RESET;
                (register != QUEUE_SIZE || !meddler.flag).then_some(value)
            };
            Plan { write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "has one size of queue",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["ring/small-queue"],
        make: || {
            let write = |_: &mut Meddler, register, value| (register != QUEUE_SIZE).then_some(value);
            Plan { write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
];
