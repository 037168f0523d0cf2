//! polyvirt-transports.
