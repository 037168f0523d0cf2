//! The split ring, as the device carries it out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::queue::split::layout::Descriptor;
use polyvirt_core::transport::Transport;

use super::chains::REFUSED;
use super::init::serve_next;
use super::sample::{
    Attack, BLK_IN, POISON, Sample, TEXT, Tolerance, attack, blk_header, descriptor, ensure, ensure_eq, entries,
    only_allowed, revive, serve, shown, touches,
};
use crate::raw::{INDIRECT, Memory, NEXT, Ring, WRITE};
use crate::suite::{Applies, BLK, CONSOLE, Case, Finding, Objection, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new("ring/used-id", "a used element names the head of the chain, wherever that is in the table", used_id),
    Case::new(
        "ring/used-length",
        "the used length is at most what was written, and not more than there is",
        used_length,
    )
    .judges(&["N0067"]),
    Case::new("ring/length-before-index", "an element is complete when the used index covers it", length_first)
        .judges(&["N0066"]),
    Case::new("ring/readable-untouched", "device-readable buffers are not written", readable_untouched)
        .judges(&["N0041"]),
    Case::new("ring/writable-not-read", "device-writable buffers are not read", writable_unread).judges(&["N0042"]),
    Case::new("ring/descriptors-untouched", "the descriptor table is not written", descriptors_untouched)
        .judges(&["N0044"]),
    Case::new(
        "ring/only-what-is-given",
        "the device touches its rings and the buffers on them, nothing else",
        only_given,
    )
    .judges(&["N0041"]),
    Case::new("ring/any-arrangement", "how a request is cut into descriptors makes no difference", arrangement)
        .judges(&["N0037"]),
    Case::new("ring/scattered-slots", "a chain may wander through the table in any order", scattered)
        .judges(&["N0037"]),
    Case::new("ring/whole-queue", "as many chains as the queue has entries, in one go", whole_queue),
    Case::new("ring/wrap", "the rings wrap, and go on", wrap),
    Case::new("ring/index-wrap", "the 16-bit indices wrap, and go on", index_wrap),
    Case::new("ring/small-queue", "a queue of fewer entries than the maximum, down to one chain", small_queue)
        .on(Applies::MODERN),
    Case::new("ring/indirect", "a chain in an indirect table is served", indirect).judges(&["N0053"]),
    Case::new("ring/indirect-behind-direct", "direct descriptors, then an indirect one, make one chain", mixed)
        .judges(&["N0053"]),
    Case::new("ring/indirect-write-flag", "the WRITE flag beside INDIRECT means nothing", indirect_write)
        .judges(&["N0052"]),
    Case::new("ring/indirect-out-of-order", "an indirect table in any order", indirect_scattered).judges(&["N0037"]),
    Case::new("ring/head-beyond-table", "a head that the table does not have", head_beyond)
        .judges(REFUSED)
        .class(&[19]),
    Case::new("ring/index-jump", "an available index further ahead than the queue is long", index_jump)
        .judges(REFUSED)
        .class(&[19, 21]),
    Case::new("ring/index-back", "an available index that goes back", index_back).judges(REFUSED).class(&[19]),
    Case::new("ring/same-head-twice", "the same head made available twice at once", twice).judges(REFUSED).class(&[20]),
    Case::new("ring/same-head-in-flight", "a head that the device still holds is made available again", in_flight)
        .judges(REFUSED)
        .class(&[20, 21])
        .on(Applies::to(CONSOLE)),
    Case::new("ring/rewritten", "descriptors that change while the device reads them", rewritten).class(&[24]),
    Case::new(
        "ring/malformed-not-retried",
        "a malformed chain is looked at once, however often it is kicked",
        not_retried,
    )
    .class(&[26, 27]),
    Case::new("ring/reset-alone", "a queue that is reset alone is left alone, starts over, and serves", reset_alone)
        .judges(&["N0030", "N0031"])
        .on(Applies::MODERN),
    Case::new("ring/reset-and-resized", "a queue that was reset is served with its new size and place", resized)
        .judges(&["N0034"])
        .on(Applies::MODERN),
];

fn used_id(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let queue = usize::from(Sample::new(session)?.queue);
    let size = rings[queue].size();
    for head in [0, 1, size / 2, size - 1, 0] {
        let sample = Sample::new(session)?;
        let ring = &mut rings[queue];
        ring.chain(head, &sample.pieces);
        ring.offer(head);
        ring.kick()?;
        let (id, len) = session.wait_used(ring)?;
        ensure_eq("used id", id, head.into())?;
        sample.check(session, len)?;
    }
    Ok(Finding::Passed)
}

fn used_length(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let sample = Sample::new(session)?;
    let mark = session.probe()?.mark();
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    ring.kick()?;
    let (_, len) = session.wait_used(ring)?;
    ensure(len <= sample.writable(), format_args!("at most {} bytes", sample.writable()), len)?;
    // Every byte that the length claims was written, from the first writable one on.
    let accesses = session.probe()?.since(mark)?;
    let mut left = u64::from(len);
    for (memory, _) in sample.pieces.iter().filter(|(_, writable)| *writable) {
        let claimed = left.min(memory.len.into());
        left -= claimed;
        for offset in 0..claimed {
            let at = memory.address + offset;
            let written = accesses.iter().any(|access| access.direction == Access::WRITE && touches(*access, at, 1));
            ensure(written, format_args!("{len} bytes written, as the used length says"), format_args!("not {at:#x}"))?;
        }
    }
    sample.check(session, len)?;
    Ok(Finding::Passed)
}

fn length_first(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let queue = usize::from(Sample::new(session)?.queue);
    let mark = session.probe()?.mark();
    serve(session, &mut rings)?;
    // The index is at bytes 2 and 3 of the used ring, the first element at bytes 4 to 11.
    let used = rings[queue].config.device;
    let accesses = session.probe()?.since(mark)?;
    let last = |from: u64, len| {
        accesses.iter().rposition(|access| access.direction == Access::WRITE && touches(*access, used + from, len))
    };
    let (index, element) = (last(2, 2), last(4, 8));
    ensure(
        element.is_some() && element < index,
        "the element, then the index",
        format_args!("writes {element:?}, {index:?}"),
    )?;
    Ok(Finding::Passed)
}

/// Lets the device serve a sample and returns what it touched.
fn observed(
    session: &mut Session,
    features: Features,
) -> Result<(Sample, Vec<polyvirt_core::memory::Accessed>), Objection> {
    let mut rings = session.bring_up(features)?;
    let sample = Sample::new(session)?;
    let mark = session.probe()?.mark();
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    ring.kick()?;
    let (_, len) = session.wait_used(ring)?;
    let accesses = session.probe()?.since(mark)?;
    sample.check(session, len)?;
    Ok((sample, accesses))
}

fn readable_untouched(session: &mut Session) -> Verdict {
    let (sample, accesses) = observed(session, Features::empty())?;
    for (address, len, right) in sample.ranges() {
        let wrote = accesses.iter().find(|access| access.direction == Access::WRITE && touches(**access, address, len));
        if let Some(access) = wrote.filter(|_| right == Access::READ) {
            return Err(Objection::failed("no write to a device-readable buffer", shown(*access)));
        }
    }
    if session.cell.device_type == CONSOLE {
        ensure_eq("the text in memory", sample.pieces[0].0.bytes()?, TEXT.to_vec())?;
    }
    if session.cell.device_type == BLK {
        ensure_eq("the header in memory", sample.pieces[0].0.bytes()?, blk_header(session, BLK_IN, 0))?;
    }
    Ok(Finding::Passed)
}

fn writable_unread(session: &mut Session) -> Verdict {
    let (sample, accesses) = observed(session, Features::empty())?;
    for (address, len, right) in sample.ranges() {
        let read = accesses.iter().find(|access| access.direction == Access::READ && touches(**access, address, len));
        if let Some(access) = read.filter(|_| right == Access::WRITE) {
            return Err(Objection::failed("no read of a device-writable buffer", shown(*access)));
        }
    }
    Ok(Finding::Passed)
}

fn descriptors_untouched(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let queue = usize::from(Sample::new(session)?.queue);
    let sample = Sample::new(session)?;
    let ring = &mut rings[queue];
    ring.chain(0, &sample.pieces);
    let before = ring.descriptor_bytes()?;
    let mark = session.probe.as_ref().map(crate::suite::Probe::mark);
    let ring = &mut rings[queue];
    ring.offer(0);
    ring.kick()?;
    let (_, len) = session.wait_used(ring)?;
    sample.check(session, len)?;
    ensure(rings[queue].descriptor_bytes()? == before, "the descriptor table as it was", "it changed")?;
    if let Some(mark) = mark {
        let (address, len, _) = rings[queue].areas()[0];
        for access in session.probe()?.since(mark)? {
            let wrote = access.direction == Access::WRITE && touches(access, address, len);
            ensure(!wrote, "no write to the descriptor table", shown(access))?;
        }
    }
    Ok(Finding::Passed)
}

fn only_given(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for features in [Features::empty(), offered & Features::EVENT_IDX] {
        let mut rings = session.bring_up(features)?;
        let mark = session.probe()?.mark();
        let mut ranges = Vec::new();
        for _ in 0..3 {
            let sample = Sample::new(session)?;
            let ring = &mut rings[usize::from(sample.queue)];
            ring.chain(0, &sample.pieces);
            ring.offer(0);
            ring.kick()?;
            let (_, len) = session.wait_used(ring)?;
            sample.check(session, len)?;
            ranges.extend(sample.ranges());
            only_allowed(session, mark, &rings, &ranges)?;
        }
    }
    Ok(Finding::Passed)
}

/// The sample in pieces of at most `most` bytes.
fn cut(sample: &Sample, most: u32) -> Vec<(Memory, bool)> {
    let mut pieces = Vec::new();
    for (memory, writable) in &sample.pieces {
        let mut at = 0;
        while at < memory.len {
            let len = most.min(memory.len - at);
            pieces.push((memory.part(at, len), *writable));
            at += len;
        }
    }
    pieces
}

fn arrangement(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    for most in [1024, 500, 100, 15, 7] {
        let sample = Sample::new(session)?;
        let ring = &mut rings[usize::from(sample.queue)];
        let pieces = cut(&sample, most);
        if pieces.len() > usize::from(ring.size()) {
            continue;
        }
        ring.chain(0, &pieces);
        ring.offer(0);
        ring.kick()?;
        let (_, len) = session.wait_used(ring)?;
        sample.check(session, len)?;
    }
    if session.cell.device_type == BLK {
        // Data and status in one descriptor.
        let sample = Sample::new(session)?;
        let both = Memory::writable(session, 513, POISON)?;
        let ring = &mut rings[0];
        ring.chain(0, &[sample.pieces[0].clone(), (both.clone(), true)]);
        ring.offer(0);
        ring.kick()?;
        let (_, len) = session.wait_used(ring)?;
        ensure_eq("used length", len, 513)?;
        ensure_eq("status, the last byte of the descriptor,", both.bytes()?[512], 0)?;
    }
    Ok(Finding::Passed)
}

fn scattered(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let sample = Sample::new(session)?;
    let ring = &mut rings[usize::from(sample.queue)];
    let slots = [ring.size() - 1, 1, ring.size() / 2];
    let entries = sample.entries();
    for (number, mut entry) in entries.iter().copied().enumerate() {
        if entry.flags & NEXT != 0 {
            entry.next = slots[number + 1];
        }
        ring.set_descriptor(slots[number], entry);
    }
    ring.offer(slots[0]);
    ring.kick()?;
    let (id, len) = session.wait_used(ring)?;
    ensure_eq("used id", id, slots[0].into())?;
    sample.check(session, len)?;
    Ok(Finding::Passed)
}

/// Lets the device serve `count` small requests at once, on any device; each is used once.
fn serve_many(
    session: &mut Session,
    rings: &mut [Ring],
    count: u16,
    pieces: &[(Memory, bool)],
) -> Result<(), Objection> {
    let queue = usize::from(session.cell.device_type == CONSOLE);
    let ring = &mut rings[queue];
    let mut heads = Vec::new();
    for number in 0..count {
        let head = number * pieces.len() as u16;
        heads.push(head);
        if ring.available < ring.size() {
            for (offset, mut entry) in entries(pieces).into_iter().enumerate() {
                if entry.flags & NEXT != 0 {
                    entry.next += head;
                }
                ring.set_descriptor_quietly(head + offset as u16, entry);
            }
        }
    }
    ring.offer_all(&heads);
    ring.kick()?;
    let mut seen = vec![false; usize::from(ring.size())];
    for _ in 0..count {
        let (id, _) = session.wait_used(ring)?;
        let expected = "each head used once";
        let Some(seen) = seen.get_mut(id as usize).filter(|_| heads.contains(&(id as u16))) else {
            return Err(Objection::failed(expected, format!("{id}, which is none")));
        };
        ensure(!std::mem::replace(seen, true), expected, format_args!("{id} twice"))?;
    }
    if session.cell.device_type == CONSOLE {
        ensure_eq("printed bytes", session.far_side.output()?.len(), usize::from(count))?;
    }
    Ok(())
}

/// The smallest request of a device; the same memory may be used by many at once.
fn small(session: &Session) -> Result<Vec<(Memory, bool)>, Objection> {
    Ok(match session.cell.device_type {
        // A flush: a header and a status.
        BLK => vec![
            (Memory::readable(session, &blk_header(session, 4, 0))?, false),
            (Memory::writable(session, 1, POISON)?, true),
        ],
        CONSOLE => vec![(Memory::readable(session, b"x")?, false)],
        _ => vec![(Memory::writable(session, 1, POISON)?, true)],
    })
}

fn whole_queue(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let pieces = small(session)?;
    let count = rings[rings.len() - 1].size() / pieces.len() as u16;
    serve_many(session, &mut rings, count, &pieces)?;
    Ok(Finding::Passed)
}

fn wrap(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let size = rings[rings.len() - 1].size();
    let pieces = small(session)?;
    // A number that does not divide the size, so that bursts lie across the end.
    let burst = (size / pieces.len() as u16 - 1).min(37);
    for _ in 0..3 * size / burst + 1 {
        serve_many(session, &mut rings, burst, &pieces)?;
    }
    Ok(Finding::Passed)
}

fn index_wrap(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let pieces = small(session)?;
    let ring = &rings[rings.len() - 1];
    // Less than the queue, so that each burst ends before the device looks by itself for more.
    let burst = ring.size() / pieces.len() as u16 - 1;
    let mut done = 0u32;
    while done <= 1 << 16 {
        serve_many(session, &mut rings, burst, &pieces)?;
        done += u32::from(burst);
        if let Some(probe) = &session.probe {
            probe.clear();
        }
    }
    serve_next(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn small_queue(session: &mut Session) -> Verdict {
    for size in [4, 8] {
        session.negotiate(Features::empty())?;
        let max = session.transport.queue_max_size(0)?;
        let mut rings = Vec::new();
        for index in 0..session.queues() {
            rings.push(session.ring_of(index, Some(size.min(max)))?);
        }
        session.go()?;
        serve(session, &mut rings)?;
        let mut kept = Vec::new();
        for _ in 0..3 * size {
            kept.push(serve_next(session, &mut rings)?);
        }
    }
    Ok(Finding::Passed)
}

fn need_indirect(session: &mut Session) -> Result<(), Objection> {
    match session.transport.device_features()?.contains(Features::INDIRECT_DESC) {
        true => Ok(()),
        false => Err(Objection::Skipped("the device does not offer indirect descriptors".into())),
    }
}

/// Lets the device serve a sample of which the last `inside` descriptors are in an indirect table, as `arrange` puts it.
fn serve_indirect(
    session: &mut Session,
    direct: usize,
    flags: u16,
    arrange: impl Fn(Vec<Descriptor>) -> Vec<Descriptor>,
) -> Verdict {
    need_indirect(session)?;
    let mut rings = session.bring_up(Features::INDIRECT_DESC)?;
    let sample = Sample::new(session)?;
    let pieces = cut(&sample, if session.cell.device_type == BLK { 512 } else { 5 });
    let ring = &mut rings[usize::from(sample.queue)];
    let direct = direct.min(pieces.len() - 1);
    for (slot, (memory, writable)) in pieces[..direct].iter().enumerate() {
        let slot = slot as u16;
        ring.set_descriptor(slot, crate::raw::link(memory, *writable, Some(slot + 1)));
    }
    let table = Memory::readable(session, &ring.table(&arrange(entries(&pieces[direct..]))))?;
    ring.set_descriptor(direct as u16, descriptor(table.address, table.len, INDIRECT | flags, 0));
    ring.offer(0);
    ring.kick()?;
    let (id, len) = session.wait_used(ring)?;
    ensure_eq("used id", id, 0)?;
    sample.check(session, len)?;
    Ok(Finding::Passed)
}

fn indirect(session: &mut Session) -> Verdict {
    serve_indirect(session, 0, 0, |table| table)
}

fn mixed(session: &mut Session) -> Verdict {
    serve_indirect(session, 1, 0, |table| table)
}

fn indirect_write(session: &mut Session) -> Verdict {
    serve_indirect(session, 0, WRITE, |table| table)
}

fn indirect_scattered(session: &mut Session) -> Verdict {
    serve_indirect(session, 0, 0, |table| {
        // The first stays first, the others come in reverse, behind a gap.
        let count = table.len();
        let place = |number: usize| if number == 0 { 0 } else { count + 1 - number };
        let mut turned = vec![descriptor(0, 0, 0, 0); count + 1];
        for (number, mut entry) in table.into_iter().enumerate() {
            if entry.flags & NEXT != 0 {
                entry.next = place(number + 1) as u16;
            }
            turned[place(number)] = entry;
        }
        turned
    })
}

fn head_beyond(session: &mut Session) -> Verdict {
    for beyond in [0, 1, u16::MAX] {
        attack(session, Features::empty(), |session, rings, sample| {
            let ring = &mut rings[usize::from(sample.queue)];
            ring.chain(0, &sample.pieces);
            ring.offer(ring.size().saturating_add(beyond));
            Ok(Attack::new(session, sample, Tolerance::None))
        })?;
        session.transport.reset()?;
    }
    Ok(Finding::Rejected)
}

fn index_jump(session: &mut Session) -> Verdict {
    for jump in [1, 0x4000] {
        attack(session, Features::empty(), |session, rings, sample| {
            let ring = &mut rings[usize::from(sample.queue)];
            ring.chain(0, &sample.pieces);
            for slot in 0..ring.size() {
                ring.set_entry(slot, 0);
            }
            ring.set_available(ring.size() + jump);
            Ok(Attack::new(session, sample, Tolerance::None).chains(u16::MAX))
        })?;
        session.transport.reset()?;
    }
    Ok(Finding::Rejected)
}

fn index_back(session: &mut Session) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let ring = &mut rings[usize::from(sample.queue)];
        ring.chain(0, &sample.pieces);
        // What is used before the index goes back was good.
        ring.offer(0);
        ring.kick()?;
        session.wait_used(ring)?;
        if session.cell.device_type == CONSOLE {
            session.far_side.output()?;
        }
        ring.set_available(0);
        Ok(Attack::new(session, sample, Tolerance::None).chains(u16::MAX))
    })
}

fn twice(session: &mut Session) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let ring = &mut rings[usize::from(sample.queue)];
        ring.chain(0, &sample.pieces);
        ring.offer_all(&[0, 0]);
        Ok(Attack::new(session, sample, Tolerance::Lenient).chains(2))
    })
}

fn in_flight(session: &mut Session) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        // Nobody types, so the device keeps what is in its receive queue.
        let buffer = Memory::writable(session, 16, POISON)?;
        let ring = &mut rings[0];
        ring.chain(0, &[(buffer.clone(), true)]);
        ring.offer(0);
        ring.kick()?;
        ring.offer(0);
        ring.kick()?;
        // A device that takes buffers only when it has something to put into them learns of it now.
        session.far_side.input(b"ab")?;
        ring.offer_all(&[0, 0]);
        let attack = Attack { queue: 0, ..Attack::new(session, sample, Tolerance::Lenient) };
        Ok(attack.and(&buffer, Access::WRITE))
    })
}

fn rewritten(session: &mut Session) -> Verdict {
    // A thread turns descriptor 0 into nonsense and back while requests are made; whatever the device sees, it reads
    // it once, so it either serves or refuses.
    for _ in 0..20 {
        let mut rings = session.bring_up(Features::empty())?;
        let sample = Sample::new(session)?;
        let mark = session.probe.as_ref().map(crate::suite::Probe::mark);
        let ring = &mut rings[usize::from(sample.queue)];
        ring.chain(0, &sample.pieces);
        let good = sample.entries()[0];
        let bad = Descriptor { address: u64::MAX - 3, len: u32::MAX, ..good };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let table = ring.descriptors();
            let (good, bad) = (ring.words(good), ring.words(bad));
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    for [first, second] in [bad, good] {
                        table.store(0, first, Ordering::SeqCst);
                        table.store(1, second, Ordering::SeqCst);
                    }
                }
            });
            let begun = Instant::now();
            let mut attempt = || -> Result<(), Objection> {
                for _ in 0..20 {
                    ring.offer(0);
                    ring.kick()?;
                    while ring.take().is_none() {
                        if session.needs_reset()? {
                            return Ok(());
                        }
                        let expected = "the device serves or refuses";
                        ensure(begun.elapsed() < session.watchdog, expected, "it does neither")?;
                        std::thread::yield_now();
                    }
                }
                Ok(())
            };
            let served = attempt();
            stop.store(true, Ordering::SeqCst);
            served
        })?;
        if let Some(mark) = mark {
            only_allowed(session, mark, &rings, &sample.ranges())?;
        }
        if session.cell.device_type == CONSOLE {
            session.far_side.output()?;
        }
        revive(session, rings)?;
    }
    Ok(Finding::Passed)
}

fn not_retried(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let sample = Sample::new(session)?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(ring.size());
    ring.kick()?;
    session.wait_config()?;
    ensure(session.needs_reset()?, "DEVICE_NEEDS_RESET", "it is not set")?;
    let mark = session.probe()?.mark();
    let ring = &mut rings[usize::from(sample.queue)];
    for _ in 0..200 {
        ring.kick()?;
    }
    session.transport.status()?;
    let again = session.probe()?.since(mark)?.len();
    ensure(again == 0, "a broken queue is not looked at again", format_args!("{again} accesses in 200 kicks"))?;
    revive(session, rings)?;
    Ok(Finding::Rejected)
}

/// Brings the device up with queue reset; skipped where it is not offered.
fn with_queue_reset(session: &mut Session) -> Result<Vec<Ring>, Objection> {
    if !session.transport.device_features()?.contains(Features::RING_RESET) {
        return Err(Objection::Skipped("the device does not offer VIRTIO_F_RING_RESET".into()));
    }
    session.bring_up(Features::RING_RESET)
}

fn reset_alone(session: &mut Session) -> Verdict {
    let mut rings = with_queue_reset(session)?;
    serve(session, &mut rings)?;
    let sample = Sample::new(session)?;
    let queue = usize::from(sample.queue);
    session.transport.reset_vq(sample.queue)?;
    while session.interrupted()? {}
    let mark = session.probe()?.mark();
    let old = &mut rings[queue];
    old.chain(0, &sample.pieces);
    old.offer(0);
    let _ = old.kick();
    session.transport.status()?;
    for access in session.probe()?.since(mark)? {
        let touched = rings[queue].areas().iter().any(|&(address, len, _)| touches(access, address, len));
        ensure(!touched, "no access to a queue after its reset", shown(access))?;
    }
    ensure(!session.interrupted()?, "no interrupt of a queue after its reset", "one came")?;
    // The old ring is kept, so that its memory is not the new one's.
    let fresh = session.ring(sample.queue)?;
    let old = std::mem::replace(&mut rings[queue], fresh);
    serve(session, &mut rings)?;
    drop(old);
    Ok(Finding::Passed)
}

fn resized(session: &mut Session) -> Verdict {
    let mut rings = with_queue_reset(session)?;
    serve(session, &mut rings)?;
    let queue = usize::from(Sample::new(session)?.queue);
    for size in [4, 8, 4] {
        session.transport.reset_vq(queue as u16)?;
        let fresh = session.ring_of(queue as u16, Some(size))?;
        let old = std::mem::replace(&mut rings[queue], fresh);
        serve(session, &mut rings)?;
        let mut kept = Vec::new();
        for _ in 0..2 * size {
            kept.push(serve_next(session, &mut rings)?);
        }
        drop(old);
    }
    Ok(Finding::Passed)
}
