//! What a request of the driver's asks for, and what is left of it to do.

use polyvirt_core::Features;
use polyvirt_core::memory::Lease;
use polyvirt_core::queue::Chain;

use super::backend::{RANGE, Request, TRANSFER};
use super::wire::{self, Header, SECTOR_SIZE, Segment};

/// Segments of one discard request.
pub(super) const DISCARD_SEGMENTS: u32 = 64;
/// Sectors of such a segment: 2 GiB.
pub(super) const DISCARD_SECTORS: u32 = 1 << 22;
/// Segments of one write zeroes request.
pub(super) const ZERO_SEGMENTS: u32 = 1;
/// Sectors of such a segment: 32 MiB, so that what a queue has in flight is soon done even where zeroes are written.
pub(super) const ZERO_SECTORS: u32 = 1 << 16;

/// What a request is judged by.
pub(super) struct Rules {
    /// Sectors.
    pub(super) capacity: u64,
    pub(super) read_only: bool,
    pub(super) features: Features,
}

/// What is left to do, from the next byte on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    Read(Transfer),
    Write(Transfer),
    Flush,
    Zero(Vec<Span>),
    Discard(Vec<Span>),
    Id,
}

/// Bytes that go between disk and chain.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Transfer {
    offset: u64,
    done: u64,
    len: u64,
}

/// Bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    offset: u64,
    len: u64,
    deallocate: bool,
}

impl Rules {
    /// What `chain`, which has room for a header and a status, asks for; or the status that it gets. Everything is
    /// checked before anything is touched.
    pub(super) fn parse<L: Lease>(&self, chain: &Chain<L>, header: Header) -> Result<Work, u8> {
        let (data_out, data_in) = (chain.readable_len() - wire::HEADER_LEN, chain.writable_len() - 1);
        // What was a barrier in 2008 some firmware asks for still. Nobody has offered it, and no order is changed.
        match header.kind & !wire::BARRIER {
            wire::IN => Ok(Work::Read(self.transfer(header.sector, data_in)?)),
            wire::OUT => {
                self.writable()?;
                Ok(Work::Write(self.transfer(header.sector, data_out)?))
            }
            wire::FLUSH => Ok(Work::Flush),
            wire::GET_ID if data_in < wire::ID_LEN => Err(wire::IOERR),
            wire::GET_ID => Ok(Work::Id),
            wire::DISCARD => {
                self.needs(wire::DISCARD_FEATURE)?;
                Ok(Work::Discard(self.spans(chain, data_out, DISCARD_SEGMENTS, DISCARD_SECTORS, 0)?))
            }
            wire::WRITE_ZEROES => {
                self.needs(wire::WRITE_ZEROES_FEATURE)?;
                Ok(Work::Zero(self.spans(chain, data_out, ZERO_SEGMENTS, ZERO_SECTORS, wire::UNMAP)?))
            }
            _ => Err(wire::UNSUPP),
        }
    }

    fn needs(&self, feature: Features) -> Result<(), u8> {
        if !self.features.contains(feature) {
            return Err(wire::UNSUPP);
        }
        self.writable()
    }

    fn writable(&self) -> Result<(), u8> {
        if self.read_only { Err(wire::IOERR) } else { Ok(()) }
    }

    /// `len` bytes at `sector`, if they are whole sectors of the disk.
    fn transfer(&self, sector: u64, len: u32) -> Result<Transfer, u8> {
        let len = u64::from(len);
        let inside = sector.checked_add(len / SECTOR_SIZE).is_some_and(|end| end <= self.capacity);
        let offset = sector.checked_mul(SECTOR_SIZE);
        let offset = offset.filter(|_| inside && len.is_multiple_of(SECTOR_SIZE)).ok_or(wire::IOERR)?;
        Ok(Transfer { offset, done: 0, len })
    }

    /// What the segments of a request name, all of them valid.
    fn spans<L: Lease>(
        &self,
        chain: &Chain<L>,
        len: u32,
        most: u32,
        sectors: u32,
        allowed: u32,
    ) -> Result<Vec<Span>, u8> {
        let count = len / wire::SEGMENT_LEN;
        if count == 0 || count > most || !len.is_multiple_of(wire::SEGMENT_LEN) {
            return Err(wire::IOERR);
        }
        let mut spans = Vec::new();
        for number in 0..count {
            let mut bytes = [0; wire::SEGMENT_LEN as usize];
            chain.read(wire::HEADER_LEN + number * wire::SEGMENT_LEN, &mut bytes).map_err(|_| wire::IOERR)?;
            let segment = Segment::from_bytes(bytes);
            // 5.2.6.2: unknown flags, and UNMAP in a discard, are UNSUPP.
            if segment.flags & !allowed != 0 {
                return Err(wire::UNSUPP);
            }
            let end = segment.sector.checked_add(segment.count.into());
            if segment.count > sectors || end.is_none_or(|end| end > self.capacity) {
                return Err(wire::IOERR);
            }
            spans.push(Span {
                offset: segment.sector * SECTOR_SIZE,
                len: u64::from(segment.count) * SECTOR_SIZE,
                deallocate: segment.flags & wire::UNMAP != 0,
            });
        }
        Ok(united(spans))
    }
}

/// The same bytes, none of them twice, the last ones first: however often a request names a sector, it is done once.
fn united(mut spans: Vec<Span>) -> Vec<Span> {
    spans.retain(|span| span.len > 0);
    spans.sort_unstable_by_key(|span| span.offset);
    spans.dedup_by(|next, before| {
        let end = before.offset + before.len;
        let joined = next.offset < end || next.offset == end && next.deallocate == before.deallocate;
        if joined {
            before.len = before.len.max(next.offset + next.len - before.offset);
            before.deallocate &= next.deallocate;
        }
        joined
    });
    spans.reverse();
    spans
}

impl Work {
    /// Bytes of the medium that it moves.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Read(transfer) | Self::Write(transfer) => transfer.len - transfer.done,
            Self::Zero(spans) => spans.iter().map(|span| span.len).sum(),
            Self::Flush | Self::Discard(_) | Self::Id => 0,
        }
    }

    /// Whether it is lost unless it is made durable.
    pub(super) const fn changes(&self) -> bool {
        matches!(self, Self::Write(Transfer { len: 1.., .. }) | Self::Zero(_))
    }

    /// The next piece for the backend; none if everything is done. An error is the status.
    pub(super) fn next<L: Lease>(&mut self, chain: &Chain<L>) -> Result<Option<Request>, u8> {
        Ok(match self {
            Self::Read(transfer) => {
                transfer.piece().map(|len| Request::Read { offset: transfer.at(), len: len as usize })
            }
            Self::Write(transfer) => match transfer.piece() {
                None => None,
                Some(len) => {
                    let mut data = vec![0; len as usize];
                    // Below 2^32: it is inside the chain.
                    chain.read(wire::HEADER_LEN + transfer.done as u32, &mut data).map_err(|_| wire::IOERR)?;
                    Some(Request::Write { offset: transfer.at(), data })
                }
            },
            Self::Flush => Some(Request::Flush),
            Self::Zero(spans) => {
                let piece = spans.last().map(|span| (span.offset, span.len.min(RANGE), span.deallocate));
                piece.map(|(offset, len, deallocate)| Request::Zero { offset, len, deallocate })
            }
            Self::Discard(spans) => {
                spans.last().map(|span| Request::Discard { offset: span.offset, len: span.len.min(RANGE) })
            }
            Self::Id => None,
        })
    }

    /// The piece that [`Work::next`] told is done, and brought `data`; whether there may be more. An error is the status.
    pub(super) fn advance<L: Lease>(&mut self, chain: &mut Chain<L>, data: &[u8]) -> Result<bool, u8> {
        match self {
            Self::Read(transfer) => {
                let piece = transfer.piece().unwrap_or_default();
                if data.len() as u64 != piece || chain.write(transfer.done as u32, data).is_err() {
                    return Err(wire::IOERR);
                }
                transfer.done += piece;
            }
            Self::Write(transfer) => transfer.done += transfer.piece().unwrap_or_default(),
            Self::Flush | Self::Id => return Ok(false),
            Self::Zero(spans) | Self::Discard(spans) => {
                if let Some(Span { offset, len, .. }) = spans.last_mut() {
                    let piece = RANGE.min(*len);
                    (*offset, *len) = (*offset + piece, *len - piece);
                    if *len == 0 {
                        spans.pop();
                    }
                }
            }
        }
        Ok(true)
    }
}

impl Transfer {
    const fn at(&self) -> u64 {
        self.offset + self.done
    }

    /// Bytes of the next piece.
    fn piece(&self) -> Option<u64> {
        Some((self.len - self.done).min(TRANSFER)).filter(|&piece| piece > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(offset: u64, len: u64, deallocate: bool) -> Span {
        Span { offset, len, deallocate }
    }

    #[test]
    fn what_is_named_twice_is_done_once() {
        assert_eq!(united(vec![span(0, 1024, true); 64]), [span(0, 1024, true)]);
        assert_eq!(united(vec![span(4096, 512, false), span(0, 0, true), span(0, 512, false)]).len(), 2);
        let mixed = vec![span(512, 1024, true), span(0, 1024, false), span(1536, 512, true)];
        assert_eq!(united(mixed), [span(1536, 512, true), span(0, 1536, false)], "what must be kept is");
        assert_eq!(united(vec![span(0, 4096, true), span(512, 512, true)]), [span(0, 4096, true)], "one in another");
    }
}
