//! The four mechanisms of each hypervisor: memory, kick, interrupt, discovery.
//!
//! A port implements [`polyvirt_core::hypervisor`] for its hypervisor and nothing else: it names no device and touches no
//! ring. [`loopback`] is the smallest one there can be, and the one to read first.

mod flat_share;

pub mod loopback;
