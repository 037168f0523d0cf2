//! The block device: when a write is durable, and what a reset leaves with the backend.

use polyvirt_core::Features;
use polyvirt_core::transport::{BlockingTransport, Transport, read_config};

use super::blk::{CONFIG_WCE, F_FLUSH, case, good, need, on_disk, pattern, sectors};
use super::sample::{BLK_IN, BLK_OUT, ensure, ensure_eq, offer, serve};
use crate::raw::Ring;
use crate::suite::{Case, Finding, Objection, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case(
        "blk/write-through",
        "a write of a driver that did not accept FLUSH is durable before it is used",
        write_through,
    )
    .judges(&["N0812"]),
    case("blk/writeback-mode", "with writeback 0 a write is durable before it is used", writeback_mode)
        .judges(&["N0812"]),
    case("blk/writeback-without-flush", "writeback is 0 if CONFIG_WCE is accepted and FLUSH is not", without_flush)
        .judges(&["N0758"]),
    case(
        "blk/capacity-before-driver-ok",
        "a capacity that changes while the driver sets the device up is what it reads",
        early_capacity,
    ),
    case(
        "blk/resets-with-slow-backend",
        "however often a device is reset, its backend is given no more than it takes",
        slow_backend,
    ),
];

/// Where `writeback` is in the configuration.
const WRITEBACK: u32 = 32;

/// A write that the backend makes durable before it is used.
fn durable_write(session: &mut Session, ring: &mut Ring, sector: u64) -> Result<(), Objection> {
    let before = session.far_side.flushes()?;
    let bytes = pattern(sector, 1024);
    good(session, ring, BLK_OUT, sector, &bytes, 0)?;
    let after = session.far_side.flushes()?;
    ensure(after > before, "the write is durable before it is used", "the backend was not told to flush")?;
    on_disk(session, sector, &bytes)
}

fn start(session: &mut Session, wanted: Features) -> Result<Ring, Objection> {
    let mut rings = session.bring_up(wanted)?;
    Ok(rings.remove(0))
}

fn write_through(session: &mut Session) -> Verdict {
    need(session, F_FLUSH, "VIRTIO_BLK_F_FLUSH")?;
    let mut ring = start(session, Features::empty())?;
    for sector in 0..3 {
        durable_write(session, &mut ring, sector)?;
    }
    let before = session.far_side.flushes()?;
    good(session, &mut ring, BLK_IN, 0, &[], 512)?;
    ensure_eq("flushes for a read", session.far_side.flushes()?, before)?;
    Ok(Finding::Passed)
}

fn writeback(session: &mut Session) -> Result<u8, Objection> {
    let mut byte = [0xff];
    read_config(&mut session.transport, WRITEBACK, &mut byte)?;
    Ok(byte[0])
}

fn writeback_mode(session: &mut Session) -> Verdict {
    need(session, CONFIG_WCE, "VIRTIO_BLK_F_CONFIG_WCE")?;
    let mut ring = start(session, F_FLUSH | CONFIG_WCE)?;
    for value in [0, 1, 0] {
        session.transport.write_config(WRITEBACK, &[value])?;
        ensure_eq("writeback", writeback(session)?, value)?;
        if value == 0 {
            durable_write(session, &mut ring, 5)?;
        } else {
            good(session, &mut ring, BLK_OUT, 5, &[1; 512], 0)?;
        }
    }
    Ok(Finding::Passed)
}

fn without_flush(session: &mut Session) -> Verdict {
    need(session, CONFIG_WCE, "VIRTIO_BLK_F_CONFIG_WCE")?;
    session.negotiate(CONFIG_WCE)?;
    // The legacy interface has nothing that settles features before the device is used.
    if !session.cell.legacy {
        ensure_eq("writeback", writeback(session)?, 0)?;
    }
    let mut rings = session.rings()?;
    session.go()?;
    ensure_eq("writeback", writeback(session)?, 0)?;
    durable_write(session, &mut rings[0], 1)?;
    Ok(Finding::Passed)
}

fn early_capacity(session: &mut Session) -> Verdict {
    let before = sectors(session)?;
    for after in [before + 8, before / 2] {
        session.transport.reset()?;
        session.negotiate(Features::empty())?;
        session.trace.note(format!("(the disk has {after} sectors now)"));
        session.far_side.set_capacity(after)?;
        // Where the configuration is laid out for the driver beforehand, a device has no turn before DRIVER_OK.
        if session.registers.is_some() {
            ensure_eq("capacity before DRIVER_OK", sectors(session)?, after)?;
        }
        let mut rings = session.rings()?;
        session.go()?;
        while sectors(session)? != after {
            session.wait_config()?;
        }
        good(session, &mut rings[0], BLK_IN, after - 1, &[], 512)?;
    }
    Ok(Finding::Passed)
}

fn slow_backend(session: &mut Session) -> Verdict {
    /// Far more than a device has good reason to keep; what all rounds ask for is more by far.
    const MOST: usize = 512;
    const ROUNDS: usize = 64;
    session.trace.note("(the backend does nothing any more)");
    session.far_side.hang_io(true)?;
    for _ in 0..ROUNDS {
        let mut ring = start(session, Features::empty())?;
        let count = (ring.size() / 3).min(32);
        let requests = requests(session, &mut ring, count)?;
        ring.kick()?;
        session.transport.reset()?;
        drop((ring, requests));
        let held = session.far_side.held_io()?;
        ensure(held <= MOST, format_args!("at most {MOST} requests with the backend"), held)?;
    }
    // A run that begins while it does nothing ends well once it does something.
    let mut rings = session.bring_up(Features::empty())?;
    let sample = offer(session, &mut rings)?;
    session.trace.note("(the backend works again)");
    session.far_side.hang_io(false)?;
    let (_, len) = session.wait_used(&mut rings[0])?;
    sample.check(session, len)?;
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

/// Makes `count` reads available.
fn requests(session: &mut Session, ring: &mut Ring, count: u16) -> Result<Vec<super::sample::Sample>, Objection> {
    let mut samples = Vec::new();
    for number in 0..count {
        let sample = super::sample::Sample::new(session)?;
        ring.chain(3 * number, &sample.pieces);
        samples.push(sample);
    }
    let heads: Vec<_> = (0..count).map(|number| 3 * number).collect();
    ring.offer_all(&heads);
    Ok(samples)
}
