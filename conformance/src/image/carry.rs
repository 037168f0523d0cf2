//! Carrying an image through one block device.

use std::fmt::Display;
use std::path::Path;
use std::time::Instant;

use sha2::{Digest, Sha256};

use super::{CHUNK, Image, ImageError, SECTOR, hexadecimal, pattern};
use crate::report::ImageResult;

/// A block device in its driver's hands.
pub(crate) trait Disk {
    /// What goes wrong.
    type Error: Display;

    /// Sectors of [`SECTOR`] bytes, as the device's configuration says.
    fn sectors(&self) -> u64;
    /// Reads from `sector` on; `data` is whole sectors.
    fn read(&mut self, sector: u64, data: &mut [u8]) -> Result<(), Self::Error>;
    /// Writes from `sector` on; `data` is whole sectors.
    fn write(&mut self, sector: u64, data: &[u8]) -> Result<(), Self::Error>;
    /// Makes what was written stay.
    fn flush(&mut self) -> Result<(), Self::Error>;
}

/// Why an image did not come through.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CarryError {
    /// The device has another size than the image.
    #[error("the device has {found} sectors, the image {expected}")]
    Size {
        /// Sectors of the image.
        expected: u64,
        /// Sectors that the device says it has.
        found: u64,
    },
    /// A request failed.
    #[error("{request} at sector {sector}: {error}")]
    Request {
        /// What was asked for.
        request: &'static str,
        /// From where on.
        sector: u64,
        /// What the driver said.
        error: String,
    },
    /// The driver read other bytes than the file has.
    #[error("what the driver read has SHA-256 {found}, the image {expected}")]
    Read {
        /// Of the image.
        expected: String,
        /// Of what was read.
        found: String,
    },
    /// After the writes, the host finds other bytes than it should.
    #[error("after writing and flushing, byte {offset:#x} of the served file is not what it should be")]
    Written {
        /// The first byte that differs.
        offset: u64,
    },
    /// The host's files fail.
    #[error(transparent)]
    Host(#[from] ImageError),
}

/// Carries `image` through `disk`, which serves the copy at `served`.
pub(crate) fn carry(image: &Image, served: &Path, disk: &mut impl Disk) -> ImageResult {
    let start = Instant::now();
    let carried = read_and_write(image, disk);
    let seconds = start.elapsed().as_secs_f64();
    let compared = carried.and_then(|bytes| match image.first_difference(served)? {
        None => Ok(bytes),
        Some(offset) => Err(CarryError::Written { offset }),
    });
    match compared {
        Ok(bytes) => {
            let mib_per_second = crate::report::mebibytes(bytes) / seconds.max(1e-9);
            ImageResult { ok: true, error: None, bytes, seconds, mib_per_second }
        }
        Err(error) => failed(&error.to_string(), seconds),
    }
}

/// The result if the image did not come through.
pub(crate) fn failed(error: &str, seconds: f64) -> ImageResult {
    ImageResult { ok: false, error: Some(error.to_owned()), bytes: 0, seconds, mib_per_second: 0.0 }
}

/// The driver's part: bytes read and written.
fn read_and_write<D: Disk>(image: &Image, disk: &mut D) -> Result<u64, CarryError> {
    let total = image.size() / SECTOR as u64;
    let found = disk.sectors();
    if found != total {
        return Err(CarryError::Size { expected: total, found });
    }
    let failed =
        |request, sector| move |error: D::Error| CarryError::Request { request, sector, error: error.to_string() };
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let mut bytes = 0;
    for (sector, len) in chunks(0..total) {
        let data = &mut chunk[..len];
        disk.read(sector, data).map_err(failed("read", sector))?;
        hasher.update(data);
        bytes += len as u64;
    }
    let found = hexadecimal(&hasher.finalize());
    if found != image.sha256 {
        return Err(CarryError::Read { expected: image.sha256.clone(), found });
    }
    for (sector, len) in pattern::runs(total).into_iter().flat_map(chunks) {
        let data = &mut chunk[..len];
        pattern::fill(pattern::WRITE_SEED, sector, data);
        disk.write(sector, data).map_err(failed("write", sector))?;
        bytes += len as u64;
    }
    disk.flush().map_err(failed("flush", 0))?;
    Ok(bytes)
}

/// `run` in pieces of at most [`CHUNK`] bytes: first sector and bytes of each.
fn chunks(run: std::ops::Range<u64>) -> impl Iterator<Item = (u64, usize)> {
    let step = CHUNK / SECTOR;
    run.clone().step_by(step).map(move |sector| (sector, (run.end - sector).min(step as u64) as usize * SECTOR))
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io;
    use std::os::unix::fs::FileExt;

    use super::*;

    /// A disk that is the served file itself, with one fault.
    struct Direct {
        file: File,
        sectors: u64,
        fault: Fault,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Fault {
        None,
        Size,
        FlipsABitWhenReading,
        LosesTheLastSector,
        WritesOneTooMany,
        RefusesFlush,
    }

    impl Disk for Direct {
        type Error = io::Error;

        fn sectors(&self) -> u64 {
            self.sectors + u64::from(self.fault == Fault::Size)
        }

        fn read(&mut self, sector: u64, data: &mut [u8]) -> io::Result<()> {
            self.file.read_exact_at(data, sector * SECTOR as u64)?;
            if self.fault == Fault::FlipsABitWhenReading {
                data[7] ^= 0x10;
            }
            Ok(())
        }

        fn write(&mut self, sector: u64, data: &[u8]) -> io::Result<()> {
            if self.fault == Fault::LosesTheLastSector && sector + 1 == self.sectors {
                return Ok(());
            }
            self.file.write_all_at(data, sector * SECTOR as u64)?;
            if self.fault == Fault::WritesOneTooMany && sector == 0 {
                self.file.write_all_at(&[0; SECTOR], SECTOR as u64)?;
            }
            Ok(())
        }

        fn flush(&mut self) -> io::Result<()> {
            if self.fault == Fault::RefusesFlush { Err(io::Error::other("no")) } else { Ok(()) }
        }
    }

    fn carried(fault: Fault) -> ImageResult {
        let image = Image::generated().unwrap();
        let served = image.copy().unwrap();
        let file = OpenOptions::new().read(true).write(true).open(served.path()).unwrap();
        let mut disk = Direct { file, sectors: image.size() / SECTOR as u64, fault };
        carry(&image, served.path(), &mut disk)
    }

    #[test]
    fn an_image_comes_through_a_disk_without_faults() {
        let result = carried(Fault::None);
        assert!(result.ok, "{:?}", result.error);
        assert!(result.bytes > 4 << 20);
    }

    #[test]
    fn every_fault_of_a_disk_is_noticed() {
        for (fault, said) in [
            (Fault::Size, "the device has 8196 sectors, the image 8195"),
            (Fault::FlipsABitWhenReading, "what the driver read has SHA-256"),
            (Fault::LosesTheLastSector, "byte 0x400400 of the served file"),
            (Fault::WritesOneTooMany, "byte 0x200 of the served file"),
            (Fault::RefusesFlush, "flush at sector 0: no"),
        ] {
            let result = carried(fault);
            assert!(!result.ok);
            assert!(result.error.as_deref().unwrap().contains(said), "{:?}", result.error);
        }
    }

    #[test]
    fn chunks_cover_a_run_exactly() {
        let step = (CHUNK / SECTOR) as u64;
        let pieces: Vec<_> = chunks(5..5 + 2 * step + 3).collect();
        assert_eq!(pieces, [(5, CHUNK), (5 + step, CHUNK), (5 + 2 * step, 3 * SECTOR)]);
        assert_eq!(chunks(7..7).count(), 0);
    }
}
