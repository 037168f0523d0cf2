//! A disk image carried through a block device: read whole and compared, a pattern written, compared again on the
//! host's side.
//!
//! What is served is always a private copy: the given file is opened for reading only.

mod block;
mod carry;
mod pattern;

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

pub(crate) use block::through;
pub(crate) use pattern::fill;

use crate::report::ImageSource;
use crate::temporary::{self, Temporary};

/// Bytes of a sector: the unit of the block device (5.2.4).
pub(crate) const SECTOR: usize = 512;

/// Size of the image that is generated if none is given: odd in pages and in requests, on purpose.
const GENERATED: u64 = (4 << 20) + 3 * SECTOR as u64;

/// Bytes that are copied, hashed and compared at once.
const CHUNK: usize = 1 << 20;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// The file cannot be opened or read.
    #[error("image {}: {error}", path.display())]
    File {
        /// The file as it was named.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A disk is made of whole sectors.
    #[error("image {}: {size} bytes is not a multiple of the sector size, {SECTOR} bytes", path.display())]
    NotSectors {
        /// The file as it was named.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// There is nothing to carry.
    #[error("image {}: the file is empty", path.display())]
    Empty {
        /// The file as it was named.
        path: PathBuf,
    },
    /// A directory, a pipe or the like.
    #[error("image {}: not a regular file", path.display())]
    NotAFile {
        /// The file as it was named.
        path: PathBuf,
    },
    /// No temporary file can be had.
    #[error("temporary file: {0}")]
    Temporary(#[from] io::Error),
}

/// An image: the file that was given, or a generated one.
pub(crate) struct Image {
    path: PathBuf,
    given: bool,
    size: u64,
    sha256: String,
    /// Keeps a generated image.
    _generated: Option<Temporary<NamedTempFile>>,
}

impl Image {
    /// The file at `path`.
    pub(crate) fn given(path: &Path) -> Result<Self, ImageError> {
        let path = path.to_owned();
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) => return Err(ImageError::File { path, error }),
        };
        // Before it is opened: opening a pipe would wait for its other end.
        if !metadata.is_file() {
            return Err(ImageError::NotAFile { path });
        }
        let size = metadata.len();
        if size == 0 {
            return Err(ImageError::Empty { path });
        }
        if !size.is_multiple_of(SECTOR as u64) {
            return Err(ImageError::NotSectors { path, size });
        }
        match File::open(&path).and_then(|file| hash(file, size)) {
            Ok(sha256) => Ok(Self { path, given: true, size, sha256, _generated: None }),
            Err(error) => Err(ImageError::File { path, error }),
        }
    }

    /// Pseudo-random bytes, the same in every run.
    pub(crate) fn generated() -> Result<Self, ImageError> {
        let mut file = temporary::file()?;
        let mut content = vec![0; GENERATED as usize];
        pattern::fill(pattern::IMAGE_SEED, 0, &mut content);
        file.write_all(&content)?;
        file.flush()?;
        let sha256 = hash(File::open(file.path())?, GENERATED)?;
        Ok(Self { path: file.path().to_owned(), given: false, size: GENERATED, sha256, _generated: Some(file) })
    }

    /// Its size in bytes, a multiple of [`SECTOR`].
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// What a report says about it.
    pub(crate) fn source(&self) -> ImageSource {
        ImageSource {
            file: self.given.then(|| self.path.display().to_string()),
            bytes: self.size,
            sha256: self.sha256.clone(),
        }
    }

    /// A private copy for a device to serve.
    pub(crate) fn copy(&self) -> Result<Temporary<NamedTempFile>, ImageError> {
        let mut copy = temporary::file()?;
        let copied = self.open()?.take(self.size);
        let mut copied = io::BufReader::with_capacity(CHUNK, copied);
        io::copy(&mut copied, &mut *copy)?;
        copy.flush()?;
        Ok(copy)
    }

    fn open(&self) -> Result<File, ImageError> {
        File::open(&self.path).map_err(|error| ImageError::File { path: self.path.clone(), error })
    }

    /// Compares `served` with the image on which the pattern was written: the offset of the first byte that differs.
    fn first_difference(&self, served: &Path) -> Result<Option<u64>, ImageError> {
        let mut original = self.open()?;
        let mut served = File::open(served)?;
        let served_size = served.seek(SeekFrom::End(0))?;
        served.rewind()?;
        let (mut expected, mut found) = (vec![0; CHUNK], vec![0; CHUNK]);
        let mut offset = 0;
        while offset < self.size {
            let len = usize::try_from(self.size - offset).map_or(CHUNK, |left| left.min(CHUNK));
            let (expected, found) = (&mut expected[..len], &mut found[..len]);
            original.read_exact(expected)?;
            if served_size < offset + len as u64 {
                return Ok(Some(served_size));
            }
            served.read_exact(found)?;
            pattern::overlay(self.size / SECTOR as u64, offset / SECTOR as u64, expected);
            if let Some(at) = expected.iter().zip(&*found).position(|(expected, found)| expected != found) {
                return Ok(Some(offset + at as u64));
            }
            offset += len as u64;
        }
        Ok((served_size != self.size).then_some(self.size))
    }
}

/// The SHA-256 of the first `size` bytes of `file`, in hexadecimal. Fewer bytes are an error.
fn hash(file: File, size: u64) -> io::Result<String> {
    let mut reader = file.take(size);
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let mut total = 0;
    loop {
        match reader.read(&mut chunk)? {
            0 => break,
            len => {
                hasher.update(&chunk[..len]);
                total += len as u64;
            }
        }
    }
    if total < size {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{total} bytes could be read of {size}")));
    }
    Ok(hexadecimal(&hasher.finalize()))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn a_file_that_is_no_disk_is_refused_in_one_sentence() {
        let refused = |path: &Path| Image::given(path).map(|_| ()).unwrap_err().to_string();
        let odd = file(&[0; 513]);
        assert!(refused(odd.path()).ends_with("513 bytes is not a multiple of the sector size, 512 bytes"));
        assert!(refused(file(&[]).path()).ends_with("the file is empty"));
        assert!(refused(&std::env::temp_dir()).ends_with("not a regular file"));
        assert!(refused(Path::new("/nowhere/disk.img")).contains("No such file"));
    }

    #[test]
    fn the_hash_is_the_sha_256_of_the_file() {
        let image = Image::given(file(&[0; 512]).path()).map(|image| image.source()).unwrap();
        assert_eq!(image.sha256, "076a27c79e5ace2a3d47f9dd2e83e4ff6ea8872b3c2218f66c92b89b55f36560");
        assert_eq!(image.bytes, 512);
    }

    #[test]
    fn a_generated_image_is_the_same_every_time_and_no_sector_is_like_another() {
        let (one, two) = (Image::generated().unwrap(), Image::generated().unwrap());
        assert_eq!(one.source().sha256, two.source().sha256);
        let bytes = fs::read(&one.path).unwrap();
        let sectors: std::collections::HashSet<&[u8]> = bytes.chunks(SECTOR).collect();
        assert_eq!(sectors.len() as u64, one.size() / SECTOR as u64);
    }

    #[test]
    fn any_byte_that_differs_is_found() {
        let image = Image::generated().unwrap();
        let served = image.copy().unwrap();
        let mut bytes = fs::read(served.path()).unwrap();
        pattern::overlay(image.size() / SECTOR as u64, 0, &mut bytes);
        fs::write(served.path(), &bytes).unwrap();
        assert_eq!(image.first_difference(served.path()).unwrap(), None);
        for at in [0, 511, 512, 1 << 20, bytes.len() - 513, bytes.len() - 1] {
            bytes[at] ^= 1;
            fs::write(served.path(), &bytes).unwrap();
            assert_eq!(image.first_difference(served.path()).unwrap(), Some(at as u64));
            bytes[at] ^= 1;
        }
        fs::write(served.path(), &bytes[..bytes.len() - 512]).unwrap();
        assert_eq!(image.first_difference(served.path()).unwrap(), Some(image.size() - 512));
        bytes.push(0);
        fs::write(served.path(), &bytes).unwrap();
        assert_eq!(image.first_difference(served.path()).unwrap(), Some(image.size()));
    }
}
