//! Devices that are suspended in a wrong way, or not at all.

use polyvirt_core::hypervisor::{BusDevice, Cause};
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio::registers::*;

use super::bus::{Meddler, Plan};
use super::{Place, Saboteur};
use crate::cells::Kind;

const SUSPEND: u32 = Status::SUSPEND.bits() as u32;
const DRIVER_OK: u32 = Status::DRIVER_OK.bits() as u32;

/// The status of a suspended device.
fn suspended(status: u32) -> u32 {
    status & !DRIVER_OK | SUSPEND
}

/// Shows SUSPEND as it was asked to, but keeps it from the device.
const IN_NAME_ONLY: Plan = Plan {
    write: Some(|meddler, register, value| {
        if register == STATUS {
            let resumed = meddler.flag && value & DRIVER_OK != 0;
            meddler.flag = meddler.has(Features::SUSPEND) && value & SUSPEND != 0 && !resumed;
        }
        Some(if register == STATUS { value & !SUSPEND } else { value })
    }),
    read: Some(|meddler, register, value| match register {
        STATUS if meddler.flag => suspended(value),
        _ => value,
    }),
    ..Plan::NOTHING
};

/// The same, and every kick is kept back until SUSPEND has shown for a while.
const BUSY: Plan = Plan {
    before: Some(|_, _| false),
    read: Some(|meddler, register, value| {
        if register != STATUS || !meddler.flag {
            return value;
        }
        meddler.count += 1;
        if meddler.count.is_multiple_of(2) {
            (0..2).for_each(|queue| meddler.tell(QUEUE_NOTIFY, queue));
        }
        suspended(value)
    }),
    ..IN_NAME_ONLY
};

/// A register is written otherwise.
fn writing(write: fn(&mut Meddler, u64, u32) -> Option<u32>) -> Plan {
    Plan { write: Some(write), ..Plan::NOTHING }
}

pub(super) const SABOTEURS: &[Saboteur] = &[
    Saboteur {
        name: "never is suspended, nor says why",
        violates: &["N0278"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["suspend/shows"],
        make: || {
            writing(|_, register, value| Some(if register == STATUS { value & !SUSPEND } else { value })).sabotage()
        },
    },
    Saboteur {
        name: "keeps DRIVER_OK while it is suspended",
        violates: &["N0278"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["suspend/shows"],
        make: || {
            let read = |_: &mut Meddler, register, value| match register {
                STATUS if value & SUSPEND != 0 => value | DRIVER_OK,
                _ => value,
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "never runs again",
        violates: &["N0279"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["suspend/resumes", "suspend/shows"],
        make: || {
            writing(|meddler, register, value| match register {
                STATUS if value != 0 && meddler.status.contains(Status::SUSPEND) => None,
                _ => Some(value),
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "has forgotten its queues when it runs again",
        violates: &["N0279"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["suspend/resumes"],
        make: || {
            writing(|meddler, register, value| {
                if register == STATUS && value & DRIVER_OK != 0 && meddler.status.contains(Status::SUSPEND) {
                    meddler.tell(QUEUE_SEL, 0);
                    meddler.tell(QUEUE_READY, 0);
                }
                Some(value)
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "serves while it is suspended",
        violates: &["N0275"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["suspend/silent"],
        make: || IN_NAME_ONLY.sabotage(),
    },
    Saboteur {
        name: "shows SUSPEND before it has used what it began",
        violates: &["N0280", "N0275"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["suspend/in-flight"],
        make: || BUSY.sabotage(),
    },
    Saboteur {
        name: "does not tell what it used before it is suspended",
        violates: &["N0280"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["suspend/in-flight"],
        make: || Plan { interrupt: Some(|cause| cause == Cause::Config), ..Plan::NOTHING }.sabotage(),
    },
    Saboteur {
        name: "is suspended whenever SUSPEND is written",
        violates: &["N0273"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["suspend/before-driver-ok", "suspend/unasked"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| match register {
                STATUS => value | u32::from((meddler.status & Status::SUSPEND).bits()),
                _ => value,
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "stays suspended over a reset",
        violates: &["N0021"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["suspend/reset"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| {
                meddler.flag |= meddler.status.contains(Status::SUSPEND);
                if register == STATUS && meddler.flag { value | SUSPEND } else { value }
            };
            Plan { read: Some(read), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "takes configuration while it is suspended",
        violates: &["N0274"],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["suspend/configuration-writes"],
        make: || IN_NAME_ONLY.sabotage(),
    },
    Saboteur {
        name: "changes its configuration, and tells so, while it is suspended",
        violates: &["N0275", "N0276"],
        kind: Kind::Blk,
        place: Place::Modern,
        breaks: &["suspend/configuration-changes"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| {
                if register != STATUS || !meddler.flag {
                    return value;
                }
                // Whatever is new is found before the driver looks again.
                meddler.poll();
                suspended(value)
            };
            Plan { read: Some(read), ..IN_NAME_ONLY }.sabotage()
        },
    },
    Saboteur {
        name: "never tells what changed while it was suspended",
        violates: &["N0277"],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["suspend/configuration-changes"],
        make: || {
            let read = |meddler: &mut Meddler, register, value| match register {
                INTERRUPT_STATUS if meddler.flag => value & !CONFIG_CHANGE,
                _ => value,
            };
            let write = |meddler: &mut Meddler, register, value| {
                meddler.flag |= register == STATUS && value & SUSPEND != 0;
                Some(value)
            };
            Plan { read: Some(read), write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
];
