//! Malformed descriptor chains.

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::transport::BlockingTransport;

use super::indirect::need_indirect;
use super::sample::{Attack, POISON, Sample, Tolerance, attack, blk_header, descriptor, ensure_eq, entries};
use super::sample::{BLK_IN, BLK_OUT};
use crate::raw::{INDIRECT, Memory, NEXT, Ring, WRITE, link};
use crate::suite::{Applies, BLK, CONSOLE, Case, Finding, Objection, RNG, RingFormat, Session, Verdict};

/// What every attack judges: the device says that it cannot go on, where it cannot; it writes neither to what it may only
/// read, nor to descriptors.
pub(super) const REFUSED: &[&str] = &["N0006", "N0041", "N0044"];
/// The same with a packed ring, whose descriptors the device writes too.
pub(super) const PACKED_REFUSED: &[&str] = &["N0006", "N0089"];

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new("chains/loop", "a chain whose last descriptor links back to its first", looped)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[1]),
    Case::new("chains/self-loop", "a descriptor that links to itself", self_looped)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[1]),
    Case::new("chains/next-beyond-table", "a link to a descriptor that the table does not have", next_beyond)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[2])
        .only(RingFormat::Split),
    Case::new("chains/queue-size", "a chain of as many descriptors as the queue has is served", queue_size)
        .judges(&["N0037", "N0038"])
        .class(&[3])
        .packed_judges(&["N0037", "N0103"]),
    Case::new("chains/above-queue-size", "an indirect chain with one descriptor more than the queue", above_queue_size)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[3]),
    Case::new("chains/address-wraps", "a buffer whose end wraps around 2^64", wraps)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[9]),
    Case::new("chains/length-zero", "a descriptor of length 0 beside good ones", zero)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[10]),
    Case::new("chains/only-length-zero", "a chain of nothing but a descriptor of length 0", only_zero)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[10, 14]),
    Case::new("chains/above-4-gib", "buffers that add up to more than 2^32 bytes", above_4_gib)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[11]),
    Case::new("chains/nowhere", "a buffer where no memory is", nowhere)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[12]),
    Case::new("chains/edge-of-memory", "a buffer that reaches one byte beyond the end of memory", edge)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[12]),
    Case::new("chains/last-byte-of-memory", "a buffer that ends where memory ends is served", last_byte)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[12]),
    Case::new("chains/aimed-at-descriptors", "a buffer that is the ring's own descriptor table", at_descriptors)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[13]),
    Case::new("chains/aimed-at-used-ring", "a buffer that is the ring's own used ring", at_used)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[13]),
    Case::new("chains/wrong-direction", "buffers of the wrong direction", wrong_direction)
        .judges(&["N0041"])
        .class(&[15])
        .packed_judges(&["N0089"]),
    Case::new("chains/writable-first", "a device-readable buffer behind a device-writable one", writable_first)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[15]),
    Case::new("chains/memory-refused", "memory that is taken away before the device gets to it", refused)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[12]),
    Case::new("chains/blk-header-only", "a block request with nothing but its header", blk_header_only)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[14])
        .on(Applies::to(BLK)),
    Case::new("chains/blk-short-header", "a block request with a header of 15 bytes", blk_short_header)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[14])
        .on(Applies::to(BLK)),
    Case::new("chains/blk-no-status", "a block write with no byte for its status", blk_no_status)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[14])
        .on(Applies::to(BLK)),
    Case::new("chains/blk-odd-length", "a block read of 511 bytes", blk_odd_length)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[16])
        .on(Applies::to(BLK)),
];

pub(super) fn ring<'a>(rings: &'a mut [Ring], sample: &Sample) -> &'a mut Ring {
    &mut rings[usize::from(sample.queue)]
}

/// The direction of a sample's last piece.
fn direction(sample: &Sample) -> u16 {
    if sample.pieces.last().is_some_and(|(_, writable)| *writable) { WRITE } else { 0 }
}

/// An attack by the sample itself with its last descriptor changed.
fn with_last(
    session: &mut Session,
    tolerance: Tolerance,
    change: impl FnOnce(&Session, &mut Ring, &Sample, u16),
) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let ring = ring(rings, sample);
        ring.chain(0, &sample.pieces);
        change(session, ring, sample, sample.pieces.len() as u16 - 1);
        ring.offer(0);
        Ok(Attack::new(session, sample, tolerance))
    })
}

/// An attack by `pieces` in place of the sample's.
fn with_pieces(
    session: &mut Session,
    tolerance: Tolerance,
    make: impl FnOnce(&Session, &Sample) -> Result<Vec<(Memory, bool)>, Objection>,
) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let changed = Sample { queue: sample.queue, pieces: make(session, sample)? };
        let ring = ring(rings, sample);
        ring.chain(0, &changed.pieces);
        ring.offer(0);
        let status = changed.pieces.last().filter(|(memory, writable)| *writable && memory.len == 1);
        let status = status.map(|(memory, _)| memory.clone());
        Ok(Attack { status, ..Attack::new(session, &changed, tolerance) })
    })
}

fn looped(session: &mut Session) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let ring = ring(rings, sample);
        let (memory, writable) = &sample.pieces[sample.pieces.len() - 1];
        for (slot, next) in [(0, 1), (1, 2), (2, 0)] {
            ring.set_descriptor(slot, link(memory, *writable, Some(next)));
        }
        ring.offer(0);
        Ok(Attack { status: None, ..Attack::new(session, sample, Tolerance::None) })
    })
}

fn self_looped(session: &mut Session) -> Verdict {
    with_last(session, Tolerance::None, |_, ring, sample, last| {
        let (memory, writable) = &sample.pieces[usize::from(last)];
        ring.set_descriptor(last, link(memory, *writable, Some(last)));
    })
}

fn next_beyond(session: &mut Session) -> Verdict {
    for beyond in [0, 1, u16::MAX] {
        with_last(session, Tolerance::None, |_, ring, sample, last| {
            let (memory, writable) = &sample.pieces[usize::from(last)];
            let next = if beyond == u16::MAX { beyond } else { ring.size() + beyond };
            ring.set_descriptor(last, link(memory, *writable, Some(next)));
        })?;
        session.transport.reset()?;
    }
    Ok(Finding::Rejected)
}

/// A good request in `count` descriptors.
fn long_pieces(session: &Session, count: usize) -> Result<Vec<(Memory, bool)>, Objection> {
    let byte = |writable| -> Result<Memory, Objection> {
        if writable { Memory::writable(session, 1, POISON) } else { Memory::readable(session, b"x") }
    };
    Ok(match session.cell.device_type {
        BLK => {
            // Headers in pieces of a byte, data of one sector in pieces of a byte or, at the end, of the rest.
            let header = Memory::readable(session, &blk_header(session, BLK_IN, 0))?;
            let data = Memory::writable(session, 512, POISON)?;
            let data_pieces = (count - 2).min(512) as u32;
            let mut pieces = vec![(header, false)];
            pieces.extend((0..data_pieces - 1).map(|at| (data.part(at, 1), true)));
            pieces.push((data.part(data_pieces - 1, 512 - (data_pieces - 1)), true));
            pieces.push((byte(true)?, true));
            pieces
        }
        CONSOLE => {
            let text = Memory::readable(session, &vec![b'x'; count])?;
            (0..count as u32).map(|at| (text.part(at, 1), false)).collect()
        }
        _ => {
            let buffer = Memory::writable(session, count as u32, POISON)?;
            (0..count as u32).map(|at| (buffer.part(at, 1), true)).collect()
        }
    })
}

fn queue_size(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let queue = Sample::new(session)?.queue;
    let count = usize::from(rings[usize::from(queue)].size()).min(514);
    let pieces = long_pieces(session, count)?;
    let ring = &mut rings[usize::from(queue)];
    ring.chain(0, &pieces);
    ring.offer(0);
    ring.kick()?;
    let (id, len) = session.wait_used(ring)?;
    ensure_eq("used id", id, 0)?;
    match session.cell.device_type {
        BLK => ensure_eq("used length", len, 513)?,
        CONSOLE => ensure_eq("printed bytes", session.far_side.output()?.len(), count)?,
        RNG => super::sample::ensure((1..=count as u32).contains(&len), format_args!("1 to {count} bytes"), len)?,
        _ => {}
    }
    Ok(Finding::Passed)
}

fn above_queue_size(session: &mut Session) -> Verdict {
    need_indirect(session)?;
    attack(session, Features::INDIRECT_DESC, |session, rings, sample| {
        let ring = ring(rings, sample);
        let count = usize::from(ring.size()) + 1;
        let pieces = long_pieces(session, count.min(514))?;
        let mut table = entries(&pieces);
        // Padded, if a request of so many pieces is not to be had otherwise.
        let status = table.pop();
        let filler = descriptor(pieces[1 % pieces.len()].0.address, 0, direction(sample) | NEXT, 0);
        table.resize(count - 1, filler);
        table.extend(status);
        for (number, entry) in table.iter_mut().enumerate().take(count - 1) {
            entry.flags |= NEXT;
            entry.next = number as u16 + 1;
        }
        let table = Memory::readable(session, &ring.table(&table))?;
        ring.set_descriptor(0, descriptor(table.address, table.len, INDIRECT, 0));
        ring.offer(0);
        let changed = Sample { queue: sample.queue, pieces };
        Ok(Attack::new(session, &changed, Tolerance::Lenient).and(&table, Access::READ))
    })
}

/// An address where no guest memory is, on any hypervisor.
pub(super) const NOWHERE: u64 = 0x7fff_ffff_ffff_0000;

/// Where the memory that the device may see ends, and what keeps it so: flat memory ends for all, a grant for itself.
pub(super) fn memory_end(session: &Session) -> Result<(u64, Vec<Memory>), Objection> {
    if let Some(end) = session.memory_end {
        return Ok((end, Vec::new()));
    }
    // A kernel gives out grant references in no order; two that follow each other come sooner or later. The second is
    // taken back then: behind the first there is nothing, whatever else is granted.
    let mut kept: Vec<Memory> = Vec::new();
    for _ in 0..1024 {
        let page = Memory::new(session, 4096, Access::READ | Access::WRITE)?;
        let neighbour = kept.iter().position(|other| other.address.abs_diff(page.address) == 4096);
        kept.push(page);
        if let Some(neighbour) = neighbour {
            let last = kept.len() - 1;
            let second = if kept[neighbour].address > kept[last].address { neighbour } else { last };
            let end = kept.swap_remove(second).address;
            return Ok((end, kept));
        }
    }
    Err(Objection::Skipped("no memory with nothing behind it was found".into()))
}

/// The sample with the address and length of the piece that carries its data replaced.
fn aimed(session: &mut Session, address: u64, len: u32, tolerance: Tolerance) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let ring = ring(rings, sample);
        ring.chain(0, &sample.pieces);
        let slot = data_piece(sample);
        let mut changed = sample.entries()[usize::from(slot)];
        (changed.address, changed.len) = (address, len);
        ring.set_descriptor(slot, changed);
        ring.offer(0);
        Ok(Attack::new(session, sample, tolerance))
    })
}

fn data_piece(sample: &Sample) -> u16 {
    if sample.pieces.len() > 1 { 1 } else { 0 }
}

fn wraps(session: &mut Session) -> Verdict {
    for (address, len) in [(u64::MAX - 511, 1024), (u64::MAX, 512), (u64::MAX - 511, 512)] {
        aimed(session, address, len, Tolerance::None)?;
        session.transport.reset()?;
    }
    Ok(Finding::Rejected)
}

fn nowhere(session: &mut Session) -> Verdict {
    for (address, len) in [(NOWHERE, 512), (NOWHERE, !511), (1 << 63, 512)] {
        aimed(session, address, len, Tolerance::None)?;
        session.transport.reset()?;
    }
    Ok(Finding::Rejected)
}

fn edge(session: &mut Session) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let (end, kept) = memory_end(session)?;
        let ring = ring(rings, sample);
        ring.chain(0, &sample.pieces);
        let slot = data_piece(sample);
        let mut changed = sample.entries()[usize::from(slot)];
        (changed.address, changed.len) = (end - 511, 512);
        ring.set_descriptor(slot, changed);
        ring.offer(0);
        Ok(Attack::new(session, sample, Tolerance::None).keeping(kept))
    })
}

fn last_byte(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let sample = Sample::new(session)?;
    let (end, _kept) = memory_end(session)?;
    let ring = ring(&mut rings, &sample);
    ring.chain(0, &sample.pieces);
    let slot = data_piece(&sample);
    let mut changed = sample.entries()[usize::from(slot)];
    changed.address = end - u64::from(changed.len);
    ring.set_descriptor(slot, changed);
    ring.offer(0);
    ring.kick()?;
    let (id, len) = session.wait_used(ring)?;
    ensure_eq("used id", id, 0)?;
    match session.cell.device_type {
        BLK => ensure_eq("used length", len, 513)?,
        CONSOLE => ensure_eq("printed bytes", session.far_side.output()?.len(), 8)?,
        _ => super::sample::ensure(len > 0, "bytes written", len)?,
    }
    Ok(Finding::Passed)
}

fn zero(session: &mut Session) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let ring = ring(rings, sample);
        // In front of the last piece, in its direction.
        let (last, before) = (sample.pieces.len() as u16 - 1, sample.pieces.len() as u16);
        ring.chain(0, &sample.pieces);
        let end = sample.entries()[usize::from(last)];
        ring.set_descriptor(last, descriptor(end.address, 0, end.flags | NEXT, before));
        ring.set_descriptor(before, end);
        ring.offer(0);
        Ok(Attack::new(session, sample, Tolerance::Lenient))
    })
}

fn only_zero(session: &mut Session) -> Verdict {
    for flags in [0, WRITE] {
        attack(session, Features::empty(), |session, rings, sample| {
            let ring = ring(rings, sample);
            ring.set_descriptor(0, descriptor(sample.pieces[0].0.address, 0, flags, 0));
            ring.offer(0);
            Ok(Attack::new(session, sample, Tolerance::None))
        })?;
        session.transport.reset()?;
    }
    Ok(Finding::Rejected)
}

fn above_4_gib(session: &mut Session) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let ring = ring(rings, sample);
        let flags = direction(sample);
        let address = sample.pieces[usize::from(data_piece(sample))].0.address;
        for slot in 0..4 {
            let next = if slot < 3 { NEXT } else { 0 };
            ring.set_descriptor(slot, descriptor(address, 0x8000_0000, flags | next, slot + 1));
        }
        ring.offer(0);
        Ok(Attack { status: None, ..Attack::new(session, sample, Tolerance::None) })
    })
}

/// The device is free to write where the driver lets it, ring or not; it has to survive what it did to itself.
fn at_area(session: &mut Session, area: usize) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let ring = ring(rings, sample);
        ring.chain(0, &sample.pieces);
        let slot = data_piece(sample);
        let mut changed = sample.entries()[usize::from(slot)];
        let (start, all, _) = ring.areas()[area];
        // Of a packed ring only what is not in use: both sides would find nonsense in the rest.
        let in_use = if ring.is_packed() && area == 0 { all / 2 } else { 0 };
        let (address, len) = (start + in_use, all - in_use);
        // Whole sectors, where there are so many.
        let len = (len as u32).min(changed.len);
        (changed.address, changed.len) = (address, len);
        ring.set_descriptor(slot, changed);
        ring.offer(0);
        let mut attack = Attack::new(session, sample, Tolerance::Lenient);
        attack.ranges.push((address, len.into(), Access::READ | Access::WRITE));
        Ok(attack)
    })
}

fn at_descriptors(session: &mut Session) -> Verdict {
    at_area(session, 0)
}

fn at_used(session: &mut Session) -> Verdict {
    at_area(session, 2)
}

fn wrong_direction(session: &mut Session) -> Verdict {
    with_pieces(session, Tolerance::None, |session, sample| {
        let turn = |(memory, writable): &(Memory, bool)| -> Result<(Memory, bool), Objection> {
            let bytes = memory.bytes()?;
            let turned = match writable {
                true => Memory::readable(session, &bytes)?,
                false => Memory::writable(session, memory.len, POISON)?,
            };
            Ok((turned, !writable))
        };
        sample.pieces.iter().map(turn).collect()
    })
}

fn writable_first(session: &mut Session) -> Verdict {
    with_pieces(session, Tolerance::Lenient, |session, sample| {
        let mut pieces = sample.pieces.clone();
        match session.cell.device_type {
            BLK => pieces.reverse(),
            CONSOLE => pieces.insert(0, (Memory::writable(session, 8, POISON)?, true)),
            _ => pieces.push((Memory::readable(session, b"behind")?, false)),
        }
        Ok(pieces)
    })
}

fn refused(session: &mut Session) -> Verdict {
    let probe = session.probe()?;
    let finding = attack(session, Features::empty(), |session, rings, sample| {
        let ring = ring(rings, sample);
        ring.chain(0, &sample.pieces);
        let (memory, writable) = &sample.pieces[usize::from(data_piece(sample))];
        let access = if *writable { Access::WRITE } else { Access::READ };
        session.probe()?.refuse(memory.address, memory.len.into(), access);
        session.trace.note("(the hypervisor takes back the data buffer)");
        ring.offer(0);
        Ok(Attack::new(session, sample, Tolerance::None))
    });
    probe.relent();
    finding
}

fn blk_header_only(session: &mut Session) -> Verdict {
    with_pieces(session, Tolerance::None, |_, sample| Ok(sample.pieces[..1].to_vec()))
}

fn blk_short_header(session: &mut Session) -> Verdict {
    with_pieces(session, Tolerance::None, |_, sample| {
        let mut pieces = sample.pieces.clone();
        pieces[0].0 = pieces[0].0.part(0, 15);
        Ok(pieces)
    })
}

fn blk_no_status(session: &mut Session) -> Verdict {
    with_pieces(session, Tolerance::None, |session, _| {
        let header = Memory::readable(session, &blk_header(session, BLK_OUT, 0))?;
        Ok(vec![(header, false), (Memory::readable(session, &[POISON; 512])?, false)])
    })
}

fn blk_odd_length(session: &mut Session) -> Verdict {
    with_pieces(session, Tolerance::None, |_, sample| {
        let mut pieces = sample.pieces.clone();
        pieces[1].0 = pieces[1].0.part(0, 511);
        Ok(pieces)
    })
}
