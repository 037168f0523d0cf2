//! The host half: serves devices.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use polyvirt_core::hypervisor::{self, BusDevice, Cause, HypervisorError, Interrupt};
use polyvirt_core::memory::{Access, GuestMemory, MemoryError, ResolveError, Segment};
use polyvirt_transports::xenbus::{HostPlace, Ports, Store};
use vmm_sys_util::eventfd::EventFd;

use super::abi::{Calls, PAGE_SHIFT, PAGE_SIZE};
use super::kernel::{Domain, Listeners};
use super::lock;
use super::store::Client;
use crate::event_loop::{EventLoop, event_fd, waker};

/// What the guest half grants: mapped when it is resolved, unmapped when the last lease is dropped.
#[derive(Clone)]
pub struct Memory {
    calls: Arc<dyn Calls>,
    guest: u16,
}

impl GuestMemory for Memory {
    type Lease = Arc<dyn Any + Send + Sync>;

    /// One piece, however many pages: consecutive references are mapped one after another.
    fn resolve(
        &self,
        address: u64,
        len: u64,
        access: Access,
        mut segments: impl FnMut(Segment<Self::Lease>),
    ) -> Result<(), ResolveError> {
        if len == 0 {
            return Ok(());
        }
        let end = address.checked_add(len - 1).ok_or(MemoryError::Wraps { address, len })?;
        let absent = MemoryError::NotMapped { address, len };
        let (first, last) = (address >> PAGE_SHIFT, end >> PAGE_SHIFT);
        let (Ok(first), Ok(count)) = (u32::try_from(first), u32::try_from(last - first + 1)) else {
            return Err(absent.into());
        };
        let map = |access| self.calls.map(self.guest, first, count, access);
        let pages = map(access).map_err(|_| match access.contains(Access::WRITE) && map(Access::READ).is_ok() {
            true => MemoryError::Forbidden { address, len, access },
            false => absent,
        })?;
        segments(pages.slice(address as usize % PAGE_SIZE, len as usize).ok_or(absent)?);
        Ok(())
    }
}

/// The host half. Its devices go with it, and so do their directories: that is how the guest notices.
pub struct Host {
    domain: Domain,
    id: u16,
    guest: u16,
    devices: Vec<Reserved>,
}

struct Reserved {
    place: HostPlace,
    channels: Arc<Channels>,
    /// Serves the kicks once a device is plugged.
    event_loop: Option<EventLoop>,
}

impl Host {
    /// The host half in domain `id`, which makes `calls`, for devices that domain `guest` drives.
    pub fn new(calls: Arc<dyn Calls>, id: u16, guest: u16) -> Self {
        Self { domain: Domain::new(calls), id, guest, devices: Vec::new() }
    }

    /// xenstore, and the domain that drives the devices.
    pub(super) fn guest(&self) -> (&Client, u16) {
        (&self.domain.store, self.guest)
    }
}

impl hypervisor::Host for Host {
    type Memory = Memory;
    type Place = HostPlace;

    fn memory(&self) -> Memory {
        Memory { calls: self.domain.calls.clone(), guest: self.guest }
    }

    fn place(&mut self, _device_type: u32, queues: u16) -> Result<HostPlace, HypervisorError> {
        let (id, guest, index, store) = (self.id, self.guest, self.devices.len(), self.domain.store.clone());
        let backends = format!("/local/domain/{id}/backend/virtio/{guest}");
        // What is made below inherits it; and the guest may see that something is no longer there.
        store.write(&backends, "")?;
        store.set_permissions(&backends, id, guest)?;
        let backend = format!("{backends}/{index}");
        store.remove(&backend)?;
        let kicks = (0..queues).map(|_| event_fd().map_err(failed)).collect::<Result<_, _>>()?;
        let (calls, listeners) = (self.domain.calls.clone(), self.domain.listeners.clone());
        let channels = Arc::new(Channels { calls, listeners, guest, kicks, ports: Mutex::default() });
        let frontend = format!("/local/domain/{guest}/device/virtio/{index}");
        let place = HostPlace { backend, frontend, store, ports: channels.clone() };
        self.devices.push(Reserved { place: place.clone(), channels, event_loop: None });
        Ok(place)
    }

    /// # Panics
    /// If `place` does not come from [`Host::place`](hypervisor::Host::place) of this host.
    fn interrupt(&self, place: &HostPlace) -> Arc<dyn Interrupt> {
        let found = self.devices.iter().find(|device| device.place.backend == place.backend);
        found.expect("a place of this host").channels.clone()
    }

    fn plug(&mut self, place: HostPlace, device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        let free = |it: &&mut Reserved| it.place.backend == place.backend && it.event_loop.is_none();
        let Some(reserved) = self.devices.iter_mut().find(free) else {
            let reason = format!("expected a place that is reserved and free, got {}", place.backend);
            return Err(HypervisorError::Refused { call: "plug", reason });
        };
        let kicks = reserved.channels.kicks.iter().map(|kick| kick.try_clone().map_err(failed));
        let kicks = kicks.collect::<Result<_, _>>()?;
        let store = &self.domain.store;
        store.remove(&place.frontend)?;
        store.write(&place.frontend, "")?;
        store.set_permissions(&place.frontend, self.guest, self.id)?;
        let event_loop = EventLoop::spawn(place.backend.clone(), Arc::new(device.into()), kicks);
        reserved.event_loop = Some(event_loop.map_err(failed)?);
        store.write(&format!("{}/backend-id", place.frontend), &self.id.to_string())?;
        store.write(&format!("{}/backend", place.frontend), &place.backend)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for Reserved { place, channels, event_loop } in self.devices.drain(..) {
            drop(event_loop);
            (0..=u16::MAX).take(channels.kicks.len()).for_each(|queue| channels.close(queue));
            if let Err(error) = place.store.remove(&place.backend) {
                tracing::warn!(%error, "the guest will not notice that its device is gone");
            }
        }
    }
}

/// The event channels of one device.
struct Channels {
    calls: Arc<dyn Calls>,
    listeners: Listeners,
    guest: u16,
    /// By queue: what the device's event loop waits for.
    kicks: Vec<EventFd>,
    /// The port on this side, by queue.
    ports: Mutex<BTreeMap<u16, u32>>,
}

impl Ports for Channels {
    fn bind(&self, queue: u16, port: u32) -> Result<(), HypervisorError> {
        let kick = self.kicks.get(usize::from(queue)).ok_or(HypervisorError::Exhausted("queues"))?;
        let listener = waker(kick.try_clone().map_err(failed)?);
        self.close(queue);
        let port = self.calls.bind_interdomain(self.guest, port)?;
        lock(&self.ports).insert(queue, port);
        lock(&self.listeners).insert(port, listener.clone());
        // For what came before anyone listened.
        listener.wake();
        Ok(())
    }

    fn close(&self, queue: u16) {
        let Some(port) = lock(&self.ports).remove(&queue) else { return };
        lock(&self.listeners).remove(&port);
        if let Err(error) = self.calls.close(port) {
            tracing::warn!(%error, port, "an event channel stays open");
        }
    }
}

impl Interrupt for Channels {
    fn raise(&self, cause: Cause) {
        let Cause::Queue(queue) = cause else { return };
        let port = lock(&self.ports).get(&queue).copied();
        if let Some(Err(error)) = port.map(|port| self.calls.send(port)) {
            tracing::warn!(%error, queue, "an interrupt is lost");
        }
    }
}

fn failed(error: std::io::Error) -> HypervisorError {
    HypervisorError::Refused { call: "eventfd", reason: error.to_string() }
}
