//! The launcher's thread: the guest and the devices take turns on it.
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
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::Pages;

use super::host::{Doorbell, Plugged};
use super::kernel::{self, Event, Kernel};
use super::unavailable;

/// How long a guest may run without a hypercall.
const RUN_LIMIT: Duration = Duration::from_secs(5);
/// What is kept of the early console, bytes: its end.
const CONSOLE_LOG: usize = 64 * 1024;

/// The thread. Dropping this ends the guest, and it after the call that it is in.
pub(super) struct Thread {
    pub(super) launcher: Arc<Launcher>,
    thread: Option<JoinHandle<()>>,
}

impl Thread {
    /// Starts the guest in `memory`; its RAM ends at `ram_end`.
    pub(super) fn spawn(memory: &Pages, ram_end: u64) -> Result<Self, HypervisorError> {
        let (sender, launched) = mpsc::channel();
        let memory = memory.clone();
        let thread = Builder::new().name("lguest".into()).spawn(move || {
            // The thread that forks is the one that traces, and with which the guest dies.
            let _ = match Server::start(&memory, ram_end) {
                Ok(server) => sender.send(Ok(Arc::clone(&server.launcher))).map(|()| server.serve()),
                Err(reason) => sender.send(Err(reason)),
            };
        });
        let thread = thread.map_err(|error| unavailable(format!("no thread can be started: {error}")))?;
        let launched = launched.recv().unwrap_or_else(|_| Err("its launcher panicked".into()));
        Ok(Self { launcher: launched.map_err(unavailable)?, thread: Some(thread) })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.launcher.stop("its host is gone".into());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the launcher's thread panicked");
        }
    }
}

/// What everyone knows of the thread.
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
    /// It carried out its last command, and halted.
    pub(super) completed: bool,
    running_since: Option<Instant>,
    console: String,
    /// Why the guest is gone.
    stopped: Option<String>,
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

    pub(super) fn early_console(&self) -> String {
        self.inbox().console.clone()
    }

    pub(super) const fn process_id(&self) -> i32 {
        self.process.0
    }

    /// Raises `lines`, a bit each.
    pub(super) fn interrupt(&self, lines: u32) {
        self.raised.fetch_or(lines, Ordering::SeqCst);
        self.wake();
    }

    /// Has `plugged` served, as the next device.
    pub(super) fn plug(&self, plugged: Plugged) -> Result<(), HypervisorError> {
        self.post(|inbox| inbox.plugged.push(plugged))
    }

    /// The waker of the device that was or will be plugged in as number `index`, from 0.
    pub(super) fn waker(self: &Arc<Self>, index: usize) -> Waker {
        Waker::from(Arc::new(DeviceWaker { launcher: Arc::clone(self), index }))
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
        mut ready: impl FnMut(&Inbox) -> Option<T>,
    ) -> Result<Option<T>, HypervisorError> {
        let mut inbox = self.inbox();
        loop {
            if let Some(reason) = &inbox.stopped {
                return Err(HypervisorError::GuestStopped(reason.clone()));
            }
            if let Some(value) = ready(&inbox) {
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
                let mut inbox = self.launcher.inbox();
                inbox.completed = !self.kernel.has_command();
                if inbox.completed {
                    // It may have seen its command without being told to look.
                    (inbox.command, self.command) = (false, false);
                } else if !inbox.command && !self.command {
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
        // The device that is meant may have been plugged in while the guest was running.
        self.take_inbox()?;
        let rung = |(index, plugged): (usize, &Plugged)| Some((index, plugged.doorbell(address)?));
        match self.devices.iter().enumerate().find_map(rung) {
            Some((index, Doorbell::Descriptor)) => self.devices[index].device.write(0, &[]),
            Some((index, Doorbell::Queue(queue))) => self.work(index, Some(queue)),
            None => self.print(address)?,
        }
        Ok(())
    }

    fn print(&self, address: u64) -> Result<(), String> {
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
