//! A thread that serves one device's kicks: file descriptors in, [`BusDevice`] calls out.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::thread::{Builder, JoinHandle};

use polyvirt_core::hypervisor::BusDevice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A device that vCPUs and the event loop call in turns.
pub(crate) type SharedDevice = Arc<Mutex<Box<dyn BusDevice>>>;

/// Locks `device`. One that panicked is called all the same: it is the driver that has to notice.
pub(crate) fn lock(device: &SharedDevice) -> MutexGuard<'_, Box<dyn BusDevice>> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A new eventfd as the event loop wants it: reading an empty one does not block.
pub(crate) fn event_fd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// The thread; dropping this ends it, after the call that it is in.
pub(crate) struct EventLoop {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Serves `device`: an event on `kicks[n]` is a kick of queue `n`. Sets the device's waker.
    pub(crate) fn spawn(name: String, device: SharedDevice, kicks: Vec<EventFd>) -> io::Result<Self> {
        let stop = event_fd()?;
        let news = event_fd()?;
        let epoll = Epoll::new()?;
        // The token of a kick is its queue; the waker and the stop come after the queues.
        for (token, fd) in kicks.iter().chain([&news, &stop]).enumerate() {
            let event = EpollEvent::new(EventSet::IN, token as u64);
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)?;
        }
        lock(&device).set_waker(waker(news.try_clone()?));
        let thread = Builder::new().name(name).spawn(move || serve(&epoll, &device, &kicks, &news))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        let stopped = self.stop.write(1).map_err(|error| error.to_string()).and_then(|()| match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| "the device panicked".into()),
            None => Ok(()),
        });
        if let Err(reason) = stopped {
            tracing::error!(reason, "an event loop did not end as it should");
        }
    }
}

/// Wakes by an event on `fd`.
pub(crate) fn waker(fd: EventFd) -> Waker {
    Waker::from(Arc::new(WakeBy(fd)))
}

struct WakeBy(EventFd);

impl Wake for WakeBy {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Fails only when the counter is full: then the loop is about to wake anyway.
        let _ = self.0.write(1);
    }
}

fn serve(epoll: &Epoll, device: &SharedDevice, kicks: &[EventFd], news: &EventFd) {
    let poll = kicks.len();
    let stop = poll + 1;
    let mut due = vec![false; stop];
    let mut events = [EpollEvent::default(); 16];
    loop {
        // What has more to do takes its next turn after everyone else had theirs.
        let timeout = if due.contains(&true) { 0 } else { -1 };
        let count = match epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return tracing::error!(%error, "epoll_wait failed: the device is no longer served"),
        };
        for event in &events[..count] {
            let token = event.data() as usize;
            if token == stop {
                return;
            }
            // The count is of no interest: before the work, so that a kick during it is seen afterwards.
            let _ = kicks.get(token).unwrap_or(news).read();
            due[token] = true;
        }
        for (token, due) in due.iter_mut().enumerate().filter(|(_, due)| **due) {
            // Locked for one call only, so that register accesses get in between.
            let mut device = lock(device);
            *due = if token == poll { device.poll() } else { device.kick(token as u16) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    const WATCHDOG: Duration = Duration::from_secs(20);

    #[derive(Debug, PartialEq)]
    enum Call {
        Kick(u16),
        Poll,
    }

    struct Toy {
        calls: Sender<Call>,
        waker: Sender<Waker>,
        /// How often queue 0 has more to do.
        more: usize,
    }

    impl BusDevice for Toy {
        fn read(&mut self, _: u64, _: &mut [u8]) {}
        fn write(&mut self, _: u64, _: &[u8]) {}
        fn kick(&mut self, queue: u16) -> bool {
            self.calls.send(Call::Kick(queue)).unwrap();
            let more = queue == 0 && self.more > 0;
            self.more -= usize::from(more);
            more
        }
        fn poll(&mut self) -> bool {
            self.calls.send(Call::Poll).unwrap();
            false
        }
        fn set_waker(&mut self, waker: Waker) {
            self.waker.send(waker).unwrap();
        }
    }

    fn toy(more: usize, kicks: &[EventFd]) -> (EventLoop, Receiver<Call>, Waker) {
        let ((calls, called), (waker, woken)) = (channel(), channel());
        let device: SharedDevice = Arc::new(Mutex::new(Box::new(Toy { calls, waker, more })));
        let kicks = kicks.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let event_loop = EventLoop::spawn("toy".into(), device, kicks).unwrap();
        (event_loop, called, woken.recv_timeout(WATCHDOG).unwrap())
    }

    #[test]
    fn kicks_and_the_waker_reach_the_device() {
        let kicks = [event_fd().unwrap(), event_fd().unwrap()];
        let (_loop, called, waker) = toy(0, &kicks);
        kicks[1].write(1).unwrap();
        assert_eq!(called.recv_timeout(WATCHDOG), Ok(Call::Kick(1)));
        waker.wake();
        assert_eq!(called.recv_timeout(WATCHDOG), Ok(Call::Poll));
        kicks[0].write(1).unwrap();
        assert_eq!(called.recv_timeout(WATCHDOG), Ok(Call::Kick(0)));
    }

    #[test]
    fn a_queue_with_ever_more_to_do_starves_neither_the_others_nor_the_end() {
        let kicks = [event_fd().unwrap(), event_fd().unwrap()];
        let (event_loop, called, _waker) = toy(usize::MAX, &kicks);
        kicks[0].write(1).unwrap();
        assert_eq!(called.recv_timeout(WATCHDOG), Ok(Call::Kick(0)));
        kicks[1].write(1).unwrap();
        while called.recv_timeout(WATCHDOG).unwrap() != Call::Kick(1) {}
        assert_eq!(called.recv_timeout(WATCHDOG), Ok(Call::Kick(0)));
        drop(event_loop);
    }

    #[test]
    fn dropping_the_loop_ends_it_and_lets_go_of_the_device() {
        let (event_loop, called, waker) = toy(0, &[]);
        drop(event_loop);
        waker.wake();
        assert!(called.recv().is_err(), "the device, and the sender in it, are gone");
    }
}
