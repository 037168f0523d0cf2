//! In the steady state neither side of a queue allocates.

mod common;
mod counting;

use common::{Rig, Shape, buffer, every_shape};
use counting::count;

/// One round: the ring is filled, served and emptied.
fn round(rig: &mut Rig) {
    let mut added = 0;
    while rig.driver.free() >= 3 {
        let pieces = [buffer(0, 16), buffer(1, 16), buffer(2, 16)];
        rig.driver.add_buf(&pieces[..1], &pieces[1..], added).unwrap();
        added += 1;
    }
    rig.driver.kick().unwrap();
    assert_eq!(rig.serve() as u64, added);
    rig.device.needs_interrupt();
    for token in 0..added {
        assert_eq!(rig.driver.get_buf().unwrap(), Some((token, 0)));
    }
}

#[test]
fn the_counter_counts() {
    let before = count();
    let boxed = std::hint::black_box(Box::new([0; 100]));
    let held = count();
    drop(boxed);
    assert_eq!(held.calls - before.calls, 1);
    assert_eq!(held.live - before.live, 400);
    assert_eq!(count().live, before.live);
}

#[test]
fn a_queue_that_has_been_full_once_allocates_nothing_more() {
    for shape in every_shape(16).flat_map(|shape| [false, true].map(|indirect| Shape { indirect, ..shape })) {
        let mut rig = Rig::new(shape);
        round(&mut rig);
        let before = count().calls;
        (0..100).for_each(|_| round(&mut rig));
        assert_eq!(count().calls - before, 0, "{shape:?}");
    }
}
