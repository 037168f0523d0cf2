//! Any sequence of accesses is answered, by a bus with several functions, and leaves it as it should be.

use polyvirt_core::queue::ByteOrder;
use polyvirt_transports::pci::registers::*;
use polyvirt_transports::pci::{Generation, Space};
use proptest::prelude::*;

use super::machine::{ECAM, FIRST, Machine, RAM, TYPE, Toy, map};

/// An access: where, how many bytes, and what is written, if anything.
#[derive(Clone, Debug)]
struct Access {
    space: Space,
    address: u64,
    data: Vec<u8>,
    write: bool,
}

/// Bytes that mean something more often than they would by chance.
fn data() -> impl Strategy<Value = Vec<u8>> {
    let words = prop_oneof![
        Just(0u64),
        Just(u64::MAX),
        Just(1),
        (0u64..16).prop_map(|status| status),
        (0u8..40, 0u16..256).prop_map(|(function, offset)| config_address(function, offset).into()),
        (0u64..8).prop_map(|page| 0xc000_0000 + 0x4000 * page),
        (0u64..8).prop_map(|page| 0x1000 + 0x100 * page),
        (0u64..8).prop_map(|page| RAM + 0x1000 * page),
        any::<u64>(),
    ];
    let widths = prop_oneof![8 => prop_oneof![Just(1usize), Just(2), Just(4), Just(8)], 1 => 0usize..20];
    (words, widths).prop_map(|(word, len)| word.to_le_bytes().into_iter().cycle().take(len).collect())
}

/// Addresses at and around all that answers, and any others.
fn address() -> impl Strategy<Value = (Space, u64)> {
    let config = (0u64..5, 0u64..0x110).prop_map(|(device, at)| (Space::Memory, ECAM + (device << 15) + at));
    let bars = prop_oneof![0u64..0x50, 0xffeu64..0x1002, 0x1ff8u64..0x2010, 0x2ff8u64..0x3010, 0x3ff8u64..0x4000];
    let memory = (0u64..8, bars).prop_map(|(page, at)| (Space::Memory, 0xc000_0000 + 0x4000 * page + at));
    let ports = (0u64..8, 0u64..0x104).prop_map(|(page, at)| (Space::Io, 0x1000 + 0x100 * page + at));
    let map = map();
    let edges = [map.memory.start, map.memory.end, map.memory64.start, map.memory64.end, ECAM, ECAM + ECAM_LEN, 0];
    let edge =
        (0..edges.len(), -9i64..9).prop_map(move |(edge, by)| (Space::Memory, edges[edge].wrapping_add_signed(by)));
    prop_oneof![
        4 => config,
        3 => (CONFIG_ADDRESS - 1..CONFIG_DATA + 6).prop_map(|port| (Space::Io, port)),
        4 => memory,
        4 => ports,
        1 => edge,
        1 => any::<u64>().prop_map(|at| (Space::Memory, at)),
        1 => any::<u64>().prop_map(|at| (Space::Io, at)),
    ]
}

fn access() -> impl Strategy<Value = Access> {
    (address(), data(), any::<bool>()).prop_map(|((space, address), data, write)| Access {
        space,
        address,
        data,
        write,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_accesses_is_answered(accesses in prop::collection::vec(access(), 1..200)) {
        let mut machine = Machine::with(&[
            Generation::Modern,
            Generation::Transitional(ByteOrder::Little),
            Generation::Legacy(ByteOrder::Big),
        ]);
        machine.attach(Toy::sharing(&[(1, 0x1000), (2, 0x800)]), Generation::Modern).unwrap();
        for device in 1..5u8 {
            for bar in [1, 2, 4] {
                machine.place(device << 3, bar, 0xc000_0000 + 0x4000 * u64::from(device + bar));
            }
            machine.place(device << 3, 0, 0x1000 + 0x100 * u64::from(device));
            machine.enable(device << 3, COMMAND_IO | COMMAND_MEMORY);
        }
        let ours = |space, address: u64| match space {
            Space::Io => (CONFIG_ADDRESS..CONFIG_DATA + 4).contains(&address) || map().io.contains(&address),
            Space::Memory => {
                (ECAM..ECAM + ECAM_LEN).contains(&address)
                    || map().memory.contains(&address)
                    || map().memory64.contains(&address)
            }
        };
        for Access { space, address, mut data, write } in accesses {
            let before = data.clone();
            let answered = match write {
                true => machine.root.write(space, address, &data),
                false => machine.root.read(space, address, &mut data),
            };
            prop_assert_eq!(answered, ours(space, address));
            prop_assert!(data == before || answered && !write);
            for (_, device) in machine.served.lock().unwrap().iter() {
                device.lock().unwrap().poll();
            }
        }
        // Whoever is there is there still, and says who it is.
        let ids = [0x1040 + TYPE as u16, 0x1000 + TYPE as u16, 0x1000 + TYPE as u16, 0x1040 + TYPE as u16];
        for (device, id) in (1u8..).zip(ids) {
            prop_assert_eq!(machine.config16(device << 3, VENDOR_ID), 0x1af4);
            prop_assert_eq!(machine.config16(device << 3, DEVICE_ID), id);
        }
        // And after a reset its registers are as they were.
        machine.place(FIRST, 4, 0xc100_0000);
        machine.enable(FIRST, COMMAND_MEMORY);
        machine.put(Space::Memory, 0xc100_0000 + common::DEVICE_STATUS, &[0]);
        prop_assert_eq!(machine.get(Space::Memory, 0xc100_0000 + common::DEVICE_STATUS), [0]);
        prop_assert_eq!(machine.get(Space::Memory, 0xc100_0000 + common::CONFIG_VECTOR), NO_VECTOR.to_le_bytes());
        prop_assert_eq!(machine.get(Space::Memory, 0xc100_0000 + common::QUEUE_DESC), [0; 24]);
    }
}
