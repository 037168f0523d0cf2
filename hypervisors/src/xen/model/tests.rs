//! The rules of the hypervisor and of xenstored, met by two domains that make raw calls.

use std::sync::atomic::Ordering::SeqCst;

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{Access, Pages};

use super::super::abi::{Calls, DOM0};
use super::super::wire::{HEADER_LEN, PAYLOAD_MAX, header, message, parse_header};
use super::events::{MASK, PENDING};
use super::grants::{ENTRIES, READING, WRITING, entry};
use super::ring::{Interface, REQUESTS, RING_SIZE};
use super::{DOMU, Domain, start};

const BOTH: Access = Access::READ.union(Access::WRITE);

fn domains() -> (Domain, Domain) {
    start(64 * 4096).unwrap()
}

/// What Xen said.
fn reason<T>(result: Result<T, HypervisorError>) -> String {
    match result.err() {
        Some(HypervisorError::Refused { reason, .. }) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

fn entry_bytes(domain: &Domain, reference: u32) -> Vec<u8> {
    let low = domain.ram.u32(entry(reference)).load(SeqCst).to_ne_bytes();
    [low, domain.ram.u32(entry(reference) + 4).load(SeqCst).to_ne_bytes()].concat()
}

fn bytes(pages: &Pages, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    pages.read(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_grant_entry_is_flags_domain_and_frame_and_shows_what_is_mapped() {
    let (host, guest) = domains();
    let pages = guest.allocate(2 * 4096).unwrap();
    let frame = guest.ram.frames_of(&pages).unwrap().start;
    let bytes = |flags: u16, domain: u16, frame: u32| {
        [&flags.to_ne_bytes()[..], &domain.to_ne_bytes(), &frame.to_ne_bytes()].concat()
    };
    let first = guest.grant(&pages, 7, false).unwrap();
    assert_eq!(entry_bytes(&guest, first), bytes(1, 7, frame));
    assert_eq!(entry_bytes(&guest, first + 1), bytes(1, 7, frame + 1));
    let read_only = guest.grant(&pages, DOM0, true).unwrap();
    assert_eq!(entry_bytes(&guest, read_only), bytes(1 | 4, 0, frame));
    let writable = guest.grant(&pages, DOM0, false).unwrap();

    let reader = host.map(DOMU, read_only, 1, Access::READ).unwrap();
    assert_eq!(entry_bytes(&guest, read_only), bytes(1 | 4 | READING, 0, frame));
    let (a, b) = (host.map(DOMU, writable, 2, BOTH).unwrap(), host.map(DOMU, writable, 1, Access::READ).unwrap());
    assert_eq!(entry_bytes(&guest, writable), bytes(1 | READING | WRITING, 0, frame));
    drop(a);
    assert_eq!(entry_bytes(&guest, writable), bytes(1 | READING, 0, frame));
    assert_eq!(entry_bytes(&guest, writable + 1), bytes(1, 0, frame + 1));
    drop((b, reader));
    for reference in [first, read_only, writable] {
        guest.end_access(reference, 2).unwrap();
        assert_eq!(entry_bytes(&guest, reference)[..2], [0, 0]);
    }
}

#[test]
fn grants_are_mapped_in_one_piece_wherever_their_frames_are() {
    let (host, guest) = domains();
    let pages: Vec<_> = (0..4).map(|_| guest.allocate(4096).unwrap()).collect();
    pages.iter().zip(b'a'..).for_each(|(page, byte)| page.fill(0, 4096, byte).unwrap());
    // References in another order than frames.
    let references = [2, 3, 1, 0].map(|index: usize| guest.grant(&pages[index], DOM0, false).unwrap());
    assert!(references.is_sorted() && references[3] - references[0] == 3);
    let mapped = host.map(DOMU, references[0], 4, BOTH).unwrap();
    let seen = bytes(&mapped, 4 * 4096);
    assert_eq!([0, 1, 2, 3].map(|page| seen[page * 4096 + 17]), *b"cdba");
    mapped.write(2 * 4096, b"!").unwrap();
    assert_eq!(bytes(&pages[1], 2), b"!b");
    assert_eq!(bytes(&pages[0], 2), b"aa");
}

#[test]
fn what_is_not_granted_like_that_is_refused_with_xens_status() {
    let (host, guest) = domains();
    let page = guest.allocate(4096).unwrap();
    let map = |first, count, access| reason(host.map(DOMU, first, count, access));
    let read_only = guest.grant(&page, DOM0, true).unwrap();
    assert_eq!(map(read_only, 1, BOTH), "GNTST_general_error (-1)");
    assert_eq!(entry_bytes(&guest, read_only)[0], 5, "nothing is left in use");
    assert_eq!(map(read_only, 2, Access::READ), "GNTST_general_error (-1)", "the next one grants nothing");
    assert_eq!(entry_bytes(&guest, read_only)[0], 5);
    assert_eq!(map(ENTRIES, 1, Access::READ), "GNTST_bad_gntref (-3)");
    assert_eq!(map(u32::MAX, u32::MAX, Access::READ), "GNTST_bad_gntref (-3)");
    let foreign = guest.grant(&page, 5, false).unwrap();
    assert_eq!(map(foreign, 1, Access::READ), "GNTST_general_error (-1)");
    assert_eq!(reason(host.map(99, read_only, 1, Access::READ)), "GNTST_bad_domain (-2)");

    // A guest that writes its table by hand.
    guest.ram.u32(entry(read_only) + 4).store(guest.ram.frames(), SeqCst);
    assert_eq!(map(read_only, 1, Access::READ), "GNTST_bad_page (-9)");
    guest.ram.u16(entry(read_only)).store(2, SeqCst);
    assert_eq!(map(read_only, 1, Access::READ), "GNTST_general_error (-1)", "accept_transfer is not to be mapped");

    for pages in [Pages::allocate(4096), page.slice(0, 100).unwrap(), page.slice(1, 4095).unwrap()] {
        assert!(reason(guest.grant(&pages, DOM0, false)).starts_with("expected pages of the domain"));
    }
}

#[test]
fn the_host_has_just_the_granted_pages_and_writes_only_where_it_may() {
    let (host, guest) = domains();
    let pages = guest.allocate(3 * 4096).unwrap();
    let (first, frame) = (guest.grant(&pages, DOM0, false).unwrap(), guest.ram.frames_of(&pages).unwrap().start + 1);
    for (access, rights) in [(Access::READ, "r--s"), (Access::WRITE, "rw-s"), (BOTH, "rw-s")] {
        let mapped = host.map(DOMU, first + 1, 1, access).unwrap();
        let start = mapped.as_ptr().addr();
        let line = format!("{start:x}-{:x} {rights} {:08x} ", start + 4096, frame * 4096);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(maps.lines().any(|it| it.starts_with(&line)), "expected {line:?} in\n{maps}");
        drop(mapped);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!maps.lines().any(|it| it.starts_with(&line) && it.contains("memfd:domain")), "{line:?} is left");
    }
}

#[test]
fn a_grant_in_use_is_not_revoked_and_a_range_not_in_part() {
    let (host, guest) = domains();
    let pages = guest.allocate(3 * 4096).unwrap();
    let first = guest.grant(&pages, DOM0, false).unwrap();
    let mapped = host.map(DOMU, first + 2, 1, Access::READ).unwrap();
    let in_use = HypervisorError::InUse { address: u64::from(first + 2) << 12 };
    assert_eq!(guest.end_access(first, 3), Err(in_use));
    assert!(host.map(DOMU, first, 3, BOTH).is_ok(), "none of them was taken back");
    drop(mapped);
    assert_eq!(guest.end_access(first, 3), Ok(()));
    assert!(host.map(DOMU, first, 1, Access::READ).is_err());
    for (first, count) in [(first, 3), (0, 1), (1, 1), (ENTRIES - 1, 2), (u32::MAX, 1)] {
        assert!(reason(guest.end_access(first, count)).ends_with("are not granted"));
    }
}

#[test]
fn references_run_out_and_come_back() {
    let (_host, guest) = domains();
    let pages = guest.allocate(64 * 4096).unwrap();
    let mut all = vec![];
    let error = loop {
        match guest.grant(&pages, DOM0, false) {
            Ok(first) => all.push(first),
            Err(error) => break error,
        }
    };
    assert_eq!((error, all.len()), (HypervisorError::Exhausted("grant references"), (ENTRIES as usize - 8) / 64));
    guest.end_access(all[77], 64).unwrap();
    assert_eq!(guest.grant(&pages, DOM0, false), Ok(all[77]));
}

#[test]
fn a_mapping_outlives_its_domain_but_not_its_grants_use() {
    let (host, guest) = domains();
    let page = guest.allocate(4096).unwrap();
    page.write(0, b"still here").unwrap();
    let mapped = host.map(DOMU, guest.grant(&page, DOM0, false).unwrap(), 1, Access::READ).unwrap();
    drop((page, guest));
    assert_eq!(bytes(&mapped, 10), b"still here");
    assert_eq!(reason(host.map(DOMU, 8, 1, Access::READ)), "GNTST_bad_domain (-2)");
}

/// An unbound port of the guest, bound by the host, with the event that binding gives taken.
fn channel(host: &Domain, guest: &Domain) -> (u32, u32) {
    let theirs = guest.alloc_unbound(DOM0).unwrap();
    let ours = host.bind_interdomain(DOMU, theirs).unwrap();
    assert_eq!(host.next_event(), Some(ours), "binding gives one event");
    host.unmask(ours).unwrap();
    (ours, theirs)
}

fn bit(domain: &Domain, at: usize, port: u32) -> bool {
    domain.ram.u64(at + port as usize / 64 * 8).load(SeqCst) >> (port % 64) & 1 == 1
}

#[test]
fn events_go_both_ways_and_a_masked_one_is_delivered_when_it_is_unmasked() {
    let (host, guest) = domains();
    let (ours, theirs) = channel(&host, &guest);
    let (other_ours, other) = channel(&host, &guest);
    host.send(ours).unwrap();
    assert_eq!(guest.next_event(), Some(theirs));
    assert_eq!((bit(&guest, PENDING, theirs), bit(&guest, MASK, theirs)), (false, true));
    // Masked: these stay pending, and make one event.
    host.send(ours).unwrap();
    host.send(ours).unwrap();
    assert_eq!((bit(&guest, PENDING, theirs), bit(&guest, MASK, theirs)), (true, true));
    host.send(other_ours).unwrap();
    assert_eq!(guest.next_event(), Some(other), "and nothing of the masked one before it");
    guest.unmask(theirs).unwrap();
    assert_eq!(guest.next_event(), Some(theirs));
    guest.unmask(theirs).unwrap();
    guest.unmask(other).unwrap();
    assert!(!bit(&guest, PENDING, theirs) && !bit(&guest, MASK, theirs));
    guest.send(theirs).unwrap();
    assert_eq!(host.next_event(), Some(ours));
    guest.stop();
    assert_eq!(guest.next_event(), None);
}

#[test]
fn what_cannot_be_done_with_a_port_is_refused() {
    let (host, guest) = domains();
    let (ours, theirs) = channel(&host, &guest);
    for port in [0, 4095, 4096, u32::MAX] {
        assert_eq!(reason(host.send(port)), "EINVAL (-22)");
        assert_eq!(reason(host.close(port)), "EINVAL (-22)");
        assert_eq!(reason(host.unmask(port)), "EINVAL (-22)");
        assert_eq!(reason(host.bind_interdomain(DOMU, port)), "EINVAL (-22)");
    }
    assert_eq!(reason(host.bind_interdomain(DOMU, theirs)), "EINVAL (-22)", "bound already");
    assert_eq!(reason(host.bind_interdomain(99, theirs)), "ESRCH (-3)");
    let foreign = guest.alloc_unbound(5).unwrap();
    assert_eq!(reason(host.bind_interdomain(DOMU, foreign)), "EINVAL (-22)", "meant for another domain");
    assert_eq!(guest.send(foreign), Ok(()), "an event on an unbound port goes nowhere");

    host.close(ours).unwrap();
    assert_eq!(reason(host.send(ours)), "EINVAL (-22)");
    assert_eq!(guest.send(theirs), Ok(()), "its other end is unbound again");
    let again = host.bind_interdomain(DOMU, theirs).unwrap();
    assert_eq!(again, ours, "the lowest closed port");
    let error = loop {
        if let Err(error) = guest.alloc_unbound(DOM0) {
            break error;
        }
    };
    assert_eq!(reason(Err::<(), _>(error)), "ENOSPC (-28)");
}

#[test]
fn no_event_is_lost_between_two_threads() {
    let (host, guest) = domains();
    let (ours, theirs) = channel(&host, &guest);
    const ROUNDS: u32 = 2000;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                assert_eq!(guest.next_event(), Some(theirs));
                guest.unmask(theirs).unwrap();
                guest.send(theirs).unwrap();
            }
        });
        for _ in 0..ROUNDS {
            host.send(ours).unwrap();
            assert_eq!(host.next_event(), Some(ours));
            host.unmask(ours).unwrap();
        }
    });
}

/// The next message.
fn receive(domain: &Domain) -> ([u32; 4], Vec<u8>) {
    let mut head = [0; HEADER_LEN];
    assert!(domain.store_receive(&mut head));
    let head = parse_header(&head);
    let mut payload = vec![0; head[3] as usize];
    assert!(domain.store_receive(&mut payload));
    (head, payload)
}

/// Sends a request and receives its reply: the payload, or the error.
fn ask_in(domain: &Domain, transaction: u32, kind: u32, payload: &[u8]) -> Result<String, String> {
    let head = header(kind, 77, transaction, payload.len());
    domain.store_send(&[&head, payload].concat()).unwrap();
    let (head, payload) = receive(domain);
    let text = String::from_utf8(payload).unwrap();
    assert_eq!(head[1..3], [77, transaction]);
    match head[0] {
        message::ERROR => Err(text.trim_end_matches('\0').into()),
        same => {
            assert_eq!(same, kind);
            Ok(text)
        }
    }
}

fn ask(domain: &Domain, kind: u32, payload: &str) -> Result<String, String> {
    ask_in(domain, 0, kind, payload.as_bytes())
}

fn ok() -> Result<String, String> {
    Ok("OK\0".into())
}

fn err(error: &str) -> Result<String, String> {
    Err(error.into())
}

#[test]
fn nodes_are_written_read_listed_and_removed() {
    let (_host, guest) = domains();
    assert_eq!(ask(&guest, message::GET_DOMAIN_PATH, "1\0"), Ok("/local/domain/1\0".into()));
    assert_eq!(ask(&guest, message::READ, "domid\0"), Ok("1".into()));
    assert_eq!(ask(&guest, message::READ, "data/a\0"), err("ENOENT"));
    assert_eq!(ask(&guest, message::WRITE, "data/a/b\0value"), ok());
    assert_eq!(ask(&guest, message::READ, "/local/domain/1/data/a/b\0"), Ok("value".into()));
    assert_eq!(ask(&guest, message::READ, "data/a\0"), Ok(String::new()));
    assert_eq!(ask(&guest, message::MKDIR, "data/a/c\0"), ok());
    assert_eq!(ask(&guest, message::MKDIR, "data/a/b\0"), ok());
    assert_eq!(ask(&guest, message::WRITE, "data/a-b\0"), ok());
    assert_eq!(ask(&guest, message::DIRECTORY, "data/a\0"), Ok("b\0c\0".into()));
    assert_eq!(ask(&guest, message::DIRECTORY, "data\0"), Ok("a\0a-b\0".into()));
    assert_eq!(ask(&guest, message::RM, "data/a\0"), ok());
    assert_eq!(ask(&guest, message::READ, "data/a/b\0"), err("ENOENT"));
    assert_eq!(ask(&guest, message::RM, "data/a\0"), ok());
    assert_eq!(ask(&guest, message::RM, "data/x/y\0"), err("ENOENT"));
    assert_eq!(ask(&guest, message::DIRECTORY, "data\0"), Ok("a-b\0".into()));
    for path in ["", "/local//x", "data/", "a b", "data/\u{e9}", "//", &"x/".repeat(1600)] {
        assert_eq!(ask(&guest, message::READ, &format!("{path}\0")), err("EINVAL"), "{path}");
    }
    for (kind, payload) in [(message::WRITE, "data"), (message::WATCH, "data"), (message::TRANSACTION_END, "x\0")] {
        assert_eq!(ask(&guest, kind, payload), err("EINVAL"));
    }
    assert_eq!(ask(&guest, 99, ""), err("ENOSYS"));
    assert_eq!(ask(&guest, message::ERROR, ""), err("ENOSYS"));
}

#[test]
fn a_domain_writes_only_what_it_may() {
    let (host, guest) = domains();
    for path in ["/x", "/local/domain/0/x", "/local/domain/2/data", "/local/domain/1/x", "domid", "device/virtio/0"] {
        assert_eq!(ask(&guest, message::WRITE, &format!("{path}\0v")), err("EACCES"), "{path}");
        assert_eq!(ask(&guest, message::MKDIR, &format!("{path}/y\0")), err("EACCES"), "{path}");
    }
    assert_eq!(ask(&guest, message::RM, "domid\0"), err("EACCES"));
    assert_eq!(ask(&guest, message::RM, "/\0"), err("EINVAL"));
    assert_eq!(ask(&guest, message::SET_PERMS, "domid\0n1\0"), err("EPERM"));

    assert_eq!(ask(&host, message::WRITE, "secret\0v"), ok());
    assert_eq!(ask(&guest, message::READ, "/local/domain/0/secret\0"), err("EACCES"));
    assert_eq!(ask(&guest, message::READ, "/local/domain/0/no-secret\0"), err("EACCES"));
    assert_eq!(ask(&host, message::SET_PERMS, "secret\0n0\0r1\0"), ok());
    assert_eq!(ask(&guest, message::READ, "/local/domain/0/secret\0"), Ok("v".into()));
    assert_eq!(ask(&guest, message::WRITE, "/local/domain/0/secret\0w"), err("EACCES"));
    assert_eq!(ask(&host, message::SET_PERMS, "secret\0n0\0b1\0"), ok());
    assert_eq!(ask(&guest, message::WRITE, "/local/domain/0/secret/below\0w"), ok());
    assert_eq!(ask(&guest, message::GET_PERMS, "/local/domain/0/secret/below\0"), Ok("n1\0b1\0".into()));
    for permissions in ["", "1\0", "x1\0", "n-1\0", "n70000\0"] {
        assert_eq!(ask(&host, message::SET_PERMS, &format!("secret\0{permissions}")), err("EINVAL"));
    }
    assert_eq!(ask(&guest, message::SET_PERMS, "data\0n0\0"), err("EPERM"), "not even its own can be given away");
}

#[test]
fn a_domain_has_only_so_much() {
    let (host, guest) = domains();
    let long = "v".repeat(2049);
    assert_eq!(ask(&guest, message::WRITE, &format!("data/long\0{long}")), err("ENOSPC"));
    assert_eq!(ask(&host, message::WRITE, &format!("long\0{long}")), ok());
    let many = (0..).find(|n| ask(&guest, message::MKDIR, &format!("data/{n}\0")).is_err()).unwrap();
    assert!((900..=1000).contains(&many), "{many}");
    assert_eq!(ask(&guest, message::DIRECTORY, "data\0").map(|names| names.len() < PAYLOAD_MAX), Ok(true));
    let many = (0..).find(|_| ask(&guest, message::TRANSACTION_START, "\0").is_err()).unwrap();
    assert_eq!(many, 10);
    let many = (0..).find(|n| {
        let reply = ask(&guest, message::WATCH, &format!("data\0{n}\0"));
        reply.inspect(|_| _ = receive(&guest)).is_err()
    });
    assert_eq!(many, Some(128));
}

#[test]
fn watches_fire_at_once_and_for_everything_below_that_may_be_read() {
    let (host, guest) = domains();
    let event = |domain: &Domain| {
        let (head, payload) = receive(domain);
        assert_eq!(head[0], message::WATCH_EVENT);
        String::from_utf8(payload).unwrap()
    };
    assert_eq!(ask(&host, message::WATCH, "/local/domain/1/data\0token\0"), ok());
    assert_eq!(event(&host), "/local/domain/1/data\0token\0");
    assert_eq!(ask(&host, message::WATCH, "/local/domain/1/data\0token\0"), err("EEXIST"));
    assert_eq!(ask(&guest, message::WRITE, "data/a/b\0v"), ok());
    assert_eq!(event(&host), "/local/domain/1/data/a/b\0token\0");
    assert_eq!(ask(&guest, message::RM, "data/a\0"), ok());
    assert_eq!(event(&host), "/local/domain/1/data/a\0token\0", "once, not for each node below");

    assert_eq!(ask(&guest, message::WATCH, "/local/domain/0/x\0t\0"), ok());
    assert_eq!(event(&guest), "/local/domain/0/x\0t\0");
    assert_eq!(ask(&guest, message::WATCH, "device\0u\0"), ok());
    assert_eq!(event(&guest), "device\0u\0");
    assert_eq!(ask(&host, message::WRITE, "x\0unreadable"), ok());
    assert_eq!(ask(&host, message::WRITE, "/local/domain/1/device/virtio/0\0"), ok());
    assert_eq!(event(&guest), "device/virtio/0\0u\0", "not what it may not read, and relative as it asked");
    assert_eq!(ask(&guest, message::UNWATCH, "device\0u\0"), ok());
    assert_eq!(ask(&guest, message::UNWATCH, "device\0u\0"), err("ENOENT"));
    assert_eq!(ask(&host, message::RM, "/local/domain/1/device/virtio/0\0"), ok());
    assert_eq!(ask(&guest, message::READ, "domid\0"), Ok("1".into()), "a reply, not an event");

    // The removal of what is above is heard by who watches what is below.
    assert_eq!(ask(&guest, message::WATCH, "device/virtio\0v\0"), ok());
    assert_eq!(event(&guest), "device/virtio\0v\0");
    assert_eq!(ask(&host, message::RM, "/local/domain/1/device\0"), ok());
    assert_eq!(event(&guest), "device/virtio\0v\0");
}

#[test]
fn a_transaction_is_seen_at_its_end_or_not_at_all() {
    let (_host, guest) = domains();
    let start =
        || ask(&guest, message::TRANSACTION_START, "\0").unwrap().trim_end_matches('\0').parse::<u32>().unwrap();
    let write = |transaction, value| ask_in(&guest, transaction, message::WRITE, format!("data/t\0{value}").as_bytes());
    let read = |transaction| ask_in(&guest, transaction, message::READ, b"data/t\0");
    let end = |transaction, how: &[u8]| ask_in(&guest, transaction, message::TRANSACTION_END, how);
    let first = start();
    assert_eq!(write(first, "one"), ok());
    assert_eq!((read(first), read(0)), (Ok("one".into()), err("ENOENT")));
    assert_eq!(end(first, b"T\0"), ok());
    assert_eq!(read(0), Ok("one".into()));
    let second = start();
    assert_eq!(write(second, "two"), ok());
    assert_eq!(end(second, b"F\0"), ok());
    assert_eq!(read(0), Ok("one".into()));
    let third = start();
    assert_eq!(write(third, "three"), ok());
    assert_eq!(write(0, "four"), ok());
    assert_eq!(end(third, b"T\0"), err("EAGAIN"));
    assert_eq!(read(0), Ok("four".into()));
    for transaction in [third, 12345] {
        assert_eq!(read(transaction), err("ENOENT"));
        assert_eq!(end(transaction, b"T\0"), err("ENOENT"));
    }
}

#[test]
fn messages_in_pieces_that_wrap_around_the_rings_arrive_whole() {
    let (host, _guest) = domains();
    for len in [0, 1, 900, 1007, 1008, 1009, 2000, 3000, PAYLOAD_MAX - 3] {
        let value: String = (0..len).map(|at| char::from(b'a' + (at % 26) as u8)).collect();
        let payload = format!("w\0{value}");
        let message = [&header(message::WRITE, 77, 0, payload.len())[..], payload.as_bytes()].concat();
        for piece in message.chunks(97) {
            host.store_send(piece).unwrap();
        }
        assert_eq!(receive(&host).1, b"OK\0");
        assert_eq!(ask(&host, message::READ, "w\0"), Ok(value));
    }
}

#[test]
fn a_message_that_is_too_long_ends_the_connection_and_no_other() {
    let (host, guest) = domains();
    guest.store_send(&header(message::WRITE, 1, 0, PAYLOAD_MAX + 1)).unwrap();
    assert!(!guest.store_receive(&mut [0; HEADER_LEN]));
    let more = vec![0; 2 * RING_SIZE as usize];
    assert_eq!(reason(guest.store_send(&more)), "xenstored has given this connection up");
    assert_eq!(ask(&host, message::READ, "domid\0"), Ok("0".into()));
}

#[test]
fn ring_indices_that_cannot_be_end_the_connection() {
    let (host, guest) = domains();
    // Its own view of the page, which is under its own control.
    let frame = guest.ram.u32(entry(1) + 4).load(SeqCst);
    let at = frame as usize * 4096;
    guest.ram.u32(at + 2052).store(5000, SeqCst);
    let port = (1..10).find(|&port| guest.send(port).is_ok()).unwrap();
    guest.send(port).unwrap();
    assert!(!guest.store_receive(&mut [0; 1]));
    assert_eq!(guest.ram.u32(at + 2072).load(SeqCst), 2);
    let interface = Interface::new(guest.ram.frames_at(frame, 1)).unwrap();
    assert!(interface.put(REQUESTS, b"x").is_err());
    assert_eq!(ask(&host, message::READ, "domid\0"), Ok("0".into()));
}

#[test]
fn a_domain_that_does_not_take_its_answers_is_not_read_any_more() {
    let (host, guest) = domains();
    let request = [&header(message::READ, 5, 0, 6)[..], b"domid\0"].concat();
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| (0..10_000).all(|_| guest.store_send(&request).is_ok()));
        // Others are served meanwhile.
        for _ in 0..100 {
            assert_eq!(ask(&host, message::READ, "domid\0"), Ok("0".into()));
        }
        guest.stop();
        assert!(!flood.join().unwrap(), "it was held up until it was stopped");
    });
}
