//! The ordinary drivers of the devices: that they work, and what they write.

use polyvirt_core::Features;
use polyvirt_core::transport::BlockingTransport;
use polyvirt_devices::{DriverError, blk, console, rng};

use super::played::{Play, Played};
use super::sample::{BLK_IN, BLK_OUT, ensure, ensure_eq};
use crate::raw::{Descriptor, WRITE};
use crate::suite::{Applies, BLK, CONSOLE, Call, Case, Finding, Objection, RNG, RingFormat, Session, Variant, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new("drivers/blk", "the block driver reads, writes and flushes", blk_works).on(Applies::to(BLK)),
    Case::new("drivers/blk-requests", "the block driver's requests have the form of each type", blk_requests)
        .judges(&["N0777", "N0778", "N0780", "N0781", "N0787", "N0039"])
        .packed_judges(&["N0777", "N0778", "N0780", "N0781", "N0787", "N0099"])
        .on(Applies::to(BLK)),
    Case::new("drivers/blk-read-only", "the block driver accepts VIRTIO_BLK_F_RO", blk_read_only)
        .judges(&["N0776"])
        .on(Applies::to(BLK))
        .with(Variant::ReadOnly),
    Case::new("drivers/packed", "the ordinary driver takes packed rings where they are offered", takes_packed)
        .judges(&["N1578"])
        .only(RingFormat::Packed),
    Case::new("drivers/rng", "the entropy driver fills buffers, with device-writable ones only", rng_works)
        .judges(&["N0851"])
        .on(Applies::to(RNG)),
    Case::new(
        "drivers/console",
        "the console driver prints and hears, with buffers of the right direction",
        console_works,
    )
    .judges(&["N0843", "N0844"])
    .on(Applies::to(CONSOLE)),
];

/// The transport as a driver gets it, with a device that the case plays, and whose rings have no indirect tables.
fn played(session: &Session) -> (Box<dyn BlockingTransport>, Play) {
    let (transport, play) = Played::new(session.transport.clone(), Features::INDIRECT_DESC);
    (Box::new(transport), play)
}

fn failed(error: impl std::fmt::Display) -> Objection {
    Objection::failed("the driver does what it is asked", error)
}

fn blk_works(session: &mut Session) -> Verdict {
    let mut driver = blk::Driver::new(Box::new(session.transport.clone())).map_err(failed)?;
    let data: Vec<u8> = (0..8192u32).map(|at| (at / 7) as u8).collect();
    driver.write(3, &data).map_err(failed)?;
    driver.flush().map_err(failed)?;
    let mut on_disk = vec![0; data.len()];
    session.far_side.read_disk(3 * 512, &mut on_disk)?;
    ensure(on_disk == data, "what was written, on the disk", "something else")?;
    let mut read = vec![0; data.len()];
    driver.read(3, &mut read).map_err(failed)?;
    ensure(read == data, "what was written", "something else")?;
    driver.get_id().map_err(failed)?;
    Ok(Finding::Passed)
}

/// The header of the newest request, and its chain.
fn request(play: &Play) -> Result<(u32, u64, Vec<Descriptor>), Objection> {
    let chain = play.newest(0)?;
    let header: [u8; 16] = play.bytes(chain[0].address)?;
    let (kind, rest) = header.split_at(4);
    let kind = u32::from_le_bytes(kind.try_into().unwrap_or_default());
    let sector = u64::from_le_bytes(rest[4..].try_into().unwrap_or_default());
    Ok((kind, sector, chain))
}

fn blk_requests(session: &mut Session) -> Verdict {
    let (transport, play) = played(session);
    let mut driver = blk::Driver::new(transport).map_err(failed)?;
    // Type, bytes out, bytes in, and the sector if it has to be one.
    type Expected = (u32, u32, u32, Option<u64>);
    let check = |driver_did: Result<(), DriverError>, expected: Expected| -> Result<(), Objection> {
        driver_did.map_err(failed)?;
        let (kind, sector, chain) = request(&play)?;
        let (status, middle) = chain[1..].split_last().ok_or_else(|| failed("a chain of one descriptor"))?;
        let sum =
            |write| middle.iter().filter(|entry| entry.flags & WRITE == write).map(|entry| entry.len).sum::<u32>();
        let sector = expected.3.map(|_| sector);
        ensure_eq("type, bytes out, bytes in, sector", (kind, sum(0), sum(WRITE), sector), expected)?;
        ensure_eq("header", (chain[0].len, chain[0].flags & WRITE), (16, 0))?;
        ensure_eq("status", (status.len, status.flags & WRITE), (1, WRITE))?;
        let ordered = chain.is_sorted_by_key(|entry| entry.flags & WRITE);
        ensure(ordered, "readable descriptors, then writable ones", format_args!("{chain:x?}"))
    };
    check(driver.write(5, &[1; 1024]), (BLK_OUT, 1024, 0, Some(5)))?;
    check(driver.read(6, &mut [0; 512]), (BLK_IN, 0, 512, Some(6)))?;
    check(driver.flush(), (4, 0, 0, Some(0)))?;
    check(driver.get_id().map(drop), (8, 0, 20, None))?;
    check(driver.discard(5, 1), (11, 16, 0, None))?;
    let segment = request(&play)?.2[1];
    let bytes: [u8; 16] = play.bytes(segment.address)?;
    ensure_eq("flags of a discard", bytes[12..].to_vec(), vec![0; 4])?;
    let check = |driver_did: Result<(), DriverError>, kind| -> Result<(), Objection> {
        driver_did.map_err(failed)?;
        ensure_eq("type", request(&play)?.0, kind)
    };
    check(driver.write_zeroes(5, 1, true), 13)?;
    Ok(Finding::Passed)
}

fn blk_read_only(session: &mut Session) -> Verdict {
    session.trace.clear();
    let mut driver = blk::Driver::new(Box::new(session.transport.clone())).map_err(failed)?;
    let accepted = session.trace.calls().into_iter().find_map(|call| match call {
        Call::SetDriverFeatures(features) => Some(features),
        _ => None,
    });
    let ro = Features::bit(5);
    ensure(accepted.is_some_and(|features| features.contains(ro)), "VIRTIO_BLK_F_RO", format_args!("{accepted:?}"))?;
    ensure(driver.geometry().read_only, "a driver that knows", "it does not")?;
    driver.read(0, &mut [0; 512]).map_err(failed)?;
    let written = driver.write(0, &[1; 512]);
    ensure(written.is_err(), "a write fails", "it does not")?;
    Ok(Finding::Passed)
}

fn takes_packed(session: &mut Session) -> Verdict {
    session.trace.clear();
    let transport = Box::new(session.transport.clone());
    match session.cell.device_type {
        BLK => drop(blk::Driver::new(transport).map_err(failed)?),
        CONSOLE => drop(console::Driver::new(transport).map_err(failed)?),
        RNG => drop(rng::Driver::new(transport).map_err(failed)?),
        other => return Err(Objection::Skipped(format!("there is no driver for devices of type {other}"))),
    }
    let accepted = session.trace.calls().into_iter().find_map(|call| match call {
        Call::SetDriverFeatures(features) => Some(features),
        _ => None,
    });
    let packed = accepted.is_some_and(|features| features.contains(Features::RING_PACKED));
    ensure(packed, "VIRTIO_F_RING_PACKED", format_args!("{accepted:?}"))?;
    Ok(Finding::Passed)
}

fn rng_works(session: &mut Session) -> Verdict {
    let mut driver = rng::Driver::new(Box::new(session.transport.clone())).map_err(failed)?;
    let (mut first, mut second) = (vec![0; 10_000], vec![0; 10_000]);
    driver.fill(&mut first).map_err(failed)?;
    driver.fill(&mut second).map_err(failed)?;
    ensure(first != second, "other bytes each time", "the same")?;
    drop(driver);
    let (transport, play) = played(session);
    rng::Driver::new(transport).map_err(failed)?.fill(&mut [0; 100]).map_err(failed)?;
    let chain = play.newest(0)?;
    let right = chain.iter().all(|entry| entry.flags & WRITE != 0);
    ensure(right, "device-writable buffers only", format_args!("{chain:x?}"))?;
    Ok(Finding::Passed)
}

fn console_works(session: &mut Session) -> Verdict {
    let mut driver = console::Driver::new(Box::new(session.transport.clone())).map_err(failed)?;
    for text in [&b"a"[..], &[7; 5000]] {
        driver.write(text).map_err(failed)?;
        let printed = session.far_side.output()?;
        ensure(printed == text, format_args!("{} bytes printed", text.len()), printed.len())?;
    }
    session.far_side.input(b"typed")?;
    let mut heard = Vec::new();
    while heard.len() < 5 {
        let mut part = [0; 5];
        let len = driver.read(&mut part).map_err(failed)?;
        heard.extend(&part[..len]);
    }
    ensure_eq("input", heard, b"typed".to_vec())?;
    drop(driver);
    let (transport, play) = played(session);
    let mut driver = console::Driver::new(transport).map_err(failed)?;
    driver.write(b"x").map_err(failed)?;
    for (queue, write) in [(0, WRITE), (1, 0)] {
        let chain = play.newest(queue)?;
        let right = chain.iter().all(|entry| entry.flags & WRITE == write);
        ensure(right, format_args!("buffers of the right direction in queue {queue}"), format_args!("{chain:x?}"))?;
    }
    Ok(Finding::Passed)
}
