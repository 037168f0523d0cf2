//! Drivers that do something else to a function than they should.

use polyvirt_transports::pci::registers::*;

use super::driver::registers;
use super::function::{COMMON, ISR, NOTIFY, NOTIFY_END, capability};
use super::pci::saboteurs;
use super::{Place, Saboteur};
use crate::cells::Kind;
use crate::suite::RegisterAccess;

const STATUS_BITS: u64 = COMMON + common::DEVICE_STATUS;
const SELECT: u64 = COMMON + common::QUEUE_SELECT;
const SIZE: u64 = COMMON + common::QUEUE_SIZE;
const ENABLE: u64 = COMMON + common::QUEUE_ENABLE;
const RESET: u64 = COMMON + common::QUEUE_RESET;
const VECTOR: u64 = COMMON + common::QUEUE_VECTOR;
const VENDOR: u64 = VENDOR_ID as u64;
const DEVICE: u64 = DEVICE_ID as u64;
const TYPE: u64 = capability::COMMON + CAP_TYPE as u64;
const BAR: u64 = capability::COMMON + CAP_BAR as u64;
const LENGTH: u64 = capability::COMMON + CAP_LENGTH as u64;
const CONTROL: u64 = capability::MSIX + MSIX_CONTROL as u64;

const fn read(offset: u64, len: usize) -> RegisterAccess {
    RegisterAccess { offset, len, value: 0, write: false }
}

const fn write(offset: u64, len: usize, value: u64) -> RegisterAccess {
    RegisterAccess { offset, len, value, write: true }
}

pub(super) const SABOTEURS: &[Saboteur] = saboteurs! { Pci:
    "(driver, pci) reads registers byte by byte", Rng, ["N0292"], ["pci/driver-widths"],
        registers(|access| match access {
            RegisterAccess { offset: COMMON..ISR, len: 2, write: false, .. } => vec![read(access.offset, 1), access],
            _ => vec![access],
        });
    "(driver, pci) writes what is the device's", Rng, ["N0323"], ["pci/driver-order"],
        registers(|access| match access {
            RegisterAccess { offset: SELECT, write: true, .. } => vec![access, write(COMMON + common::NUM_QUEUES, 2, 1)],
            _ => vec![access],
        });
    "(driver, pci) tries a queue of no entries", Rng, ["N0324", "N0325"], ["pci/driver-order"],
        registers(|access| match access {
            RegisterAccess { offset: SIZE, write: true, .. } => vec![write(SIZE, 2, 0), access],
            _ => vec![access],
        });
    "(driver, pci) enables a queue before it sets it up", Rng, ["N0326"], ["pci/driver-order"],
        registers(|access| match access {
            RegisterAccess { offset: SIZE, write: true, .. } => vec![write(ENABLE, 2, 1), access],
            _ => vec![access],
        });
    "(driver, pci) disables a queue", Rng, ["N0328"], ["pci/driver-order"],
        registers(|access| match access {
            RegisterAccess { offset: ENABLE, write: true, .. } => vec![access, write(ENABLE, 2, 0)],
            _ => vec![access],
        });
    "(driver, pci) writes to a capability", Rng, ["N0302"], ["pci/driver-leaves-capabilities"],
        registers(|access| match access {
            RegisterAccess { offset: STATUS_BITS, write: true, .. } => vec![write(TYPE, 1, 1), access],
            _ => vec![access],
        });
    "(driver, pci) aims the window at an odd place", Rng, ["N0362"], ["pci/driver-leaves-capabilities"],
        registers(|access| match access {
            RegisterAccess { offset: STATUS_BITS, write: true, .. } => {
                vec![write(capability::WINDOW + u64::from(CAP_OFFSET), 4, 3), access]
            }
            _ => vec![access],
        });
    "(driver, pci) writes through a window that it has not aimed", Rng, ["N0364"], ["pci/driver-leaves-capabilities"],
        registers(|access| match access {
            RegisterAccess { offset: STATUS_BITS, write: true, .. } => {
                vec![write(capability::WINDOW + u64::from(CAP_DATA), 4, 0), access]
            }
            _ => vec![access],
        });
    "(driver, pci) does not wait for a reset", Rng, ["N0327"], ["pci/driver-waits"],
        registers(|access| match access {
            RegisterAccess { offset: STATUS_BITS, write: true, value: 0, .. } => vec![access, read(SELECT, 2)],
            _ => vec![access],
        });
    "(driver, pci) does not wait for a queue to be reset", Rng, ["N0329"], ["pci/driver-waits"],
        registers(|access| match access {
            RegisterAccess { offset: RESET, write: true, .. } => vec![access, read(SELECT, 2)],
            _ => vec![access],
        });
    "(driver, pci) tries a vector outside the table", Rng, ["N0377"], ["pci/driver-vectors"],
        registers(|access| match access {
            RegisterAccess { offset: VECTOR, write: true, .. } => vec![write(VECTOR, 2, 0x700), access],
            _ => vec![access],
        });
    "(driver, pci) does not make sure that a vector was mapped", Rng, ["N0378"], ["pci/driver-vectors"],
        // That of the configuration is the first, which is what nothing reads as.
        registers(|access| match access {
            RegisterAccess { offset, write: false, .. } if offset == COMMON + common::CONFIG_VECTOR => vec![],
            _ => vec![access],
        });
    "(driver, pci) notifies by the wrong width", Rng, ["N0380", "N0381"], ["pci/driver-notifies"],
        registers(|access| match access {
            RegisterAccess { offset: NOTIFY..NOTIFY_END, .. } => vec![RegisterAccess { len: 6 - access.len, ..access }],
            _ => vec![access],
        });
    "(driver, pci) names another queue than it rings for", Rng, ["N0382", "N0383", "N0384", "N0385"],
        ["pci/driver-notifies"],
        registers(|access| match access {
            RegisterAccess { offset: NOTIFY..NOTIFY_END, .. } => {
                vec![RegisterAccess { value: access.value ^ 1, ..access }]
            }
            _ => vec![access],
        });
    "(driver, pci) looks at the interrupt status all the same", Rng, ["N0350"], ["pci/driver-leaves-isr"],
        registers(|access| match access {
            RegisterAccess { offset: NOTIFY..NOTIFY_END, .. } => vec![access, read(ISR, 1)],
            _ => vec![access],
        });
    "(driver, pci) writes to whatever answers", Rng, ["N0288"], ["pci/driver-not-virtio"],
        registers(|access| match access {
            RegisterAccess { offset: VENDOR, .. } => vec![access, write(STATUS_BITS, 1, 0)],
            _ => vec![access],
        });
    "(driver, pci) takes the revision for the id", Rng, ["N0289", "N0290"], ["pci/driver-not-virtio"],
        registers(|access| match access {
            RegisterAccess { offset: DEVICE, .. } => vec![read(REVISION_ID.into(), 2)],
            _ => vec![access],
        });
    "(driver, pci) takes any capability for the common configuration", Rng, ["N0295"], ["pci/driver-odd-capabilities"],
        // The pin has the same number.
        registers(|access| match access {
            RegisterAccess { offset: TYPE, .. } => vec![access, read(INTERRUPT_PIN.into(), 1)],
            _ => vec![access],
        });
    "(driver, pci) takes any number for a base address register", Rng, ["N0298"], ["pci/driver-odd-capabilities"],
        // Another structure is behind the same one.
        registers(|access| match access {
            RegisterAccess { offset: BAR, .. } => vec![access, read(capability::ISR + u64::from(CAP_BAR), 1)],
            _ => vec![access],
        });
    "(driver, pci) takes a capability's length for its type", Rng, ["N0297"], ["pci/driver-odd-capabilities"],
        registers(|access| match access {
            RegisterAccess { offset: TYPE, .. } => vec![access, read(capability::COMMON + u64::from(CAP_LEN), 1)],
            _ => vec![access],
        });
    "(driver, pci) finds no structure long enough", Rng, ["N0300"], ["pci/driver-odd-capabilities"],
        // What is reserved reads as 0.
        registers(|access| match access {
            RegisterAccess { offset: LENGTH, .. } => vec![access, read(capability::COMMON + u64::from(CAP_ID) + 1, 2)],
            _ => vec![access],
        });
    "(driver, pci) uses the last structure of a type", Rng, ["N0296"], ["pci/driver-first-structure"],
        // What is reserved reads as 0, which is no type.
        registers(|access| match access {
            RegisterAccess { offset: TYPE, .. } => vec![access, read(capability::COMMON + u64::from(CAP_ID), 1)],
            _ => vec![access],
        });
    "(driver, pci) does not look how many vectors there are", Rng, ["N0374", "N0388"], ["pci/driver-few-vectors"],
        // The upper half of the word, which says that they are enabled, for the lower.
        registers(|access| match access {
            RegisterAccess { offset: CONTROL, write: false, .. } => vec![access, read(CONTROL + 1, 1)],
            _ => vec![access],
        });
};
