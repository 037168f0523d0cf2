//! Event channels (the 2-level ABI): what the hypervisor does, and what a domain's kernel does when it is called up.
//!
//! Pending and mask bits are in the domain's shared info page, of which these fields are used (`xen.h`, x86-64):
//! in the first vCPU's entry u8 `evtchn_upcall_pending` at 0 and u64 `evtchn_pending_sel` at 8; then 64 words of
//! `evtchn_pending` at 2048 and 64 of `evtchn_mask` at 2560.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use polyvirt_core::hypervisor::HypervisorError;

use super::super::lock;
use super::memory::Ram;
use super::{Body, Hypervisor, refused};

/// The first word of the vCPU's entry, with the byte `evtchn_upcall_pending` in it.
const UPCALL_PENDING: usize = 0;
const PENDING_SEL: usize = 8;
pub(super) const PENDING: usize = 2048;
pub(super) const MASK: usize = 2560;
/// Ports of a domain.
pub(super) const PORTS: usize = 4096;

/// The ports of each domain.
#[derive(Default)]
pub(super) struct Channels(BTreeMap<u16, Vec<Channel>>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Channel {
    Closed,
    Unbound { remote: u16 },
    Interdomain { remote: u16, port: u32 },
}

impl Channels {
    /// The lowest closed port, which becomes `channel`; port 0 is never used.
    fn open(&mut self, domain: u16, channel: Channel, call: &'static str) -> Result<u32, HypervisorError> {
        let ports = self.0.entry(domain).or_insert_with(|| vec![Channel::Closed]);
        let port = ports.iter().skip(1).position(|&port| port == Channel::Closed).map_or(ports.len(), |at| at + 1);
        if port == PORTS {
            return Err(refused(call, "ENOSPC (-28)"));
        }
        if port == ports.len() {
            ports.push(Channel::Closed);
        }
        ports[port] = channel;
        Ok(port as u32)
    }

    fn get(&mut self, domain: u16, port: u32) -> Option<&mut Channel> {
        let channel = self.0.get_mut(&domain)?.get_mut(port as usize)?;
        (*channel != Channel::Closed).then_some(channel)
    }
}

impl Hypervisor {
    pub(super) fn domain(&self, id: u16) -> Option<Arc<Body>> {
        self.domains.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// EVTCHNOP_alloc_unbound.
    pub(super) fn alloc_unbound(&self, by: u16, remote: u16) -> Result<u32, HypervisorError> {
        lock(&self.channels).open(by, Channel::Unbound { remote }, "EVTCHNOP_alloc_unbound")
    }

    /// EVTCHNOP_bind_interdomain.
    pub(super) fn bind_interdomain(&self, by: u16, remote: u16, port: u32) -> Result<u32, HypervisorError> {
        const CALL: &str = "EVTCHNOP_bind_interdomain";
        let (mut channels, here) = (lock(&self.channels), self.domain(by));
        let (Some(_), Some(here)) = (self.domain(remote), here) else { return Err(refused(CALL, "ESRCH (-3)")) };
        if channels.get(remote, port).copied() != Some(Channel::Unbound { remote: by }) {
            return Err(refused(CALL, "EINVAL (-22)"));
        }
        let local = channels.open(by, Channel::Interdomain { remote, port }, CALL)?;
        if let Some(channel) = channels.get(remote, port) {
            *channel = Channel::Interdomain { remote: by, port: local };
        }
        drop(channels);
        // The other side may have sent before it was bound.
        here.upcall.set_pending(local);
        Ok(local)
    }

    /// EVTCHNOP_send. An event on an unbound port goes nowhere.
    pub(super) fn send(&self, by: u16, port: u32) -> Result<(), HypervisorError> {
        let channel = lock(&self.channels).get(by, port).copied();
        match channel {
            Some(Channel::Interdomain { remote, port }) => {
                if let Some(remote) = self.domain(remote) {
                    remote.upcall.set_pending(port);
                }
                Ok(())
            }
            Some(_) => Ok(()),
            None => Err(refused("EVTCHNOP_send", "EINVAL (-22)")),
        }
    }

    /// EVTCHNOP_unmask.
    pub(super) fn unmask(&self, by: u16, port: u32) -> Result<(), HypervisorError> {
        if lock(&self.channels).get(by, port).is_some()
            && let Some(body) = self.domain(by)
        {
            body.upcall.unmask(port);
            return Ok(());
        }
        Err(refused("EVTCHNOP_unmask", "EINVAL (-22)"))
    }

    /// EVTCHNOP_close. The other end is unbound again.
    pub(super) fn close(&self, by: u16, port: u32) -> Result<(), HypervisorError> {
        let mut channels = lock(&self.channels);
        let Some(channel) = channels.get(by, port) else { return Err(refused("EVTCHNOP_close", "EINVAL (-22)")) };
        let closed = std::mem::replace(channel, Channel::Closed);
        if let Channel::Interdomain { remote, port } = closed
            && let Some(channel) = channels.get(remote, port)
        {
            *channel = Channel::Unbound { remote: by };
        }
        if let Some(body) = self.domain(by) {
            body.upcall.clear(port);
        }
        Ok(())
    }

    /// The domain is gone: its ports are closed.
    pub(super) fn destroy(&self, id: u16) {
        let count = lock(&self.channels).0.get(&id).map_or(0, Vec::len);
        for port in 1..count as u32 {
            let _ = self.close(id, port);
        }
        lock(&self.channels).0.remove(&id);
        self.domains.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }
}

/// A domain's bits, and its kernel's handler, which runs on the thread of whoever sends.
pub(super) struct Upcall {
    ram: Arc<Ram>,
    state: Mutex<Inbox>,
    arrived: Condvar,
}

#[derive(Default)]
struct Inbox {
    /// Ports with an event; they are masked.
    events: VecDeque<u32>,
    /// The port of the xenstore ring, and how many events came on it.
    store: Option<u32>,
    store_events: u64,
    stopped: bool,
}

impl Upcall {
    pub(super) fn new(ram: Arc<Ram>) -> Self {
        Self { ram, state: Mutex::default(), arrived: Condvar::new() }
    }

    fn word_and_bit(port: u32) -> (usize, u64) {
        (port as usize / 64 * 8, 1 << (port % 64))
    }

    /// The hypervisor: an event on `port`.
    fn set_pending(&self, port: u32) {
        let (word, bit) = Self::word_and_bit(port);
        if self.ram.u64(PENDING + word).fetch_or(bit, SeqCst) & bit == 0 {
            self.mark(port);
        }
    }

    /// The hypervisor: `port` is pending; the domain is called up unless it is masked.
    fn mark(&self, port: u32) {
        let (word, bit) = Self::word_and_bit(port);
        if self.ram.u64(MASK + word).load(SeqCst) & bit == 0 {
            self.ram.u64(PENDING_SEL).fetch_or(1 << (port / 64), SeqCst);
            if self.ram.u16(UPCALL_PENDING).fetch_or(1, SeqCst) == 0 {
                self.handle();
            }
        }
    }

    /// The hypervisor: unmasks `port`.
    fn unmask(&self, port: u32) {
        let (word, bit) = Self::word_and_bit(port);
        self.ram.u64(MASK + word).fetch_and(!bit, SeqCst);
        if self.ram.u64(PENDING + word).load(SeqCst) & bit != 0 {
            self.mark(port);
        }
    }

    /// The hypervisor: a port that is closed has no bits.
    fn clear(&self, port: u32) {
        let (word, bit) = Self::word_and_bit(port);
        self.ram.u64(PENDING + word).fetch_and(!bit, SeqCst);
        self.ram.u64(MASK + word).fetch_and(!bit, SeqCst);
    }

    /// The domain: takes what is pending and not masked, and masks it.
    fn handle(&self) {
        while self.ram.u16(UPCALL_PENDING).swap(0, SeqCst) != 0 {
            let mut words = self.ram.u64(PENDING_SEL).swap(0, SeqCst);
            while words != 0 {
                let word = words.trailing_zeros() as usize;
                words &= words - 1;
                self.take(word);
            }
        }
    }

    fn take(&self, word: usize) {
        let (pending, mask) = (self.ram.u64(PENDING + word * 8), self.ram.u64(MASK + word * 8));
        // Locked before looking: two threads never take the same event.
        let mut inbox = lock(&self.state);
        let mut bits = pending.load(SeqCst) & !mask.load(SeqCst);
        while bits != 0 {
            let (port, bit) = ((word * 64) as u32 + bits.trailing_zeros(), bits & bits.wrapping_neg());
            bits &= bits - 1;
            if inbox.store == Some(port) {
                pending.fetch_and(!bit, SeqCst);
                inbox.store_events += 1;
                continue;
            }
            mask.fetch_or(bit, SeqCst);
            if pending.fetch_and(!bit, SeqCst) & bit != 0 {
                inbox.events.push_back(port);
            } else {
                // Closed in between.
                mask.fetch_and(!bit, SeqCst);
            }
        }
        self.arrived.notify_all();
    }

    /// The domain: the next event that is not xenstore's.
    pub(super) fn next(&self) -> Option<u32> {
        let waits = |inbox: &mut Inbox| inbox.events.is_empty() && !inbox.stopped;
        let inbox = self.arrived.wait_while(lock(&self.state), waits);
        let mut inbox = inbox.unwrap_or_else(PoisonError::into_inner);
        inbox.events.pop_front().filter(|_| !inbox.stopped)
    }

    /// The domain: from now on events on `port` are xenstore's.
    pub(super) fn set_store(&self, port: u32) {
        lock(&self.state).store = Some(port);
    }

    /// The domain: how many events xenstore had.
    pub(super) fn store_events(&self) -> u64 {
        lock(&self.state).store_events
    }

    /// The domain: waits until xenstore had another number of events than `seen`. False once it is stopped.
    pub(super) fn wait_for_store(&self, seen: u64) -> bool {
        let waits = |inbox: &mut Inbox| inbox.store_events == seen && !inbox.stopped;
        let inbox = self.arrived.wait_while(lock(&self.state), waits);
        !inbox.unwrap_or_else(PoisonError::into_inner).stopped
    }

    /// The domain: nobody waits any more.
    pub(super) fn stop(&self) {
        lock(&self.state).stopped = true;
        self.arrived.notify_all();
    }
}
