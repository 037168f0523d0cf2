//! virtio-pci and its host, access by access.

mod anything;
mod driver;
mod function;
mod host;
mod legacy;
mod machine;
mod shared;
