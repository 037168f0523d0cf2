//! What the kernel of a domain is to both halves: it hands what comes from outside to whoever waits for it.
//!
//! Above the seam as well: over the model and over the real thing it is the same.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Wake, Waker};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use polyvirt_core::hypervisor::HypervisorError;

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

/// What the guest half can wait for, a bit each.
#[derive(Default)]
pub(super) struct Lines {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    used: u64,
    pending: u64,
}

impl Lines {
    /// As [`Guest::wait`](polyvirt_core::hypervisor::Guest::wait).
    pub(super) fn wait(&self, lines: u64, watchdog: Duration) -> u64 {
        let state = lock(&self.state);
        let waited = self.arrived.wait_timeout_while(state, watchdog, |state| state.pending & lines == 0);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let came = state.pending & lines;
        state.pending &= !came;
        came
    }

    /// A bit that is free.
    pub(super) fn take(&self) -> Result<u32, HypervisorError> {
        let mut state = lock(&self.state);
        let line = state.used.trailing_ones();
        state.used |= 1u64.checked_shl(line).ok_or(HypervisorError::Exhausted("interrupt lines"))?;
        Ok(line)
    }

    pub(super) fn give_back(&self, line: u32) {
        let mut state = lock(&self.state);
        state.used &= !(1 << line);
        state.pending &= !(1 << line);
    }

    /// Makes the bit pending.
    pub(super) fn waker(self: &Arc<Self>, line: u32) -> Waker {
        Waker::from(Arc::new(Line(self.clone(), 1 << line)))
    }
}

/// Makes its bit pending.
struct Line(Arc<Lines>, u64);

impl Wake for Line {
    fn wake(self: Arc<Self>) {
        lock(&self.0.state).pending |= self.1;
        self.0.arrived.notify_all();
    }
}
