//! polyvirt-hypervisors.
