//! A raw image in a file, or a block device.

use std::collections::VecDeque;
use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::thread::{Builder, JoinHandle};
use std::time::SystemTime;

use super::backend::{Backend, Completion, IN_FLIGHT, Request};
use super::medium::{Durability, Medium, can_punch, discard, zero};
use super::wire::SECTOR_SIZE;

/// A raw image in a file, or a block device.
///
/// Reads, writes, and what may take long (flushes, zeroing, discarding) have a thread each, so that none of them waits
/// for one of another kind.
pub struct FileBackend {
    shared: Arc<Shared>,
    lines: [Arc<Line>; 3],
    threads: Vec<JoinHandle<()>>,
    done: Sender<Completion>,
    completions: Receiver<Completion>,
    deallocates: bool,
    id: Option<String>,
}

/// What its owner, its threads and its handles have in common.
struct Shared {
    medium: Box<dyn Medium>,
    sectors: AtomicU64,
    waker: Mutex<Waker>,
    durability: Durability,
}

/// The far side of a [`FileBackend`], for whoever hears that its file has another size (inotify, a control line).
#[derive(Clone)]
pub struct FileHandle(Arc<Shared>);

impl FileHandle {
    /// Looks how large the file is now, in sectors. If that has changed the device is woken, and tells its driver.
    pub fn refresh(&self) -> io::Result<u64> {
        let (before, now) = self.0.refresh()?;
        if before != now {
            lock(&self.0.waker).wake_by_ref();
        }
        Ok(now)
    }
}

impl Shared {
    /// Sectors that there were, and that there are.
    fn refresh(&self) -> io::Result<(u64, u64)> {
        let now = self.medium.size()? / SECTOR_SIZE;
        Ok((self.sectors.swap(now, Ordering::Relaxed), now))
    }
}

impl FileBackend {
    /// Serves `file`; bytes beyond its last whole sector are not part of the disk.
    pub fn new(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let device = metadata.file_type().is_block_device();
        let id =
            format!("{:016x}", hash(&if device { [metadata.rdev(), 0] } else { [metadata.ino(), born(&metadata)] }));
        // A block device has nothing behind its end to try it with.
        let deallocates = device || can_punch(&file, metadata.len());
        Self::over(Box::new(file), deallocates, Some(id))
    }

    fn over(medium: Box<dyn Medium>, deallocates: bool, id: Option<String>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            medium,
            sectors: AtomicU64::new(0),
            waker: Mutex::new(Waker::noop().clone()),
            durability: Durability::default(),
        });
        shared.refresh()?;
        let (done, completions) = channel();
        let lines: [Arc<Line>; 3] = Default::default();
        let mut backend = Self { shared, lines, threads: Vec::new(), done, completions, deallocates, id };
        for (name, line) in ["blk-read", "blk-write", "blk-slow"].into_iter().zip(&backend.lines) {
            let (line, shared, done) = (Arc::clone(line), Arc::clone(&backend.shared), backend.done.clone());
            let work = move || {
                while let Some(request) = line.next() {
                    shared.carry_out(request, &line, &done);
                    lock(&shared.waker).wake_by_ref();
                }
            };
            backend.threads.push(Builder::new().name(name.into()).spawn(work)?);
        }
        Ok(backend)
    }

    /// For whoever hears of another size.
    pub fn handle(&self) -> FileHandle {
        FileHandle(Arc::clone(&self.shared))
    }
}

impl Backend for FileBackend {
    fn capacity(&self) -> u64 {
        self.shared.sectors.load(Ordering::Relaxed)
    }

    fn refresh(&mut self) {
        if let Err(error) = self.shared.refresh() {
            tracing::warn!(%error, "how large the disk is now cannot be told");
        }
    }

    fn deallocates(&self) -> bool {
        self.deallocates
    }

    fn id(&self) -> Option<String> {
        self.id.clone()
    }

    fn submit(&mut self, id: u64, request: Request) {
        let [reads, writes, slow] = &self.lines;
        let line = match request {
            Request::Read { .. } => reads,
            Request::Write { .. } => writes,
            Request::Flush | Request::Zero { .. } | Request::Discard { .. } => slow,
        };
        if !line.push(id, request) {
            let error = io::Error::new(ErrorKind::WouldBlock, "more requests at once than a device may have");
            self.give_back(id, error);
        }
    }

    fn cancel(&mut self, id: u64) {
        if self.lines.iter().any(|line| line.remove(id)) {
            self.give_back(id, ErrorKind::Interrupted.into());
        }
    }

    fn complete(&mut self) -> Option<Completion> {
        self.completions.try_recv().ok()
    }

    fn set_waker(&mut self, waker: Waker) {
        *lock(&self.shared.waker) = waker;
    }
}

impl FileBackend {
    /// Completes what was not begun.
    fn give_back(&self, id: u64, error: io::Error) {
        // The receiver is our own.
        let _ = self.done.send(Completion { id, result: Err(error) });
        lock(&self.shared.waker).wake_by_ref();
    }
}

impl Drop for FileBackend {
    fn drop(&mut self) {
        self.lines.iter().for_each(|line| line.end());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn carry_out(&self, (id, request): (u64, Request), line: &Line, done: &Sender<Completion>) {
        let answer = |id, result| drop(done.send(Completion { id, result }));
        let result = match request {
            Request::Read { offset, len } => {
                let mut data = vec![0; len];
                return answer(id, self.medium.read(offset, &mut data).map(|()| data));
            }
            Request::Write { offset, data } => self.medium.write(offset, &data),
            Request::Flush => {
                // What was asked before it begins, one serves.
                let ids = line.take_flushes();
                let result = self.durability.sync(|| self.medium.sync());
                for id in ids {
                    answer(id, copy(&result).map(|()| Vec::new()));
                }
                result
            }
            Request::Zero { offset, len, deallocate } => zero(&*self.medium, offset, len, deallocate),
            Request::Discard { offset, len } => discard(&*self.medium, offset, len),
        };
        answer(id, result.map(|()| Vec::new()));
    }
}

fn copy(result: &io::Result<()>) -> io::Result<()> {
    result.as_ref().copied().map_err(|error| io::Error::new(error.kind(), error.to_string()))
}

/// When a file was made, in nanoseconds: with its inode that tells it from others, after the next boot too. The number of
/// its file system, which need not stay, is for those that do not know.
fn born(metadata: &Metadata) -> u64 {
    let since = metadata.created().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.map_or(metadata.dev(), |since| since.as_nanos() as u64)
}

/// FNV-1a, over the bytes of `words`.
fn hash(words: &[u64]) -> u64 {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Requests that wait for a thread.
#[derive(Default)]
struct Line {
    waiting: Mutex<Waiting>,
    news: Condvar,
}

#[derive(Default)]
struct Waiting {
    requests: VecDeque<(u64, Request)>,
    ended: bool,
}

impl Line {
    /// False if it is full.
    fn push(&self, id: u64, request: Request) -> bool {
        let mut waiting = lock(&self.waiting);
        if waiting.requests.len() >= IN_FLIGHT {
            return false;
        }
        waiting.requests.push_back((id, request));
        self.news.notify_one();
        true
    }

    /// The next request, waited for; none once the line has ended.
    fn next(&self) -> Option<(u64, Request)> {
        let nothing = |waiting: &mut Waiting| waiting.requests.is_empty() && !waiting.ended;
        let waiting = self.news.wait_while(lock(&self.waiting), nothing);
        let mut waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        if waiting.ended { None } else { waiting.requests.pop_front() }
    }

    /// Takes out all flushes that wait.
    fn take_flushes(&self) -> Vec<u64> {
        let mut ids = Vec::new();
        lock(&self.waiting).requests.retain(|(id, request)| {
            let flush = *request == Request::Flush;
            if flush {
                ids.push(*id);
            }
            !flush
        });
        ids
    }

    /// Takes out request `id`; whether it was there.
    fn remove(&self, id: u64) -> bool {
        let requests = &mut lock(&self.waiting).requests;
        let before = requests.len();
        requests.retain(|(other, _)| *other != id);
        requests.len() < before
    }

    /// What waits is not done any more.
    fn end(&self) {
        lock(&self.waiting).ended = true;
        self.news.notify_one();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
