//! A function's legacy interface, port by port.

use polyvirt_core::queue::ByteOrder;
use polyvirt_transports::pci::registers::*;
use polyvirt_transports::pci::{Doorbell, Generation, Space};

use super::machine::{FIRST, Machine, RAM, Toy, Wire};

const PORT: u64 = 0xc000;
const LITTLE: Generation = Generation::Transitional(ByteOrder::Little);

fn placed(generation: Generation) -> Machine {
    let machine = Machine::with(&[generation]);
    machine.place(FIRST, 0, PORT);
    machine.enable(FIRST, COMMAND_IO);
    machine
}

fn set(machine: &Machine, register: u64, data: &[u8]) {
    machine.put(Space::Io, PORT + register, data);
}

fn get<const N: usize>(machine: &Machine, register: u64) -> [u8; N] {
    machine.get(Space::Io, PORT + register)
}

#[test]
fn the_registers_are_the_papers_to_the_byte() {
    let machine = placed(LITTLE);
    set(&machine, 4, &0x1000_0001u32.to_le_bytes());
    set(&machine, 14, &[0, 0]);
    set(&machine, 8, &0x100u32.to_le_bytes());
    set(&machine, 18, &[3]);
    // VIRTIO_F_ANY_LAYOUT, INDIRECT_DESC, EVENT_IDX and the toy's bit 0 are offered.
    let mut expected = [0x3800_0001u32.to_le_bytes(), 0x1000_0001u32.to_le_bytes(), 0x100u32.to_le_bytes()].concat();
    expected.extend([4, 0, 0, 0, 0, 0, 3, 0]);
    expected.extend([1, 2, 3, 4, 5, 6, 0, 0]);
    assert_eq!(get::<28>(&machine, 0).to_vec(), expected);
    // Of the second queue, which may have 300 entries: the next power of two below.
    set(&machine, 14, &[1, 0]);
    assert_eq!(get::<8>(&machine, 8), [0, 0, 0, 0, 0, 1, 1, 0]);
    set(&machine, 14, &[2, 0]);
    assert_eq!(get::<8>(&machine, 8), [0, 0, 0, 0, 0, 0, 2, 0], "there is no such queue");
    set(&machine, 18, &[0]);
    assert_eq!(get::<20>(&machine, 0)[4..], [0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn with_messages_two_vectors_come_before_the_configuration() {
    let machine = placed(LITTLE);
    assert_eq!(get(&machine, 20), [1, 2, 3, 4]);
    let control = machine.msix(FIRST) + MSIX_CONTROL;
    machine.set_config(FIRST, control, &MSIX_ENABLE.to_le_bytes());
    assert_eq!(get(&machine, 20), [0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4, 5, 6]);
    set(&machine, 20, &[1, 0]);
    set(&machine, 22, &[2, 0]);
    assert_eq!(get(&machine, 20), [1, 0, 2, 0]);
    set(&machine, 22, &[3, 0]);
    assert_eq!(get(&machine, 22), [0xff, 0xff], "there is no such vector");
    set(&machine, 25, &[0x22, 0x33]);
    machine.set_config(FIRST, control, &[0; 2]);
    assert_eq!(get(&machine, 20), [1, 0x22, 0x33, 4, 5, 6]);
}

#[test]
fn a_ring_at_a_page_is_served_in_the_guests_byte_order_and_interrupts_once() {
    for (order, generation) in [
        (ByteOrder::Little, LITTLE),
        (ByteOrder::Big, Generation::Transitional(ByteOrder::Big)),
        (ByteOrder::Little, Generation::Legacy(ByteOrder::Little)),
        (ByteOrder::Big, Generation::Legacy(ByteOrder::Big)),
    ] {
        let big = order == ByteOrder::Big;
        let bytes16 = |value: u16| if big { value.to_be_bytes() } else { value.to_le_bytes() };
        let machine = placed(generation);
        // Four descriptors, then the available ring; the used ring is on the next page.
        let ring = RAM + 0x4000;
        let (address, len) = (RAM + 0x8000, 16u32);
        machine.poke(ring, &if big { address.to_be_bytes() } else { address.to_le_bytes() });
        machine.poke(ring + 8, &if big { len.to_be_bytes() } else { len.to_le_bytes() });
        machine.poke(ring + 12, &bytes16(2));
        machine.poke(ring + 64 + 2, &bytes16(1));
        set(&machine, 18, &[3]);
        set(&machine, 14, &[0, 0]);
        set(&machine, 8, &((ring / 4096) as u32).to_le_bytes());
        set(&machine, 18, &[7]);
        machine.wires();
        set(&machine, 16, &[0, 0]);
        assert_eq!(machine.peek(address), [7], "{generation:?}");
        assert_eq!(machine.peek(ring + 0x1000 + 2), bytes16(1), "{generation:?}");
        assert_eq!(get(&machine, 19), [1], "{generation:?}");
        assert_eq!(get(&machine, 19), [0], "{generation:?}");
        set(&machine, 8, &[0; 4]);
        assert_eq!(get(&machine, 8), [0; 4], "taken back");
    }
}

#[test]
fn ids_are_those_of_transitional_devices() {
    for (device_type, id) in [
        (1, Some(0x1000)),
        (2, Some(0x1001)),
        (3, Some(0x1003)),
        (4, Some(0x1005)),
        (5, Some(0x1002)),
        (8, Some(0x1004)),
        (9, Some(0x1009)),
        (0x3f, Some(0x103f)),
        (0, None),
        (0x40, None),
        (0x1_0001, None),
    ] {
        for generation in [LITTLE, Generation::Legacy(ByteOrder::Big)] {
            let mut machine = Machine::empty();
            let attached = machine.attach(Toy::new(device_type), generation);
            assert_eq!(attached.ok().map(|()| machine.config16(FIRST, DEVICE_ID)), id, "{device_type}");
            if id.is_some() {
                assert_eq!(machine.config(FIRST, REVISION_ID), [0]);
                assert_eq!(u32::from(machine.config16(FIRST, SUBSYSTEM_ID)), device_type);
                assert_eq!(machine.config32(FIRST, BARS) & BAR_IO, BAR_IO);
                let capabilities = machine.capabilities(FIRST);
                assert_eq!(capabilities.iter().any(|(id, _)| *id == CAP_VENDOR), generation == LITTLE);
            }
        }
    }
}

#[test]
fn the_notify_register_is_a_doorbell_for_each_queue() {
    let machine = Machine::with(&[Generation::Legacy(ByteOrder::Little)]);
    machine.place(FIRST, 0, PORT);
    machine.enable(FIRST, COMMAND_IO);
    let bell = |queue| Doorbell { queue, space: Space::Io, address: PORT + 16, value: Some(queue) };
    assert_eq!(machine.wires(), [(FIRST, Wire::Bells(vec![bell(0), bell(1)]))]);
}

#[test]
fn a_driver_keeps_to_the_interface_that_it_began_with() {
    let machine = placed(LITTLE);
    machine.place(FIRST, 4, 0x10_0000_0000);
    machine.enable(FIRST, COMMAND_IO | COMMAND_MEMORY);
    let modern = 0x10_0000_0000;
    let word1 = |machine: &Machine| {
        machine.put(Space::Memory, modern + common::DEVICE_FEATURE_SELECT, &1u32.to_le_bytes());
        let [low, ..] = machine.get::<4>(Space::Memory, modern + common::DEVICE_FEATURE);
        low & 1
    };
    assert_eq!(word1(&machine), 1, "VERSION_1");
    assert_eq!(get(&machine, 0), 0x3800_0001u32.to_le_bytes());
    set(&machine, 18, &[1]);
    assert_eq!(word1(&machine), 0, "a legacy driver has it");
    set(&machine, 18, &[0]);
    machine.put(Space::Memory, modern + common::DEVICE_STATUS, &[1]);
    assert_eq!(word1(&machine), 1);
    assert_eq!(get(&machine, 18), [1], "a modern driver has it");
    assert_eq!(get::<4>(&machine, 0)[3], 0x30, "and there is no VIRTIO_F_ANY_LAYOUT for it");
}

#[test]
fn ports_do_not_touch_what_a_modern_driver_uses_but_reset_it() {
    let machine = placed(LITTLE);
    let modern = 0x10_0000_0000;
    machine.place(FIRST, 4, modern);
    machine.enable(FIRST, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER);
    let put = |field, data: &[u8]| machine.put(Space::Memory, modern + field, data);
    put(common::DEVICE_STATUS, &[3]);
    put(common::DRIVER_FEATURE_SELECT, &[1, 0, 0, 0]);
    put(common::DRIVER_FEATURE, &[1, 0, 0, 0]);
    put(common::DEVICE_STATUS, &[11]);
    put(common::QUEUE_SELECT, &[0, 0]);
    for (field, address) in
        [(common::QUEUE_DESC, RAM), (common::QUEUE_DRIVER, RAM + 0x1000), (common::QUEUE_DEVICE, RAM + 0x2000)]
    {
        put(field, &address.to_le_bytes());
    }
    put(common::QUEUE_ENABLE, &[1, 0]);
    put(common::CONFIG_VECTOR, &[1, 0]);
    put(common::QUEUE_VECTOR, &[2, 0]);
    put(common::DEVICE_STATUS, &[15]);
    let registers = || machine.get::<{ common::LEN }>(Space::Memory, modern);
    let before = registers();
    // Two bytes of the ring say that there is one buffer: it is used, and the pin tells it.
    machine.poke(RAM, &[(RAM + 0x3000).to_le_bytes(), (8 | 2u64 << 32).to_le_bytes()].concat());
    machine.poke(RAM + 0x1002, &[1, 0]);
    put(0x3000, &[0, 0]);
    for at in (0..40).filter(|at| *at != 18) {
        for data in [&[0; 1][..], &[0; 2], &[0; 4], &[0xff], &[0xff; 2], &[0xff; 4], &[1, 0], &[1, 0, 0, 0]] {
            set(&machine, at, data);
            assert_eq!(registers(), before, "{data:?} at port {at}");
        }
        get::<4>(&machine, at);
    }
    for status in [1, 3, 7, 0x80] {
        set(&machine, 18, &[status]);
        assert_eq!(registers(), before, "status {status:#x}");
    }
    assert_eq!(machine.get(Space::Memory, modern + 0x1000), [1], "its interrupt status is its own");
    machine.poke(RAM + 0x1002, &[2, 0]);
    put(0x3000, &[0, 0]);
    assert_eq!(machine.peek(RAM + 0x2002), [2, 0], "the queue goes on");
    set(&machine, 18, &[0]);
    assert_eq!(machine.get(Space::Memory, modern + common::DEVICE_STATUS), [0], "a legacy driver begins with a reset");
}

#[test]
fn modern_registers_do_not_touch_what_a_legacy_driver_uses_but_reset_it() {
    let machine = placed(LITTLE);
    let modern = 0x10_0000_0000;
    machine.place(FIRST, 4, modern);
    machine.enable(FIRST, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER);
    set(&machine, 18, &[3]);
    set(&machine, 8, &((RAM / 4096) as u32).to_le_bytes());
    set(&machine, 18, &[7]);
    machine.poke(RAM, &[(RAM + 0x3000).to_le_bytes(), (8 | 2u64 << 32).to_le_bytes()].concat());
    machine.poke(RAM + 64 + 2, &[1, 0]);
    set(&machine, 16, &[0, 0]);
    let registers = || get::<19>(&machine, 0);
    let before = registers();
    for at in (0..common::LEN as u64).chain(0x1000..0x1004).chain(0x2000..0x2008).chain(0x3000..0x3008) {
        for data in [&[0; 1][..], &[0; 2], &[0; 4], &[0; 8], &[0xff], &[0xff; 2], &[1, 0], &[1, 0, 0, 0]] {
            if at != common::DEVICE_STATUS {
                machine.put(Space::Memory, modern + at, data);
            }
            assert_eq!(registers(), before, "{data:?} at {at:#x}");
        }
        machine.get::<4>(Space::Memory, modern + at);
    }
    assert_eq!(get(&machine, 19), [1], "its interrupt status is its own");
    assert_eq!(get(&machine, 20), [1, 2, 3, 4, 5, 6], "and its configuration");
    machine.put(Space::Memory, modern + common::DEVICE_STATUS, &[0]);
    assert_eq!(get(&machine, 18), [0], "a modern driver begins with a reset");
}

#[test]
fn a_legacy_driver_that_says_that_it_is_there_makes_the_device_a_bus_master() {
    let machine = placed(LITTLE);
    let master = || machine.config16(FIRST, COMMAND) & COMMAND_MASTER != 0;
    set(&machine, 18, &[1]);
    assert!(!master());
    set(&machine, 18, &[3]);
    assert!(master());
    machine.enable(FIRST, COMMAND_IO);
    set(&machine, 18, &[7]);
    assert!(!master(), "who takes it away later means it");
}
