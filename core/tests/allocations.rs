//! In the steady state neither side of a queue allocates.

mod common;
mod counting;

use common::{Rig, Shape, buffer, every_shape};
use counting::count;
use polyvirt_core::queue::Layout;

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

#[test]
fn the_memory_of_a_long_chain_does_not_stay() {
    const LONG: u16 = 4096;
    for layout in [Layout::Modern, Layout::Packed] {
        let shape = Shape { size: LONG, event_idx: false, indirect: false, in_order: false, layout };
        let mut rig = Rig::new(shape);
        let pieces: Vec<_> = (0..u64::from(LONG)).map(|number| buffer(number, 8)).collect();
        let before = count().live;
        let mut most = 0;
        for token in 0..3 {
            rig.driver.add_buf(&[], &pieces, token).unwrap();
            rig.driver.kick().unwrap();
            rig.device.begin_burst();
            let chain = rig.device.pop().expect("a chain");
            most = most.max(count().live - before);
            rig.device.complete(chain).unwrap();
            let kept = count().live - before;
            assert!(kept < 8192, "{layout:?}: {kept} bytes are kept, of {most}");
            rig.driver.get_buf().unwrap().expect("a used buffer");
        }
        assert!(most > 16 * isize::from(LONG as i16), "it did take memory: {most}");
    }
}
