//! The device: takes requests from its queues in turn, hands them to its backend piece by piece, and answers.

use std::collections::{HashMap, VecDeque};
use std::task::Waker;

use polyvirt_core::Features;
use polyvirt_core::device::{self, Queues};
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::queue::{Chain, INDIRECT_MAX, Queue, QueueError};

use super::backend::{Backend, Completion, IN_FLIGHT};
use super::request::{DISCARD_SECTORS, DISCARD_SEGMENTS, Rules, Work, ZERO_SECTORS, ZERO_SEGMENTS};
use super::wire::{self, Header, SECTOR_SIZE};

/// No request is taken while those that were have so many bytes to go, so that a queue that is to stop soon does.
const BYTES_IN_FLIGHT: u64 = 256 << 20;

/// What a block device is like.
#[derive(Clone, Debug)]
pub struct Options {
    /// The medium cannot be written.
    pub read_only: bool,
    /// What GET_ID answers, at most 20 bytes of it; none: what the [backend says](Backend::id).
    pub id: Option<String>,
    /// Entries of a queue at most.
    pub queue_size: u16,
    /// Queues; with more than one VIRTIO_BLK_F_MQ is offered.
    pub queues: u16,
    /// Data segments of a request at most; none: as many as a queue of the largest size has room for. Longer indirect
    /// tables are served, so it holds for shorter queues too.
    pub seg_max: Option<u16>,
}

impl Default for Options {
    fn default() -> Self {
        Self { read_only: false, id: None, queue_size: 256, queues: 1, seg_max: None }
    }
}

/// A block device over a backend.
pub struct Device<B, M: GuestMemory> {
    backend: B,
    options: Options,
    sizes: Vec<u16>,
    config: [u8; wire::CONFIG_LEN],
    /// What the driver accepted; none before it has settled that.
    features: Option<Features>,
    /// What the driver wrote to `writeback`, if anything.
    writeback: Option<bool>,
    turns: Turns,
    /// The requests that the backend works on, by the id of the piece that it has.
    requests: HashMap<u64, InFlight<M>>,
    /// What the backend still has of queues that were reset: of one, or of all.
    forgotten: HashMap<u64, Option<u16>>,
    next_id: u64,
}

/// A request that the backend works on.
struct InFlight<M: GuestMemory> {
    queue: u16,
    chain: Chain<M::Lease>,
    work: Work,
}

/// The queues that may have requests, in the order in which they come to turn: each is there once.
#[derive(Default)]
struct Turns {
    line: VecDeque<u16>,
    waits: Vec<bool>,
}

impl Turns {
    fn new(queues: usize) -> Self {
        Self { line: VecDeque::new(), waits: vec![false; queues] }
    }

    /// Lets queue `index` wait for its turn, behind those that do.
    fn add(&mut self, index: u16) {
        if let Some(waits) = self.waits.get_mut(usize::from(index))
            && !std::mem::replace(waits, true)
        {
            self.line.push_back(index);
        }
    }

    /// Whose turn it is, of those that `may`.
    fn take(&mut self, may: impl Fn(u16) -> bool) -> Option<u16> {
        let position = self.line.iter().position(|&index| may(index))?;
        let index = self.line.remove(position)?;
        self.waits[usize::from(index)] = false;
        Some(index)
    }
}

impl<B: Backend, M: GuestMemory> Device<B, M> {
    /// A device over `backend`.
    pub fn new(backend: B, options: Options) -> Self {
        let sizes = vec![options.queue_size; options.queues.max(1).into()];
        let mut device = Self {
            backend,
            options,
            turns: Turns::new(sizes.len()),
            sizes,
            config: [0; wire::CONFIG_LEN],
            features: None,
            writeback: None,
            requests: HashMap::new(),
            forgotten: HashMap::new(),
            next_id: 0,
        };
        device.fill_config();
        device
    }

    /// Whether that changed it.
    fn fill_config(&mut self) -> bool {
        use wire::config as at;
        let before = self.config;
        let (capacity, writeback) = (self.backend.capacity(), self.writeback());
        let deallocates = self.backend.deallocates();
        let mut put = |at: usize, value: &[u8]| self.config[at..at + value.len()].copy_from_slice(value);
        put(at::CAPACITY, &capacity.to_le_bytes());
        // Header and status take a descriptor each.
        let most = self.options.seg_max.unwrap_or(self.options.queue_size.saturating_sub(2));
        put(at::SEG_MAX, &u32::from(most.clamp(1, INDIRECT_MAX - 2)).to_le_bytes());
        put(at::BLK_SIZE, &(SECTOR_SIZE as u32).to_le_bytes());
        put(at::WRITEBACK, &[writeback.into()]);
        put(at::NUM_QUEUES, &(self.sizes.len() as u16).to_le_bytes());
        put(at::MAX_DISCARD_SECTORS, &DISCARD_SECTORS.to_le_bytes());
        put(at::MAX_DISCARD_SEG, &DISCARD_SEGMENTS.to_le_bytes());
        put(at::DISCARD_SECTOR_ALIGNMENT, &1u32.to_le_bytes());
        put(at::MAX_WRITE_ZEROES_SECTORS, &ZERO_SECTORS.to_le_bytes());
        put(at::MAX_WRITE_ZEROES_SEG, &ZERO_SEGMENTS.to_le_bytes());
        put(at::WRITE_ZEROES_MAY_UNMAP, &[deallocates.into()]);
        self.config != before
    }

    fn accepted(&self, feature: Features) -> bool {
        self.features.is_some_and(|features| features.contains(feature))
    }

    /// What `writeback` says: what a driver wrote, or at first (5.2.5.2) whether it can flush.
    fn writeback(&self) -> bool {
        let first = !self.accepted(wire::CONFIG_WCE) || self.accepted(wire::FLUSH_FEATURE);
        self.writeback.unwrap_or(first)
    }

    /// Whether a write has to be durable before it is answered (5.2.6.2): the driver asked for that, or cannot flush.
    fn is_write_through(&self) -> bool {
        if self.accepted(wire::CONFIG_WCE) { !self.writeback() } else { !self.accepted(wire::FLUSH_FEATURE) }
    }

    /// Takes requests while the backend may have more, one from each queue in turn, and answers what the backend has
    /// finished, whichever queue it is of.
    ///
    /// The line stays where it is between two calls: a slot that becomes free is the next queue's.
    fn serve(&mut self, queues: &mut Queues<'_, M>) {
        loop {
            self.finish(queues);
            if self.is_busy() {
                return;
            }
            // What was begun before a reset could be done after what is asked for now.
            let stale = |index| self.forgotten.values().any(|queue| queue.is_none_or(|queue| queue == index));
            let Some(index) = self.turns.take(|index| !stale(index)) else { return };
            if let Some(queue) = queues.get(index)
                && let Ok(chain) = queue.pop()
            {
                self.turns.add(index);
                self.accept(index, queue, chain);
            }
        }
    }

    /// Whether the backend has enough to do, what was forgotten included.
    fn is_busy(&self) -> bool {
        self.requests.len() + self.forgotten.len() >= IN_FLIGHT
            || self.requests.values().map(|request| request.work.bytes()).sum::<u64>() >= BYTES_IN_FLIGHT
    }

    fn finish(&mut self, queues: &mut Queues<'_, M>) {
        while let Some(Completion { id, result }) = self.backend.complete() {
            self.forgotten.remove(&id);
            let Some(mut request) = self.requests.remove(&id) else { continue };
            let Some(queue) = queues.get(request.queue) else { continue };
            let result = result.map_err(|error| {
                tracing::debug!(%error, "backend");
                wire::IOERR
            });
            match result.and_then(|data| request.work.advance(&mut request.chain, &data)) {
                Ok(true) => self.submit(queue, request),
                Ok(false) => answer(queue, request.chain, wire::OK),
                Err(status) => answer(queue, request.chain, status),
            }
        }
    }

    /// A new request.
    fn accept(&mut self, index: u16, queue: &mut Queue<M>, chain: Chain<M::Lease>) {
        let mut header = [0; wire::HEADER_LEN as usize];
        if chain.read(0, &mut header).is_err() {
            return refuse(queue, &chain, "no room for a header");
        }
        if chain.writable_len() == 0 {
            return refuse(queue, &chain, "no room for a status");
        }
        let features = self.features.unwrap_or(Features::empty());
        let rules = Rules { capacity: self.backend.capacity(), read_only: self.options.read_only, features };
        match rules.parse(&chain, Header::from_bytes(header)) {
            Ok(Work::Id) => self.answer_id(queue, chain),
            Ok(work) => self.submit(queue, InFlight { queue: index, chain, work }),
            Err(status) => answer(queue, chain, status),
        }
    }

    fn answer_id(&self, queue: &mut Queue<M>, mut chain: Chain<M::Lease>) {
        let named = self.options.id.clone().or_else(|| self.backend.id());
        let named = named.as_deref().unwrap_or("polyvirt").as_bytes();
        let mut id = [0; wire::ID_LEN as usize];
        let len = named.len().min(id.len());
        id[..len].copy_from_slice(&named[..len]);
        let status = if chain.write(0, &id).is_ok() { wire::OK } else { wire::IOERR };
        answer(queue, chain, status);
    }

    /// Gives the next piece of `request` to the backend; answers if there is none.
    fn submit(&mut self, queue: &mut Queue<M>, mut request: InFlight<M>) {
        // A discard is a hint: nobody has to wait for the rest of one.
        let enough = queue.is_held() && matches!(request.work, Work::Discard(_));
        let piece = if enough { Ok(None) } else { request.work.next(&request.chain) };
        let piece = match piece {
            Ok(Some(piece)) => piece,
            Ok(None) if request.work.changes() && self.is_write_through() => {
                request.work = Work::Flush;
                super::Request::Flush
            }
            Ok(None) => return answer(queue, request.chain, wire::OK),
            Err(status) => return answer(queue, request.chain, status),
        };
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.requests.insert(id, request);
        self.backend.submit(id, piece);
    }

    /// Nothing comes of the requests of queue `index`, or of all.
    fn forget(&mut self, index: Option<u16>) {
        let of_it = |_: &u64, request: &mut InFlight<M>| index.is_none_or(|index| request.queue == index);
        for (id, _) in self.requests.extract_if(of_it) {
            self.backend.cancel(id);
            self.forgotten.insert(id, index);
        }
        if index.is_none() {
            self.forgotten.values_mut().for_each(|queue| *queue = None);
        }
    }
}

/// Writes the status, which is the last writable byte, and completes.
///
/// The used length says only what was written from the first byte on (2.7.8.2): with data left untouched that is nothing,
/// although the status was written.
fn answer<M: GuestMemory>(queue: &mut Queue<M>, mut chain: Chain<M::Lease>, status: u8) {
    let last = chain.writable_len() - 1;
    if chain.write(last, &[status]).is_ok() {
        // Fails only on a queue that is broken, which has its reason already.
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
        let common = wire::SEG_MAX | wire::BLK_SIZE | wire::FLUSH_FEATURE | wire::CONFIG_WCE;
        let common = if self.sizes.len() > 1 { common | wire::MQ } else { common };
        common | if self.options.read_only { wire::RO } else { wire::DISCARD_FEATURE | wire::WRITE_ZEROES_FEATURE }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn refresh(&mut self) -> bool {
        self.backend.refresh();
        self.fill_config()
    }

    fn negotiated(&mut self, features: Features) {
        self.features = Some(features);
        self.fill_config();
    }

    /// Only `writeback` can be written. A front end may do so before it tells what its driver accepted.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let value = wire::config::WRITEBACK.checked_sub(offset).and_then(|at| data.get(at));
        if let Some(&value) = value
            && self.features.is_none_or(|features| features.contains(wire::CONFIG_WCE))
        {
            self.writeback = Some(value != 0);
            self.fill_config();
        }
    }

    fn activate(&mut self, features: Features, waker: Waker) {
        self.negotiated(features);
        self.backend.set_waker(waker);
    }

    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        self.turns.add(index);
        self.serve(queues);
    }

    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        if self.fill_config() {
            queues.config_changed();
        }
        (0..self.sizes.len() as u16).for_each(|index| self.turns.add(index));
        self.serve(queues);
    }

    fn reset_queue(&mut self, index: u16) {
        // What the backend still works on owns its buffers; its completion finds no request.
        self.forget(Some(index));
    }

    fn reset(&mut self) {
        self.forget(None);
        self.turns = Turns::new(self.sizes.len());
        self.features = None;
        // The mode after a reset may be either (5.2.5.2). A driver that asked for durable writes is not to lose them at what
        // is none of its resets: front ends stop and start a device, and do not say again what they were told.
        self.writeback = self.writeback.filter(|writeback| !writeback);
        self.fill_config();
        self.backend.set_waker(Waker::noop().clone());
    }
}
