//! A descriptor chain in the device's hands.

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::packed::layout::Position;
use crate::memory::{Lease, Segment};

/// A validated descriptor chain, owned by whoever holds it: it may go to another thread and be completed later, in any
/// order, once ([`Queue::complete`](super::Queue::complete) consumes it).
///
/// Its device-readable bytes come first, then its device-writable ones; each part is addressed from 0, whatever the
/// arrangement of descriptors (2.7.4 Message Framing).
///
/// It is a handle as large as a pointer; what it points to goes back to the queue when it is completed.
#[derive(Debug)]
pub struct Chain<L>(pub(super) Box<Parts<L>>);

/// What a chain consists of.
#[derive(Debug)]
pub(super) struct Parts<L> {
    /// Which run of which queue it belongs to.
    pub(super) run: u32,
    pub(super) head: u16,
    /// How many entries of the ring it takes.
    pub(super) entries: u16,
    /// (In order) how many chains were taken before it.
    pub(super) number: u64,
    /// (Packed) where its first descriptor is.
    pub(super) start: Position,
    pub(super) readable: u64,
    pub(super) writable_len: u32,
    /// How many bytes were written without a gap from the first on.
    pub(super) written: u32,
    /// Not 0 if bytes were written by [`Chain::write`], wherever.
    pub(super) wrote: u32,
    pub(super) writable_from: usize,
    pub(super) segments: Vec<Segment<L>>,
}

/// A chain is shorter than what was asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {offset} asked of a chain that has {size}")]
pub struct ChainError {
    /// Where, from the start of the readable or writable part.
    pub offset: u32,
    /// Bytes asked for.
    pub len: usize,
    /// Bytes of the part.
    pub size: u32,
}

impl<L: Lease> Chain<L> {
    /// The chain's identity in the ring: the index of its first descriptor (split), its buffer id (packed).
    pub fn head(&self) -> u16 {
        self.0.head
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> u32 {
        clamp(self.0.readable)
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u32 {
        self.0.writable_len
    }

    /// How many bytes were written from the first writable byte on, without a gap: what the used ring will say.
    pub fn written(&self) -> u32 {
        self.0.written
    }

    /// The segments of the readable part.
    pub fn readable(&self) -> &[Segment<L>] {
        &self.0.segments[..self.0.writable_from]
    }

    /// The segments of the writable part. What is written through them, [`Chain::set_written`] has to tell.
    pub fn writable(&self) -> &[Segment<L>] {
        &self.0.segments[self.0.writable_from..]
    }

    /// Copies bytes of the readable part from `offset` on.
    pub fn read(&self, offset: u32, into: &mut [u8]) -> Result<(), ChainError> {
        let short = ChainError { offset, len: into.len(), size: self.readable_len() };
        each_part(self.readable(), offset, into.len(), |segment, from, done, len| {
            segment.read(from, &mut into[done..done + len]).is_ok()
        })
        .then_some(())
        .ok_or(short)
    }

    /// Copies bytes to the writable part from `offset` on. Nothing is written if they do not fit.
    pub fn write(&mut self, offset: u32, from: &[u8]) -> Result<(), ChainError> {
        let short = ChainError { offset, len: from.len(), size: self.writable_len() };
        if from.len() > self.writable_len().saturating_sub(offset) as usize {
            return Err(short);
        }
        each_part(self.writable(), offset, from.len(), |segment, to, done, len| {
            segment.write(to, &from[done..done + len]).is_ok()
        })
        .then_some(())
        .ok_or(short)?;
        self.0.wrote |= from.len() as u32;
        if offset <= self.0.written {
            self.0.written = self.0.written.max(offset + from.len() as u32);
        }
        Ok(())
    }

    /// Says how many bytes from the first writable one on were written through [`Chain::writable`]; at most all.
    ///
    /// On a packed ring a used buffer also tells whether any byte was written, wherever (2.8.4): what [`Chain::write`]
    /// wrote stays told, though `written` may be 0.
    pub fn set_written(&mut self, written: u32) {
        self.0.written = written.min(self.writable_len());
    }
}

/// A part may have exactly 2^32 bytes; the last of them has no use, because the used length cannot count it.
pub(super) fn clamp(len: u64) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Walks `len` bytes from `offset` on: calls `each` with a segment, the offset in it, the bytes done and the bytes here.
/// False if the segments end before, or `each` says so.
fn each_part<L>(
    segments: &[Segment<L>],
    offset: u32,
    len: usize,
    mut each: impl FnMut(&Segment<L>, usize, usize, usize) -> bool,
) -> bool {
    let (mut skip, mut done) = (offset as usize, 0);
    for segment in segments {
        if done == len {
            break;
        }
        if skip >= segment.len() {
            skip -= segment.len();
            continue;
        }
        let here = (segment.len() - skip).min(len - done);
        if !each(segment, skip, done, here) {
            return false;
        }
        done += here;
        skip = 0;
    }
    done == len
}
