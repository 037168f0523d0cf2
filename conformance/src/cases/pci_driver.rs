//! virtio-pci from the driver's side: what our driver does to fields, and what fields do to it.

use polyvirt_core::Features;
use polyvirt_core::transport::{BlockingTransport, Interrupts, QueueSet, Transport, driver_ok, initialize};
use polyvirt_transports::pci::registers::*;

use super::sample::{Sample, ensure, ensure_eq, offer, revive, serve};
use crate::raw::Ring;
use crate::suite::{Applies, Case, Finding, Objection, RegisterAccess, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("pci/driver-widths", "(driver) each field is accessed by its own width, aligned", widths)
        .judges(&["N0292"])
        .once(),
    case("pci/driver-order", "(driver) a queue is set up before it is enabled, and only what may be is written", order)
        .judges(&["N0323", "N0325", "N0326", "N0328"])
        .packed_judges(&["N0323", "N0324", "N0326", "N0328"]),
    case("pci/driver-leaves-capabilities", "(driver) capabilities are not written", leaves_capabilities)
        .judges(&["N0302", "N0362", "N0364"])
        .once(),
    case("pci/driver-waits", "(driver) the end of a reset is waited for, of the device and of a queue", waits)
        .judges(&["N0327", "N0329"])
        .once(),
    case("pci/driver-vectors", "(driver) vectors are inside the table, and read back", vectors)
        .judges(&["N0377", "N0378"])
        .once(),
    case("pci/driver-notifies", "(driver) a notification is as wide and says what was negotiated", notifies)
        .judges(&["N0380", "N0381", "N0382", "N0383", "N0384", "N0385"]),
    case("pci/driver-leaves-isr", "(driver) with messages the interrupt status is not read", leaves_isr)
        .judges(&["N0350"])
        .once(),
    case("pci/driver-not-virtio", "(driver) what has other ids is left alone, and any revision is met", not_virtio)
        .judges(&["N0288", "N0289", "N0290"])
        .once(),
    case("pci/driver-odd-capabilities", "(driver) reserved capabilities are ignored, and long ones accepted", odd)
        .judges(&["N0295", "N0297", "N0298", "N0300"])
        .class(&[106])
        .once(),
    case("pci/driver-first-structure", "(driver) of two structures of one type the first is used", first)
        .judges(&["N0296"])
        .once(),
    case("pci/driver-few-vectors", "(driver) any length of the table will do, down to one vector for all", few_vectors)
        .judges(&["N0374", "N0388"])
        .once(),
];

const fn case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).on(Applies::PCI)
}

/// What the driver did to the common configuration, with offsets from its start.
fn common_log(session: &Session) -> Result<Vec<RegisterAccess>, Objection> {
    let structure = session.structure(CAP_COMMON)?;
    let inside = |access: &RegisterAccess| {
        access.offset.checked_sub(structure.base).is_some_and(|at| at < u64::from(structure.length))
    };
    let log = session.registers()?.log().into_iter().filter(inside);
    Ok(log.map(|access| RegisterAccess { offset: access.offset - structure.base, ..access }).collect())
}

/// Bytes of a field of the common configuration; none if nothing begins there. Halves of addresses are fields.
fn field_len(offset: u64) -> Option<usize> {
    Some(match offset {
        0x00 | 0x04 | 0x08 | 0x0c => 4,
        0x14 | 0x15 => 1,
        0x10 | 0x12 | 0x16..=0x1e if offset.is_multiple_of(2) => 2,
        0x20..0x38 if offset.is_multiple_of(4) => 4,
        0x38..0x40 if offset.is_multiple_of(2) => 2,
        _ => return None,
    })
}

fn widths(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    let mut config = [0; 8];
    session.transport.read_config(0, &mut config)?;
    session.transport.reset()?;
    let log = common_log(session)?;
    ensure(log.len() > 10, "accesses to the common configuration", log.len())?;
    for access in log {
        let right = field_len(access.offset) == Some(access.len);
        ensure(right, "an access of a whole field", format_args!("{access:x?}"))?;
    }
    let device = session.structure(CAP_DEVICE)?;
    for access in session.registers()?.log() {
        if access.offset >= device.base && access.offset < device.base + u64::from(device.length) {
            let right = matches!(access.len, 1 | 2 | 4) && access.offset.is_multiple_of(access.len as u64);
            ensure(right, "an aligned access of at most 32 bits", format_args!("{access:x?}"))?;
        }
    }
    Ok(Finding::Passed)
}

fn order(session: &mut Session) -> Verdict {
    let _rings = session.bring_up(Features::empty())?;
    let (mut enabled, mut select) = (Vec::new(), 0);
    for access in common_log(session)?.into_iter().filter(|access| access.write) {
        let shown = format!("{access:x?}");
        match access.offset {
            common::DEVICE_FEATURE
            | common::NUM_QUEUES
            | common::CONFIG_GENERATION
            | common::QUEUE_NOTIFY_OFF
            | common::QUEUE_NOTIF_CONFIG_DATA => {
                return Err(Objection::failed("no write to what is the device's", shown));
            }
            common::DEVICE_STATUS if access.value == 0 => enabled.clear(),
            common::QUEUE_SELECT => select = access.value,
            common::QUEUE_ENABLE => {
                ensure_eq("what is written to queue_enable", access.value, 1)?;
                enabled.push(select);
            }
            common::QUEUE_SIZE | common::QUEUE_DESC..common::QUEUE_NOTIF_CONFIG_DATA => {
                ensure(!enabled.contains(&select), "a queue is set up before it is enabled", &shown)?;
                let packed = session.cell.ring == RingFormat::Packed;
                let right = access.value > 0 && (packed || access.value.is_power_of_two());
                ensure(access.offset != common::QUEUE_SIZE || right, "a size that a queue can have", shown)?;
            }
            _ => {}
        }
    }
    ensure_eq("queues enabled", enabled.len(), usize::from(session.queues()))?;
    Ok(Finding::Passed)
}

fn leaves_capabilities(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    session.registers()?.connect()?;
    for at in session.capabilities(CAP_VENDOR)? {
        let [len] = session.get(at + u64::from(CAP_LEN))?;
        let inside = |access: &&RegisterAccess| access.offset < at + u64::from(len) && access.offset + 4 > at;
        let wrote = session.registers()?.log();
        let wrote = wrote.iter().filter(|access| access.write).find(inside);
        ensure(wrote.is_none(), "no write to a capability", format_args!("{wrote:x?}"))?;
    }
    Ok(Finding::Passed)
}

/// After `wrote` says yes the next access to the same field reads 0, or others follow until one does.
fn waited(log: &[RegisterAccess], field: u64, value: u64) -> Result<(), Objection> {
    let wrote = log.iter().position(|access| access.offset == field && access.write && access.value == value);
    let Some(wrote) = wrote else { return Err(Objection::failed("a reset", format!("{log:x?}"))) };
    for access in &log[wrote + 1..] {
        ensure(access.offset == field, "nothing else before the reset is done", format_args!("{access:x?}"))?;
        if !access.write && access.value == 0 {
            return Ok(());
        }
    }
    Err(Objection::failed("a read that says that the reset is done", format!("{log:x?}")))
}

fn waits(session: &mut Session) -> Verdict {
    initialize(&mut session.transport, Features::RING_RESET)?;
    let _rings = session.rings()?;
    driver_ok(&mut session.transport)?;
    if session.transport.device_features()?.contains(Features::RING_RESET) {
        let before = common_log(session)?.len();
        session.transport.reset_vq(0)?;
        waited(&common_log(session)?[before..], common::QUEUE_RESET, 1)?;
    }
    let before = common_log(session)?.len();
    session.transport.reset()?;
    waited(&common_log(session)?[before..], common::DEVICE_STATUS, 0)?;
    Ok(Finding::Passed)
}

fn vectors(session: &mut Session) -> Verdict {
    let at = session.capabilities(CAP_MSIX)?;
    let Some(at) = at.first() else { return Err(Objection::Skipped("the device has no MSI-X".into())) };
    let len = u64::from(session.get16(at + u64::from(MSIX_CONTROL))? & MSIX_LEN) + 1;
    let _rings = session.bring_up(Features::empty())?;
    let log = common_log(session)?;
    let mut mapped = 0;
    for (index, access) in log.iter().enumerate() {
        let vector = matches!(access.offset, common::CONFIG_VECTOR | common::QUEUE_VECTOR);
        if vector && access.write {
            let right = access.value < len || access.value == u64::from(NO_VECTOR);
            ensure(right, format_args!("a vector below {len}"), access.value)?;
            let next = log.get(index + 1).filter(|next| next.offset == access.offset && !next.write);
            ensure(next.is_some(), "the vector is read back", format_args!("{:x?}", log.get(index + 1)))?;
            mapped += 1;
        }
    }
    ensure(mapped > session.queues(), "a vector for the configuration and each queue", mapped)?;
    Ok(Finding::Passed)
}

fn notifies(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for wanted in [
        Features::empty(),
        Features::NOTIFICATION_DATA,
        Features::NOTIF_CONFIG_DATA,
        Features::NOTIFICATION_DATA | Features::NOTIF_CONFIG_DATA,
    ] {
        if !offered.contains(wanted) {
            continue;
        }
        let mut rings = session.bring_up(wanted)?;
        let notify = session.structure(CAP_NOTIFY)?;
        let (queue, log) = (Sample::new(session)?.queue, session.registers()?.log().len());
        let place = session.doorbell(queue)?;
        serve(session, &mut rings)?;
        let log = session.registers()?.log().split_off(log);
        let end = notify.base + u64::from(notify.length);
        let Some(kick) = log.iter().find(|access| access.write && (notify.base..end).contains(&access.offset)) else {
            return Err(Objection::failed("a notification", format!("{log:x?}")));
        };
        ensure_eq("where the notification goes", kick.offset, place)?;
        let wide = wanted.contains(Features::NOTIFICATION_DATA);
        ensure_eq("bytes of the notification", kick.len, if wide { 4 } else { 2 })?;
        let own = session.get16(session.common(common::QUEUE_NOTIF_CONFIG_DATA)?)?;
        let named = if wanted.contains(Features::NOTIF_CONFIG_DATA) { own } else { queue };
        ensure_eq("the queue that the notification names", kick.value as u16, named)?;
        session.transport.reset()?;
    }
    Ok(Finding::Passed)
}

fn leaves_isr(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let isr = session.structure(CAP_ISR)?.base;
    for _ in 0..3 {
        super::sample::serve_told(session, &mut rings)?;
    }
    let log = session.registers()?.log();
    let read = log.iter().find(|access| access.offset == isr);
    ensure(read.is_none(), "no access to the interrupt status", format_args!("{read:x?}"))?;
    Ok(Finding::Passed)
}

/// Whether the driver meets the device while `value` is read at `offset`; if not, it has written nothing.
fn meets(session: &Session, offset: u64, value: u32) -> Result<bool, Objection> {
    let registers = session.registers()?;
    registers.lie(offset, Some(value));
    let before = registers.log().len();
    let met = registers.connect().is_ok();
    registers.lie(offset, None);
    let wrote = registers.log().split_off(before).into_iter().find(|access| access.write);
    ensure(met || wrote.is_none(), "the driver writes nothing to what it ignores", format_args!("{wrote:x?}"))?;
    Ok(met)
}

fn not_virtio(session: &mut Session) -> Verdict {
    let ids = [(VENDOR_ID, 0x1af5), (VENDOR_ID, 0xffff), (DEVICE_ID, 0x0fff), (DEVICE_ID, 0x1080), (DEVICE_ID, 0x1040)];
    for (field, value) in ids {
        let met = meets(session, field.into(), value)?;
        ensure(!met, format_args!("a device with {value:#x} at {field:#x} is ignored"), "it is not")?;
    }
    let transitional = transitional_id(session.cell.device_type).unwrap_or(0x103f);
    let met = meets(session, DEVICE_ID.into(), transitional.into())?;
    ensure(met, format_args!("a device with the id {transitional:#x} is met"), "it is not")?;
    for revision in [0, 1, 2, 0x7f, 0xff] {
        let met = meets(session, REVISION_ID.into(), revision)?;
        ensure(met, format_args!("a device of revision {revision} is met"), "it is not")?;
        let met = meets(session, SUBSYSTEM_ID.into(), revision)?;
        ensure(met, format_args!("a device of subsystem {revision} is met"), "it is not")?;
    }
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn odd(session: &mut Session) -> Verdict {
    for kind in [CAP_COMMON, CAP_NOTIFY, CAP_ISR] {
        let at = session.structure(kind)?.at;
        for (field, value) in [(CAP_TYPE, 6), (CAP_TYPE, 0xff), (CAP_BAR, 6), (CAP_BAR, 0xff)] {
            let met = meets(session, at + u64::from(field), value)?;
            ensure(!met, format_args!("structure {kind} with {value:#x} at {field} is ignored"), "it is not")?;
        }
        for (field, value) in [(CAP_LEN, 0x40), (CAP_LENGTH, 0x7fff_ffff), (CAP_LENGTH, u32::MAX)] {
            let met = meets(session, at + u64::from(field), value)?;
            ensure(met, format_args!("structure {kind} with {value:#x} at {field} is accepted"), "it is not")?;
        }
    }
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn first(session: &mut Session) -> Verdict {
    let (device, registers) = (session.structure(CAP_DEVICE)?, session.registers()?);
    let kind = device.at + u64::from(CAP_TYPE);
    registers.lie(kind, Some(CAP_COMMON.into()));
    let met = registers.connect();
    registers.lie(kind, None);
    let before = registers.log().len();
    let _ = initialize(&mut *met?, Features::empty());
    let log = registers.log().split_off(before);
    ensure(!log.is_empty(), "accesses to the first structure", "none at all")?;
    let end = device.base + u64::from(device.length);
    let second = log.into_iter().find(|access| (device.base..end).contains(&access.offset));
    ensure(second.is_none(), "no access to the second structure", format_args!("{second:x?}"))?;
    session.registers()?.connect()?;
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn few_vectors(session: &mut Session) -> Verdict {
    let at = session.capabilities(CAP_MSIX)?;
    let Some(at) = at.first() else { return Err(Objection::Skipped("the device has no MSI-X".into())) };
    let at = at + u64::from(MSIX_CONTROL);
    for len in [0u16, 1, 0x7ff] {
        let control = session.get16(at)? & !MSIX_LEN | len;
        let registers = session.registers()?;
        registers.lie(at, Some(control.into()));
        let met = registers.connect();
        registers.lie(at, None);
        let mut transport = met?;
        initialize(&mut *transport, Features::empty())?;
        let mut rings = Vec::new();
        for queue in 0..session.queues() {
            rings.push(Ring::new(transport.find_vq(queue, None)?, queue, session.trace.clone())?);
        }
        let log = common_log(session)?;
        let vector = log.iter().rev().find(|access| access.offset == common::QUEUE_VECTOR && access.write);
        let right = vector.is_some_and(|access| access.value <= len.into());
        ensure(right, format_args!("a vector up to {len}"), format_args!("{vector:x?}"))?;
        if len == 0 {
            let vector = session.get16(session.common(common::CONFIG_VECTOR)?)?;
            ensure_eq("the vector of the configuration", vector, 0)?;
            driver_ok(&mut *transport)?;
            let sample = offer(session, &mut rings)?;
            // One vector for everything: whatever comes may be about both.
            let Interrupts { queues, config } = transport.wait(session.watchdog)?;
            ensure(
                queues == QueueSet::ALL && config,
                "an interrupt that is taken for both",
                format_args!("{queues}, {config}"),
            )?;
            let (_, len) = session.poll_used(&mut rings[usize::from(sample.queue)])?;
            sample.check(session, len)?;
        }
        transport.reset()?;
    }
    session.registers()?.connect()?;
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}
