//! A disk of several queues, of which one is reset while the backend works on requests of all of them.

mod common;

use common::{Rig, STATUS_NONE};
use polyvirt_core::queue::Layout;
use polyvirt_devices::blk::wire;

const QUEUES: u16 = 3;

#[test]
fn a_queue_that_is_reset_loses_its_requests_and_no_other_does() {
    for layout in [Layout::Modern, Layout::Packed] {
        let mut rig = Rig::new(QUEUES, layout, wire::MQ);
        // Two requests in each queue, all with the backend.
        for index in 0..QUEUES {
            rig.drivers[usize::from(index)].read(0);
            rig.drivers[usize::from(index)].read(1);
            rig.disk.kick(index);
        }
        rig.disk.reset_queue(1);
        assert!(!rig.disk.queue_enabled(1));
        assert_eq!(rig.backend.cancelled(), 2);
        assert_eq!(rig.backend.release(), 6, "{layout:?}");
        rig.poll();
        let drivers = &mut rig.drivers;
        assert_eq!(drivers[0].used(), [0, 1], "{layout:?}");
        assert_eq!(drivers[2].used(), [0, 1], "{layout:?}");
        assert_eq!([drivers[0].slot(1), drivers[2].slot(0)], [[0xd1, 0]; 2]);
        assert_eq!(drivers[1].used(), [], "{layout:?}");
        assert_eq!([drivers[1].slot(0), drivers[1].slot(1)], [[STATUS_NONE; 2]; 2], "nothing arrives any more");

        // The others go on while it is enabled again, and it begins anew.
        rig.drivers[0].read(0);
        rig.disk.kick(0);
        rig.enable(1);
        rig.drivers[1].read(0);
        rig.disk.kick(1);
        assert_eq!(rig.backend.release(), 2, "{layout:?}");
        rig.poll();
        assert_eq!([rig.drivers[0].used(), rig.drivers[1].used()], [[0], [0]], "{layout:?}");
        assert_eq!(rig.drivers[1].slot(0), [0xd1, 0]);
        assert!(rig.disk.needs_reset().is_none() && rig.disk.is_running());
    }
}

#[test]
fn a_queue_begins_nothing_before_what_it_had_before_its_reset_is_back() {
    let mut rig = Rig::new(2, Layout::Modern, wire::MQ);
    rig.drivers[1].read(0);
    rig.disk.kick(1);
    rig.disk.reset_queue(1);
    rig.enable(1);
    for index in 0..2 {
        rig.drivers[usize::from(index)].read(0);
        rig.disk.kick(index);
    }
    assert_eq!(rig.backend.asked().len(), 2, "the old one, and the other queue's");
    assert!(rig.backend.release_one());
    rig.poll();
    assert_eq!(rig.backend.asked().len(), 2, "now its turn has come");
    rig.backend.release();
    rig.poll();
    assert_eq!([rig.drivers[0].used(), rig.drivers[1].used()], [[0], [0]]);
}
