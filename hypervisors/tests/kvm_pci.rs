//! PCI on KVM: exits, doorbells, messages and pins. Skipped, with the reason, where no guest runs.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::Waker;
use std::time::Duration;

use polyvirt_core::Features;
use polyvirt_core::device::{Device, Queues};
use polyvirt_core::hypervisor::{
    BusDevice, Cause, Guest as _, Host as _, HypervisorError, Interrupt, WaitForInterrupt as _,
};
use polyvirt_core::memory::{FlatMemory, GuestMemory};
use polyvirt_core::queue::ByteOrder;
use polyvirt_hypervisors::kvm::{self, Guest};
use polyvirt_transports::mmio::Registers as _;
use polyvirt_transports::pci::registers::*;
use polyvirt_transports::pci::{self, Bus, Functions as _, Generation, HostPlace, Machine as _, Space, attach};

const WATCHDOG: Duration = Duration::from_secs(20);

/// What reached the function from the guest, configuration space aside.
#[derive(Debug, PartialEq)]
enum Call {
    Write(u64, Vec<u8>),
    Kick(u16),
}

/// A host that reports what its devices are asked.
struct Watched {
    host: pci::Host<kvm::Host>,
    calls: Sender<Call>,
    interrupts: Vec<Arc<dyn Interrupt>>,
}

impl polyvirt_core::hypervisor::Host for Watched {
    type Memory = Arc<FlatMemory>;
    type Place = HostPlace;

    fn memory(&self) -> Self::Memory {
        self.host.memory()
    }
    fn place(&mut self, device_type: u32, queues: u16) -> Result<HostPlace, HypervisorError> {
        let place = self.host.place(device_type, queues)?;
        self.interrupts.push(self.host.interrupt(&place));
        Ok(place)
    }
    fn interrupt(&self, place: &HostPlace) -> Arc<dyn Interrupt> {
        self.host.interrupt(place)
    }
    fn plug(&mut self, place: HostPlace, device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        self.host.plug(place, Box::new(Reporting { device, calls: self.calls.clone() }))
    }
}

struct Reporting {
    device: Box<dyn BusDevice>,
    calls: Sender<Call>,
}

impl BusDevice for Reporting {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.device.read(offset, data);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= region(0) {
            let _ = self.calls.send(Call::Write(offset, data.to_vec()));
        }
        self.device.write(offset, data);
    }
    fn kick(&mut self, queue: u16) -> bool {
        let _ = self.calls.send(Call::Kick(queue));
        self.device.kick(queue)
    }
    fn poll(&mut self) -> bool {
        self.device.poll()
    }
    fn set_waker(&mut self, waker: Waker) {
        self.device.set_waker(waker);
    }
}

/// Does nothing, on two queues.
struct Idle;

impl<M: GuestMemory> Device<M> for Idle {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[8, 8]
    }
    fn config(&self) -> &[u8] {
        b"configuration"
    }
    fn activate(&mut self, _: Features, _: Waker) {}
    fn kick(&mut self, _: u16, _: &mut Queues<'_, M>) {}
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {}
}

/// A guest on KVM with a function for each generation, all of them placed.
struct Plugged {
    guest: Arc<Guest>,
    bus: Bus<Guest>,
    calls: Receiver<Call>,
    host: Watched,
}

fn start(generations: &[Generation]) -> Option<Plugged> {
    if let Err(reason) = kvm::available() {
        println!("skipped: {reason}");
        return None;
    }
    let (host, guest) = kvm::start(1 << 20).unwrap();
    let (sender, calls) = channel();
    let host = pci::Host::new(host, guest.address_map());
    let mut host = Watched { host, calls: sender, interrupts: Vec::new() };
    for &generation in generations {
        let memory = host.memory();
        attach(&mut host, memory, Box::new(Idle), generation).unwrap();
    }
    let guest = Arc::new(guest);
    let bus = Bus::new(Arc::clone(&guest));
    assert_eq!(bus.enumerate().unwrap().len(), generations.len());
    Some(Plugged { guest, bus, calls, host })
}

impl Plugged {
    fn config32(&self, device: u8, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.bus.read_config(device << 3, offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn set_config(&self, device: u8, offset: u16, data: &[u8]) {
        self.bus.write_config(device << 3, offset, data).unwrap();
    }

    /// Where base address register `bar` is; all are below 4 GiB.
    fn base(&self, device: u8, bar: u8) -> u64 {
        let low = self.config32(device, BARS + 4 * u16::from(bar));
        u64::from(low & if low & BAR_IO != 0 { !3 } else { !0xf })
    }

    fn store(&self, address: u64, data: &[u8]) {
        self.guest.store(address, data).unwrap();
    }

    fn load<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.guest.load(address, &mut data).unwrap();
        data
    }

    /// A capability's place, offset and, of virtio's, type.
    fn capability(&self, device: u8, id: u8, kind: u8) -> u16 {
        let mut at = self.config32(device, CAPABILITIES) as u8;
        while at != 0 {
            let [found, next, _, found_kind] = self.config32(device, at.into()).to_le_bytes();
            if found == id && (id != CAP_VENDOR || found_kind == kind) {
                return at.into();
            }
            at = next;
        }
        panic!("no capability {id:#x} of type {kind}");
    }

    /// Where a structure of virtio's begins.
    fn structure(&self, device: u8, kind: u8) -> u64 {
        let at = self.capability(device, CAP_VENDOR, kind);
        let bar = self.config32(device, at + CAP_BAR) as u8;
        self.base(device, bar) + u64::from(self.config32(device, at + CAP_OFFSET))
    }

    fn call(&self) -> Call {
        self.calls.recv_timeout(WATCHDOG).unwrap()
    }

    /// Enables messages; entry `vector` is line `line`'s, masked or not.
    fn set_message(&self, device: u8, vector: u64, line: u32, masked: bool) {
        let at = self.capability(device, CAP_MSIX, 0);
        let table = self.base(device, 1) + MSIX_ENTRY * vector;
        let message = self.guest.message(line);
        self.store(table + 12, &ENTRY_MASKED.to_le_bytes());
        self.store(table, &message.address.to_le_bytes());
        self.store(table + 8, &message.data.to_le_bytes());
        self.store(table + 12, &u32::from(masked).to_le_bytes());
        self.set_config(device, at + MSIX_CONTROL, &MSIX_ENABLE.to_le_bytes());
    }
}

/// Waits for one of `lines`, a bit each, and takes those that are pending.
fn wait(guest: &Guest, lines: u64, watchdog: Duration) -> Result<u64, HypervisorError> {
    let all: Vec<u32> = (0..u64::BITS).filter(|line| lines & 1 << line != 0).collect();
    match guest.wait(&all, watchdog)? {
        true => all.iter().try_fold(0, |came, &line| Ok(came | u64::from(guest.take(line)?) << line)),
        false => Ok(0),
    }
}

#[test]
fn ports_and_memory_reach_the_bus() {
    let Some(plugged) = start(&[Generation::Modern, Generation::Legacy(ByteOrder::Little)]) else { return };
    for (device, id) in [(1u8, 0x106a_1af4u32), (2, 0x102a_1af4), (3, u32::MAX)] {
        let function = device << 3;
        plugged.guest.output(CONFIG_ADDRESS as u16, &config_address(function, 0).to_le_bytes()).unwrap();
        let mut word = [0; 4];
        plugged.guest.input(CONFIG_DATA as u16, &mut word).unwrap();
        assert_eq!(word, id.to_le_bytes(), "by ports");
        assert_eq!(plugged.config32(device, 0), id, "by memory");
    }
    let mut port = [0; 1];
    plugged.guest.input(CONFIG_DATA as u16 + 1, &mut port).unwrap();
    assert_eq!(port, [0xff], "of what is not there");
    let common = plugged.structure(1, CAP_COMMON);
    assert_eq!(plugged.load(common + common::NUM_QUEUES), [2, 0]);
    plugged.store(common + common::DEVICE_STATUS, &[1]);
    assert_eq!(plugged.load(common + common::DEVICE_STATUS), [1]);
    let mut words = [0; 4];
    for (at, expected) in [(20, *b"conf"), (24, *b"igur")] {
        plugged.bus.load(Space::Io, plugged.base(2, 0) + at, &mut words).unwrap();
        assert_eq!(words, expected);
    }
}

#[test]
fn a_doorbell_is_an_event_and_follows_its_base_address_register() {
    let Some(plugged) = start(&[Generation::Modern]) else { return };
    let (old, bar) = (plugged.structure(1, CAP_NOTIFY), plugged.base(1, 4));
    for (width, queue) in [(1, 1), (2, 0), (4, 1)] {
        plugged.store(old + 4 * u64::from(queue), &[0, 0, 0, 0][..width]);
        assert_eq!(plugged.call(), Call::Kick(queue), "no access to a register");
    }
    let there = bar + 0x10_0000;
    plugged.set_config(1, BARS + 16, &(there as u32).to_le_bytes());
    let new = old + 0x10_0000;
    assert_eq!(plugged.structure(1, CAP_NOTIFY), new);
    plugged.store(old, &[0, 0]);
    plugged.store(new + 4, &[0, 0]);
    assert_eq!(plugged.call(), Call::Kick(1), "nobody hears what is written where it was");
    assert_eq!(plugged.load(old), [0xff; 2]);
    // Not decoded: neither an event nor an access.
    plugged.set_config(1, COMMAND, &[0, 0]);
    plugged.store(new, &[0, 0]);
    plugged.set_config(1, COMMAND, &COMMAND_MEMORY.to_le_bytes());
    plugged.store(new + 4, &[0, 0]);
    assert_eq!(plugged.call(), Call::Kick(1));
    // Between the doorbells the device decides.
    plugged.store(new + 2, &[0, 0]);
    assert_eq!(plugged.call(), Call::Write(region(4) + new - there + 2, vec![0, 0]));
}

#[test]
fn a_legacy_doorbell_is_an_event_by_its_value_and_follows_too() {
    let Some(plugged) = start(&[Generation::Transitional(ByteOrder::Little)]) else { return };
    let kick = |port: u64, queue: u16| plugged.bus.store(Space::Io, port + 16, &queue.to_le_bytes()).unwrap();
    let old = plugged.base(1, 0);
    for queue in [1, 0] {
        kick(old, queue);
        assert_eq!(plugged.call(), Call::Kick(queue));
    }
    kick(old, 2);
    assert_eq!(plugged.call(), Call::Write(region(0) + 16, vec![2, 0]), "there is no such queue");
    let new = old + 0x100;
    plugged.set_config(1, BARS, &(new as u32).to_le_bytes());
    kick(old, 0);
    kick(new, 1);
    assert_eq!(plugged.call(), Call::Kick(1), "nobody hears what is written where it was");
}

#[test]
fn a_message_goes_where_its_entry_says_now() {
    let Some(plugged) = start(&[Generation::Modern]) else { return };
    let interrupt = &plugged.host.interrupts[0];
    plugged.store(plugged.structure(1, CAP_COMMON) + common::CONFIG_VECTOR, &[1, 0]);
    for line in [3, 9, 3, 40] {
        plugged.set_message(1, 1, line, false);
        interrupt.raise(Cause::Config);
        assert_eq!(wait(&plugged.guest, u64::MAX, WATCHDOG), Ok(1 << line));
    }
    assert_eq!(wait(&plugged.guest, u64::MAX, Duration::ZERO), Ok(0));
}

#[test]
fn a_masked_message_waits_for_its_unmasking() {
    let Some(plugged) = start(&[Generation::Modern]) else { return };
    let interrupt = &plugged.host.interrupts[0];
    plugged.store(plugged.structure(1, CAP_COMMON) + common::CONFIG_VECTOR, &[2, 0]);
    let pending = plugged.base(1, 1) + 0x800;
    plugged.set_message(1, 2, 5, true);
    interrupt.raise(Cause::Config);
    assert_eq!(wait(&plugged.guest, u64::MAX, Duration::ZERO), Ok(0));
    assert_eq!(plugged.load(pending), [4]);
    // To another line than it was masked with.
    plugged.set_message(1, 2, 6, false);
    assert_eq!(wait(&plugged.guest, u64::MAX, WATCHDOG), Ok(1 << 6));
    assert_eq!(plugged.load(pending), [0]);
    // All of the function's at once.
    let control = plugged.capability(1, CAP_MSIX, 0) + MSIX_CONTROL;
    plugged.set_config(1, control, &(MSIX_ENABLE | MSIX_MASK).to_le_bytes());
    interrupt.raise(Cause::Config);
    assert_eq!(wait(&plugged.guest, u64::MAX, Duration::ZERO), Ok(0));
    plugged.set_config(1, control, &MSIX_ENABLE.to_le_bytes());
    assert_eq!(wait(&plugged.guest, u64::MAX, WATCHDOG), Ok(1 << 6));
}

#[test]
fn a_pin_interrupts_until_the_status_is_read() {
    let Some(plugged) = start(&[Generation::Modern, Generation::Modern]) else { return };
    for device in [1u8, 2] {
        let (isr, line) = (plugged.structure(device, CAP_ISR), 1 << pin_line(device));
        let interrupt = &plugged.host.interrupts[usize::from(device) - 1];
        for _ in 0..3 {
            interrupt.raise(Cause::Queue(0));
            assert_eq!(wait(&plugged.guest, u64::MAX, WATCHDOG), Ok(line));
            interrupt.raise(Cause::Config);
            assert_eq!(wait(&plugged.guest, u64::MAX, Duration::ZERO), Ok(line), "the pin is asserted still");
            assert_eq!(plugged.load(isr), [ISR_QUEUE | ISR_CONFIG]);
            assert_eq!(wait(&plugged.guest, u64::MAX, Duration::ZERO), Ok(0), "the pin is let go of, and came once");
        }
    }
}
