//! Functions whose configuration space, capabilities and common configuration are broken.

use polyvirt_transports::pci::registers::*;

use super::function::{COMMON, DEVICE, NOTIFY, NOTIFY_END, both, capability, reading, set, writing};
use super::{Place, Saboteur};
use crate::cells::Kind;

/// Saboteurs of a place: what it does wrong, its device, what it violates and breaks, and how.
macro_rules! saboteurs {
    ($place:ident: $($name:literal, $kind:ident, [$($violates:literal),*], [$($breaks:literal),*], $sabotage:expr;)*) => {
        &[$(Saboteur {
            name: $name,
            violates: &[$($violates),*],
            kind: Kind::$kind,
            place: Place::$place,
            breaks: &[$($breaks),*],
            make: || $sabotage,
        }),*]
    };
}
pub(super) use saboteurs;

const BAR: u64 = BARS as u64 + 4 * (COMMON >> REGION_SHIFT) - 4;
const STATUS_BITS: u64 = COMMON + common::DEVICE_STATUS;
const FAILED: u8 = 0x80;
const NEEDS_RESET: u8 = 0x40;

/// A field of one of virtio's capabilities.
const fn field(capability: u64, field: u16) -> u64 {
    capability + field as u64
}

pub(super) const SABOTEURS: &[Saboteur] = saboteurs! { Pci:
    // What its first reader would not take is shown once the driver has met the device.
    "(pci) is of another vendor", Rng, ["N0282"], ["pci/identity"],
        reading(|meddler, at, data| if meddler.met { set(at, data, VENDOR_ID.into(), &[0xf5, 0x1a]) });
    "(pci) has the id of another device", Rng, ["N0283"], ["pci/identity"],
        reading(|meddler, at, data| if meddler.met { set(at, data, DEVICE_ID.into(), &[0x41, 0x10]) });
    "(pci) has a transitional id and no legacy interface", Rng, ["N0285"], ["pci/identity"],
        reading(|meddler, at, data| if meddler.met { set(at, data, DEVICE_ID.into(), &[0x05, 0x10]) });
    "(pci) is of revision 0", Rng, ["N0286"], ["pci/identity"],
        reading(|_, at, data| set(at, data, REVISION_ID.into(), &[0]));
    "(pci) has its type for a subsystem", Rng, ["N0287"], ["pci/identity"],
        reading(|_, at, data| set(at, data, SUBSYSTEM_ID.into(), &[4, 0]));

    "(pci) lets its subsystem be written", Rng, ["N0281"], ["pci/header"],
        both(
            |meddler, at, data| {
                if let (true, Ok(word)) = (at == u64::from(SUBSYSTEM_VENDOR_ID), <[u8; 4]>::try_from(&*data)) {
                    (meddler.seen, meddler.flag) = (u32::from_le_bytes(word).into(), true);
                }
                true
            },
            |meddler, at, data| {
                if meddler.flag {
                    set(at, data, SUBSYSTEM_VENDOR_ID.into(), &meddler.seen.to_le_bytes()[..4]);
                }
            },
        );
    "(pci) claims half of what it has", Rng, ["N0281"], ["pci/bars"],
        both(
            |meddler, at, data| {
                meddler.flag = at == BAR && data == [0xff; 4];
                true
            },
            |meddler, at, data| if meddler.flag { set(at, data, BAR, &[0x0c, 0xe0]) },
        );
    "(pci) stays where it was first placed", Rng, ["N0281"], ["pci/bars-move"],
        writing(|meddler, at, _| at != BAR || meddler.ask(COMMAND.into()) == [0, 0]);
    "(pci) has no doorbells where it was moved to", Rng, ["N0281"], ["pci/bars-move"],
        writing(|meddler, at, _| {
            meddler.flag |= at == BAR && meddler.ask(COMMAND.into()) != [0, 0];
            !meddler.flag || !(NOTIFY..NOTIFY_END).contains(&at)
        });
    "(pci) shows the lower half of a word for the upper", Rng, ["N0281"], ["pci/configuration-mechanisms"],
        reading(|meddler, at, data| {
            if (at, data.len()) == (SUBSYSTEM_ID.into(), 2) {
                data.copy_from_slice(&meddler.ask::<2>(SUBSYSTEM_VENDOR_ID.into()));
            }
        });

    "(pci) counts a capability too short", Rng, ["N0303"], ["pci/capabilities"],
        reading(|_, at, data| set(at, data, field(capability::NOTIFY, CAP_LEN), &[16]));
    "(pci) has its common configuration at an odd place", Rng, ["N0306"], ["pci/capabilities"],
        reading(|meddler, at, data| if meddler.met { set(at, data, field(capability::COMMON, CAP_OFFSET), &[2]) });
    "(pci) has no common configuration", Rng, ["N0307"], ["pci/capabilities"],
        reading(|meddler, at, data| if meddler.met { set(at, data, field(capability::COMMON, CAP_TYPE), &[9]) });
    "(pci) has nothing to notify", Rng, ["N0334"], ["pci/capabilities"],
        reading(|meddler, at, data| if meddler.met { set(at, data, field(capability::NOTIFY, CAP_TYPE), &[9]) });
    "(pci) has no interrupt status", Rng, ["N0345"], ["pci/capabilities"],
        reading(|meddler, at, data| if meddler.met { set(at, data, field(capability::ISR, CAP_TYPE), &[9]) });
    "(pci) has its device configuration at an odd place", Rng, ["N0351"], ["pci/capabilities"],
        reading(|_, at, data| set(at, data, field(capability::DEVICE, CAP_OFFSET), &[2]));
    "(pci) has no window", Rng, ["N0359"], ["pci/capabilities"],
        reading(|_, at, data| set(at, data, field(capability::WINDOW, CAP_TYPE), &[9]));

    "(pci) has doorbells of two bytes, but offers NOTIFICATION_DATA", Rng, ["N0340"], ["pci/notify-places"],
        reading(|_, at, data| set(at, data, field(capability::NOTIFY, CAP_MULTIPLIER), &[2]));
    "(pci) has doorbells at an odd place", Rng, ["N0341"], ["pci/notify-places"],
        reading(|_, at, data| set(at, data, field(capability::NOTIFY, CAP_OFFSET), &[2]));
    "(pci) has room for half a doorbell", Rng, ["N0342"], ["pci/notify-places"],
        reading(|_, at, data| set(at, data, field(capability::NOTIFY, CAP_LENGTH), &[2, 0]));
    "(pci) has room for one doorbell", Console, ["N0343", "N0344"], ["pci/notify-places"],
        reading(|_, at, data| set(at, data, field(capability::NOTIFY, CAP_LENGTH), &[4, 0]));

    "(pci) has a window that cannot be looked through", Rng, ["N0361"], ["pci/window"],
        reading(|_, at, data| set(at, data, field(capability::WINDOW, CAP_DATA), &[0; 4]));
    "(pci) has a window that cannot be written through", Rng, ["N0360"], ["pci/window"],
        writing(|_, at, _| at != field(capability::WINDOW, CAP_DATA));
    "(pci) does not expect a window to nowhere", Rng, [], ["pci/window-anything"],
        reading(|meddler, at, _| {
            let data = field(capability::WINDOW, CAP_DATA);
            if (data..data + 4).contains(&at) {
                let [bar] = meddler.ask(field(capability::WINDOW, CAP_BAR));
                assert!(bar < BAR_COUNT, "a window to {bar}");
            }
        });

    "(pci) offers features beyond the last word", Rng, ["N0308"], ["pci/feature-words"],
        reading(|meddler, at, data| {
            let select = meddler.ask(COMMON + common::DEVICE_FEATURE_SELECT).map(u32::from);
            if select != [select[0] % 4, 0, 0, 0] {
                set(at, data, COMMON + common::DEVICE_FEATURE, &[0xff; 4]);
            }
        });
    "(pci) does not show which features were accepted", Rng, ["N0309"], ["pci/feature-words"],
        reading(|_, at, data| set(at, data, COMMON + common::DRIVER_FEATURE, &[0; 4]));
    "(pci) cannot be reset while it runs", Rng, ["N0312"], ["pci/reset"],
        writing(|meddler, at, data| at != STATUS_BITS || *data != [0] || !meddler.running());
    "(pci) has its queues enabled after a reset", Rng, ["N0313"], ["pci/reset"],
        reading(|meddler, at, data| {
            if meddler.resets > 0 && meddler.status == 0 {
                set(at, data, COMMON + common::QUEUE_ENABLE, &[1]);
            }
        });
    "(pci) resets its queues for ever after a reset", Rng, ["N0314"], ["pci/reset"],
        reading(|meddler, at, data| {
            if meddler.resets > 0 && meddler.status == 0 {
                set(at, data, COMMON + common::QUEUE_RESET, &[1]);
            }
        });
    "(pci) says that a queue is being reset when it is not", Rng, ["N0315"], ["pci/queue-reset"],
        reading(|meddler, at, data| if meddler.running() { set(at, data, COMMON + common::QUEUE_RESET, &[1]) });
    "(pci) says that it reset a queue, and goes on with it", Rng, ["N0316"], ["pci/queue-reset"],
        both(
            |meddler, at, _| {
                meddler.flag = meddler.running() && (meddler.flag || at == COMMON + common::QUEUE_RESET);
                at != COMMON + common::QUEUE_RESET
            },
            |meddler, at, data| if meddler.flag { set(at, data, COMMON + common::QUEUE_ENABLE, &[0]) },
        );
    "(pci) resets a queue, and says that it is enabled", Rng, ["N0318"], ["pci/queue-reset"],
        reading(|meddler, at, data| if meddler.running() { set(at, data, COMMON + common::QUEUE_ENABLE, &[1]) });
    "(pci) has queues without end", Rng, ["N0319"], ["pci/queue-sizes"],
        reading(|meddler, at, data| if meddler.queue > 0xff { set(at, data, COMMON + common::QUEUE_SIZE, &[8, 0]) });
    "(pci) has queues of any size", Rng, ["N0320"], ["pci/queue-sizes"],
        reading(|meddler, at, data| if meddler.status == 0 { set(at, data, COMMON + common::QUEUE_SIZE, &[6, 0]) });
    "(pci) says nothing of a queue that cannot be", Rng, [], ["pci/queue-odd"],
        reading(|meddler, at, data| {
            let [status] = meddler.ask(STATUS_BITS);
            set(at, data, STATUS_BITS, &[status & !NEEDS_RESET]);
            if meddler.running() {
                set(at, data, COMMON + common::QUEUE_ENABLE, &[1]);
            }
        });
    "(pci) gives up when a queue in use is written to", Rng, [], ["pci/queue-frozen"],
        writing(|meddler, at, _| {
            if at == COMMON + common::QUEUE_DESC && meddler.running() {
                meddler.tell(STATUS_BITS, &[FAILED]);
            }
            true
        });
    "(pci) shows no Bus Master Enable, and reaches memory all the same", Rng, ["N0281"],
        ["pci/bus-master", "pci/bus-master-messages"],
        both(
            |meddler, at, data| {
                if at == u64::from(COMMAND) {
                    meddler.seen = u64::from(data[0] & COMMAND_MASTER as u8);
                    data[0] |= COMMAND_MASTER as u8;
                }
                true
            },
            |meddler, at, data| {
                if at == u64::from(COMMAND) {
                    data[0] = data[0] & !(COMMAND_MASTER as u8) | meddler.seen as u8;
                }
            },
        );
    "(pci) does not go on when it is a bus master again", Rng, ["N0281"], ["pci/bus-master"],
        writing(|meddler, at, data| {
            if at == u64::from(COMMAND) {
                meddler.flag |= meddler.running() && data[0] & COMMAND_MASTER as u8 == 0;
                if meddler.flag {
                    data[0] &= !(COMMAND_MASTER as u8);
                }
            }
            true
        });
    "(pci) has one generation for all configurations", Console, ["N0311"], ["pci/config-generation"],
        reading(|_, at, data| set(at, data, COMMON + common::CONFIG_GENERATION, &[0]));
    "(pci) has the upper half of a field after the lower only", Blk, ["N0294"], ["pci/config-halves"],
        reading(|meddler, at, data| {
            if (at, data.len(), meddler.flag) == (DEVICE + 4, 4, false) {
                data.fill(0xff);
            }
            meddler.flag = (at, data.len()) == (DEVICE, 4);
        });
    "(pci) has an administration queue that was not negotiated", Rng, [], ["pci/no-admin-queues"],
        reading(|_, at, data| set(at, data, COMMON + common::ADMIN_QUEUE_NUM, &[1]));
    "(pci) expects no access wider than its fields", Rng, [], ["pci/any-access"],
        reading(|_, _, data| assert!(data.len() < 8, "a read of {} bytes", data.len()));
};
