//! virtio-mmio, register by register.

use polyvirt_core::transport::{BlockingTransport, Transport};
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio::registers::*;

use super::init::serve_next;
use super::sample::{Sample, ensure, ensure_eq, revive, serve, shown, touches};
use crate::raw::Ring;
use crate::suite::{Applies, BLK, CONSOLE, Case, Finding, Objection, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("mmio/identity", "magic value, version and device type", identity).judges(&["N0389", "N0390"]).once(),
    case("mmio/feature-words", "feature words beyond the last, and odd selectors, read 0", feature_words)
        .class(&[30])
        .once(),
    case("mmio/interrupt-status", "InterruptStatus says what happened until that is acknowledged", interrupt_status)
        .judges(&["N0391", "N0392"])
        .once(),
    case("mmio/acknowledge-nothing", "acknowledging other bits than those set keeps those set", acknowledge)
        .judges(&["N0391"])
        .once(),
    case("mmio/reset-clears", "a reset clears InterruptStatus and every QueueReady", reset_clears)
        .judges(&["N0393"])
        .once(),
    case("mmio/queue-ready-0", "a queue with QueueReady 0 is not accessed", not_ready).judges(&["N0395"]),
    case("mmio/queue-ready-back-to-0", "writing 0 to QueueReady ends all accesses to the queue", ready_back)
        .judges(&["N0395"]),
    case("mmio/queue-ready-reads-back", "QueueReady reads what it is", ready_reads_back).once(),
    case("mmio/queue-reset", "QueueReset resets one queue: it and QueueReady read 0 then", queue_reset)
        .judges(&["N0396", "N0397", "N0398", "N0400"]),
    case("mmio/queue-reset-unasked", "QueueReset without the feature does no harm", queue_reset_unasked),
    case("mmio/queue-frozen", "size and addresses written while a queue is ready change nothing", frozen).class(&[28]),
    case("mmio/queue-size-odd", "queue sizes of 0, 0x10000 and more are refused, and 3 for a split ring", odd_sizes)
        .class(&[29]),
    case("mmio/queue-misaligned", "ring areas that are not aligned are refused", misaligned).class(&[13]),
    case("mmio/queue-nowhere", "ring areas anywhere in the address space but in memory are refused", ring_nowhere)
        .class(&[7, 12]),
    case("mmio/queue-sel-beyond", "a selected queue that is not there has no registers", queue_sel_beyond)
        .class(&[30])
        .once(),
    case("mmio/notify-beyond", "kicks for queues that are not there", notify_beyond).class(&[26, 30]).once(),
    case("mmio/any-width-any-offset", "reads of any width at any offset are answered", any_read).class(&[31]).once(),
    case("mmio/any-write", "writes of any width to registers and beyond do no harm", any_write).class(&[31]).once(),
    case("mmio/config-beyond-end", "configuration beyond its end reads 0 and cannot be written", beyond_end)
        .class(&[31])
        .once(),
    case("mmio/config-generation", "ConfigGeneration is another after a change", super::config::generation)
        .judges(&["N0394"])
        .once(),
];

pub(super) const fn case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).on(Applies::MMIO)
}

impl Session {
    fn load(&self, offset: u64) -> Result<u32, Objection> {
        let mut data = [0; 4];
        self.registers()?.load(offset, &mut data)?;
        Ok(u32::from_le_bytes(data))
    }

    fn store(&self, offset: u64, value: u32) -> Result<(), Objection> {
        self.trace.note(format!("write {value:#x} to register {offset:#x}"));
        Ok(self.registers()?.store(offset, &value.to_le_bytes())?)
    }
}

fn identity(session: &mut Session) -> Verdict {
    ensure_eq("MagicValue", session.load(MAGIC_VALUE)?, 0x7472_6976)?;
    ensure_eq("Version", session.load(VERSION)?, 2)?;
    ensure_eq("DeviceID", session.load(DEVICE_ID)?, session.cell.device_type)?;
    Ok(Finding::Passed)
}

fn feature_words(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for sel in [0, 1, 2, 3, 4, 5, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
        session.store(DEVICE_FEATURES_SEL, sel)?;
        // What is hidden from drivers is offered all the same.
        let word = session.load(DEVICE_FEATURES)? & !session.cell.ring.hidden().word(sel);
        ensure_eq("DeviceFeatures", word, offered.word(sel))?;
        session.store(DRIVER_FEATURES_SEL, sel)?;
        session.store(DRIVER_FEATURES, 0)?;
    }
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

/// Lets the device use a sample, looking at the ring alone: no register is touched but the doorbell.
fn serve_silently(session: &mut Session, rings: &mut [Ring]) -> Result<(), Objection> {
    let sample = Sample::new(session)?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    ring.kick()?;
    let (_, len) = session.poll_used(ring)?;
    sample.check(session, len)
}

/// Waits until InterruptStatus has `bit`.
fn wait_bit(session: &Session, bit: u32) -> Result<(), Objection> {
    let begun = std::time::Instant::now();
    while session.load(INTERRUPT_STATUS)? & bit == 0 {
        let expected = format_args!("bit {bit} of InterruptStatus");
        ensure(begun.elapsed() < session.watchdog, expected, "it stays 0")?;
        std::thread::yield_now();
    }
    Ok(())
}

fn interrupt_status(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::bit(0))?;
    ensure_eq("InterruptStatus", session.load(INTERRUPT_STATUS)?, 0)?;
    serve_silently(session, &mut rings)?;
    wait_bit(session, USED_BUFFER)?;
    ensure_eq("InterruptStatus", session.load(INTERRUPT_STATUS)?, USED_BUFFER)?;
    session.store(INTERRUPT_ACK, USED_BUFFER)?;
    ensure_eq("InterruptStatus", session.load(INTERRUPT_STATUS)?, 0)?;
    match session.cell.device_type {
        BLK => session.far_side.set_capacity(300)?,
        CONSOLE => session.far_side.resize(30, 30)?,
        _ => return Ok(Finding::Passed),
    }
    wait_bit(session, CONFIG_CHANGE)?;
    ensure_eq("InterruptStatus", session.load(INTERRUPT_STATUS)?, CONFIG_CHANGE)?;
    session.store(INTERRUPT_ACK, CONFIG_CHANGE)?;
    ensure_eq("InterruptStatus", session.load(INTERRUPT_STATUS)?, 0)?;
    Ok(Finding::Passed)
}

fn acknowledge(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve_silently(session, &mut rings)?;
    wait_bit(session, USED_BUFFER)?;
    session.store(INTERRUPT_ACK, !USED_BUFFER)?;
    ensure_eq("InterruptStatus", session.load(INTERRUPT_STATUS)?, USED_BUFFER)?;
    session.store(INTERRUPT_ACK, USED_BUFFER)?;
    ensure_eq("InterruptStatus", session.load(INTERRUPT_STATUS)?, 0)?;
    while session.interrupted()? {}
    serve_next(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn reset_clears(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve_silently(session, &mut rings)?;
    wait_bit(session, USED_BUFFER)?;
    session.transport.reset()?;
    ensure_eq("InterruptStatus after a reset", session.load(INTERRUPT_STATUS)?, 0)?;
    for index in 0..session.queues() {
        session.store(QUEUE_SEL, index.into())?;
        ensure_eq("QueueReady after a reset", session.load(QUEUE_READY)?, 0)?;
    }
    revive(session, rings)?;
    Ok(Finding::Passed)
}

/// Fails if anything of `ring` was accessed since `mark`.
fn untouched(session: &Session, ring: &Ring, mark: crate::suite::Mark, when: &str) -> Result<(), Objection> {
    for access in session.probe()?.since(mark)? {
        let touched = ring.areas().iter().any(|&(address, len, _)| touches(access, address, len));
        ensure(!touched, format_args!("no access to a queue {when}"), shown(access))?;
    }
    Ok(())
}

fn not_ready(session: &mut Session) -> Verdict {
    session.negotiate(Features::empty())?;
    let mut rings = session.rings()?;
    let sample = Sample::new(session)?;
    session.store(QUEUE_SEL, sample.queue.into())?;
    session.store(QUEUE_READY, 0)?;
    ensure_eq("QueueReady", session.load(QUEUE_READY)?, 0)?;
    let mark = session.probe()?.mark();
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    session.go()?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.kick()?;
    session.transport.status()?;
    untouched(session, &rings[usize::from(sample.queue)], mark, "that is not ready")?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn ready_back(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    let sample = Sample::new(session)?;
    session.store(QUEUE_SEL, sample.queue.into())?;
    session.store(QUEUE_READY, 0)?;
    let begun = std::time::Instant::now();
    while session.load(QUEUE_READY)? != 0 {
        ensure(begun.elapsed() < session.watchdog, "QueueReady becomes 0", "it stays 1")?;
    }
    let mark = session.probe()?.mark();
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    ring.kick()?;
    session.transport.status()?;
    untouched(session, &rings[usize::from(sample.queue)], mark, "that is not ready any more")?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn ready_reads_back(session: &mut Session) -> Verdict {
    session.negotiate(Features::empty())?;
    for index in 0..session.queues() {
        session.store(QUEUE_SEL, index.into())?;
        ensure_eq("QueueReady", session.load(QUEUE_READY)?, 0)?;
        ensure(session.load(QUEUE_SIZE_MAX)? > 0, "a largest size", 0)?;
    }
    let rings = session.rings()?;
    for index in 0..session.queues() {
        session.store(QUEUE_SEL, index.into())?;
        ensure_eq("QueueReady", session.load(QUEUE_READY)?, 1)?;
    }
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn queue_reset(session: &mut Session) -> Verdict {
    if !session.transport.device_features()?.contains(Features::RING_RESET) {
        return Err(Objection::Skipped("the device does not offer VIRTIO_F_RING_RESET".into()));
    }
    let mut rings = session.bring_up(Features::RING_RESET)?;
    serve(session, &mut rings)?;
    let queue = Sample::new(session)?.queue;
    session.store(QUEUE_SEL, queue.into())?;
    ensure_eq("QueueReset of a queue in use", session.load(QUEUE_RESET)?, 0)?;
    session.store(QUEUE_RESET, 1)?;
    let begun = std::time::Instant::now();
    while session.load(QUEUE_RESET)? != 0 {
        ensure(begun.elapsed() < session.watchdog, "QueueReset becomes 0", "it stays 1")?;
    }
    ensure_eq("QueueReady after a queue reset", session.load(QUEUE_READY)?, 0)?;
    let mark = session.probe()?.mark();
    rings[usize::from(queue)].kick()?;
    session.transport.status()?;
    untouched(session, &rings[usize::from(queue)], mark, "that was reset")?;
    session.transport.reset()?;
    session.store(QUEUE_SEL, queue.into())?;
    ensure_eq("QueueReset after a reset of the device", session.load(QUEUE_RESET)?, 0)?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn queue_reset_unasked(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    session.store(QUEUE_SEL, 0)?;
    session.store(QUEUE_RESET, 1)?;
    session.load(QUEUE_RESET)?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn frozen(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    for index in 0..session.queues() {
        session.store(QUEUE_SEL, index.into())?;
        for value in [0, 1, 3, 0x1_0000, u32::MAX] {
            session.store(QUEUE_SIZE, value)?;
        }
        for register in
            [QUEUE_DESC_LOW, QUEUE_DESC_HIGH, QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH, QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH]
        {
            session.store(register, 0xdead_0001)?;
        }
        session.store(QUEUE_READY, 1)?;
    }
    ensure(!session.needs_reset()?, "a device that goes on", "it needs a reset")?;
    for _ in 0..2 * rings[0].size() {
        serve_next(session, &mut rings)?;
    }
    Ok(Finding::Passed)
}

/// Sets the queue of a sample up as `change` changes it, says DRIVER_OK, makes a request and sees it refused; then the
/// device is revived.
fn bad_queue(session: &mut Session, change: impl Fn(&Session) -> Result<(), Objection>) -> Result<(), Objection> {
    session.negotiate(Features::empty())?;
    let mut rings = session.rings()?;
    let sample = Sample::new(session)?;
    session.store(QUEUE_SEL, sample.queue.into())?;
    session.store(QUEUE_READY, 0)?;
    let config = rings[usize::from(sample.queue)].config;
    session.store(QUEUE_SIZE, config.size.into())?;
    for (low, high, address) in [
        (QUEUE_DESC_LOW, QUEUE_DESC_HIGH, config.descriptors),
        (QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH, config.driver),
        (QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH, config.device),
    ] {
        session.store(low, address as u32)?;
        session.store(high, (address >> 32) as u32)?;
    }
    change(session)?;
    session.store(QUEUE_READY, 1)?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    let status = session.load(STATUS)?;
    session.store(STATUS, status | u32::from(Status::DRIVER_OK.bits()))?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.kick()?;
    let refused = session.load(QUEUE_READY)? == 0 || session.needs_reset()?;
    ensure(refused, "the queue is refused: QueueReady 0 or DEVICE_NEEDS_RESET", "neither")?;
    ensure(!rings[usize::from(sample.queue)].has_used(), "nothing used", "something was")?;
    revive(session, rings)
}

fn odd_sizes(session: &mut Session) -> Verdict {
    let max = session.transport.queue_max_size(0)?;
    let beyond = [0, u32::from(max) + 1, 2 * u32::from(max), 0x8001, 0x1_0000, 0x1_0001, 0x8000_0000, u32::MAX];
    // A packed ring may have any size.
    let odd = (session.cell.ring == RingFormat::Split).then_some(3);
    for size in beyond.into_iter().chain(odd) {
        bad_queue(session, |session| session.store(QUEUE_SIZE, size))?;
    }
    Ok(Finding::Rejected)
}

fn misaligned(session: &mut Session) -> Verdict {
    for (register, offset) in [(QUEUE_DESC_LOW, 8), (QUEUE_DRIVER_LOW, 1), (QUEUE_DEVICE_LOW, 2)] {
        let memory = crate::raw::Memory::new(session, 0x8000, polyvirt_core::memory::Access::all())?;
        bad_queue(session, |session| {
            session.store(register, memory.address as u32 + offset)?;
            session.store(register + 4, (memory.address >> 32) as u32)
        })?;
    }
    Ok(Finding::Rejected)
}

fn ring_nowhere(session: &mut Session) -> Verdict {
    let end = session.memory_end.unwrap_or(1 << 40);
    for address in [end - 16, end, 1 << 52, (1 << 63) - 16, 1 << 63, u64::MAX - 4095, u64::MAX - 15] {
        for register in [QUEUE_DESC_LOW, QUEUE_DRIVER_LOW, QUEUE_DEVICE_LOW] {
            if address == end - 16 && register != QUEUE_DESC_LOW && session.cell.ring == RingFormat::Packed {
                // The other areas of a packed ring are so short that they fit.
                continue;
            }
            bad_queue(session, |session| {
                session.store(register, address as u32)?;
                session.store(register + 4, (address >> 32) as u32)
            })?;
        }
    }
    Ok(Finding::Rejected)
}

fn queue_sel_beyond(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    for sel in [u32::from(session.queues()) + 16, 0xffff, 0x1_0000, 0x8000_0000, u32::MAX] {
        session.store(QUEUE_SEL, sel)?;
        ensure_eq("QueueSizeMax of a queue that is not there", session.load(QUEUE_SIZE_MAX)?, 0)?;
        ensure_eq("QueueReady of a queue that is not there", session.load(QUEUE_READY)?, 0)?;
        for register in (QUEUE_SIZE..=QUEUE_RESET).step_by(4) {
            if ![QUEUE_NOTIFY, INTERRUPT_ACK, STATUS].contains(&register) {
                session.store(register, 1)?;
            }
        }
        ensure_eq("QueueReady of a queue that is not there", session.load(QUEUE_READY)?, 0)?;
    }
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn notify_beyond(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    for value in [u32::from(session.queues()) + 16, 0xffff, 0x1_0000, 0x1_0001, 0x8000_0000, u32::MAX] {
        for _ in 0..10 {
            session.store(QUEUE_NOTIFY, value)?;
        }
    }
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn any_read(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    for width in [1usize, 2, 4, 8] {
        let aligned = (0..BLOCK_SIZE).step_by(width).filter(|offset| *offset < 0x180 || *offset >= BLOCK_SIZE - 16);
        let odd = (0..0x120).step_by(7).chain([BLOCK_SIZE - width as u64]);
        for offset in aligned.chain(odd) {
            let mut data = vec![0; width];
            session.registers()?.load(offset, &mut data)?;
        }
    }
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn any_write(session: &mut Session) -> Verdict {
    let rings = session.bring_up(Features::empty())?;
    for width in [1usize, 2, 4, 8] {
        for offset in (0..0x140).step_by(width).chain((0x1..0x140).step_by(9)).chain([BLOCK_SIZE - width as u64]) {
            for byte in [0x00, 0x01, 0xff] {
                session.registers()?.store(offset, &vec![byte; width])?;
            }
        }
    }
    if session.cell.device_type == CONSOLE {
        // Emergency output may have been among it.
        session.far_side.output()?;
    }
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn beyond_end(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    // No device here has as much configuration.
    for offset in (CONFIG + 0x400..BLOCK_SIZE).step_by(0x3c) {
        session.store(offset, u32::MAX)?;
        ensure_eq("configuration beyond its end", session.load(offset)?, 0)?;
    }
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}
