//! What is written onto the image, and where.

use std::ops::Range;

use super::SECTOR;

/// Seed of the generated image.
pub(super) const IMAGE_SEED: u64 = 0x706f_6c79_7669_7274;
/// Seed of what is written.
pub(super) const WRITE_SEED: u64 = 0x7669_7274_696f_3134;

/// Fills `sectors` (whole ones) with pseudo-random bytes that depend on `seed` and on the number of each sector, of
/// which `first` is the first.
pub(crate) fn fill(seed: u64, first: u64, sectors: &mut [u8]) {
    for (number, sector) in (first..).zip(sectors.chunks_mut(SECTOR)) {
        let mut state = seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for word in sector.chunks_mut(8) {
            let bytes = split_mix(&mut state).to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
    }
}

/// Sebastiano Vigna's SplitMix64: good enough bytes from any seed.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The runs of sectors that are written on a disk of `total` sectors: its first and last, one that neither begins nor
/// ends at a page, and one that is longer than a request.
pub(super) fn runs(total: u64) -> Vec<Range<u64>> {
    let at = |start: u64, len: u64| {
        let start = start.min(total);
        start..(start + len).min(total)
    };
    vec![at(0, 1), at((total / 2) | 1, 21), at((total / 3) & !7, 1536), at(total.saturating_sub(1), 1)]
}

/// Makes of `sectors`, the content of a disk of `total` sectors from `first` on, what it is after the runs were written.
pub(super) fn overlay(total: u64, first: u64, sectors: &mut [u8]) {
    let end = first + (sectors.len() / SECTOR) as u64;
    for run in runs(total) {
        let (from, to) = (run.start.max(first), run.end.min(end));
        if from < to {
            let range = (from - first) as usize * SECTOR..(to - first) as usize * SECTOR;
            fill(WRITE_SEED, from, &mut sectors[range]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_has_the_same_bytes_wherever_a_run_begins() {
        let mut whole = vec![0; 8 * SECTOR];
        fill(WRITE_SEED, 10, &mut whole);
        let mut part = vec![0; 3 * SECTOR];
        fill(WRITE_SEED, 12, &mut part);
        assert_eq!(part, whole[2 * SECTOR..5 * SECTOR]);
        fill(IMAGE_SEED, 12, &mut part);
        assert_ne!(part, whole[2 * SECTOR..5 * SECTOR]);
    }

    #[test]
    fn runs_cover_the_ends_and_stay_inside() {
        for total in [1, 2, 3, 8, 100, 8195, 131_072] {
            let runs = runs(total);
            assert!(runs.iter().all(|run| run.start <= run.end && run.end <= total), "{total}");
            assert!(runs.iter().any(|run| run.contains(&0)) && runs.iter().any(|run| run.contains(&(total - 1))));
        }
        let unaligned = &runs(131_072)[1];
        assert!(!unaligned.start.is_multiple_of(8) && !unaligned.end.is_multiple_of(8));
    }

    #[test]
    fn an_overlay_in_pieces_is_the_overlay_of_the_whole() {
        let total = 8195;
        let mut whole = vec![0xaa; total * SECTOR];
        let mut pieces = whole.clone();
        overlay(total as u64, 0, &mut whole);
        for (at, piece) in pieces.chunks_mut(100 * SECTOR).enumerate() {
            overlay(total as u64, at as u64 * 100, piece);
        }
        assert!(whole == pieces);
        assert!(whole[2 * SECTOR..100 * SECTOR].iter().all(|&byte| byte == 0xaa));
    }
}
