//! The guest half: what drivers in the guest do, done by its payload.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use polyvirt_core::hypervisor::{self, HypervisorError, Share};
use polyvirt_core::memory::{Access, Pages, Words};
use polyvirt_transports::lguest::GuestPlace;
use polyvirt_transports::lguest::registers::descriptors;

use super::abi::{LGUEST_IRQS, LHCALL_NOTIFY, PAGE};
use super::hands;
use super::host::Host;
use super::launcher::Launcher;
use crate::flat_share::FlatShare;

/// The guest half.
///
/// Once the guest is gone, every call fails with [`HypervisorError::GuestStopped`] and the reason.
pub struct Guest {
    launcher: Arc<Launcher>,
    share: FlatShare,
    /// The memory above RAM, and its guest-physical address.
    devices: (Pages, u64),
    /// All memory.
    words: Words<u64, Arc<dyn std::any::Any + Send + Sync>>,
    /// Held during a hypercall: there is one mailbox.
    turn: Mutex<()>,
    /// How many interrupts of each line were acknowledged.
    acknowledged: Mutex<[u32; LGUEST_IRQS as usize]>,
}

impl Guest {
    pub(super) fn new(host: &Host, memory: Pages) -> Result<Self, HypervisorError> {
        let (start, end) = (hands::PAGES * PAGE, host.devices.1);
        let ram = memory.slice(start as usize, (end - start) as usize).ok_or(HypervisorError::Exhausted("memory"))?;
        let refused = |error| HypervisorError::Refused { call: "start", reason: format!("{error}") };
        Ok(Self {
            launcher: Arc::clone(host.launcher()),
            share: FlatShare::new(start, ram),
            devices: host.devices.clone(),
            words: Words::new(memory).map_err(refused)?,
            turn: Mutex::new(()),
            acknowledged: Mutex::default(),
        })
    }

    /// Makes a hypercall: eax, and edx, ebx, ecx. Returns what the launcher leaves in eax.
    pub fn hypercall(&self, number: u64, arguments: [u64; 3]) -> Result<u64, HypervisorError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (register, command) = (hands::CALL_REGISTERS as usize / 8, hands::COMMAND as usize / 4);
        for (index, value) in [number].into_iter().chain(arguments).enumerate() {
            self.words.store(register + index, value, Ordering::Relaxed);
        }
        self.launcher.post(|inbox| {
            self.words.store(command, hands::CALL, Ordering::Release);
            (inbox.command, inbox.completed) = (true, false);
        })?;
        self.launcher.wait(None, |inbox| inbox.completed.then_some(()))?;
        Ok(self.words.load(register, Ordering::Relaxed))
    }

    /// Acknowledges the interrupts of `lines` that the payload took since they were last acknowledged.
    fn acknowledge(&self, lines: u64) -> Option<u64> {
        let mut acknowledged = self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pending = 0;
        for (line, before) in acknowledged.iter_mut().enumerate().filter(|(line, _)| lines & 1 << line != 0) {
            let taken = self.words.load::<u32>(hands::TAKEN as usize / 4 + line, Ordering::Acquire);
            pending |= u64::from(taken != *before) << line;
            *before = taken;
        }
        (pending != 0).then_some(pending)
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
    type Place = GuestPlace;

    fn notify(&self, doorbell: u64, _value: u32) -> Result<(), HypervisorError> {
        self.hypercall(LHCALL_NOTIFY, [doorbell, 0, 0]).map(drop)
    }

    fn wait(&self, lines: u64, watchdog: Duration) -> Result<u64, HypervisorError> {
        // A watchdog beyond what the clock counts to never runs out.
        let deadline = Instant::now().checked_add(watchdog);
        Ok(self.launcher.wait(deadline, |_| self.acknowledge(lines))?.unwrap_or(0))
    }

    fn enumerate(&self) -> Result<Vec<GuestPlace>, HypervisorError> {
        let (memory, address) = &self.devices;
        let refused = |error| HypervisorError::Refused { call: "enumerate", reason: format!("{error}") };
        let place = |offset| GuestPlace { memory: memory.clone(), address: *address, offset };
        // Asked of the guest, which is gone for all that its memory still tells.
        self.launcher.post(|_| ())?;
        Ok(descriptors(memory).map_err(refused)?.into_iter().map(place).collect())
    }
}
