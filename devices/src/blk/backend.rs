//! Where the bytes of a disk are.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::thread::{Builder, JoinHandle};

use super::wire::SECTOR_SIZE;

/// What a backend is asked for, in bytes from the start of the disk. The device has checked that it lies inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read `len` bytes.
    Read {
        /// Where.
        offset: u64,
        /// How many.
        len: usize,
    },
    /// Write these bytes.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Make durable everything whose completion was reported before.
    Flush,
    /// Make `len` bytes read as zero.
    Zero {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Forget `len` bytes: what they read as is up to the backend.
    Discard {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
    },
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// What [`Backend::submit`] was given.
    pub id: u64,
    /// The bytes of a read; empty for others.
    pub result: io::Result<Vec<u8>>,
}

/// A disk. It owns the buffers of what it works on, so it may finish a request whenever it likes: nothing of the guest's
/// is touched but by the device.
pub trait Backend: Send {
    /// Sectors of 512 bytes.
    fn capacity(&self) -> u64;

    /// Begins `request`; [`Backend::complete`] will say what became of it. Never waits.
    fn submit(&mut self, id: u64, request: Request);

    /// The next completion, in any order; none if nothing else is done yet.
    fn complete(&mut self) -> Option<Completion>;

    /// What to wake when there is a completion, or when the capacity has changed.
    fn set_waker(&mut self, waker: Waker);
}

/// A raw image in a file or on a block device. A thread does the reads and writes.
pub struct FileBackend {
    image: FileHandle,
    requests: Option<Sender<(u64, Request)>>,
    completions: Receiver<Completion>,
    worker: Option<JoinHandle<()>>,
}

/// The far side of a [`FileBackend`].
#[derive(Clone)]
pub struct FileHandle(Arc<Image>);

struct Image {
    file: File,
    capacity: AtomicU64,
    waker: Mutex<Waker>,
}

impl FileBackend {
    /// Serves `file`; bytes beyond its last whole sector are not part of the disk.
    pub fn new(file: File) -> io::Result<Self> {
        let capacity = AtomicU64::new(sectors(&file)?);
        let image = FileHandle(Arc::new(Image { file, capacity, waker: Mutex::new(Waker::noop().clone()) }));
        let (requests, work) = channel::<(u64, Request)>();
        let (done, completions) = channel();
        let FileHandle(served) = image.clone();
        let worker = Builder::new().name("blk-file".into()).spawn(move || {
            for (id, request) in work {
                if done.send(Completion { id, result: carry_out(&served.file, request) }).is_err() {
                    return;
                }
                lock(&served.waker).wake_by_ref();
            }
        })?;
        Ok(Self { image, requests: Some(requests), completions, worker: Some(worker) })
    }

    /// The far side.
    pub fn handle(&self) -> FileHandle {
        self.image.clone()
    }
}

impl FileHandle {
    /// Looks how large the image is by now, in sectors; if it became larger or smaller, the device is told.
    pub fn refresh(&self) -> io::Result<u64> {
        let capacity = sectors(&self.0.file)?;
        if self.0.capacity.swap(capacity, Ordering::AcqRel) != capacity {
            lock(&self.0.waker).wake_by_ref();
        }
        Ok(capacity)
    }
}

/// The whole sectors of `file`. What the metadata of a block device say is 0.
fn sectors(mut file: &File) -> io::Result<u64> {
    Ok(file.seek(SeekFrom::End(0))? / SECTOR_SIZE)
}

fn carry_out(file: &File, request: Request) -> io::Result<Vec<u8>> {
    match request {
        Request::Read { offset, len } => {
            let mut data = vec![0; len];
            file.read_exact_at(&mut data, offset)?;
            return Ok(data);
        }
        Request::Write { offset, data } => file.write_all_at(&data, offset)?,
        Request::Flush => file.sync_data()?,
        Request::Zero { offset, len } => {
            let zeroes = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(1 << 20)];
            let mut done = 0;
            while done < len {
                let here = (len - done).min(zeroes.len() as u64);
                file.write_all_at(&zeroes[..here as usize], offset + done)?;
                done += here;
            }
        }
        // Nothing has to happen; the standard library cannot punch holes.
        Request::Discard { .. } => {}
    }
    Ok(Vec::new())
}

impl Backend for FileBackend {
    fn capacity(&self) -> u64 {
        self.image.0.capacity.load(Ordering::Acquire)
    }

    fn submit(&mut self, id: u64, request: Request) {
        if let Some(requests) = &self.requests {
            // The worker ends only after this sender.
            let _ = requests.send((id, request));
        }
    }

    fn complete(&mut self) -> Option<Completion> {
        self.completions.try_recv().ok()
    }

    fn set_waker(&mut self, waker: Waker) {
        *lock(&self.image.0.waker) = waker;
    }
}

impl Drop for FileBackend {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

/// A disk in memory, done at once, which can be told to misbehave.
pub struct MemoryBackend {
    disk: MemoryHandle,
    completions: VecDeque<Completion>,
}

/// The far side of a [`MemoryBackend`].
#[derive(Clone)]
pub struct MemoryHandle(Arc<Mutex<Disk>>);

struct Disk {
    bytes: Vec<u8>,
    failures: u32,
    flushes: u64,
    waker: Waker,
}

impl MemoryBackend {
    /// A disk of `bytes`, whole sectors of it.
    pub fn new(bytes: Vec<u8>) -> Self {
        let disk = Disk { bytes, failures: 0, flushes: 0, waker: Waker::noop().clone() };
        Self { disk: MemoryHandle(Arc::new(Mutex::new(disk))), completions: VecDeque::new() }
    }

    /// The far side.
    pub fn handle(&self) -> MemoryHandle {
        self.disk.clone()
    }
}

impl MemoryHandle {
    /// The bytes of the disk now.
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.0).bytes.clone()
    }

    /// The next `count` requests fail.
    pub fn fail(&self, count: u32) {
        lock(&self.0).failures = count;
    }

    /// How many flushes there were.
    pub fn flushes(&self) -> u64 {
        lock(&self.0).flushes
    }

    /// Makes the disk larger or smaller; the device is told.
    pub fn resize(&self, sectors: u64) {
        let mut disk = lock(&self.0);
        disk.bytes.resize((sectors * SECTOR_SIZE) as usize, 0);
        disk.waker.wake_by_ref();
    }
}

impl Disk {
    /// `len` bytes at `offset`. The disk may have become smaller since the device looked.
    fn part(&mut self, offset: u64, len: u64) -> io::Result<&mut [u8]> {
        let (start, end) = (offset as usize, offset.saturating_add(len) as usize);
        let beyond = || io::Error::new(io::ErrorKind::UnexpectedEof, "beyond the end of the disk");
        self.bytes.get_mut(start..end).ok_or_else(beyond)
    }

    fn carry_out(&mut self, request: Request) -> io::Result<Vec<u8>> {
        if self.failures > 0 {
            self.failures -= 1;
            return Err(io::Error::other("told to fail"));
        }
        match request {
            Request::Read { offset, len } => return Ok(self.part(offset, len as u64)?.to_vec()),
            Request::Write { offset, data } => self.part(offset, data.len() as u64)?.copy_from_slice(&data),
            Request::Flush => self.flushes += 1,
            Request::Zero { offset, len } | Request::Discard { offset, len } => self.part(offset, len)?.fill(0),
        }
        Ok(Vec::new())
    }
}

impl Backend for MemoryBackend {
    fn capacity(&self) -> u64 {
        lock(&self.disk.0).bytes.len() as u64 / SECTOR_SIZE
    }

    fn submit(&mut self, id: u64, request: Request) {
        let result = lock(&self.disk.0).carry_out(request);
        self.completions.push_back(Completion { id, result });
    }

    fn complete(&mut self) -> Option<Completion> {
        self.completions.pop_front()
    }

    fn set_waker(&mut self, waker: Waker) {
        lock(&self.disk.0).waker = waker;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
