//! Suspending a device and letting it run again (VIRTIO_F_SUSPEND).

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use polyvirt_core::transport::{self, BlockingTransport, Transport};
use polyvirt_core::{Features, Status};

use super::config::{change, changed, changing, shown_by};
use super::init::serve_next;
use super::sample::{Sample, TEXT, ensure, ensure_eq, offer, revive, serve, serve_told, shown, touches};
use crate::raw::Ring;
use crate::suite::{Applies, CONSOLE, Case, Finding, Mark, Objection, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("suspend/shows", "SUSPEND written to a running device shows in the status", shows).judges(&["N0278"]),
    case("suspend/resumes", "a device that was suspended goes on where it was, again and again", resumes)
        .judges(&["N0279"]),
    case(
        "suspend/silent",
        "a suspended device takes no buffers, touches no memory and notifies of no queue",
        suspended_silent,
    )
    .judges(&["N0275"])
    .class(&[26]),
    case(
        "suspend/in-flight",
        "what a device has begun it has used when SUSPEND shows; what it has not waits until it runs again",
        in_flight,
    )
    .judges(&["N0275", "N0279", "N0280"]),
    case("suspend/before-driver-ok", "SUSPEND before DRIVER_OK is ignored", before_driver_ok)
        .judges(&["N0273"])
        .class(&[34])
        .once(),
    case("suspend/unasked", "SUSPEND does nothing where the feature was not negotiated", unasked).class(&[34]),
    case("suspend/reset", "a suspended device can be reset, and is not suspended then", reset).judges(&["N0021"]),
    case("suspend/configuration-writes", "a suspended device takes no configuration", configuration_writes)
        .judges(&["N0274"])
        .on(Applies::MODERN.device(CONSOLE))
        .once(),
    case(
        "suspend/configuration-changes",
        "what changes while a device is suspended shows, and is told, when it runs again",
        configuration_changes,
    )
    .judges(&["N0275", "N0276", "N0277"])
    .once(),
];

/// How long to wait before the status is read again.
const PAUSE: Duration = Duration::from_millis(5);

const fn case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).on(Applies::MODERN)
}

/// A running device with VIRTIO_F_SUSPEND and those of `wanted` that it offers; skipped where it cannot be suspended.
fn suspendable(session: &mut Session, wanted: Features) -> Result<Vec<Ring>, Objection> {
    need(session)?;
    session.bring_up(wanted | Features::SUSPEND)
}

fn need(session: &mut Session) -> Result<(), Objection> {
    match session.transport.device_features()?.contains(Features::SUSPEND) {
        true => Ok(()),
        false => Err(Objection::Skipped("the device does not offer VIRTIO_F_SUSPEND".into())),
    }
}

/// Waits until the device is suspended, or runs again. A device may fail to do either, but has to say so: then the case
/// is skipped.
fn settle(session: &mut Session, suspended: bool) -> Result<(), Objection> {
    let begun = Instant::now();
    loop {
        let status = session.transport.status()?;
        if status.contains(Status::DEVICE_NEEDS_RESET) {
            return Err(Objection::Skipped("the device says that it cannot do it, and needs a reset".into()));
        }
        // One of them shows in place of the other.
        let [runs, rests] = [Status::DRIVER_OK, Status::SUSPEND].map(|bit| status.contains(bit));
        if (runs, rests) == (!suspended, suspended) {
            return Ok(());
        }
        let expected = if suspended { "SUSPEND and no DRIVER_OK" } else { "DRIVER_OK and no SUSPEND" };
        let observed = format_args!("status {:#04x} for {:?}", status.bits(), session.watchdog);
        ensure(begun.elapsed() < session.watchdog, expected, observed)?;
        // Nothing tells of it. Not at every turn, so that the reproduction shows more than this.
        std::thread::sleep(PAUSE);
    }
}

fn suspend(session: &mut Session) -> Result<(), Objection> {
    transport::suspend(&mut session.transport)?;
    settle(session, true)
}

fn resume(session: &mut Session) -> Result<(), Objection> {
    transport::resume(&mut session.transport)?;
    settle(session, false)
}

/// Fails if the device touched one of its rings or a buffer of `samples` since `mark`.
fn untouched(session: &mut Session, rings: &[Ring], samples: &[Sample], mark: Mark) -> Result<(), Objection> {
    // What was under way when this was asked for is over when it is answered.
    session.transport.status()?;
    let ranges: Vec<_> = rings.iter().flat_map(Ring::areas).chain(samples.iter().flat_map(Sample::ranges)).collect();
    for access in session.probe()?.since(mark)? {
        let touched = ranges.iter().any(|&(address, len, _)| touches(access, address, len));
        ensure(!touched, "no access to rings and buffers while SUSPEND shows", shown(access))?;
    }
    Ok(())
}

fn shows(session: &mut Session) -> Verdict {
    let mut rings = suspendable(session, Features::empty())?;
    suspend(session)?;
    resume(session)?;
    serve(session, &mut rings)?;
    suspend(session)?;
    let steps = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
    let status = session.transport.status()?;
    ensure(status.contains(steps), "the steps of initialization still show", format_args!("{:#04x}", status.bits()))?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn resumes(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    let mut rings = suspendable(session, offered & (Features::EVENT_IDX | Features::INDIRECT_DESC))?;
    for _ in 0..5 {
        for _ in 0..3 {
            serve_next(session, &mut rings)?;
        }
        suspend(session)?;
        resume(session)?;
    }
    serve_next(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn suspended_silent(session: &mut Session) -> Verdict {
    let mut rings = suspendable(session, Features::empty())?;
    serve_told(session, &mut rings)?;
    suspend(session)?;
    let mark = session.probe()?.mark();
    // A driver must not do this.
    let sample = offer(session, &mut rings)?;
    for _ in 0..10 {
        for ring in &mut rings {
            ring.kick()?;
        }
    }
    let samples = [sample];
    untouched(session, &rings, &samples, mark)?;
    let [sample] = samples;
    let ring = &mut rings[usize::from(sample.queue)];
    ensure(!ring.has_used(), "nothing used while SUSPEND shows", "something was")?;
    ensure(!session.interrupted()?, "no interrupt while SUSPEND shows", "one came")?;
    resume(session)?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.kick()?;
    let (_, len) = session.wait_used(ring)?;
    sample.check(session, len)?;
    Ok(Finding::Passed)
}

/// Requests in flight when the device is to be suspended, and what has to have become of them.
fn in_flight(session: &mut Session) -> Verdict {
    let mut rings = suspendable(session, Features::empty())?;
    for _ in 0..4 {
        while session.interrupted()? {}
        let sample = Sample::new(session)?;
        let (queue, pieces) = (usize::from(sample.queue), sample.pieces.len() as u16);
        let count = (rings[queue].size() / pieces).min(8);
        let heads: Vec<_> = (0..count).map(|number| number * pieces).collect();
        let mut samples = vec![sample];
        while samples.len() < heads.len() {
            samples.push(Sample::new(session)?);
        }
        for (&head, sample) in heads.iter().zip(&samples) {
            rings[queue].chain(head, &sample.pieces);
            rings[queue].offer(head);
            rings[queue].kick()?;
        }
        suspend(session)?;
        let mark = session.probe()?.mark();
        let bytes = rings[queue].used_bytes()?;
        let mut used = Vec::new();
        while let Some(element) = rings[queue].take() {
            used.push(element);
        }
        if !used.is_empty() {
            session.wait_interrupt()?;
        }
        untouched(session, &rings, &samples, mark)?;
        ensure(rings[queue].used_bytes()? == bytes, "nothing is used while SUSPEND shows", "something is")?;
        while session.interrupted()? {}
        resume(session)?;
        // The device was kicked for them before.
        while used.len() < heads.len() {
            used.push(session.wait_used(&mut rings[queue])?);
        }
        let ids: BTreeSet<_> = used.iter().map(|&(id, _)| id).collect();
        ensure_eq("used ids", ids, heads.iter().copied().map(u32::from).collect())?;
        check_all(session, &samples, &heads, &used)?;
    }
    Ok(Finding::Passed)
}

/// Checks what came of `samples`, which were offered at `heads`.
fn check_all(session: &mut Session, samples: &[Sample], heads: &[u16], used: &[(u32, u32)]) -> Result<(), Objection> {
    if session.cell.device_type == CONSOLE {
        // What all of them printed comes at once.
        let printed = session.far_side.output()?;
        return ensure(printed == TEXT.repeat(samples.len()), "all is printed, once", format_args!("{printed:?}"));
    }
    for (sample, &head) in samples.iter().zip(heads) {
        let len = used.iter().find(|&&(id, _)| id == u32::from(head)).map_or(0, |&(_, len)| len);
        sample.check(session, len)?;
    }
    Ok(())
}

fn before_driver_ok(session: &mut Session) -> Verdict {
    need(session)?;
    session.transport.reset()?;
    let mut status = Status::empty();
    for step in [Status::ACKNOWLEDGE, Status::DRIVER, Status::FEATURES_OK] {
        status |= step;
        if step == Status::FEATURES_OK {
            session.negotiate(Features::SUSPEND)?;
        } else {
            session.transport.set_status(status)?;
        }
        session.transport.set_status(status | Status::SUSPEND)?;
        ensure_eq("status before DRIVER_OK", session.transport.status()?, status)?;
    }
    let mut rings = session.rings()?;
    session.transport.set_status(status | Status::SUSPEND)?;
    session.go()?;
    serve(session, &mut rings)?;
    ensure_eq("status", session.transport.status()?, status | Status::DRIVER_OK)?;
    Ok(Finding::Passed)
}

fn unasked(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve_next(session, &mut rings)?;
    let status = session.transport.status()?;
    session.transport.set_status(status | Status::SUSPEND)?;
    ensure_eq("status", session.transport.status()?, status)?;
    serve_next(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn reset(session: &mut Session) -> Verdict {
    for _ in 0..2 {
        let mut rings = suspendable(session, Features::empty())?;
        serve(session, &mut rings)?;
        suspend(session)?;
        session.transport.reset()?;
        ensure_eq("status after a reset", session.transport.status()?, Status::empty())?;
        revive(session, rings)?;
    }
    Ok(Finding::Passed)
}

/// VIRTIO_CONSOLE_F_EMERG_WRITE, which makes emerg_wr the one field of these devices that can be written.
const EMERG_WRITE: Features = Features::bit(2);
/// Where emerg_wr is.
const EMERG_WR: u32 = 8;

fn configuration_writes(session: &mut Session) -> Verdict {
    if !session.transport.device_features()?.contains(EMERG_WRITE) {
        return Err(Objection::Skipped("the device does not offer VIRTIO_CONSOLE_F_EMERG_WRITE".into()));
    }
    let mut rings = suspendable(session, EMERG_WRITE)?;
    suspend(session)?;
    session.transport.write_config(EMERG_WR, &u32::from(b'!').to_le_bytes())?;
    resume(session)?;
    session.transport.write_config(EMERG_WR, &u32::from(b'?').to_le_bytes())?;
    // Whatever was written is on the far side when the device answers the next question.
    session.transport.status()?;
    let printed = session.far_side.output()?;
    ensure(printed == b"?", "what was written before and after", format_args!("{printed:?}"))?;
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn configuration_changes(session: &mut Session) -> Verdict {
    let rings = suspendable(session, shown_by())?;
    if !change(session, 300)? {
        return Ok(Finding::Passed);
    }
    session.wait_config()?;
    for to in [17, 301] {
        suspend(session)?;
        while session.interrupted()? {}
        let (before, generation) = (changing(session)?, session.transport.config_generation()?);
        change(session, to)?;
        session.transport.status()?;
        ensure_eq("the field while SUSPEND shows", changing(session)?, before)?;
        ensure_eq("generation while SUSPEND shows", session.transport.config_generation()?, generation)?;
        ensure(!session.interrupted()?, "no interrupt while SUSPEND shows", "one came")?;
        resume(session)?;
        session.wait_config()?;
        let expected = changed(session, to);
        ensure_eq("the changed field", changing(session)?, expected)?;
    }
    revive(session, rings)?;
    Ok(Finding::Passed)
}
