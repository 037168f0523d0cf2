//! The cases, by area.

pub mod chains;
pub mod features;
pub mod init;
pub mod ring;
pub mod sample;

use crate::suite::Case;

/// All cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    [init::CASES, features::CASES, ring::CASES, chains::CASES].concat()
}
