//! Devices whose legacy interface is broken, behind ports and behind version 1 of virtio-mmio.

use polyvirt_core::Status;
use polyvirt_core::queue::{DriverQueue, Layout};
use polyvirt_transports::mmio::registers as mmio;
use polyvirt_transports::pci::registers::{COMMAND, COMMAND_MASTER, DEVICE_ID, REVISION_ID, common, legacy};

use super::bus::Plan;
use super::driver::role;
use super::function::{COMMON, PORTS, both, reading, set, writing};
use super::naive::{Fault, Naive};
use super::pci::saboteurs;
use super::{Place, Saboteur};
use crate::cells::Kind;

pub(super) const PCI: &[Saboteur] = saboteurs! { PciLegacy:
    "(pci-legacy) has the id of another device", Rng, [], ["pci-legacy/identity"],
        reading(|_, at, data| set(at, data, DEVICE_ID.into(), &[0x3f, 0x10]));
    "(pci-legacy) is of another revision when it is looked at again", Rng, [], ["pci-legacy/identity"],
        reading(|meddler, at, data| {
            meddler.seen += u64::from(at == u64::from(REVISION_ID));
            if meddler.seen > 1 {
                set(at, data, REVISION_ID.into(), &[1]);
            }
        });
    "(pci-legacy) shows the page of a queue before the last", Rng, [], ["pci-legacy/registers"],
        reading(|meddler, at, data| {
            if (at, meddler.running()) == (PORTS + legacy::QUEUE_ADDRESS, true) {
                data[0] = data[0].wrapping_sub(1);
            }
        });
    "(pci-legacy) has queues without end", Rng, [], ["pci-legacy/registers"],
        reading(|meddler, at, data| if meddler.queue > 0xff { set(at, data, PORTS + legacy::QUEUE_SIZE, &[8, 0]) });
    "(pci-legacy) keeps its interrupt status when it is read", Rng, [], ["pci-legacy/isr"],
        reading(|meddler, at, data| {
            if at == PORTS + legacy::ISR {
                meddler.seen |= u64::from(data[0]);
                data[0] = meddler.seen as u8;
            }
        });
    "(pci-legacy) has no vectors before its configuration", Rng, [], ["pci-legacy/vectors-move-configuration"],
        reading(|_, at, data| set(at, data, PORTS + legacy::CONFIG_VECTOR, &[0; 4]));
    "(pci-legacy) answers only words of configuration", Blk, [], ["pci-legacy/any-width"],
        reading(|_, at, data| if data.len() < 4 && at >= PORTS + legacy::config(false) { data.fill(0xff) });
    "(pci-legacy) expects no access across registers", Rng, [], ["pci-legacy/any-access"],
        writing(|_, at, data| {
            assert!(at < PORTS || at.is_multiple_of(data.len() as u64), "{} bytes at {at:#x}", data.len());
            true
        });
    "(pci-legacy) shows no Bus Master Enable, and reaches memory all the same", Rng, [], ["pci-legacy/bus-master"],
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
    "(pci-legacy) has ports that take back a modern driver's queue", Rng, [], ["pci-legacy/other-interface"],
        both(
            |meddler, at, data| {
                meddler.flag |= at == PORTS + legacy::QUEUE_ADDRESS && *data == [0; 4];
                true
            },
            |meddler, at, data| if meddler.flag { set(at, data, COMMON + common::QUEUE_ENABLE, &[0]) },
        );
    "(pci-legacy) has registers that end what a legacy driver does", Rng, [], ["pci-legacy/other-interface"],
        writing(|meddler, at, data| {
            if at == COMMON + common::DEVICE_STATUS && *data == [0x80] {
                meddler.tell(PORTS + legacy::DEVICE_STATUS, &[0x80]);
            }
            true
        });
    "(pci-legacy) hears no kick before DRIVER_OK", Rng, [], ["legacy/used-before-driver-ok"],
        writing(|meddler, at, _| at != PORTS + legacy::QUEUE_NOTIFY || meddler.running());
};

pub(super) const MMIO: &[Saboteur] = saboteurs! { MmioLegacy:
    "(mmio-legacy driver) stops at a used length that counts too much", Rng, [], ["driver/legacy-used-length"],
        role(|mut virtqueue| {
            // The same rings to the byte, as a device of today has them.
            virtqueue.config.layout = Layout::Modern;
            Ok(Box::new(DriverQueue::<u32>::new(virtqueue)?))
        });
    "(mmio-legacy driver) believes any used length", Rng, [], ["driver/legacy-used-length"],
        role(|virtqueue| Naive::make(virtqueue, Fault::NONE));
    "(mmio-legacy) is of another version when it is looked at again", Rng, [], ["mmio-legacy/identity"],
        Plan {
            read: Some(|meddler, register, value| {
                meddler.count += usize::from(register == mmio::VERSION);
                if register == mmio::VERSION && meddler.count > 1 { 2 } else { value }
            }),
            ..Plan::NOTHING
        }
        .sabotage();
    "(mmio-legacy) does not show where a queue is", Rng, [], ["mmio-legacy/queue-page"],
        Plan {
            read: Some(|_, register, value| if register == mmio::LEGACY_QUEUE_PAGE { 0 } else { value }),
            ..Plan::NOTHING
        }
        .sabotage();
    "(mmio-legacy) keeps a queue that is taken back", Rng, [], ["mmio-legacy/queue-page"],
        Plan {
            write: Some(|_, register, value| {
                (register != mmio::LEGACY_QUEUE_PAGE || value != 0).then_some(value)
            }),
            ..Plan::NOTHING
        }
        .sabotage();
    "(mmio-legacy) expects only alignments that can be", Rng, [], ["mmio-legacy/odd-places"],
        Plan {
            write: Some(|_, register, value| {
                assert!(register != mmio::LEGACY_QUEUE_ALIGN || value.is_power_of_two(), "alignment {value}");
                Some(value)
            }),
            ..Plan::NOTHING
        }
        .sabotage();
    "(mmio-legacy) expects only words", Rng, [], ["mmio-legacy/any-access"],
        Plan {
            access: Some(|_, at, len, _| assert!(at >= mmio::CONFIG || len == 4, "{len} bytes at {at:#x}")),
            ..Plan::NOTHING
        }
        .sabotage();
    "(mmio-legacy) hears no kick before DRIVER_OK", Rng, [], ["legacy/used-before-driver-ok"],
        Plan { before: Some(|meddler, _| meddler.status.contains(Status::DRIVER_OK)), ..Plan::NOTHING }.sabotage();
};
