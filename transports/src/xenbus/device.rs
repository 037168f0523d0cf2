//! The host's side: the frontend's nodes decoded into the device state machine.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::Waker;
use std::sync::{Mutex, PoisonError};

use polyvirt_core::hypervisor::{BusDevice, Cause, Host, HypervisorError, Interrupt};
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::state::{Area, Interface, VirtioDevice};
use polyvirt_core::{Features, Status, device};

use super::registers::{HostPlace, Request, State, decode_features, encode_config, encode_features};

/// Puts `device` onto the bus of `host`. `memory` is [`Host::memory`], perhaps wrapped. The handle closes the connection
/// from this side.
pub fn attach<H, M>(host: &mut H, memory: M, device: Box<dyn device::Device<M>>) -> Result<Backend, HypervisorError>
where
    H: Host<Place = HostPlace>,
    M: GuestMemory + Send + 'static,
{
    let queues = device.queue_max_sizes().len();
    let queues = u16::try_from(queues).map_err(|_| HypervisorError::Exhausted("queue indices"))?;
    let place = host.place(device.device_type(), queues)?;
    let interrupt = host.interrupt(&place);
    let device = Device::new(device, memory, interrupt, place.clone())?;
    let backend = device.backend();
    host.plug(place, Box::new(device))?;
    Ok(backend)
}

/// A handle to a plugged device's side of the connection.
#[derive(Clone)]
pub struct Backend {
    close: Arc<AtomicBool>,
    waker: Arc<Mutex<Waker>>,
}

impl Backend {
    /// Closes the connection, as a backend does that is restarted: what was in flight is dropped, and the frontend may
    /// come back when it has noticed.
    pub fn close(&self) {
        self.close.store(true, Ordering::SeqCst);
        self.waker.lock().unwrap_or_else(PoisonError::into_inner).wake_by_ref();
    }
}

/// A device behind xenstore nodes. It is driven by [`BusDevice::poll`], whenever a node of the frontend changed.
pub struct Device<M: GuestMemory> {
    state: VirtioDevice<M>,
    place: HostPlace,
    config_changed: Arc<Bell>,
    backend: Backend,
    connection: State,
    /// The number of the request that was carried out last.
    handled: u32,
    /// What the nodes say.
    shown: Shown,
}

#[derive(Clone, Default, PartialEq, Eq)]
struct Shown {
    status: Status,
    generation: u32,
    config: Box<[u8]>,
}

impl<M: GuestMemory> Device<M> {
    fn new(
        device: Box<dyn device::Device<M>>,
        memory: M,
        interrupt: Arc<dyn Interrupt>,
        place: HostPlace,
    ) -> Result<Self, HypervisorError> {
        let config_changed = Arc::new(Bell { changed: AtomicBool::new(false), queues: interrupt });
        let state = VirtioDevice::new(device, memory, config_changed.clone(), Interface::Modern)
            .with_features(Features::RING_RESET | Features::RING_PACKED);
        let waker = Arc::new(Mutex::new(Waker::noop().clone()));
        let backend = Backend { close: Arc::default(), waker };
        let (connection, handled, shown) = (State::Initialising, 0, Shown::default());
        let mut device = Self { state, place, config_changed, backend, connection, handled, shown };
        device.publish()?;
        Ok(device)
    }

    fn backend(&self) -> Backend {
        self.backend.clone()
    }

    fn write(&self, node: &str, value: impl ToString) -> Result<(), HypervisorError> {
        self.place.store.write(&format!("{}/{node}", self.place.backend), &value.to_string())
    }

    /// A node of the frontend, which may hold anything.
    fn read(&self, node: &str) -> Result<Option<String>, HypervisorError> {
        self.place.store.read(&format!("{}/{node}", self.place.frontend))
    }

    fn number<T: core::str::FromStr>(&self, node: &str) -> Result<Option<T>, HypervisorError> {
        Ok(self.read(node)?.and_then(|value| value.parse().ok()))
    }

    /// Says all that a frontend has to know, and waits for one.
    fn publish(&mut self) -> Result<(), HypervisorError> {
        self.write("device-type", self.state.device_type())?;
        self.write("num-queues", self.state.queue_count())?;
        self.write("features", encode_features(self.state.device_features()))?;
        for index in 0..self.state.queue_count() {
            self.write(&format!("queue-{index}/max-size"), self.state.queue_max_size(index))?;
        }
        self.write("reply", self.handled)?;
        self.shown = Shown { generation: !self.state.config_generation(), ..Shown::default() };
        self.write("status", 0)?;
        self.show()?;
        self.enter(State::InitWait)
    }

    fn enter(&mut self, connection: State) -> Result<(), HypervisorError> {
        if self.connection != connection {
            tracing::debug!(backend = %self.place.backend, ?connection, "connection");
            self.connection = connection;
            self.write("state", connection as u8)?;
        }
        Ok(())
    }

    /// Brings the nodes up to date with the device.
    fn show(&mut self) -> Result<(), HypervisorError> {
        self.config_changed.changed.store(false, Ordering::SeqCst);
        let (generation, status) = (self.state.config_generation(), self.state.status());
        if self.shown.generation != generation || self.shown.config[..] != *self.state.config() {
            (self.shown.generation, self.shown.config) = (generation, self.state.config().into());
            self.write("config", encode_config(generation, &self.shown.config))?;
        }
        if self.shown.status != status {
            self.shown.status = status;
            self.write("status", status.bits())?;
        }
        Ok(())
    }

    /// Lets go of everything that is the guest's.
    fn stop(&mut self) {
        self.state.reset();
        for index in 0..self.state.queue_count() {
            self.place.ports.close(index);
        }
    }

    /// Looks at what the frontend wrote.
    fn look(&mut self) -> Result<(), HypervisorError> {
        if self.backend.close.swap(false, Ordering::SeqCst) && self.connection != State::Closed {
            self.stop();
            self.show()?;
            self.enter(State::Closing)?;
        }
        let frontend = self.read("state")?.map_or(State::Unknown, |state| State::parse(&state));
        match (frontend, self.connection) {
            (State::Closing, State::InitWait | State::Connected) => {
                self.stop();
                self.show()?;
                self.enter(State::Closing)
            }
            (State::Closed, State::InitWait | State::Connected | State::Closing) => {
                self.stop();
                self.show()?;
                self.enter(State::Closed)
            }
            (State::Initialising, State::Closed) => self.publish(),
            (_, State::InitWait | State::Connected) => self.look_at_request(),
            _ => Ok(()),
        }
    }

    fn look_at_request(&mut self) -> Result<(), HypervisorError> {
        let Some((number, request)) = self.read("request")?.and_then(|value| Request::decode(&value)) else {
            return Ok(());
        };
        if number == self.handled {
            return Ok(());
        }
        self.handled = number;
        match request {
            Some(Request::Status(status)) => self.set_status(Status::from_bits_retain(status))?,
            Some(Request::Config { offset, data }) => self.state.write_config(offset.into(), &data),
            Some(Request::Enable(queue)) => self.enable(queue)?,
            Some(Request::Reset(queue)) => {
                self.state.reset_queue(queue);
                self.place.ports.close(queue);
            }
            None => self.write("error", "a request that does not exist")?,
        }
        self.show()?;
        self.write("reply", number)
    }

    fn set_status(&mut self, status: Status) -> Result<(), HypervisorError> {
        if status.is_empty() {
            self.stop();
            return self.enter(State::InitWait);
        }
        if !self.state.status().contains(Status::FEATURES_OK)
            && let Some(features) = self.read("driver-features")?.and_then(|text| decode_features(&text))
        {
            self.state.set_driver_features(features);
        }
        if status.contains(Status::DRIVER_OK) && !self.state.status().contains(Status::DRIVER_OK) {
            for index in 0..self.state.queue_count() {
                self.enable(index)?;
            }
        }
        self.state.set_status(status);
        if self.state.is_running() { self.enter(State::Connected) } else { Ok(()) }
    }

    /// Takes queue `index` into use, if the frontend has set it up.
    fn enable(&mut self, index: u16) -> Result<(), HypervisorError> {
        let node = |name| format!("queue-{index}/{name}");
        if self.state.queue_enabled(index) || index >= self.state.queue_count() {
            return Ok(());
        }
        let Some(size) = self.number(&node("size"))? else { return Ok(()) };
        self.state.set_queue_size(index, size);
        for (area, name) in [(Area::Descriptors, "descriptors"), (Area::Driver, "driver"), (Area::Device, "device")] {
            self.state.set_queue_address(index, area, self.number(&node(name))?.unwrap_or(0));
        }
        match self.number(&node("event-channel"))? {
            Some(port) => {
                if let Err(error) = self.place.ports.bind(index, port) {
                    return self.write("error", error);
                }
            }
            None => return self.write("error", format!("queue {index} has no event channel")),
        }
        self.state.enable_queue(index);
        Ok(())
    }

    fn after(&mut self, more: bool) -> bool {
        // A device that is to be suspended may be so only now that something is finished.
        let news = self.config_changed.changed.load(Ordering::SeqCst) || self.shown.status != self.state.status();
        if news && let Err(error) = self.show() {
            tracing::warn!(%error, "xenstore");
        }
        more
    }
}

impl<M: GuestMemory + Send> BusDevice for Device<M> {
    /// There are no registers.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {}

    fn kick(&mut self, queue: u16) -> bool {
        let more = self.state.kick(queue);
        self.after(more)
    }

    fn poll(&mut self) -> bool {
        if let Err(error) = self.look() {
            tracing::warn!(%error, "xenstore");
        }
        let more = self.state.poll();
        self.after(more)
    }

    fn set_waker(&mut self, waker: Waker) {
        *self.backend.waker.lock().unwrap_or_else(PoisonError::into_inner) = waker.clone();
        if let Err(error) = self.place.store.watch(&self.place.frontend, waker.clone()) {
            tracing::warn!(%error, "the frontend cannot be watched");
        }
        self.state.set_waker(waker);
    }
}

/// Queue interrupts are events; a change of the configuration is a change of nodes.
struct Bell {
    changed: AtomicBool,
    queues: Arc<dyn Interrupt>,
}

impl Interrupt for Bell {
    fn raise(&self, cause: Cause) {
        match cause {
            Cause::Queue(_) => self.queues.raise(cause),
            Cause::Config => self.changed.store(true, Ordering::SeqCst),
        }
    }
}
