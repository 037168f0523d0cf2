//! Memory that changes under queues that run.

use std::fs::{File, read_to_string};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};
use polyvirt_core::Features;
use polyvirt_core::queue::Buffer;
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Ended, memory_file};

use crate::front::{Front, Queue, RAM, RAM_AT, Ram, Server, event};
use crate::toy::FILL;

const FORMATS: [Features; 2] = [Features::VERSION_1, Features::VERSION_1.union(Features::RING_PACKED)];
/// Where more memory is, and how much.
const MORE_AT: u64 = RAM_AT + RAM;
const MORE: u64 = 0x1000;

fn begun(server: &Server, features: Features) -> Front {
    let mut front = server.connect();
    front.begin(features, ProtocolFeatures::CONFIGURE_MEM_SLOTS);
    front
}

/// Memory that nobody but the back end maps, in a file of this name.
fn unmapped(name: &str) -> OwnedFd {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(MORE).unwrap();
    file.into()
}

/// Whether a file of this name is mapped.
fn is_mapped(name: &str) -> bool {
    read_to_string("/proc/self/maps").unwrap().contains(&format!("/memfd:{name} "))
}

/// The region of more memory, in a message.
fn more() -> Region {
    Region { guest: MORE_AT, size: MORE, user: 0x5000_0000, offset: 0 }
}

fn slot(region: Region) -> Vec<u8> {
    [0u64.to_bytes(), region.to_bytes()].concat()
}

fn table(regions: &[Region]) -> Vec<u8> {
    [(regions.len() as u64).to_bytes(), regions.iter().flat_map(Region::to_bytes).collect()].concat()
}

/// What a device writes of `queue`: its used ring, or all of a packed one.
fn written(ram: &Ram, queue: &Queue) -> Vec<u8> {
    [queue.config.descriptors, queue.config.device].map(|area| ram.bytes(area - RAM_AT, 0x1000)).concat()
}

#[test]
fn a_queue_goes_on_in_the_file_that_its_memory_is_in_by_now() {
    let server = Server::start();
    for features in FORMATS {
        let mut front = begun(&server, features);
        let mut queue = front.queue(0);
        queue.send(&front.ram, 0, b"before");
        queue.wait(1);
        // Nobody hears the next kick: what it is for is made available in both files.
        let unheard = event();
        front.tell(Request::SetVringKick, &0u64.to_bytes(), &[unheard.as_fd()]);
        queue.send(&front.ram, 1, b"after");
        let other = Ram::new();
        other.pages.write(0, &front.ram.bytes(0, RAM as usize)).unwrap();
        let old = written(&front.ram, &queue);
        front.tell(Request::SetMemTable, &table(&[front.ram.region()]), &[other.file.as_fd()]);
        while written(&other, &queue) == old {
            queue.called();
        }
        assert!(queue.is_filled(&other, 1));
        assert!(!queue.is_filled(&front.ram, 1));
        assert_eq!(written(&front.ram, &queue), old, "nothing is told in the old file");
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
    server.check();
}

#[test]
fn what_is_handed_over_again_stays_as_it_is_with_all_that_is_in_flight() {
    let server = Server::start();
    for features in FORMATS {
        let mut front = begun(&server, features);
        let mut queue = front.queue(0);
        server.device.keep(true);
        queue.send(&front.ram, 0, b"in flight");
        front.ask::<u64>(Request::GetFeatures, &[]);
        // As QEMU does it when memory is plugged in: answered, though something is in flight.
        let (file, pages) = memory_file("more", MORE).unwrap();
        let ram = front.ram.file.try_clone().unwrap();
        let both = table(&[front.ram.region(), more()]);
        front.tell(Request::SetMemTable, &both, &[ram.as_fd(), file.as_fd()]);
        server.device.keep(false);
        assert_eq!(queue.wait(1), [0]);
        queue.ring.add_buf(&[], &[Buffer { address: MORE_AT, len: 16 }], 1).unwrap();
        queue.ring.kick().unwrap();
        assert_eq!(queue.wait(1), [1]);
        let mut bytes = [0; 16];
        pages.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [FILL; 16]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn a_queue_whose_memory_is_taken_away_rests_until_it_is_back() {
    let server = Server::start();
    for features in FORMATS {
        let mut front = begun(&server, features);
        let mut queue = front.queue(0);
        queue.send(&front.ram, 0, b"there");
        queue.wait(1);
        let region = slot(front.ram.region());
        front.tell(Request::RemMemReg, &region, &[]);
        // Kicked for in vain.
        queue.send(&front.ram, 1, b"where am I?");
        front.ask::<u64>(Request::GetFeatures, &[]);
        assert!(!queue.is_filled(&front.ram, 1));
        assert!(queue.error.read().is_err(), "nobody broke anything");
        let file = front.ram.file.try_clone().unwrap();
        front.tell(Request::AddMemReg, &region, &[file.as_fd()]);
        assert_eq!(queue.wait(1), [1]);
        // It may as well be stopped while it rests.
        front.tell(Request::RemMemReg, &region, &[]);
        let base = front.stop(0);
        front.tell(Request::AddMemReg, &region, &[file.as_fd()]);
        front.start(&queue, base);
        queue.send(&front.ram, 0, b"started anew");
        assert_eq!(queue.wait(1), [0]);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
    server.check();
}

#[test]
fn a_region_that_is_taken_away_is_unmapped_as_soon_as_nothing_of_it_is_in_use() {
    let server = Server::start();
    let mut front = begun(&server, Features::VERSION_1);
    let mut queue = front.queue(0);
    let idle = front.queue(1);
    server.device.keep(true);
    for (name, used) in [("unused-region", false), ("used-region", true)] {
        front.tell(Request::AddMemReg, &slot(more()), &[unmapped(name).as_fd()]);
        assert!(is_mapped(name));
        let address = if used { MORE_AT } else { RAM_AT + RAM - MORE };
        queue.ring.add_buf(&[], &[Buffer { address, len: 16 }], u16::from(used)).unwrap();
        queue.ring.kick().unwrap();
        front.ask::<u64>(Request::GetFeatures, &[]);
        front.tell(Request::RemMemReg, &slot(more()), &[]);
        assert_eq!(is_mapped(name), used, "{name}");
    }
    server.device.keep(false);
    queue.wait(2);
    front.ask::<u64>(Request::GetFeatures, &[]);
    assert!(!is_mapped("used-region"));
    drop((front, idle));
    assert_eq!(server.ended(), Ok(Ended::Closed));
}
