//! The cases, by area.

pub mod blk;
pub mod chains;
pub mod config;
pub mod console;
pub mod driver;
pub mod drivers;
pub mod features;
pub mod init;
pub mod mmio;
pub mod notify;
pub mod ring;
pub mod rng;
pub mod sample;
pub mod scripted;

use crate::suite::Case;

/// All cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    [
        init::CASES,
        features::CASES,
        config::CASES,
        ring::CASES,
        notify::CASES,
        chains::CASES,
        driver::CASES,
        mmio::CASES,
        blk::CASES,
        rng::CASES,
        console::CASES,
        drivers::CASES,
    ]
    .concat()
}
