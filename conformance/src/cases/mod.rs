//! The cases, by area.

use crate::suite::Case;

/// All cases, in the order in which they run.
pub fn all() -> Vec<Case> {
    Vec::new()
}
