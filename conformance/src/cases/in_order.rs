//! Buffers that are used in the order in which they were made available (VIRTIO_F_IN_ORDER), as the device does it.

use std::collections::VecDeque;

use polyvirt_core::Features;
use polyvirt_core::transport::Transport;

use super::init::serve_next;
use super::sample::{Sample, TEXT, ensure, revive};
use crate::raw::Ring;
use crate::suite::{Applies, CONSOLE, Case, Finding, Objection, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("in-order/used-in-order", "buffers are used in the order in which they were made available", used_in_order)
        .judges(&["N1590"]),
    case("in-order/goes-on", "round the ring and round again, and without it after a reset", goes_on),
];

pub(super) const fn case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).on(Applies::MODERN)
}

pub(super) fn need(session: &mut Session) -> Result<(), Objection> {
    match session.transport.device_features()?.contains(Features::IN_ORDER) {
        true => Ok(()),
        false => Err(Objection::Skipped("the device does not offer VIRTIO_F_IN_ORDER".into())),
    }
}

/// Waits for the device to use something of `offered`, whose chains have `pieces` descriptors each, oldest first. What it
/// used is taken out: the last one, of which it told how much it wrote, and those before, if it told of them by the last.
fn take(
    session: &mut Session,
    ring: &mut Ring,
    offered: &mut VecDeque<u16>,
    pieces: usize,
) -> Result<(Vec<u16>, u32), Objection> {
    let (id, len) = session.wait_used(ring)?;
    let Some(ahead) = offered.iter().position(|&head| u32::from(head) == id) else {
        return Err(Objection::failed(format_args!("one of {offered:?}"), id));
    };
    let used: Vec<_> = offered.drain(..=ahead).collect();
    for _ in 0..ahead {
        skip(ring, &used, pieces)?;
    }
    Ok((used, len))
}

/// Goes past the place at which a buffer of the batch `used` would have been told that was told by the last one.
fn skip(ring: &mut Ring, used: &[u16], pieces: usize) -> Result<(), Objection> {
    let expected = "buffers used in order, of a batch only the last is told";
    if ring.is_packed() {
        let (size, packed) = (ring.size(), ring.packed());
        for _ in 0..pieces {
            let at = packed.taken;
            let told = at.is_used(packed.slot(at.index()).1.flags);
            ensure(!told, expected, format_args!("slot {} is used, too", at.index()))?;
            packed.taken = at.advanced(1, size);
        }
        return Ok(());
    }
    let split = ring.split();
    ensure(split.used_index() != split.taken, "a used index that counts all of a batch", split.used_index())?;
    let (id, _) = split.used_element(split.taken);
    let told = used.iter().any(|&head| u32::from(head) == id);
    ensure(!told, expected, format_args!("{used:?} are a batch, and {id} is told behind it"))?;
    split.taken = split.taken.wrapping_add(1);
    Ok(())
}

fn used_in_order(session: &mut Session) -> Verdict {
    need(session)?;
    let mut rings = session.bring_up(Features::IN_ORDER)?;
    let Sample { queue, pieces } = Sample::new(session)?;
    let (ring, pieces) = (&mut rings[usize::from(queue)], pieces.len());
    // Heads that do not tell the order. None is 0, which is what places hold that nothing was ever told at: as long as no
    // place is used twice.
    let fits = |head: &u16| usize::from(*head) + pieces <= usize::from(ring.size());
    let heads: Vec<_> = [4, 1, 6, 2, 5, 3].map(|number| number * pieces as u16).into_iter().filter(fits).collect();
    ensure(heads.len() > 1, "room for two requests", ring.size())?;
    for _ in 0..(usize::from(ring.size()) / heads.len()).min(3) {
        let samples = heads.iter().map(|_| Sample::new(session)).collect::<Result<Vec<_>, _>>()?;
        for (sample, &head) in samples.iter().zip(&heads) {
            ring.chain(head, &sample.pieces);
        }
        ring.offer_all(&heads);
        ring.kick()?;
        let mut offered: VecDeque<_> = heads.iter().copied().collect();
        while !offered.is_empty() {
            let first = heads.len() - offered.len();
            let (used, len) = take(session, ring, &mut offered, pieces)?;
            if session.cell.device_type == CONSOLE {
                ensure(len == 0, "used length 0", len)?;
                continue;
            }
            let (last, skipped) = samples[first..first + used.len()].split_last().expect("one is used");
            last.check(session, len)?;
            // These were used completely.
            skipped.iter().try_for_each(|sample| sample.check(session, sample.writable()))?;
        }
        if session.cell.device_type == CONSOLE {
            let printed = session.far_side.output()?;
            ensure(printed == TEXT.repeat(heads.len()), "all is printed, once", format_args!("{printed:?}"))?;
        }
    }
    Ok(Finding::Passed)
}

fn goes_on(session: &mut Session) -> Verdict {
    need(session)?;
    let offered = session.transport.device_features()?;
    for more in [Features::empty(), offered & (Features::EVENT_IDX | Features::INDIRECT_DESC)] {
        session.negotiate(Features::IN_ORDER | more)?;
        let rings: Result<Vec<_>, _> = (0..session.queues()).map(|index| session.ring_of(index, Some(8))).collect();
        let mut rings = rings?;
        session.go()?;
        for _ in 0..20 {
            serve_next(session, &mut rings)?;
        }
        revive(session, rings)?;
    }
    Ok(Finding::Passed)
}
