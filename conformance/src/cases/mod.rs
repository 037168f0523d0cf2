//! The cases, by area.

pub mod blk;
pub mod blk_cache;
pub mod blk_commands;
pub mod blk_limits;
pub mod chains;
pub mod config;
pub mod console;
pub mod driver;
pub mod drivers;
pub mod features;
pub mod in_order;
pub mod in_order_driver;
pub mod indirect;
pub mod init;
pub mod legacy;
pub mod life;
pub mod mmio;
pub mod mmio_driver;
pub mod mmio_notification;
pub mod notify;
pub mod packed;
pub mod packed_driver;
pub mod pci;
pub mod pci_driver;
pub mod pci_interrupts;
pub mod played;
pub mod ring;
pub mod rng;
pub mod rogue;
pub mod sample;
pub mod scripted;
pub mod suspend;

use crate::suite::Case;

/// All cases for devices of ours, in the order in which they run.
pub fn all() -> Vec<Case> {
    [
        init::CASES,
        features::CASES,
        config::CASES,
        ring::CASES,
        rogue::CASES,
        notify::CASES,
        suspend::CASES,
        packed::CASES,
        chains::CASES,
        indirect::CASES,
        in_order::CASES,
        driver::CASES,
        packed_driver::CASES,
        in_order_driver::CASES,
        mmio::CASES,
        mmio_driver::CASES,
        mmio_notification::CASES,
        pci::CASES,
        pci_interrupts::CASES,
        pci_driver::CASES,
        legacy::CASES,
        blk::CASES,
        blk_commands::CASES,
        blk_cache::CASES,
        blk_limits::CASES,
        rng::CASES,
        console::CASES,
        drivers::CASES,
    ]
    .concat()
}

/// All cases for a device that is someone else's: those of all devices, and those about the life of a daemon.
pub fn of_daemons() -> Vec<Case> {
    [all(), life::cases()].concat()
}
