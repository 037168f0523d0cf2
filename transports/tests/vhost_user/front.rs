//! A front end that can say anything, and the server that it says it to.

use std::fs::File;
use std::io::IoSlice;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use polyvirt_core::Features;
use polyvirt_core::memory::Pages;
use polyvirt_core::queue::{Buffer, DriverQueue, Layout, QueueConfig};
use polyvirt_core::transport::{Notify, TransportError, Virtqueue};
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{
    Backend, Connection, ConnectionError, Ended, Message, ServeError, Stop, listen, map, memory_file,
    outlive_truncation,
};

use crate::toy::{FILL, Handle, Toy};

/// How long anything may take.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(20);
/// Guest memory, bytes.
pub(crate) const RAM: u64 = 0x40000;
/// Its guest-physical address.
pub(crate) const RAM_AT: u64 = 0x1_0000;
/// Entries of a queue.
pub(crate) const SIZE: u16 = 8;
/// Where a queue's buffers are, from the start of memory.
const BUFFERS: u64 = 0x20000;

/// A server in a thread of its own.
pub(crate) struct Server {
    pub(crate) path: PathBuf,
    pub(crate) device: Handle,
    ended: Receiver<Result<Ended, ServeError>>,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::with(Features::empty())
    }

    /// With `features` offered besides packed rings.
    pub(crate) fn with(features: Features) -> Self {
        outlive_truncation().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let device = Handle::default();
        let mut backend = Backend::new(Box::new(Toy::new(device.clone())), Features::RING_PACKED | features).unwrap();
        let stop = Stop::new().unwrap();
        let (tell, ended) = channel();
        let until = stop.clone();
        let serve = move || {
            listen(&listener, &mut backend, &until, |how| drop(tell.send(how.clone()))).unwrap();
        };
        let thread = Builder::new().name("server".into()).spawn(serve).unwrap();
        Self { path, device, ended, stop, thread: Some(thread), _folder: folder }
    }

    /// A front end that has said nothing yet.
    pub(crate) fn connect(&self) -> Front {
        Front::new(UnixStream::connect(&self.path).unwrap(), Ram::new())
    }

    /// How the oldest session that was not asked about ended.
    pub(crate) fn ended(&self) -> Result<Ended, ServeError> {
        self.ended.recv_timeout(WATCHDOG).expect("a session ends")
    }

    /// Whether the device works for the next one who connects, with both formats.
    pub(crate) fn check(&self) {
        for format in [Features::empty(), Features::RING_PACKED] {
            let mut front = self.connect();
            front.begin(Features::VERSION_1 | format, ProtocolFeatures::MQ);
            let mut queue = front.queue(0);
            queue.send(&front.ram, 0, b"still there?");
            queue.wait(1);
            drop((queue, front));
            assert_eq!(self.ended(), Ok(Ended::Closed));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A session ends when what is in flight is done.
        self.device.keep(false);
        self.stop.stop();
        let done = self.thread.take().unwrap().join();
        assert!(done.is_ok() || std::thread::panicking(), "the server panicked");
    }
}

/// Memory of the guest.
pub(crate) struct Ram {
    pub(crate) file: OwnedFd,
    pub(crate) pages: Pages,
}

impl Ram {
    pub(crate) fn new() -> Self {
        let (file, pages) = memory_file("ram", RAM).unwrap();
        Self { file, pages }
    }

    /// Out of a file that can become shorter.
    pub(crate) fn of(file: &File) -> Self {
        file.set_len(RAM).unwrap();
        let pages = map(file.try_clone().unwrap().into(), 0, RAM).unwrap();
        Self { file: file.try_clone().unwrap().into(), pages }
    }

    /// The same memory, for another front end.
    pub(crate) fn again(&self) -> Self {
        Self { file: self.file.try_clone().unwrap(), pages: self.pages.clone() }
    }

    /// As the other side is told.
    pub(crate) fn region(&self) -> Region {
        Region { guest: RAM_AT, size: RAM, user: self.user(0), offset: 0 }
    }

    /// The address of the front end at `offset`.
    pub(crate) fn user(&self, offset: u64) -> u64 {
        self.pages.as_ptr().addr() as u64 + offset
    }

    pub(crate) fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.pages.read(offset as usize, &mut bytes).unwrap();
        bytes
    }
}

/// A connection that carries more than messages.
pub(crate) struct Wire {
    connection: Connection,
    socket: UnixStream,
}

impl Wire {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self { socket: socket.try_clone().unwrap(), connection: Connection::new(socket).unwrap() }
    }

    /// Sends bytes, whatever they are.
    pub(crate) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        let sent =
            sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
        assert_eq!(sent, Ok(bytes.len()));
    }
}

impl Deref for Wire {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl DerefMut for Wire {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }
}

/// The front end's end of a connection.
pub(crate) struct Front {
    pub(crate) connection: Wire,
    pub(crate) ram: Ram,
    /// The device address of memory.
    pub(crate) device_at: u64,
    pub(crate) features: Features,
    pub(crate) protocol: ProtocolFeatures,
}

impl Front {
    /// One that has said nothing yet.
    pub(crate) fn new(socket: UnixStream, ram: Ram) -> Self {
        Self {
            connection: Wire::new(socket),
            ram,
            device_at: RAM_AT,
            features: Features::empty(),
            protocol: ProtocolFeatures::empty(),
        }
    }

    /// Sends anything.
    pub(crate) fn raw(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.connection.send(request, flags, payload, fds).unwrap();
    }

    /// Sends a request.
    pub(crate) fn send(&self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.raw(request as u32, 0, payload, fds);
    }

    /// Sends a request, and waits until it is done.
    pub(crate) fn tell(&mut self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        if self.protocol.contains(ProtocolFeatures::REPLY_ACK) {
            self.raw(request as u32, NEED_REPLY, payload, fds);
            let answer = self.answer();
            assert_eq!((answer.header.request, &answer.payload[..]), (request as u32, &[0; 8][..]));
        } else {
            self.send(request, payload, fds);
            self.ask::<u64>(Request::GetFeatures, &[]);
        }
    }

    /// The next message.
    pub(crate) fn answer(&mut self) -> Message {
        self.connection.wait(WATCHDOG).unwrap()
    }

    pub(crate) fn ask<T: Payload>(&mut self, request: Request, payload: &[u8]) -> T {
        self.send(request, payload, &[]);
        let Message { header, payload, .. } = self.answer();
        assert_eq!((header.request, header.flags), (request as u32, VERSION | REPLY));
        assert_eq!(payload.len(), T::LEN);
        T::from_bytes(&payload)
    }

    /// Waits for the other side to close the connection.
    pub(crate) fn closed(&mut self) {
        loop {
            match self.connection.wait(WATCHDOG) {
                Ok(_) => {}
                Err(ConnectionError::Closed) => return,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Up to where the memory is handed over: with these features, and these protocol features.
    pub(crate) fn begin(&mut self, features: Features, protocol: ProtocolFeatures) {
        self.send(Request::SetOwner, &[], &[]);
        self.negotiate(features, protocol);
        self.hand_over();
    }

    pub(crate) fn negotiate(&mut self, features: Features, protocol: ProtocolFeatures) {
        let offered: u64 = self.ask(Request::GetFeatures, &[]);
        self.features = features;
        let features = features.bits() as u64 | PROTOCOL_FEATURES;
        assert_eq!(features & !offered, 0, "not offered");
        let theirs: u64 = self.ask(Request::GetProtocolFeatures, &[]);
        assert_eq!(protocol.bits() & !theirs, 0, "not offered");
        self.send(Request::SetProtocolFeatures, &protocol.bits().to_bytes(), &[]);
        self.protocol = protocol;
        self.tell(Request::SetFeatures, &features.to_bytes(), &[]);
    }

    pub(crate) fn hand_over(&mut self) {
        let file = self.ram.file.try_clone().unwrap();
        let table = [1u64.to_bytes(), self.ram.region().to_bytes()].concat();
        self.tell(Request::SetMemTable, &table, &[file.as_fd()]);
    }

    /// Hands queue `index` over, which begins at its beginning.
    pub(crate) fn queue(&mut self, index: u32) -> Queue {
        let queue = Queue::new(self, index);
        let base = if self.features.contains(Features::RING_PACKED) { 0x8000_8000 } else { 0 };
        self.start(&queue, base);
        queue
    }

    /// Hands `queue` over, which goes on at `base`.
    pub(crate) fn start(&mut self, queue: &Queue, base: u32) {
        self.set_up(queue, base);
        let which = u64::from(queue.index).to_bytes();
        self.tell(Request::SetVringKick, &which, &[queue.kick.as_fd()]);
        self.enable(queue.index, 1);
    }

    /// All that is told of `queue`, but not that it starts.
    pub(crate) fn set_up(&mut self, queue: &Queue, base: u32) {
        let state = |num| VringState { index: queue.index, num }.to_bytes();
        let which = u64::from(queue.index).to_bytes();
        self.tell(Request::SetVringNum, &state(queue.config.size.into()), &[]);
        self.tell(Request::SetVringBase, &state(base), &[]);
        self.tell(Request::SetVringAddr, &self.addresses(queue).to_bytes(), &[]);
        if !self.protocol.contains(ProtocolFeatures::INBAND_NOTIFICATIONS) {
            self.tell(Request::SetVringErr, &which, &[queue.error.as_fd()]);
            self.tell(Request::SetVringCall, &which, &[queue.call.as_fd()]);
        }
    }

    /// Where the parts of `queue` are.
    pub(crate) fn addresses(&self, queue: &Queue) -> VringAddr {
        let QueueConfig { descriptors, driver, device, .. } = queue.config;
        let translated = self.features.contains(Features::ACCESS_PLATFORM);
        let address = |address| if translated { address } else { self.ram.user(address - RAM_AT) };
        VringAddr {
            index: queue.index,
            flags: 0,
            descriptors: address(descriptors),
            available: address(driver),
            used: address(device),
            log: 0,
        }
    }

    pub(crate) fn enable(&mut self, index: u32, num: u32) {
        self.tell(Request::SetVringEnable, &VringState { index, num }.to_bytes(), &[]);
    }

    /// Takes queue `index` back: where it is to go on.
    pub(crate) fn stop(&mut self, index: u32) -> u32 {
        let state = VringState { index, num: 0 };
        let answer: VringState = self.ask(Request::GetVringBase, &state.to_bytes());
        assert_eq!(answer.index, index);
        answer.num
    }
}

/// A queue of the driver's.
pub(crate) struct Queue {
    pub(crate) index: u32,
    pub(crate) config: QueueConfig,
    pub(crate) ring: DriverQueue<u16, Kick>,
    pub(crate) kick: Arc<EventFd>,
    pub(crate) call: EventFd,
    pub(crate) error: EventFd,
}

/// Its doorbell.
pub(crate) struct Kick(Arc<EventFd>);

impl Notify for Kick {
    fn notify(&mut self) -> Result<(), TransportError> {
        self.0.write(1).unwrap();
        Ok(())
    }
}

impl Queue {
    /// Queue `index` in the memory of `front`, with an area on each page, nothing in it.
    pub(crate) fn new(front: &Front, index: u32) -> Self {
        let start = u64::from(index) * 0x4000;
        let [descriptors, driver, device] = [start, start + 0x1000, start + 0x2000];
        let pages = |offset: u64| front.ram.pages.slice(offset as usize, 0x1000).unwrap();
        let at = front.device_at;
        let config = QueueConfig {
            size: SIZE,
            descriptors: at + descriptors,
            driver: at + driver,
            device: at + device,
            layout: if front.features.contains(Features::RING_PACKED) { Layout::Packed } else { Layout::Modern },
            event_idx: front.features.contains(Features::EVENT_IDX),
            ..QueueConfig::default()
        };
        let kick = Arc::new(event());
        let virtqueue = Virtqueue {
            config,
            descriptors: pages(descriptors),
            driver: pages(driver),
            device: pages(device),
            notify: Kick(kick.clone()),
        };
        let ring = DriverQueue::new(virtqueue).unwrap();
        Self { index, config, ring, kick, call: event(), error: event() }
    }

    /// Where the buffer in `slot` is, from the start of memory: a page for each.
    pub(crate) fn buffer(&self, slot: u16) -> u64 {
        BUFFERS + u64::from(self.index) * 0x8000 + u64::from(slot) * 0x1000
    }

    /// Makes a request available that the device reads `data` of and fills 16 bytes of, and kicks.
    pub(crate) fn send(&mut self, ram: &Ram, slot: u16, data: &[u8]) {
        self.add(ram, slot, data);
        self.ring.kick().unwrap();
    }

    /// As [`Queue::send`], without a kick.
    pub(crate) fn add(&mut self, ram: &Ram, slot: u16, data: &[u8]) {
        let buffer = self.buffer(slot);
        ram.pages.write(buffer as usize, data).unwrap();
        ram.pages.fill(buffer as usize + 0x800, 16, 0).unwrap();
        // Queue 0 begins where memory does.
        let at = self.config.descriptors - u64::from(self.index) * 0x4000;
        let readable = Buffer { address: at + buffer, len: data.len() as u32 };
        let writable = Buffer { address: at + buffer + 0x800, len: 16 };
        self.ring.add_buf(&[readable], &[writable], slot).unwrap();
    }

    /// Waits until `count` more are used, by calls: which, in their order.
    pub(crate) fn wait(&mut self, count: usize) -> Vec<u16> {
        let mut used = Vec::new();
        loop {
            while let Some((slot, len)) = self.ring.get_buf().unwrap() {
                assert_eq!(len, 16);
                used.push(slot);
            }
            assert!(used.len() <= count, "{used:?}");
            if used.len() == count {
                return used;
            }
            self.called();
        }
    }

    /// Waits for a call.
    pub(crate) fn called(&self) {
        wait_for(&self.call);
        self.call.read().unwrap();
    }

    /// Whether the buffer in `slot` is as the device leaves it.
    pub(crate) fn is_filled(&self, ram: &Ram, slot: u16) -> bool {
        ram.bytes(self.buffer(slot) + 0x800, 16) == [FILL; 16]
    }
}

/// Waits until `fd` is readable.
pub(crate) fn wait_for(fd: &impl AsFd) {
    let timeout = PollTimeout::try_from(WATCHDOG).unwrap();
    let count = poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
    assert_eq!(count, 1, "nothing came");
}

pub(crate) fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap()
}
