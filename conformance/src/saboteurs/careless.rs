//! Devices that do not look at what a driver writes to their registers, or look too closely.

use polyvirt_core::Features;
use polyvirt_transports::mmio::registers::*;

use super::bus::{Meddler, Plan};
use super::{Place, Saboteur};
use crate::cells::Kind;

const FEATURES_OK: u32 = polyvirt_core::Status::FEATURES_OK.bits() as u32;
const DRIVER_OK: u32 = polyvirt_core::Status::DRIVER_OK.bits() as u32;

pub(super) const SABOTEURS: &[Saboteur] = &[
    Saboteur {
        name: "rounds sizes and addresses of queues to something that works",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/queue-size-odd", "mmio/queue-misaligned", "mmio/queue-nowhere"],
        make: || {
            let write = |meddler: &mut Meddler, register, value: u32| {
                if register == QUEUE_READY && value == 1 {
                    // Whatever the driver wrote about the queue since the last honest set-up is forgotten.
                    let seen = meddler.queues[0];
                    let max = meddler.ask(QUEUE_SIZE_MAX);
                    if !seen.size.is_power_of_two() || u32::from(seen.size) > max {
                        meddler.tell(QUEUE_SIZE, max);
                    }
                    let registers = [QUEUE_DESC_LOW, QUEUE_DRIVER_LOW, QUEUE_DEVICE_LOW];
                    for (low, area) in registers.into_iter().zip(seen.areas) {
                        if area % 16 != 0 || meddler.get::<2048>(area).is_none() {
                            // Some page in the middle of memory, where nothing is.
                            meddler.tell(low, 0x8040_0000 + low as u32 * 0x1000);
                            meddler.tell(low + 4, 0);
                        }
                    }
                }
                Some(value)
            };
            Plan { write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "has as many queues as anyone selects",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/queue-sel-beyond", "driver/no-such-queue"],
        make: || {
            let read = |_: &mut Meddler, register, value: u32| match register {
                QUEUE_SIZE_MAX => value.max(4),
                _ => value,
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "has feature words beyond the last",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/feature-words"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| match register {
                DEVICE_FEATURES if meddler.features_sel > 3 => 1,
                _ => value,
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "panics at what a driver should not do to registers",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &[
            "init/bit-cleared",
            "init/all-bits-at-once",
            "init/no-queue",
            "mmio/any-width-any-offset",
            "mmio/any-write",
            "mmio/notify-beyond",
            "mmio/queue-reset-unasked",
            "mmio/queue-frozen",
            "console/emergency-write-odd",
            "features/without-version-1",
        ],
        make: || {
            let access = |_: &mut Meddler, offset: u64, len: usize, write: bool| {
                assert!(offset.is_multiple_of(len as u64), "misaligned");
                assert!(offset >= CONFIG || len == 4, "width");
                assert!(!write || offset < CONFIG || offset == CONFIG + 8, "read-only");
            };
            let write = |meddler: &mut Meddler, register, value: u32| {
                let status = u32::from(meddler.status.bits());
                match register {
                    STATUS if value != 0 => {
                        assert_eq!(status & !value, 0, "a bit was cleared");
                        assert!(status != 0 || value == 1, "several bits at once");
                        let ready = meddler.queues.iter().any(|queue| queue.ready);
                        assert!(value & DRIVER_OK == 0 || ready, "no queue");
                        let version_1 = meddler.has(Features::VERSION_1);
                        assert!(value & FEATURES_OK == 0 || version_1, "no VERSION_1");
                    }
                    QUEUE_NOTIFY => assert!(value < 2, "no such queue"),
                    QUEUE_RESET => assert!(meddler.has(Features::RING_RESET), "not negotiated"),
                    QUEUE_SIZE => assert!(!meddler.queues[0].ready || status & DRIVER_OK == 0, "in use"),
                    _ => {}
                }
                Some(value)
            };
            Plan { access: Some(access), write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
];
