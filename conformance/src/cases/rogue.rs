//! A driver that breaks the rules of the ring.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::transport::{BlockingTransport, Transport};

use super::chains::{PACKED_REFUSED, REFUSED};
use super::sample::{Attack, POISON, Sample, Tolerance, attack, ensure, only_allowed, revive};
use crate::raw::{Descriptor, Memory};
use crate::suite::{Applies, CONSOLE, Case, Finding, Objection, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new("ring/head-beyond-table", "a head that the table does not have", head_beyond)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[19])
        .only(RingFormat::Split),
    Case::new("ring/index-jump", "an available index further ahead than the queue is long", index_jump)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[19, 21])
        .only(RingFormat::Split),
    Case::new("ring/index-back", "an available index that goes back", index_back)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[19])
        .only(RingFormat::Split),
    Case::new("ring/same-head-twice", "the same head made available twice at once", twice)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[20]),
    Case::new("ring/same-head-in-flight", "a head that the device still holds is made available again", in_flight)
        .judges(REFUSED)
        .packed_judges(PACKED_REFUSED)
        .class(&[20, 21])
        .on(Applies::to(CONSOLE)),
    Case::new("ring/rewritten", "descriptors that change while the device reads them", rewritten).class(&[24]),
    Case::new(
        "ring/malformed-not-retried",
        "a malformed chain is looked at once, however often it is kicked",
        not_retried,
    )
    .class(&[26, 27]),
];

fn head_beyond(session: &mut Session) -> Verdict {
    for beyond in [0, 1, u16::MAX] {
        attack(session, Features::empty(), |session, rings, sample| {
            let ring = &mut rings[usize::from(sample.queue)];
            ring.chain(0, &sample.pieces);
            ring.offer(ring.size().saturating_add(beyond));
            Ok(Attack::new(session, sample, Tolerance::None))
        })?;
        session.transport.reset()?;
    }
    Ok(Finding::Rejected)
}

fn index_jump(session: &mut Session) -> Verdict {
    for jump in [1, 0x4000] {
        attack(session, Features::empty(), |session, rings, sample| {
            let ring = &mut rings[usize::from(sample.queue)];
            ring.chain(0, &sample.pieces);
            for slot in 0..ring.size() {
                ring.split().set_entry(slot, 0);
            }
            let index = ring.size() + jump;
            ring.split().set_available(index);
            Ok(Attack::new(session, sample, Tolerance::None).chains(u16::MAX))
        })?;
        session.transport.reset()?;
    }
    Ok(Finding::Rejected)
}

fn index_back(session: &mut Session) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let ring = &mut rings[usize::from(sample.queue)];
        ring.chain(0, &sample.pieces);
        // What is used before the index goes back was good.
        ring.offer(0);
        ring.kick()?;
        session.wait_used(ring)?;
        if session.cell.device_type == CONSOLE {
            session.far_side.output()?;
        }
        ring.split().set_available(0);
        Ok(Attack::new(session, sample, Tolerance::None).chains(u16::MAX))
    })
}

fn twice(session: &mut Session) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        let ring = &mut rings[usize::from(sample.queue)];
        ring.chain(0, &sample.pieces);
        ring.offer_all(&[0, 0]);
        Ok(Attack::new(session, sample, Tolerance::Lenient).chains(2))
    })
}

fn in_flight(session: &mut Session) -> Verdict {
    attack(session, Features::empty(), |session, rings, sample| {
        // Nobody types, so the device keeps what is in its receive queue.
        let buffer = Memory::writable(session, 16, POISON)?;
        let ring = &mut rings[0];
        ring.chain(0, &[(buffer.clone(), true)]);
        ring.offer(0);
        ring.kick()?;
        ring.offer(0);
        ring.kick()?;
        // A device that takes buffers only when it has something to put into them learns of it now.
        session.far_side.input(b"ab")?;
        ring.offer_all(&[0, 0]);
        let attack = Attack { queue: 0, ..Attack::new(session, sample, Tolerance::Lenient) };
        Ok(attack.and(&buffer, Access::WRITE))
    })
}

/// How often a descriptor is rewritten before others may use the processor.
const TURNS: u32 = 101;

fn rewritten(session: &mut Session) -> Verdict {
    // A thread turns descriptor 0 into nonsense and back while requests are made; whatever the device sees, it reads
    // it once, so it either serves or refuses.
    for _ in 0..20 {
        let mut rings = session.bring_up(Features::empty())?;
        let sample = Sample::new(session)?;
        let mark = session.probe.as_ref().map(crate::suite::Probe::mark);
        let ring = &mut rings[usize::from(sample.queue)];
        ring.chain(0, &sample.pieces);
        let good = sample.entries()[0];
        let bad = Descriptor { address: u64::MAX - 3, len: u32::MAX, ..good };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let mut spoil = ring.spoiler(good, bad);
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    // An odd number, so that others find it spoiled every second time where there is one processor.
                    (0..TURNS).for_each(|_| spoil());
                    std::thread::yield_now();
                }
            });
            let begun = Instant::now();
            let mut attempt = || -> Result<(), Objection> {
                for _ in 0..20 {
                    ring.offer(0);
                    ring.kick()?;
                    while ring.take().is_none() {
                        if session.needs_reset()? {
                            return Ok(());
                        }
                        let expected = "the device serves or refuses";
                        ensure(begun.elapsed() < session.watchdog, expected, "it does neither")?;
                        std::thread::yield_now();
                    }
                }
                Ok(())
            };
            let served = attempt();
            stop.store(true, Ordering::SeqCst);
            served
        })?;
        if let Some(mark) = mark {
            only_allowed(session, mark, &rings, &sample.ranges())?;
        }
        if session.cell.device_type == CONSOLE {
            session.far_side.output()?;
        }
        revive(session, rings)?;
    }
    Ok(Finding::Passed)
}

fn not_retried(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let sample = Sample::new(session)?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.offer_nonsense();
    ring.kick()?;
    session.wait_config()?;
    ensure(session.needs_reset()?, "DEVICE_NEEDS_RESET", "it is not set")?;
    let mark = session.probe()?.mark();
    let ring = &mut rings[usize::from(sample.queue)];
    for _ in 0..200 {
        ring.kick()?;
    }
    session.transport.status()?;
    let again = session.probe()?.since(mark)?.len();
    ensure(again == 0, "a broken queue is not looked at again", format_args!("{again} accesses in 200 kicks"))?;
    revive(session, rings)?;
    Ok(Finding::Rejected)
}
