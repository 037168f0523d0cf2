//! How a virtio-pci device interrupts: vectors, masks and pending bits; the pin and the interrupt status.

use polyvirt_core::Features;
use polyvirt_core::transport::{BlockingTransport, Transport};
use polyvirt_transports::pci::registers::*;

use super::pci::{no_bus_master, serve_silently};
use super::sample::{ensure, ensure_eq, revive, serve};
use crate::suite::{Applies, BLK, CONSOLE, Case, Finding, Objection, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("pci/msix-table", "there are enough vectors, and table and pending bits are where they should be", table)
        .judges(&["N0365", "N0366"])
        .once(),
    case("pci/vectors", "any event can be mapped to any vector, and unmapped", vectors)
        .judges(&["N0368", "N0369", "N0370", "N0372", "N0373"])
        .class(&[30])
        .once(),
    case("pci/vectors-after-reset", "after a reset no event is mapped", vectors_after_reset).judges(&["N0371"]).once(),
    case("pci/no-vector", "what is not mapped does not interrupt", no_vector).judges(&["N0386", "N0387"]).once(),
    case("pci/masked", "a masked vector waits in its pending bit", masked).judges(&["N0281"]).once(),
    case("pci/bus-master-messages", "without Bus Master Enable no message is sent", bus_master)
        .judges(&["N0281"])
        .once(),
    case("pci/isr", "without messages the interrupt status says what happened, once", isr)
        .judges(&["N0347", "N0348", "N0349"])
        .once(),
    case("pci/isr-config", "a configuration change shows in the interrupt status", isr_config)
        .judges(&["N0346"])
        .once(),
];

const fn case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).on(Applies::PCI)
}

/// The control word of MSI-X.
fn control(session: &Session) -> Result<u64, Objection> {
    let found = session.capabilities(CAP_MSIX)?;
    let at = found.first().ok_or_else(|| Objection::Skipped("the device has no MSI-X".into()))?;
    Ok(at + u64::from(MSIX_CONTROL))
}

/// Where the table and the pending bits are.
fn table_and_pending(session: &Session) -> Result<[u64; 2], Objection> {
    let at = control(session)? - u64::from(MSIX_CONTROL);
    let place = |field: u16| {
        let word = session.get32(at + u64::from(field))?;
        Ok::<_, Objection>(region((word & 7) as u8) + u64::from(word & !7))
    };
    Ok([place(MSIX_TABLE)?, place(MSIX_PENDING)?])
}

fn len(session: &Session) -> Result<u16, Objection> {
    Ok((session.get16(control(session)?)? & MSIX_LEN) + 1)
}

fn table(session: &mut Session) -> Verdict {
    let vectors = len(session)?;
    ensure((2..=0x800).contains(&vectors), "2 to 2048 vectors", vectors)?;
    let [table, pending] = table_and_pending(session)?;
    for vector in 0..u64::from(vectors) {
        let entry = table + MSIX_ENTRY * vector;
        let old: [u8; 4] = session.get(entry + 8)?;
        session.put(entry + 8, &0x1234u32.to_le_bytes())?;
        ensure_eq("the data of an entry", session.get32(entry + 8)?, 0x1234)?;
        session.put(entry + 8, &old)?;
    }
    session.put(pending, &[0xff; 4])?;
    ensure_eq("pending bits, which cannot be written", session.get32(pending)?, 0)?;
    Ok(Finding::Passed)
}

/// Each event, as the fields that say its vector after `select`.
fn events(session: &Session) -> Result<Vec<(Option<u16>, u64)>, Objection> {
    let base = session.common(0)?;
    let queues = (0..session.queues()).map(|queue| (Some(queue), base + common::QUEUE_VECTOR));
    Ok([(None, base + common::CONFIG_VECTOR)].into_iter().chain(queues).collect())
}

fn select(session: &Session, queue: Option<u16>) -> Result<(), Objection> {
    match queue {
        Some(queue) => session.put(session.common(common::QUEUE_SELECT)?, &queue.to_le_bytes()),
        None => Ok(()),
    }
}

fn vectors(session: &mut Session) -> Verdict {
    session.transport.reset()?;
    let vectors = len(session)?;
    for (queue, field) in events(session)? {
        select(session, queue)?;
        for vector in (0..vectors).chain([NO_VECTOR]) {
            session.put(field, &vector.to_le_bytes())?;
            ensure_eq("the vector that was mapped", session.get16(field)?, vector)?;
        }
        for beyond in [vectors, 0x7ff, 0x800, 0xfffe].into_iter().filter(|beyond| *beyond >= vectors) {
            session.put(field, &0u16.to_le_bytes())?;
            session.put(field, &beyond.to_le_bytes())?;
            ensure_eq("a vector that does not exist", session.get16(field)?, NO_VECTOR)?;
        }
    }
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn vectors_after_reset(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    session.transport.reset()?;
    for (queue, field) in events(session)? {
        select(session, queue)?;
        ensure_eq("the vector after a reset", session.get16(field)?, NO_VECTOR)?;
    }
    revive(session, rings)?;
    Ok(Finding::Passed)
}

/// Changes the configuration from far away; false if this device has none that changes.
fn change(session: &mut Session) -> Result<bool, Objection> {
    match session.cell.device_type {
        BLK => session.far_side.set_capacity(300)?,
        CONSOLE => session.far_side.resize(30, 30)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// Waits until the device has taken notice of a change: the configuration reads as the far side made it.
fn wait_changed(session: &mut Session, before: [u8; 4]) -> Result<(), Objection> {
    let begun = std::time::Instant::now();
    let device = session.structure(CAP_DEVICE)?.base;
    while session.get::<4>(device)? == before {
        ensure(begun.elapsed() < session.watchdog, "another configuration", "it stays the same")?;
        std::thread::yield_now();
    }
    Ok(())
}

fn no_vector(session: &mut Session) -> Verdict {
    // VIRTIO_CONSOLE_F_SIZE.
    let mut rings = session.bring_up(Features::bit(0))?;
    for (queue, field) in events(session)? {
        select(session, queue)?;
        session.put(field, &NO_VECTOR.to_le_bytes())?;
    }
    serve_silently(session, &mut rings)?;
    let before = session.get(session.structure(CAP_DEVICE)?.base)?;
    if change(session)? {
        wait_changed(session, before)?;
    }
    // Whatever was to come is there when the device has answered again.
    session.transport.status()?;
    serve_silently(session, &mut rings)?;
    ensure(!session.interrupted()?, "no interrupt of an event that is not mapped", "one came")?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn masked(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    while session.interrupted()? {}
    let ([table, pending], vectors) = (table_and_pending(session)?, len(session)?);
    let mask = |session: &Session, bit: u32| -> Result<(), Objection> {
        (0..u64::from(vectors)).try_for_each(|v| session.put(table + MSIX_ENTRY * v + 12, &bit.to_le_bytes()))
    };
    mask(session, ENTRY_MASKED)?;
    serve_silently(session, &mut rings)?;
    let begun = std::time::Instant::now();
    while session.get32(pending)? == 0 {
        ensure(begun.elapsed() < session.watchdog, "a pending bit", "there is none")?;
        std::thread::yield_now();
    }
    ensure(!session.interrupted()?, "no interrupt while all vectors are masked", "one came")?;
    mask(session, 0)?;
    session.wait_interrupt()?;
    ensure_eq("pending bits after the interrupt", session.get32(pending)?, 0)?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn bus_master(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    while session.interrupted()? {}
    let ([table, pending], vectors) = (table_and_pending(session)?, len(session)?);
    let mask = |session: &Session, bit: u32| -> Result<(), Objection> {
        (0..u64::from(vectors)).try_for_each(|v| session.put(table + MSIX_ENTRY * v + 12, &bit.to_le_bytes()))
    };
    // A message that waits is sent when its vector is unmasked, unless something else keeps it.
    mask(session, ENTRY_MASKED)?;
    serve_silently(session, &mut rings)?;
    let begun = std::time::Instant::now();
    while session.get32(pending)? == 0 {
        ensure(begun.elapsed() < session.watchdog, "a pending bit", "there is none")?;
        std::thread::yield_now();
    }
    let command = no_bus_master(session)?;
    mask(session, 0)?;
    session.transport.status()?;
    ensure(!session.interrupted()?, "no message without Bus Master Enable", "one came")?;
    session.put(COMMAND.into(), &command)?;
    serve(session, &mut rings)?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

/// Waits until the interrupt shows in the header's status, where looking changes nothing.
fn wait_pin(session: &Session) -> Result<(), Objection> {
    let begun = std::time::Instant::now();
    while session.get16(STATUS.into())? & STATUS_INTERRUPT == 0 {
        ensure(begun.elapsed() < session.watchdog, "the interrupt bit in the header's status", "it stays 0")?;
        std::thread::yield_now();
    }
    Ok(())
}

fn isr(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let (at, isr) = (control(session)?, session.structure(CAP_ISR)?.base);
    let old: [u8; 2] = session.get(at)?;
    session.put(at, &(u16::from_le_bytes(old) & !MSIX_ENABLE).to_le_bytes())?;
    session.get::<1>(isr)?;
    for _ in 0..2 {
        let status = session.get16(STATUS.into())?;
        ensure(status & STATUS_INTERRUPT == 0, "no interrupt in the header's status", format_args!("{status:#x}"))?;
        serve_silently(session, &mut rings)?;
        wait_pin(session)?;
        ensure_eq("the interrupt status", session.get::<1>(isr)?, [ISR_QUEUE])?;
        ensure_eq("the interrupt status, read again", session.get::<1>(isr)?, [0])?;
        ensure_eq("the header's interrupt bit", session.get16(STATUS.into())? & STATUS_INTERRUPT, 0)?;
    }
    session.put(at, &old)?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn isr_config(session: &mut Session) -> Verdict {
    let rings = session.bring_up(Features::bit(0))?;
    let isr = session.structure(CAP_ISR)?.base;
    session.get::<1>(isr)?;
    if !change(session)? {
        return Ok(Finding::Passed);
    }
    session.wait_config()?;
    let [seen] = session.get(isr)?;
    ensure_eq("the configuration bit of the interrupt status", seen & ISR_CONFIG, ISR_CONFIG)?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}
