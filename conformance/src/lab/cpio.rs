//! Writes a cpio archive in the "newc" format, which is what Linux takes as its first file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs;
use std::path::Path;

use super::LabError;

/// Type bits of a file's mode.
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const TRAILER: &str = "TRAILER!!!";

/// An archive under construction, in memory.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a folder. Folders come before what is in them.
    pub(super) fn folder(&mut self, path: &str) {
        self.entry(path, FOLDER | 0o755, &[]);
    }

    /// Adds a file with its permission bits.
    pub(super) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.entry(path, FILE | permissions, content);
    }

    /// Adds a copy of the host's file `from`.
    pub(super) fn copy(&mut self, path: &str, permissions: u32, from: &Path) -> Result<(), LabError> {
        self.file(path, permissions, &fs::read(from).map_err(LabError::file(from))?);
        Ok(())
    }

    /// The whole archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("what goes into a guest is far below 4 GiB");
        let name = path.len() as u32 + 1;
        let links = if mode & FOLDER == FOLDER { 2 } else { 1 };
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    /// Names and contents end at a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a reader of the format finds: path, mode, content.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |number: usize| {
                let digits = std::str::from_utf8(&bytes[6 + 8 * number..14 + 8 * number]).unwrap();
                u32::from_str_radix(digits, 16).unwrap() as usize
            };
            let (mode, size, name) = (field(1), field(6), field(11));
            let path = std::str::from_utf8(&bytes[110..110 + name - 1]).unwrap().to_owned();
            let content = (110 + name).next_multiple_of(4);
            if path == TRAILER {
                assert_eq!(bytes.len(), content);
                return entries;
            }
            entries.push((path, mode as u32, bytes[content..content + size].to_vec()));
            bytes = &bytes[(content + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn what_was_added_can_be_read() {
        let mut archive = Archive::default();
        archive.folder("bin");
        archive.file("bin/tool", 0o755, b"12345");
        archive.file("empty", 0o644, b"");
        let entries = read(&archive.finish());
        let expected = [
            ("bin", 0o040_755, b"".to_vec()),
            ("bin/tool", 0o100_755, b"12345".to_vec()),
            ("empty", 0o100_644, b"".to_vec()),
        ];
        assert_eq!(entries, expected.map(|(path, mode, content)| (path.to_owned(), mode, content)));
    }
}
