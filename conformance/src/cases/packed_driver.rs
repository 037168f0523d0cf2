//! The driver's role on a packed ring: what a split ring does not have. The case plays the device.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use polyvirt_core::Features;
use polyvirt_core::queue::AddError;
use polyvirt_core::queue::packed::layout::{Position, Tail};
use polyvirt_core::transport::Transport;

use super::driver::{Stage, stage, stage_of};
use super::sample::{ensure, ensure_eq};
use crate::raw::{Made, is_event_structure};
use crate::suite::{Case, Finding, Objection, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("driver/packed-rounds", "chains follow one another round the ring, whatever its size", rounds),
    case("driver/packed-hands-off", "what is in flight stays as it is, whatever is added and taken back", hands_off)
        .judges(&["N0093", "N0094"]),
    case("driver/packed-room", "a list is begun only if there is room for all of it", room).judges(&["N0100", "N0101"]),
    case("driver/packed-first-last", "the first descriptor of a list is available when all others are", first_last)
        .judges(&["N0102"]),
    case("driver/packed-any-order", "buffers may come back in any order, each by its own id", any_order),
    case("driver/packed-stale-used", "used flags of another round are no used buffer", stale_used).class(&[23, 101]),
    case("driver/packed-length-reserved", "without the flag WRITE the used length means nothing", length_reserved)
        .class(&[102]),
    case("driver/packed-events", "what the driver writes about interrupts is well-formed", events),
    case("driver/packed-kick-rounds", "with EVENT_IDX a kick that is wanted in the next round comes then", kick_rounds),
];

const fn case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).only(RingFormat::Packed)
}

fn rounds(session: &mut Session) -> Verdict {
    for size in [None, Some(7), Some(4)] {
        let mut stage = stage_of(session, Features::empty(), size)?;
        let entries = u32::from(stage.ring.size());
        // Lengths of 1 to 3, until the ring was gone round three times.
        let (mut token, mut total) = (0, 0);
        while total < 3 * entries {
            let len = 1 + token % 3;
            let Made { id, chain } = stage.add(len - 1, 1, token)?;
            ensure_eq("descriptors", chain.len(), len as usize)?;
            stage.give_back(id, token)?;
            (token, total) = (token + 1, total + len);
        }
    }
    Ok(Finding::Passed)
}

/// What the ring holds, slot by slot.
fn slots(stage: &mut Stage) -> Vec<(u64, Tail)> {
    (0..stage.ring.size()).map(|index| stage.ring.packed().slot(index)).collect()
}

fn hands_off(session: &mut Session) -> Verdict {
    let mut stage = stage_of(session, Features::empty(), Some(8))?;
    let mut in_flight = Vec::new();
    for token in 0..40 {
        let (before, from) = (slots(&mut stage), stage.ring.packed().seen);
        let Made { id, chain } = stage.add(1, 1, token)?;
        let after = slots(&mut stage);
        let own = [from, from.advanced(chain.len() as u16 - 1, 8)].map(|at| at.index());
        for (slot, (was, is)) in before.iter().zip(&after).enumerate() {
            let may = own.contains(&(slot as u16));
            ensure(
                may || was == is,
                format_args!("slot {slot} stays as it is"),
                format_args!("{was:x?}, then {is:x?}"),
            )?;
        }
        in_flight.push((id, token));
        if in_flight.len() == 3 {
            let (id, token) = in_flight.remove(1);
            stage.ring.put_used_quietly(id.into(), 16);
            let before = slots(&mut stage);
            let got = stage.driver.get()?;
            ensure(got == Some((token, 16)), format_args!("the buffer of {token}"), format_args!("{got:?}"))?;
            ensure(slots(&mut stage) == before, "taking back writes no descriptor", "it does")?;
        }
    }
    Ok(Finding::Passed)
}

fn room(session: &mut Session) -> Verdict {
    let mut stage = stage_of(session, Features::empty(), Some(8))?;
    let mut made = Vec::new();
    for token in 0..7 {
        made.push(stage.add(0, 1, token)?.id);
    }
    let before = slots(&mut stage);
    let pieces = [stage.piece(0), stage.piece(1)];
    for _ in 0..3 {
        let refused = stage.driver.add(&pieces, &[], 7);
        let full = matches!(refused, Err(AddError::Full(7)));
        ensure(full, "no room for two where there is one place", format_args!("{refused:?}"))?;
        stage.driver.kick()?;
        ensure(slots(&mut stage) == before, "the ring as it was", "it changed")?;
    }
    stage.give_back(made[0], 0)?;
    stage.add(2, 0, 7)?;
    Ok(Finding::Passed)
}

fn first_last(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    let size = stage.ring.size();
    // Another thread looks at the ring all the time, as a device may, and at the last descriptor of a list as soon as the
    // first is available.
    let (turn, looked, stop) = (AtomicU32::new(0), AtomicU32::new(0), AtomicBool::new(false));
    let look = stage.ring.packed().looker();
    std::thread::scope(|scope| {
        let (turn, looked, stop) = (&turn, &looked, &stop);
        let watcher = scope.spawn(move || {
            let mut early = 0;
            for number in 1.. {
                while turn.load(Ordering::SeqCst) < number {
                    if stop.load(Ordering::SeqCst) {
                        return early;
                    }
                    std::thread::yield_now();
                }
                // Every list is as long as the ring, so it begins at slot 0, in the next round.
                let at = Position::new(0, number % 2 == 1);
                while !at.is_available(look(0)) {
                    if stop.load(Ordering::SeqCst) {
                        return early;
                    }
                    std::thread::yield_now();
                }
                early += u32::from(!at.is_available(look(size - 1)));
                looked.store(number, Ordering::SeqCst);
            }
            early
        });
        let mut make = || -> Result<(), Objection> {
            let pieces = vec![stage.piece(0); size.into()];
            for number in 1..=50 {
                turn.store(number, Ordering::SeqCst);
                let added = stage.driver.add(&[], &pieces, number);
                added.map_err(|error| Objection::failed("room for a buffer", error))?;
                stage.driver.kick()?;
                let begun = std::time::Instant::now();
                while looked.load(Ordering::SeqCst) < number {
                    let expected = "a list as long as the ring is made available";
                    ensure(begun.elapsed() < session.watchdog, expected, "it is not")?;
                    std::thread::yield_now();
                }
                let made = stage.ring.next_chain()?;
                let made = made.ok_or_else(|| Objection::failed("a list as long as the ring", "nothing"))?;
                stage.give_back(made.id, number)?;
            }
            Ok(())
        };
        let done = make();
        stop.store(true, Ordering::SeqCst);
        let early = watcher.join().map_err(|_| Objection::failed("a watcher", "it panicked"))?;
        ensure(
            early == 0,
            "the last descriptor is available when the first is",
            format_args!("{early} times it was not"),
        )?;
        done
    })?;
    Ok(Finding::Passed)
}

fn any_order(session: &mut Session) -> Verdict {
    let mut stage = stage_of(session, Features::empty(), Some(8))?;
    for turn in 0..10 {
        let mut made = Vec::new();
        for number in 0..4 {
            let token = turn * 4 + number;
            let id = stage.add(1, 1, token)?.id;
            ensure(
                made.iter().all(|&(other, _)| other != id),
                "an id of its own in flight",
                format_args!("{id} twice"),
            )?;
            made.push((id, token));
        }
        // Another order each time.
        made.rotate_left(turn as usize % 4);
        made.swap(0, 2);
        for (id, token) in made {
            stage.give_back(id, token)?;
        }
        ensure_eq("free entries", stage.driver.free(), 8)?;
    }
    Ok(Finding::Passed)
}

fn stale_used(session: &mut Session) -> Verdict {
    let mut stage = stage_of(session, Features::empty(), Some(4))?;
    for token in 0..10 {
        let Made { id, .. } = stage.add(0, 1, token)?;
        let packed = stage.ring.packed();
        let at = packed.put;
        let other = Position::new(at.index(), !at.wrap());
        let (address, tail) = packed.slot(at.index());
        packed.set_slot(at.index(), address, Tail { len: 16, id, flags: other.used_flags() });
        let got = stage.driver.get()?;
        ensure(got.is_none(), "nothing is used in this round", format_args!("{got:?}"))?;
        stage.ring.packed().set_slot(at.index(), address, tail);
        stage.give_back(id, token)?;
    }
    Ok(Finding::Passed)
}

fn length_reserved(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    for (token, len) in [0, 1, 17, u32::MAX].into_iter().enumerate() {
        let Made { id, .. } = stage.add(1, 1, token as u32)?;
        stage.ring.packed().put_used_with(id, len, 0);
        let got = stage.driver.get()?;
        ensure(got == Some((token as u32, 0)), "a buffer with nothing written", format_args!("{got:?}"))?;
    }
    Ok(Finding::Passed)
}

fn events(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for features in [Features::empty(), offered & Features::EVENT_IDX] {
        let mut stage = stage_of(session, features, Some(5))?;
        for token in 0..20 {
            match token % 4 {
                1 => stage.driver.disable(),
                3 => drop(stage.driver.enable()),
                _ => {}
            }
            let Made { id, .. } = stage.add(0, 1 + token % 2, token)?;
            stage.give_back(id, token)?;
            let got = stage.driver.get()?;
            ensure(got.is_none(), "nothing more", format_args!("{got:?}"))?;
            let events = stage.ring.packed().driver_events();
            let right = is_event_structure(events, 5, !features.is_empty());
            ensure(right, "a place in the ring and flags of 0 to 2 (2 with EVENT_IDX)", format_args!("{events:x?}"))?;
        }
    }
    Ok(Finding::Passed)
}

fn kick_rounds(session: &mut Session) -> Verdict {
    if !session.transport.device_features()?.contains(Features::EVENT_IDX) {
        return Err(Objection::Skipped("the device does not offer VIRTIO_F_EVENT_IDX".into()));
    }
    let mut stage = stage_of(session, Features::EVENT_IDX, Some(5))?;
    let mut token = 0;
    // Beyond the end of the ring, and in the round behind it.
    for ahead in [3, 4, 7, 9] {
        stage.ring.ask_for_kick_after(ahead);
        for number in 0..=ahead {
            let Made { id, .. } = stage.add(0, 1, token)?;
            let kicks = stage.kicks.kicks();
            ensure_eq("kicks", kicks, usize::from(number == ahead))?;
            stage.give_back(id, token)?;
            token += 1;
        }
    }
    Ok(Finding::Passed)
}
