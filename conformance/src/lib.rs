//! polyvirt-conformance.
