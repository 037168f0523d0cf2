//! virtio-mmio from the driver's side: what our driver does to registers, and what registers do to it.

use polyvirt_core::Features;
use polyvirt_core::queue::MAX_QUEUE_SIZE;
use polyvirt_core::transport::{BlockingTransport, Transport, driver_ok, initialize};
use polyvirt_transports::mmio::registers::*;

use super::mmio::case;
use super::sample::{Sample, ensure, ensure_eq, revive, serve};
use crate::suite::{Case, Finding, Objection, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("mmio/driver-widths", "(driver) registers are accessed by 32 bits, aligned", driver_widths)
        .judges(&["N0404", "N0405"]),
    case("mmio/driver-order", "(driver) selectors before features, everything before QueueReady", driver_order)
        .judges(&["N0412", "N0413", "N0414", "N0415"]),
    case("mmio/driver-acknowledges", "(driver) InterruptStatus is read and what was set is acknowledged", driver_acks)
        .judges(&["N0430", "N0432", "N0419", "N0420"]),
    case(
        "mmio/driver-undefined-interrupt-bits",
        "(driver) undefined bits of InterruptStatus are ignored",
        odd_interrupts,
    )
    .judges(&["N0418"]),
    case(
        "mmio/driver-not-virtio",
        "(driver) what has another magic value, version or no type is left alone",
        not_virtio,
    )
    .judges(&["N0406", "N0408", "N0410", "N0424", "N0425"]),
    case("mmio/driver-device-sizes", "(driver) absurd sizes that the device gives", device_sizes).class(&[106]),
    case("mmio/driver-stops-queue", "(driver) a queue reset is waited for before its memory is free", waits_for_reset)
        .judges(&["N0421"]),
];

fn driver_widths(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    let mut config = [0; 8];
    session.transport.read_config(0, &mut config)?;
    session.transport.reset()?;
    let log = session.registers()?.log();
    ensure(log.len() > 10, "register accesses", log.len())?;
    for access in log {
        let fits = access.offset.is_multiple_of(access.len as u64);
        let right = if access.offset < CONFIG { access.len == 4 } else { matches!(access.len, 1 | 2 | 4) };
        ensure(fits && right, "an aligned access of 32 bits, or of a field's width", format_args!("{access:x?}"))?;
    }
    Ok(Finding::Passed)
}

fn driver_order(session: &mut Session) -> Verdict {
    let _rings = session.bring_up(Features::empty())?;
    let log = session.registers()?.log();
    let (mut device_sel, mut driver_sel, mut ready, mut max, mut sel) = (false, false, Vec::new(), 0, 0);
    for access in log {
        match (access.offset, access.write) {
            (DEVICE_FEATURES_SEL, true) => device_sel = true,
            (DRIVER_FEATURES_SEL, true) => driver_sel = true,
            (DEVICE_FEATURES, false) => {
                ensure(device_sel, "DeviceFeaturesSel is written first", "DeviceFeatures is read")?
            }
            (DRIVER_FEATURES, true) => {
                ensure(driver_sel, "DriverFeaturesSel is written first", "DriverFeatures is written")?
            }
            (STATUS, true) if access.value == 0 => ready.clear(),
            (QUEUE_SEL, true) => sel = access.value,
            (QUEUE_SIZE_MAX, false) => max = access.value,
            (QUEUE_READY, true) if access.value == 1 => ready.push(sel),
            (QUEUE_SIZE | QUEUE_DESC_LOW..=QUEUE_DEVICE_HIGH, true) => {
                ensure(!ready.contains(&sel), "the queue is set up before it is ready", format_args!("{access:x?}"))?;
                if access.offset == QUEUE_SIZE {
                    ensure(access.value <= max, format_args!("a size of at most {max}"), access.value)?;
                }
            }
            _ => {}
        }
    }
    ensure_eq("queues made ready", ready.len(), usize::from(session.queues()))?;
    Ok(Finding::Passed)
}

fn driver_acks(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    for _ in 0..3 {
        let sample = Sample::new(session)?;
        let ring = &mut rings[usize::from(sample.queue)];
        ring.chain(0, &sample.pieces);
        ring.offer(0);
        ring.kick()?;
        let before = session.registers()?.log().len();
        session.wait_interrupt()?;
        let log = session.registers()?.log().split_off(before);
        let read = log.iter().find(|access| access.offset == INTERRUPT_STATUS && !access.write);
        let acknowledged = log.iter().find(|access| access.offset == INTERRUPT_ACK && access.write);
        let (Some(read), Some(acknowledged)) = (read, acknowledged) else {
            return Err(Objection::failed("InterruptStatus read, InterruptACK written", format!("{log:x?}")));
        };
        ensure_eq("what is acknowledged", acknowledged.value, read.value)?;
        let (_, len) = session.wait_used(&mut rings[usize::from(sample.queue)])?;
        sample.check(session, len)?;
    }
    Ok(Finding::Passed)
}

fn odd_interrupts(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    session.registers()?.lie(INTERRUPT_STATUS, Some(!CONFIG_CHANGE));
    let sample = Sample::new(session)?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    ring.kick()?;
    session.wait_interrupt()?;
    session.registers()?.lie(INTERRUPT_STATUS, None);
    let (_, len) = session.wait_used(&mut rings[usize::from(sample.queue)])?;
    sample.check(session, len)?;
    let log = session.registers()?.log();
    let odd = log.iter().find(|access| access.offset == INTERRUPT_ACK && access.value & !3 != 0);
    ensure(odd.is_none(), "only bits 0 and 1 are acknowledged", format_args!("{odd:x?}"))?;
    Ok(Finding::Passed)
}

fn not_virtio(session: &mut Session) -> Verdict {
    for (register, value) in [(MAGIC_VALUE, 0), (MAGIC_VALUE, 0x7472_6977), (VERSION, 1), (VERSION, 3), (DEVICE_ID, 0)]
    {
        let registers = session.registers()?;
        let before = registers.log().len();
        registers.lie(register, Some(value));
        let met = registers.connect();
        registers.lie(register, None);
        ensure(
            met.is_err(),
            format_args!("the driver ignores it: register {register:#x} reads {value:#x}"),
            "it does not",
        )?;
        let wrote = registers.log().split_off(before).into_iter().find(|access| access.write);
        ensure(wrote.is_none(), "the driver writes nothing to what it ignores", format_args!("{wrote:x?}"))?;
    }
    let registers = session.registers()?;
    let before = registers.log().len();
    registers.connect()?;
    let order: Vec<_> = registers.log().split_off(before).iter().map(|access| access.offset).collect();
    let first: Vec<_> = order.into_iter().filter(|&offset| offset <= DEVICE_ID).collect();
    ensure_eq("registers read first", first, vec![MAGIC_VALUE, VERSION, DEVICE_ID])?;
    Ok(Finding::Passed)
}

fn device_sizes(session: &mut Session) -> Verdict {
    for max in [0, 1, 3, 5, 0x7fff, 0x8000, 0x8001, 0x1_0000, 0x1_0003, u32::MAX] {
        session.negotiate(Features::empty())?;
        session.registers()?.lie(QUEUE_SIZE_MAX, Some(max));
        let found = session.transport.find_vq(0, None);
        session.registers()?.lie(QUEUE_SIZE_MAX, None);
        if let Ok(found) = found {
            let size = found.config.size;
            let shape = size.is_power_of_two() || session.cell.ring == RingFormat::Packed && size > 0;
            let right = shape && u32::from(size) <= max && size <= MAX_QUEUE_SIZE;
            ensure(right, format_args!("a size up to {max}, of a split ring a power of two"), size)?;
        }
    }
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn waits_for_reset(session: &mut Session) -> Verdict {
    if !session.transport.device_features()?.contains(Features::RING_RESET) {
        return Err(Objection::Skipped("the device does not offer VIRTIO_F_RING_RESET".into()));
    }
    initialize(&mut session.transport, Features::RING_RESET)?;
    let _rings = session.rings()?;
    driver_ok(&mut session.transport)?;
    let before = session.registers()?.log().len();
    session.transport.reset_vq(0)?;
    let log = session.registers()?.log().split_off(before);
    let wrote = log.iter().position(|access| access.offset == QUEUE_RESET && access.write && access.value == 1);
    let read = log.iter().rposition(|access| access.offset == QUEUE_RESET && !access.write && access.value == 0);
    ensure(wrote.is_some() && wrote < read, "QueueReset written, then read as 0", format_args!("{log:x?}"))?;
    let touched = log.iter().skip(wrote.unwrap_or(0) + 1).take_while(|access| access.offset != QUEUE_RESET);
    ensure(touched.count() == 0, "no other register in between", format_args!("{log:x?}"))?;
    Ok(Finding::Passed)
}
