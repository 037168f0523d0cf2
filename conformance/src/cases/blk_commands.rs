//! The block device's requests besides reading and writing.

use super::blk::{
    DISCARD, F_DISCARD, F_FLUSH, F_WRITE_ZEROES, FLUSH, GET_ID, IOERR, UNSUPP, WRITE_ZEROES, bad, case, good, need,
    on_disk, pattern, start, unchanged,
};
use super::sample::{BLK_IN, BLK_OUT, ensure, ensure_eq};
use crate::suite::{Case, Finding, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("blk/flush", "a flush reaches the backend before it is used", flush).judges(&["N0812"]),
    case("blk/get-id", "the device has an id of 20 bytes", get_id),
    case("blk/unknown-type", "a request of an unknown type is unsupported", unknown_type),
    case("blk/zoned-requests", "zone requests without the feature are unsupported", zoned).judges(&["N0817"]),
    case("blk/discard", "a discard is carried out", discard),
    case("blk/discard-unmap", "a discard with the unmap flag is unsupported", discard_unmap).judges(&["N0805"]),
    case("blk/unknown-flags", "discard and write-zeroes with unknown flags are unsupported", unknown_flags)
        .judges(&["N0804"]),
    case("blk/write-zeroes", "written zeroes are read back, and nothing around them changes", write_zeroes)
        .judges(&["N0808"]),
    case("blk/write-zeroes-beyond", "zeroes beyond the last sector fail and touch nothing", zeroes_beyond).class(&[16]),
    case("blk/segment-odd", "discard and write-zeroes with no whole number of segments fail", odd_segment).class(&[16]),
];

fn flush(session: &mut Session) -> Verdict {
    need(session, F_FLUSH, "VIRTIO_BLK_F_FLUSH")?;
    let mut ring = start(session)?;
    for _ in 0..3 {
        good(session, &mut ring, BLK_OUT, 2, &pattern(2, 512), 0)?;
        let before = session.far_side.flushes()?;
        let done = good(session, &mut ring, FLUSH, 0, &[], 0)?;
        ensure_eq("used length of a flush", done.len, 1)?;
        let after = session.far_side.flushes()?;
        ensure(after > before, "the backend was told to flush", "it was not")?;
    }
    Ok(Finding::Passed)
}

fn get_id(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let done = good(session, &mut ring, GET_ID, 0, &[], 20)?;
    ensure_eq("used length", done.len, 21)?;
    let text: Vec<_> = done.data.iter().take_while(|&&byte| byte != 0).collect();
    ensure(
        text.iter().all(|byte| byte.is_ascii_graphic() || **byte == b' '),
        "an id in ASCII",
        format_args!("{text:x?}"),
    )?;
    ensure(
        done.data[text.len()..].iter().all(|&byte| byte == 0),
        "zeroes behind the id",
        format_args!("{:x?}", done.data),
    )?;
    Ok(Finding::Passed)
}

fn unknown_type(session: &mut Session) -> Verdict {
    unchanged(session, |session, ring, _| {
        for kind in [3, 5, 6, 7, 9, 12, 27, 0x100, 0x4000_0000, u32::MAX] {
            bad(session, ring, (kind, 0), (&[0xee; 512], 0), UNSUPP)?;
            bad(session, ring, (kind, 0), (&[], 512), UNSUPP)?;
        }
        Ok(())
    })
}

fn zoned(session: &mut Session) -> Verdict {
    unchanged(session, |session, ring, _| {
        // APPEND 15, REPORT 16, OPEN 18, CLOSE 20, FINISH 22, RESET 24, RESET_ALL 26.
        for kind in [15, 16, 18, 20, 22, 24, 26] {
            bad(session, ring, (kind, 0), (&[], 512), UNSUPP)?;
        }
        Ok(())
    })
}

/// The range of a discard or write-zeroes request.
pub(super) fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn discard(session: &mut Session) -> Verdict {
    need(session, F_DISCARD, "VIRTIO_BLK_F_DISCARD")?;
    let mut ring = start(session)?;
    let bytes = pattern(8, 8 * 512);
    good(session, &mut ring, BLK_OUT, 0, &bytes, 0)?;
    let done = good(session, &mut ring, DISCARD, 0, &segment(2, 3, 0), 0)?;
    ensure_eq("used length", done.len, 1)?;
    // What was discarded reads as anything; what was not stays.
    on_disk(session, 0, &bytes[..2 * 512])?;
    on_disk(session, 5, &bytes[5 * 512..])?;
    Ok(Finding::Passed)
}

fn discard_unmap(session: &mut Session) -> Verdict {
    need(session, F_DISCARD, "VIRTIO_BLK_F_DISCARD")?;
    unchanged(session, |session, ring, _| bad(session, ring, (DISCARD, 0), (&segment(0, 1, 1), 0), UNSUPP))
}

fn unknown_flags(session: &mut Session) -> Verdict {
    need(session, F_DISCARD | F_WRITE_ZEROES, "VIRTIO_BLK_F_DISCARD and VIRTIO_BLK_F_WRITE_ZEROES")?;
    unchanged(session, |session, ring, _| {
        for flags in [2, 3, 0x8000_0000, u32::MAX] {
            bad(session, ring, (DISCARD, 0), (&segment(0, 1, flags), 0), UNSUPP)?;
            bad(session, ring, (WRITE_ZEROES, 0), (&segment(0, 1, flags), 0), UNSUPP)?;
        }
        Ok(())
    })
}

fn write_zeroes(session: &mut Session) -> Verdict {
    need(session, F_WRITE_ZEROES, "VIRTIO_BLK_F_WRITE_ZEROES")?;
    let mut ring = start(session)?;
    for unmap in [0, 1] {
        let bytes = pattern(8, 8 * 512);
        good(session, &mut ring, BLK_OUT, 0, &bytes, 0)?;
        let done = good(session, &mut ring, WRITE_ZEROES, 0, &segment(2, 3, unmap), 0)?;
        ensure_eq("used length", done.len, 1)?;
        let read = good(session, &mut ring, BLK_IN, 0, &[], 8 * 512)?;
        let mut expected = bytes;
        expected[2 * 512..5 * 512].fill(0);
        ensure(read.data == expected, "zeroes in sectors 2 to 4, the rest as it was", "something else")?;
    }
    Ok(Finding::Passed)
}

fn zeroes_beyond(session: &mut Session) -> Verdict {
    need(session, F_WRITE_ZEROES, "VIRTIO_BLK_F_WRITE_ZEROES")?;
    unchanged(session, |session, ring, sectors| {
        for (sector, count) in [(sectors, 1), (sectors - 1, 2), (u64::MAX, 2), (1 << 55, 1), (0, u32::MAX)] {
            bad(session, ring, (WRITE_ZEROES, 0), (&segment(sector, count, 0), 0), IOERR)?;
        }
        Ok(())
    })
}

fn odd_segment(session: &mut Session) -> Verdict {
    need(session, F_DISCARD | F_WRITE_ZEROES, "VIRTIO_BLK_F_DISCARD and VIRTIO_BLK_F_WRITE_ZEROES")?;
    unchanged(session, |session, ring, _| {
        for kind in [DISCARD, WRITE_ZEROES] {
            for len in [1, 15, 17, 31] {
                bad(session, ring, (kind, 0), (&vec![0; len], 0), IOERR)?;
            }
        }
        Ok(())
    })
}
