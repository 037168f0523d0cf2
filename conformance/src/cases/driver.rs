//! The driver's role: what our driver writes into rings, and what a broken device can do to it. The case plays the
//! device.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use polyvirt_core::memory::{Access, Pages};
use polyvirt_core::queue::{AddError, Buffer, QueueError};
use polyvirt_core::transport::{Notify, Transport, TransportError, Virtqueue, initialize};
use polyvirt_core::{Features, Status};

use super::sample::{ensure, ensure_eq, revive};
use super::scripted::{Script, Scripted};
use crate::raw::{INDIRECT, Made, Memory, NEXT, Ring, WRITE};
use crate::suite::RingFormat::Split;
use crate::suite::{Applies, Call, Case, DriverRole, Finding, Objection, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new("driver/clean-start", "the driver starts with rings that say nothing", clean_start)
        .judges(&["N0071"])
        .packed_judges(&[]),
    Case::new("driver/alignment", "the areas of a ring are aligned as its format demands", alignment)
        .judges(&["N0036"])
        .packed_judges(&["N0085"]),
    Case::new("driver/flags", "the available flags are 0 or 1, and 0 with EVENT_IDX", flags)
        .judges(&["N0055", "N0057"])
        .only(Split),
    Case::new("driver/readable-first", "device-readable pieces come before device-writable ones", readable_first)
        .judges(&["N0039"])
        .packed_judges(&["N0099"]),
    Case::new("driver/queue-size", "no chain is longer than the queue", queue_size)
        .judges(&["N0049"])
        .packed_judges(&["N0098"]),
    Case::new("driver/no-indirect-unasked", "no indirect descriptors unless they were negotiated", no_indirect)
        .judges(&["N0047"])
        .packed_judges(&["N0105"]),
    Case::new("driver/indirect-well-formed", "an indirect descriptor stands alone and is not nested", indirect)
        .judges(&["N0048", "N0050", "N0049"])
        .packed_judges(&["N0106", "N0108"]),
    Case::new("driver/index-forward", "the available index only moves forward, across the wrap too", forward)
        .judges(&["N0054"])
        .only(Split),
    Case::new("driver/kicks-when-asked", "a device that wants to be kicked is", kicks)
        .judges(&["N0074", "N0072"])
        .packed_judges(&[]),
    Case::new("driver/kicks-not-when-not-asked", "a device that does not want to be kicked is not", no_kicks)
        .judges(&["N0073", "N0072"])
        .packed_judges(&[]),
    Case::new(
        "driver/avail-event",
        "with EVENT_IDX the device is kicked where it wants that, and not before",
        avail_event,
    )
    .judges(&["N0075", "N0076", "N0077"])
    .packed_judges(&[]),
    Case::new("driver/spurious-interrupt", "an interrupt for nothing is no harm", spurious)
        .judges(&["N0059"])
        .packed_judges(&[]),
    Case::new("driver/used-id-beyond", "the device returns an id that the queue does not have", id_beyond)
        .class(&[101]),
    Case::new("driver/used-id-not-in-flight", "the device returns an id that is not in flight", id_free).class(&[101]),
    Case::new("driver/used-id-no-head", "the device returns a descriptor in the middle of a chain", id_middle)
        .class(&[101]),
    Case::new("driver/used-id-twice", "the device returns a buffer twice", id_twice).class(&[101]),
    Case::new("driver/used-length-beyond", "the device claims more bytes than the buffer has", length_beyond)
        .class(&[102])
        .on(Applies::MODERN),
    Case::new(
        "driver/legacy-used-length",
        "a legacy device claims more bytes than the buffer has: those that it has count",
        legacy_length,
    )
    .class(&[102])
    .on(Applies::LEGACY),
    Case::new("driver/rewritten-descriptors", "the device rewrites the descriptor table", rewritten).class(&[103]),
    Case::new("driver/features-ok-refused", "the device does not keep FEATURES_OK", features_refused)
        .judges(&["N0262", "N0263"])
        .class(&[105])
        .on(Applies::MODERN),
    Case::new("driver/version-1-missing", "the device does not offer VERSION_1", version_1_missing)
        .judges(&["N1574"])
        .on(Applies::MODERN),
    Case::new(
        "driver/reset-after-failed",
        "after it gave up on a device the driver resets it before it starts over",
        after_failed,
    )
    .judges(&["N0003"])
    .on(Applies::MODERN),
    Case::new("driver/no-such-queue", "a queue that the device does not have", no_such_queue).class(&[106]),
];

/// A doorbell that counts.
#[derive(Clone, Default)]
pub(super) struct Counter(Arc<AtomicUsize>);

impl Counter {
    pub(super) fn kicks(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl Notify for Counter {
    fn notify(&mut self) -> Result<(), TransportError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Our driver's queue, and the same ring in the case's hands.
pub(super) struct Stage {
    pub(super) driver: Box<dyn DriverRole>,
    pub(super) ring: Ring,
    pub(super) kicks: Counter,
    buffer: Memory,
}

/// Sets the stage, with those of `features` that are offered. The real device never gets DRIVER_OK.
pub(super) fn stage(session: &mut Session, features: Features) -> Result<Stage, Objection> {
    stage_of(session, features, None)
}

/// The same, with a queue of `size` entries.
pub(super) fn stage_of(session: &mut Session, features: Features, size: Option<u16>) -> Result<Stage, Objection> {
    session.negotiate(features)?;
    let Virtqueue { config, descriptors, driver, device, .. } = session.transport.find_vq(0, size)?;
    let kicks = Counter::default();
    let virtqueue = |notify: Box<dyn Notify>| Virtqueue {
        config,
        descriptors: descriptors.clone(),
        driver: driver.clone(),
        device: device.clone(),
        notify,
    };
    let ring = Ring::new(virtqueue(Box::<Counter>::default()), 0, session.trace.clone())?;
    let poison = |pages: &Pages| pages.fill(0, pages.len(), 0xff);
    [&descriptors, &driver, &device].into_iter().try_for_each(poison)?;
    let driver = (session.driver_role)(virtqueue(Box::new(kicks.clone())))?;
    let buffer = Memory::new(session, 4096, Access::READ | Access::WRITE)?;
    Ok(Stage { driver, ring, kicks, buffer })
}

impl Stage {
    pub(super) fn piece(&self, number: u32) -> Buffer {
        Buffer { address: self.buffer.address + u64::from(number) * 16, len: 16 }
    }

    fn pieces(&self, count: u32) -> Vec<Buffer> {
        (0..count).map(|number| self.piece(number)).collect()
    }

    /// Adds a buffer and publishes it: what the device is given, and nothing else.
    pub(super) fn add(&mut self, readable: u32, writable: u32, token: u32) -> Result<Made, Objection> {
        let (readable, writable) = (self.pieces(readable), self.pieces(writable));
        let added = self.driver.add(&readable, &writable, token);
        added.map_err(|error| Objection::failed("room for a buffer", error))?;
        self.driver.kick()?;
        let made = self.ring.next_chain()?.ok_or_else(|| Objection::failed("a chain is available", "none is"))?;
        ensure(self.ring.next_chain()?.is_none(), "one chain is available", "two are")?;
        Ok(made)
    }

    /// The device gives the buffer `id` back, which is the one of `token`.
    pub(super) fn give_back(&mut self, id: u16, token: u32) -> Result<(), Objection> {
        self.ring.put_used_quietly(id.into(), 16);
        let got = self.driver.get()?;
        ensure(got == Some((token, 16)), format_args!("the buffer of {token} comes back"), format_args!("{got:?}"))
    }
}

fn clean_start(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    ensure(stage.ring.is_blank(), "rings that say nothing", "a chain, a used buffer or a wish")?;
    Ok(Finding::Passed)
}

fn alignment(session: &mut Session) -> Verdict {
    let stage = stage(session, Features::empty())?;
    let config = stage.ring.config;
    let alignments = match (session.cell.legacy, session.cell.ring) {
        (true, _) => [4096, 2, 4096],
        (false, RingFormat::Split) => [16, 2, 4],
        (false, RingFormat::Packed) => [16, 4, 4],
    };
    for (address, align) in [config.descriptors, config.driver, config.device].into_iter().zip(alignments) {
        ensure(address.is_multiple_of(align), format_args!("a multiple of {align}"), format_args!("{address:#x}"))?;
    }
    Ok(Finding::Passed)
}

fn flags(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for features in [Features::empty(), offered & Features::EVENT_IDX] {
        let mut stage = stage(session, features)?;
        let most = if features.is_empty() { 1 } else { 0 };
        for _ in 0..3 {
            stage.driver.disable();
            let flags = stage.ring.split().flags();
            ensure(flags <= most, format_args!("flags of at most {most}"), flags)?;
            stage.driver.enable();
            ensure_eq("flags", stage.ring.split().flags(), 0)?;
        }
    }
    Ok(Finding::Passed)
}

fn readable_first(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    for (readable, writable) in [(1, 1), (3, 2), (0, 2), (2, 0)] {
        let Made { chain, .. } = stage.add(readable, writable, 0)?;
        let directions: Vec<_> = chain.iter().map(|entry| entry.flags & WRITE != 0).collect();
        let expected: Vec<_> = (0..readable + writable).map(|number| number >= readable).collect();
        ensure_eq("device-writable flags", directions, expected)?;
    }
    Ok(Finding::Passed)
}

fn queue_size(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    let size = stage.ring.size();
    let pieces = vec![stage.piece(0); usize::from(size) + 1];
    let refused = stage.driver.add(&pieces, &[], 0);
    ensure(
        matches!(refused, Err(AddError::Pieces { .. })),
        "one piece too many is refused",
        format_args!("{refused:?}"),
    )?;
    stage.driver.kick()?;
    ensure(stage.ring.next_chain()?.is_none(), "nothing is made available of it", "a chain is")?;
    let added = stage.driver.add(&pieces[1..], &[], 0);
    ensure(added.is_ok(), "as many pieces as the queue has fit", format_args!("{added:?}"))?;
    stage.driver.kick()?;
    let len = stage.ring.next_chain()?.map(|made| made.chain.len());
    ensure_eq("descriptors", len, Some(usize::from(size)))?;
    Ok(Finding::Passed)
}

fn no_indirect(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    let tables = Memory::new(session, 65536, Access::READ)?;
    stage.driver = stage.driver.allow_indirect(tables.pages.clone(), tables.address);
    let Made { chain, .. } = stage.add(2, 2, 0)?;
    let none = chain.iter().all(|entry| entry.flags & INDIRECT == 0);
    ensure(none && chain.len() == 4, "four direct descriptors", format_args!("{chain:x?}"))?;
    Ok(Finding::Passed)
}

fn indirect(session: &mut Session) -> Verdict {
    if !session.transport.device_features()?.contains(Features::INDIRECT_DESC) {
        return Err(Objection::Skipped("the device does not offer indirect descriptors".into()));
    }
    let mut stage = stage(session, Features::INDIRECT_DESC)?;
    let len = u32::from(stage.ring.size()) * 16 * 4;
    let tables = Memory::new(session, len, Access::READ)?;
    stage.driver = stage.driver.allow_indirect(tables.pages.clone(), tables.address);
    let Made { chain, .. } = stage.add(2, 2, 0)?;
    let [named] = chain[..] else {
        return Err(Objection::failed("one descriptor in the ring", format!("{chain:x?}")));
    };
    ensure_eq("flags beside INDIRECT", named.flags & (INDIRECT | NEXT), INDIRECT)?;
    ensure_eq("bytes of the table", named.len, 64)?;
    let mut bytes = vec![0; named.len as usize];
    tables.pages.read((named.address - tables.address) as usize, &mut bytes)?;
    for (number, entry) in stage.ring.parse_table(&bytes).into_iter().enumerate() {
        ensure_eq("INDIRECT in a table", entry.flags & INDIRECT, 0)?;
        ensure_eq("device-writable flag", entry.flags & WRITE != 0, number >= 2)?;
        // Links are a matter of split rings; entries of a packed ring's table follow one another.
        ensure_eq("NEXT flag", entry.flags & NEXT != 0, number < 3 && !stage.ring.is_packed())?;
        ensure_eq("other flags", entry.flags & !(INDIRECT | WRITE | NEXT), 0)?;
    }
    Ok(Finding::Passed)
}

fn forward(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    for turn in 0..0x1_0010u32 {
        let before = stage.ring.split().available_index();
        let piece = stage.piece(0);
        let added = stage.driver.add(&[], &[piece], turn);
        added.map_err(|error| Objection::failed("room for a buffer", error))?;
        stage.driver.kick()?;
        let after = stage.ring.split().available_index();
        ensure(after == before.wrapping_add(1), format_args!("index {}", before.wrapping_add(1)), after)?;
        let head = stage.ring.split().entry(before);
        stage.give_back(head, turn)?;
    }
    Ok(Finding::Passed)
}

fn kicks(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    for event in [0, 1, 0x7fff, 0xffff] {
        // Without EVENT_IDX this word means nothing, whatever it holds.
        stage.ring.set_kick_event(event);
        stage.add(1, 0, 0)?;
        ensure_eq("kicks", stage.kicks.kicks(), 1)?;
    }
    Ok(Finding::Passed)
}

fn no_kicks(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    stage.ring.ask_for_kicks(false);
    for event in [0, 1, 2, 3] {
        stage.ring.set_kick_event(event);
        stage.add(1, 0, 0)?;
        ensure_eq("kicks", stage.kicks.kicks(), 0)?;
    }
    stage.ring.ask_for_kicks(true);
    stage.add(1, 0, 0)?;
    ensure_eq("kicks", stage.kicks.kicks(), 1)?;
    Ok(Finding::Passed)
}

fn avail_event(session: &mut Session) -> Verdict {
    if !session.transport.device_features()?.contains(Features::EVENT_IDX) {
        return Err(Objection::Skipped("the device does not offer VIRTIO_F_EVENT_IDX".into()));
    }
    let mut stage = stage(session, Features::EVENT_IDX)?;
    // Of a split ring the flags mean nothing now.
    stage.ring.ask_for_kicks(false);
    stage.ring.ask_for_kick_after(2);
    let mut seen = Vec::new();
    for _ in 0..5 {
        stage.add(1, 0, 0)?;
        seen.push(stage.kicks.kicks());
    }
    ensure_eq("kicks at entries 0 to 4", seen, vec![0, 0, 1, 0, 0])?;
    // Several entries at once that pass the event are one kick.
    stage.ring.ask_for_kick_after(1);
    for number in 0..4 {
        let piece = stage.piece(number);
        let added = stage.driver.add(&[piece], &[], 0);
        added.map_err(|error| Objection::failed("room for a buffer", error))?;
    }
    stage.driver.kick()?;
    ensure_eq("kicks", stage.kicks.kicks(), 1)?;
    Ok(Finding::Passed)
}

fn spurious(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    let Made { id, .. } = stage.add(0, 1, 7)?;
    for _ in 0..3 {
        let got = stage.driver.get()?;
        ensure(got.is_none(), "nothing where nothing was used", format_args!("{got:?}"))?;
    }
    stage.ring.put_used(id.into(), 16);
    let got = stage.driver.get()?;
    ensure(got == Some((7, 16)), "the buffer", format_args!("{got:?}"))?;
    let got = stage.driver.get()?;
    ensure(got.is_none(), "nothing more", format_args!("{got:?}"))?;
    Ok(Finding::Passed)
}

/// The driver refuses what the device says, every time it is asked, and keeps its buffers.
pub(super) fn refuses(session: &mut Session, mut stage: Stage, expected: impl Fn(QueueError) -> bool) -> Verdict {
    let in_flight = stage.driver.in_flight();
    for _ in 0..2 {
        match stage.driver.get() {
            Err(reason) if expected(reason) => {}
            other => return Err(Objection::failed("the driver refuses the used element", format!("{other:?}"))),
        }
    }
    ensure_eq("buffers in flight", stage.driver.in_flight(), in_flight)?;
    ensure_eq("buffers taken back after a reset", stage.driver.drain().len(), in_flight)?;
    revive(session, Vec::new())?;
    Ok(Finding::Rejected)
}

fn id_beyond(session: &mut Session) -> Verdict {
    // An id has 32 bits in a split ring, and 16 in a packed one.
    let beyond: &[u32] = match session.cell.ring {
        RingFormat::Split => &[0, 1 << 16, u32::MAX - 0x8000],
        RingFormat::Packed => &[0, 1, 0x7fff],
    };
    for more in beyond {
        let mut stage = stage(session, Features::empty())?;
        stage.add(0, 1, 0)?;
        let id = u32::from(stage.ring.size()) + more;
        stage.ring.put_used(id, 0);
        refuses(session, stage, |reason| matches!(reason, QueueError::UsedId { .. }))?;
    }
    Ok(Finding::Rejected)
}

fn id_free(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    let Made { id, .. } = stage.add(0, 1, 0)?;
    let free = (id + 1) % stage.ring.size();
    stage.ring.put_used(free.into(), 0);
    refuses(session, stage, |reason| matches!(reason, QueueError::UsedId { .. }))
}

fn id_middle(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    let Made { id, chain } = stage.add(1, 2, 0)?;
    // A packed ring has no heads, but our driver takes an id for each descriptor.
    let second = if stage.ring.is_packed() { (id + 1) % stage.ring.size() } else { chain[0].next };
    stage.ring.put_used(second.into(), 0);
    refuses(session, stage, |reason| matches!(reason, QueueError::UsedId { .. }))
}

fn id_twice(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    let Made { id, .. } = stage.add(0, 1, 1)?;
    stage.add(0, 1, 2)?;
    stage.give_back(id, 1)?;
    stage.ring.put_used(id.into(), 16);
    refuses(session, stage, |reason| matches!(reason, QueueError::UsedId { .. }))
}

fn length_beyond(session: &mut Session) -> Verdict {
    for len in [33, 0x8000_0000, u32::MAX] {
        let mut stage = stage(session, Features::empty())?;
        let Made { id, .. } = stage.add(1, 2, 0)?;
        stage.ring.put_used(id.into(), len);
        refuses(session, stage, |reason| matches!(reason, QueueError::UsedLength { .. }))?;
    }
    Ok(Finding::Rejected)
}

fn legacy_length(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    // Each buffer has 16 bytes to read and 32 to write.
    for (token, (len, counts)) in (0..).zip([(48, 32), (33, 32), (0x8000_0000, 32), (u32::MAX, 32), (32, 32)]) {
        let Made { id, .. } = stage.add(1, 2, token)?;
        stage.ring.put_used(id.into(), len);
        let got = stage.driver.get().map_err(|reason| {
            Objection::failed("a used length that legacy devices tell is no reason to stop", reason)
        })?;
        ensure_eq("the buffer, and the bytes that count", got, Some((token, counts)))?;
    }
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn rewritten(session: &mut Session) -> Verdict {
    let mut stage = stage(session, Features::empty())?;
    let size = stage.ring.size();
    for token in 0..100 {
        let Made { id, .. } = stage.add(1, 2, token)?;
        stage.ring.deface();
        stage.give_back(id, token)?;
        ensure_eq("free entries", stage.driver.free(), size)?;
    }
    Ok(Finding::Passed)
}

fn features_refused(session: &mut Session) -> Verdict {
    session.trace.clear();
    let mut scripted = Scripted::new(session.transport.clone(), Script { no_features_ok: true, ..Script::default() });
    let result = initialize(&mut scripted, Features::empty());
    let refused = matches!(result, Err(TransportError::FeaturesRefused(_)));
    ensure(refused, "the driver gives up", format_args!("{result:?}"))?;
    let calls = session.trace.calls();
    let failed = calls.iter().any(|call| matches!(call, Call::SetStatus(status) if status.contains(Status::FAILED)));
    ensure(failed, "the driver sets FAILED", "it does not")?;
    let went_on = calls.iter().any(|call| matches!(call, Call::FindVq(..)));
    ensure(!went_on, "the driver does not go on", "it sets up queues")?;
    revive(session, Vec::new())?;
    Ok(Finding::Rejected)
}

fn version_1_missing(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()? & !Features::VERSION_1;
    let script = Script { offered: Some(offered), ..Script::default() };
    let result = initialize(&mut Scripted::new(session.transport.clone(), script), Features::empty());
    let missing = matches!(result, Err(TransportError::FeaturesMissing(_)));
    ensure(missing, "a modern driver gives up", format_args!("{result:?}"))?;
    revive(session, Vec::new())?;
    Ok(Finding::Rejected)
}

fn after_failed(session: &mut Session) -> Verdict {
    let mut scripted = Scripted::new(session.transport.clone(), Script { no_features_ok: true, ..Script::default() });
    let _ = initialize(&mut scripted, Features::empty());
    session.trace.clear();
    let result = initialize(&mut session.transport, Features::empty());
    ensure(result.is_ok(), "the driver starts over", format_args!("{result:?}"))?;
    let first = session.trace.calls().into_iter().next();
    ensure(first == Some(Call::Reset), "a reset first", format_args!("{first:?}"))?;
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn no_such_queue(session: &mut Session) -> Verdict {
    session.negotiate(Features::empty())?;
    for index in [session.queues() + 8, 0x7fff, u16::MAX] {
        let max = session.transport.queue_max_size(index)?;
        ensure_eq("largest size of a queue that is not there:", max, 0)?;
        let refused = session.transport.find_vq(index, None);
        ensure(refused.is_err(), format_args!("queue {index} cannot be set up"), "it was")?;
    }
    revive(session, Vec::new())?;
    Ok(Finding::Rejected)
}
