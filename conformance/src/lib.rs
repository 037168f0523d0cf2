//! polyvirt-conformance.
pub mod bench;
