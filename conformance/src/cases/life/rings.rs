//! Rings that are started, stopped, and started again.

use std::time::Instant;

use polyvirt_transports::vhost_user::messages::*;

use super::case;
use crate::cases::sample::{ensure, ensure_eq};
use crate::daemon::front::{Answer, Event, Front, LiveRing, Step};
use crate::raw::NEXT;
use crate::suite::{Case, Finding, Objection, Session, Verdict};

pub(super) const CASES: &[Case] = &[
    case("life/reconnect", "a daemon serves one front end after another, however the one before left", reconnect),
    case("life/base-handed-back", "GET_VRING_BASE says where the device is, and the ring goes on there", base),
    case("life/base-of-a-ring-that-never-ran", "GET_VRING_BASE tells the base that was set, twice alike", idle_base),
    case(
        "life/stop-finishes",
        "when GET_VRING_BASE is answered, what was taken is used, and no more is",
        stop_finishes,
    ),
    case("life/stopped-is-stopped", "a stopped ring is not served, and is when it is started again", stopped),
    case("life/any-order", "a ring works whatever the order in which it was described", any_order),
    case("life/begins-anew", "a ring that begins anew after GET_VRING_BASE works, at other addresses too", anew),
    case("life/broken-ring-begins-anew", "a ring that its driver broke works after it was begun anew", broken_anew),
    case("life/polled-kicks", "without a descriptor for kicks a ring is polled, or the daemon refuses", polled_kicks),
    case("life/polled-calls", "without a descriptor for calls a ring is served all the same", polled_calls),
    case("life/ring-outside-memory", "a ring that is in no memory harms neither the daemon nor later rings", outside),
    case("life/enabled-again", "a ring that was disabled is served once it is enabled again", enabled_again),
];

fn reconnect(session: &mut Session) -> Verdict {
    for _ in 0..3 {
        let mut front = Front::begin(session)?;
        let mut rings = front.start_all(session)?;
        front.serve(session, &mut rings)?;
        // It leaves without a word.
        drop(front);
        // And one leaves in the middle of setting up.
        drop(Front::negotiated(session, ProtocolFeatures::empty(), 0)?);
    }
    Ok(Finding::Passed)
}

fn base(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    let mut rings = front.start_all(session)?;
    for _ in 0..3 {
        front.serve(session, &mut rings)?;
        let live = last(&mut rings);
        let (told, expected) = (front.stop(live.index)?, live.position());
        ensure_eq("the base", told, expected)?;
        live.renew_events()?;
        front.start(live, told)?;
    }
    // Another front end goes on with the same rings.
    let live = last(&mut rings);
    let told = front.stop(live.index)?;
    drop(front);
    let mut front = Front::begin(session)?;
    for live in &mut rings {
        live.renew_events()?;
        let base = if live.index + 1 == session.queues() { told } else { front.first_base() };
        front.start(live, base)?;
    }
    front.serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn idle_base(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    let live = front.ring(session, 0)?;
    let base = front.first_base() + 7;
    front.step(&live, base, Step::Num)?;
    front.step(&live, base, Step::Base)?;
    for _ in 0..2 {
        ensure_eq("the base", front.stop(0)?, base)?;
    }
    Ok(Finding::Passed)
}

fn stop_finishes(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    let mut rings = front.start_all(session)?;
    let live = last(&mut rings);
    // As many chains as there is room for: three descriptors each at most.
    let mut samples = Vec::new();
    for number in 0..CHAINS {
        samples.push(live.offer(session, 3 * number)?);
    }
    live.ring.kick()?;
    let told = front.stop(live.index)?;
    let mut used = Vec::new();
    while let Some((id, _)) = live.ring.take() {
        used.push(id);
    }
    // What was taken was used, so both sides are at the same place.
    let expected = match live.ring.is_packed() {
        true => u32::from(live.ring.packed().taken.pack()) * 0x1_0001,
        false => live.ring.split().taken.into(),
    };
    ensure_eq("the base, behind what is used,", told, expected)?;
    // Nothing more is used until it goes on; then the rest is, each once.
    live.renew_events()?;
    front.start(live, told)?;
    live.ring.kick()?;
    while used.len() < usize::from(CHAINS) {
        used.push(front.used(live)?.0);
    }
    used.sort_unstable();
    let all: Vec<_> = (0..CHAINS).map(|number| u32::from(3 * number)).collect();
    ensure_eq("the buffers that were used", used, all)?;
    let more = live.ring.take();
    ensure(more.is_none(), "each buffer used once", format_args!("{more:?} was used again"))?;
    Ok(Finding::Passed)
}

/// Chains at once: with three descriptors each they fit into a ring.
const CHAINS: u16 = 16;

fn stopped(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    let mut rings = front.start_all(session)?;
    front.serve(session, &mut rings)?;
    let live = last(&mut rings);
    let told = front.stop(live.index)?;
    let _sample = live.offer(session, 3)?;
    live.ring.kick()?;
    // Whatever the daemon does about the kick, it has done it when it has answered.
    ensure(front.answers(), "the daemon answers", "it does not")?;
    ensure(!live.ring.has_used(), "a stopped ring is not served", "a buffer was used")?;
    front.start(live, told)?;
    live.ring.kick()?;
    ensure_eq("used id", front.used(live)?.0, 3)?;
    Ok(Finding::Passed)
}

fn any_order(session: &mut Session) -> Verdict {
    use Step::*;
    // The kick comes behind what says where the ring is; everything else comes anywhere.
    let orders = [
        [Enable, Addresses, Base, Num, Kick, Error, Call],
        [Call, Error, Num, Base, Addresses, Enable, Kick],
        [Base, Num, Call, Addresses, Kick, Enable, Error],
        [Addresses, Enable, Num, Error, Base, Call, Kick],
    ];
    for order in orders {
        let mut front = Front::begin(session)?;
        let mut rings = Vec::new();
        for index in 0..session.queues() {
            let live = front.ring(session, index)?;
            for step in order {
                front.step(&live, front.first_base(), step)?;
            }
            rings.push(live);
        }
        front.serve(session, &mut rings)?;
    }
    Ok(Finding::Passed)
}

fn anew(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    let mut rings = front.start_all(session)?;
    front.serve(session, &mut rings)?;
    for live in &rings {
        front.stop(live.index)?;
    }
    let mut rings = front.start_all(session)?;
    front.serve(session, &mut rings)?;
    front.serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn broken_anew(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    let mut rings = front.start_all(session)?;
    let live = last(&mut rings);
    let sample = crate::cases::sample::Sample::new(session)?;
    let (memory, writable) = &sample.pieces[0];
    if live.ring.is_packed() {
        live.ring.offer_nonsense();
    } else {
        // A chain whose next descriptor is itself.
        let mut descriptor = crate::raw::link(memory, *writable, Some(0));
        descriptor.flags |= NEXT;
        live.ring.set_descriptor(0, descriptor);
        live.ring.offer(0);
    }
    live.ring.kick()?;
    // Served as far as it goes, or told, or dropped without a word: all that counts is what comes next.
    while let Ok(Event::Called) = front.wait(live)
        && !live.ring.has_used()
    {}
    // Some end the connection, sooner or later.
    if rings.iter().any(|live| front.stop(live.index).is_err()) {
        front = Front::begin(session)?;
    }
    let mut rings = front.start_all(session)?;
    front.serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn polled_kicks(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    let mut rings = front.start_all(session)?;
    let live = last(&mut rings);
    let told = front.stop(live.index)?;
    live.renew_events()?;
    for step in Step::USUAL.into_iter().filter(|step| *step != Step::Kick) {
        front.step(live, told, step)?;
    }
    let which = u64::from(live.index) | VRING_NOFD;
    match front.try_tell(Request::SetVringKick, &which.to_bytes(), &[])? {
        Answer::Done => {}
        Answer::Refused(_) | Answer::Closed => {
            drop(front);
            Front::begin(session)?;
            return Ok(Finding::Rejected);
        }
    }
    let sample = live.offer(session, 0)?;
    let (id, _) = match front.used(live) {
        // Without acknowledgements a refusal is the end of the connection, or that the ring is broken.
        Err(_) if !front.answers() => return Ok(Finding::Rejected),
        used => used?,
    };
    ensure_eq("used id", id, 0)?;
    sample.check_memory()?;
    Ok(Finding::Passed)
}

fn polled_calls(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    let mut rings = front.start_all(session)?;
    let live = last(&mut rings);
    let which = u64::from(live.index) | VRING_NOFD;
    front.tell(Request::SetVringCall, &which.to_bytes(), &[])?;
    let begun = Instant::now();
    let sample = live.offer(session, 0)?;
    live.ring.kick()?;
    // There is no event to wait for: the driver looks, as one does that polls.
    while !live.ring.has_used() {
        ensure(front.answers(), "the daemon answers", "it does not")?;
        ensure(
            begun.elapsed() < session.watchdog,
            "the buffer is used",
            format_args!("not in {:?}", session.watchdog),
        )?;
    }
    let (id, _) = front.used(live)?;
    ensure_eq("used id", id, 0)?;
    sample.check_memory()?;
    Ok(Finding::Passed)
}

fn outside(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    let rings = front.start_all(session)?;
    let live = rings.last().expect("every device has a queue");
    let told = front.stop(live.index)?;
    let mut addresses = front.addresses(live, None);
    addresses.descriptors = 0x10;
    front.step(live, told, Step::Num)?;
    front.step(live, told, Step::Base)?;
    let mut answer = front.try_tell(Request::SetVringAddr, &addresses.to_bytes(), &[])?;
    for step in [Step::Call, Step::Kick, Step::Enable] {
        if answer == Answer::Done && front.step(live, told, step).is_err() {
            answer = Answer::Closed;
        }
    }
    if answer == Answer::Closed || !front.answers() {
        return Err(Objection::failed("the session goes on: a guest placed the ring", "the connection was closed"));
    }
    for live in &rings {
        front.stop(live.index)?;
    }
    let mut rings = front.start_all(session)?;
    front.serve(session, &mut rings)?;
    Ok(Finding::Rejected)
}

fn enabled_again(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    if front.offered & PROTOCOL_FEATURES == 0 {
        return Err(Objection::Skipped("without protocol features rings are not enabled one by one".into()));
    }
    let mut rings = front.start_all(session)?;
    front.serve(session, &mut rings)?;
    let live = last(&mut rings);
    front.enable(live.index, false)?;
    // While it is disabled a ring may be processed without effects, or left alone: nothing is said of it.
    front.enable(live.index, true)?;
    let sample = live.offer(session, 3)?;
    live.ring.kick()?;
    ensure_eq("used id", front.used(live)?.0, 3)?;
    sample.check_memory()?;
    Ok(Finding::Passed)
}

/// The ring that samples are served in.
fn last(rings: &mut [LiveRing]) -> &mut LiveRing {
    rings.last_mut().expect("every device has a queue")
}
