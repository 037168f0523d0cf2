//! Xen, where this host is not x86-64 Linux: it answers [`HypervisorError::Unavailable`], and its halves cannot exist.

use std::sync::Arc;
use std::time::Duration;

use polyvirt_core::hypervisor::{self, BusDevice, Hypervisor, HypervisorError, Interrupt, Share};
use polyvirt_core::memory::{Access, FlatMemory, Pages};
use polyvirt_transports::xenbus::{self, Channel, GuestPlace, HostPlace, Store};

/// Xen, which is not here.
#[derive(Clone, Copy, Debug)]
pub struct Xen;

impl Hypervisor for Xen {
    type Host = Host;
    type Guest = Guest;
}

/// Why no guest runs.
pub fn available() -> Result<String, HypervisorError> {
    Err(unavailable())
}

/// Fails as [`available`] does.
pub fn start(_ram: usize) -> Result<(Host, Guest), HypervisorError> {
    Err(unavailable())
}

fn unavailable() -> HypervisorError {
    HypervisorError::Unavailable("the Xen port and its model need Linux on x86-64".into())
}

/// The host half.
#[derive(Debug)]
pub enum Host {}

impl hypervisor::Host for Host {
    type Memory = Arc<FlatMemory>;
    type Place = HostPlace;

    fn memory(&self) -> Self::Memory {
        match *self {}
    }

    fn place(&mut self, _device_type: u32, _queues: u16) -> Result<HostPlace, HypervisorError> {
        match *self {}
    }

    fn interrupt(&self, _place: &HostPlace) -> Arc<dyn Interrupt> {
        match *self {}
    }

    fn plug(&mut self, _place: HostPlace, _device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        match *self {}
    }
}

/// The guest half.
#[derive(Debug)]
pub enum Guest {}

impl Share for Guest {
    fn allocate(&self, _len: usize) -> Result<Pages, HypervisorError> {
        match *self {}
    }

    fn share(&self, _pages: &Pages, _access: Access) -> Result<u64, HypervisorError> {
        match *self {}
    }

    fn unshare(&self, _address: u64) -> Result<(), HypervisorError> {
        match *self {}
    }
}

impl hypervisor::Guest for Guest {
    type Place = GuestPlace;

    fn notify(&self, _doorbell: u64, _value: u32) -> Result<(), HypervisorError> {
        match *self {}
    }

    fn wait(&self, _lines: u64, _watchdog: Duration) -> Result<u64, HypervisorError> {
        match *self {}
    }

    fn enumerate(&self) -> Result<Vec<GuestPlace>, HypervisorError> {
        match *self {}
    }
}

impl xenbus::Domain for Guest {
    fn store(&self) -> &dyn Store {
        match *self {}
    }

    fn open_channel(&self) -> Result<Channel, HypervisorError> {
        match *self {}
    }

    fn close_channel(&self, _channel: Channel) -> Result<(), HypervisorError> {
        match *self {}
    }

    fn watch(&self, _path: &str) -> Result<u32, HypervisorError> {
        match *self {}
    }
}
