//! A front end, and the disk that counts what it is asked to write.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use polyvirt_core::Features;
use polyvirt_devices::blk;
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Backend, Connection, Stop, listen};

use crate::driver::{AVAILABLE_RING, DESCRIPTORS, RAM, SECTORS, SIZE, USED_RING};

/// How long anything may take.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(20);
/// Where guest memory is in the front end, as it says.
const USER: u64 = 1 << 32;

/// A connection on which the queue runs.
pub(crate) struct Session {
    connection: Connection,
    pub(crate) inflight: OwnedFd,
    pub(crate) area: InflightArea,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
}

impl Session {
    /// Starts the queue in the memory `ram` at `base`, with what was in flight `before`.
    pub(crate) fn start(
        socket: &Path,
        ram: BorrowedFd<'_>,
        packed: bool,
        base: u32,
        before: Option<(OwnedFd, InflightArea)>,
    ) -> Self {
        let mut connection = Connection::new(connect(socket)).unwrap();
        let format = if packed { Features::RING_PACKED } else { Features::empty() };
        let features = (Features::VERSION_1 | blk::wire::FLUSH_FEATURE | format).bits() as u64 | PROTOCOL_FEATURES;
        let protocol = ProtocolFeatures::INFLIGHT_SHMFD | ProtocolFeatures::REPLY_ACK;
        tell(&mut connection, 0, Request::SetOwner, &[], &[]);
        tell(&mut connection, 0, Request::SetProtocolFeatures, &protocol.bits().to_bytes(), &[]);
        let mut done = |request, payload: &[u8], fds: &[BorrowedFd<'_>]| {
            tell(&mut connection, NEED_REPLY, request, payload, fds);
        };
        done(Request::SetFeatures, &features.to_bytes(), &[]);
        let region = Region { guest: 0, size: RAM, user: USER, offset: 0 };
        done(Request::SetMemTable, &[1u64.to_bytes(), region.to_bytes()].concat(), &[ram]);
        let (inflight, area) = match before {
            Some((inflight, area)) => {
                done(Request::SetInflightFd, &area.to_bytes(), &[inflight.as_fd()]);
                (inflight, area)
            }
            None => {
                let area = InflightArea { size: 0, offset: 0, queues: 1, entries: SIZE };
                connection.send(Request::GetInflightFd as u32, 0, &area.to_bytes(), &[]).unwrap();
                let mut answer = connection.wait(WATCHDOG).unwrap();
                (answer.fds.remove(0), InflightArea::from_bytes(&answer.payload))
            }
        };
        let (kick, call, error) = (event(), event(), event());
        let state = |num| VringState { index: 0, num }.to_bytes();
        let addresses = VringAddr {
            index: 0,
            flags: 0,
            descriptors: USER + DESCRIPTORS,
            used: USER + USED_RING,
            available: USER + AVAILABLE_RING,
            log: 0,
        };
        let mut done = |request, payload: &[u8], fds: &[BorrowedFd<'_>]| {
            tell(&mut connection, NEED_REPLY, request, payload, fds);
        };
        done(Request::SetVringNum, &state(SIZE.into()), &[]);
        done(Request::SetVringBase, &state(base), &[]);
        done(Request::SetVringAddr, &addresses.to_bytes(), &[]);
        done(Request::SetVringErr, &0u64.to_bytes(), &[error.as_fd()]);
        done(Request::SetVringCall, &0u64.to_bytes(), &[call.as_fd()]);
        done(Request::SetVringKick, &0u64.to_bytes(), &[kick.as_fd()]);
        done(Request::SetVringEnable, &state(1), &[]);
        Self { connection, inflight, area, kick, call, error }
    }

    pub(crate) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Waits for a call; false if the other side is gone.
    pub(crate) fn wait(&mut self) -> bool {
        let timeout = PollTimeout::try_from(WATCHDOG).unwrap();
        let input = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = [input(self.call.as_fd()), input(self.connection.as_fd()), input(self.error.as_fd())];
        assert!(poll(&mut fds, timeout).unwrap() > 0, "nothing comes");
        assert!(!fds[2].any().unwrap(), "the queue is broken");
        let gone = fds[1].any().unwrap();
        let _ = self.call.read();
        !gone
    }
}

fn tell(connection: &mut Connection, flags: u32, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) {
    connection.send(request as u32, flags, payload, fds).unwrap();
    if flags & NEED_REPLY != 0 {
        assert_eq!(connection.wait(WATCHDOG).unwrap().payload, [0; 8], "{}", request.name());
    }
}

/// Connects as soon as somebody listens.
fn connect(socket: &Path) -> UnixStream {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(begun.elapsed() < WATCHDOG, "{error}"),
        }
        thread::yield_now();
    }
}

fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap()
}

/// Serves a disk at `socket`, for as long as this process lives; `written` hears the number of each request that is written.
pub(crate) fn serve(socket: &Path, written: impl FnMut(u64) + Send + 'static) {
    let disk = Disk::new(Box::new(written));
    let device = Box::new(blk::Device::new(disk, blk::Options::default()));
    let listener = UnixListener::bind(socket).unwrap();
    let mut backend = Backend::new(device, Features::RING_PACKED).unwrap();
    let stop = Stop::new().unwrap();
    listen(&listener, &mut backend, &stop, |_| {}).unwrap();
}

/// How often each request was written.
#[derive(Clone, Default)]
pub(crate) struct Counts(Arc<Mutex<BTreeMap<u64, u32>>>);

impl Counts {
    pub(crate) fn count(&self, number: u64) {
        *self.0.lock().unwrap().entry(number).or_default() += 1;
    }

    pub(crate) fn of(&self, number: u64) -> u32 {
        self.0.lock().unwrap().get(&number).copied().unwrap_or_default()
    }
}

/// A disk that does the newest of what it has first, and is never done with all of it as long as there is more: whenever
/// somebody is killed, old requests are in flight, and newer ones done.
struct Disk {
    requests: Sender<(u64, blk::Request)>,
    completions: Receiver<blk::Completion>,
    waker: Arc<Mutex<Waker>>,
}

/// Requests that it keeps.
const KEPT: usize = 5;
/// After so long without a request there are no more.
const PAUSE: Duration = Duration::from_millis(5);

impl Disk {
    fn new(mut written: Box<dyn FnMut(u64) + Send>) -> Self {
        let (requests, work) = channel::<(u64, blk::Request)>();
        let (done, completions) = channel();
        let waker = Arc::new(Mutex::new(Waker::noop().clone()));
        let wake = Arc::clone(&waker);
        thread::spawn(move || {
            let mut waiting = Vec::new();
            loop {
                let keep = match work.recv_timeout(PAUSE) {
                    Ok(request) => {
                        waiting.push(request);
                        KEPT
                    }
                    Err(RecvTimeoutError::Timeout) => 0,
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                while waiting.len() > keep
                    && let Some((id, request)) = waiting.pop()
                {
                    let blk::Request::Write { data, .. } = request else { panic!("only writes are sent") };
                    written(u64::from_le_bytes(data[..8].try_into().unwrap()));
                    if done.send(blk::Completion { id, result: Ok(Vec::new()) }).is_err() {
                        return;
                    }
                    wake.lock().unwrap().wake_by_ref();
                }
            }
        });
        Self { requests, completions, waker }
    }
}

impl blk::Backend for Disk {
    fn capacity(&self) -> u64 {
        SECTORS
    }

    fn submit(&mut self, id: u64, request: blk::Request) {
        self.requests.send((id, request)).unwrap();
    }

    fn complete(&mut self) -> Option<blk::Completion> {
        self.completions.try_recv().ok()
    }

    fn set_waker(&mut self, waker: Waker) {
        *self.waker.lock().unwrap() = waker;
    }
}

/// Opens what process `id` has open as `fd`.
pub(crate) fn open_of(id: u32, fd: i32) -> OwnedFd {
    File::options().read(true).write(true).open(format!("/proc/{id}/fd/{fd}")).unwrap().into()
}

/// Appends the number of a request to `file`, at once.
pub(crate) fn append(file: &mut File, number: u64) -> io::Result<()> {
    file.write_all(&number.to_le_bytes())
}
