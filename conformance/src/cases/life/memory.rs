//! Guest memory that comes, goes, moves and is logged.

use std::os::fd::{AsFd, OwnedFd};

use polyvirt_core::memory::Pages;
use polyvirt_core::queue::QueueConfig;
use polyvirt_transports::vhost_user::memory_file;
use polyvirt_transports::vhost_user::messages::*;

use super::case;
use crate::cases::sample::{Sample, ensure, ensure_eq};
use crate::daemon::front::{Event, Front, LiveRing, PROTOCOL, bytes};
use crate::daemon::{RAM, RAM_AT};
use crate::suite::{Case, Finding, Objection, Session, Verdict};

pub(super) const CASES: &[Case] = &[
    case("life/slots-under-load", "memory slots are added and removed while a ring is served", slots),
    case("life/table-again", "a new table of memory while a ring runs leaves the ring as it is", table_again),
    case(
        "life/table-of-another-file",
        "a new table with other memory at the same addresses counts from then on",
        other,
    ),
    case("life/dirty-log", "each page that the device writes is marked in the log, the used ring's too", dirty_log),
];

/// A further region of guest memory, bytes.
const MORE: u64 = 1 << 20;
/// Its guest-physical address.
const MORE_AT: u64 = RAM_AT + 2 * RAM;

fn memory(len: u64) -> Result<(OwnedFd, Pages), Objection> {
    memory_file("more", len).map_err(|error| Objection::failed("memory", error))
}

fn slots(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    front.need(ProtocolFeatures::CONFIGURE_MEM_SLOTS, "memory slots")?;
    let slots: u64 = front.ask(Request::GetMaxMemSlots, &[])?;
    ensure(slots >= 2, "at least 2 memory slots", slots)?;
    let mut rings = front.start_all(session)?;
    for round in 0..8 {
        let (file, _pages) = memory(MORE)?;
        let region = Region { guest: MORE_AT, size: MORE, user: front.user(MORE_AT), offset: 0 };
        let payload = [0u64.to_bytes(), region.to_bytes()].concat();
        // Chains are on their way while the slots change.
        let live = last(&mut rings);
        let first: Vec<_> = (0..8).map(|number| live.offer(session, 3 * number)).collect::<Result<_, _>>()?;
        live.ring.kick()?;
        front.tell(Request::AddMemReg, &payload, &[file.as_fd()])?;
        drain(&front, live, 8, round)?;
        drop(first);
        let second: Vec<_> = (0..8).map(|number| live.offer(session, 3 * number)).collect::<Result<_, _>>()?;
        live.ring.kick()?;
        front.tell(Request::RemMemReg, &payload, &[])?;
        drain(&front, live, 8, round)?;
        drop(second);
    }
    front.serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn drain(front: &Front, live: &mut LiveRing, count: u32, round: u32) -> Result<(), Objection> {
    let mut used = Vec::new();
    while used.len() < count as usize {
        used.push(front.used(live)?.0);
    }
    used.sort_unstable();
    let all: Vec<_> = (0..count).map(|number| 3 * number).collect();
    ensure_eq(&format!("the buffers used in round {round}"), used, all)
}

fn table_again(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    let mut rings = front.start_all(session)?;
    front.serve(session, &mut rings)?;
    // As at memory hot plug without slots: the same region, and one more.
    let (more, _pages) = memory(MORE)?;
    let ram = session.daemon()?.ram.0.try_clone().map_err(|error| Objection::failed("a descriptor", error))?;
    let added = Region { guest: MORE_AT, size: MORE, user: front.user(MORE_AT), offset: 0 };
    let region = front.region();
    front.hand_over(&[(region, ram), (added, more)])?;
    front.serve(session, &mut rings)?;
    front.hand_over_memory()?;
    front.serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn other(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    let mut rings = front.start_all(session)?;
    front.serve(session, &mut rings)?;
    // Everything moves to another file.
    let old = session.daemon()?.ram.1.clone();
    let (file, new) = memory(RAM)?;
    let copy = |from: u64, len: usize| -> Result<(), Objection> {
        let at = (from - RAM_AT) as usize;
        Ok(new.write(at, &bytes(&old, at, len)?)?)
    };
    copy(RAM_AT, RAM as usize)?;
    let region = front.region();
    front.hand_over(&[(region, file)])?;
    // From here on there is one chain more, for who looks at the new memory by then what makes it available comes last.
    let live = last(&mut rings);
    let QueueConfig { size, descriptors, driver, device, .. } = live.ring.config;
    let head = if live.ring.is_packed() { live.ring.packed().available.index() } else { 0 };
    let sample = live.offer(session, 3)?;
    for (memory, _) in &sample.pieces {
        copy(memory.address, memory.len as usize)?;
    }
    let first = descriptors + 16 * u64::from(head);
    copy(descriptors, 16 * usize::from(head))?;
    copy(first + 16, 16 * usize::from(size - head - 1))?;
    copy(first, 16)?;
    if !live.ring.is_packed() {
        copy(driver + 4, 2 * usize::from(size))?;
        copy(driver, 4)?;
    }
    // Where the device says what it used: as it is before that.
    let area = if live.ring.is_packed() { first } else { device };
    let told_at = (area - RAM_AT) as usize;
    // Of a packed ring the first descriptor alone: its flags change.
    let len = if live.ring.is_packed() { 16 } else { 4 };
    let before = bytes(&new, told_at, len)?;
    live.ring.kick()?;
    loop {
        let event = front.wait(live);
        ensure(!live.ring.has_used(), "the ring is served in the new memory", "it was served in the old")?;
        match event? {
            // It cannot be, and the front end is told so.
            Event::Broken | Event::Closed => return Ok(Finding::Rejected),
            Event::Called if bytes(&new, told_at, len)? != before => return Ok(Finding::Passed),
            // A call about nothing.
            Event::Called => {}
        }
    }
}

/// Bytes of guest memory for a bit of the log.
const LOG_PAGE: u64 = 4096;

fn dirty_log(session: &mut Session) -> Verdict {
    let mut front = Front::negotiated(session, PROTOCOL, 0)?;
    front.need(ProtocolFeatures::LOG_SHMFD, "a log in shared memory")?;
    if front.offered & LOG_ALL == 0 {
        return Err(Objection::Skipped("the daemon does not log".into()));
    }
    front.hand_over_memory()?;
    let mut rings = front.start_all(session)?;
    front.serve(session, &mut rings)?;
    // The log begins while the ring runs, as it does in QEMU.
    let bytes = (RAM_AT + RAM).div_ceil(8 * LOG_PAGE).next_multiple_of(4096);
    let (file, log) = memory(bytes)?;
    let area = LogArea { size: bytes, offset: 0 };
    let (_, _) = front.ask_with::<u64>(Request::SetLogBase, &area.to_bytes(), &[file.as_fd()])?;
    front.set_features(LOG_ALL)?;
    let live = last(&mut rings);
    let used_at = live.ring.config.device;
    let addresses = front.addresses(live, Some(used_at)).to_bytes();
    front.tell(Request::SetVringAddr, &addresses, &[])?;
    let sample = live.offer(session, 0)?;
    live.ring.kick()?;
    front.used(live)?;
    // Stopped: nothing is on its way into the log any more.
    front.stop(live.index)?;
    // A packed ring's descriptors are what is used.
    let told_at = if live.ring.is_packed() { live.ring.config.descriptors } else { used_at };
    let mut written: Vec<_> = written(&sample);
    if !live.ring.is_packed() {
        written.push(told_at);
    }
    for address in written {
        let (bit, mut byte) = (address / LOG_PAGE, [0]);
        log.read((bit / 8) as usize, &mut byte)?;
        ensure(byte[0] >> (bit % 8) & 1 == 1, format_args!("the page of {address:#x} is marked"), "it is not")?;
    }
    Ok(Finding::Passed)
}

/// Where the device writes when it serves `sample`: the first byte of each piece.
fn written(sample: &Sample) -> Vec<u64> {
    sample.pieces.iter().filter(|(_, writable)| *writable).map(|(memory, _)| memory.address).collect()
}

fn last(rings: &mut [LiveRing]) -> &mut LiveRing {
    rings.last_mut().expect("every device has a queue")
}
