//! A modern function: capabilities, base address registers, what is behind them, interrupts.

use polyvirt_core::Features;
use polyvirt_transports::pci::registers::*;
use polyvirt_transports::pci::{Doorbell, Generation, Message, Space};

use super::machine::{FIRST, Machine, RAM, Toy, Wire};

const BAR4: u64 = 0x10_0000_0000;
const MEMORY: u16 = COMMAND_MEMORY | COMMAND_MASTER;

/// A structure that a capability leads to: base address register, offset, length, and where the capability is.
fn structure(machine: &Machine, kind: u8) -> (u8, u32, u32, u16) {
    let of_kind = |at: &u16| machine.config(FIRST, at + CAP_TYPE) == [kind];
    let vendors = machine.capabilities(FIRST).into_iter().filter(|(id, _)| *id == CAP_VENDOR);
    let at = vendors.map(|(_, at)| at).find(of_kind).unwrap();
    let [bar] = machine.config(FIRST, at + CAP_BAR);
    (bar, machine.config32(FIRST, at + CAP_OFFSET), machine.config32(FIRST, at + CAP_LENGTH), at)
}

/// A machine with a modern device whose structures are at [`BAR4`]; and where its common configuration is.
fn placed() -> (Machine, u64) {
    let machine = Machine::with(&[Generation::Modern]);
    machine.place(FIRST, 4, BAR4);
    machine.place(FIRST, 1, 0xc000_0000);
    machine.enable(FIRST, MEMORY);
    let common = BAR4 + u64::from(structure(&machine, CAP_COMMON).1);
    (machine, common)
}

fn set(machine: &Machine, address: u64, data: &[u8]) {
    machine.put(Space::Memory, address, data);
}

/// Brings the device to DRIVER_OK with queue 0 of four entries at `RAM`, its driver area 0x1000 and its device area 0x2000
/// behind, and one writable descriptor.
fn run(machine: &Machine, common: u64, features: Features) {
    set(machine, common + common::DEVICE_STATUS, &[3]);
    for word in 0..2u32 {
        set(machine, common + common::DRIVER_FEATURE_SELECT, &word.to_le_bytes());
        let bits = (features | Features::VERSION_1).word(word);
        set(machine, common + common::DRIVER_FEATURE, &bits.to_le_bytes());
    }
    set(machine, common + common::DEVICE_STATUS, &[11]);
    assert_eq!(machine.get(Space::Memory, common + common::DEVICE_STATUS), [11]);
    for (field, address) in
        [(common::QUEUE_DESC, RAM), (common::QUEUE_DRIVER, RAM + 0x1000), (common::QUEUE_DEVICE, RAM + 0x2000)]
    {
        set(machine, common + field, &(address as u32).to_le_bytes());
        set(machine, common + field + 4, &[0; 4]);
    }
    set(machine, common + common::QUEUE_ENABLE, &[1, 0]);
    set(machine, common + common::DEVICE_STATUS, &[15]);
    machine.poke(RAM, &[(RAM + 0x3000).to_le_bytes(), (8 | 2u64 << 32).to_le_bytes()].concat());
}

/// Makes head 0 available for the `count`th time.
fn offer(machine: &Machine, count: u16) {
    machine.poke(RAM + 0x1002, &count.to_le_bytes());
}

fn used(machine: &Machine) -> u16 {
    u16::from_le_bytes(machine.peek(RAM + 0x2002))
}

#[test]
fn every_structure_has_its_capability() {
    let machine = Machine::with(&[Generation::Modern]);
    assert_ne!(machine.config16(FIRST, STATUS) & STATUS_CAPABILITIES, 0);
    let kinds: Vec<_> =
        machine.capabilities(FIRST).iter().map(|(id, at)| (*id, machine.config(FIRST, at + 2))).collect();
    let vendor = |len, kind| (CAP_VENDOR, [len, kind]);
    let virtio = [vendor(16, CAP_COMMON), vendor(16, CAP_ISR), vendor(16, CAP_DEVICE), vendor(20, CAP_NOTIFY)];
    // The table of messages has three vectors: two queues and the configuration.
    assert_eq!(kinds, [&virtio[..], &[vendor(20, CAP_WINDOW), (CAP_MSIX, [2, 0])]].concat());
    let (bar, offset, length, at) = structure(&machine, CAP_NOTIFY);
    let multiplier = machine.config32(FIRST, at + CAP_MULTIPLIER);
    assert_eq!((bar, offset % 4, multiplier), (4, 0, 4));
    assert!(length >= 2 * multiplier, "room for two queues");
    assert_eq!(structure(&machine, CAP_COMMON).2, common::LEN as u32);
    assert_eq!(structure(&machine, CAP_ISR).2, 1);
    assert_eq!(machine.config(FIRST, INTERRUPT_PIN), [1]);
}

#[test]
fn a_base_address_register_tells_its_size_and_kind_and_is_decoded_where_it_is_placed() {
    let (machine, common) = placed();
    let num_queues = common::NUM_QUEUES;
    assert_eq!(machine.get(Space::Memory, common + num_queues), [2, 0]);
    machine.enable(FIRST, 0);
    assert_eq!(machine.get(Space::Memory, common + num_queues), [0xff; 2], "nothing is decoded");
    for bar in [4, 5] {
        machine.set_config(FIRST, BARS + 4 * bar, &[0xff; 4]);
    }
    let sized = [4, 5].map(|bar| machine.config32(FIRST, BARS + 4 * bar));
    assert_eq!(sized, [0xffff_c000 | BAR_64 | BAR_PREFETCHABLE, u32::MAX]);
    machine.set_config(FIRST, BARS + 4, &[0xff; 4]);
    assert_eq!(machine.config32(FIRST, BARS + 4), 0xffff_f000);
    for bar in [0, 2, 3] {
        machine.set_config(FIRST, BARS + 4 * bar, &[0xff; 4]);
        assert_eq!(machine.config32(FIRST, BARS + 4 * bar), 0, "there is no register {bar}");
    }
    // Low bits that are not an address's do not count.
    for there in [0x1f_ffff_c000, 0xdfff_c000] {
        machine.place(FIRST, 4, there | 0x3fff);
        machine.enable(FIRST, MEMORY);
        assert_eq!(machine.get(Space::Memory, there + num_queues), [2, 0]);
        assert_eq!(machine.get(Space::Memory, common + num_queues), [0xff; 2], "it has moved away");
        machine.enable(FIRST, 0);
    }
    // Byte by byte, with decoding on.
    machine.enable(FIRST, MEMORY);
    for (index, byte) in BAR4.to_le_bytes().into_iter().enumerate() {
        machine.set_config(FIRST, BARS + 16 + index as u16, &[byte]);
    }
    assert_eq!(machine.get(Space::Memory, common + num_queues), [2, 0]);
}

#[test]
fn registers_outside_of_what_the_bus_answers_are_not_reached() {
    let (machine, _) = placed();
    machine.wires();
    for outside in [0, RAM, 0xa000_0000, !0x3fff] {
        machine.place(FIRST, 4, outside);
        assert!(!machine.root.read(Space::Memory, outside, &mut [0; 4]), "{outside:#x}");
        let bells: Vec<_> = machine.wires().into_iter().filter(|(_, wire)| *wire != Wire::Bells(vec![])).collect();
        assert_eq!(bells.last(), None, "no doorbells at {outside:#x}");
    }
}

#[test]
fn doorbells_are_where_the_notify_structure_is_and_follow_it() {
    let machine = Machine::with(&[Generation::Modern]);
    let at = |base| {
        let place = base + u64::from(structure(&machine, CAP_NOTIFY).1);
        let bell =
            |queue: u16| Doorbell { queue, space: Space::Memory, address: place + 4 * u64::from(queue), value: None };
        (FIRST, Wire::Bells(vec![bell(0), bell(1)]))
    };
    machine.place(FIRST, 4, BAR4);
    assert_eq!(machine.wires(), [], "nothing is decoded yet");
    machine.enable(FIRST, MEMORY);
    assert_eq!(machine.wires(), [at(BAR4)]);
    machine.set_config(FIRST, BARS + 16, &0x4000_0000u32.to_le_bytes());
    assert_eq!(machine.wires(), [at(BAR4 + 0x4000_0000)]);
    machine.set_config(FIRST, BARS + 16, &0x4000_0000u32.to_le_bytes());
    assert_eq!(machine.wires(), [], "nothing has changed");
    machine.enable(FIRST, 0);
    assert_eq!(machine.wires(), [(FIRST, Wire::Bells(vec![]))]);
}

#[test]
fn a_notification_of_any_width_is_for_the_queue_of_its_place() {
    let (machine, common) = placed();
    run(&machine, common, Features::empty());
    let doorbell = BAR4 + u64::from(structure(&machine, CAP_NOTIFY).1);
    for (count, width) in [1, 2, 4, 8].into_iter().enumerate() {
        offer(&machine, count as u16 + 1);
        set(&machine, doorbell + 4, &vec![0; width]);
        assert_eq!(usize::from(used(&machine)), count, "that was queue 1");
        set(&machine, doorbell + 1, &vec![0; width]);
        assert_eq!(usize::from(used(&machine)), count, "that was no queue's place");
        set(&machine, doorbell, &vec![0xff; width]);
        assert_eq!(usize::from(used(&machine)), count + 1);
    }
    assert_eq!(machine.peek(RAM + 0x3000), [7]);
}

#[test]
fn the_pin_is_held_until_the_interrupt_status_is_read() {
    let (machine, common) = placed();
    run(&machine, common, Features::empty());
    let [isr, doorbell] = [CAP_ISR, CAP_NOTIFY].map(|kind| BAR4 + u64::from(structure(&machine, kind).1));
    machine.wires();
    offer(&machine, 1);
    set(&machine, doorbell, &[0, 0]);
    offer(&machine, 2);
    set(&machine, doorbell, &[0, 0]);
    assert_eq!(machine.wires(), [(FIRST, Wire::Pin(true))]);
    assert_ne!(machine.config16(FIRST, STATUS) & STATUS_INTERRUPT, 0);
    assert_eq!(machine.get(Space::Memory, isr), [1]);
    assert_eq!(machine.wires(), [(FIRST, Wire::Pin(false))]);
    assert_eq!(machine.get(Space::Memory, isr), [0]);
    assert_eq!(machine.config16(FIRST, STATUS) & STATUS_INTERRUPT, 0);
    // Not allowed: it shows, and comes when it may.
    machine.enable(FIRST, MEMORY | COMMAND_NO_PIN);
    offer(&machine, 3);
    set(&machine, doorbell, &[0, 0]);
    assert_eq!(machine.wires(), []);
    assert_ne!(machine.config16(FIRST, STATUS) & STATUS_INTERRUPT, 0);
    machine.enable(FIRST, MEMORY);
    assert_eq!(machine.wires(), [(FIRST, Wire::Pin(true))]);
}

#[test]
fn a_masked_message_comes_with_its_unmasking() {
    let (machine, common) = placed();
    set(&machine, common + common::QUEUE_VECTOR, &[2, 0]);
    assert_eq!(machine.get(Space::Memory, common + common::QUEUE_VECTOR), [2, 0]);
    set(&machine, common + common::CONFIG_VECTOR, &[3, 0]);
    assert_eq!(machine.get(Space::Memory, common + common::CONFIG_VECTOR), NO_VECTOR.to_le_bytes());
    run(&machine, common, Features::empty());
    let (table, pending) = (0xc000_0000, 0xc000_0800);
    let control = machine.msix(FIRST) + MSIX_CONTROL;
    let message = Message { address: 0x1_fee0_0000, data: 0x41 };
    machine.set_config(FIRST, control, &(MSIX_ENABLE | MSIX_MASK).to_le_bytes());
    let entry = [&message.address.to_le_bytes()[..], &message.data.to_le_bytes()].concat();
    set(&machine, table + 32, &entry);
    set(&machine, table + 44, &[0; 4]);
    machine.wires();
    let doorbell = BAR4 + u64::from(structure(&machine, CAP_NOTIFY).1);
    offer(&machine, 1);
    set(&machine, doorbell, &[0, 0]);
    assert_eq!((machine.wires(), machine.get(Space::Memory, pending)), (vec![], [4]), "all are masked");
    set(&machine, table + 44, &[1]);
    machine.set_config(FIRST, control, &MSIX_ENABLE.to_le_bytes());
    assert_eq!((machine.wires(), machine.get(Space::Memory, pending)), (vec![], [4]), "this one is masked");
    set(&machine, table + 44, &[0]);
    assert_eq!(machine.wires(), [(FIRST, Wire::Route(2, message)), (FIRST, Wire::Signal(2))]);
    assert_eq!(machine.get(Space::Memory, pending), [0]);
    assert_eq!(machine.get(Space::Memory, BAR4 + u64::from(structure(&machine, CAP_ISR).1)), [0], "no pin, no bit");
}

#[test]
fn without_bus_master_enable_a_device_neither_touches_memory_nor_sends_messages() {
    for off_from in ["the beginning", "DRIVER_OK on", "the kick on"] {
        let (machine, common) = placed();
        let off = |now| {
            if off_from == now {
                machine.enable(FIRST, COMMAND_MEMORY);
            }
        };
        let message = Message { address: 0xfee0_0000, data: 0x41 };
        let entry = [&message.address.to_le_bytes()[..], &message.data.to_le_bytes(), &[0; 4]].concat();
        set(&machine, 0xc000_0000, &entry);
        machine.set_config(FIRST, machine.msix(FIRST) + MSIX_CONTROL, &MSIX_ENABLE.to_le_bytes());
        set(&machine, common + common::QUEUE_VECTOR, &[0, 0]);
        off("the beginning");
        run(&machine, common, Features::empty());
        off("DRIVER_OK on");
        machine.wires();
        offer(&machine, 1);
        off("the kick on");
        let doorbell = BAR4 + u64::from(structure(&machine, CAP_NOTIFY).1);
        let before: [u8; 0x3000] = machine.peek(RAM);
        set(&machine, doorbell, &[0, 0]);
        let device = machine.served.lock().unwrap()[0].1.clone();
        assert!(!device.lock().unwrap().kick(0), "nothing that it could do");
        assert!(!device.lock().unwrap().poll());
        assert!(machine.peek(RAM) == before, "not even the flags of the rings, off from {off_from}");
        assert_eq!(machine.wires(), []);
        machine.enable(FIRST, MEMORY);
        assert_eq!(used(&machine), 1, "what was asked for meanwhile is done, off from {off_from}");
        let signals: Vec<_> = machine.wires().into_iter().filter(|(_, wire)| *wire == Wire::Signal(0)).collect();
        assert_eq!(signals.len(), 1);
        offer(&machine, 2);
        set(&machine, doorbell, &[0, 0]);
        assert_eq!(used(&machine), 2);
    }
}

#[test]
fn a_reset_without_bus_master_enable_forgets_what_was_asked_for() {
    let (machine, common) = placed();
    run(&machine, common, Features::empty());
    machine.enable(FIRST, COMMAND_MEMORY);
    offer(&machine, 1);
    set(&machine, BAR4 + u64::from(structure(&machine, CAP_NOTIFY).1), &[0, 0]);
    set(&machine, common + common::DEVICE_STATUS, &[0]);
    assert_eq!(machine.get(Space::Memory, common + common::DEVICE_STATUS), [0]);
    machine.enable(FIRST, MEMORY);
    let told = |wire: &Wire| matches!(wire, Wire::Signal(_) | Wire::Pin(_));
    assert!(used(&machine) == 0 && !machine.wires().iter().any(|(_, wire)| told(wire)));
}

#[test]
fn a_queue_is_reset_alone_and_only_if_that_was_negotiated() {
    for negotiated in [false, true] {
        let (machine, common) = placed();
        run(&machine, common, if negotiated { Features::RING_RESET } else { Features::empty() });
        set(&machine, common + common::QUEUE_RESET, &[1, 0]);
        let after = [common::QUEUE_RESET, common::QUEUE_ENABLE].map(|field| machine.get(Space::Memory, common + field));
        assert_eq!(after, [[0, 0], [u8::from(!negotiated), 0]]);
    }
}

#[test]
fn there_are_no_administration_queues() {
    let (machine, common) = placed();
    set(&machine, common + common::DEVICE_FEATURE_SELECT, &1u32.to_le_bytes());
    let offered = u32::from_le_bytes(machine.get(Space::Memory, common + common::DEVICE_FEATURE));
    assert_eq!(offered & Features::ADMIN_VQ.word(1), 0);
    assert_eq!(machine.get(Space::Memory, common + common::ADMIN_QUEUE_INDEX), [0; 4]);
}

#[test]
fn the_window_leads_into_structures_alone() {
    let (machine, common) = placed();
    let window = structure(&machine, CAP_WINDOW).3;
    let data = window + CAP_DATA;
    let aim = |bar: u8, offset: u32, len: u32| {
        machine.set_config(FIRST, window + CAP_BAR, &[bar]);
        machine.set_config(FIRST, window + CAP_OFFSET, &offset.to_le_bytes());
        machine.set_config(FIRST, window + CAP_LENGTH, &len.to_le_bytes());
    };
    aim(4, common::NUM_QUEUES as u32, 2);
    assert_eq!(machine.config(FIRST, data), [2, 0, 0, 0]);
    aim(4, common::DEVICE_STATUS as u32, 1);
    machine.set_config(FIRST, data, &[3]);
    assert_eq!(machine.get(Space::Memory, common + common::DEVICE_STATUS), [3]);
    // Nowhere: of no width, not aligned, behind the end, without a register.
    for (bar, offset, len) in [(4, 0x14, 3), (4, 0x13, 2), (4, 0x3ffe, 4), (4, u32::MAX, 4), (3, 0, 1), (0xff, 0, 1)] {
        aim(bar, offset, len);
        machine.set_config(FIRST, data, &[0; 4]);
        assert_eq!(machine.config(FIRST, data), [0; 4], "{bar} {offset:#x} {len}");
    }
    assert_eq!(machine.get(Space::Memory, common + common::DEVICE_STATUS), [3], "nobody wrote a 0");
}

#[test]
fn the_identity_of_a_modern_device_is_its_type() {
    for (device_type, id) in
        [(1, Some(0x1041)), (2, Some(0x1042)), (0x3f, Some(0x107f)), (0x40, None), (u32::MAX, None)]
    {
        let mut machine = Machine::empty();
        let attached = machine.attach(Toy::new(device_type), Generation::Modern);
        assert_eq!(attached.ok().map(|()| machine.config16(FIRST, DEVICE_ID)), id);
        if let Some(id) = id {
            assert_eq!(machine.config16(FIRST, VENDOR_ID), 0x1af4);
            assert_eq!(machine.config(FIRST, REVISION_ID), [1]);
            assert_eq!(machine.config16(FIRST, SUBSYSTEM_ID), id);
        }
    }
}
