//! The block device.

use polyvirt_core::Features;
use polyvirt_core::transport::{Transport, read_config};

use super::sample::{BLK_IN, BLK_OK, BLK_OUT, POISON, blk_header, ensure, ensure_eq};
use crate::raw::{Memory, Ring};
use crate::suite::{Applies, BLK, Case, Finding, Objection, Session, Variant, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("blk/write-then-read", "what is written is read back, and is on the disk", write_read)
        .judges(&["N0041"])
        .packed_judges(&["N0089"]),
    case("blk/first-and-last-sector", "the first and the last sector can be read and written", edges),
    case("blk/large", "a request of many sectors in one descriptor", large),
    case("blk/many-in-flight", "many requests at once, each with its own data", many),
    case("blk/beyond-the-end", "a request beyond the last sector fails and touches nothing", beyond).class(&[14, 16]),
    case("blk/sector-overflows", "a sector whose byte address wraps fails and touches nothing", overflow).class(&[9]),
    case("blk/odd-write", "a write of no whole number of sectors fails and writes nothing", odd_write).class(&[16]),
    case("blk/empty", "reads and writes of nothing do no harm", empty).class(&[10]),
    case("blk/status-is-last-byte", "the status is the last device-writable byte, wherever that is", status_last)
        .judges(&["N0037"]),
    case("blk/used-length-of-writes", "a write's used length is its status byte", write_length)
        .judges(&["N0067"])
        .packed_judges(&[]),
    case("blk/flush-offered", "VIRTIO_BLK_F_FLUSH is offered", flush_offered).judges(&["N0756", "N0757"]),
    case("blk/read-only", "a disk that cannot be written says so, and fails writes", read_only)
        .judges(&["N0802", "N0803"])
        .with(Variant::ReadOnly),
    case("blk/backend-fails", "a failing backend gives an error status, and the device goes on", backend_fails),
    case("blk/capacity", "the capacity in the configuration is what can be read", capacity),
    case(
        "blk/capacity-changes",
        "a grown disk can be read to its new end, a shrunk one not beyond it",
        capacity_changes,
    )
    .judges(&["N0801"]),
    case("blk/padding", "padding in the configuration is 0", padding).judges(&["N0759"]),
    case("blk/legacy-not-zoned", "a legacy device does not offer VIRTIO_BLK_F_ZONED", not_zoned)
        .judges(&["N0761"])
        .on(Applies { legacy: Some(true), ..Applies::to(BLK) }),
    case("blk/driver-sectors", "the disk survives requests from every corner of the sector space", corners)
        .class(&[9, 16]),
];

pub(super) const fn case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).on(Applies::to(BLK))
}

pub(super) const IOERR: u8 = 1;
pub(super) const UNSUPP: u8 = 2;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

/// VIRTIO_BLK_F_RO.
const RO: Features = Features::bit(5);
/// VIRTIO_BLK_F_FLUSH.
pub(super) const F_FLUSH: Features = Features::bit(9);
/// VIRTIO_BLK_F_CONFIG_WCE.
pub(super) const CONFIG_WCE: Features = Features::bit(11);
/// VIRTIO_BLK_F_DISCARD.
pub(super) const F_DISCARD: Features = Features::bit(13);
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub(super) const F_WRITE_ZEROES: Features = Features::bit(14);

/// What came of a request.
#[derive(Debug, PartialEq)]
pub(super) struct Done {
    /// The status byte.
    pub(super) status: u8,
    /// The used length.
    pub(super) len: u32,
    /// The device-writable bytes in front of the status.
    pub(super) data: Vec<u8>,
}

/// A running device with all that is offered for disks.
pub(super) fn start(session: &mut Session) -> Result<Ring, Objection> {
    start_with(session, F_FLUSH | F_DISCARD | F_WRITE_ZEROES | RO)
}

fn start_with(session: &mut Session, wanted: Features) -> Result<Ring, Objection> {
    let mut rings = session.bring_up(wanted)?;
    Ok(rings.remove(0))
}

/// The pieces of a request: header, `out`, `room` bytes to fill, status.
fn pieces(session: &Session, kind: u32, sector: u64, out: &[u8], room: u32) -> Result<Vec<(Memory, bool)>, Objection> {
    let mut pieces = vec![(Memory::readable(session, &blk_header(session, kind, sector))?, false)];
    if !out.is_empty() {
        pieces.push((Memory::readable(session, out)?, false));
    }
    if room > 0 {
        pieces.push((Memory::writable(session, room, POISON)?, true));
    }
    pieces.push((Memory::writable(session, 1, POISON)?, true));
    Ok(pieces)
}

pub(super) fn done(pieces: &[(Memory, bool)], len: u32) -> Result<Done, Objection> {
    let mut data = Vec::new();
    for (memory, _) in pieces.iter().filter(|(_, writable)| *writable) {
        data.extend(memory.bytes()?);
    }
    let status = data.pop().ok_or_else(|| Objection::failed("a status", "none"))?;
    Ok(Done { status, len, data })
}

/// Makes one request and waits for it.
pub(super) fn request(
    session: &mut Session,
    ring: &mut Ring,
    kind: u32,
    sector: u64,
    out: &[u8],
    room: u32,
) -> Result<Done, Objection> {
    session.trace.note(format!("block request: type {kind}, sector {sector:#x}, {} bytes out, {room} in", out.len()));
    let pieces = pieces(session, kind, sector, out, room)?;
    ring.chain(0, &pieces);
    ring.offer(0);
    ring.kick()?;
    let (id, len) = session.wait_used(ring)?;
    ensure_eq("used id", id, 0)?;
    done(&pieces, len)
}

/// A request that has to be done.
pub(super) fn good(
    session: &mut Session,
    ring: &mut Ring,
    kind: u32,
    sector: u64,
    out: &[u8],
    room: u32,
) -> Result<Done, Objection> {
    let done = request(session, ring, kind, sector, out, room)?;
    ensure_eq("status", done.status, BLK_OK)?;
    Ok(done)
}

/// A request that has to end with `status`.
pub(super) fn bad(
    session: &mut Session,
    ring: &mut Ring,
    (kind, sector): (u32, u64),
    (out, room): (&[u8], u32),
    status: u8,
) -> Result<(), Objection> {
    let done = request(session, ring, kind, sector, out, room)?;
    let expected = format_args!("status {status} for type {kind} at sector {sector:#x}");
    ensure(done.status == status, expected, done.status)?;
    Ok(())
}

pub(super) fn sectors(session: &mut Session) -> Result<u64, Objection> {
    let mut bytes = [0; 8];
    read_config(&mut session.transport, 0, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Bytes that tell where they are from.
pub(super) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (seed.wrapping_mul(131) + at / 512 * 7 + at % 251) as u8).collect()
}

pub(super) fn need(session: &mut Session, feature: Features, name: &str) -> Result<(), Objection> {
    match session.transport.device_features()?.contains(feature) {
        true => Ok(()),
        false => Err(Objection::Skipped(format!("the device does not offer {name}"))),
    }
}

pub(super) fn on_disk(session: &mut Session, sector: u64, expected: &[u8]) -> Result<(), Objection> {
    let mut bytes = vec![0; expected.len()];
    session.far_side.read_disk(sector * 512, &mut bytes)?;
    ensure(
        bytes == expected,
        format_args!("the disk holds what it should at sector {sector}"),
        "it holds something else",
    )
}

fn write_read(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    for sector in [0, 1, 7, 40] {
        let bytes = pattern(sector, 1536);
        good(session, &mut ring, BLK_OUT, sector, &bytes, 0)?;
        on_disk(session, sector, &bytes)?;
        let read = good(session, &mut ring, BLK_IN, sector, &[], 1536)?;
        ensure(read.data == bytes, "what was written", "other bytes")?;
        ensure_eq("used length of a read", read.len, 1537)?;
    }
    Ok(Finding::Passed)
}

fn edges(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let last = sectors(session)? - 1;
    for sector in [0, last] {
        let bytes = pattern(sector, 512);
        good(session, &mut ring, BLK_OUT, sector, &bytes, 0)?;
        let read = good(session, &mut ring, BLK_IN, sector, &[], 512)?;
        ensure(read.data == bytes, "what was written", "other bytes")?;
    }
    Ok(Finding::Passed)
}

fn large(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let len = (sectors(session)? * 512).min(256 * 1024) as u32;
    let bytes = pattern(3, len as usize);
    good(session, &mut ring, BLK_OUT, 0, &bytes, 0)?;
    let read = good(session, &mut ring, BLK_IN, 0, &[], len)?;
    ensure(read.data == bytes, "what was written", "other bytes")?;
    ensure_eq("used length", read.len, len + 1)?;
    Ok(Finding::Passed)
}

fn many(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let count = (ring.size() / 3).min(32);
    for kind in [BLK_OUT, BLK_IN] {
        let mut requests = Vec::new();
        for number in 0..count {
            let bytes = pattern(number.into(), 512);
            let pieces = match kind {
                BLK_OUT => pieces(session, kind, number.into(), &bytes, 0)?,
                _ => pieces(session, kind, number.into(), &[], 512)?,
            };
            ring.chain(3 * number, &pieces);
            requests.push((pieces, bytes));
        }
        let heads: Vec<_> = (0..count).map(|number| 3 * number).collect();
        ring.offer_all(&heads);
        ring.kick()?;
        for _ in 0..count {
            let (id, len) = session.wait_used(&mut ring)?;
            let Some((pieces, bytes)) = requests.get(id as usize / 3).filter(|_| id % 3 == 0) else {
                return Err(Objection::failed("the head of a request", id));
            };
            let done = done(pieces, len)?;
            ensure_eq("status", done.status, BLK_OK)?;
            let right = kind == BLK_OUT || done.data == *bytes;
            ensure(right, format_args!("the data of sector {}", id / 3), "other data")?;
        }
    }
    Ok(Finding::Passed)
}

/// Fills the whole disk, lets `attempts` fail, and sees that nothing changed.
pub(super) fn unchanged(
    session: &mut Session,
    attempts: impl FnOnce(&mut Session, &mut Ring, u64) -> Result<(), Objection>,
) -> Verdict {
    let mut ring = start(session)?;
    let sectors = sectors(session)?;
    let tail = sectors - sectors.min(16);
    let bytes = pattern(9, ((sectors - tail) * 512) as usize);
    good(session, &mut ring, BLK_OUT, tail, &bytes, 0)?;
    good(session, &mut ring, BLK_OUT, 0, &bytes[..2048], 0)?;
    attempts(session, &mut ring, sectors)?;
    on_disk(session, tail, &bytes)?;
    on_disk(session, 0, &bytes[..2048])?;
    good(session, &mut ring, BLK_IN, 0, &[], 512)?;
    Ok(Finding::Rejected)
}

fn beyond(session: &mut Session) -> Verdict {
    unchanged(session, |session, ring, sectors| {
        for (sector, count) in [(sectors, 1), (sectors - 1, 2), (sectors + 1, 1), (0, sectors.min(4096) as usize + 1)] {
            if sector == 0 && sectors > 4096 {
                continue;
            }
            let bytes = vec![0xee; count * 512];
            bad(session, ring, (BLK_OUT, sector), (&bytes, 0), IOERR)?;
            bad(session, ring, (BLK_IN, sector), (&[], bytes.len() as u32), IOERR)?;
        }
        Ok(())
    })
}

fn overflow(session: &mut Session) -> Verdict {
    unchanged(session, |session, ring, _| {
        for sector in [u64::MAX, u64::MAX - 1, 1 << 55, (1 << 55) + 1, 1 << 63, u64::MAX / 512, u64::MAX / 512 + 1] {
            bad(session, ring, (BLK_OUT, sector), (&[0xee; 1024], 0), IOERR)?;
            bad(session, ring, (BLK_IN, sector), (&[], 1024), IOERR)?;
        }
        Ok(())
    })
}

fn odd_write(session: &mut Session) -> Verdict {
    unchanged(session, |session, ring, _| {
        for len in [1, 511, 513, 1000] {
            bad(session, ring, (BLK_OUT, 0), (&vec![0xee; len], 0), IOERR)?;
        }
        Ok(())
    })
}

fn empty(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let last = sectors(session)?;
    for kind in [BLK_IN, BLK_OUT] {
        for sector in [0, last - 1] {
            let done = request(session, &mut ring, kind, sector, &[], 0)?;
            ensure(done.status <= IOERR, "done, or an error", done.status)?;
        }
    }
    good(session, &mut ring, BLK_IN, 0, &[], 512)?;
    Ok(Finding::Passed)
}

fn status_last(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let bytes = pattern(5, 512);
    good(session, &mut ring, BLK_OUT, 4, &bytes, 0)?;
    let header = Memory::readable(session, &blk_header(session, BLK_IN, 4))?;
    // Data and status in one descriptor of 513, in 512 + 1, in 500 + 13, in 1 + 512.
    for cut in [513, 512, 500, 1] {
        let both = Memory::writable(session, 513, POISON)?;
        let mut pieces = vec![(header.clone(), false), (both.part(0, cut), true)];
        if cut < 513 {
            pieces.push((both.part(cut, 513 - cut), true));
        }
        ring.chain(0, &pieces);
        ring.offer(0);
        ring.kick()?;
        let (_, len) = session.wait_used(&mut ring)?;
        ensure_eq("used length", len, 513)?;
        let read = both.bytes()?;
        ensure_eq("status, the last byte,", read[512], BLK_OK)?;
        ensure(read[..512] == bytes, "the sector in front of it", "other bytes")?;
    }
    Ok(Finding::Passed)
}

fn write_length(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let done = good(session, &mut ring, BLK_OUT, 0, &[1; 512], 0)?;
    ensure_eq("used length of a write", done.len, 1)?;
    Ok(Finding::Passed)
}

fn flush_offered(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    ensure(offered.contains(F_FLUSH), "VIRTIO_BLK_F_FLUSH", format_args!("{:#x}", offered.bits()))?;
    ensure(!offered.contains(CONFIG_WCE) || offered.contains(F_FLUSH), "FLUSH with CONFIG_WCE", "CONFIG_WCE alone")?;
    Ok(Finding::Passed)
}

fn read_only(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    ensure(offered.contains(RO), "VIRTIO_BLK_F_RO", format_args!("{:#x}", offered.bits()))?;
    // The feature counts when it is offered, whether it was accepted or not.
    for wanted in [F_FLUSH | RO, F_FLUSH] {
        let mut ring = start_with(session, wanted)?;
        let mut before = vec![0; 1024];
        session.far_side.read_disk(0, &mut before)?;
        bad(session, &mut ring, (BLK_OUT, 0), (&[0xee; 1024], 0), IOERR)?;
        on_disk(session, 0, &before)?;
        let read = good(session, &mut ring, BLK_IN, 0, &[], 1024)?;
        ensure(read.data == before, "what is on the disk", "other bytes")?;
    }
    Ok(Finding::Rejected)
}

fn backend_fails(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let bytes = pattern(1, 512);
    good(session, &mut ring, BLK_OUT, 0, &bytes, 0)?;
    for kind in [BLK_IN, BLK_OUT] {
        session.trace.note("(the backend fails the next request)");
        session.far_side.fail_next_io()?;
        let (out, room): (&[u8], u32) = if kind == BLK_IN { (&[], 512) } else { (&[0xee; 512], 0) };
        bad(session, &mut ring, (kind, 0), (out, room), IOERR)?;
        let read = good(session, &mut ring, BLK_IN, 0, &[], 512)?;
        ensure(read.data == bytes, "what was written before", "other bytes")?;
    }
    Ok(Finding::Passed)
}

fn capacity(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let sectors = sectors(session)?;
    ensure(sectors > 0, "at least a sector", sectors)?;
    good(session, &mut ring, BLK_IN, sectors - 1, &[], 512)?;
    bad(session, &mut ring, (BLK_IN, sectors), (&[], 512), IOERR)?;
    Ok(Finding::Passed)
}

fn capacity_changes(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let before = sectors(session)?;
    while session.interrupted()? {}
    for after in [before + 8, before / 2] {
        session.trace.note(format!("(the disk has {after} sectors now)"));
        session.far_side.set_capacity(after)?;
        session.wait_config()?;
        ensure_eq("capacity", sectors(session)?, after)?;
        good(session, &mut ring, BLK_IN, after - 1, &[], 512)?;
        bad(session, &mut ring, (BLK_IN, after), (&[], 512), IOERR)?;
    }
    Ok(Finding::Passed)
}

fn padding(session: &mut Session) -> Verdict {
    let _ring = start(session)?;
    let mut bytes = [0xff; 60];
    match session.transport.read_config(0, &mut bytes) {
        Ok(()) => {}
        // A device page carries only what the device has.
        Err(_) => return Err(Objection::Skipped("the configuration is shorter than its padding".into())),
    }
    ensure_eq("unused0", bytes[33], 0)?;
    ensure_eq("unused1", bytes[57..].to_vec(), vec![0; 3])?;
    Ok(Finding::Passed)
}

fn not_zoned(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    ensure(!offered.contains(Features::bit(17)), "no VIRTIO_BLK_F_ZONED", "it is offered")?;
    Ok(Finding::Passed)
}

fn corners(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    for kind in [BLK_IN, BLK_OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES] {
        for sector in [0, 1, 1 << 31, 1 << 32, 1 << 54, 1 << 55, 1 << 63, u64::MAX] {
            for (out, room) in [(0usize, 0u32), (16, 0), (0, 16), (512, 512), (16, 20)] {
                let done = request(session, &mut ring, kind, sector, &vec![0; out], room)?;
                ensure(done.status <= UNSUPP, "a status of 0 to 2", done.status)?;
                ensure(done.len <= room + 1, format_args!("at most {} bytes", room + 1), done.len)?;
            }
        }
    }
    good(session, &mut ring, BLK_IN, 0, &[], 512)?;
    Ok(Finding::Passed)
}
