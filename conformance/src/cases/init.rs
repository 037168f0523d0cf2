//! Status, initialization, reset.

use polyvirt_core::transport::{BlockingTransport, Transport};
use polyvirt_core::{Features, Status};

use super::features::framing;
use super::sample::{Sample, ensure, ensure_eq, offer, only_allowed, revive, serve, serve_told, shown, touches};
use crate::raw::Ring;
use crate::suite::{Applies, CONSOLE, Call, Case, Finding, Objection, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new(
        "init/status-after-reset",
        "a reset brings the status back to 0, however far the driver was",
        after_reset,
    )
    .judges(&["N0021"]),
    Case::new("init/status-as-written", "each step of the driver's initialization shows in the status", as_written)
        .judges(&["N0018"]),
    Case::new("init/serves-a-request", "after the initialization sequence the device serves", serves),
    Case::new("init/one-queue", "a queue is served although others of the device are not set up", one_queue)
        .on(Applies::to(CONSOLE))
        .class(&[35]),
    Case::new("init/again-after-reset", "after a reset the device is initialized and serves as before", again)
        .judges(&["N0020", "N0021"]),
    Case::new("init/nothing-before-driver-ok", "buffers and kicks before DRIVER_OK wait for it", before_driver_ok)
        .judges(&["N0005"])
        .class(&[26])
        .on(Applies::MODERN),
    Case::new("init/served-without-another-kick", "what was available at DRIVER_OK is served then", without_kick),
    Case::new("init/driver-ok-twice", "DRIVER_OK written again changes nothing", driver_ok_twice).class(&[34]),
    Case::new("init/driver-ok-alone", "DRIVER_OK without FEATURES_OK does not start the device", driver_ok_alone)
        .judges(&["N0005"])
        .class(&[34])
        .on(Applies::MODERN),
    Case::new("init/bit-cleared", "a driver that clears a status bit does not break the device", bit_cleared)
        .class(&[34]),
    Case::new("init/failed", "after FAILED nothing is served until a reset", failed).class(&[34]),
    Case::new("init/all-bits-at-once", "status 3 in one write, and bits that are not the driver's", odd_bits)
        .class(&[34]),
    Case::new("init/no-queue", "DRIVER_OK with no queue set up", no_queue).class(&[35]),
    Case::new(
        "init/silent-after-reset",
        "after a reset neither memory is touched nor interrupts come",
        after_reset_silent,
    )
    .judges(&["N0022"])
    .class(&[26, 36]),
    Case::new("init/reset-during-requests", "a reset with a full queue ends all accesses to it", reset_busy)
        .judges(&["N0022"])
        .class(&[25, 36]),
    Case::new(
        "init/needs-reset-is-told",
        "a device that cannot go on sets DEVICE_NEEDS_RESET and notifies",
        needs_reset,
    )
    .judges(&["N0006", "N0007"]),
    Case::new("init/needs-reset-lasts", "a device that needs a reset serves nothing before it", needs_reset_lasts)
        .judges(&["N0006"])
        .class(&[27]),
    Case::new("init/driver-sequence", "the driver takes the steps of initialization in their order", driver_sequence)
        .judges(&["N0258", "N0264", "N0001", "N0002"]),
];

fn serves(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn after_reset(session: &mut Session) -> Verdict {
    let mut status = Status::empty();
    for step in [Status::ACKNOWLEDGE, Status::DRIVER, Status::FEATURES_OK, Status::DRIVER_OK] {
        if session.cell.legacy && step == Status::FEATURES_OK {
            continue;
        }
        status |= step;
        session.transport.reset()?;
        if status.intersects(Status::FEATURES_OK | Status::DRIVER_OK) {
            session.negotiate(Features::empty())?;
        }
        session.transport.set_status(status)?;
        session.transport.reset()?;
        ensure_eq("status after a reset", session.transport.status()?, Status::empty())?;
    }
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    session.transport.reset()?;
    ensure_eq("status after a reset", session.transport.status()?, Status::empty())?;
    Ok(Finding::Passed)
}

fn as_written(session: &mut Session) -> Verdict {
    session.transport.reset()?;
    let mut status = Status::ACKNOWLEDGE;
    session.transport.set_status(status)?;
    ensure_eq("status", session.transport.status()?, status)?;
    status |= Status::DRIVER;
    session.transport.set_status(status)?;
    ensure_eq("status", session.transport.status()?, status)?;
    let offered = session.transport.device_features()?;
    session.transport.set_driver_features(offered & Features::VERSION_1)?;
    if !session.cell.legacy {
        status |= Status::FEATURES_OK;
        session.transport.set_status(status)?;
        ensure_eq("status", session.transport.status()?, status)?;
    }
    let mut rings = session.rings()?;
    status |= Status::DRIVER_OK;
    session.transport.set_status(status)?;
    ensure_eq("status", session.transport.status()?, status)?;
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn again(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for _ in 0..3 {
        let mut rings = session.bring_up(offered & (Features::EVENT_IDX | Features::INDIRECT_DESC))?;
        serve(session, &mut rings)?;
        session.transport.reset()?;
        ensure_eq("offered features", session.transport.device_features()?, offered)?;
    }
    let rings = session.bring_up(Features::empty())?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

/// Fails if the device used anything or touched anything that belongs to the rings or the sample.
fn untouched(
    session: &mut Session,
    rings: &[Ring],
    sample: &Sample,
    mark: crate::suite::Mark,
    when: &str,
) -> Result<(), Objection> {
    let ring = &rings[usize::from(sample.queue)];
    // Where the host owns the rings, it may have cleared them.
    ensure(!ring.has_used() || ring.is_rewound(), format_args!("nothing used {when}"), "something was")?;
    let ranges: Vec<_> = rings.iter().flat_map(Ring::areas).chain(sample.ranges()).collect();
    for access in session.probe()?.since(mark)? {
        let touched = ranges.iter().any(|&(address, len, _)| touches(access, address, len));
        ensure(!touched, format_args!("no access to rings and buffers {when}"), shown(access))?;
    }
    Ok(())
}

fn before_driver_ok(session: &mut Session) -> Verdict {
    session.negotiate(Features::empty())?;
    let mut rings = session.rings()?;
    let mark = session.probe()?.mark();
    let sample = offer(session, &mut rings)?;
    // Reading the status makes sure that the kick has been seen, or never will be before DRIVER_OK.
    session.transport.status()?;
    untouched(session, &rings, &sample, mark, "before DRIVER_OK")?;
    ensure(!session.interrupted()?, "no interrupt before DRIVER_OK", "one came")?;
    session.go()?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.kick()?;
    let (_, len) = session.wait_used(ring)?;
    sample.check(session, len)?;
    Ok(Finding::Passed)
}

fn without_kick(session: &mut Session) -> Verdict {
    session.negotiate(Features::empty())?;
    let mut rings = session.rings()?;
    let sample = Sample::new(session)?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    // A driver that follows the spec kicks after DRIVER_OK; the kick here comes too early on purpose.
    ring.kick()?;
    session.go()?;
    let (_, len) = session.wait_used(ring)?;
    sample.check(session, len)?;
    Ok(Finding::Passed)
}

fn driver_ok_twice(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    let status = session.transport.status()?;
    session.transport.set_status(status)?;
    session.transport.set_status(status)?;
    if session.needs_reset()? {
        revive(session, rings)?;
        return Ok(Finding::Rejected);
    }
    serve_next(session, &mut rings)?;
    Ok(Finding::Passed)
}

/// Lets a running device serve another sample on rings that were used before. Whoever keeps the sample makes sure that
/// the next one has other memory.
pub fn serve_next(session: &mut Session, rings: &mut [Ring]) -> Result<Sample, Objection> {
    let sample = Sample::new(session)?;
    let ring = &mut rings[usize::from(sample.queue)];
    // Another head and another place in the ring each time.
    let head = ring.offered % ring.size();
    ring.chain(head, &sample.pieces);
    ring.offer(head);
    ring.kick()?;
    let (id, len) = session.wait_used(ring)?;
    ensure_eq("used id", id, head.into())?;
    sample.check(session, len)?;
    Ok(sample)
}

fn one_queue(session: &mut Session) -> Verdict {
    for _ in 0..2 {
        session.negotiate(Features::empty())?;
        let sample = Sample::new(session)?;
        let mut ring = session.ring(sample.queue)?;
        session.go()?;
        ring.chain(0, &sample.pieces);
        ring.offer(0);
        ring.kick()?;
        let (id, len) = session.wait_used(&mut ring)?;
        ensure_eq("used id", id, 0)?;
        sample.check(session, len)?;
        session.transport.reset()?;
    }
    Ok(Finding::Passed)
}

fn driver_ok_alone(session: &mut Session) -> Verdict {
    session.transport.reset()?;
    session.transport.set_status(Status::ACKNOWLEDGE)?;
    session.transport.set_status(Status::ACKNOWLEDGE | Status::DRIVER)?;
    session.transport.set_driver_features(Features::VERSION_1)?;
    let mut rings = session.rings()?;
    session.transport.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::DRIVER_OK)?;
    let mark = session.probe()?.mark();
    let sample = offer(session, &mut rings)?;
    session.transport.status()?;
    untouched(session, &rings, &sample, mark, "without FEATURES_OK")?;
    revive(session, rings)?;
    Ok(Finding::Rejected)
}

fn bit_cleared(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    let status = session.transport.status()?;
    for bit in [Status::ACKNOWLEDGE, Status::DRIVER, Status::FEATURES_OK, Status::DRIVER_OK] {
        session.transport.set_status(status & !bit)?;
    }
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn failed(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    let status = session.transport.status()?;
    session.transport.set_status(status | Status::FAILED)?;
    ensure(session.transport.status()?.contains(Status::FAILED), "FAILED stays", "it is gone")?;
    // Written, but nobody may serve it.
    let sample = offer(session, &mut rings)?;
    session.transport.set_status(status)?;
    session.transport.status()?;
    ensure(!rings[usize::from(sample.queue)].has_used(), "nothing used after FAILED", "something was")?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn odd_bits(session: &mut Session) -> Verdict {
    for status in [0x03, 0x0f, 0x40, 0x10, 0x20, 0x7f, 0xff] {
        session.transport.reset()?;
        session.transport.set_status(Status::from_bits_retain(status))?;
        session.transport.status()?;
    }
    let rings = Vec::new();
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn no_queue(session: &mut Session) -> Verdict {
    session.negotiate(Features::empty())?;
    session.go()?;
    session.transport.status()?;
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn after_reset_silent(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve_told(session, &mut rings)?;
    session.transport.reset()?;
    let mark = session.probe()?.mark();
    let sample = Sample::new(session)?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    // Where the doorbell is an event channel, the reset has closed it: then it cannot even be rung.
    let _ = ring.kick();
    session.transport.status()?;
    untouched(session, &rings, &sample, mark, "after a reset")?;
    ensure(!session.interrupted()?, "no interrupt after a reset", "one came")?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn reset_busy(session: &mut Session) -> Verdict {
    for _ in 0..8 {
        let mut rings = session.bring_up(Features::empty())?;
        let mut samples = Vec::new();
        let pieces = Sample::new(session)?.pieces.len() as u16;
        let queue = usize::from(Sample::new(session)?.queue);
        let count = (rings[queue].size() / pieces).min(16);
        for number in 0..count {
            let sample = Sample::new(session)?;
            rings[queue].chain(number * pieces, &sample.pieces);
            samples.push(sample);
        }
        let heads: Vec<_> = (0..count).map(|number| number * pieces).collect();
        rings[queue].offer_all(&heads);
        rings[queue].kick()?;
        session.transport.reset()?;
        let mark = session.probe()?.mark();
        let used = rings[queue].used_bytes()?;
        let old: Vec<_> = rings.iter().flat_map(Ring::areas).chain(samples.iter().flat_map(Sample::ranges)).collect();
        // The new run keeps the old memory alive, so an access to it would be seen.
        let mut fresh = session.bring_up(Features::empty())?;
        if session.cell.device_type == crate::suite::CONSOLE {
            // What the old run printed before the reset is its business.
            let _ = session.far_side.output();
        }
        serve(session, &mut fresh)?;
        if !session.cell.legacy {
            ensure(rings[queue].used_bytes()? == used, "the old ring as it was", "it changed")?;
            for access in session.probe()?.since(mark)? {
                let new = fresh.iter().flat_map(Ring::areas).any(|(address, len, _)| touches(access, address, len));
                let touched = old.iter().any(|&(address, len, _)| touches(access, address, len));
                ensure(new || !touched, "no access to the old rings and buffers after a reset", shown(access))?;
            }
        }
        session.transport.reset()?;
        session.probe()?.clear();
    }
    Ok(Finding::Passed)
}

fn needs_reset(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let sample = Sample::new(session)?;
    while session.interrupted()? {}
    rings[usize::from(sample.queue)].offer_nonsense();
    rings[usize::from(sample.queue)].kick()?;
    session.wait_config()?;
    ensure(session.needs_reset()?, "DEVICE_NEEDS_RESET", session.transport.status()?.bits())?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn needs_reset_lasts(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let sample = Sample::new(session)?;
    rings[usize::from(sample.queue)].offer_nonsense();
    rings[usize::from(sample.queue)].kick()?;
    session.wait_config()?;
    let mark = session.probe()?.mark();
    // A good request, in place of the bad one and behind it.
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer_instead(0);
    for _ in 0..100 {
        ring.kick()?;
    }
    session.transport.status()?;
    let ring = &rings[usize::from(sample.queue)];
    ensure(!ring.has_used(), "nothing used", "something was")?;
    only_allowed(session, mark, &[], &[])?;
    revive(session, rings)?;
    Ok(Finding::Rejected)
}

fn driver_sequence(session: &mut Session) -> Verdict {
    session.trace.clear();
    let mut rings = session.bring_up(!framing())?;
    serve(session, &mut rings)?;
    let calls = session.trace.calls();
    let position = |wanted: &dyn Fn(&Call) -> bool| calls.iter().position(wanted);
    let writes = |bits: Status| position(&|call| matches!(call, Call::SetStatus(status) if status.contains(bits)));
    let mut steps = vec![
        ("a reset", position(&|call| *call == Call::Reset)),
        ("ACKNOWLEDGE", writes(Status::ACKNOWLEDGE)),
        ("DRIVER", writes(Status::DRIVER)),
        ("reading the features", position(&|call| matches!(call, Call::DeviceFeatures(_)))),
        ("accepting features", position(&|call| matches!(call, Call::SetDriverFeatures(_)))),
    ];
    if !session.cell.legacy {
        let features_ok = |call: &Call| matches!(call, Call::Status(status) if status.contains(Status::FEATURES_OK));
        steps.push(("FEATURES_OK", writes(Status::FEATURES_OK)));
        steps.push(("reading FEATURES_OK back", position(&features_ok)));
    }
    steps.push(("queues", position(&|call| matches!(call, Call::FindVq(..)))));
    steps.push(("DRIVER_OK", writes(Status::DRIVER_OK)));
    steps.push(("the first kick", position(&|call| matches!(call, Call::Notify(_)))));
    let mut last = 0;
    for (step, at) in steps {
        let Some(at) = at else { return Err(Objection::failed(step, "the driver left it out")) };
        ensure(at >= last, format_args!("{step} in its turn"), "it came too early")?;
        last = at;
    }
    let written = calls.iter().filter_map(|call| match call {
        Call::SetStatus(status) => Some(*status),
        _ => None,
    });
    let mut before = Status::empty();
    for status in written {
        ensure(
            status.contains(before),
            "a driver that clears no status bit",
            format_args!("{before:?}, then {status:?}"),
        )?;
        before = status;
    }
    Ok(Finding::Passed)
}
