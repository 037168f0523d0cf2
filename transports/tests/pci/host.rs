//! The host: two ways to configuration space, several functions, and what is not there.

use std::sync::Arc;

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::queue::ByteOrder;
use polyvirt_transports::pci::registers::*;
use polyvirt_transports::pci::{Generation, Space};

use super::machine::{ECAM, FIRST, Machine, TYPE, Toy, Wire};

const THREE: [Generation; 3] =
    [Generation::Modern, Generation::Transitional(ByteOrder::Little), Generation::Legacy(ByteOrder::Little)];

fn select(machine: &Machine, address: u32) {
    machine.put(Space::Io, CONFIG_ADDRESS, &address.to_le_bytes());
}

#[test]
fn ports_and_memory_lead_to_the_same_configuration_space() {
    let machine = Machine::with(&THREE);
    for function in [0, FIRST, 2 * FIRST, 3 * FIRST, 4 * FIRST, FIRST + 1, 0xff] {
        for offset in (0..256).step_by(4) {
            select(&machine, config_address(function, offset));
            let word: [u8; 4] = machine.get(Space::Io, CONFIG_DATA);
            let ecam = ECAM + ECAM_STRIDE * u64::from(function) + u64::from(offset);
            assert_eq!(machine.get(Space::Memory, ecam), word, "{function:#x} {offset:#x}");
            assert_eq!(machine.config(function, offset), word);
            for lane in 0..4u64 {
                assert_eq!(machine.get(Space::Io, CONFIG_DATA + lane), [word[lane as usize]]);
            }
            let odd: [u8; 2] = machine.get(Space::Io, CONFIG_DATA + 1);
            assert_eq!(odd[..], word[1..3]);
        }
    }
}

#[test]
fn every_function_answers_for_itself_and_nobody_for_what_is_not_there() {
    let machine = Machine::with(&THREE);
    let ids = [0, 1, 2, 3, 4].map(|device| machine.config16(device << 3, DEVICE_ID));
    assert_eq!(ids[1..], [0x1040 + TYPE as u16, 0x1000 + TYPE as u16, 0x1000 + TYPE as u16, 0xffff]);
    assert_eq!(machine.config(0, CLASS_CODE), [0, 0, 6], "the host bridge");
    for nobody in [1, 7, FIRST + 1, FIRST + 7, 4 * FIRST, 0xf8] {
        assert_eq!(machine.config(nobody, 0), [0xff; 4]);
        machine.set_config(nobody, COMMAND, &[0xff; 4]);
    }
    // Each has its own registers, and a status of its own.
    for device in [1, 2] {
        machine.place(device << 3, 4, 0xc000_0000 + u64::from(device) * 0x1_0000);
        machine.enable(device << 3, COMMAND_MEMORY);
    }
    machine.put(Space::Memory, 0xc002_0014, &[1]);
    assert_eq!([0xc001_0014, 0xc002_0014].map(|at| machine.get(Space::Memory, at)), [[0], [1]]);
    assert_eq!(machine.get(Space::Memory, 0xc003_0014), [0xff; 4]);
}

#[test]
fn configuration_by_ports_has_to_be_enabled_and_is_of_bus_0() {
    let machine = Machine::with(&THREE);
    let enabled = config_address(FIRST, 0);
    select(&machine, enabled);
    assert_eq!(machine.get(Space::Io, CONFIG_ADDRESS), enabled.to_le_bytes());
    assert_eq!(machine.get::<2>(Space::Io, CONFIG_DATA), [0xf4, 0x1a]);
    // The address counts as a whole only.
    machine.put(Space::Io, CONFIG_ADDRESS, &[0xff]);
    machine.put(Space::Io, CONFIG_ADDRESS + 2, &[0xff; 2]);
    machine.put(Space::Io, CONFIG_ADDRESS, &[0; 8]);
    assert_eq!(machine.get(Space::Io, CONFIG_ADDRESS), enabled.to_le_bytes());
    assert_eq!(machine.get(Space::Io, CONFIG_ADDRESS + 1), [0xff]);
    for elsewhere in [enabled & !(1 << 31), enabled | 1 << 16, enabled | 0x80 << 16] {
        select(&machine, elsewhere);
        assert_eq!(machine.get(Space::Io, CONFIG_DATA), [0xff; 4], "{elsewhere:#x}");
        machine.put(Space::Io, CONFIG_DATA, &[0xff; 4]);
    }
    // A word that reaches beyond the data port is there as far as the port goes.
    select(&machine, enabled);
    assert_eq!(machine.get(Space::Io, CONFIG_DATA + 2), [0x6a, 0x10, 0xff, 0xff]);
}

#[test]
fn what_is_not_the_buss_is_not_answered() {
    let machine = Machine::with(&THREE);
    let mut data = [0x55; 4];
    for port in [0, 0xcf7, 0xd00, 0xfff, 0x1_0000] {
        assert!(!machine.root.read(Space::Io, port, &mut data) && !machine.root.write(Space::Io, port, &data));
    }
    for address in [0, ECAM - 1, ECAM + ECAM_LEN, 0xe000_0000, 0x20_0000_0000, u64::MAX] {
        assert!(!machine.root.read(Space::Memory, address, &mut data), "{address:#x}");
        assert!(!machine.root.write(Space::Memory, address, &data), "{address:#x}");
    }
    assert_eq!(data, [0x55; 4], "untouched");
}

#[test]
fn an_access_across_the_end_of_a_function_stays_in_it() {
    let machine = Machine::with(&THREE);
    let end = ECAM + ECAM_STRIDE * u64::from(FIRST + 1);
    assert_eq!(machine.get(Space::Memory, end - 2), [0; 4], "the first device's, of which there is no more");
    for device in [1u8, 2] {
        machine.place(device << 3, 4, 0xc000_0000 + u64::from(device) * 0x4000);
        machine.enable(device << 3, COMMAND_MEMORY);
    }
    machine.put(Space::Memory, 0xc000_7fff, &[1; 8]);
    assert_eq!(machine.get(Space::Memory, 0xc000_7fff), [0; 8]);
    assert_eq!(machine.get(Space::Memory, 0xc000_8000), [0; 4], "the second device's selector is as it was");
}

#[test]
fn where_two_functions_are_at_one_place_one_of_them_answers() {
    let machine = Machine::with(&THREE);
    for device in [1u8, 2] {
        machine.place(device << 3, 4, 0xc000_0000);
        machine.enable(device << 3, COMMAND_MEMORY);
    }
    machine.put(Space::Memory, 0xc000_0014, &[1]);
    machine.enable(FIRST, 0);
    assert_eq!(machine.get(Space::Memory, 0xc000_0014), [0], "the first had it");
}

#[test]
fn a_bus_holds_thirty_one_devices_and_lets_go_of_them_with_its_host() {
    let mut machine = Machine::with(&[Generation::Modern; 31]);
    let full = machine.attach(Toy::new(TYPE), Generation::Modern);
    assert_eq!(full, Err(HypervisorError::Exhausted("device numbers of the PCI bus")));
    assert_eq!(machine.config16(31 << 3, VENDOR_ID), 0x1af4);
    let functions: Vec<_> = machine.served.lock().unwrap().iter().map(|(function, _)| *function).collect();
    assert_eq!(functions, (1..32).map(|device| device << 3).collect::<Vec<_>>());
    let Machine { host, root, .. } = machine;
    drop(host);
    let mut data = [0; 2];
    root.read_config(FIRST, 0, &mut data);
    assert_eq!(data, [0xff; 2]);
}

#[test]
fn a_device_that_panicked_does_not_take_the_bus_with_it() {
    let machine = Machine::with(&THREE);
    let device = Arc::clone(&machine.served.lock().unwrap()[0].1);
    let panicked = std::thread::spawn(move || {
        let _device = device.lock().unwrap();
        panic!("a device that panics, as this test wants it");
    });
    assert!(panicked.join().is_err());
    assert_eq!(machine.config16(FIRST, VENDOR_ID), 0x1af4);
    assert_eq!(machine.config16(2 * FIRST, VENDOR_ID), 0x1af4);
    assert_eq!(machine.wires().into_iter().filter(|(_, wire)| matches!(wire, Wire::Signal(_))).count(), 0);
}
