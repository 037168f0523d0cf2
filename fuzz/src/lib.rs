//! What the fuzz targets do with a string of bytes, as functions that a test can call too.
//!
//! Each reads its input as a script: what the other side writes, and when, between the operations of ours. It panics
//! if ours breaks a promise: it panics itself, touches memory that it was not given, works or allocates without bound,
//! or hands out what it must not.

#[path = "../../core/tests/counting/mod.rs"]
pub mod allocations;
mod device;
mod driver;
mod input;
mod pci;
mod ram;
mod registers;

/// A target: takes an input.
pub type Target = fn(&[u8]);

/// Name and function of each target.
pub const TARGETS: [(&str, Target); 6] = [
    ("device_split", device_split),
    ("device_packed", device_packed),
    ("driver_split", driver_split),
    ("driver_packed", driver_packed),
    ("registers", registers),
    ("pci", pci),
];

/// The device role on a split ring of either byte order, in memory that a hostile driver writes.
pub fn device_split(data: &[u8]) {
    device::run(data, false);
}

/// The device role on a packed ring, in memory that a hostile driver writes.
pub fn device_packed(data: &[u8]) {
    device::run(data, true);
}

/// The driver role on a split ring of either byte order that a hostile device writes.
pub fn driver_split(data: &[u8]) {
    driver::run(data, false);
}

/// The driver role on a packed ring that a hostile device writes.
pub fn driver_packed(data: &[u8]) {
    driver::run(data, true);
}

/// A sequence of accesses to the registers of a device behind virtio-mmio, and to the memory of its rings.
pub fn registers(data: &[u8]) {
    registers::run(data);
}

/// A sequence of accesses to a PCI bus with functions of both generations, and to the memory of their rings.
pub fn pci(data: &[u8]) {
    pci::run(data);
}
