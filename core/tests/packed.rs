//! What flags mean on a packed ring, and nowhere else.

mod common;

use common::{BUFFERS, Doorbell, Memory, RING, Rig, Shape, broken, buffer};
use polyvirt_core::queue::packed::layout::{AVAILABLE, NEXT, Position, Tail, USED, WRITE};
use polyvirt_core::queue::{Layout, QueueError};

const SHAPE: Shape = Shape { size: 5, event_idx: false, indirect: false, in_order: false, layout: Layout::Packed };

fn put(memory: &Memory, slot: u64, tail: Tail) {
    memory.write(RING + 16 * slot, &BUFFERS.to_le_bytes());
    memory.write(RING + 16 * slot + 8, &tail.to_word().to_ne_bytes());
}

#[test]
fn a_chain_that_goes_on_with_a_descriptor_that_is_not_available_is_refused() {
    let at = Position::START;
    for wrong in [0, USED, AVAILABLE | USED] {
        let memory = Memory::new(SHAPE);
        let mut device = memory.device();
        // Once with memory for chains to be allocated, once with what a chain before has left.
        for (head, refused) in [(0, false), (1, true)] {
            device.begin_burst();
            let tail = Tail { len: 4, id: head, flags: at.available_flags() };
            put(&memory, head.into(), Tail { flags: tail.flags | if refused { NEXT } else { 0 }, ..tail });
            if refused {
                put(&memory, 2, Tail { flags: wrong, ..tail });
                let reason = broken(device.pop());
                assert_eq!(reason, Some(QueueError::Unavailable { head: 1 }), "{wrong:#x}");
            } else {
                let chain = device.pop().expect("a good chain");
                device.complete(chain).unwrap();
            }
        }
    }
}

#[test]
fn without_the_flag_write_the_used_length_means_nothing() {
    for (flags, written) in [(0, 0), (WRITE, 3)] {
        let memory = Memory::new(SHAPE);
        let mut driver = memory.driver::<u32, _>(Doorbell::default());
        driver.add_buf(&[], &[buffer(0, 8)], 7).unwrap();
        driver.kick().unwrap();
        let id = Tail::from_word(u64::from_ne_bytes(memory.read(RING + 8))).id;
        let used = Position::START.used_flags();
        put(&memory, 0, Tail { len: 3, id, flags: used | flags });
        assert_eq!(driver.get_buf(), Ok(Some((7, written))));
    }
}

#[test]
fn a_used_descriptor_has_the_flag_write_if_any_byte_was_written_wherever() {
    let after = |work: fn(&mut polyvirt_core::queue::Chain<_>)| {
        let mut rig = Rig::new(SHAPE);
        rig.driver.add_buf(&[buffer(0, 8)], &[buffer(1, 8), buffer(2, 1)], 7).unwrap();
        rig.driver.kick().unwrap();
        let mut chain = rig.device.pop().expect("a chain");
        work(&mut chain);
        rig.device.complete(chain).unwrap();
        let Tail { len, flags, .. } = Tail::from_word(u64::from_ne_bytes(rig.memory.read(RING + 8)));
        (flags & !(AVAILABLE | USED), len)
    };
    assert_eq!(after(|_| {}), (0, 0));
    assert_eq!(after(|chain| chain.write(0, &[]).unwrap()), (0, 0));
    assert_eq!(after(|chain| chain.write(0, &[1, 2]).unwrap()), (WRITE, 2));
    // A status behind data that could not be read.
    assert_eq!(after(|chain| chain.write(8, &[1]).unwrap()), (WRITE, 0));
    assert_eq!(after(|chain| (chain.write(0, &[1; 9]).unwrap(), chain.set_written(0)).1), (WRITE, 0));
    assert_eq!(after(|chain| chain.set_written(9)), (WRITE, 9));
    assert_eq!(after(|chain| chain.set_written(0)), (0, 0));
    assert_eq!(after(|chain| assert!(chain.write(9, &[1]).is_err())), (0, 0));
    // Not what an earlier chain left in the same memory.
    let mut rig = Rig::new(SHAPE);
    for (written, flags) in [(1, WRITE), (0, 0)] {
        rig.driver.add_buf(&[], &[buffer(1, 8)], 7).unwrap();
        rig.driver.kick().unwrap();
        let mut chain = rig.device.pop().expect("a chain");
        chain.write(0, &vec![1; written]).unwrap();
        rig.device.complete(chain).unwrap();
        let at = RING + 8 + 16 * (1 - written as u64);
        let tail = Tail::from_word(u64::from_ne_bytes(rig.memory.read(at)));
        assert_eq!((tail.flags & !(AVAILABLE | USED), tail.len), (flags, written as u32));
        rig.driver.get_buf().unwrap().expect("a used buffer");
    }
}
