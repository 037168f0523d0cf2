//! A disk in memory.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use super::backend::{Backend, Completion, Request};
use super::wire::SECTOR_SIZE;

/// A disk in memory, done at once, which can be told to misbehave.
pub struct MemoryBackend {
    disk: MemoryHandle,
}

/// The far side of a [`MemoryBackend`].
#[derive(Clone)]
pub struct MemoryHandle(Arc<Mutex<Disk>>);

struct Disk {
    bytes: Vec<u8>,
    completions: VecDeque<Completion>,
    /// What is not begun, while nothing is done.
    held: Vec<(u64, Request)>,
    hangs: bool,
    failures: u32,
    flushes: u64,
    waker: Waker,
}

impl MemoryBackend {
    /// A disk of `bytes`, whole sectors of it.
    pub fn new(bytes: Vec<u8>) -> Self {
        let disk = Disk {
            bytes,
            completions: VecDeque::new(),
            held: Vec::new(),
            hangs: false,
            failures: 0,
            flushes: 0,
            waker: Waker::noop().clone(),
        };
        Self { disk: MemoryHandle(Arc::new(Mutex::new(disk))) }
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

    /// From now on nothing is done, if `hangs`; else what was asked for meanwhile is done, and whatever follows.
    pub fn hang(&self, hangs: bool) {
        let mut disk = lock(&self.0);
        disk.hangs = hangs;
        if !hangs {
            for (id, request) in std::mem::take(&mut disk.held) {
                disk.finish(id, request);
            }
            disk.waker.wake_by_ref();
        }
    }

    /// How many requests were asked for and are not done.
    pub fn held(&self) -> usize {
        lock(&self.0).held.len()
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

    fn finish(&mut self, id: u64, request: Request) {
        let result = self.carry_out(request);
        self.completions.push_back(Completion { id, result });
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
            Request::Zero { offset, len, .. } | Request::Discard { offset, len } => self.part(offset, len)?.fill(0),
        }
        Ok(Vec::new())
    }
}

impl Backend for MemoryBackend {
    fn capacity(&self) -> u64 {
        lock(&self.disk.0).bytes.len() as u64 / SECTOR_SIZE
    }

    fn submit(&mut self, id: u64, request: Request) {
        let mut disk = lock(&self.disk.0);
        if disk.hangs {
            disk.held.push((id, request));
        } else {
            disk.finish(id, request);
        }
    }

    fn complete(&mut self) -> Option<Completion> {
        lock(&self.disk.0).completions.pop_front()
    }

    fn set_waker(&mut self, waker: Waker) {
        lock(&self.disk.0).waker = waker;
    }
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}
