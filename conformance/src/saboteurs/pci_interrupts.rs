//! Functions whose messages, pins and interrupt status are broken.

use polyvirt_transports::pci::registers::*;

use super::function::{COMMON, ISR, TABLE, both, capability, reading, set, writing};
use super::pci::saboteurs;
use super::{Place, Saboteur};
use crate::cells::Kind;

const CONFIG: u64 = COMMON + common::CONFIG_VECTOR;
const QUEUE: u64 = COMMON + common::QUEUE_VECTOR;
const NONE: [u8; 2] = NO_VECTOR.to_le_bytes();

pub(super) const SABOTEURS: &[Saboteur] = saboteurs! { Pci:
    "(pci) has one vector", Rng, ["N0365"], ["pci/msix-table"],
        reading(|_, at, data| set(at, data, capability::MSIX + u64::from(MSIX_CONTROL), &[0]));
    "(pci) claims more vectors than it has", Rng, ["N0366"], ["pci/msix-table"],
        reading(|_, at, data| set(at, data, capability::MSIX + u64::from(MSIX_CONTROL), &[0x1f]));
    "(pci) maps the configuration to the first vector only", Rng, ["N0368", "N0372"], ["pci/vectors"],
        writing(|_, at, data| {
            if at == CONFIG && *data != [0, 0] {
                set(at, data, CONFIG, &NONE);
            }
            true
        });
    "(pci) cannot unmap an event", Rng, ["N0369"], ["pci/vectors"],
        writing(|_, at, data| !matches!(at, CONFIG | QUEUE) || *data != NONE);
    "(pci) does not show the vector of a queue", Rng, ["N0370"], ["pci/vectors"],
        reading(|meddler, at, data| if meddler.status == 0 { set(at, data, QUEUE, &NONE) });
    "(pci) shows the vector that was written last", Rng, ["N0371", "N0373"],
        ["pci/vectors", "pci/vectors-after-reset"],
        both(
            |meddler, at, data| {
                if let (QUEUE, Ok(vector)) = (at, <[u8; 2]>::try_from(&*data)) {
                    meddler.seen = u16::from_le_bytes(vector).into();
                }
                true
            },
            |meddler, at, data| set(at, data, QUEUE, &meddler.seen.to_le_bytes()[..2]),
        );
    "(pci) interrupts for a queue that is unmapped", Rng, ["N0386"], ["pci/no-vector"],
        writing(|_, at, data| at != QUEUE || *data != NONE);
    "(pci) interrupts for a configuration that is unmapped", Console, ["N0387"], ["pci/no-vector"],
        writing(|_, at, data| at != CONFIG || *data != NONE);
    "(pci) sends messages that are masked", Rng, ["N0281"], ["pci/masked"],
        writing(|_, at, data| {
            if at >= TABLE && at & 0xf == 12 && at - TABLE < 0x800 {
                data.fill(0);
            }
            true
        });
    "(pci) has an empty interrupt status", Rng, ["N0347"], ["pci/isr"],
        reading(|_, at, data| set(at, data, ISR, &[0]));
    "(pci) does not show its interrupt in the header", Rng, ["N0348"], ["pci/isr"],
        reading(|_, at, data| set(at, data, STATUS.into(), &[STATUS_CAPABILITIES as u8]));
    "(pci) keeps its interrupt status when it is read", Rng, ["N0349"], ["pci/isr"],
        reading(|meddler, at, data| {
            if at == ISR {
                meddler.seen |= u64::from(data[0]);
                data[0] = meddler.seen as u8;
            }
        });
    "(pci) does not show a configuration change while messages are enabled", Console, ["N0346"], ["pci/isr-config"],
        reading(|_, at, data| set(at, data, ISR, &[0]));
};
