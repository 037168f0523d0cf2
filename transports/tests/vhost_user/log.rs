//! The log of written pages: what a guest that is moved elsewhere lives by.

use std::os::fd::AsFd;

use nix::sys::eventfd::EventFd;
use polyvirt_core::Features;
use polyvirt_core::memory::Pages;
use polyvirt_core::queue::Buffer;
use polyvirt_transports::vhost_user::Ended;
use polyvirt_transports::vhost_user::memory_file;
use polyvirt_transports::vhost_user::messages::*;

use crate::front::{Front, Queue, RAM_AT, Server, event, wait_for};

const FORMATS: [Features; 2] = [Features::VERSION_1, Features::VERSION_1.union(Features::RING_PACKED)];

/// A log, and what is signalled.
struct Log {
    bits: Pages,
    event: EventFd,
}

impl Log {
    /// Handed over; nothing is logged yet. It begins in the middle of its file.
    fn new(front: &mut Front) -> Self {
        let (file, pages) = memory_file("log", 0x3000).unwrap();
        let area = LogArea { size: 0x1000, offset: 0x1000 };
        front.send(Request::SetLogBase, &area.to_bytes(), &[file.as_fd()]);
        // Answered whether or not that was asked for.
        assert_eq!(front.answer().header.request, Request::SetLogBase as u32);
        let event = event();
        front.tell(Request::SetLogFd, &[], &[event.as_fd()]);
        Self { bits: pages, event }
    }

    /// The pages written since the last look, from where memory begins; nothing else of the file is touched.
    fn take(&self) -> Vec<u64> {
        let mut bytes = vec![0; 0x3000];
        self.bits.read(0, &mut bytes).unwrap();
        self.bits.fill(0, bytes.len(), 0).unwrap();
        let (before, log, behind) = (&bytes[..0x1000], &bytes[0x1000..0x2000], &bytes[0x2000..]);
        assert!([before, behind].concat().iter().all(|byte| *byte == 0));
        let set = |page: &u64| log[*page as usize / 8] & 1 << (page % 8) != 0;
        (0..8 * 0x1000).filter(set).map(|page| page.wrapping_sub(RAM_AT / 0x1000)).collect()
    }
}

/// Writes are logged from now on, or not.
fn want(front: &mut Front, wanted: bool) {
    let log = if wanted { LOG_ALL } else { 0 };
    let features = front.features.bits() as u64 | PROTOCOL_FEATURES | log;
    front.tell(Request::SetFeatures, &features.to_bytes(), &[]);
}

/// The pages of `queue` that a device writes: used ring; or ring and its events. And the buffer in `slot`.
fn written(queue: &Queue, packed: bool, slot: u16) -> Vec<u64> {
    let page = |address: u64| (address - RAM_AT) / 0x1000;
    let buffer = queue.buffer(slot) / 0x1000;
    if packed {
        return vec![page(queue.config.descriptors), page(queue.config.device), buffer];
    }
    vec![page(queue.config.device), buffer]
}

#[test]
fn every_page_that_the_device_writes_is_logged_and_no_other_as_long_as_that_is_wanted() {
    let server = Server::start();
    for features in FORMATS {
        let packed = features.contains(Features::RING_PACKED);
        let mut front = server.connect();
        front.begin(features, ProtocolFeatures::LOG_SHMFD);
        let log = Log::new(&mut front);
        let mut queue = front.queue(1);
        let mut send = |front: &Front, slot| {
            queue.send(&front.ram, slot, b"logged?");
            assert_eq!(queue.wait(1), [slot]);
            written(&queue, packed, slot)
        };
        send(&front, 0);
        // A message later the device has also asked for kicks again, which is a write, too.
        front.ask::<u64>(Request::GetFeatures, &[]);
        assert_eq!(log.take(), [], "nobody wants it yet");
        want(&mut front, true);
        for slot in [3, 1] {
            let expected = send(&front, slot);
            wait_for(&log.event);
            log.event.read().unwrap();
            front.ask::<u64>(Request::GetFeatures, &[]);
            assert_eq!(log.take(), expected);
        }
        want(&mut front, false);
        send(&front, 2);
        front.ask::<u64>(Request::GetFeatures, &[]);
        assert_eq!(log.take(), [], "nobody wants it any more");
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn a_buffer_that_is_only_read_is_not_logged_and_one_of_many_pages_is_in_all() {
    let server = Server::start();
    for features in FORMATS {
        let packed = features.contains(Features::RING_PACKED);
        let mut front = server.connect();
        front.begin(features, ProtocolFeatures::LOG_SHMFD);
        let log = Log::new(&mut front);
        want(&mut front, true);
        let mut queue = front.queue(0);
        front.ask::<u64>(Request::GetFeatures, &[]);
        log.take();
        let (read, filled) = (queue.buffer(0), queue.buffer(1) + 0xfff);
        let readable = Buffer { address: RAM_AT + read, len: 0x1000 };
        let writable = Buffer { address: RAM_AT + filled, len: 0x1002 };
        queue.ring.add_buf(&[readable], &[writable], 0).unwrap();
        queue.ring.kick().unwrap();
        queue.called();
        assert_eq!(queue.ring.get_buf().unwrap(), Some((0, 0x1002)));
        front.ask::<u64>(Request::GetFeatures, &[]);
        let mut expected = written(&queue, packed, 1);
        let first = filled / 0x1000;
        expected.extend([first + 1, first + 2]);
        assert_eq!(log.take(), expected);
        drop(front);
        assert_eq!(server.ended(), Ok(Ended::Closed));
    }
}

#[test]
fn writes_to_a_used_ring_are_logged_where_the_front_end_says() {
    let server = Server::start();
    let mut front = server.connect();
    front.begin(Features::VERSION_1, ProtocolFeatures::LOG_SHMFD);
    let log = Log::new(&mut front);
    want(&mut front, true);
    let mut queue = front.queue(0);
    front.ask::<u64>(Request::GetFeatures, &[]);
    log.take();
    // Not where memory is; and this begins, and ends, while the queue runs.
    let elsewhere = RAM_AT + 0x100_0000;
    for (flags, expected) in [(VRING_LOG, Some(0x1000)), (0, None)] {
        let addresses = VringAddr { flags, log: elsewhere, ..front.addresses(&queue) };
        front.tell(Request::SetVringAddr, &addresses.to_bytes(), &[]);
        queue.send(&front.ram, 0, b"elsewhere");
        queue.wait(1);
        front.ask::<u64>(Request::GetFeatures, &[]);
        let pages = log.take();
        let there: Vec<_> = pages.iter().copied().filter(|page| *page >= 0x1000).collect();
        assert_eq!(there, expected.into_iter().collect::<Vec<_>>());
    }
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
}

#[test]
fn what_the_log_has_no_bit_for_is_not_written_behind_it() {
    let server = Server::start();
    let mut front = server.connect();
    front.begin(Features::VERSION_1, ProtocolFeatures::LOG_SHMFD);
    // Bits for half of the pages below memory, and for none of it.
    let (file, pages) = memory_file("log", 0x1000).unwrap();
    front.send(Request::SetLogBase, &LogArea { size: 1, offset: 8 }.to_bytes(), &[file.as_fd()]);
    front.answer();
    want(&mut front, true);
    let mut queue = front.queue(0);
    let addresses = VringAddr { flags: VRING_LOG, log: u64::MAX, ..front.addresses(&queue) };
    front.tell(Request::SetVringAddr, &addresses.to_bytes(), &[]);
    queue.send(&front.ram, 0, b"too far");
    queue.wait(1);
    front.ask::<u64>(Request::GetFeatures, &[]);
    let mut bytes = vec![0; 0x1000];
    pages.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    drop(front);
    assert_eq!(server.ended(), Ok(Ended::Closed));
    server.check();
}
