//! The launcher: gives NOTIFY its meaning and runs devices, on one thread, which owns the guest.
//!
//! While the guest waits for an interrupt it is stopped, and the thread sleeps until something happens.

use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::{Wake, Waker};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use polyvirt_core::hypervisor::{self, BusDevice, Cause, HypervisorError, Interrupt};
use polyvirt_core::memory::{FlatMemory, Pages};
use polyvirt_transports::lguest::HostPlace;
use polyvirt_transports::lguest::registers::{HostRing, RING_PAGES};

use super::abi::{DEVICE_PAGES, LGUEST_IRQS, PAGE};
use super::kernel::{self, Event, Kernel};
use super::unavailable;

/// How long a guest may run without a hypercall.
const RUN_LIMIT: Duration = Duration::from_secs(10);
/// What is kept of the early console, bytes: its end.
const CONSOLE_LOG: usize = 64 * 1024;

/// The host half. Dropping it ends the guest.
pub struct Host {
    launcher: Arc<Launcher>,
    thread: Option<JoinHandle<()>>,
    memory: Arc<FlatMemory>,
    /// The memory above RAM, and its guest-physical address.
    pub(super) devices: (Pages, u64),
    /// What the next place gets.
    next: Next,
}

#[derive(Clone, Copy)]
struct Next {
    device: usize,
    offset: usize,
    page: u64,
    line: u16,
}

impl Host {
    /// Starts the guest in `memory`, of which the last [`DEVICE_PAGES`] are above its RAM.
    pub(super) fn start(memory: &Pages) -> Result<Self, HypervisorError> {
        let limit = memory.len() as u64;
        let ram_end = limit - DEVICE_PAGES * PAGE;
        let above = memory.slice(ram_end as usize, (limit - ram_end) as usize);
        let above = above.ok_or(HypervisorError::Exhausted("memory"))?;
        let (sender, launched) = mpsc::channel();
        let pages = memory.clone();
        let thread = Builder::new().name("lguest".into()).spawn(move || {
            // The thread that forks is the one that traces, and with which the guest dies.
            let _ = match Server::start(&pages, ram_end) {
                Ok(server) => sender.send(Ok(Arc::clone(&server.launcher))).map(|()| server.serve()),
                Err(reason) => sender.send(Err(reason)),
            };
        });
        let thread = thread.map_err(|error| unavailable(format!("no thread can be started: {error}")))?;
        let launcher = launched.recv().unwrap_or_else(|_| Err("its thread panicked".into())).map_err(unavailable)?;
        Ok(Self {
            launcher,
            thread: Some(thread),
            memory: Arc::new(FlatMemory::new([(0, memory.clone())])),
            devices: (above, ram_end),
            next: Next { device: 0, offset: 0, page: 1, line: 1 },
        })
    }

    /// What the guest printed on the early console: the last 64 KiB.
    pub fn early_console(&self) -> String {
        self.launcher.inbox().console.clone()
    }

    /// The id of the guest's process.
    pub fn process_id(&self) -> i32 {
        self.launcher.process.0
    }

    pub(super) const fn launcher(&self) -> &Arc<Launcher> {
        &self.launcher
    }
}

impl hypervisor::Host for Host {
    type Memory = Arc<FlatMemory>;
    type Place = HostPlace;

    fn memory(&self) -> Self::Memory {
        Arc::clone(&self.memory)
    }

    fn place(&mut self, _device_type: u32, queues: u16) -> Result<HostPlace, HypervisorError> {
        let (above, ram_end) = &self.devices;
        let Next { offset, page, line, .. } = self.next;
        if u32::from(line) + u32::from(queues) > LGUEST_IRQS {
            return Err(HypervisorError::Exhausted("interrupt lines"));
        }
        let slice = |page: u64, pages| above.slice((page * PAGE) as usize, pages * PAGE as usize);
        let rings = (0..queues).map(|index| {
            let page = page + u64::from(index) * RING_PAGES as u64;
            let pages = slice(page, RING_PAGES)?;
            Some(HostRing { address: ram_end + page * PAGE, pages, line: line + index })
        });
        let rings: Option<Vec<_>> = rings.collect();
        let (Some(page), Some(rings)) = (slice(0, 1), rings) else {
            return Err(HypervisorError::Exhausted("pages for rings"));
        };
        Ok(HostPlace { page, offset, len: 0, rings })
    }

    fn interrupt(&self, place: &HostPlace) -> Arc<dyn Interrupt> {
        let lines = place.rings.iter().map(|ring| ring.line).collect();
        Arc::new(Lines { launcher: Arc::clone(&self.launcher), lines })
    }

    fn plug(&mut self, place: HostPlace, mut device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        let next = &mut self.next;
        if place.offset != next.offset || place.len == 0 || place.offset + place.len > PAGE as usize {
            let reason = format!("the place at {:#x} is taken, empty or beyond the device page", place.offset);
            return Err(HypervisorError::Refused { call: "plug", reason });
        }
        let rings: Vec<_> = place.rings.iter().map(|ring| ring.address).collect();
        next.offset += place.len;
        next.page += (rings.len() * RING_PAGES) as u64;
        next.line += rings.len() as u16;
        device
            .set_waker(Waker::from(Arc::new(DeviceWaker { launcher: Arc::clone(&self.launcher), index: next.device })));
        next.device += 1;
        let plugged = Plugged { descriptor: self.devices.1 + place.offset as u64, rings, device };
        self.launcher.post(|inbox| inbox.plugged.push(plugged))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.launcher.stop("its host is gone".into());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the launcher's thread panicked");
        }
    }
}

/// What everyone knows of the launcher's thread.
pub(super) struct Launcher {
    event: EventFd,
    /// The guest's process.
    process: (i32, OwnedFd),
    /// Whether the thread looks at everything again before it sleeps.
    awake: AtomicBool,
    /// Lines raised and not delivered.
    raised: AtomicU32,
    inbox: Mutex<Inbox>,
    /// The guest halted, or is gone.
    halted: Condvar,
}

#[derive(Default)]
pub(super) struct Inbox {
    plugged: Vec<Plugged>,
    polls: BTreeSet<usize>,
    /// The guest has a command in its mailbox, which was put there together with this.
    pub(super) command: bool,
    running_since: Option<Instant>,
    console: String,
    /// Why the guest is gone.
    stopped: Option<String>,
}

/// A device on the bus, and the guest-physical addresses that mean it.
struct Plugged {
    descriptor: u64,
    rings: Vec<u64>,
    device: Box<dyn BusDevice>,
}

impl Launcher {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if !self.awake.swap(true, Ordering::SeqCst) {
            // Fails only when the counter is full: then the thread is about to wake anyway.
            let _ = self.event.write(1);
        }
    }

    /// Leaves something for the thread.
    pub(super) fn post(&self, leave: impl FnOnce(&mut Inbox)) -> Result<(), HypervisorError> {
        let mut inbox = self.inbox();
        if let Some(reason) = &inbox.stopped {
            return Err(HypervisorError::GuestStopped(reason.clone()));
        }
        leave(&mut inbox);
        drop(inbox);
        self.wake();
        Ok(())
    }

    /// Waits until `ready`, which may become so whenever the guest halts; none if `deadline` comes first.
    pub(super) fn wait<T>(
        &self,
        deadline: Option<Instant>,
        mut ready: impl FnMut() -> Option<T>,
    ) -> Result<Option<T>, HypervisorError> {
        let mut inbox = self.inbox();
        loop {
            if let Some(reason) = &inbox.stopped {
                return Err(HypervisorError::GuestStopped(reason.clone()));
            }
            if let Some(value) = ready() {
                return Ok(Some(value));
            }
            if inbox.running_since.is_some_and(|since| since.elapsed() >= RUN_LIMIT) {
                drop(inbox);
                self.stop(format!("it ran for {RUN_LIMIT:?} without a hypercall"));
                inbox = self.inbox();
                continue;
            }
            let left = deadline.map_or(RUN_LIMIT, |deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(None);
            }
            let waited = self.halted.wait_timeout(inbox, left.min(RUN_LIMIT));
            inbox = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn stop(&self, reason: String) {
        self.inbox().stopped.get_or_insert(reason);
        kernel::kill(&self.process.1);
        self.halted.notify_all();
        self.wake();
    }
}

struct DeviceWaker {
    launcher: Arc<Launcher>,
    index: usize,
}

impl Wake for DeviceWaker {
    fn wake(self: Arc<Self>) {
        // Without a guest there is nobody to work for.
        let _ = self.launcher.post(|inbox| inbox.polls.extend([self.index]));
    }
}

struct Lines {
    launcher: Arc<Launcher>,
    lines: Vec<u16>,
}

impl Interrupt for Lines {
    fn raise(&self, cause: Cause) {
        // The bus has lines for queues only: a change of the configuration comes on the first.
        let index = match cause {
            Cause::Queue(index) => index.into(),
            Cause::Config => 0,
        };
        if let Some(line) = self.lines.get(index) {
            self.launcher.raised.fetch_or(1 << line, Ordering::SeqCst);
            self.launcher.wake();
        }
    }
}

/// The thread.
struct Server {
    launcher: Arc<Launcher>,
    kernel: Kernel,
    devices: Vec<Plugged>,
    /// What has to be served, in turns: device, and queue to kick or none to poll.
    due: VecDeque<(usize, Option<u16>)>,
    command: bool,
    reason: String,
}

impl Server {
    fn start(memory: &Pages, ram_end: u64) -> Result<Self, String> {
        let kernel = Kernel::start(memory, ram_end)?;
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let launcher = Launcher {
            event: event.map_err(|error| format!("eventfd was refused: {error}"))?,
            process: kernel.process()?,
            awake: AtomicBool::new(true),
            raised: AtomicU32::new(0),
            inbox: Mutex::default(),
            halted: Condvar::new(),
        };
        Ok(Self {
            launcher: Arc::new(launcher),
            kernel,
            devices: Vec::new(),
            due: VecDeque::new(),
            command: false,
            reason: "its launcher panicked".into(),
        })
    }

    fn serve(mut self) {
        let Err(reason) = self.turns();
        self.reason = reason;
    }

    /// Serves everyone in turns: the inbox, one piece of work for a device, the guest until its next hypercall.
    fn turns(&mut self) -> Result<Infallible, String> {
        loop {
            self.take_inbox()?;
            if let Some((device, queue)) = self.due.pop_front() {
                self.work(device, queue);
            }
            if self.kernel.wants_to_run(&self.launcher.raised, self.command) {
                self.run()?;
            } else if self.due.is_empty() && !self.launcher.awake.swap(false, Ordering::SeqCst) {
                // Nothing came since the last look, and whoever comes now writes to the event.
                self.sleep()?;
            }
        }
    }

    fn take_inbox(&mut self) -> Result<(), String> {
        let mut inbox = self.launcher.inbox();
        inbox.running_since = None;
        self.command |= std::mem::take(&mut inbox.command);
        self.devices.append(&mut inbox.plugged);
        let polls = std::mem::take(&mut inbox.polls);
        let stopped = inbox.stopped.clone();
        drop(inbox);
        polls.into_iter().for_each(|device| self.owe(device, None));
        stopped.map_or(Ok(()), Err)
    }

    fn owe(&mut self, device: usize, queue: Option<u16>) {
        if !self.due.contains(&(device, queue)) {
            self.due.push_back((device, queue));
        }
    }

    fn work(&mut self, index: usize, queue: Option<u16>) {
        let Some(plugged) = self.devices.get_mut(index) else { return };
        let more = match queue {
            Some(queue) => plugged.device.kick(queue),
            None => plugged.device.poll(),
        };
        if more {
            self.owe(index, queue);
        }
    }

    fn run(&mut self) -> Result<(), String> {
        self.launcher.inbox().running_since = Some(Instant::now());
        // A guest that halted looks at its mailbox when it goes on.
        self.command &= !self.kernel.is_halted();
        match self.kernel.run(&self.launcher.raised)? {
            Event::Served => Ok(()),
            Event::Halted => {
                // Under the lock, so that nobody who looked before misses it.
                let inbox = self.launcher.inbox();
                if self.kernel.has_command() && !inbox.command && !self.command {
                    return Err("it does not do what its mailbox says".into());
                }
                self.launcher.halted.notify_all();
                Ok(())
            }
            Event::Notify(address) => self.notify(address),
        }
    }

    /// A NOTIFY, which means what its address does: a descriptor, a ring, or something to print.
    fn notify(&mut self, address: u64) -> Result<(), String> {
        for index in 0..self.devices.len() {
            let plugged = &mut self.devices[index];
            if plugged.descriptor == address {
                plugged.device.write(0, &[]);
                return Ok(());
            }
            if let Some(queue) = plugged.rings.iter().position(|&ring| ring == address) {
                self.work(index, Some(queue as u16));
                return Ok(());
            }
        }
        let string =
            self.kernel.string(address).ok_or_else(|| format!("it sent NOTIFY for {address:#x}, beyond its memory"))?;
        tracing::info!(target: "lguest::early_console", "{string}");
        let console = &mut self.launcher.inbox().console;
        console.push_str(&string);
        let excess = console.len().saturating_sub(CONSOLE_LOG);
        console.drain(..console.ceil_char_boundary(excess));
        Ok(())
    }

    fn sleep(&mut self) -> Result<(), String> {
        let Launcher { event, process, awake, .. } = &*self.launcher;
        let mut fds = [event.as_fd(), process.1.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(format!("its launcher cannot wait: {error}")),
        }
        awake.store(true, Ordering::SeqCst);
        // Empty if the poll was interrupted.
        let _ = event.read();
        if fds[1].any().unwrap_or(true) { Err(self.kernel.reap()) } else { Ok(()) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut inbox = self.launcher.inbox();
        let reason = inbox.stopped.get_or_insert(std::mem::take(&mut self.reason));
        tracing::debug!(reason, "the guest stopped");
        self.launcher.halted.notify_all();
    }
}
