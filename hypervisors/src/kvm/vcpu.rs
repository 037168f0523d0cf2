//! The processor of the guest: it runs for as long as its hands take for one command.

use kvm_bindings::kvm_sregs;
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::errno::Errno;
use polyvirt_core::memory::MemoryError;
use polyvirt_transports::pci::Space;

use super::abi;
use super::hands::{Command, Hands};
use super::host::Bus;
use super::machine;

/// How long the vCPU spins for an interrupt before the host looks at its watch: about a millisecond.
const SPIN_ROUNDS: u64 = 20_000;

/// The processor, with the hands on it.
pub(super) struct Vcpu {
    fd: VcpuFd,
    hands: Hands,
    /// Why it does not run any more.
    pub(super) stopped: Option<String>,
}

impl Vcpu {
    /// The processor `fd`, with `hands` in its memory.
    pub(super) fn new(fd: VcpuFd, hands: Hands) -> Self {
        Self { fd, hands, stopped: None }
    }

    /// Lets the hands carry out `command`, and the devices on `bus` answer. Returns the hands' value, or why the
    /// guest cannot go on.
    pub(super) fn run(&mut self, bus: &Bus, command: Command, address: u64, value: u64) -> Result<u64, String> {
        // Not every KVM lets CPL 3 have ports.
        if !matches!(command, Command::Input(_) | Command::Output(_)) {
            return self.carry_out(bus, command, address, value);
        }
        self.enter(machine::enter_cpl0)?;
        let done = self.carry_out(bus, command, address, value);
        self.enter(machine::enter_cpl3)?;
        done
    }

    /// Has the processor go on in another ring.
    fn enter(&self, ring: fn(&mut kvm_sregs)) -> Result<(), String> {
        let mut sregs = self.fd.get_sregs().map_err(|error| format!("KVM_GET_SREGS: {error}"))?;
        ring(&mut sregs);
        self.fd.set_sregs(&sregs).map_err(|error| format!("KVM_SET_SREGS: {error}"))
    }

    fn carry_out(&mut self, bus: &Bus, command: Command, address: u64, value: u64) -> Result<u64, String> {
        self.hands.command(command, address, value).map_err(text)?;
        loop {
            let answered = match self.fd.run() {
                Ok(VcpuExit::MmioWrite(abi::DONE, _)) => return self.hands.value().map_err(text),
                Ok(VcpuExit::MmioRead(at, data)) => bus.read(Space::Memory, at, data),
                Ok(VcpuExit::MmioWrite(at, data)) => bus.write(Space::Memory, at, data),
                Ok(VcpuExit::IoIn(port, data)) => bus.read(Space::Io, port.into(), data),
                Ok(VcpuExit::IoOut(port, data)) => bus.write(Space::Io, port.into(), data),
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
    pub(super) fn wait(&mut self, bus: &Bus, lines: u64) -> Result<u64, String> {
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
    use std::sync::Arc;

    use polyvirt_transports::pci::Root;

    use super::super::machine::Machine;
    use super::*;

    #[test]
    fn the_hands_are_at_cpl_3_before_and_after_what_they_do() {
        if let Err(reason) = super::super::available() {
            println!("skipped: {reason}");
            return;
        }
        let Machine { vm: _vm, routes: _routes, vcpu, hands, ram: _ram } = Machine::new(0x2000).unwrap();
        let mut vcpu = Vcpu::new(vcpu, hands);
        let bus = Bus::default();
        assert!(bus.pci.set(Arc::new(Root::new(abi::PCI))).is_ok());
        for command in [Command::Store(3), Command::Load(3), Command::Wait, Command::Output(0), Command::Store(3)] {
            assert_eq!(vcpu.fd.get_sregs().unwrap().cs.dpl, 3);
            assert_eq!(vcpu.run(&bus, command, 0x1008, 7), Ok(7), "{command:?}");
        }
        assert_eq!(vcpu.fd.get_sregs().unwrap().cs.dpl, 3);
    }
}
