//! A disk of a guest: what is on it before, what the guest is to write, and what the host finds on it afterwards.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::image::{SECTOR, fill};

/// Sectors of a disk: 16 MiB and a few, so that it ends neither at a page nor at a request.
pub(super) const SECTORS: u64 = (16 << 11) + 5;
/// The first KiB of it are for a file system.
const FILE_SYSTEM: u64 = 8 << 10;
/// Where the pattern is written: through the page cache, at a multiple of 64 KiB …
const CACHED: Run = Run { first: 12 << 11, sectors: 512 };
/// … past it, sector by sector, not at a page …
const DIRECT: Run = Run { first: (13 << 11) + 3, sectors: 32 };
/// … and onto the last sector.
const LAST: Run = Run { first: SECTORS - 1, sectors: 1 };

const PATTERN_SEED: u64 = 0x6c61_6220_7061_7474;

/// Sectors that follow each other.
struct Run {
    first: u64,
    sectors: u64,
}

impl Run {
    fn bytes(&self) -> Range<usize> {
        self.first as usize * SECTOR..(self.first + self.sectors) as usize * SECTOR
    }
}

/// What every guest writes: as long as the longest run.
pub(super) fn pattern() -> Vec<u8> {
    let mut bytes = vec![0; CACHED.sectors as usize * SECTOR];
    fill(PATTERN_SEED, 0, &mut bytes);
    bytes
}

/// A disk's image, as it was made.
pub(super) struct Image {
    /// The file that is served.
    pub(super) path: PathBuf,
    /// SHA-256 of all of it.
    pub(super) sha256: String,
    content: Vec<u8>,
}

/// What is on a disk after its guest has ended.
#[derive(Debug, PartialEq)]
pub(super) struct After {
    /// SHA-256 of all of it.
    pub(super) sha256: String,
    /// The runs of the pattern that are not there, by their first sector.
    pub(super) missing: Vec<u64>,
    /// Whether a file with the pattern in it is in the file system's part.
    pub(super) file: bool,
    /// The first sector behind the file system that changed though nobody was to write it.
    pub(super) stray: Option<u64>,
}

impl Image {
    /// Makes the image of the disk `name` in `folder`. It begins with a line that tells the name.
    pub(super) fn create(folder: &Path, name: &str) -> io::Result<Self> {
        let mut content = vec![0; SECTORS as usize * SECTOR];
        let seed = name.bytes().fold(0, |seed: u64, byte| seed << 8 | u64::from(byte));
        fill(seed, 0, &mut content);
        let line = format!("polyvirt lab disk {name}\n");
        content[..line.len()].copy_from_slice(line.as_bytes());
        let path = folder.join(format!("{name}.img"));
        fs::write(&path, &content)?;
        Ok(Self { path, sha256: sha256(&content), content })
    }

    /// What the guest has to know: the file system's KiB; the first sector of each run.
    pub(super) fn places(&self) -> String {
        format!("{FILE_SYSTEM} {} {} {}", CACHED.first, DIRECT.first, LAST.first)
    }

    /// The disk's size in sectors.
    pub(super) fn sectors(&self) -> u64 {
        SECTORS
    }

    /// Looks at the file again.
    pub(super) fn after(&self) -> io::Result<After> {
        let content = fs::read(&self.path)?;
        Ok(self.compare(&content))
    }

    fn compare(&self, content: &[u8]) -> After {
        let pattern = pattern();
        let mut expected = self.content.clone();
        let mut missing = Vec::new();
        for run in [CACHED, DIRECT, LAST] {
            let bytes = run.bytes();
            let written = &pattern[..bytes.len()];
            if content.get(bytes.clone()) != Some(written) {
                missing.push(run.first);
            }
            // Whether it is right or not: it is told once.
            expected[bytes.clone()].copy_from_slice(content.get(bytes.clone()).unwrap_or(&pattern[..bytes.len()]));
        }
        let behind = FILE_SYSTEM as usize * 1024;
        let (files, rest) = content.split_at(behind.min(content.len()));
        let differs = |(is, was): (&[u8], &[u8])| is != was;
        let first = rest.chunks(SECTOR).zip(expected[behind..].chunks(SECTOR)).position(differs);
        let stray = first.map(|sector| (behind / SECTOR + sector) as u64);
        let stray = stray.or((content.len() != expected.len()).then_some((content.len() / SECTOR) as u64));
        // The file system has blocks of 1 KiB.
        let file = files.chunks(1024).any(|block| block == &pattern[..1024]);
        After { sha256: sha256(content), missing, file, stray }
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::*;

    /// One image for all tests, whose file is gone: it takes a while to make.
    fn image() -> &'static Image {
        static IMAGE: OnceLock<Image> = OnceLock::new();
        IMAGE.get_or_init(|| Image::create(tempfile::tempdir().unwrap().path(), "split").unwrap())
    }

    /// What a good guest leaves behind.
    fn written(image: &Image) -> Vec<u8> {
        let mut content = image.content.clone();
        for run in [CACHED, DIRECT, LAST] {
            let bytes = run.bytes();
            content[bytes.clone()].copy_from_slice(&pattern()[..bytes.len()]);
        }
        content[5 << 20..(5 << 20) + 1024].copy_from_slice(&pattern()[..1024]);
        content
    }

    #[test]
    fn a_disk_begins_with_its_name_and_nothing_is_found_on_a_fresh_one() {
        let folder = tempfile::tempdir().unwrap();
        let image = Image::create(folder.path(), "split").unwrap();
        assert!(image.content.starts_with(b"polyvirt lab disk split\n"));
        let after = image.after().unwrap();
        assert_eq!(after.sha256, image.sha256);
        assert_eq!(after.missing, [CACHED.first, DIRECT.first, LAST.first]);
        assert!(!after.file);
        assert_eq!(after.stray, None);
    }

    #[test]
    fn what_a_guest_wrote_is_found() {
        let image = image();
        let after = image.compare(&written(image));
        assert_eq!((after.missing, after.file, after.stray), (vec![], true, None));
        assert_ne!(after.sha256, image.sha256);
    }

    #[test]
    fn a_single_wrong_byte_is_found() {
        let image = image();
        let mut content = written(image);
        content[DIRECT.bytes().start + 5000] ^= 1;
        assert_eq!(image.compare(&content).missing, [DIRECT.first]);
        let mut content = written(image);
        content[(9 << 20) + 700] ^= 1;
        assert_eq!(image.compare(&content).stray, Some((9 << 11) + 1));
    }

    #[test]
    fn an_image_of_another_size_is_stray() {
        let image = image();
        let mut content = written(image);
        content.truncate(14 << 20);
        let after = image.compare(&content);
        assert_eq!((after.missing, after.stray), (vec![LAST.first], Some(14 << 11)));
        content.truncate(100);
        assert_eq!(image.compare(&content).stray, Some(0));
    }
}
