//! The guest half: drives devices.

use std::sync::{Arc, PoisonError};
use std::task::Waker;
use std::time::Duration;

use polyvirt_core::hypervisor::{self, HypervisorError, Share, WaitForInterrupt, WakeOnInterrupt};
use polyvirt_core::memory::{Access, Pages};
use polyvirt_transports::mmio::{Place, Registers, registers::PLACE_SIZE};
use polyvirt_transports::pci::Space;

use super::{Bus, Lines, SharedDevice, lock};
use crate::flat_share::FlatShare;

/// The guest half.
pub struct Guest {
    pub(super) share: FlatShare,
    pub(super) bus: Arc<Bus>,
}

impl Guest {
    /// The device whose registers are at `address`, and the offset in them.
    fn device(&self, address: u64) -> Result<(SharedDevice, u64), HypervisorError> {
        let offset = address % PLACE_SIZE;
        let devices = lock(&self.bus.devices);
        let found = devices.iter().find(|(place, _)| place.base == address - offset);
        let device = found.map(|(_, device)| (device.clone(), offset));
        device.ok_or_else(|| HypervisorError::Unavailable(format!("no device at {address:#x}")))
    }
}

impl Share for Guest {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        self.share.allocate(len)
    }

    fn share(&self, pages: &Pages, access: Access) -> Result<u64, HypervisorError> {
        self.share.share(pages, access)
    }

    fn unshare(&self, address: u64) -> Result<(), HypervisorError> {
        self.share.unshare(address)
    }
}

impl hypervisor::Guest for Guest {
    type Place = Place;

    fn notify(&self, doorbell: u64, value: u32) -> Result<(), HypervisorError> {
        self.store(doorbell, &value.to_le_bytes())
    }

    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        let mut state = lock(&self.bus.interrupts.lines);
        let came = state.is_pending(line);
        state.pending.remove(&line);
        Ok(came)
    }

    fn enumerate(&self) -> Result<Vec<Place>, HypervisorError> {
        Ok(lock(&self.bus.devices).iter().map(|&(place, _)| place).collect())
    }
}

impl WaitForInterrupt for Guest {
    fn wait(&self, lines: &[u32], most: Duration) -> Result<bool, HypervisorError> {
        let state = lock(&self.bus.interrupts.lines);
        let nothing = |state: &mut Lines| !lines.iter().any(|&line| state.is_pending(line));
        let waited = self.bus.interrupts.arrived.wait_timeout_while(state, most, nothing);
        Ok(!waited.unwrap_or_else(PoisonError::into_inner).1.timed_out())
    }
}

impl WakeOnInterrupt for Guest {
    fn wake_on(&self, lines: &[u32], waker: &Waker) -> Result<(), HypervisorError> {
        self.bus.interrupts.change(|state| {
            state.sleepers.retain(|(others, _)| others != lines);
            state.sleepers.push((lines.into(), waker.clone()));
        });
        Ok(())
    }
}

impl Registers for Guest {
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        if self.bus.pci.get().is_some_and(|root| root.read(Space::Memory, address, data)) {
            return Ok(());
        }
        let (device, offset) = self.device(address)?;
        lock(&device).read(offset, data);
        Ok(())
    }

    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        if self.bus.pci.get().is_some_and(|root| root.write(Space::Memory, address, data)) {
            return Ok(());
        }
        let (device, offset) = self.device(address)?;
        lock(&device).write(offset, data);
        Ok(())
    }
}
