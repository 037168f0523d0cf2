//! The block device: what its configuration says of requests holds.

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::transport::{Transport, read_config};

use super::blk::{DISCARD, F_DISCARD, F_WRITE_ZEROES, UNSUPP, WRITE_ZEROES, bad, case, good, need, pattern, sectors};
use super::blk::{done, request, start};
use super::blk_commands::segment;
use super::sample::{
    Attack, BLK_IN, BLK_OK, BLK_OUT, POISON, Sample, Tolerance, attack_on, blk_header, descriptor, ensure, ensure_eq,
    entries,
};
use crate::raw::{INDIRECT, Memory};
use crate::suite::{Applies, BLK, Case, Finding, Objection, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("blk/seg-max", "a request of as many segments as the device says is served", seg_max),
    // Legacy drivers have to take queues as they are.
    case("blk/seg-max-small-queue", "so many segments, in a table, in a queue that has fewer entries", small_queue)
        .on(Applies { legacy: Some(false), ..Applies::to(BLK) }),
    case("blk/discard-limits", "a discard of as many segments and sectors as the device says is done", discard_limits),
    case("blk/write-zeroes-limits", "so are zeroes", zeroes_limits),
    case("blk/barrier-bit", "bit 31 of a type, 2008's barrier, is no part of it, or makes it unsupported", barrier),
];

/// VIRTIO_BLK_F_SEG_MAX.
const F_SEG_MAX: Features = Features::bit(2);
/// Where the limits are in the configuration.
const SEG_MAX: u32 = 12;
const DISCARD_LIMITS: u32 = 36;
const DISCARD_ALIGNMENT: u32 = 44;
const ZEROES_LIMITS: u32 = 48;

fn number(session: &mut Session, offset: u32) -> Result<u32, Objection> {
    let mut bytes = [0; 4];
    read_config(&mut session.transport, offset, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// As many segments as the device says that a request may have, as far as its disk is large enough.
fn most_segments(session: &mut Session) -> Result<u32, Objection> {
    need(session, F_SEG_MAX, "VIRTIO_BLK_F_SEG_MAX")?;
    let said = number(session, SEG_MAX)?;
    ensure(said > 0, "at least one segment", said)?;
    Ok(said.min(sectors(session)?.min(2048) as u32))
}

/// A request of `count` segments of a sector each: the pieces, and all their data in one.
fn long(session: &Session, kind: u32, count: u32, data: &[u8]) -> Result<(Vec<(Memory, bool)>, Memory), Objection> {
    let all = match kind {
        BLK_OUT => Memory::readable(session, data)?,
        _ => Memory::writable(session, 512 * count, POISON)?,
    };
    let mut pieces = vec![(Memory::readable(session, &blk_header(session, kind, 0))?, false)];
    pieces.extend((0..count).map(|at| (all.part(512 * at, 512), kind == BLK_IN)));
    pieces.push((Memory::writable(session, 1, POISON)?, true));
    Ok((pieces, all))
}

fn seg_max(session: &mut Session) -> Verdict {
    let indirect = session.transport.device_features()?.contains(Features::INDIRECT_DESC);
    let mut rings = session.bring_up(F_SEG_MAX | Features::INDIRECT_DESC)?;
    let ring = &mut rings[0];
    let count = most_segments(session)?;
    let bytes = pattern(4, 512 * count as usize);
    let fits = count + 2 <= ring.size().into();
    if !fits && !indirect {
        return Err(Objection::Skipped("a queue has fewer entries than that, and there are no indirect ones".into()));
    }
    let ways = [false, true].into_iter().filter(|&table| if table { indirect } else { fits });
    for table in ways {
        for kind in [BLK_OUT, BLK_IN] {
            session
                .trace
                .note(format!("a request of {count} segments, {}", if table { "in a table" } else { "direct" }));
            let (pieces, all) = long(session, kind, count, &bytes)?;
            let mut kept = None;
            if table {
                let table = kept.insert(Memory::readable(session, &ring.table(&entries(&pieces)))?);
                ring.set_descriptor(0, descriptor(table.address, table.len, INDIRECT, 0));
            } else {
                ring.chain(0, &pieces);
            }
            ring.offer(0);
            ring.kick()?;
            let (_, len) = session.wait_used(ring)?;
            ensure_eq("status", done(&pieces, len)?.status, BLK_OK)?;
            ensure(kind == BLK_OUT || all.bytes()? == bytes, "what was written", "other bytes")?;
        }
    }
    Ok(Finding::Passed)
}

/// 2.7.5.3.1: a driver must not make such a chain. Linux does, and what most devices do is serve it.
fn small_queue(session: &mut Session) -> Verdict {
    super::indirect::need_indirect(session)?;
    session.negotiate(F_SEG_MAX | Features::INDIRECT_DESC)?;
    let count = most_segments(session)?;
    if count < 4 {
        return Err(Objection::Skipped("the device says too few segments to have a queue of fewer entries".into()));
    }
    let rings = vec![session.ring_of(0, Some(4))?];
    session.go()?;
    attack_on(session, rings, |session, rings, sample| {
        let (pieces, _) = long(session, BLK_IN, count, &[])?;
        let table = Memory::readable(session, &rings[0].table(&entries(&pieces)))?;
        rings[0].set_descriptor(0, descriptor(table.address, table.len, INDIRECT, 0));
        rings[0].offer(0);
        let changed = Sample { queue: sample.queue, pieces };
        Ok(Attack::new(session, &changed, Tolerance::Lenient).and(&table, Access::READ))
    })
}

/// What the limits at `at` in the configuration say is done by requests of `kind`.
fn limits(session: &mut Session, kind: u32, at: u32) -> Verdict {
    let mut ring = start(session)?;
    let (longest, most, disk) = (number(session, at)?, number(session, at + 4)?, sectors(session)?);
    ensure(longest > 0 && most > 0, "at least a sector and a segment", format_args!("{longest} and {most}"))?;
    // One as long as may be, and as many as may be: a table of many is a few pages.
    good(session, &mut ring, kind, 0, &segment(0, longest.min(disk.min(u32::MAX.into()) as u32), 0), 0)?;
    let most = most.min(1024);
    let segments: Vec<_> = (0..most).flat_map(|number| segment(u64::from(number) % disk, 1, 0)).collect();
    good(session, &mut ring, kind, 0, &segments, 0)?;
    Ok(Finding::Passed)
}

fn discard_limits(session: &mut Session) -> Verdict {
    need(session, F_DISCARD, "VIRTIO_BLK_F_DISCARD")?;
    session.bring_up(F_DISCARD)?;
    // Linux divides by it.
    let alignment = number(session, DISCARD_ALIGNMENT)?;
    ensure(alignment > 0, "an alignment of at least a sector", alignment)?;
    limits(session, DISCARD, DISCARD_LIMITS)
}

fn zeroes_limits(session: &mut Session) -> Verdict {
    need(session, F_WRITE_ZEROES, "VIRTIO_BLK_F_WRITE_ZEROES")?;
    limits(session, WRITE_ZEROES, ZEROES_LIMITS)
}

fn barrier(session: &mut Session) -> Verdict {
    const BARRIER: u32 = 1 << 31;
    let mut ring = start(session)?;
    let bytes = pattern(6, 512);
    good(session, &mut ring, BLK_OUT, 2, &bytes, 0)?;
    let read = request(session, &mut ring, BLK_IN | BARRIER, 2, &[], 512)?;
    if read.status == UNSUPP {
        bad(session, &mut ring, (BLK_OUT | BARRIER, 2), (&[0xee; 512], 0), UNSUPP)?;
    } else {
        ensure_eq("status", read.status, BLK_OK)?;
        ensure(read.data == bytes, "what was written", "other bytes")?;
        good(session, &mut ring, BLK_OUT | BARRIER, 2, &[0xee; 512], 0)?;
    }
    let expected = if read.status == UNSUPP { bytes } else { vec![0xee; 512] };
    let read = good(session, &mut ring, BLK_IN, 2, &[], 512)?;
    ensure(read.data == expected, "what a status says", "other bytes")?;
    Ok(Finding::Passed)
}
