//! The driver's role where buffers are used in order (VIRTIO_F_IN_ORDER). The case plays the device.

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::queue::QueueError;

use super::driver::{Stage, refuses, stage, stage_of};
use super::in_order::{case, need};
use super::indirect::need_indirect;
use super::sample::{ensure, ensure_eq};
use crate::raw::{INDIRECT, Made, Memory, NEXT};
use crate::suite::{Case, Finding, Objection, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case(
        "in-order/driver-ring-order",
        "(driver) descriptors are taken round the table, each linked to the next",
        ring_order,
    )
    .judges(&["N0046"])
    .only(RingFormat::Split),
    case("in-order/driver-tables", "(driver) the descriptors of a table are linked one to the next", tables)
        .judges(&["N0051"])
        .only(RingFormat::Split),
    case("in-order/driver-batch", "(driver) of a batch only the last buffer is told, the others are used too", batch),
    case("in-order/driver-not-counted", "(driver) a batch larger than the used index says", not_counted)
        .class(&[101])
        .only(RingFormat::Split),
    case(
        "in-order/driver-not-in-flight",
        "(driver) a batch that ends with a buffer that is not in flight",
        not_in_flight,
    )
    .class(&[101]),
    case("in-order/driver-length-beyond", "(driver) more bytes than the last buffer of a batch has", length_beyond)
        .class(&[102]),
];

fn ring_order(session: &mut Session) -> Verdict {
    need(session)?;
    let mut stage = stage_of(session, Features::IN_ORDER, Some(8))?;
    let mut at = 0;
    let mut in_flight = Vec::new();
    for token in 0..40 {
        // Up to two chains of up to three descriptors: there is room.
        let Made { id, chain } = stage.add(token % 3, 1, token)?;
        ensure_eq("head", id, at)?;
        for descriptor in &chain {
            at = (at + 1) % 8;
            if descriptor.flags & NEXT != 0 {
                ensure_eq("next", descriptor.next, at)?;
            }
        }
        in_flight.push((id, token));
        if in_flight.len() == 2 {
            in_flight.drain(..).try_for_each(|(id, token)| stage.give_back(id, token))?;
        }
    }
    Ok(Finding::Passed)
}

fn tables(session: &mut Session) -> Verdict {
    need(session)?;
    need_indirect(session)?;
    let mut stage = stage(session, Features::IN_ORDER | Features::INDIRECT_DESC)?;
    let len = u32::from(stage.ring.size()) * 16 * 4;
    let tables = Memory::new(session, len, Access::READ)?;
    stage.driver = stage.driver.allow_indirect(tables.pages.clone(), tables.address);
    for token in 0..3 {
        let Made { id, chain } = stage.add(2, 2, token)?;
        let [named] = chain[..] else {
            return Err(Objection::failed("one descriptor in the ring", format!("{chain:x?}")));
        };
        ensure_eq("INDIRECT", named.flags & INDIRECT, INDIRECT)?;
        let mut bytes = vec![0; named.len as usize];
        tables.pages.read((named.address - tables.address) as usize, &mut bytes)?;
        let entries = stage.ring.parse_table(&bytes);
        let links: Vec<_> = entries.iter().filter(|entry| entry.flags & NEXT != 0).map(|entry| entry.next).collect();
        ensure_eq("links", links, vec![1, 2, 3])?;
        stage.give_back(id, token)?;
    }
    Ok(Finding::Passed)
}

/// Adds `count` buffers of one readable and one writable piece; the first one is of `token`.
fn fill(stage: &mut Stage, count: u32, token: u32) -> Result<Vec<Made>, Objection> {
    (0..count).map(|number| stage.add(1, 1, token + number)).collect()
}

/// The device uses all of `batch`, and tells that it wrote `len` bytes to the last.
fn use_batch(stage: &mut Stage, batch: &[Made], len: u32) {
    let Some((last, skipped)) = batch.split_last() else { return };
    stage.ring.put_used(last.id.into(), len);
    if stage.ring.is_packed() {
        let (size, packed) = (stage.ring.size(), stage.ring.packed());
        packed.put = skipped.iter().fold(packed.put, |at, made| at.advanced(made.chain.len() as u16, size));
    } else {
        // The used index counts them, but what stands in their places means nothing.
        skipped.iter().for_each(|_| stage.ring.put_used_quietly(u32::MAX, u32::MAX));
    }
}

fn batch(session: &mut Session) -> Verdict {
    need(session)?;
    let mut stage = stage_of(session, Features::IN_ORDER, Some(16))?;
    let mut token = 0;
    // More than once round the ring.
    for count in [3, 1, 8, 2, 5, 7, 1, 4] {
        let made = fill(&mut stage, count, token)?;
        use_batch(&mut stage, &made, 5);
        for number in 0..count {
            let len = if number + 1 < count { 16 } else { 5 };
            let got = stage.driver.get()?;
            let expected = format_args!("{len} bytes in buffer {number} of {count}");
            ensure(got == Some((token + number, len)), expected, format_args!("{got:?}"))?;
            if number + 1 < count {
                ensure(!stage.driver.enable(), "interrupts wanted again tell that more is used", "they do not")?;
            }
        }
        let got = stage.driver.get()?;
        ensure(got.is_none(), "nothing more", format_args!("{got:?}"))?;
        ensure_eq("free entries", stage.driver.free(), 16)?;
        token += count;
    }
    Ok(Finding::Passed)
}

fn not_counted(session: &mut Session) -> Verdict {
    need(session)?;
    let mut stage = stage(session, Features::IN_ORDER)?;
    let made = fill(&mut stage, 3, 0)?;
    stage.ring.put_used(made[2].id.into(), 16);
    refuses(session, stage, |reason| matches!(reason, QueueError::UsedId { .. }))
}

fn not_in_flight(session: &mut Session) -> Verdict {
    need(session)?;
    let mut stage = stage(session, Features::IN_ORDER)?;
    let made = fill(&mut stage, 2, 0)?;
    use_batch(&mut stage, &made, 16);
    while stage.driver.get()?.is_some() {}
    // It has been used already.
    fill(&mut stage, 1, 2)?;
    stage.ring.put_used(made[0].id.into(), 16);
    refuses(session, stage, |reason| matches!(reason, QueueError::UsedId { .. }))
}

fn length_beyond(session: &mut Session) -> Verdict {
    need(session)?;
    let mut stage = stage(session, Features::IN_ORDER)?;
    let made = fill(&mut stage, 3, 0)?;
    use_batch(&mut stage, &made, 17);
    for token in 0..2 {
        let got = stage.driver.get()?;
        ensure(got == Some((token, 16)), "the buffers before the last", format_args!("{got:?}"))?;
    }
    refuses(session, stage, |reason| matches!(reason, QueueError::UsedLength { .. }))
}
