//! Right messages at the wrong time, and places where no queue can be.

use std::os::fd::AsFd;

use polyvirt_core::Features;
use polyvirt_core::queue::Buffer;
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Ended, ServeError, memory_file};

use crate::front::{Front, Queue, RAM, RAM_AT, SIZE, Server, wait_for};

/// With memory handed over, but no queue.
fn begun(server: &Server, features: Features) -> Front {
    let mut front = server.connect();
    front.begin(Features::VERSION_1 | features, ProtocolFeatures::INFLIGHT_SHMFD);
    front
}

/// Starts `queue`, which ends the session: why.
fn fails(server: &Server, mut front: Front, queue: &Queue) -> String {
    begin(&front, queue);
    front.closed();
    match server.ended() {
        Err(ServeError::Queue { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

fn begin(front: &Front, queue: &Queue) {
    front.send(Request::SetVringKick, &u64::from(queue.index).to_bytes(), &[queue.kick.as_fd()]);
    front.send(Request::SetVringEnable, &VringState { index: queue.index, num: 1 }.to_bytes(), &[]);
}

/// Starts `queue`, which is broken: that is told once, and the session goes on.
pub(crate) fn breaks(server: &Server, front: &mut Front, queue: &Queue) {
    begin(front, queue);
    wait_for(&queue.error);
    assert_eq!(queue.error.read(), Ok(1));
    // However often the driver kicks.
    for _ in 0..3 {
        queue.kick.write(1).unwrap();
        front.ask::<u64>(Request::GetFeatures, &[]);
    }
    assert!(queue.error.read().is_err(), "it is told again");
    assert!(server.device.read().is_empty());
}

#[test]
fn a_queue_that_lacks_something_does_not_run() {
    let server = Server::start();
    let front = begun(&server, Features::empty());
    let queue = Queue::new(&front, 0);
    assert_eq!(fails(&server, front, &queue), "it has no addresses");

    let mut front = begun(&server, Features::empty());
    let queue = Queue::new(&front, 0);
    front.tell(Request::SetVringAddr, &front.addresses(&queue).to_bytes(), &[]);
    assert_eq!(fails(&server, front, &queue), "it has no size");

    let mut front = server.connect();
    front.negotiate(Features::VERSION_1, ProtocolFeatures::empty());
    let queue = Queue::new(&front, 0);
    front.set_up(&queue, 0);
    breaks(&server, &mut front, &queue);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
    server.check();
}

#[test]
fn a_queue_is_enabled_before_it_is_set_up_and_runs_once_it_is() {
    let server = Server::start();
    let mut front = begun(&server, Features::empty());
    front.enable(0, 1);
    let mut queue = front.queue(0);
    queue.send(&front.ram, 0, b"late");
    assert_eq!(queue.wait(1), [0]);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn a_queue_that_runs_is_not_changed() {
    let server = Server::start();
    type Change = fn(&Front, &Queue) -> (Request, Vec<u8>);
    let changes: [Change; 3] = [
        |_, _| (Request::SetVringNum, VringState { index: 0, num: 4 }.to_bytes()),
        |_, _| (Request::SetVringBase, VringState { index: 0, num: 4 }.to_bytes()),
        |front, queue| {
            let addresses = front.addresses(queue);
            (Request::SetVringAddr, VringAddr { used: addresses.used + 0x100, ..addresses }.to_bytes())
        },
    ];
    for change in changes {
        let mut front = begun(&server, Features::empty());
        let queue = front.queue(0);
        let (request, payload) = change(&front, &queue);
        front.send(request, &payload, &[]);
        front.closed();
        assert!(matches!(server.ended(), Err(ServeError::Refused { request: of, .. }) if of == request.name()));
    }
    server.check();
}

/// The base of a ring that begins.
fn first(features: Features) -> u32 {
    if features.contains(Features::RING_PACKED) { 0x8000_8000 } else { 0 }
}

/// Queue 0, which was broken, is set up anew in the same session, as by a driver that was reset.
fn begins_anew(front: &mut Front) {
    front.stop(0);
    front.ram.pages.fill(0, 0x4000, 0).unwrap();
    let mut queue = front.queue(0);
    queue.send(&front.ram, 0, b"anew");
    assert_eq!(queue.wait(1), [0]);
}

#[test]
fn rings_outside_of_memory_or_across_its_end_break_the_queue() {
    for features in [Features::empty(), Features::RING_PACKED] {
        for wrong in [RAM, RAM - 8, u64::MAX / 2, u64::MAX - 7] {
            for area in 0..3 {
                let server = Server::start();
                let mut front = begun(&server, features);
                let queue = Queue::new(&front, 0);
                front.set_up(&queue, first(features));
                let mut addresses = front.addresses(&queue);
                let place = [&mut addresses.descriptors, &mut addresses.available, &mut addresses.used];
                // The last bytes of memory are too few for all areas but the event structures of packed rings.
                let wrong =
                    if wrong == RAM - 8 { front.ram.user(RAM - 2) } else { front.ram.user(0).wrapping_add(wrong) };
                *place.into_iter().nth(area).unwrap() = wrong;
                front.tell(Request::SetVringAddr, &addresses.to_bytes(), &[]);
                breaks(&server, &mut front, &queue);
                begins_anew(&mut front);
                drop(front);
                assert_eq!(server.ended(), Ok(Ended::Closed));
            }
        }
    }
}

#[test]
fn a_ring_across_two_regions_breaks_the_queue() {
    let server = Server::start();
    let mut front = begun(&server, Features::empty());
    let Region { guest, user, .. } = front.ram.region();
    let regions = [
        Region { guest, size: 0x1000, user, offset: 0 },
        Region { guest: guest + 0x1000, size: RAM - 0x1000, user: user + 0x1000, offset: 0x1000 },
    ];
    let table = [2u64.to_bytes(), regions[0].to_bytes(), regions[1].to_bytes()].concat();
    let file = front.ram.file.try_clone().unwrap();
    front.tell(Request::SetMemTable, &table, &[file.as_fd(), file.as_fd()]);
    let queue = Queue::new(&front, 0);
    front.set_up(&queue, 0);
    // The border is inside the descriptor table.
    let across = VringAddr { descriptors: front.ram.user(0xfc0), ..front.addresses(&queue) };
    front.tell(Request::SetVringAddr, &across.to_bytes(), &[]);
    breaks(&server, &mut front, &queue);
    front.hand_over();
    begins_anew(&mut front);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn rings_that_are_not_aligned_break_the_queue() {
    let server = Server::start();
    let mut front = begun(&server, Features::empty());
    let queue = Queue::new(&front, 0);
    front.set_up(&queue, 0);
    let addresses = front.addresses(&queue);
    let odd = VringAddr { descriptors: addresses.descriptors + 1, ..addresses };
    front.tell(Request::SetVringAddr, &odd.to_bytes(), &[]);
    breaks(&server, &mut front, &queue);
    begins_anew(&mut front);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn bases_that_no_ring_has_break_the_queue() {
    let packed = [0x8008_8008, 0x8000_8008, 0xffff_ffff, 0x8008_8000].map(|base| (Features::RING_PACKED, base));
    // On a split ring nothing is known to be in flight, so the next to take is the next to use.
    let split = [4, 0x4000, 0xffff].map(|base| (Features::empty(), base));
    for (features, base) in packed.into_iter().chain(split) {
        let server = Server::start();
        let mut front = begun(&server, features);
        let queue = Queue::new(&front, 0);
        front.set_up(&queue, base);
        breaks(&server, &mut front, &queue);
        begins_anew(&mut front);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

/// Breaks `queue`: a buffer that is partly outside of memory.
fn break_running(queue: &mut Queue) {
    queue.ring.add_buf(&[], &[Buffer { address: RAM_AT + RAM - 8, len: 16 }], 0).unwrap();
    queue.ring.kick().unwrap();
    wait_for(&queue.error);
}

#[test]
fn a_broken_queue_stops_the_device_until_it_begins_anew() {
    for features in [Features::empty(), Features::RING_PACKED] {
        let server = Server::start();
        let mut front = begun(&server, features);
        let (mut broken, mut other) = (front.queue(0), front.queue(1));
        other.send(&front.ram, 0, b"before");
        assert_eq!(other.wait(1), [0]);
        break_running(&mut broken);
        other.send(&front.ram, 1, b"meanwhile");
        front.ask::<u64>(Request::GetFeatures, &[]);
        assert_eq!(server.device.read(), [b"before"]);
        assert!(other.error.read().is_err(), "the other queue is not broken");
        begins_anew(&mut front);
        // Nobody kicks it again.
        assert_eq!(other.wait(1), [1]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn queues_that_were_started_while_another_was_broken_run_once_it_is_not() {
    let server = Server::start();
    let mut front = begun(&server, Features::empty());
    let broken = Queue::new(&front, 0);
    front.set_up(&broken, 0);
    let addresses = VringAddr { used: front.ram.user(RAM), ..front.addresses(&broken) };
    front.tell(Request::SetVringAddr, &addresses.to_bytes(), &[]);
    begin(&front, &broken);
    wait_for(&broken.error);
    let mut other = front.queue(1);
    other.send(&front.ram, 0, b"early");
    front.ask::<u64>(Request::GetFeatures, &[]);
    assert!(server.device.read().is_empty() && other.error.read().is_err());
    begins_anew(&mut front);
    assert_eq!(other.wait(1), [0]);
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn what_qemus_entropy_device_says_when_its_driver_is_reset_mends_a_broken_queue() {
    // STATUS is accepted; the status is told once, without DRIVER_OK, and never again.
    for settles_again in [false, true] {
        for next in [Features::empty(), Features::RING_PACKED] {
            let server = Server::start();
            let mut front = server.connect();
            front.begin(Features::VERSION_1, ProtocolFeatures::STATUS | ProtocolFeatures::CONFIG);
            assert_eq!(front.ask::<u64>(Request::GetStatus, &[]), 0);
            front.tell(Request::SetStatus, &8u64.to_bytes(), &[]);
            let mut queue = front.queue(0);
            break_running(&mut queue);
            front.stop(0);
            if settles_again {
                // The next driver may accept others.
                front.features |= next;
                let features = front.features.bits() as u64 | PROTOCOL_FEATURES;
                front.tell(Request::SetFeatures, &features.to_bytes(), &[]);
            }
            begins_anew(&mut front);
            drop(front);
            assert_eq!(server.ended(), Ok(Ended::Closed));
        }
    }
}

#[test]
fn what_the_driver_breaks_is_told_and_ends_no_session() {
    let server = Server::start();
    for features in [Features::empty(), Features::RING_PACKED] {
        let mut front = begun(&server, features);
        let mut queue = front.queue(0);
        // Partly outside of memory.
        let buffer = Buffer { address: RAM_AT + RAM - 8, len: 16 };
        queue.ring.add_buf(&[], &[buffer], 0).unwrap();
        queue.ring.kick().unwrap();
        wait_for(&queue.error);
        // Messages go on.
        front.ask::<u64>(Request::GetFeatures, &[]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
    server.check();
}

#[test]
fn absurd_bytes_about_what_is_in_flight_break_the_queue_at_most() {
    let server = Server::start();
    for features in [Features::empty(), Features::RING_PACKED] {
        // Version 1, and nonsense.
        for byte in [0x01, 0x7f, 0xff] {
            let mut front = begun(&server, features);
            let (file, pages) = memory_file("inflight", 4096).unwrap();
            pages.fill(0, 4096, byte).unwrap();
            pages.write(8, &1u16.to_ne_bytes()).unwrap();
            let area = InflightArea { size: 4096, offset: 0, queues: 1, entries: SIZE };
            front.tell(Request::SetInflightFd, &area.to_bytes(), &[file.as_fd()]);
            let queue = Queue::new(&front, 0);
            front.set_up(&queue, if features.is_empty() { 0 } else { 0x8000_8000 });
            front.send(Request::SetVringKick, &0u64.to_bytes(), &[queue.kick.as_fd()]);
            front.send(Request::SetVringEnable, &VringState { index: 0, num: 1 }.to_bytes(), &[]);
            drop(front);
            // Whatever it made of that, it is alive.
            assert_eq!(server.ended(), Ok(Ended::Closed));
        }
    }
    server.check();
}

#[test]
fn a_queue_without_a_descriptor_for_kicks_is_polled() {
    for features in [Features::empty(), Features::RING_PACKED] {
        let server = Server::start();
        let mut front = begun(&server, features);
        let mut queue = Queue::new(&front, 0);
        front.set_up(&queue, first(features));
        front.tell(Request::SetVringKick, &VRING_NOFD.to_bytes(), &[]);
        front.enable(0, 1);
        for slot in [0, 1, 2] {
            // Its event was not handed over.
            queue.send(&front.ram, slot, b"no kick");
            assert_eq!(queue.wait(1), [slot]);
        }
        // Once it is stopped it is looked at no more; by kicks it goes on.
        let base = front.stop(0);
        queue.send(&front.ram, 3, b"nobody looks");
        front.ask::<u64>(Request::GetFeatures, &[]);
        assert_eq!(server.device.read().len(), 3);
        front.start(&queue, base);
        assert_eq!(queue.wait(1), [3]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn a_device_that_panics_ends_its_session_and_not_the_server() {
    let server = Server::start();
    for features in [Features::empty(), Features::RING_PACKED] {
        let mut front = begun(&server, features);
        let mut queue = front.queue(0);
        server.device.keep(true);
        queue.send(&front.ram, 0, b"in flight, for ever");
        front.ask::<u64>(Request::GetFeatures, &[]);
        server.device.panic();
        queue.send(&front.ram, 1, b"the last straw");
        front.closed();
        assert_eq!(server.ended(), Err(ServeError::Panicked { what: "as it was told".into() }));
        server.device.keep(false);
        server.check();
    }
}
