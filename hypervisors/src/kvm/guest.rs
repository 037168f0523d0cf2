//! The guest's side: one vCPU, whose hands do what the driver side asks for.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::errno::Errno;
use polyvirt_core::hypervisor::{self, HypervisorError, Share};
use polyvirt_core::memory::{Access, MemoryError, Pages};
use polyvirt_transports::mmio::{Place, Registers};

use super::abi;
use super::hands::{Command, Hands};
use super::host::Bus;
use crate::flat_share::FlatShare;

/// How long the vCPU spins for an interrupt before the host looks at its watch: about a millisecond.
const SPIN_ROUNDS: u64 = 20_000;

/// The guest half.
pub struct Guest {
    vcpu: Mutex<Vcpu>,
    /// Held while queueing for the vCPU, so that who waits in rounds does not overtake the others.
    turn: Mutex<()>,
    bus: Arc<Bus>,
    share: FlatShare,
}

impl Guest {
    pub(super) fn new(fd: VcpuFd, hands: Hands, bus: Arc<Bus>, ram: Pages) -> Self {
        // Page 0 is never handed out: to many a driver, address 0 means none.
        let share = ram.slice(0x1000, ram.len() - 0x1000).expect("RAM has at least a page");
        Self {
            vcpu: Mutex::new(Vcpu { fd, hands, stopped: None }),
            turn: Mutex::new(()),
            bus,
            share: FlatShare::new(0x1000, share),
        }
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

    /// One load or store of `len` bytes; the result is the value loaded.
    fn access(&self, call: &'static str, address: u64, len: usize, value: u64) -> Result<u64, HypervisorError> {
        if !matches!(len, 1 | 2 | 4 | 8) {
            return Err(HypervisorError::Refused { call, reason: format!("expected 1, 2, 4 or 8 bytes, got {len}") });
        }
        if address < abi::HANDS_END && address.saturating_add(len as u64) > abi::HANDS {
            return Err(HypervisorError::Refused { call, reason: format!("{address:#x} is what drives the guest") });
        }
        let width = len.trailing_zeros();
        let command = if call == "load" { Command::Load(width) } else { Command::Store(width) };
        self.with_vcpu(|vcpu| {
            vcpu.run(&self.bus, command, address, value)
                .map_err(|reason| format!("{call} of {len} bytes at {address:#x}: {reason}"))
        })
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

    fn wait(&self, lines: u64, watchdog: Duration) -> Result<u64, HypervisorError> {
        let begun = Instant::now();
        loop {
            let pending = self.with_vcpu(|vcpu| vcpu.wait(&self.bus, lines))?;
            if pending != 0 || begun.elapsed() >= watchdog {
                return Ok(pending);
            }
        }
    }

    fn enumerate(&self) -> Result<Vec<Place>, HypervisorError> {
        self.with_vcpu(|_| Ok(self.bus.places()))
    }
}

impl Registers for Guest {
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        let value = self.access("load", address, data.len(), 0)?;
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
        Ok(())
    }

    fn store(&self, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        let mut value = [0; 8];
        value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        self.access("store", address, data.len(), u64::from_le_bytes(value)).map(drop)
    }
}

/// The processor, with the hands on it.
struct Vcpu {
    fd: VcpuFd,
    hands: Hands,
    /// Why it does not run any more.
    stopped: Option<String>,
}

impl Vcpu {
    /// Lets the hands carry out `command`, and the devices on `bus` answer. Returns the hands' value, or why the
    /// guest cannot go on.
    fn run(&mut self, bus: &Bus, command: Command, address: u64, value: u64) -> Result<u64, String> {
        self.hands.command(command, address, value).map_err(text)?;
        loop {
            let answered = match self.fd.run() {
                Ok(VcpuExit::MmioWrite(abi::DONE, _)) => return self.hands.value().map_err(text),
                Ok(VcpuExit::MmioRead(at, data)) => bus.access(at, |device, offset| device.read(offset, data)),
                Ok(VcpuExit::MmioWrite(at, data)) => bus.access(at, |device, offset| device.write(offset, data)),
                // A signal for this thread.
                Ok(VcpuExit::Intr) => true,
                Err(error) if [Errno::EINTR as i32, Errno::EAGAIN as i32].contains(&error.errno()) => true,
                Ok(exit) => return Err(format!("unexpected exit {exit:?}")),
                Err(error) => return Err(format!("KVM_RUN: {error}")),
            };
            if !answered {
                return Err("no device and no memory is there".into());
            }
        }
    }

    /// Takes what is pending among `lines`; if nothing is, spins a while for it.
    fn wait(&mut self, bus: &Bus, lines: u64) -> Result<u64, String> {
        let pending = self.hands.take_pending(lines).map_err(text)?;
        if pending != 0 {
            return Ok(pending);
        }
        self.run(bus, Command::Wait, SPIN_ROUNDS, lines)?;
        self.hands.take_pending(lines).map_err(text)
    }
}

fn text(error: MemoryError) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::super::machine::Machine;
    use super::*;

    #[test]
    fn the_hands_are_at_cpl_3_before_and_after_what_they_do() {
        if let Err(reason) = super::super::available() {
            println!("skipped: {reason}");
            return;
        }
        let Machine { vm: _vm, vcpu, hands, ram: _ram } = Machine::new(0x2000).unwrap();
        let mut vcpu = Vcpu { fd: vcpu, hands, stopped: None };
        for command in [Command::Store(3), Command::Load(3), Command::Wait] {
            assert_eq!(vcpu.fd.get_sregs().unwrap().cs.dpl, 3);
            assert_eq!(vcpu.run(&Bus::default(), command, 0x1008, 7), Ok(7), "{command:?}");
        }
        assert_eq!(vcpu.fd.get_sregs().unwrap().cs.dpl, 3);
    }
}
