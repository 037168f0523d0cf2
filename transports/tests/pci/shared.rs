//! Shared memory regions of a function: capabilities, and what is behind them.

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::queue::ByteOrder;
use polyvirt_transports::pci::registers::*;
use polyvirt_transports::pci::{Generation, Space};

use super::machine::{FIRST, Machine, Toy};

#[test]
fn each_region_has_a_capability_and_is_behind_its_base_address_register() {
    let mut machine = Machine::empty();
    let toy = Toy::sharing(&[(1, 0x1000), (7, 0x3000)]);
    let pages = toy.shared[1].pages.clone();
    machine.attach(toy, Generation::Modern).unwrap();
    let found: Vec<_> = machine
        .capabilities(FIRST)
        .into_iter()
        .filter(|&(id, at)| id == CAP_VENDOR && machine.config(FIRST, at + CAP_TYPE) == [CAP_SHARED_MEMORY])
        .map(|(_, at)| {
            let [len, _, bar, id] = machine.config(FIRST, at + CAP_LEN);
            let wide = |low: u16, high: u16| {
                u64::from(machine.config32(FIRST, at + high)) << 32 | u64::from(machine.config32(FIRST, at + low))
            };
            (len, bar, id, wide(CAP_OFFSET, CAP_OFFSET_HIGH), wide(CAP_LENGTH, CAP_LENGTH_HIGH))
        })
        .collect();
    assert_eq!(found, [(24, 2, 1, 0, 0x1000), (24, 2, 7, 0x1000, 0x3000)]);
    machine.set_config(FIRST, BARS + 8, &[0xff; 4]);
    assert_eq!(machine.config32(FIRST, BARS + 8), 0xffff_c000 | BAR_64 | BAR_PREFETCHABLE);
    let base = 0x10_0000_0000;
    machine.place(FIRST, 2, base);
    machine.enable(FIRST, COMMAND_MEMORY);
    machine.put(Space::Memory, base + 0x1ffe, b"both");
    let mut seen = [0; 4];
    pages.read(0xffe, &mut seen).unwrap();
    assert_eq!(&seen, b"both");
    pages.write(0x2ffc, b"last").unwrap();
    assert_eq!(&machine.get(Space::Memory, base + 0x3ffc), b"last");
    // Across the end of a region there is nothing.
    machine.put(Space::Memory, base + 0xffe, &[9; 4]);
    assert_eq!(machine.get(Space::Memory, base + 0xffe), [9, 9, 0, 0]);
    assert_eq!(machine.get(Space::Memory, base + 0x1000), [0; 2]);
}

#[test]
fn two_regions_of_one_id_are_refused() {
    let mut machine = Machine::empty();
    let attached = machine.attach(Toy::sharing(&[(1, 0x1000), (1, 0x1000)]), Generation::Modern);
    assert!(matches!(attached, Err(HypervisorError::Refused { call: "attach", .. })), "{attached:?}");
}

#[test]
fn a_legacy_device_has_no_way_to_show_them() {
    let mut machine = Machine::empty();
    machine.attach(Toy::sharing(&[(1, 0x1000)]), Generation::Legacy(ByteOrder::Little)).unwrap();
    assert!(machine.capabilities(FIRST).iter().all(|(id, _)| *id == CAP_MSIX));
    assert_eq!(machine.config32(FIRST, BARS + 8), 0);
}
