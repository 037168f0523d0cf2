//! The device model of a Xen domain, over the model of Xen: requests in, answers and messages out.

use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use polyvirt_core::Features;
use polyvirt_core::device::{Device, Queues};
use polyvirt_core::hypervisor::{Guest as _, Host as _, Share as _};
use polyvirt_core::memory::{Access, GuestMemory};
use polyvirt_core::queue::{Buffer, DriverQueue};
use polyvirt_core::transport::{BlockingTransport as _, Transport as _, TransportError, driver_ok, initialize};
use polyvirt_hypervisors::xen_hvm::abi::{Kind, PCI, Request};
use polyvirt_hypervisors::xen_hvm::model::{self, Guest, Model};
use polyvirt_hypervisors::xen_hvm::{Calls as _, Host};
use polyvirt_transports::mmio::Registers as _;
use polyvirt_transports::pci::registers::{BARS, COMMAND, COMMAND_MEMORY, CONFIG_ADDRESS, CONFIG_DATA, config_address};
use polyvirt_transports::pci::{self, Bus, Functions as _, Generation, Machine as _, Signalling};

const WATCHDOG: Duration = Duration::from_secs(20);
const TYPE: u32 = 42;

/// Turns each byte of a request around.
struct Inverter;

impl<M: GuestMemory> Device<M> for Inverter {
    fn device_type(&self) -> u32 {
        TYPE
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[8]
    }
    fn config(&self) -> &[u8] {
        b"configuration"
    }
    fn activate(&mut self, _: Features, _: Waker) {}
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        let Some(queue) = queues.get(index) else { return };
        while let Ok(mut chain) = queue.pop() {
            let mut bytes = vec![0; chain.readable_len() as usize];
            chain.read(0, &mut bytes).unwrap();
            bytes.iter_mut().for_each(|byte| *byte = !*byte);
            chain.write(0, &bytes).unwrap();
            queue.complete(chain).unwrap();
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {}
}

fn machine() -> (pci::Host<Host<Model>>, Guest) {
    let (mut host, guest) = model::start(1 << 20).unwrap();
    let memory = host.memory();
    pci::attach(&mut host, memory, Box::new(Inverter), Generation::Modern).unwrap();
    (host, guest)
}

fn config(guest: &Guest, function: u8, offset: u16) -> u32 {
    let mut word = [0; 4];
    guest.output(CONFIG_ADDRESS as u16, &config_address(function, offset).to_le_bytes()).unwrap();
    guest.input(CONFIG_DATA as u16, &mut word).unwrap();
    u32::from_le_bytes(word)
}

/// Where the modern registers were placed, once they are decoded.
fn registers(guest: &Guest) -> u64 {
    guest.output(CONFIG_ADDRESS as u16, &config_address(8, COMMAND).to_le_bytes()).unwrap();
    guest.output(CONFIG_DATA as u16, &COMMAND_MEMORY.to_le_bytes()).unwrap();
    u64::from(config(guest, 8, BARS + 16) & !0xf)
}

#[test]
fn a_driver_exchanges_buffers_by_requests_and_messages_alone() {
    for features in [Features::empty(), Features::RING_PACKED] {
        let (_host, guest) = machine();
        let bus = Arc::new(Bus::new(Arc::new(guest)));
        let place = bus.enumerate().unwrap()[0];
        let mut driver = pci::Driver::connect(Arc::clone(&bus), place, Signalling::Messages).unwrap();
        assert_eq!(driver.device_type(), TYPE);
        assert!(initialize(&mut driver, features).unwrap().contains(features));
        let mut queue = DriverQueue::new(driver.find_vq(0, None).unwrap()).unwrap();
        let pages = bus.allocate(4096).unwrap();
        let address = bus.share(&pages, Access::READ | Access::WRITE).unwrap();
        driver_ok(&mut driver).unwrap();
        for turn in 0..20u8 {
            pages.write(0, &[turn; 32]).unwrap();
            let there = Buffer { address, len: 32 };
            let back = Buffer { address: address + 32, len: 32 };
            queue.add_buf(&[there], &[back], turn).unwrap();
            queue.kick().unwrap();
            assert!(!driver.wait(WATCHDOG).unwrap().queues.is_empty());
            assert_eq!(queue.get_buf().unwrap(), Some((turn, 32)));
            let mut echo = [0; 32];
            pages.read(32, &mut echo).unwrap();
            assert_eq!(echo, [!turn; 32]);
        }
        assert_eq!(driver.wait(Duration::ZERO), Err(TransportError::Watchdog(Duration::ZERO, "an interrupt")));
    }
}

#[test]
fn functions_are_placed_in_the_window_before_any_guest_looks() {
    let (_host, guest) = machine();
    let (messages, modern) = (config(&guest, 8, BARS + 4), config(&guest, 8, BARS + 16));
    for bar in [messages, modern] {
        assert!(PCI.memory.contains(&u64::from(bar & !0xf)), "{bar:#x}");
    }
    assert_ne!(messages & !0xf, modern & !0xf);
    assert_eq!(config(&guest, 8, BARS), 0, "there are no ports");
}

#[test]
fn what_was_not_claimed_does_not_reach_the_server() {
    let (_host, guest) = machine();
    assert_eq!(config(&guest, 0, 0) & 0xffff, 0x8086, "the host bridge");
    assert_eq!(config(&guest, 8, 0), 0x1af4 | (0x1040 + TYPE) << 16);
    assert_eq!(config(&guest, 16, 0), u32::MAX);
    let mut word = [0; 4];
    guest.load(PCI.memory.end, &mut word).unwrap();
    assert_eq!(word, [0xff; 4]);
}

#[test]
fn strings_go_to_and_from_the_domains_memory() {
    let (_host, guest) = machine();
    let at = registers(&guest) + 0x2000;
    let pages = guest.allocate(4096).unwrap();
    let address = guest.share(&pages, Access::READ | Access::WRITE).unwrap();
    let request = Request {
        kind: Kind::Memory,
        address: at,
        data: address,
        indirect: true,
        size: 1,
        count: 13,
        downwards: false,
        read: true,
    };
    guest.model().ask(request).unwrap();
    let mut read = [0; 14];
    pages.read(0, &mut read).unwrap();
    assert_eq!(&read, b"configuration\0");
    // From the end on.
    guest.model().ask(Request { address: at + 12, data: address + 112, downwards: true, ..request }).unwrap();
    pages.read(100, &mut read).unwrap();
    assert_eq!(&read, b"configuration\0");
    // The select registers keep what is written: a string of two words.
    pages.write(200, &[1, 0, 0, 0]).unwrap();
    let select = Request { address: at - 0x2000, data: address + 200, size: 4, count: 1, read: false, ..request };
    guest.model().ask(select).unwrap();
    let mut word = [0; 4];
    guest.load(at - 0x2000, &mut word).unwrap();
    assert_eq!(word, [1, 0, 0, 0]);
}

#[test]
fn requests_that_make_no_sense_are_answered() {
    let (_host, guest) = machine();
    let request = Request {
        kind: Kind::Memory,
        address: u64::MAX,
        data: u64::MAX,
        indirect: true,
        size: u32::MAX,
        count: u32::MAX,
        downwards: false,
        read: true,
    };
    let kinds = [Kind::Memory, Kind::Port, Kind::Config, Kind::Other(77), Kind::Invalidate];
    for (kind, read) in kinds.into_iter().flat_map(|kind| [(kind, true), (kind, false)]) {
        for (size, count, downwards) in [(u32::MAX, u32::MAX, false), (0, 1, true), (3, 0, true), (8, 5000, true)] {
            assert!(guest.model().ask(Request { kind, read, size, count, downwards, ..request }).is_some());
        }
    }
    assert_eq!(config(&guest, 0, 0) & 0xffff, 0x8086, "the server goes on");
}

#[test]
fn pages_that_were_given_back_are_forgotten() {
    let (_host, guest) = machine();
    let request = Request {
        kind: Kind::Invalidate,
        address: 0,
        data: u64::MAX,
        indirect: false,
        size: 4,
        count: 0,
        downwards: false,
        read: false,
    };
    assert_eq!((guest.model().invalidations(), guest.model().ask(request)), (0, Some(0)));
    assert_eq!(guest.model().invalidations(), 1);
}

#[test]
fn a_bus_that_is_full_of_registers_refuses_a_device_and_a_function_is_claimed_once() {
    let (mut host, guest) = model::start(1 << 16).unwrap();
    for _ in 1..32 {
        let memory = host.memory();
        pci::attach(&mut host, memory, Box::new(Inverter), Generation::Modern).unwrap();
    }
    let memory = host.memory();
    assert!(pci::attach(&mut host, memory, Box::new(Inverter), Generation::Modern).is_err());
    assert!(guest.model().claim(polyvirt_hypervisors::xen_hvm::abi::Range::Function(8)).is_err());
    let bus = Bus::new(Arc::new(guest));
    let mut vendor = [0; 2];
    bus.read_config(31 << 3, 0, &mut vendor).unwrap();
    assert_eq!(vendor, [0xf4, 0x1a]);
}

#[test]
fn a_guest_that_outlives_its_devices_finds_nothing() {
    let (host, guest) = machine();
    drop(host);
    assert_eq!(config(&guest, 8, 0), u32::MAX);
}
