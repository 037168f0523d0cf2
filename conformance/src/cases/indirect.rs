//! Indirect descriptors, good and malformed.

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::queue::split::layout::Descriptor;
use polyvirt_core::transport::{BlockingTransport, Transport};

use super::chains::{NOWHERE, PACKED_REFUSED, REFUSED, memory_end, ring};
use super::ring::cut;
use super::sample::{Attack, Sample, Tolerance, attack, descriptor, ensure_eq, entries};
use crate::raw::{INDIRECT, Memory, NEXT, Ring, WRITE, link};
use crate::suite::{BLK, Case, Finding, Objection, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new("ring/indirect", "a chain in an indirect table is served", indirect)
        .judges(&["N0053"])
        .packed_judges(&[]),
    Case::new("ring/indirect-behind-direct", "direct descriptors, then an indirect one, make one chain", mixed)
        .judges(&["N0053"])
        .only(RingFormat::Split),
    Case::new("ring/indirect-write-flag", "the WRITE flag beside INDIRECT means nothing", indirect_write)
        .judges(&["N0052"])
        .packed_judges(&[]),
    Case::new("ring/indirect-out-of-order", "an indirect table in any order", indirect_scattered)
        .judges(&["N0037"])
        .only(RingFormat::Split),
    Case::new("chains/indirect-loop", "an indirect table that loops", indirect_loop)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[1])
        .only(RingFormat::Split),
    Case::new("chains/indirect-next-beyond-table", "a link beyond the end of an indirect table", indirect_beyond)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[2])
        .only(RingFormat::Split),
    Case::new("chains/indirect-nested", "an indirect descriptor in an indirect table", indirect_nested)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[4]),
    Case::new("chains/indirect-with-next", "a descriptor with both INDIRECT and NEXT", indirect_next)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[5]),
    Case::new("chains/indirect-empty", "an indirect table of length 0", indirect_empty)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[6]),
    Case::new("chains/indirect-odd-length", "an indirect table that is no multiple of 16 long", indirect_odd)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[6]),
    Case::new("chains/indirect-huge", "an indirect table of 4 GiB", indirect_huge)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[6]),
    Case::new("chains/indirect-nowhere", "an indirect table where no memory is", indirect_nowhere)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[7]),
    Case::new("chains/indirect-at-the-edge", "an indirect table across the end of memory", indirect_edge)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[7, 12]),
    Case::new("chains/indirect-not-negotiated", "an indirect descriptor without the feature", indirect_unasked)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[8]),
];

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

pub(super) fn need_indirect(session: &mut Session) -> Result<(), Objection> {
    match session.transport.device_features()?.contains(Features::INDIRECT_DESC) {
        true => Ok(()),
        false => Err(Objection::Skipped("the device does not offer indirect descriptors".into())),
    }
}

/// An attack by an indirect descriptor; `make` writes the table and says its length, if it is not the honest one.
fn with_table(
    session: &mut Session,
    tolerance: Tolerance,
    make: impl FnOnce(&Ring, &Sample) -> (Vec<u8>, Option<u32>),
) -> Verdict {
    need_indirect(session)?;
    attack(session, Features::INDIRECT_DESC, |session, rings, sample| {
        let ring = ring(rings, sample);
        let (bytes, len) = make(ring, sample);
        let table = Memory::readable(session, &bytes)?;
        ring.set_descriptor(0, descriptor(table.address, len.unwrap_or(table.len), INDIRECT, 0));
        ring.offer(0);
        Ok(Attack::new(session, sample, tolerance).and(&table, Access::READ))
    })
}

fn indirect_loop(session: &mut Session) -> Verdict {
    with_table(session, Tolerance::None, |ring, sample| {
        let mut table = sample.entries();
        let last = table.len() - 1;
        table[last].flags |= NEXT;
        table[last].next = last as u16;
        (ring.table(&table), None)
    })
}

fn indirect_beyond(session: &mut Session) -> Verdict {
    with_table(session, Tolerance::None, |ring, sample| {
        let mut table = sample.entries();
        let last = table.len() - 1;
        table[last].flags |= NEXT;
        table[last].next = last as u16 + 1;
        (ring.table(&table), None)
    })
}

fn indirect_nested(session: &mut Session) -> Verdict {
    need_indirect(session)?;
    attack(session, Features::INDIRECT_DESC, |session, rings, sample| {
        let ring = ring(rings, sample);
        let inner = Memory::readable(session, &ring.table(&sample.entries()))?;
        let outer = Memory::readable(session, &ring.table(&[descriptor(inner.address, inner.len, INDIRECT, 0)]))?;
        ring.set_descriptor(0, descriptor(outer.address, outer.len, INDIRECT, 0));
        ring.offer(0);
        let attack = Attack::new(session, sample, Tolerance::Lenient);
        Ok(attack.and(&inner, Access::READ).and(&outer, Access::READ))
    })
}

fn indirect_next(session: &mut Session) -> Verdict {
    need_indirect(session)?;
    attack(session, Features::INDIRECT_DESC, |session, rings, sample| {
        let ring = ring(rings, sample);
        let table = Memory::readable(session, &ring.table(&sample.entries()))?;
        ring.set_descriptor(0, descriptor(table.address, table.len, INDIRECT | NEXT, 1));
        let (memory, writable) = &sample.pieces[sample.pieces.len() - 1];
        ring.set_descriptor(1, link(memory, *writable, None));
        ring.offer(0);
        Ok(Attack::new(session, sample, Tolerance::Lenient).and(&table, Access::READ))
    })
}

fn indirect_empty(session: &mut Session) -> Verdict {
    with_table(session, Tolerance::None, |ring, sample| (ring.table(&sample.entries()), Some(0)))
}

fn indirect_odd(session: &mut Session) -> Verdict {
    with_table(session, Tolerance::Lenient, |ring, sample| {
        let mut bytes = ring.table(&sample.entries());
        bytes.extend([0; 15]);
        (bytes, None)
    })
}

fn indirect_huge(session: &mut Session) -> Verdict {
    with_table(session, Tolerance::Lenient, |ring, sample| (ring.table(&sample.entries()), Some(!15)))
}

fn indirect_at(session: &mut Session, address: u64, len: u32) -> Verdict {
    need_indirect(session)?;
    attack(session, Features::INDIRECT_DESC, |session, rings, sample| {
        let ring = ring(rings, sample);
        ring.set_descriptor(0, descriptor(address, len, INDIRECT, 0));
        ring.offer(0);
        Ok(Attack::new(session, sample, Tolerance::None))
    })
}

fn indirect_nowhere(session: &mut Session) -> Verdict {
    for (address, len) in [(NOWHERE, 32), (u64::MAX - 15, 32), (u64::MAX - 15, 16)] {
        indirect_at(session, address, len)?;
        session.transport.reset()?;
    }
    Ok(Finding::Rejected)
}

fn indirect_edge(session: &mut Session) -> Verdict {
    need_indirect(session)?;
    attack(session, Features::INDIRECT_DESC, |session, rings, sample| {
        let (end, kept) = memory_end(session)?;
        let ring = ring(rings, sample);
        ring.set_descriptor(0, descriptor(end - 16, 32, INDIRECT, 0));
        ring.offer(0);
        Ok(Attack::new(session, sample, Tolerance::None).keeping(kept))
    })
}

fn indirect_unasked(session: &mut Session) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let ring = ring(rings, sample);
        let table = Memory::readable(session, &ring.table(&sample.entries()))?;
        ring.set_descriptor(0, descriptor(table.address, table.len, INDIRECT, 0));
        ring.offer(0);
        Ok(Attack::new(session, sample, Tolerance::Lenient).and(&table, Access::READ))
    })
}
