//! The packed ring, as the device carries it out: what a split ring does not have.

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::queue::packed::layout::{AVAILABLE, EVENTS_AT, EVENTS_ON, Position, Tail, USED};
use polyvirt_core::transport::{BlockingTransport, Transport};

use super::chains::{PACKED_REFUSED, ring};
use super::indirect::need_indirect;
use super::init::serve_next;
use super::notify::{serve_silently, silence, with_event_idx};
use super::ring::{cut, serve_many, small};
use super::sample::{
    Attack, BLK_IN, POISON, Sample, Tolerance, attack, blk_header, descriptor, ensure, ensure_eq, entries, looked,
    revive, serve, serve_told, shown, touches,
};
use crate::raw::{INDIRECT, Memory, NEXT, Ring, WRITE, is_event_structure, link};
use crate::suite::{BLK, CONSOLE, Case, Finding, Mark, Objection, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("packed/any-size", "a ring of any size, not only a power of two, chains across its end", any_size)
        .class(&[23]),
    case("packed/any-id", "any buffer id, above the ring's size too, comes back or is refused", any_id).class(&[23]),
    case(
        "packed/order",
        "buffers are begun in the order of the ring, and told in the order in which they are done",
        order,
    )
    .judges(&["N0086", "N0087", "N0103"]),
    case("packed/one-used-descriptor", "a chain is told by one descriptor, which stays as it is", one_used)
        .judges(&["N0092"]),
    case(
        "packed/written-flag",
        "a used descriptor has WRITE if any byte was written, wherever, and only then",
        written,
    ),
    case(
        "packed/not-available",
        "a descriptor with the flags of another round, or a used one's, is left alone",
        not_available,
    )
    .judges(&["N0091"])
    .class(&[23]),
    case("packed/hole", "a descriptor behind one that is not available waits for it", hole).judges(&["N0086", "N0091"]),
    case("packed/half-available", "a list that goes on with a descriptor that is not available", half_available)
        .judges(&["N0091"])
        .class(&[23]),
    case("packed/indirect-in-a-list", "an indirect descriptor at the end of a list", indirect_in_list)
        .judges(PACKED_REFUSED)
        .class(&[5]),
    case(
        "packed/indirect-reserved",
        "ids and flags other than WRITE in an indirect table mean nothing",
        indirect_reserved,
    )
    .class(&[5]),
    case("packed/events-on-and-off", "with EVENT_IDX interrupts can be had always and never, too", on_and_off),
    case("packed/event-next-round", "an event of the next round is not one of this", next_round).class(&[22, 23]),
    case(
        "packed/event-in-a-list",
        "an event at any descriptor of a list is told once the list is used",
        event_in_a_list,
    )
    .class(&[22]),
    case("packed/event-odd", "events beyond the ring, reserved flags, events that were not negotiated", odd_events)
        .class(&[22, 23]),
    case("packed/device-events", "what the device writes about kicks is well-formed", device_events),
];

const fn case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).only(RingFormat::Packed)
}

fn any_size(session: &mut Session) -> Verdict {
    for size in [1, 3, 5, 7, 12] {
        session.negotiate(Features::empty())?;
        let pieces = Sample::new(session)?.pieces.len();
        if usize::from(size) < pieces {
            continue;
        }
        let rings: Result<Vec<_>, _> = (0..session.queues()).map(|index| session.ring_of(index, Some(size))).collect();
        let mut rings = rings?;
        session.go()?;
        let mut kept = Vec::new();
        for _ in 0..3 * size {
            kept.push(serve_next(session, &mut rings)?);
        }
    }
    Ok(Finding::Passed)
}

fn any_id(session: &mut Session) -> Verdict {
    let mut finding = Finding::Passed;
    for beyond in [0, 1, u16::MAX] {
        let found = attack(session, Features::empty(), |session, rings, sample| {
            let ring = ring(rings, sample);
            // The largest that the spec's own example can work with is below the size.
            let id = ring.size().saturating_add(beyond);
            ring.packed().offer(id, &sample.entries());
            Ok(Attack::new(session, sample, Tolerance::Lenient))
        })?;
        if found == Finding::Rejected {
            finding = found;
        }
        session.transport.reset()?;
    }
    Ok(finding)
}

fn order(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let mark = session.probe()?.mark();
    let samples = (0..6).map(|_| Sample::new(session)).collect::<Result<Vec<_>, _>>()?;
    let ring = ring(&mut rings, &samples[0]);
    // Ids that do not tell the order.
    let ids = [4, 1, 5, 0, 3, 2];
    let pieces = samples[0].pieces.len() as u16;
    let heads = ids.map(|id| id * pieces);
    for (sample, head) in samples.iter().zip(heads) {
        ring.chain(head, &sample.pieces);
    }
    ring.offer_all(&heads);
    ring.kick()?;
    let mut told = Vec::new();
    for _ in ids {
        told.push(session.wait_used(ring)?.0);
    }
    let accesses = session.probe()?.since(mark)?;
    let first = |sample: &Sample, number: usize| {
        let (address, len, _) = sample.ranges()[number];
        accesses.iter().position(|access| touches(*access, address, len))
    };
    let last = |sample: &Sample| {
        let ranges = sample.ranges();
        accesses.iter().rposition(|access| ranges.iter().any(|&(address, len, _)| touches(*access, address, len)))
    };
    let begun: Vec<_> = samples.iter().map(|sample| first(sample, 0)).collect();
    ensure(begun.is_sorted(), "buffers begun in the order of the ring", format_args!("accesses {begun:?}"))?;
    for sample in &samples {
        let pieces: Vec<_> = (0..sample.pieces.len()).map(|number| first(sample, number)).collect();
        ensure(pieces.is_sorted(), "a list used in its order", format_args!("accesses {pieces:?}"))?;
    }
    // What was touched last, was done last.
    let mut done: Vec<_> = samples.iter().zip(heads).map(|(sample, head)| (last(sample), head)).collect();
    done.sort();
    let done: Vec<_> = done.into_iter().map(|(_, head)| u32::from(head)).collect();
    ensure_eq("ids in the order in which they were done", told, done)?;
    Ok(Finding::Passed)
}

fn one_used(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let sample = Sample::new(session)?;
    let pieces = cut(&sample, if session.cell.device_type == BLK { 512 } else { 5 });
    let mark = session.probe.as_ref().map(crate::suite::Probe::mark);
    let ring = ring(&mut rings, &sample);
    ring.chain(0, &pieces);
    ring.offer(0);
    let before = ring.descriptor_bytes()?;
    ring.kick()?;
    let (id, len) = session.wait_used(ring)?;
    ensure_eq("used id", id, 0)?;
    sample.check(session, len)?;
    let used = ring.descriptor_bytes()?;
    ensure(before[16..] == used[16..], "nothing but the first descriptor is written", "another one is too")?;
    let first = ring.config.descriptors;
    if let Some(mark) = mark {
        for access in session.probe()?.since(mark)? {
            let other = access.direction == Access::WRITE && touches(access, first + 16, used.len() as u64 - 16);
            ensure(!other, "no write to any descriptor but the first", shown(access))?;
        }
    }
    // Buffers that come behind leave it alone.
    for _ in 0..3 {
        serve_next(session, &mut rings)?;
    }
    let later = self::ring(&mut rings, &sample).descriptor_bytes()?;
    ensure(later[..16] == used[..16], "the used descriptor as it was", "it changed")?;
    Ok(Finding::Passed)
}

/// Lets the device use a chain of `pieces`: WRITE says whether any of them was written.
fn told_written(session: &mut Session, ring: &mut Ring, pieces: &[(Memory, bool)]) -> Result<(), Objection> {
    ring.chain(0, pieces);
    ring.offer(0);
    ring.kick()?;
    let at = ring.packed().taken.index();
    let (id, _) = session.wait_used(ring)?;
    ensure_eq("used id", id, 0)?;
    let Tail { len, flags, .. } = ring.packed().slot(at).1;
    let mut written = false;
    for (memory, _) in pieces.iter().filter(|(_, writable)| *writable) {
        written |= memory.bytes()?.iter().any(|&byte| byte != POISON);
    }
    let expected = format_args!("WRITE {}", if written { "set: bytes were written" } else { "clear: none was" });
    ensure((flags & WRITE != 0) == written, expected, format_args!("flags {flags:#06x}, length {len}"))
}

fn written(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    for _ in 0..2 {
        let sample = Sample::new(session)?;
        told_written(session, ring(&mut rings, &sample), &sample.pieces)?;
        if session.cell.device_type == BLK {
            // A read that cannot be done: its status is written, and the data before that need not be.
            let header = blk_header(session, BLK_IN, u64::MAX / 1024);
            let mut pieces = sample.pieces.clone();
            pieces[0] = (Memory::readable(session, &header)?, false);
            pieces[1] = (Memory::writable(session, 512, POISON)?, true);
            pieces[2] = (Memory::writable(session, 1, POISON)?, true);
            told_written(session, ring(&mut rings, &sample), &pieces)?;
        }
    }
    Ok(Finding::Passed)
}

/// Kicks, and waits until the device has looked at the descriptor at `at` because of that.
fn kick_and_look(session: &mut Session, ring: &mut Ring, at: Position) -> Result<(), Objection> {
    // What was under way before is over when this is answered.
    session.transport.status()?;
    let mark = session.probe()?.mark();
    ring.kick()?;
    looked(session, mark, slot(ring, at.index()))
}

/// Where the descriptor in slot `index` is: address and length.
fn slot(ring: &Ring, index: u16) -> (u64, u64) {
    (ring.config.descriptors + 16 * u64::from(index), 16)
}

/// Fails if the device touched a buffer of `sample` since `mark`, or gave up.
fn left_alone(session: &mut Session, sample: &Sample, mark: Mark, what: &str) -> Result<(), Objection> {
    ensure(!session.needs_reset()?, format_args!("{what} is left alone"), "the device needs a reset")?;
    for access in session.probe()?.since(mark)? {
        let touched = sample.ranges().iter().any(|&(address, len, _)| touches(access, address, len));
        ensure(!touched, format_args!("{what} is left alone"), shown(access))?;
    }
    Ok(())
}

fn not_available(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let queue = rings.len() - 1;
    // In two rounds, so that what is right and what is wrong changes sides.
    for _ in 0..2 {
        for wrong in [0, AVAILABLE | USED, USED, AVAILABLE] {
            let sample = Sample::new(session)?;
            let mark = session.probe()?.mark();
            let packed = rings[queue].packed();
            let at = packed.available;
            if wrong == at.available_flags() {
                continue;
            }
            let unpublished = packed.place(0, &sample.entries());
            let right = packed.slot(at.index());
            packed.set_slot(at.index(), right.0, Tail { flags: wrong, ..unpublished[0].1 });
            kick_and_look(session, &mut rings[queue], at)?;
            left_alone(session, &sample, mark, "a descriptor that is not available")?;
            rings[queue].packed().publish(unpublished);
            rings[queue].kick()?;
            let (_, len) = session.wait_used(&mut rings[queue])?;
            sample.check(session, len)?;
        }
        let mut kept = Vec::new();
        while rings[queue].packed().available.wrap() {
            kept.push(serve_next(session, &mut rings)?);
        }
    }
    Ok(Finding::Passed)
}

fn hole(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    let (first, second) = (Sample::new(session)?, Sample::new(session)?);
    let mark = session.probe()?.mark();
    let ring = ring(&mut rings, &first);
    let pieces = first.pieces.len() as u16;
    ring.chain(0, &first.pieces);
    ring.chain(pieces, &second.pieces);
    let (at, size) = (ring.packed().available, ring.size());
    ring.packed().available = at.advanced(pieces, size);
    ring.offer(pieces);
    kick_and_look(session, ring, at)?;
    left_alone(session, &second, mark, "a buffer behind a hole")?;
    ensure(!ring.has_used(), "nothing used behind a hole", "something was")?;
    ring.packed().available = at;
    ring.offer(0);
    ring.kick()?;
    for (id, sample) in [(0, &first), (pieces, &second)] {
        let (used, len) = session.wait_used(ring)?;
        ensure_eq("used id", used, id.into())?;
        if session.cell.device_type != CONSOLE {
            sample.check(session, len)?;
        }
    }
    Ok(Finding::Passed)
}

fn half_available(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let sample = Sample::new(session)?;
    let pieces = cut(&sample, if session.cell.device_type == BLK { 512 } else { 5 });
    let mark = session.probe()?.mark();
    let ring = ring(&mut rings, &sample);
    let packed = ring.packed();
    let first = packed.available;
    let unpublished = packed.place(0, &entries(&pieces));
    let (second, right) = (first.index() + 1, packed.slot(first.index() + 1));
    let wrong = right.1.flags ^ (AVAILABLE | USED);
    packed.set_slot(second, right.0, Tail { flags: wrong, ..right.1 });
    packed.publish(unpublished);
    ring.kick()?;
    // Not before that is what the device meets what the case is about.
    looked(session, mark, slot(ring, second))?;
    ensure(!ring.has_used(), "a list is not used before all of it is available", "it was")?;
    let (address, len) = (pieces[1].0.address, pieces[1].0.len);
    for access in session.probe()?.since(mark)? {
        ensure(!touches(access, address, len.into()), "what is not available is left alone", shown(access))?;
    }
    // A device that waits goes on now; one that gave up does not.
    ring.packed().set_slot(second, right.0, right.1);
    ring.kick()?;
    match session.wait_used(ring) {
        Ok((_, len)) => sample.check(session, len)?,
        Err(_) if session.needs_reset()? => {
            revive(session, rings)?;
            return Ok(Finding::Rejected);
        }
        Err(objection) => return Err(objection),
    }
    Ok(Finding::Passed)
}

fn indirect_in_list(session: &mut Session) -> Verdict {
    need_indirect(session)?;
    attack(session, Features::INDIRECT_DESC, |session, rings, sample| {
        let pieces = cut(sample, if session.cell.device_type == BLK { 512 } else { 5 });
        let ring = ring(rings, sample);
        let table = Memory::readable(session, &ring.table(&entries(&pieces[1..])))?;
        let (memory, writable) = &pieces[0];
        ring.set_descriptor(0, link(memory, *writable, Some(1)));
        ring.set_descriptor(1, descriptor(table.address, table.len, INDIRECT, 0));
        ring.offer(0);
        Ok(Attack::new(session, sample, Tolerance::Lenient).and(&table, Access::READ))
    })
}

fn indirect_reserved(session: &mut Session) -> Verdict {
    need_indirect(session)?;
    for reserved in [NEXT, AVAILABLE, USED, AVAILABLE | USED | NEXT] {
        let mut rings = session.bring_up(Features::INDIRECT_DESC)?;
        let sample = Sample::new(session)?;
        let ring = ring(&mut rings, &sample);
        let mut bytes = ring.table(&sample.entries());
        for entry in bytes.chunks_exact_mut(16) {
            // The id, and in every entry, the last too, flags that have no meaning here.
            entry[12..14].fill(0xee);
            entry[14] |= reserved as u8;
            entry[15] |= (reserved >> 8) as u8;
        }
        let table = Memory::readable(session, &bytes)?;
        session.trace.note(format!("(each with id 0xeeee and flags {reserved:#06x} besides)"));
        ring.set_descriptor(0, descriptor(table.address, table.len, INDIRECT, 0));
        ring.offer(0);
        ring.kick()?;
        let (id, len) = session.wait_used(ring)?;
        ensure_eq("used id", id, 0)?;
        sample.check(session, len)?;
    }
    Ok(Finding::Passed)
}

fn on_and_off(session: &mut Session) -> Verdict {
    let mut rings = with_event_idx(session)?;
    let queue = rings.len() - 1;
    for _ in 0..3 {
        rings[queue].want_interrupts(true);
        serve_told(session, &mut rings)?;
        rings[queue].want_interrupts(false);
        silence(session, &mut rings)?;
    }
    Ok(Finding::Passed)
}

fn next_round(session: &mut Session) -> Verdict {
    let mut rings = with_event_idx(session)?;
    let queue = rings.len() - 1;
    for _ in 0..3 {
        let packed = rings[queue].packed();
        let index = packed.taken.index();
        packed.set_driver_events(Position::new(index, !packed.taken.wrap()).pack(), EVENTS_AT);
        silence(session, &mut rings)?;
        rings[queue].want_interrupt_after(0, 1);
        serve_told(session, &mut rings)?;
    }
    Ok(Finding::Passed)
}

fn event_in_a_list(session: &mut Session) -> Verdict {
    let mut rings = with_event_idx(session)?;
    let sample = Sample::new(session)?;
    let most = if session.cell.device_type == BLK { 512 } else { 5 };
    for at in 0..cut(&sample, most).len() {
        while session.interrupted()? {}
        let sample = Sample::new(session)?;
        let ring = ring(&mut rings, &sample);
        ring.chain(0, &cut(&sample, most));
        // Only the first of them is written when the list is used; drivers ask for the others, too.
        ring.packed().want_interrupt_behind(at as u32);
        ring.offer(0);
        ring.kick()?;
        let (_, len) = session.poll_used(ring)?;
        sample.check(session, len)?;
        session.wait_interrupt()?;
    }
    Ok(Finding::Passed)
}

fn odd_events(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for features in [Features::empty(), offered & Features::EVENT_IDX] {
        let mut rings = session.bring_up(features)?;
        let queue = rings.len() - 1;
        let size = rings[queue].size();
        for (at, flags) in [
            (size, EVENTS_AT),
            (0x7fff, EVENTS_AT),
            (0x8000 | size, EVENTS_AT),
            (0xffff, EVENTS_AT),
            (0, 3),
            (0xffff, 3),
            (0, 0xfffc),
            (0xffff, 0xffff),
        ] {
            rings[queue].packed().set_driver_events(at, flags);
            serve_silently(session, &mut rings)?;
        }
        while session.interrupted()? {}
        rings[queue].packed().set_driver_events(0, EVENTS_ON);
        serve_next(session, &mut rings)?;
    }
    Ok(Finding::Passed)
}

fn device_events(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    let pieces = small(session)?;
    for features in [Features::empty(), offered & Features::EVENT_IDX] {
        let mut rings = session.bring_up(features)?;
        let queue = rings.len() - 1;
        let size = rings[queue].size();
        for _ in 0..2 * size {
            // Asked for before, while and after the device looks.
            for step in 0..3 {
                let events = rings[queue].packed().device_events();
                let right = is_event_structure(events, size, !features.is_empty());
                ensure(
                    right,
                    "a place in the ring and flags of 0 to 2 (2 with EVENT_IDX)",
                    format_args!("{events:x?}"),
                )?;
                if step == 0 {
                    serve_many(session, &mut rings, 1, &pieces)?;
                }
            }
        }
    }
    Ok(Finding::Passed)
}
