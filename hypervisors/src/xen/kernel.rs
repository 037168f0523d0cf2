//! What the kernel of a domain is to both halves: it hands what comes from outside to whoever waits for it.
//!
//! Above the seam as well: over the model and over the real thing it is the same.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Wake, Waker};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use super::abi::Calls;
use super::lock;
use super::store::Client;

/// Who waits for events, by port.
pub(super) type Listeners = Arc<Mutex<BTreeMap<u32, Waker>>>;

/// A domain: hands events and messages that come in to whoever waits for them.
pub(super) struct Domain {
    pub(super) calls: Arc<dyn Calls>,
    pub(super) store: Arc<Client>,
    pub(super) listeners: Listeners,
    threads: Vec<JoinHandle<()>>,
}

impl Domain {
    pub(super) fn new(calls: Arc<dyn Calls>) -> Self {
        let listeners = Listeners::default();
        let (store, receive) = Client::new(&calls);
        let (events, all) = (calls.clone(), listeners.clone());
        let dispatch = move || {
            while let Some(port) = events.next_event() {
                let listener = lock(&all).get(&port).cloned();
                listener.inspect(Waker::wake_by_ref);
                // Fails only for a port that was closed meanwhile.
                let _ = events.unmask(port);
            }
        };
        Self { calls, store, listeners, threads: vec![spawn(receive), spawn(dispatch)] }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        self.calls.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What the guest half can wait for, by number.
#[derive(Default)]
pub(super) struct Lines {
    /// Whether it is pending, for each line that is open.
    open: Mutex<BTreeMap<u32, bool>>,
    arrived: Condvar,
}

impl Lines {
    /// As [`WaitForInterrupt::wait`](polyvirt_core::hypervisor::WaitForInterrupt::wait).
    pub(super) fn wait(&self, lines: &[u32], most: Duration) -> bool {
        let nothing = |open: &mut BTreeMap<u32, bool>| !lines.iter().any(|line| open.get(line) == Some(&true));
        let waited = self.arrived.wait_timeout_while(lock(&self.open), most, nothing);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Whether the line was pending, which it is not any more.
    pub(super) fn take_pending(&self, line: u32) -> bool {
        lock(&self.open).get_mut(&line).is_some_and(std::mem::take)
    }

    /// The lowest line that is free.
    pub(super) fn open(&self) -> u32 {
        let mut open = lock(&self.open);
        let line = open.keys().zip(0..).find(|&(&used, free)| used != free).map_or(open.len() as u32, |(_, free)| free);
        open.insert(line, false);
        line
    }

    pub(super) fn close(&self, line: u32) {
        lock(&self.open).remove(&line);
    }

    /// Makes the line pending.
    pub(super) fn waker(self: &Arc<Self>, line: u32) -> Waker {
        Waker::from(Arc::new(Line(self.clone(), line)))
    }
}

/// Makes its line pending.
struct Line(Arc<Lines>, u32);

impl Wake for Line {
    fn wake(self: Arc<Self>) {
        if let Some(pending) = lock(&self.0.open).get_mut(&self.1) {
            *pending = true;
        }
        self.0.arrived.notify_all();
    }
}
