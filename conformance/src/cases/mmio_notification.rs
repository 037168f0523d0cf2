//! What a driver tells beside the queue when it notifies over MMIO (VIRTIO_F_NOTIFICATION_DATA).

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::queue::Buffer;
use polyvirt_core::transport::{Transport, Virtqueue};
use polyvirt_transports::mmio::registers::QUEUE_NOTIFY;

use super::driver::Counter;
use super::init::serve_next;
use super::mmio::case;
use super::sample::{Sample, ensure, ensure_eq, serve};
use crate::raw::{Memory, Ring};
use crate::suite::{Case, Finding, Objection, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("mmio/notification-data", "notifications that say where the driver goes on, round the ring", told),
    case("mmio/notification-data-odd", "what else a notification says is a hint: any value, of any queue", odd)
        .class(&[26, 30]),
    case(
        "mmio/driver-notification-data",
        "(driver) a notification says where the driver goes on if that is negotiated, and nothing else if not",
        driver_tells,
    ),
];

fn need(session: &mut Session) -> Result<(), Objection> {
    match session.transport.device_features()?.contains(Features::NOTIFICATION_DATA) {
        true => Ok(()),
        false => Err(Objection::Skipped("the device does not offer VIRTIO_F_NOTIFICATION_DATA".into())),
    }
}

/// A running device with small rings, which is told where the driver goes on.
fn small_rings(session: &mut Session) -> Result<Vec<Ring>, Objection> {
    need(session)?;
    session.negotiate(Features::NOTIFICATION_DATA)?;
    let rings = (0..session.queues()).map(|index| session.ring_of(index, Some(8))).collect::<Result<_, _>>()?;
    session.go()?;
    Ok(rings)
}

/// What was written to QueueNotify behind the first `before` accesses.
fn notified(session: &Session, before: usize) -> Result<Vec<u64>, Objection> {
    let log = session.registers()?.log().split_off(before);
    Ok(log.into_iter().filter(|access| access.write && access.offset == QUEUE_NOTIFY).map(|it| it.value).collect())
}

fn told(session: &mut Session) -> Verdict {
    let mut rings = small_rings(session)?;
    let before = session.registers()?.log().len();
    for _ in 0..30 {
        serve_next(session, &mut rings)?;
    }
    let told = notified(session, before)?;
    ensure(told.iter().any(|value| value >> 16 != 0), "notifications with data", format_args!("{told:x?}"))?;
    Ok(Finding::Passed)
}

fn odd(session: &mut Session) -> Verdict {
    let mut rings = small_rings(session)?;
    for hint in [0xffff, 0, 1, 8, 0x7fff, 0x8000, 0x8007, 0x1234, 0xffff] {
        let notify = |session: &Session, queue: u32| -> Result<(), Objection> {
            let value = queue | hint << 16;
            session.trace.note(format!("write {value:#x} to QueueNotify"));
            Ok(session.registers()?.store(QUEUE_NOTIFY, &value.to_le_bytes())?)
        };
        for beyond in [u32::from(session.queues()) + 16, 0x7fff, 0xffff] {
            notify(session, beyond)?;
        }
        let sample = Sample::new(session)?;
        let ring = &mut rings[usize::from(sample.queue)];
        let head = ring.offered % ring.size();
        ring.chain(head, &sample.pieces);
        ring.offer(head);
        notify(session, sample.queue.into())?;
        let (id, len) = session.wait_used(ring)?;
        ensure_eq("used id", id, head.into())?;
        sample.check(session, len)?;
    }
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn driver_tells(session: &mut Session) -> Verdict {
    need(session)?;
    for (features, size) in
        [(Features::NOTIFICATION_DATA, Some(4)), (Features::NOTIFICATION_DATA, None), (Features::empty(), Some(4))]
    {
        session.negotiate(features)?;
        let Virtqueue { config, descriptors, driver, device, notify } = session.transport.find_vq(0, size)?;
        let copy = Virtqueue {
            config,
            descriptors: descriptors.clone(),
            driver: driver.clone(),
            device: device.clone(),
            notify: Box::<Counter>::default() as _,
        };
        // The case is the device: the real one never gets DRIVER_OK.
        let mut ring = Ring::new(copy, 0, session.trace.clone())?;
        let mut role = (session.driver_role)(Virtqueue { config, descriptors, driver, device, notify })?;
        let memory = Memory::new(session, 16, Access::WRITE)?;
        let piece = Buffer { address: memory.address, len: memory.len };
        for token in 0..20 {
            let before = session.registers()?.log().len();
            let added = role.add(&[], &vec![piece; 1 + token as usize % 3], token);
            added.map_err(|error| Objection::failed("room for a buffer", error))?;
            role.kick()?;
            let made = ring.next_chain()?.ok_or_else(|| Objection::failed("a chain is available", "none is"))?;
            let next = match ring.is_packed() {
                true => ring.packed().seen.pack(),
                false => ring.split().available_index(),
            };
            let data = if features.is_empty() { 0 } else { u64::from(next) << 16 };
            ensure_eq("what is written to QueueNotify", notified(session, before)?, vec![data])?;
            ring.put_used_quietly(made.id.into(), 0);
            let got = role.get()?;
            ensure(got == Some((token, 0)), "the buffer comes back", format_args!("{got:?}"))?;
        }
    }
    Ok(Finding::Passed)
}
