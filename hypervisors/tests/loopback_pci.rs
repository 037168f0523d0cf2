//! Both generations' drivers and devices, by messages and by the pin, on a PCI bus over the loopback.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Wake, Waker};
use std::time::Duration;

use polyvirt_core::Features;
use polyvirt_core::device::{Device, Queues};
use polyvirt_core::hypervisor::{Guest as _, Host as _, Share as _};
use polyvirt_core::memory::{Access, GuestMemory};
use polyvirt_core::queue::{Buffer, ByteOrder, DriverQueue};
use polyvirt_core::transport::{
    BlockingTransport, Interrupts, QueueSet, Transport, TransportError, WakingTransport, driver_ok, initialize,
    read_config,
};
use polyvirt_hypervisors::loopback::{self, Guest};
use polyvirt_transports::pci::{
    self, Bus, Driver, Generation, GuestPlace, LegacyDriver, Machine as _, Signalling, attach,
};

const WATCHDOG: Duration = Duration::from_secs(20);
const TRANSITIONAL: Generation = Generation::Transitional(ByteOrder::Little);
const LEGACY: Generation = Generation::Legacy(ByteOrder::Little);

/// Sends back what it is sent, on each of its queues, and has its number for a configuration.
struct Echo([u8; 1]);

impl<M: GuestMemory> Device<M> for Echo {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[8, 8, 8]
    }
    fn config(&self) -> &[u8] {
        &self.0
    }
    fn activate(&mut self, _: Features, _: Waker) {}
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        while let Some(Ok(mut chain)) = queues.get(index).map(|queue| queue.pop()) {
            let mut bytes = vec![0; chain.readable_len() as usize];
            chain.read(0, &mut bytes).unwrap();
            chain.write(0, &bytes).unwrap();
            queues.get(index).unwrap().complete(chain).unwrap();
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {}
}

type Host = pci::Host<loopback::Host>;

fn machine(generations: &[Generation]) -> (Host, Arc<Bus<Guest>>) {
    let (host, guest) = loopback::start(8 << 20).unwrap();
    let mut host = pci::Host::new(host, guest.address_map());
    for (number, &generation) in (0u8..).zip(generations) {
        let memory = host.memory();
        attach(&mut host, memory, Box::new(Echo([number])), generation).unwrap();
    }
    (host, Arc::new(Bus::new(Arc::new(guest))))
}

/// Has a request echoed on every queue, told by an interrupt: one that says which queue, if it is `named`.
fn exchange(bus: &Arc<Bus<Guest>>, driver: &mut dyn BlockingTransport, features: Features, number: u8, named: bool) {
    initialize(driver, features).unwrap();
    let found: Vec<_> = (0..3).map(|index| driver.find_vq(index, None).unwrap()).collect();
    driver_ok(driver).unwrap();
    let mut config = [0xff];
    read_config(driver, 0, &mut config).unwrap();
    assert_eq!(config, [number]);
    let pages = bus.allocate(4096).unwrap();
    let address = bus.share(&pages, Access::READ | Access::WRITE).unwrap();
    for (index, found) in found.into_iter().enumerate() {
        let mut queue = DriverQueue::<usize>::new(found).unwrap();
        for round in 0..20 {
            let request = [number, index as u8, round, 0x5a];
            pages.write(0, &request).unwrap();
            let (readable, writable) = (Buffer { address, len: 4 }, Buffer { address: address + 8, len: 4 });
            queue.add_buf(&[readable], &[writable], index).unwrap();
            queue.kick().unwrap();
            let Interrupts { queues, .. } = driver.wait(WATCHDOG).unwrap();
            assert_eq!(queues, if named { QueueSet::of(index as u16) } else { QueueSet::ALL });
            assert_eq!(queue.get_buf(), Ok(Some((index, 4))));
            let mut echo = [0; 4];
            pages.read(8, &mut echo).unwrap();
            assert_eq!(echo, request);
            // It asks to be told of the next one.
            assert!(queue.enable_cb());
        }
    }
    assert!(matches!(driver.wait(Duration::ZERO), Err(TransportError::Watchdog(..))), "nothing is left to be told");
    bus.unshare(address).unwrap();
}

fn meet(
    bus: &Arc<Bus<Guest>>,
    place: GuestPlace,
    legacy: bool,
    by: Signalling,
) -> Result<Box<dyn BlockingTransport>, TransportError> {
    Ok(match legacy {
        false => Box::new(Driver::connect(Arc::clone(bus), place, by)?),
        true => Box::new(LegacyDriver::connect(Arc::clone(bus), place, by)?),
    })
}

#[test]
fn every_driver_works_with_every_device_that_has_its_interface_by_messages_and_by_the_pin() {
    let generations = [Generation::Modern, TRANSITIONAL, LEGACY];
    let (_host, bus) = machine(&generations);
    let places = bus.enumerate().unwrap();
    assert_eq!(places.iter().map(|place| place.function).collect::<Vec<_>>(), [1 << 3, 2 << 3, 3 << 3]);
    for ((number, place), generation) in (0u8..).zip(places).zip(generations) {
        for (legacy, by) in [
            (false, Signalling::Messages),
            (true, Signalling::Pin),
            (false, Signalling::Pin),
            (true, Signalling::Messages),
        ] {
            let has = if legacy { generation != Generation::Modern } else { generation != LEGACY };
            match meet(&bus, place, legacy, by) {
                Ok(mut driver) => {
                    assert!(has, "{generation:?} has no such interface");
                    assert_eq!((driver.device_type(), driver.is_legacy()), (42, legacy));
                    let named = by == Signalling::Messages;
                    exchange(&bus, &mut *driver, Features::EVENT_IDX, number, named);
                    if !legacy {
                        exchange(
                            &bus,
                            &mut *driver,
                            Features::RING_PACKED | Features::NOTIFICATION_DATA,
                            number,
                            named,
                        );
                    }
                }
                Err(error) => assert!(!has, "{generation:?}: {error}"),
            }
        }
    }
}

#[test]
fn devices_stay_where_they_were_placed_when_they_are_found_again() {
    let (_host, bus) = machine(&[TRANSITIONAL, TRANSITIONAL]);
    let places = bus.enumerate().unwrap();
    let mut driver = meet(&bus, places[0], false, Signalling::Messages).unwrap();
    initialize(&mut *driver, Features::empty()).unwrap();
    let found = driver.find_vq(0, None).unwrap();
    driver_ok(&mut *driver).unwrap();
    assert_eq!(bus.enumerate(), Ok(places.clone()));
    // The first is in use as before, the second is free.
    let status = driver.status().unwrap();
    assert_eq!(status.bits(), 15);
    exchange(&bus, &mut *meet(&bus, places[1], true, Signalling::Pin).unwrap(), Features::empty(), 1, false);
    drop(found);
}

#[test]
fn a_full_bus_shares_out_its_interrupt_lines_and_every_device_works() {
    let (_host, bus) = machine(&[Generation::Modern; 31]);
    let places = bus.enumerate().unwrap();
    assert_eq!(places.len(), 31);
    // 60 lines for messages, four for each function: 15 functions have some.
    assert_eq!(places.iter().filter(|place| place.lines > 0).count(), 15);
    for (number, place) in (0..).zip(places) {
        let mut driver = meet(&bus, place, false, Signalling::Messages).unwrap();
        exchange(&bus, &mut *driver, Features::empty(), number, place.lines > 0);
    }
}

/// Counts how often it is woken.
#[derive(Default)]
struct Count(AtomicU32);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn an_interrupt_wakes_a_task_once_by_messages_and_by_the_pin() {
    let (_host, bus) = machine(&[TRANSITIONAL]);
    let place = bus.enumerate().unwrap()[0];
    fn woken(bus: &Arc<Bus<Guest>>, driver: &mut (impl BlockingTransport + WakingTransport)) {
        initialize(driver, Features::empty()).unwrap();
        let mut queue = DriverQueue::<()>::new(driver.find_vq(1, None).unwrap()).unwrap();
        driver_ok(driver).unwrap();
        assert_eq!(driver.poll_reset(), Ok(false), "none was begun");
        let (pages, count) = (bus.allocate(4096).unwrap(), Arc::new(Count::default()));
        let address = bus.share(&pages, Access::READ | Access::WRITE).unwrap();
        let (readable, writable) = (Buffer { address, len: 4 }, Buffer { address: address + 8, len: 4 });
        for round in 1..=10 {
            assert_eq!(driver.take_interrupts(), Ok(Interrupts::default()));
            driver.wake_on_interrupt(&Waker::from(count.clone())).unwrap();
            assert_eq!(count.0.load(Ordering::SeqCst), 2 * round - 2, "nothing came yet");
            queue.add_buf(&[readable], &[writable], ()).unwrap();
            // The device is served within the kick.
            queue.kick().unwrap();
            assert_eq!(count.0.load(Ordering::SeqCst), 2 * round - 1);
            driver.wake_on_interrupt(&Waker::from(count.clone())).unwrap();
            assert_eq!(count.0.load(Ordering::SeqCst), 2 * round, "it was not taken yet");
            assert!(driver.take_interrupts().unwrap().queues.contains(1));
            assert_eq!(queue.get_buf(), Ok(Some(((), 4))));
            assert!(queue.enable_cb());
        }
        bus.unshare(address).unwrap();
    }
    for by in [Signalling::Messages, Signalling::Pin] {
        woken(&bus, &mut Driver::connect(Arc::clone(&bus), place, by).unwrap());
        woken(&bus, &mut LegacyDriver::connect(Arc::clone(&bus), place, by).unwrap());
    }
}
