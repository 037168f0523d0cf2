//! The guest half: what drivers in the guest do, done by its payload.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use polyvirt_core::hypervisor::{self, HypervisorError, Share, WaitForInterrupt};
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

    /// Whether the payload took interrupts of `line` since they were last acknowledged, which they are if `acknowledge`.
    fn taken(&self, line: u32, acknowledge: bool) -> bool {
        let mut acknowledged = self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
        let line = line as usize;
        let Some(before) = acknowledged.get_mut(line) else { return false };
        let taken = self.words.load::<u32>(hands::TAKEN as usize / 4 + line, Ordering::Acquire);
        let pending = taken != *before;
        if acknowledge {
            *before = taken;
        }
        pending
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

impl WaitForInterrupt for Guest {
    fn wait(&self, lines: &[u32], most: Duration) -> Result<bool, HypervisorError> {
        // A time beyond what the clock counts to never runs out.
        let deadline = Instant::now().checked_add(most);
        let pending = || lines.iter().any(|&line| self.taken(line, false));
        Ok(self.launcher.wait(deadline, |_| pending().then_some(()))?.is_some())
    }
}

impl hypervisor::Guest for Guest {
    type Place = GuestPlace;

    fn notify(&self, doorbell: u64, _value: u32) -> Result<(), HypervisorError> {
        self.hypercall(LHCALL_NOTIFY, [doorbell, 0, 0]).map(drop)
    }

    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        let now = Some(Instant::now());
        Ok(self.launcher.wait(now, |_| self.taken(line, true).then_some(()))?.is_some())
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
