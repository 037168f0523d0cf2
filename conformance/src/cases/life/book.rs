//! The record of what is in flight (INFLIGHT_SHMFD), in each state that a daemon's death can leave it in, and daemons that are
//! killed.
//!
//! The layout is the protocol's ("Inflight I/O tracking"), so a record can be written by hand: a daemon that finds it goes on
//! as if it had written it itself.

use std::os::fd::{AsFd, OwnedFd};

use polyvirt_core::memory::Pages;
use polyvirt_transports::vhost_user::map;
use polyvirt_transports::vhost_user::messages::*;

use super::case;
use crate::cases::sample::{ensure, ensure_eq};
use crate::daemon::front::{Event, Front, LiveRing, SIZE};
use crate::suite::{Case, Finding, Objection, RingFormat, Session, Verdict};

pub(super) const CASES: &[Case] = &[
    case("life/record-in-flight", "what is in flight in the record is carried out again, once", in_flight)
        .only(RingFormat::Split),
    case("life/record-before-the-index", "a completion noted but not shown is carried out again", before_index)
        .only(RingFormat::Split),
    case(
        "life/record-behind-the-index",
        "a completion shown but not crossed out is not carried out again",
        behind_index,
    )
    .only(RingFormat::Split),
    case("life/record-crossed-out", "a completion crossed out, its index not noted, is not carried out again", crossed)
        .only(RingFormat::Split),
    case("life/record-too-short", "with a record shorter than the ring nothing is lost and nothing done twice", short)
        .only(RingFormat::Split),
    case("life/killed", "a daemon killed at work goes on: each buffer is used once, and told of", killed),
    case(
        "life/killed-before-the-call",
        "a daemon that died between a used buffer and its call calls after its start",
        no_call,
    ),
];

/// A record, as it is handed over.
struct Record {
    file: OwnedFd,
    area: InflightArea,
    pages: Pages,
}

impl Record {
    /// A new one, from the daemon, for rings of `entries`.
    fn new(session: &Session, front: &mut Front, entries: u16) -> Result<Self, Objection> {
        front.need(ProtocolFeatures::INFLIGHT_SHMFD, "a record of what is in flight")?;
        let asked = InflightArea { size: 0, offset: 0, queues: session.queues(), entries };
        let (area, mut fds) = front.ask_with::<InflightArea>(Request::GetInflightFd, &asked.to_bytes(), &[])?;
        let file = fds.pop().ok_or_else(|| Objection::failed("a descriptor with the record", "none"))?;
        let area = InflightArea { queues: asked.queues, entries, ..area };
        let ours = file.try_clone().map_err(|error| Objection::failed("a descriptor", error))?;
        let pages = map(ours, area.offset, area.size).map_err(|error| Objection::failed("the record maps", error))?;
        Ok(Self { file, area, pages })
    }

    fn hand_over(&self, front: &mut Front) -> Result<(), Objection> {
        front.tell(Request::SetInflightFd, &self.area.to_bytes(), &[self.file.as_fd()])
    }

    /// The part of the last queue: each has as many bytes.
    fn part(&self) -> usize {
        let each = self.area.size as usize / usize::from(self.area.queues);
        each * usize::from(self.area.queues - 1)
    }

    /// Writes the header of the last queue's part: version, entries, head of the last completion, used index.
    fn set_header(&self, last_head: u16, used: u16) -> Result<(), Objection> {
        for (number, value) in [1, self.area.entries, last_head, used].into_iter().enumerate() {
            self.pages.write(self.part() + 8 + 2 * number, &value.to_ne_bytes())?;
        }
        Ok(())
    }

    /// Says of `head` whether it is in flight, and when it was taken.
    fn set_entry(&self, head: u16, in_flight: bool, counter: u64) -> Result<(), Objection> {
        let at = self.part() + 16 + 16 * usize::from(head);
        self.pages.write(at, &[in_flight.into()])?;
        self.pages.write(at + 8, &counter.to_ne_bytes())?;
        Ok(())
    }
}

/// The heads of the chains of a record written by hand, in the order in which they were made available. The first two were
/// taken, and the second one is used first: where the device goes on cannot be told from indices alone.
const HEADS: [u16; 3] = [6, 0, 3];

/// What a record written by hand says, and what has to come of it.
struct State {
    /// The heads in flight, in the order in which they were taken.
    in_flight: &'static [u16],
    /// The heads that the used ring shows.
    used: &'static [u16],
    /// The head of the last completion, and the used index, as the record has them.
    noted: (u16, u16),
    /// The heads that are still to be used.
    expected: &'static [u16],
}

/// Hands a daemon a ring and a record in `state`, as a front end does whose daemon has died.
fn staged(session: &mut Session, state: &State) -> Verdict {
    let mut front = Front::begin(session)?;
    let record = Record::new(session, &mut front, SIZE)?;
    drop(front);
    let mut front = Front::begin(session)?;
    let mut rings = (0..session.queues()).map(|index| front.ring(session, index)).collect::<Result<Vec<_>, _>>()?;
    let live = last(&mut rings);
    let mut samples = Vec::new();
    for head in HEADS {
        samples.push((head, live.offer(session, head)?));
    }
    for &head in state.used {
        live.ring.put_used(head.into(), 0);
        live.ring.take();
    }
    record.set_header(state.noted.0, state.noted.1)?;
    for (number, &head) in state.in_flight.iter().enumerate() {
        record.set_entry(head, true, number as u64 + 1)?;
    }
    record.hand_over(&mut front)?;
    let base = state.used.len() as u32;
    start(&mut front, &rings, base)?;
    let live = last(&mut rings);
    let mut used = Vec::new();
    while used.len() < state.expected.len() {
        let (id, _) = front.used(live)?;
        let sample = samples.iter().find(|(head, _)| u32::from(*head) == id);
        let (head, sample) = sample.ok_or_else(|| Objection::failed("a buffer that was offered", id))?;
        sample.check_memory()?;
        used.push(*head);
    }
    used.sort_unstable();
    let mut expected = state.expected.to_vec();
    expected.sort_unstable();
    ensure_eq("the buffers used after the start", used, expected)?;
    // Whatever would be used a second time is, once the ring is stopped.
    let told = front.stop(live.index)?;
    let more = live.ring.take();
    ensure(more.is_none(), "each buffer used once", format_args!("{more:?} was used besides"))?;
    ensure_eq("the base", told, live.position())?;
    live.renew_events()?;
    front.start(live, told)?;
    front.serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

/// Starts all of `rings`: the last one at `base`, and the others at their beginning.
fn start(front: &mut Front, rings: &[LiveRing], base: u32) -> Result<(), Objection> {
    for live in rings {
        let base = if usize::from(live.index) + 1 == rings.len() { base } else { front.first_base() };
        front.start(live, base)?;
    }
    Ok(())
}

fn in_flight(session: &mut Session) -> Verdict {
    staged(session, &State { in_flight: &[6], used: &[0], noted: (0, 1), expected: &[6, 3] })
}

fn before_index(session: &mut Session) -> Verdict {
    staged(session, &State { in_flight: &[6, 0], used: &[], noted: (6, 0), expected: &[6, 0, 3] })
}

fn behind_index(session: &mut Session) -> Verdict {
    staged(session, &State { in_flight: &[6, 0], used: &[0], noted: (0, 0), expected: &[6, 3] })
}

fn crossed(session: &mut Session) -> Verdict {
    staged(session, &State { in_flight: &[6], used: &[0], noted: (0, 0), expected: &[6, 3] })
}

fn short(session: &mut Session) -> Verdict {
    let mut front = Front::begin(session)?;
    // For half of the ring only; queue sizes are the guest's choice, and a front end may have asked before it made one.
    let record = Record::new(session, &mut front, SIZE / 2)?;
    drop(front);
    let mut front = Front::begin(session)?;
    let mut rings = (0..session.queues()).map(|index| front.ring(session, index)).collect::<Result<Vec<_>, _>>()?;
    let heads = [SIZE - 4, 0, 3];
    let live = last(&mut rings);
    let mut samples = Vec::new();
    for head in heads {
        samples.push(live.offer(session, head)?);
    }
    record.set_header(0, 0)?;
    // The first chain was taken too, but the record has no room for it.
    record.set_entry(0, true, 1)?;
    record.hand_over(&mut front)?;
    let begun = start(&mut front, &rings, 0);
    let live = last(&mut rings);
    let mut used = Vec::new();
    while begun.is_ok() && used.len() < heads.len() {
        if let Some((id, _)) = live.ring.take() {
            used.push(id);
            continue;
        }
        match front.wait(live)? {
            Event::Called => {}
            // A daemon may refuse such a record, if it says so.
            Event::Broken | Event::Closed => break,
        }
    }
    if begun.is_err() || used.len() < heads.len() {
        ensure(used.is_empty(), "a record that is refused leaves the ring alone", format_args!("{used:?} was used"))?;
        drop(front);
        let mut front = Front::begin(session)?;
        let mut rings = front.start_all(session)?;
        front.serve(session, &mut rings)?;
        return Ok(Finding::Rejected);
    }
    used.sort_unstable();
    let mut expected = heads.map(u32::from).to_vec();
    expected.sort_unstable();
    ensure_eq("the buffers used", used, expected)?;
    front.stop(live.index)?;
    let more = live.ring.take();
    ensure(more.is_none(), "each buffer used once", format_args!("{more:?} was used besides"))?;
    Ok(Finding::Passed)
}

/// How often a daemon is killed.
const ROUNDS: usize = 8;
/// Chains that it has then.
const CHAINS: u16 = 16;

fn killed(session: &mut Session) -> Verdict {
    let daemon = session.daemon()?;
    daemon.can_be_killed()?;
    let mut front = Front::begin(session)?;
    let record = Record::new(session, &mut front, SIZE)?;
    record.hand_over(&mut front)?;
    let mut rings = front.start_all(session)?;
    for round in 0..ROUNDS {
        let live = last(&mut rings);
        let mut samples = Vec::new();
        for number in 0..CHAINS {
            samples.push(live.offer(session, 3 * number)?);
        }
        live.ring.kick()?;
        // In the middle of its work: after the first call, or before any.
        if round % 2 == 0 {
            front.called(live)?;
        }
        daemon.kill()?;
        drop(front);
        front = Front::begin(session)?;
        record.hand_over(&mut front)?;
        for live in &mut rings {
            live.renew_events()?;
        }
        let base = base_by_ring(&front, last(&mut rings));
        start(&mut front, &rings, base)?;
        let live = last(&mut rings);
        // What was used before the end was told to nobody: a call comes, whatever there is to do.
        front.called(live)?;
        let mut used = Vec::new();
        while used.len() < usize::from(CHAINS) {
            used.push(front.used(live)?.0);
        }
        used.sort_unstable();
        let all: Vec<_> = (0..CHAINS).map(|number| u32::from(3 * number)).collect();
        ensure_eq("the buffers that were used", used, all)?;
        drop(samples);
    }
    front.serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn no_call(session: &mut Session) -> Verdict {
    let daemon = session.daemon()?;
    daemon.can_be_killed()?;
    let mut front = Front::begin(session)?;
    // Without a record the front end knows where the driver is: nothing is in flight.
    let record = match Record::new(session, &mut front, SIZE) {
        Err(Objection::Skipped(_)) => None,
        record => Some(record?),
    };
    record.iter().try_for_each(|record| record.hand_over(&mut front))?;
    let mut rings = front.start_all(session)?;
    let live = last(&mut rings);
    let sample = live.offer(session, 0)?;
    live.ring.kick()?;
    // It is used, and nobody looked: to the next daemon this is as if the one before had died before its call.
    front.until_used(live)?;
    daemon.kill()?;
    drop(front);
    front = Front::begin(session)?;
    record.iter().try_for_each(|record| record.hand_over(&mut front))?;
    for live in &mut rings {
        live.renew_events()?;
    }
    let live = last(&mut rings);
    let base = if record.is_some() { base_by_ring(&front, live) } else { live.position() };
    start(&mut front, &rings, base)?;
    let live = last(&mut rings);
    front.called(live)?;
    let (id, _) = front.used(live)?;
    ensure_eq("used id", id, 0)?;
    sample.check_memory()?;
    front.serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

/// The base that a front end knows whose daemon has died: what the ring says, or nothing (packed).
fn base_by_ring(front: &Front, live: &mut LiveRing) -> u32 {
    match live.ring.is_packed() {
        true => front.first_base(),
        false => live.ring.split().used_index().into(),
    }
}

fn last(rings: &mut [LiveRing]) -> &mut LiveRing {
    rings.last_mut().expect("every device has a queue")
}
