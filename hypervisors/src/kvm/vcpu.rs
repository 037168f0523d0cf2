//! The processor of the guest: it runs for as long as its hands take for one command.

use std::sync::PoisonError;

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
    /// Whether the guest was left in an access that is answered: it ends when the processor runs the next time.
    in_access: bool,
    /// Why it does not run any more.
    pub(super) stopped: Option<String>,
}

impl Vcpu {
    /// The processor `fd`, with `hands` in its memory.
    pub(super) fn new(fd: VcpuFd, hands: Hands) -> Self {
        Self { fd, hands, in_access: false, stopped: None }
    }

    /// Lets the hands carry out `command`, and the devices on `bus` answer. Returns the hands' value, or why the
    /// guest cannot go on.
    pub(super) fn run(&mut self, bus: &Bus, command: Command, address: u64, value: u64) -> Result<u64, String> {
        // Not every KVM lets CPL 3 have ports.
        if !matches!(command, Command::Input(_) | Command::Output(_)) {
            return self.carry_out(bus, command, address, value);
        }
        self.finish()?;
        self.enter(machine::enter_cpl0)?;
        let done = self.carry_out(bus, command, address, value);
        self.enter(machine::enter_cpl3)?;
        done
    }

    /// Has KVM finish the access that the guest was left in, if it was: only then is the state its own.
    fn finish(&mut self) -> Result<(), String> {
        if !std::mem::take(&mut self.in_access) {
            return Ok(());
        }
        self.fd.set_kvm_immediate_exit(1);
        let exit = self.fd.run().map(|exit| format!("{exit:?}"));
        self.fd.set_kvm_immediate_exit(0);
        match exit {
            Err(error) if error.errno() == Errno::EINTR as i32 => Ok(()),
            exit => Err(format!("expected an access to be finished and nothing else, got {exit:?}")),
        }
    }

    /// Has the processor go on in another ring.
    fn enter(&self, ring: fn(&mut kvm_sregs, u64)) -> Result<(), String> {
        let mut sregs = self.fd.get_sregs().map_err(|error| format!("KVM_GET_SREGS: {error}"))?;
        ring(&mut sregs, self.hands.base());
        self.fd.set_sregs(&sregs).map_err(|error| format!("KVM_SET_SREGS: {error}"))
    }

    fn carry_out(&mut self, bus: &Bus, command: Command, address: u64, value: u64) -> Result<u64, String> {
        self.hands.command(command, address, value).map_err(text)?;
        self.in_access = false;
        loop {
            let answered = match self.fd.run() {
                Ok(VcpuExit::MmioWrite(abi::DONE, _)) => return self.hands.value().map_err(text),
                Ok(VcpuExit::MmioRead(at, data)) => {
                    let answered = bus.read(Space::Memory, at, data);
                    // All of it: there is nothing to come that the hands could tell.
                    if answered && at == address && command == Command::Load(data.len().trailing_zeros()) {
                        self.in_access = true;
                        let mut value = [0; 8];
                        value[..data.len()].copy_from_slice(data);
                        return Ok(u64::from_le_bytes(value));
                    }
                    answered
                }
                Ok(VcpuExit::MmioWrite(at, data)) => {
                    let answered = bus.write(Space::Memory, at, data);
                    if answered && at == address && command == Command::Store(data.len().trailing_zeros()) {
                        self.in_access = true;
                        return Ok(value);
                    }
                    answered
                }
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

    /// Takes the interrupt of `line`, if it is pending.
    pub(super) fn take(&mut self, bus: &Bus, line: u32) -> Result<bool, String> {
        let line = mask(&[line]);
        if self.hands.take_pending(line).map_err(text)? != 0 {
            return Ok(true);
        }
        self.run(bus, Command::Wait, 1, line)?;
        Ok(self.hands.take_pending(line).map_err(text)? | held(bus, line) != 0)
    }

    /// Whether anything is pending among `lines`; if nothing is, spins a while for it.
    pub(super) fn wait(&mut self, bus: &Bus, lines: &[u32]) -> Result<bool, String> {
        let lines = mask(lines);
        if self.hands.pending(lines).map_err(text)? == 0 {
            self.run(bus, Command::Wait, SPIN_ROUNDS, lines)?;
        }
        Ok(self.hands.pending(lines).map_err(text)? | held(bus, lines) != 0)
    }
}

/// The bits that the hands have for `lines`. There are no other lines than those.
fn mask(lines: &[u32]) -> u64 {
    lines.iter().fold(0, |mask, &line| mask | 1u64.checked_shl(line).unwrap_or(0))
}

/// Which of `lines` are up, where a line is a message: that came once, and one function may hold the line on when another has
/// taken it.
fn held(bus: &Bus, lines: u64) -> u64 {
    bus.pins.lock().unwrap_or_else(PoisonError::into_inner).held() & lines
}

fn text(error: MemoryError) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::task::Waker;

    use polyvirt_core::hypervisor::BusDevice;
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

    /// Reads as 0x55s, and takes what is written.
    struct Toy;

    impl BusDevice for Toy {
        fn read(&mut self, _: u64, data: &mut [u8]) {
            data.fill(0x55);
        }
        fn write(&mut self, _: u64, _: &[u8]) {}
        fn kick(&mut self, _: u16) -> bool {
            false
        }
        fn poll(&mut self) -> bool {
            false
        }
        fn set_waker(&mut self, _: Waker) {}
    }

    #[test]
    fn an_access_that_a_device_answers_is_ended_by_whatever_comes_next() {
        if let Err(reason) = super::super::available() {
            println!("skipped: {reason}");
            return;
        }
        let Machine { vm: _vm, routes: _routes, vcpu, hands, ram: _ram } = Machine::new(0x2000).unwrap();
        let mut vcpu = Vcpu::new(vcpu, hands);
        let bus = Bus::default();
        assert!(bus.pci.set(Arc::new(Root::new(abi::PCI))).is_ok());
        let place = abi::place(0);
        bus.plug(place, Arc::new(Mutex::new(Box::new(Toy))));
        for (next, address, value) in [
            (Command::Store(3), 0x1008, 7),
            (Command::Load(3), 0x1008, 7),
            (Command::Wait, 3, 9),
            (Command::Output(0), 0x1008, 5),
            (Command::Input(2), 0xcfc, 0xffff_ffff),
        ] {
            for (access, answer) in [(Command::Load(2), 0x5555_5555), (Command::Store(1), 0x1234)] {
                assert_eq!(vcpu.run(&bus, access, place.base, 0x1234), Ok(answer));
                assert!(vcpu.in_access, "no second exit says that it is done");
                assert_eq!(vcpu.run(&bus, next, address, value), Ok(value), "{next:?}");
                assert!(!vcpu.in_access);
                assert_eq!(vcpu.fd.get_sregs().unwrap().cs.dpl, 3);
            }
        }
        // Across pages it leaves the guest twice: neither time the host knows all of it.
        assert_eq!(vcpu.run(&bus, Command::Load(3), place.base + 0xffc, 0), Ok(0x5555_5555_5555_5555));
        assert!(!vcpu.in_access);
    }
}
