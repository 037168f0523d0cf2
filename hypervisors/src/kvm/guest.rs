//! The guest's side: one vCPU, whose hands do what the driver side asks for.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use polyvirt_core::hypervisor::{self, HypervisorError, Share, WaitForInterrupt};
use polyvirt_core::memory::{Access, Pages};
use polyvirt_transports::mmio::{Place, Registers};

use super::abi;
use super::hands::{self, Command};
use super::host::Bus;
use super::vcpu::Vcpu;
use crate::flat_share::FlatShare;

/// The guest half.
pub struct Guest {
    vcpu: Mutex<Vcpu>,
    /// Held while queueing for the vCPU, so that who waits in rounds does not overtake the others.
    turn: Mutex<()>,
    bus: Arc<Bus>,
    share: FlatShare,
    /// Where the hands' memory is.
    hands: u64,
}

impl Guest {
    pub(super) fn new(vcpu: Vcpu, bus: Arc<Bus>, ram: Pages) -> Self {
        // Page 0 is never handed out: to many a driver, address 0 means none.
        let share = ram.slice(0x1000, ram.len() - 0x1000).expect("RAM has at least a page");
        let hands = ram.len() as u64;
        Self { vcpu: Mutex::new(vcpu), turn: Mutex::new(()), bus, share: FlatShare::new(0x1000, share), hands }
    }

    /// Runs `work` on the vCPU, unless it stopped before. If `work` fails, it has.
    fn with_vcpu<T>(&self, work: impl FnOnce(&mut Vcpu) -> Result<T, String>) -> Result<T, HypervisorError> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(mut vcpu) = self.vcpu.lock() else {
            return Err(HypervisorError::GuestStopped("a device panicked while the vCPU waited for it".into()));
        };
        drop(turn);
        if vcpu.stopped.is_none() {
            match work(&mut vcpu) {
                Ok(result) => return Ok(result),
                Err(reason) => vcpu.stopped = Some(reason),
            }
        }
        Err(HypervisorError::GuestStopped(vcpu.stopped.clone().unwrap_or_default()))
    }

    /// One access of `value.len()` bytes, which `command` does; afterwards they are what was read.
    pub(super) fn access(
        &self,
        (call, command): (&'static str, fn(u32) -> Command),
        most: usize,
        address: u64,
        bytes: &mut [u8],
    ) -> Result<(), HypervisorError> {
        let len = bytes.len();
        if !len.is_power_of_two() || len > most {
            let reason = format!("expected a power of two of bytes up to {most}, got {len}");
            return Err(HypervisorError::Refused { call, reason });
        }
        let mut value = [0; 8];
        value[..len].copy_from_slice(bytes);
        let done = self.with_vcpu(|vcpu| {
            vcpu.run(&self.bus, command(len.trailing_zeros()), address, u64::from_le_bytes(value))
                .map_err(|reason| format!("{call} of {len} bytes at {address:#x}: {reason}"))
        })?;
        bytes.copy_from_slice(&done.to_le_bytes()[..len]);
        Ok(())
    }

    /// Whether what drives the guest is not at `address`.
    fn allowed(&self, call: &'static str, address: u64, len: usize) -> Result<(), HypervisorError> {
        let own = [(self.hands, self.hands + hands::LEN as u64), (abi::DONE, abi::HANDS_END)];
        match own.iter().any(|&(from, to)| address < to && address.saturating_add(len as u64) > from) {
            true => Err(HypervisorError::Refused { call, reason: format!("{address:#x} is what drives the guest") }),
            false => Ok(()),
        }
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

    /// The vCPU runs for it, but briefly: only then do interrupts reach it.
    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        self.with_vcpu(|vcpu| vcpu.take(&self.bus, line))
    }

    fn enumerate(&self) -> Result<Vec<Place>, HypervisorError> {
        self.with_vcpu(|_| Ok(self.bus.places()))
    }
}

impl WaitForInterrupt for Guest {
    fn wait(&self, lines: &[u32], most: Duration) -> Result<bool, HypervisorError> {
        let begun = Instant::now();
        loop {
            let pending = self.with_vcpu(|vcpu| vcpu.wait(&self.bus, lines))?;
            if pending || begun.elapsed() >= most {
                return Ok(pending);
            }
        }
    }
}

impl Registers for Guest {
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.allowed("load", address, data.len())?;
        self.access(("load", Command::Load), 8, address, data)
    }

    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        self.allowed("store", address, data.len())?;
        self.access(("store", Command::Store), 8, address, &mut data.to_vec())
    }
}
