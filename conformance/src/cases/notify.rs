//! Notifications in both directions, and their suppression, as the device carries them out.

use polyvirt_core::Features;
use polyvirt_core::transport::Transport;

use super::init::serve_next;
use super::ring::{serve_many, small};
use super::sample::{Sample, ensure, offer, serve_told};
use crate::raw::Ring;
use crate::suite::{Case, Finding, Objection, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new("notify/interrupt-when-wanted", "with flags 0 every used buffer is told", wanted)
        .judges(&["N0062"])
        .packed_judges(&[]),
    Case::new("notify/no-interrupt-when-not-wanted", "with flags 1 used buffers are not told", unwanted)
        .judges(&["N0061"])
        .packed_judges(&[]),
    Case::new("notify/wanted-again", "interrupts come again when the driver wants them again", wanted_again)
        .judges(&["N0061", "N0062"])
        .packed_judges(&[]),
    Case::new("notify/used-event-ignored", "without EVENT_IDX used_event means nothing", event_ignored)
        .judges(&["N0060"])
        .class(&[22])
        .packed_judges(&[]),
    Case::new("notify/used-event-reached", "with EVENT_IDX the element at used_event is told", event_reached)
        .judges(&["N0064"])
        .packed_judges(&[]),
    Case::new(
        "notify/used-event-in-a-batch",
        "with EVENT_IDX the element at used_event is told, whichever of several that are used at once it is",
        event_in_a_batch,
    )
    .judges(&["N0064"])
    .packed_judges(&[]),
    Case::new("notify/used-event-not-reached", "with EVENT_IDX elements before used_event are not told", event_ahead)
        .judges(&["N0065"])
        .packed_judges(&[]),
    Case::new("notify/flags-ignored", "with EVENT_IDX the available flags mean nothing", flags_ignored)
        .judges(&["N0063"])
        .only(RingFormat::Split),
    Case::new("notify/used-event-poisoned", "any used_event at any time", event_poisoned).class(&[22]),
    Case::new("notify/used-flags", "the used flags are 0 or 1, and 0 with EVENT_IDX", used_flags)
        .judges(&["N0078", "N0080"])
        .only(RingFormat::Split),
    Case::new("notify/kick-asked-for", "an idle device asks for kicks", kick_asked_for)
        .judges(&["N0082"])
        .packed_judges(&[]),
    Case::new(
        "notify/kick-asked-for-after-a-burst",
        "a device that was given as much as its queue holds asks for kicks again",
        kick_asked_for_after_a_burst,
    )
    .judges(&["N0082"])
    .packed_judges(&[]),
    Case::new("notify/storm", "a storm of kicks for nothing", storm).judges(&["N0082"]).class(&[26]).packed_judges(&[]),
    Case::new("notify/kicks-for-other-queues", "kicks of queues that have nothing, among good ones", other_queues)
        .judges(&["N0082"])
        .class(&[26])
        .packed_judges(&[]),
];

/// Lets the device serve a sample, looking at the ring alone.
pub(super) fn serve_silently(session: &mut Session, rings: &mut [Ring]) -> Result<(), Objection> {
    let sample = offer(session, rings)?;
    let (_, len) = session.poll_used(&mut rings[usize::from(sample.queue)])?;
    sample.check(session, len)
}

fn queue(session: &Session) -> Result<usize, Objection> {
    Ok(usize::from(Sample::new(session)?.queue))
}

fn wanted(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    for _ in 0..10 {
        serve_told(session, &mut rings)?;
    }
    Ok(Finding::Passed)
}

/// Three requests that the driver does not want to hear of. The interrupt for the first, if one comes, comes before the
/// third is used.
pub(super) fn silence(session: &mut Session, rings: &mut [Ring]) -> Result<(), Objection> {
    while session.interrupted()? {}
    for _ in 0..3 {
        serve_silently(session, rings)?;
    }
    ensure(!session.interrupted()?, "no interrupt: the driver does not want one", "one came")
}

fn unwanted(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let queue = queue(session)?;
    rings[queue].want_interrupts(false);
    silence(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn wanted_again(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let queue = queue(session)?;
    for _ in 0..3 {
        rings[queue].want_interrupts(false);
        silence(session, &mut rings)?;
        rings[queue].want_interrupts(true);
        // The interrupt is waited for, so that none is still on its way when silence is asked for again.
        serve_told(session, &mut rings)?;
    }
    Ok(Finding::Passed)
}

fn event_ignored(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let queue = queue(session)?;
    for event in [0, 1, 0x7fff, 0x8000, 0xffff] {
        rings[queue].set_interrupt_event(event);
        serve_told(session, &mut rings)?;
    }
    Ok(Finding::Passed)
}

/// A device with EVENT_IDX; skipped where it is not offered.
pub(super) fn with_event_idx(session: &mut Session) -> Result<Vec<Ring>, Objection> {
    match session.transport.device_features()?.contains(Features::EVENT_IDX) {
        true => session.bring_up(Features::EVENT_IDX),
        false => Err(Objection::Skipped("the device does not offer VIRTIO_F_EVENT_IDX".into())),
    }
}

fn event_reached(session: &mut Session) -> Verdict {
    let mut rings = with_event_idx(session)?;
    let queue = queue(session)?;
    for _ in 0..10 {
        rings[queue].want_interrupt_after(0, 1);
        serve_told(session, &mut rings)?;
    }
    Ok(Finding::Passed)
}

fn event_in_a_batch(session: &mut Session) -> Verdict {
    const BATCH: u16 = 4;
    let mut rings = with_event_idx(session)?;
    let queue = queue(session)?;
    let descriptors = Sample::new(session)?.pieces.len();
    if descriptors * usize::from(BATCH) > usize::from(rings[queue].size()) {
        return Err(Objection::Skipped(format!("the queue has no room for {BATCH} requests")));
    }
    for wanted in (0..BATCH).rev() {
        while session.interrupted()? {}
        let samples = (0..BATCH).map(|_| Sample::new(session)).collect::<Result<Vec<_>, _>>()?;
        let ring = &mut rings[queue];
        let heads: Vec<_> = (0..BATCH).map(|number| number * descriptors as u16).collect();
        for (sample, head) in samples.iter().zip(&heads) {
            ring.chain(*head, &sample.pieces);
        }
        ring.want_interrupt_after(wanted, descriptors);
        ring.offer_all(&heads);
        ring.kick()?;
        // By looking alone: waiting would say anew when an interrupt is wanted.
        for _ in &samples {
            session.poll_used(ring)?;
        }
        session.wait_interrupt()?;
    }
    Ok(Finding::Passed)
}

fn event_ahead(session: &mut Session) -> Verdict {
    let mut rings = with_event_idx(session)?;
    let queue = queue(session)?;
    let descriptors = Sample::new(session)?.pieces.len();
    rings[queue].want_interrupt_after(4, descriptors);
    // Elements 0, 1 and 2 are not told, element 3 is served but not told either, element 4 is.
    silence(session, &mut rings)?;
    serve_silently(session, &mut rings)?;
    serve_told(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn flags_ignored(session: &mut Session) -> Verdict {
    let mut rings = with_event_idx(session)?;
    let queue = queue(session)?;
    rings[queue].want_interrupts(false);
    for _ in 0..3 {
        rings[queue].want_interrupt_after(0, 1);
        serve_told(session, &mut rings)?;
    }
    rings[queue].want_interrupts(true);
    // The element that was used last.
    rings[queue].want_interrupt_after(u16::MAX, 1);
    silence(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn event_poisoned(session: &mut Session) -> Verdict {
    let mut rings = with_event_idx(session)?;
    let queue = queue(session)?;
    for event in [0xffff, 0x8000, 0x7fff, 0, 1, 2, 0x1234, 0xfffe] {
        rings[queue].set_interrupt_event(event);
        serve_silently(session, &mut rings)?;
    }
    while session.interrupted()? {}
    serve_next(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn used_flags(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for features in [Features::empty(), offered & Features::EVENT_IDX] {
        let mut rings = session.bring_up(features)?;
        let queue = queue(session)?;
        for _ in 0..5 {
            let sample = offer(session, &mut rings)?;
            let flags = rings[queue].split().used_flags();
            ensure(flags <= 1, "used flags of 0 or 1", flags)?;
            let (_, len) = session.wait_used(&mut rings[queue])?;
            sample.check(session, len)?;
            let flags = rings[queue].split().used_flags();
            let allowed = if features.contains(Features::EVENT_IDX) { 0 } else { 1 };
            ensure(flags <= allowed, format_args!("used flags of at most {allowed}"), flags)?;
        }
    }
    Ok(Finding::Passed)
}

fn kick_asked_for(session: &mut Session) -> Verdict {
    // A device that is done and asks for no kicks would never hear of more. It may say so a moment after it used the
    // last buffer, so the one behind it is the fence.
    let mut rings = session.bring_up(Features::empty())?;
    let queue = queue(session)?;
    for _ in 0..3 {
        serve_next(session, &mut rings)?;
    }
    wait_asked(session, &rings[queue])?;
    Ok(Finding::Passed)
}

/// Waits until the device asks for kicks, having nothing to do.
fn wait_asked(session: &Session, ring: &Ring) -> Result<(), Objection> {
    let begun = std::time::Instant::now();
    while !ring.asks_for_kicks() {
        let expected = "an idle device asks for kicks";
        ensure(begun.elapsed() < session.watchdog, expected, "it keeps saying that it wants none")?;
        std::thread::yield_now();
    }
    Ok(())
}

fn kick_asked_for_after_a_burst(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let queue = queue(session)?;
    let pieces = small(session)?;
    // As many chains as there can be, in one go: a device may stop behind them, and be called again.
    let count = rings[queue].size() / pieces.len() as u16;
    serve_many(session, &mut rings, count, &pieces)?;
    wait_asked(session, &rings[queue])?;
    serve_next(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn storm(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve_told(session, &mut rings)?;
    let queue = queue(session)?;
    for _ in 0..500 {
        for ring in &mut rings {
            ring.kick()?;
        }
    }
    session.transport.status()?;
    ensure(!rings[queue].has_used(), "nothing used for nothing", "something was")?;
    ensure(!session.interrupted()?, "no interrupt for nothing", "one came")?;
    serve_next(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn other_queues(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    for _ in 0..20 {
        for ring in &mut rings {
            ring.kick()?;
        }
        let sample = offer(session, &mut rings)?;
        for ring in &mut rings {
            ring.kick()?;
        }
        let (_, len) = session.wait_used(&mut rings[usize::from(sample.queue)])?;
        sample.check(session, len)?;
        for ring in &rings {
            ensure(!ring.has_used(), "nothing used for nothing", "something was")?;
        }
    }
    Ok(Finding::Passed)
}
