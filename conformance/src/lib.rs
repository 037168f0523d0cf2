//! The conformance suite: one set of cases for every hypervisor, transport and device.
//!
//! [`suite`] says what a case is and runs it, [`cells`] is where it runs, [`cases`] are all of them, [`raw`] is what
//! they write rings with, [`saboteurs`] are what they have to notice.

pub mod bench;
pub mod cases;
pub mod cells;
pub mod daemon;
pub mod ledger;
pub mod raw;
pub mod saboteurs;
pub mod suite;
