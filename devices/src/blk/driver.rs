//! The driver: several requests in flight, each in a slot of shared memory.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::time::Duration;

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::queue::{AddError, Buffer, DriverQueue};
use polyvirt_core::shared::Shared;
use polyvirt_core::transport::{self, BlockingTransport, Transport, WakingTransport};

use super::wire::{self, Header, SECTOR_SIZE, Segment};
use crate::driver::{DriverError, Polled, WATCHDOG, block_on, come, expect_type, let_go};

/// The most bytes of one request; longer transfers take several.
const TRANSFER: usize = 256 * 1024;
/// Requests in flight at most.
const SLOTS: usize = 8;
/// Bytes of a page, the unit of sharing.
const PAGE: usize = 4096;

/// What the driver learned from the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Sectors of 512 bytes.
    pub capacity: u64,
    /// Bytes of a block, if the device says.
    pub block_size: Option<u32>,
    /// Whether the medium cannot be written.
    pub read_only: bool,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'d> {
    /// Read `len` bytes from `sector` on.
    Read {
        /// The first sector.
        sector: u64,
        /// Bytes, at most 256 KiB.
        len: usize,
    },
    /// Write `data` from `sector` on.
    Write {
        /// The first sector.
        sector: u64,
        /// At most 256 KiB.
        data: &'d [u8],
    },
    /// Make durable what was written.
    Flush,
    /// Ask for the name.
    GetId,
    /// Forget sectors.
    Discard(&'d [Segment]),
    /// Zero sectors.
    WriteZeroes(&'d [Segment]),
}

/// Identifies a request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestId(u64);

/// Memory for one request. What the device may read and what it may write are on different pages, so that where sharing
/// has rights it gets no more than it needs.
struct Slot {
    header: Shared,
    status: Shared,
    data_out: Shared,
    data_in: Shared,
}

/// What goes through the queue with a request.
#[derive(Clone, Copy)]
struct Token {
    id: RequestId,
    slot: usize,
    data_in: usize,
}

/// A request that the device has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Which.
    pub id: RequestId,
    /// OK, IOERR, UNSUPP, or whatever the device wrote.
    pub status: u8,
    /// What a read or GET_ID brought, if the status is OK.
    pub data: Vec<u8>,
}

/// The driver of a block device.
pub struct Driver<T: Transport = Box<dyn BlockingTransport>> {
    transport: T,
    queue: DriverQueue<Token>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    geometry: Geometry,
    /// Sectors of a segment at most: of a discard, of zeroes.
    longest: [u32; 2],
    features: Features,
    next_id: u64,
    answers: VecDeque<Answer>,
    watchdog: Duration,
}

impl<T: BlockingTransport> Driver<T> {
    /// Resets the device behind `transport`, waits until it is, and takes it into use.
    pub fn new(mut transport: T) -> Result<Self, DriverError> {
        expect_type(&transport, wire::DEVICE_TYPE)?;
        transport.reset()?;
        Self::start(transport)
    }

    /// Resets the device, waits until it is, and takes it into use again. What was in flight is asked for again, so no
    /// request is lost.
    pub fn recover(&mut self) -> Result<(), DriverError> {
        self.transport.reset()?;
        self.restart()
    }

    /// Waits for the next answer.
    pub fn wait(&mut self) -> Result<Answer, DriverError> {
        block_on(self, Self::arm, Self::poll)
    }

    /// Reads from `sector` on until `into` is full.
    pub fn read(&mut self, sector: u64, into: &mut [u8]) -> Result<(), DriverError> {
        let chunks = into.chunks(TRANSFER).map(<[u8]>::len).collect::<Vec<_>>();
        let operation = |number: usize| Operation::Read {
            sector: sector + (number * TRANSFER) as u64 / SECTOR_SIZE,
            len: chunks[number],
        };
        self.run(chunks.len(), operation, |number, data| {
            let start = number * TRANSFER;
            into[start..start + data.len()].copy_from_slice(data);
        })?;
        Ok(())
    }

    /// Writes `data` from `sector` on.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<(), DriverError> {
        let operation = |number: usize| {
            let start = number * TRANSFER;
            let data = &data[start..data.len().min(start + TRANSFER)];
            Operation::Write { sector: sector + start as u64 / SECTOR_SIZE, data }
        };
        self.run(data.len().div_ceil(TRANSFER), operation, |_, _| {})
    }

    /// Makes durable what was written.
    pub fn flush(&mut self) -> Result<(), DriverError> {
        if !self.features.contains(wire::FLUSH_FEATURE) {
            return Err(DriverError::Unsupported("the device does not flush"));
        }
        self.run(1, |_| Operation::Flush, |_, _| {})
    }

    /// The device's name.
    pub fn get_id(&mut self) -> Result<[u8; wire::ID_LEN as usize], DriverError> {
        let mut id = [0; wire::ID_LEN as usize];
        self.run(1, |_| Operation::GetId, |_, data| id.copy_from_slice(data))?;
        Ok(id)
    }

    /// Forgets `count` sectors.
    pub fn discard(&mut self, sector: u64, count: u32) -> Result<(), DriverError> {
        if !self.features.contains(wire::DISCARD_FEATURE) {
            return Err(DriverError::Unsupported("the device does not discard"));
        }
        self.run_segments(split(sector, count, 0, self.longest[0]), |segments| Operation::Discard(segments))
    }

    /// Zeroes `count` sectors; `unmap` allows the device to deallocate them.
    pub fn write_zeroes(&mut self, sector: u64, count: u32, unmap: bool) -> Result<(), DriverError> {
        if !self.features.contains(wire::WRITE_ZEROES_FEATURE) {
            return Err(DriverError::Unsupported("the device does not write zeroes"));
        }
        let flags = if unmap { wire::UNMAP } else { 0 };
        self.run_segments(split(sector, count, flags, self.longest[1]), |segments| Operation::WriteZeroes(segments))
    }

    /// Runs a request for each of `segments`, as many at a time as can be in flight.
    fn run_segments(
        &mut self,
        mut segments: impl Iterator<Item = Segment>,
        operation: impl for<'s> Fn(&'s [Segment]) -> Operation<'s>,
    ) -> Result<(), DriverError> {
        loop {
            let some: Vec<_> = segments.by_ref().take(SLOTS).collect();
            if some.is_empty() {
                return Ok(());
            }
            self.run(some.len(), |number| operation(&some[number..=number]), |_, _| {})?;
        }
    }

    /// Runs `count` requests, several at a time, and waits for all; the first error is returned after that.
    fn run<'d>(
        &mut self,
        count: usize,
        operation: impl Fn(usize) -> Operation<'d>,
        mut answered: impl FnMut(usize, &[u8]),
    ) -> Result<(), DriverError> {
        let (mut next, mut mine, mut others, mut result) = (0, Vec::new(), VecDeque::new(), Ok(()));
        while next < count || !mine.is_empty() {
            if next < count && result.is_ok() {
                if let Some(id) = self.submit(operation(next))? {
                    mine.push((id, next));
                    next += 1;
                    continue;
                }
            } else if mine.is_empty() {
                break;
            }
            let answer = self.wait()?;
            let Some(position) = mine.iter().position(|(id, _)| *id == answer.id) else {
                others.push_back(answer);
                continue;
            };
            let (_, number) = mine.swap_remove(position);
            match answer.status {
                wire::OK => answered(number, &answer.data),
                wire::IOERR => result = result.and(Err(DriverError::Status("IOERR"))),
                wire::UNSUPP => result = result.and(Err(DriverError::Status("UNSUPP"))),
                _ => result = result.and(Err(DriverError::Status("a status that does not exist"))),
            }
        }
        self.answers.extend(others);
        result
    }
}

impl<T: WakingTransport> Driver<T> {
    /// The next answer, in whatever order they come, as soon as there is one.
    pub async fn answer(&mut self) -> Result<Answer, DriverError> {
        come(self, Self::arm, Self::poll).await
    }
}

impl<T: Transport> Driver<T> {
    /// Takes the device behind `transport` into use, whose reset is done.
    pub fn start(mut transport: T) -> Result<Self, DriverError> {
        expect_type(&transport, wire::DEVICE_TYPE)?;
        let features = transport::negotiate(&mut transport, Self::wanted())?;
        let geometry = read_geometry(&mut transport, features)?;
        let longest = read_limits(&mut transport, features)?;
        let queue = DriverQueue::new(transport.find_vq(0, None)?)?;
        transport::driver_ok(&mut transport)?;
        Ok(Self {
            transport,
            queue,
            slots: Vec::new(),
            free: Vec::new(),
            geometry,
            longest,
            features,
            next_id: 0,
            answers: VecDeque::new(),
            watchdog: WATCHDOG,
        })
    }

    /// Takes the device into use again, after it was reset through [`Driver::transport`]. What was in flight is asked for
    /// again, so no request is lost.
    pub fn restart(&mut self) -> Result<(), DriverError> {
        transport::negotiate(&mut self.transport, self.features)?;
        let size = self.queue.size();
        self.queue.restart(self.transport.find_vq(0, Some(size))?)?;
        transport::driver_ok(&mut self.transport)?;
        self.queue.kick()?;
        Ok(())
    }

    fn wanted() -> Features {
        wire::RO
            | wire::BLK_SIZE
            | wire::FLUSH_FEATURE
            | wire::DISCARD_FEATURE
            | wire::WRITE_ZEROES_FEATURE
            | Features::EVENT_IDX
            | Features::RING_PACKED
            | Features::RING_RESET
    }

    /// How long calls that wait do so before they give up.
    pub fn set_watchdog(&mut self, watchdog: Duration) {
        self.watchdog = watchdog;
    }

    /// What the configuration said at the beginning, or at the last [`Driver::refresh`].
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The features accepted.
    pub const fn features(&self) -> Features {
        self.features
    }

    /// The transport, for what is not the driver's business.
    pub fn transport(&mut self) -> &mut T {
        &mut self.transport
    }

    /// Reads the configuration again, after it changed.
    pub fn refresh(&mut self) -> Result<Geometry, DriverError> {
        self.geometry = read_geometry(&mut self.transport, self.features)?;
        Ok(self.geometry)
    }

    /// Begins `operation`; none if as many requests as possible are in flight.
    pub fn submit(&mut self, operation: Operation<'_>) -> Result<Option<RequestId>, DriverError> {
        let Some(index) = self.slot()? else { return Ok(None) };
        let (kind, sector, out, data_in) = self.encode(index, operation)?;
        let slot = &self.slots[index];
        let header = Header { kind, sector }.to_bytes();
        // All of these are inside their pages.
        let _ = slot.header.pages().write(0, &header);
        let _ = slot.status.pages().write(0, &[u8::MAX]);
        let piece = |memory: &Shared, len: usize| Buffer { address: memory.address(), len: len as u32 };
        let readable = [piece(&slot.header, header.len()), piece(&slot.data_out, out)];
        let writable = [piece(&slot.data_in, data_in), piece(&slot.status, 1)];
        let readable = &readable[..if out > 0 { 2 } else { 1 }];
        let writable = &writable[if data_in > 0 { 0 } else { 1 }..];
        let id = RequestId(self.next_id);
        match self.queue.add_buf(readable, writable, Token { id, slot: index, data_in }) {
            Ok(()) => {}
            Err(AddError::Full(token)) => {
                self.free.push(token.slot);
                return Ok(None);
            }
            Err(AddError::Pieces { .. }) => {
                return Err(DriverError::Unsupported("the queue is too short for a request"));
            }
            Err(AddError::Broken(reason)) => return Err(reason.into()),
            Err(AddError::Notify(error)) => return Err(error.into()),
        }
        self.next_id += 1;
        // The request is in flight whether or not the doorbell worked: waiting for it tells what is wrong, and
        // `recover` asks for it again.
        if let Err(error) = self.queue.kick() {
            tracing::debug!(%error, "the device was not kicked");
        }
        Ok(Some(id))
    }

    /// The next answer, in whatever order they come; none if there is none yet.
    pub fn poll(&mut self) -> Result<Option<Answer>, DriverError> {
        if let Some(answer) = self.answers.pop_front() {
            return Ok(Some(answer));
        }
        let Some((token, _)) = self.queue.get_buf()? else { return Ok(None) };
        Ok(Some(self.finish(token)))
    }

    /// Asks for an interrupt when an answer comes. False if one has come already.
    pub fn arm(&mut self) -> bool {
        self.answers.is_empty() && self.queue.enable_cb()
    }

    fn finish(&mut self, token: Token) -> Answer {
        let slot = &self.slots[token.slot];
        let mut status = [0];
        let mut data = Vec::new();
        let _ = slot.status.pages().read(0, &mut status);
        if status[0] == wire::OK {
            data.resize(token.data_in, 0);
            let _ = slot.data_in.pages().read(0, &mut data);
        }
        self.free.push(token.slot);
        Answer { id: token.id, status: status[0], data }
    }

    /// A free slot; none if there is none, and no more may be made.
    fn slot(&mut self) -> Result<Option<usize>, DriverError> {
        if let Some(index) = self.free.pop() {
            return Ok(Some(index));
        }
        if self.slots.len() == SLOTS {
            return Ok(None);
        }
        let share = self.transport.share();
        self.slots.push(Slot {
            header: Shared::new(&share, PAGE, Access::READ)?,
            status: Shared::new(&share, PAGE, Access::WRITE)?,
            data_out: Shared::new(&share, TRANSFER, Access::READ)?,
            data_in: Shared::new(&share, TRANSFER, Access::WRITE)?,
        });
        Ok(Some(self.slots.len() - 1))
    }

    /// Puts what goes out into slot `index`: type, sector, bytes out, bytes in.
    fn encode(&mut self, index: usize, operation: Operation<'_>) -> Result<(u32, u64, usize, usize), DriverError> {
        let pages = self.slots[index].data_out.pages();
        let fits = |len: usize| {
            if len <= TRANSFER { Ok(len) } else { Err(DriverError::Unsupported("more than 256 KiB in one request")) }
        };
        let encoded = match operation {
            Operation::Read { sector, len } => fits(len).map(|len| (wire::IN, sector, 0, len)),
            Operation::Write { sector, data } => fits(data.len()).map(|len| {
                let _ = pages.write(0, data);
                (wire::OUT, sector, len, 0)
            }),
            Operation::Flush => Ok((wire::FLUSH, 0, 0, 0)),
            Operation::GetId => Ok((wire::GET_ID, 0, 0, wire::ID_LEN as usize)),
            Operation::Discard(segments) | Operation::WriteZeroes(segments) => {
                fits(segments.len() * wire::SEGMENT_LEN as usize).map(|len| {
                    for (number, segment) in segments.iter().enumerate() {
                        let _ = pages.write(number * wire::SEGMENT_LEN as usize, &segment.to_bytes());
                    }
                    let discard = matches!(operation, Operation::Discard(_));
                    (if discard { wire::DISCARD } else { wire::WRITE_ZEROES }, 0, len, 0)
                })
            }
        };
        if encoded.is_err() {
            self.free.push(index);
        }
        encoded
    }
}

impl<T: Transport> Polled for Driver<T> {
    type Transport = T;

    fn waits_for(&mut self) -> (&mut T, Duration) {
        (&mut self.transport, self.watchdog)
    }
}

impl<T: Transport> Drop for Driver<T> {
    fn drop(&mut self) {
        if !let_go(&mut self.transport) {
            let all = |slot: &mut Slot| {
                [&mut slot.header, &mut slot.status, &mut slot.data_out, &mut slot.data_in].map(Shared::leak)
            };
            self.slots.iter_mut().map(all).for_each(drop);
        }
    }
}

/// `count` sectors in segments of at most `longest`, one at least.
fn split(sector: u64, count: u32, flags: u32, longest: u32) -> impl Iterator<Item = Segment> {
    let longest = longest.max(1);
    let segment = move |number: u32| {
        let done = number * longest;
        Segment { sector: sector.saturating_add(done.into()), count: (count - done).min(longest), flags }
    };
    (0..count.div_ceil(longest).max(1)).map(segment)
}

/// How long segments may be. A device that says nothing of it gets them whole.
fn read_limits(transport: &mut impl Transport, features: Features) -> Result<[u32; 2], DriverError> {
    let mut limits = [u32::MAX; 2];
    let fields = [
        (wire::DISCARD_FEATURE, wire::config::MAX_DISCARD_SECTORS),
        (wire::WRITE_ZEROES_FEATURE, wire::config::MAX_WRITE_ZEROES_SECTORS),
    ];
    for (limit, (feature, at)) in limits.iter_mut().zip(fields) {
        if features.contains(feature) {
            let mut bytes = [0; 4];
            transport::read_config(transport, at as u32, &mut bytes)?;
            *limit = match u32::from_le_bytes(bytes) {
                0 => u32::MAX,
                most => most,
            };
        }
    }
    Ok(limits)
}

fn read_geometry(transport: &mut impl Transport, features: Features) -> Result<Geometry, DriverError> {
    let mut capacity = [0; 8];
    transport::read_config(transport, wire::config::CAPACITY as u32, &mut capacity)?;
    let block_size = if features.contains(wire::BLK_SIZE) {
        let mut size = [0; 4];
        transport::read_config(transport, wire::config::BLK_SIZE as u32, &mut size)?;
        Some(u32::from_le_bytes(size))
    } else {
        None
    };
    let read_only = features.contains(wire::RO);
    Ok(Geometry { capacity: u64::from_le_bytes(capacity), block_size, read_only })
}
