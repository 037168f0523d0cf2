//! The host's side: requests in, accesses of the bus out.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use polyvirt_core::hypervisor::{BusDevice, HypervisorError};
use polyvirt_core::memory::{Access, GuestMemory};
use polyvirt_transports::pci::registers::{BAR_64, BAR_COUNT, BAR_IO, BARS};
use polyvirt_transports::pci::{self, Doorbell, Message, Platform, Root, SharedDevice, Space, Wires};

use super::abi::{Calls, Kind, PCI, Range, Request};
use crate::event_loop::{EventLoop, lock};

/// The most accesses that one request may ask for; Xen splits strings at pages.
const COUNT_MAX: u32 = 4096;

/// What the bus stands on: the device model of one domain.
pub struct Host<C: Calls> {
    calls: Arc<C>,
    /// Answers requests.
    dispatcher: Option<JoinHandle<()>>,
    /// Serve the devices' wakers.
    event_loops: Vec<EventLoop>,
    /// Where the next base address register may be placed.
    free: u64,
}

/// The bus of the domain that `calls` are about.
pub(super) fn start<C: Calls>(calls: Arc<C>) -> pci::Host<Host<C>> {
    let host = Host { calls, dispatcher: None, event_loops: Vec::new(), free: PCI.memory.start };
    pci::Host::new(host, PCI)
}

impl<C: Calls> Platform for Host<C> {
    type Memory = C::Memory;

    fn forward_to(&mut self, root: Arc<Root>) {
        let calls = Arc::clone(&self.calls);
        let dispatch = move || {
            while let Some((processor, request)) = calls.next() {
                let data = carry_out(&*calls, &root, &request);
                tracing::trace!(?request, data, "request");
                if let Err(error) = calls.answer(processor, data) {
                    tracing::error!(%error, processor, "a processor waits for ever");
                }
            }
        };
        match Builder::new().name("ioreq server".into()).spawn(dispatch) {
            Ok(thread) => self.dispatcher = Some(thread),
            Err(error) => tracing::error!(%error, "no request will be answered"),
        }
    }

    fn memory(&self) -> C::Memory {
        self.calls.memory()
    }

    fn wires(&mut self, function: u8, _queues: u16, vectors: u16) -> Result<Arc<dyn Wires>, HypervisorError> {
        self.calls.claim(Range::Function(function))?;
        let messages = Mutex::new(vec![Message::default(); vectors.into()]);
        Ok(Arc::new(Function { calls: Arc::clone(&self.calls), messages }))
    }

    fn serve(&mut self, function: u8, device: SharedDevice) -> Result<(), HypervisorError> {
        self.free = place(&mut **lock(&device), self.free)?;
        // Kicks are writes like others: only the waker is left to serve.
        let spawned = EventLoop::spawn(format!("xen function {function:#x}"), device, Vec::new());
        let failed =
            |error| HypervisorError::Refused { call: "spawn", reason: format!("the device's event loop: {error}") };
        self.event_loops.push(spawned.map_err(failed)?);
        Ok(())
    }
}

impl<C: Calls> Drop for Host<C> {
    fn drop(&mut self) {
        self.calls.stop();
        let ended = self.dispatcher.take().map_or(Ok(()), JoinHandle::join);
        if ended.is_err() {
            tracing::error!("a device panicked while it was accessed");
        }
    }
}

/// The wires of one function.
struct Function<C> {
    calls: Arc<C>,
    /// By vector.
    messages: Mutex<Vec<Message>>,
}

impl<C: Calls> Wires for Function<C> {
    fn route(&self, vector: u16, message: Message) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(routed) = messages.get_mut(usize::from(vector)) {
            *routed = message;
        }
    }

    fn signal(&self, vector: u16) {
        let messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(&message) = messages.get(usize::from(vector)) else { return };
        drop(messages);
        if let Err(error) = self.calls.inject_msi(message) {
            tracing::error!(%error, vector, "an interrupt is lost");
        }
    }

    fn pin(&self, asserted: bool) {
        tracing::debug!(asserted, "an interrupt pin that leads nowhere: only MSI-X does");
    }

    // Every write comes as a request, and so does a kick.
    fn ring_at(&self, _doorbells: &[Doorbell]) {}
}

/// Does what `request` asks for, and returns what was read last.
fn carry_out<C: Calls>(calls: &C, root: &Root, request: &Request) -> u64 {
    if request.kind == Kind::Invalidate {
        if let Err(error) = calls.invalidate() {
            tracing::error!(%error, "memory that the domain gave back stays mapped");
        }
        return 0;
    }
    let mut bytes = request.data.to_le_bytes();
    let width = (request.size as usize).min(bytes.len());
    for turn in 0..u64::from(request.count.min(COUNT_MAX)) {
        let along = |from: u64| {
            let distance = turn * width as u64;
            if request.downwards { from.wrapping_sub(distance) } else { from.wrapping_add(distance) }
        };
        let data = &mut bytes[..width];
        let at = if request.kind == Kind::Port { request.address } else { along(request.address) };
        if request.read {
            // What nobody answers.
            data.fill(0xff);
            access(root, request.kind, at, true, data);
        }
        if request.indirect && !copy(&calls.memory(), along(request.data), request.read, data) {
            tracing::debug!(?request, "data where the domain has no memory");
        }
        if !request.read {
            access(root, request.kind, at, false, data);
        }
    }
    bytes[width..].fill(0);
    u64::from_le_bytes(bytes)
}

/// One access of the guest's.
fn access(root: &Root, kind: Kind, at: u64, read: bool, data: &mut [u8]) {
    let space = match kind {
        Kind::Port => Space::Io,
        Kind::Memory => Space::Memory,
        Kind::Config => {
            // Of bus 0, which is all that was claimed.
            let (function, offset) = ((at >> 32) as u8, at & 0xffff_ffff);
            return if read {
                root.read_config(function, offset, data)
            } else {
                root.write_config(function, offset, data)
            };
        }
        Kind::Invalidate | Kind::Other(_) => return tracing::debug!(?kind, at, "nothing to do"),
    };
    let answered = if read { root.read(space, at, data) } else { root.write(space, at, data) };
    if !answered {
        tracing::debug!(?space, at, read, "nobody is there");
    }
}

/// Copies `data` to the guest's memory, or from there. False if there is none.
fn copy<M: GuestMemory>(memory: &M, address: u64, to_guest: bool, data: &mut [u8]) -> bool {
    let way = if to_guest { Access::WRITE } else { Access::READ };
    let (mut done, mut whole) = (0, true);
    let resolved = memory.resolve(address, data.len() as u64, way, |segment| {
        let here = &mut data[done..done + segment.len()];
        let copied = if to_guest { segment.write(0, here) } else { segment.read(0, here) };
        whole &= copied.is_ok();
        done += segment.len();
    });
    whole && resolved.is_ok()
}

/// Places what is behind the base address registers of `function` from `free` on, as firmware does; returns where the next
/// may be.
fn place(function: &mut dyn BusDevice, mut free: u64) -> Result<u64, HypervisorError> {
    let mut bar = 0;
    while bar < BAR_COUNT {
        let at = u64::from(BARS) + 4 * u64::from(bar);
        bar += 1;
        function.write(at, &[0xff; 4]);
        let mut word = [0; 4];
        function.read(at, &mut word);
        let flags = u32::from_le_bytes(word);
        let (high, mask) = (flags & BAR_64 != 0, flags & !0xf);
        if mask == 0 || flags & BAR_IO != 0 {
            // None, or ports, of which there are none: at 0 it is not placed.
            function.write(at, &[0; 4]);
            continue;
        }
        let len = u64::from(mask.wrapping_neg());
        let base = free.next_multiple_of(len);
        free = base + len;
        if free > PCI.memory.end {
            return Err(HypervisorError::Exhausted("memory for the registers of PCI functions"));
        }
        function.write(at, &(base as u32).to_le_bytes());
        if high {
            function.write(at + 4, &[0; 4]);
            bar += 1;
        }
    }
    Ok(free)
}
