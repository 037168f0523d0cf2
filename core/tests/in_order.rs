//! Buffers that are used in the order in which they were made available (VIRTIO_F_IN_ORDER, 2.7.9): what devices may do
//! with it, and what they may not.

mod common;

use common::{RING, Rig, Shape, buffer, popped};
use polyvirt_core::queue::packed::layout::{Position, Tail, WRITE};
use polyvirt_core::queue::{Layout, QueueError};

const SIZE: u16 = 8;

fn shape(layout: Layout) -> Shape {
    Shape { size: SIZE, event_idx: false, indirect: false, in_order: true, layout }
}

/// A ring with `count` buffers in flight, of 16 writable bytes each.
fn filled(layout: Layout, count: u64) -> Rig {
    let mut rig = Rig::new(shape(layout));
    for token in 0..count {
        rig.driver.add_buf(&[], &[buffer(token, 16)], token).unwrap();
    }
    rig.driver.kick().unwrap();
    rig
}

/// Uses buffer `id` with `len` bytes at the first place of the packed ring.
fn use_packed(rig: &Rig, at: Position, id: u16, len: u32) {
    let word = Tail { len, id, flags: at.used_flags() | WRITE }.to_word();
    rig.memory.write(RING + 16 * u64::from(at.index()) + 8, &word.to_ne_bytes());
}

fn all(rig: &mut Rig) -> Vec<(u64, u32)> {
    std::iter::from_fn(|| rig.driver.get_buf().unwrap()).collect()
}

#[test]
fn a_device_may_use_a_batch_by_its_last_buffer_alone() {
    let mut split = filled(Layout::Modern, 4);
    split.memory.used(0, 2, 5, 3);
    // How much was written to those before the last is not told: all, as far as the driver knows.
    assert_eq!(all(&mut split), [(0, 16), (1, 16), (2, 5)]);
    split.memory.used(3, 3, 7, 4);
    assert_eq!(all(&mut split), [(3, 7)]);

    let mut packed = filled(Layout::Packed, 4);
    use_packed(&packed, Position::START, 2, 5);
    assert_eq!(all(&mut packed), [(0, 16), (1, 16), (2, 5)]);
    use_packed(&packed, Position::new(3, true), 3, 7);
    assert_eq!(all(&mut packed), [(3, 7)]);
}

#[test]
fn a_batch_beyond_the_used_index_or_of_nothing_in_flight_latches_the_driver() {
    let mut rig = filled(Layout::Modern, 4);
    rig.memory.used(0, 2, 5, 2);
    assert_eq!(rig.driver.get_buf(), Err(QueueError::UsedId { id: 2 }));
    for id in [4, 7, 8, u32::MAX] {
        let mut rig = filled(Layout::Modern, 4);
        rig.memory.used(0, id, 5, 1);
        assert_eq!(rig.driver.get_buf(), Err(QueueError::UsedId { id }));
    }
    let mut rig = filled(Layout::Packed, 4);
    use_packed(&rig, Position::START, 4, 5);
    assert_eq!(rig.driver.get_buf(), Err(QueueError::UsedId { id: 4 }));
}

#[test]
fn a_length_beyond_the_last_buffer_of_a_batch_latches_the_driver_when_it_comes_to_it() {
    let mut rig = filled(Layout::Modern, 2);
    rig.memory.used(0, 1, 17, 2);
    assert_eq!(rig.driver.get_buf(), Ok(Some((0, 16))));
    assert_eq!(rig.driver.get_buf(), Err(QueueError::UsedLength { len: 17, writable: 16 }));
}

#[test]
fn what_a_device_finishes_early_is_used_with_what_it_waited_for() {
    for layout in [Layout::Modern, Layout::Packed] {
        let mut rig = filled(layout, 3);
        rig.device.begin_burst();
        let mut taken: Vec<_> = std::iter::from_fn(|| popped(rig.device.pop())).collect();
        for (number, chain) in taken.iter_mut().enumerate() {
            chain.set_written(number as u32 + 1);
        }
        let first = taken.remove(0);
        for chain in taken.into_iter().rev() {
            rig.device.complete(chain).unwrap();
            assert_eq!(rig.driver.get_buf(), Ok(None));
        }
        assert_eq!(rig.device.in_flight(), 3);
        rig.device.complete(first).unwrap();
        assert_eq!(all(&mut rig), [(0, 1), (1, 2), (2, 3)]);
    }
}

#[test]
fn a_driver_takes_descriptors_round_and_round() {
    let mut rig = filled(Layout::Modern, 3);
    assert_eq!(rig.serve(), 3);
    assert_eq!(all(&mut rig).len(), 3);
    for token in 0..6 {
        rig.driver.add_buf(&[], &[buffer(token, 16)], token).unwrap();
    }
    rig.driver.kick().unwrap();
    let ring = rig.memory.shape.config().driver;
    let heads: Vec<_> = (3..9).map(|slot| rig.memory.get16(ring + 4 + 2 * (slot % u64::from(SIZE)))).collect();
    assert_eq!(heads, [3, 4, 5, 6, 7, 0]);
}
