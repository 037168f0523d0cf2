//! The device: checks requests, hands them to its backend piece by piece, and answers.

use std::collections::HashMap;
use std::ops::Range;
use std::task::Waker;

use polyvirt_core::Features;
use polyvirt_core::device::{self, Queues};
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::queue::{Chain, Queue, QueueError};

use super::backend::{Backend, Completion, Request};
use super::wire::{self, Header, SECTOR_SIZE, Segment};

/// The most bytes that the backend is given at once.
const PIECE: u64 = 1 << 20;
/// The most requests that are with the backend at once; with [`PIECE`] it bounds memory.
const IN_FLIGHT: usize = 16;
/// Segments of one discard or write zeroes request.
const MAX_SEGMENTS: u32 = 64;
/// Sectors of one such segment: 2 GiB.
const MAX_SEGMENT_SECTORS: u32 = 1 << 22;

/// What a block device is like.
#[derive(Clone, Debug)]
pub struct Options {
    /// The medium cannot be written.
    pub read_only: bool,
    /// What GET_ID answers, at most 20 bytes of it.
    pub id: String,
    /// Entries of a queue at most.
    pub queue_size: u16,
    /// Queues; with more than one VIRTIO_BLK_F_MQ is offered.
    pub queues: u16,
    /// Data segments of a request at most; none: as many as a queue of the largest size has room for.
    pub seg_max: Option<u16>,
}

impl Default for Options {
    fn default() -> Self {
        Self { read_only: false, id: "polyvirt".into(), queue_size: 256, queues: 1, seg_max: None }
    }
}

/// A block device over a backend.
pub struct Device<B, M: GuestMemory> {
    backend: B,
    options: Options,
    sizes: Vec<u16>,
    config: [u8; wire::CONFIG_LEN],
    features: Features,
    requests: HashMap<u64, InFlight<M>>,
    next_id: u64,
}

/// A request that the backend works on.
struct InFlight<M: GuestMemory> {
    queue: u16,
    chain: Chain<M::Lease>,
    work: Work,
    /// The piece that is with the backend, bytes.
    piece: u64,
}

/// What is left to do, from the next byte on.
enum Work {
    Read { offset: u64, done: u64, len: u64 },
    Write { offset: u64, done: u64, len: u64 },
    Flush,
    Segments { kind: u32, left: Vec<Segment> },
}

impl<B: Backend, M: GuestMemory> Device<B, M> {
    /// A device over `backend`.
    pub fn new(backend: B, options: Options) -> Self {
        let sizes = vec![options.queue_size; options.queues.max(1).into()];
        let mut device = Self {
            backend,
            options,
            sizes,
            config: [0; wire::CONFIG_LEN],
            features: Features::empty(),
            requests: HashMap::new(),
            next_id: 0,
        };
        device.fill_config();
        device
    }

    fn fill_config(&mut self) {
        use wire::config as at;
        let capacity = self.backend.capacity();
        let mut put = |at: usize, value: &[u8]| self.config[at..at + value.len()].copy_from_slice(value);
        put(at::CAPACITY, &capacity.to_le_bytes());
        // Header and status take a descriptor each.
        let seg_max = self.options.seg_max.unwrap_or(self.options.queue_size.saturating_sub(2));
        put(at::SEG_MAX, &u32::from(seg_max).to_le_bytes());
        put(at::BLK_SIZE, &(SECTOR_SIZE as u32).to_le_bytes());
        put(at::NUM_QUEUES, &(self.sizes.len() as u16).to_le_bytes());
        put(at::MAX_DISCARD_SECTORS, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(at::MAX_DISCARD_SEG, &MAX_SEGMENTS.to_le_bytes());
        put(at::DISCARD_SECTOR_ALIGNMENT, &1u32.to_le_bytes());
        put(at::MAX_WRITE_ZEROES_SECTORS, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(at::MAX_WRITE_ZEROES_SEG, &MAX_SEGMENTS.to_le_bytes());
        put(at::WRITE_ZEROES_MAY_UNMAP, &[1]);
    }

    /// Takes requests from queues `from` while the backend may have more, a request from each in turn, and answers what
    /// the backend has finished, whichever queue it is of.
    fn serve(&mut self, from: Range<u16>, queues: &mut Queues<'_, M>) {
        loop {
            self.finish(queues);
            let mut taken = false;
            for index in from.clone() {
                if self.requests.len() >= IN_FLIGHT {
                    return;
                }
                let Some(queue) = queues.get(index) else { continue };
                if let Ok(Some(chain)) = queue.pop() {
                    self.accept(index, queue, chain);
                    taken = true;
                }
            }
            if !taken {
                return;
            }
        }
    }

    fn finish(&mut self, queues: &mut Queues<'_, M>) {
        while let Some(Completion { id, result }) = self.backend.complete() {
            // One of a queue that was reset meanwhile is not here any more.
            let Some(request) = self.requests.remove(&id) else { continue };
            let Some(queue) = queues.get(request.queue) else { continue };
            self.advance(queue, request, result.map_err(|error| tracing::debug!(%error, "backend")).ok());
        }
    }

    /// A new request: what it asks for, checked before anything is touched.
    fn accept(&mut self, index: u16, queue: &mut Queue<M>, chain: Chain<M::Lease>) {
        let mut header = [0; wire::HEADER_LEN as usize];
        if chain.read(0, &mut header).is_err() {
            return refuse(queue, &chain, "no room for a header");
        }
        if chain.writable_len() == 0 {
            return refuse(queue, &chain, "no room for a status");
        }
        match self.parse(&chain, Header::from_bytes(header)) {
            Ok(Parsed::Work(work)) => self.submit(queue, InFlight { queue: index, chain, work, piece: 0 }),
            Ok(Parsed::Id) => self.answer_id(queue, chain),
            Err(status) => answer(queue, chain, status),
        }
    }

    fn parse(&self, chain: &Chain<M::Lease>, header: Header) -> Result<Parsed, u8> {
        let (data_out, data_in) = (chain.readable_len() - wire::HEADER_LEN, chain.writable_len() - 1);
        let work = match header.kind {
            wire::IN => {
                let offset = self.range(header.sector, data_in)?;
                Work::Read { offset, done: 0, len: data_in.into() }
            }
            wire::OUT => {
                self.writable()?;
                let offset = self.range(header.sector, data_out)?;
                Work::Write { offset, done: 0, len: data_out.into() }
            }
            wire::FLUSH => Work::Flush,
            wire::GET_ID if data_in < wire::ID_LEN => return Err(wire::IOERR),
            wire::GET_ID => return Ok(Parsed::Id),
            wire::DISCARD | wire::WRITE_ZEROES => {
                let feature =
                    if header.kind == wire::DISCARD { wire::DISCARD_FEATURE } else { wire::WRITE_ZEROES_FEATURE };
                if !self.features.contains(feature) {
                    return Err(wire::UNSUPP);
                }
                self.writable()?;
                Work::Segments { kind: header.kind, left: self.segments(chain, header.kind, data_out)? }
            }
            _ => return Err(wire::UNSUPP),
        };
        Ok(Parsed::Work(work))
    }

    fn writable(&self) -> Result<(), u8> {
        if self.options.read_only { Err(wire::IOERR) } else { Ok(()) }
    }

    /// The offset of `len` bytes at `sector`, if they are whole sectors of the disk.
    fn range(&self, sector: u64, len: u32) -> Result<u64, u8> {
        let sectors = u64::from(len) / SECTOR_SIZE;
        let inside = sector.checked_add(sectors).is_some_and(|end| end <= self.backend.capacity());
        let offset = sector.checked_mul(SECTOR_SIZE);
        offset.filter(|_| inside && u64::from(len).is_multiple_of(SECTOR_SIZE)).ok_or(wire::IOERR)
    }

    /// The segments of a discard or write zeroes request, all of them valid.
    fn segments(&self, chain: &Chain<M::Lease>, kind: u32, len: u32) -> Result<Vec<Segment>, u8> {
        let count = len / wire::SEGMENT_LEN;
        if count == 0 || count > MAX_SEGMENTS || !len.is_multiple_of(wire::SEGMENT_LEN) {
            return Err(wire::IOERR);
        }
        let allowed = if kind == wire::WRITE_ZEROES { wire::UNMAP } else { 0 };
        let mut segments = Vec::new();
        for number in 0..count {
            let mut bytes = [0; wire::SEGMENT_LEN as usize];
            chain.read(wire::HEADER_LEN + number * wire::SEGMENT_LEN, &mut bytes).map_err(|_| wire::IOERR)?;
            let segment = Segment::from_bytes(bytes);
            // 5.2.6.2: unknown flags, and UNMAP in a discard, are UNSUPP.
            if segment.flags & !allowed != 0 {
                return Err(wire::UNSUPP);
            }
            let end = segment.sector.checked_add(segment.count.into());
            if segment.count > MAX_SEGMENT_SECTORS || end.is_none_or(|end| end > self.backend.capacity()) {
                return Err(wire::IOERR);
            }
            segments.push(segment);
        }
        segments.reverse();
        Ok(segments)
    }

    fn answer_id(&self, queue: &mut Queue<M>, mut chain: Chain<M::Lease>) {
        let mut id = [0; wire::ID_LEN as usize];
        let len = self.options.id.len().min(id.len());
        id[..len].copy_from_slice(&self.options.id.as_bytes()[..len]);
        let status = if chain.write(0, &id).is_ok() { wire::OK } else { wire::IOERR };
        answer(queue, chain, status);
    }

    /// Gives the next piece of `request` to the backend; answers if there is none.
    fn submit(&mut self, queue: &mut Queue<M>, mut request: InFlight<M>) {
        let piece = match &mut request.work {
            Work::Read { done, len, .. } | Work::Write { done, len, .. } if done == len => None,
            Work::Read { offset, done, len } => {
                request.piece = (*len - *done).min(PIECE);
                Some(Request::Read { offset: *offset + *done, len: request.piece as usize })
            }
            Work::Write { offset, done, len } => {
                request.piece = (*len - *done).min(PIECE);
                let mut data = vec![0; request.piece as usize];
                // Below 2^32: `len` is a length of the chain.
                match request.chain.read(wire::HEADER_LEN + *done as u32, &mut data) {
                    Ok(()) => Some(Request::Write { offset: *offset + *done, data }),
                    Err(_) => return answer(queue, request.chain, wire::IOERR),
                }
            }
            Work::Flush => Some(Request::Flush),
            Work::Segments { kind, left } => left.last().map(|segment| {
                let (offset, len) = (segment.sector * SECTOR_SIZE, u64::from(segment.count) * SECTOR_SIZE);
                if *kind == wire::DISCARD { Request::Discard { offset, len } } else { Request::Zero { offset, len } }
            }),
        };
        let Some(piece) = piece else { return answer(queue, request.chain, wire::OK) };
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.requests.insert(id, request);
        self.backend.submit(id, piece);
    }

    /// The backend finished a piece of `request`, or failed.
    fn advance(&mut self, queue: &mut Queue<M>, mut request: InFlight<M>, data: Option<Vec<u8>>) {
        let Some(data) = data else { return answer(queue, request.chain, wire::IOERR) };
        match &mut request.work {
            Work::Read { done, .. } => {
                if data.len() as u64 != request.piece || request.chain.write(*done as u32, &data).is_err() {
                    return answer(queue, request.chain, wire::IOERR);
                }
                *done += request.piece;
            }
            Work::Write { done, .. } => *done += request.piece,
            Work::Flush => return answer(queue, request.chain, wire::OK),
            Work::Segments { left, .. } => {
                left.pop();
            }
        }
        self.submit(queue, request);
    }
}

enum Parsed {
    Work(Work),
    Id,
}

/// Writes the status, which is the last writable byte, and completes.
///
/// The used length says only what was written from the first byte on (2.7.8.2): with data left untouched that is nothing,
/// although the status was written.
fn answer<M: GuestMemory>(queue: &mut Queue<M>, mut chain: Chain<M::Lease>, status: u8) {
    let last = chain.writable_len() - 1;
    if chain.write(last, &[status]).is_ok() {
        // Fails only on a queue that is latched, which has its reason already.
        let _ = queue.complete(chain);
    }
}

fn refuse<M: GuestMemory>(queue: &mut Queue<M>, chain: &Chain<M::Lease>, reason: &'static str) {
    queue.fail(QueueError::Request { head: chain.head(), reason });
}

impl<B: Backend, M: GuestMemory> device::Device<M> for Device<B, M>
where
    M::Lease: Send,
{
    fn device_type(&self) -> u32 {
        wire::DEVICE_TYPE
    }

    fn features(&self) -> Features {
        let common = wire::SEG_MAX | wire::BLK_SIZE | wire::FLUSH_FEATURE;
        let common = if self.sizes.len() > 1 { common | wire::MQ } else { common };
        common | if self.options.read_only { wire::RO } else { wire::DISCARD_FEATURE | wire::WRITE_ZEROES_FEATURE }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, features: Features, waker: Waker) {
        self.features = features;
        self.backend.set_waker(waker);
    }

    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        self.serve(index..index.saturating_add(1), queues);
    }

    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        let before = self.config;
        self.fill_config();
        if self.config != before {
            queues.config_changed();
        }
        self.serve(0..self.sizes.len() as u16, queues);
    }

    fn reset_queue(&mut self, index: u16) {
        // What the backend still works on owns its buffers; its completion finds no request.
        self.requests.retain(|_, request| request.queue != index);
    }

    fn reset(&mut self) {
        self.requests.clear();
        self.backend.set_waker(Waker::noop().clone());
        // Nobody will tell the next driver of what changes.
        self.fill_config();
    }
}
