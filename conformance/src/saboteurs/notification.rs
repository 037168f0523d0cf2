//! Devices that do not understand what a notification says, and drivers that say something else.

use polyvirt_core::Features;
use polyvirt_transports::mmio::registers::*;

use super::bus::{Meddler, Plan};
use super::driver::registers;
use super::{Place, Saboteur};
use crate::cells::Kind;
use crate::suite::RegisterAccess;

pub(super) const SABOTEURS: &[Saboteur] = &[
    Saboteur {
        name: "takes all that a notification says for the queue",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/notification-data", "mmio/notification-data-odd"],
        make: || {
            let write = |_: &mut Meddler, register, value| {
                Some(if register == QUEUE_NOTIFY && value > 0xffff { 0xffff } else { value })
            };
            Plan { write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "believes what a notification says of the ring",
        violates: &[],
        kind: Kind::Console,
        place: Place::Modern,
        breaks: &["mmio/notification-data-odd"],
        make: || {
            let write = |meddler: &mut Meddler, register, value: u32| {
                if register != QUEUE_NOTIFY || !meddler.has(Features::NOTIFICATION_DATA) {
                    return Some(value);
                }
                // As far as the ring goes round.
                assert!(value >> 16 & 0x7fff < 8, "the driver goes on at {:#x}", value >> 16);
                Some(value)
            };
            Plan { write: Some(write), ..Plan::NOTHING }.sabotage()
        },
    },
    Saboteur {
        name: "(driver) does not tell where it goes on",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/driver-notification-data", "mmio/notification-data"],
        make: || {
            registers(|access| match access.offset {
                QUEUE_NOTIFY => vec![RegisterAccess { value: access.value & 0xffff, ..access }],
                _ => vec![access],
            })
        },
    },
    Saboteur {
        name: "(driver) tells something else than where it goes on, asked or not",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["mmio/driver-notification-data"],
        make: || {
            registers(|access| match access.offset {
                QUEUE_NOTIFY => vec![RegisterAccess { value: access.value ^ 1 << 16, ..access }],
                _ => vec![access],
            })
        },
    },
];
