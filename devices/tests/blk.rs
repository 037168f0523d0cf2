//! What a disk asks its backend for, and when.

mod common;

use common::{Rig, SECTORS};
use polyvirt_core::queue::Layout;
use polyvirt_core::{Features, Status};
use polyvirt_devices::blk::{IN_FLIGHT, RANGE, Request, wire};

const WRITE: (u32, u64) = (wire::OUT, 3);

fn write() -> Request {
    Request::Write { offset: 3 * 512, data: vec![7; 512] }
}

/// Lets the backend finish everything, one after another; what it was asked for.
fn run(rig: &mut Rig) -> Vec<Request> {
    let mut all = Vec::new();
    while let Some(next) = rig.backend.asked().into_iter().next() {
        all.push(next);
        assert_eq!(rig.drivers[0].used(), [], "not before the backend has done all of it");
        rig.backend.release_one();
        rig.poll();
    }
    assert_eq!(rig.drivers[0].used(), [0]);
    all
}

/// What one sector's write makes the backend do.
fn written(rig: &mut Rig) -> Vec<Request> {
    rig.drivers[0].ask(0, WRITE, &[7; 512], 0);
    rig.disk.kick(0);
    let all = run(rig);
    assert_eq!(rig.drivers[0].byte(0, 0), wire::OK);
    all
}

#[test]
fn a_write_is_durable_before_it_is_answered_unless_the_driver_can_flush() {
    let writeback = |rig: &mut Rig| {
        let mut byte = [0xff];
        rig.disk.read_config(32, &mut byte);
        byte[0]
    };
    let mut rig = Rig::new(1, Layout::Modern, Features::empty());
    assert_eq!(written(&mut rig), [write(), Request::Flush]);
    rig.drivers[0].ask(0, (wire::IN, 0), &[], 512);
    rig.disk.kick(0);
    assert_eq!(run(&mut rig).len(), 1, "a read changes nothing");
    rig.drivers[0].ask(0, (wire::OUT, 0), &[], 0);
    rig.disk.kick(0);
    assert_eq!(rig.drivers[0].used(), [0], "nor does a write of nothing");
    rig.disk.write_config(32, &[1]);
    assert_eq!(written(&mut rig).len(), 2, "writeback is not negotiated");

    let mut rig = Rig::new(1, Layout::Modern, wire::FLUSH_FEATURE);
    assert_eq!(written(&mut rig), [write()]);
    rig.disk.write_config(32, &[0]);
    assert_eq!(written(&mut rig), [write()]);

    let mut rig = Rig::new(1, Layout::Modern, wire::FLUSH_FEATURE | wire::CONFIG_WCE);
    assert_eq!((writeback(&mut rig), written(&mut rig).len()), (1, 1));
    rig.disk.write_config(32, &[0]);
    assert_eq!((writeback(&mut rig), written(&mut rig).len()), (0, 2));
    rig.disk.write_config(32, &[1]);
    assert_eq!((writeback(&mut rig), written(&mut rig).len()), (1, 1));

    // Whoever wanted it durable still gets it so behind a reset, which a front end may make of a stop: nobody says it again.
    rig.disk.write_config(32, &[0]);
    rig.disk.set_status(Status::empty());
    rig.bring_up(1, wire::FLUSH_FEATURE | wire::CONFIG_WCE);
    assert_eq!((writeback(&mut rig), written(&mut rig).len()), (0, 2));

    // 5.2.5.2: with nothing to flush by it begins with a 0.
    let mut rig = Rig::new(1, Layout::Modern, wire::CONFIG_WCE);
    assert_eq!((writeback(&mut rig), written(&mut rig).len()), (0, 2));
    rig.disk.write_config(32, &[1]);
    assert_eq!((writeback(&mut rig), written(&mut rig).len()), (1, 1), "whoever wants it so gets it");
    rig.disk.set_status(Status::empty());
    assert_eq!(writeback(&mut rig), 1, "as before features are negotiated");
    rig.bring_up(1, wire::CONFIG_WCE);
    assert_eq!((writeback(&mut rig), written(&mut rig).len()), (0, 2));
}

#[test]
fn what_is_zeroed_is_durable_like_what_is_written_and_what_is_discarded_need_not_be() {
    let mut rig = Rig::new(1, Layout::Modern, wire::WRITE_ZEROES_FEATURE | wire::DISCARD_FEATURE);
    let segment = |sector, count| wire::Segment { sector, count, flags: 0 }.to_bytes();
    rig.drivers[0].ask(0, (wire::WRITE_ZEROES, 0), &segment(1, 1 << 16), 0);
    rig.disk.kick(0);
    let zero = |offset, len| Request::Zero { offset, len, deallocate: false };
    assert_eq!(run(&mut rig), [zero(512, RANGE), zero(512 + RANGE, RANGE), Request::Flush]);
    // However often a sector is named, it is done once.
    rig.drivers[0].ask(0, (wire::DISCARD, 0), &segment(8, 16).repeat(30), 0);
    rig.disk.kick(0);
    assert_eq!(run(&mut rig), [Request::Discard { offset: 8 * 512, len: 16 * 512 }]);
    assert_eq!(rig.drivers[0].byte(0, 0), wire::OK);
    rig.drivers[0].ask(0, (wire::WRITE_ZEROES, 0), &segment(1, (1 << 16) + 1), 0);
    rig.disk.kick(0);
    assert_eq!((rig.drivers[0].used(), rig.drivers[0].byte(0, 0)), (vec![0], wire::IOERR), "more than is said");
}

#[test]
fn no_more_is_taken_than_is_soon_done() {
    let mut rig = Rig::new(8, Layout::Modern, wire::MQ | wire::WRITE_ZEROES_FEATURE);
    let all = wire::Segment { sector: 0, count: 1 << 16, flags: wire::UNMAP }.to_bytes();
    for index in 0..8u16 {
        (0..2).for_each(|slot| rig.drivers[usize::from(index)].ask(slot, (wire::WRITE_ZEROES, 0), &all, 0));
        rig.disk.kick(index);
    }
    // Each is two pieces of RANGE, and all together would be 512 MiB.
    let piece = |offset| Request::Zero { offset, len: RANGE, deallocate: true };
    assert_eq!(rig.backend.asked(), vec![piece(0); 8]);
    for index in 0..8 {
        rig.disk.hold_queue(index);
    }
    assert_eq!(rig.backend.release(), 8);
    rig.poll();
    assert_eq!(rig.backend.asked(), vec![piece(RANGE); 8], "what was taken is finished, and nothing else begun");
    rig.backend.release();
    rig.poll();
    assert!(rig.backend.asked().iter().all(|request| *request == Request::Flush));
    rig.backend.release();
    rig.poll();
    assert!((0..8).all(|index| rig.disk.queue_in_flight(index) == 0));
}

#[test]
fn a_queue_that_is_held_finishes_a_discard_with_the_piece_that_is_under_way() {
    let mut rig = Rig::new(1, Layout::Modern, wire::DISCARD_FEATURE);
    let segment = wire::Segment { sector: 0, count: SECTORS as u32, flags: 0 };
    rig.drivers[0].ask(0, (wire::DISCARD, 0), &segment.to_bytes(), 0);
    rig.disk.kick(0);
    rig.disk.hold_queue(0);
    assert_eq!(rig.disk.queue_in_flight(0), 1);
    assert!(rig.backend.release_one());
    rig.poll();
    assert_eq!((rig.disk.queue_in_flight(0), rig.backend.asked()), (0, vec![]));
    assert_eq!((rig.drivers[0].used(), rig.drivers[0].byte(0, 0)), (vec![0], wire::OK));
}

#[test]
fn more_queues_than_the_backend_takes_requests_get_the_same() {
    const QUEUES: u16 = 64;
    const ROUNDS: u32 = 20;
    for layout in [Layout::Modern, Layout::Packed] {
        let mut rig = Rig::new(QUEUES, layout, wire::MQ);
        let mut served = [0u32; QUEUES as usize];
        for index in 0..QUEUES {
            (0..2).for_each(|slot| rig.drivers[usize::from(index)].read(slot));
            rig.disk.kick(index);
        }
        for _ in 0..ROUNDS * u32::from(QUEUES) {
            assert_eq!(rig.backend.asked().len(), IN_FLIGHT);
            rig.backend.release_one();
            rig.poll();
            // Whoever got something asks for more at once, and says so: it has to wait for the others all the same.
            for index in 0..QUEUES {
                for slot in rig.drivers[usize::from(index)].used() {
                    served[usize::from(index)] += 1;
                    rig.drivers[usize::from(index)].read(slot);
                    rig.disk.kick(index);
                }
            }
        }
        let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
        // Two that were with the backend before all others came.
        assert!(most - least <= 2, "{layout:?}: {served:?}");
    }
}

#[test]
fn a_backend_that_never_answers_is_given_no_more_however_often_the_device_is_reset() {
    for layout in [Layout::Modern, Layout::Packed] {
        let mut rig = Rig::new(8, layout, wire::MQ);
        for round in 0..200 {
            for index in 0..8u16 {
                (0..2).for_each(|slot| rig.drivers[usize::from(index)].ask(slot, WRITE, &[round as u8; 512], 0));
                rig.disk.kick(index);
            }
            assert_eq!(rig.backend.asked().len(), IN_FLIGHT, "{layout:?}");
            match round % 2 {
                0 => rig.disk.set_status(Status::empty()),
                _ => (0..8).for_each(|index| rig.disk.reset_queue(index)),
            }
            assert_eq!(rig.backend.cancelled(), IN_FLIGHT, "{layout:?}");
            rig.disk.set_status(Status::empty());
            rig.bring_up(8, wire::MQ);
        }
        // It comes to itself: what is wanted now is done, after what is not.
        rig.drivers[0].read(0);
        rig.disk.kick(0);
        assert_eq!(rig.backend.release(), IN_FLIGHT);
        rig.poll();
        assert_eq!(rig.backend.asked(), [Request::Read { offset: 0, len: 512 }]);
        rig.backend.release();
        rig.poll();
        assert_eq!((rig.drivers[0].used(), rig.drivers[0].slot(0)), (vec![0], [0xd1, 0]));
    }
}

#[test]
fn the_barrier_of_2008_is_no_part_of_a_type() {
    let mut rig = Rig::new(1, Layout::Modern, Features::empty());
    let barrier = 1 << 31;
    rig.drivers[0].ask(0, (wire::IN | barrier, 3), &[], 512);
    rig.disk.kick(0);
    assert_eq!(run(&mut rig), [Request::Read { offset: 3 * 512, len: 512 }]);
    assert_eq!(rig.drivers[0].slot(0), [0xd1, wire::OK]);
    rig.drivers[0].ask(0, (wire::OUT | barrier, 3), &[7; 512], 0);
    rig.disk.kick(0);
    assert_eq!(run(&mut rig)[0], write());
    for (kind, status) in [(wire::GET_ID, wire::OK), (3, wire::UNSUPP), (15, wire::UNSUPP)] {
        rig.drivers[0].ask(0, (kind | barrier, 0), &[], 20);
        rig.disk.kick(0);
        assert_eq!((rig.drivers[0].used(), rig.drivers[0].byte(0, 20)), (vec![0], status), "{kind}");
    }
}
