//! polyvirt-devices.
