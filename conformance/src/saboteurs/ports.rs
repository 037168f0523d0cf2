//! Ports whose mechanisms are broken: the devices on them are honest.

use super::bus::Plan;
use super::{Place, Saboteur};
use crate::cells::{Flaw, Kind};

macro_rules! ports {
    ($($name:literal, $kind:ident, $flaw:ident, $breaks:expr;)*) => {
        &[$(Saboteur {
            name: concat!("(port) ", $name),
            violates: &[],
            kind: Kind::$kind,
            place: Place::Port(Flaw::$flaw),
            breaks: &$breaks,
            make: || Plan::NOTHING.sabotage(),
        }),*]
    };
}

pub(super) const SABOTEURS: &[Saboteur] = ports! {
    "rings no doorbell", Rng, DeafBell, ["notify/interrupt-when-wanted"];
    "has no kick yet", Blk, NoBell, ["notify/interrupt-when-wanted"];
    "rings the doorbell of the first queue, whichever is meant", Console, OneBell, ["notify/interrupt-when-wanted"];
    "does not call a device again that has more to do", Rng, NoSecondCall, ["notify/kick-asked-for-after-a-burst"];
    "does not poll a device that woke it", Console, NoPoll, ["console/input"];
    "lacks the last byte of memory", Console, ByteShort, ["chains/last-byte-of-memory"];
    "has a byte behind the end of memory", Rng, ByteLong, ["chains/edge-of-memory"];
    "forgets who holds a shared line up behind another", Rng, LostPin, ["pci-legacy/shared-line"];
    "takes a shared line for another", Blk, WrongPin, ["pci-legacy/shared-line"];
    "forgets interrupts that came before they are waited for", Rng, Forgetful, ["notify/interrupt-when-wanted"];
};
