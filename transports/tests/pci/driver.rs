//! The driver side before whatever may be on a bus: it says what is wrong and goes no further.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use polyvirt_core::hypervisor::{Guest, HypervisorError, Share, WaitForInterrupt};
use polyvirt_core::memory::{Access, Pages};
use polyvirt_core::transport::{BlockingTransport, initialize};
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio::{Place, Registers};
use polyvirt_transports::pci::registers::*;
use polyvirt_transports::pci::{AddressMap, Bus, Driver, Functions, LegacyDriver, Machine, Message, Signalling};
use proptest::prelude::*;

/// A machine in which every register reads what the script says, by address and over and over, except for some of the
/// header that lead a driver on.
struct Odd {
    /// The functions that there are, all with the same configuration space.
    functions: &'static [u8],
    config: Vec<u8>,
    bytes: Vec<u8>,
    selected: AtomicU64,
}

impl Odd {
    fn answer(&self, at: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes[(at as usize).wrapping_add(index) % self.bytes.len()];
        }
    }
}

impl Share for Odd {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        Ok(Pages::allocate(len.next_multiple_of(4096)))
    }
    fn share(&self, _: &Pages, _: Access) -> Result<u64, HypervisorError> {
        Ok(0x1000)
    }
    fn unshare(&self, _: u64) -> Result<(), HypervisorError> {
        Ok(())
    }
}

impl Guest for Odd {
    type Place = Place;

    fn notify(&self, _: u64, _: u32) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn take(&self, _: u32) -> Result<bool, HypervisorError> {
        Ok(true)
    }
    fn enumerate(&self) -> Result<Vec<Place>, HypervisorError> {
        Ok(vec![])
    }
}

impl WaitForInterrupt for Odd {
    fn wait(&self, _: &[u32], _: Duration) -> Result<bool, HypervisorError> {
        Ok(true)
    }
}

impl Registers for Odd {
    fn load(&self, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        self.answer(address, data);
        Ok(())
    }
    fn store(&self, _: u64, _: &[u8]) -> Result<(), HypervisorError> {
        Ok(())
    }
}

impl Machine for Odd {
    fn address_map(&self) -> AddressMap {
        AddressMap { ecam: None, memory: 0xc000_0000..0xe000_0000, memory64: 0..0, io: 0x1000..0x1_0000 }
    }
    fn input(&self, port: u16, data: &mut [u8]) -> Result<(), HypervisorError> {
        let selected = self.selected.load(Ordering::Relaxed);
        match u64::from(port).checked_sub(CONFIG_DATA) {
            Some(lane) if lane < 4 && self.functions.contains(&((selected >> 8) as u8)) => {
                let at = (selected & 0xfc) + lane;
                let from = self.config.iter().cycle().skip(at as usize);
                data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            }
            Some(lane) if lane < 4 => data.fill(0xff),
            _ => self.answer(port.into(), data),
        }
        Ok(())
    }
    fn output(&self, port: u16, data: &[u8]) -> Result<(), HypervisorError> {
        if let (CONFIG_ADDRESS, Ok(word)) = (port.into(), data.try_into()) {
            self.selected.store(u32::from_le_bytes(word).into(), Ordering::Relaxed);
        }
        Ok(())
    }
    fn message(&self, line: u32) -> Message {
        Message { address: 0xfee0_0000, data: line }
    }
}

#[test]
fn functions_are_found_behind_gaps_if_function_0_says_that_there_are_others() {
    for (header_type, found) in [(0x80, vec![0x08, 0x0a, 0x0f, 0xf8]), (0, vec![0x08, 0xf8])] {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x44, 0x10]);
        config[usize::from(HEADER_TYPE)] = header_type;
        // Device 2 has no function 0, and so none at all.
        let functions = &[0x08, 0x0a, 0x0f, 0x12, 0xf8];
        let bus = Bus::new(Arc::new(Odd { functions, config, bytes: vec![0], selected: AtomicU64::new(0) }));
        let places = bus.enumerate().unwrap();
        assert_eq!(places.iter().map(|place| place.function).collect::<Vec<_>>(), found);
    }
}

/// What a driver does with a device that it has met.
fn drive(driver: &mut dyn BlockingTransport) {
    let _ = initialize(driver, Features::all());
    for index in [0, 1, 0xffff] {
        let _ = driver.queue_max_size(index);
        if let Ok(mut found) = driver.find_vq(index, None) {
            let _ = found.notify.notify_at(7);
        }
        let _ = driver.reset_vq(index);
    }
    let _ = driver.set_status(Status::all());
    for (offset, len) in [(0, 8), (1, 4), (u32::MAX, 8), (0x0fff_ffff, 2)] {
        let _ = driver.read_config(offset, &mut vec![0; len]);
        let _ = driver.write_config(offset, &vec![0; len]);
    }
    let _ = driver.wait(Duration::ZERO);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_device_says_does_not_stop_the_driver(
        mut config in prop::collection::vec(any::<u8>(), 256),
        bytes in prop::collection::vec(prop_oneof![Just(0), Just(0xff), any::<u8>()], 1..9),
        links in prop::collection::vec((16u8..63, 0u8..9, 0u8..6), 0..8),
        legacy in any::<bool>(),
        wide in any::<bool>(),
    ) {
        config[..4].copy_from_slice(&[0xf4, 0x1a, if legacy { 4 } else { 0x44 }, 0x10]);
        config[6] |= 0x10;
        if legacy {
            config[8] = 0;
        }
        if wide {
            // At the end of the address space.
            config[0x10..0x28].fill(0xff);
            config[0x14] = 0xfc;
            config[0x1c] = 0xfc;
        }
        config[0x34] = 0x40;
        let usual = [(0x40, 0x50, CAP_COMMON), (0x50, 0x64, CAP_NOTIFY), (0x64, 0x74, CAP_ISR), (0x74, 0x84, CAP_DEVICE)];
        for (at, next, kind) in usual {
            config[at..at + 5].copy_from_slice(&[CAP_VENDOR, next, 16, kind, 4]);
        }
        config[0x84] = CAP_MSIX;
        for (at, kind, bar) in links {
            // Capabilities at all places, over one another, in loops.
            let at = 4 * usize::from(at);
            let id = if kind == 7 { CAP_MSIX } else { CAP_VENDOR };
            for (offset, byte) in [(0, id), (3, kind), (4, bar)] {
                config[at + offset] = byte;
            }
        }
        let bus = Arc::new(Bus::new(Arc::new(Odd { functions: &[8], config, bytes, selected: AtomicU64::new(0) })));
        for place in bus.enumerate().unwrap_or_default() {
            for signalling in [Signalling::Messages, Signalling::Pin] {
                if let Ok(mut driver) = Driver::connect(Arc::clone(&bus), place, signalling) {
                    drive(&mut driver);
                }
                if let Ok(mut driver) = LegacyDriver::connect(Arc::clone(&bus), place, signalling) {
                    drive(&mut driver);
                }
            }
        }
        let mut data = [0; 4];
        let _ = bus.read_config(8, 0xfc, &mut data);
    }
}
