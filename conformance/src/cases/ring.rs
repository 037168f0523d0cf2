//! The split ring, as the device carries it out.

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::transport::{BlockingTransport, Transport};

use super::init::serve_next;
use super::sample::{
    BLK_IN, POISON, Sample, TEXT, blk_header, ensure, ensure_eq, entries, only_allowed, serve, serve_told, shown,
    touches,
};
use crate::raw::{Memory, NEXT, Ring};
use crate::suite::{Applies, BLK, CONSOLE, Case, Finding, Objection, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new("ring/used-id", "a used element names the head of the chain, wherever that is in the table", used_id),
    Case::new(
        "ring/used-length",
        "the used length is at most what was written, and not more than there is",
        used_length,
    )
    .judges(&["N0067"])
    .packed_judges(&[]),
    Case::new("ring/length-before-index", "what is told of a used buffer is complete when it is told", length_first)
        .judges(&["N0066"])
        .packed_judges(&["N0092"]),
    Case::new("ring/readable-untouched", "device-readable buffers are not written", readable_untouched)
        .judges(&["N0041"])
        .packed_judges(&["N0089"]),
    Case::new("ring/writable-not-read", "device-writable buffers are not read", writable_unread)
        .judges(&["N0042"])
        .packed_judges(&["N0090"]),
    Case::new("ring/descriptors-untouched", "the descriptor table is not written", descriptors_untouched)
        .judges(&["N0044"])
        .only(RingFormat::Split),
    Case::new(
        "ring/only-what-is-given",
        "the device touches its rings and the buffers on them, nothing else",
        only_given,
    )
    .judges(&["N0041"])
    .packed_judges(&["N0089"]),
    Case::new("ring/any-arrangement", "how a request is cut into descriptors makes no difference", arrangement)
        .judges(&["N0037"])
        .packed_judges(&["N0037", "N0103"]),
    Case::new("ring/scattered-slots", "a chain may wander through the table in any order", scattered)
        .judges(&["N0037"])
        .only(RingFormat::Split),
    Case::new("ring/whole-queue", "as many chains as the queue has entries, in one go", whole_queue),
    Case::new("ring/wrap", "the rings wrap, and go on", wrap),
    Case::new("ring/index-wrap", "the 16-bit indices wrap, and go on", index_wrap).only(RingFormat::Split),
    Case::new("ring/small-queue", "a queue of fewer entries than the maximum, down to one chain", small_queue)
        .on(Applies::MODERN),
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
    let places = rings[queue].next_used();
    serve(session, &mut rings)?;
    let accesses = session.probe()?.since(mark)?;
    // All at once is as good.
    let [element, index] = places.map(|(address, len)| {
        accesses.iter().rposition(|access| access.direction == Access::WRITE && touches(*access, address, len))
    });
    ensure(
        element.is_some() && element <= index,
        "id and length, then what says that they are there",
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
pub(super) fn cut(sample: &Sample, most: u32) -> Vec<(Memory, bool)> {
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
pub(super) fn serve_many(
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
        if ring.offered < ring.size() {
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
pub(super) fn small(session: &Session) -> Result<Vec<(Memory, bool)>, Objection> {
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
    let last = rings.len() - 1;
    // What a hypervisor maps for each request, it would map 65536 times, and that is not what this is about; the ring is
    // mapped all the time.
    let pieces = small(session)?.into_iter().map(|(memory, writable)| {
        let beside = rings[last].split().beside(&memory, writable)?;
        Ok((beside.unwrap_or(memory), writable))
    });
    let pieces = pieces.collect::<Result<Vec<_>, Objection>>()?;
    let ring = &rings[last];
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

/// Brings the device up with queue reset; skipped where it is not offered.
fn with_queue_reset(session: &mut Session) -> Result<Vec<Ring>, Objection> {
    if !session.transport.device_features()?.contains(Features::RING_RESET) {
        return Err(Objection::Skipped("the device does not offer VIRTIO_F_RING_RESET".into()));
    }
    session.bring_up(Features::RING_RESET)
}

fn reset_alone(session: &mut Session) -> Verdict {
    let mut rings = with_queue_reset(session)?;
    serve_told(session, &mut rings)?;
    let sample = Sample::new(session)?;
    let queue = usize::from(sample.queue);
    session.transport.reset_vq(sample.queue)?;
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
