//! The host's side: the frontend's nodes decoded into the device state machine.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::task::Wake;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::Waker;
use std::sync::{Mutex, PoisonError};

use polyvirt_core::hypervisor::{BusDevice, Cause, Host, HypervisorError, Interrupt};
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::state::{Area, Interface, VirtioDevice};
use polyvirt_core::{Features, device};

use super::registers::{Description, HostPlace, Operation, Reply, Request, Setup, State, decode_request};

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
    /// What the frontend wrote and nobody has looked at.
    news: Frontend,
    /// The number of the request that was carried out last.
    handled: u32,
    /// What the node `reply` says.
    shown: Reply,
}

/// The frontend's nodes.
struct Frontend {
    state: Arc<News>,
    request: Arc<News>,
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
        let news = Frontend { state: Arc::default(), request: Arc::default() };
        let (connection, handled, shown) = (State::Initialising, 0, Reply::default());
        let mut device = Self { state, place, config_changed, backend, connection, news, handled, shown };
        device.publish()?;
        Ok(device)
    }

    fn backend(&self) -> Backend {
        self.backend.clone()
    }

    fn write(&self, node: &str, value: &str) -> Result<(), HypervisorError> {
        self.place.store.write(&format!("{}/{node}", self.place.backend), value)
    }

    /// A node of the frontend, which may hold anything.
    fn read(&self, node: &str) -> Result<Option<String>, HypervisorError> {
        self.place.store.read(&format!("{}/{node}", self.place.frontend))
    }

    /// Says all that a frontend has to know, and waits for one.
    fn publish(&mut self) -> Result<(), HypervisorError> {
        let description = Description {
            device_type: self.state.device_type(),
            features: self.state.device_features(),
            max_sizes: (0..self.state.queue_count()).map(|index| self.state.queue_max_size(index)).collect(),
        };
        self.write("device", &description.encode())?;
        self.shown = self.reply();
        self.write("reply", &self.shown.encode())?;
        self.enter(State::InitWait)
    }

    fn enter(&mut self, connection: State) -> Result<(), HypervisorError> {
        if self.connection != connection {
            tracing::debug!(backend = %self.place.backend, ?connection, "connection");
            self.connection = connection;
            self.write("state", &(connection as u8).to_string())?;
        }
        Ok(())
    }

    fn reply(&self) -> Reply {
        Reply {
            number: self.handled,
            status: self.state.status(),
            generation: self.state.config_generation(),
            config: self.state.config().into(),
        }
    }

    /// Brings the node up to date with the device.
    fn show(&mut self) -> Result<(), HypervisorError> {
        self.config_changed.changed.store(false, Ordering::SeqCst);
        let reply = self.reply();
        if self.shown == reply {
            return Ok(());
        }
        self.shown = reply;
        self.write("reply", &self.shown.encode())
    }

    /// Lets go of everything that is the guest's.
    fn stop(&mut self) {
        self.state.reset();
        for index in 0..self.state.queue_count() {
            self.place.ports.close(index);
        }
    }

    /// Lets go of everything, and says so.
    fn leave(&mut self, connection: State) -> Result<(), HypervisorError> {
        self.stop();
        self.show()?;
        self.enter(connection)
    }

    /// Looks at what the frontend wrote.
    fn look(&mut self) -> Result<(), HypervisorError> {
        let closes = self.backend.close.swap(false, Ordering::SeqCst) && self.connection != State::Closed;
        if closes {
            self.leave(State::Closing)?;
        }
        if self.news.state.take() || closes {
            self.follow()?;
        }
        if self.connection == State::Connected
            && self.news.request.take()
            && let Some((number, operations)) = self.request()?
            && number != self.handled
        {
            self.handled = number;
            match operations {
                Some(operations) => operations.into_iter().try_for_each(|operation| self.carry_out(operation))?,
                None => self.write("error", "an operation that does not exist")?,
            }
            self.show()?;
        }
        Ok(())
    }

    /// Follows the frontend to where it is now. How it came there does not count: watches coalesce, and a frontend need
    /// not wait for anyone before it goes on.
    fn follow(&mut self) -> Result<(), HypervisorError> {
        let frontend = self.read("state")?.map_or(State::Unknown, |state| State::parse(&state));
        match (frontend, self.connection) {
            (State::Connected, State::InitWait) => self.enter(State::Connected),
            (State::Closing, State::InitWait | State::Connected) => self.leave(State::Closing),
            (State::Closed, State::InitWait | State::Connected | State::Closing)
            | (State::Unknown, State::Connected | State::Closing) => self.leave(State::Closed),
            (State::Initialising, State::Connected | State::Closing | State::Closed) => {
                // It begins anew: what was before is over, whether it said so or not.
                self.leave(State::Closed)?;
                // What nobody answered when the connection was closed is not asked for any more.
                self.handled = self.request()?.map_or(self.handled, |(number, _)| number);
                self.publish()
            }
            _ => Ok(()),
        }
    }

    fn request(&self) -> Result<Option<Request>, HypervisorError> {
        Ok(self.read("request")?.and_then(|value| decode_request(&value)))
    }

    fn carry_out(&mut self, operation: Operation) -> Result<(), HypervisorError> {
        match operation {
            Operation::Status(status) if status.is_empty() => self.stop(),
            Operation::Status(status) => self.state.set_status(status),
            Operation::Features(features) => self.state.set_driver_features(features),
            Operation::Queue(setup) => return self.enable(&setup),
            Operation::Config { offset, data } => self.state.write_config(offset.into(), &data),
            Operation::Reset(queue) => {
                self.state.reset_queue(queue);
                self.place.ports.close(queue);
            }
        }
        Ok(())
    }

    /// Takes a queue into use.
    fn enable(&mut self, &Setup { index, size, areas, port }: &Setup) -> Result<(), HypervisorError> {
        if self.state.queue_enabled(index) || index >= self.state.queue_count() {
            return Ok(());
        }
        self.state.set_queue_size(index, size);
        for (area, address) in [Area::Descriptors, Area::Driver, Area::Device].into_iter().zip(areas) {
            self.state.set_queue_address(index, area, address);
        }
        if let Err(error) = self.place.ports.bind(index, port) {
            return self.write("error", &error.to_string());
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
        for (node, news) in [("state", &self.news.state), ("request", &self.news.request)] {
            news.waker(waker.clone());
            let path = format!("{}/{node}", self.place.frontend);
            if let Err(error) = self.place.store.watch(&path, news.clone().into()) {
                tracing::warn!(%error, path, "the frontend cannot be watched");
            }
        }
        self.state.set_waker(waker);
    }
}

/// Whether a node changed.
struct News {
    came: AtomicBool,
    waker: Mutex<Waker>,
}

impl Default for News {
    fn default() -> Self {
        Self { came: AtomicBool::new(false), waker: Mutex::new(Waker::noop().clone()) }
    }
}

impl News {
    /// Whom to wake.
    fn waker(&self, waker: Waker) {
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = waker;
    }

    /// Whether it changed since the last call.
    fn take(&self) -> bool {
        self.came.swap(false, Ordering::SeqCst)
    }
}

impl Wake for News {
    fn wake(self: Arc<Self>) {
        self.came.store(true, Ordering::SeqCst);
        self.waker.lock().unwrap_or_else(PoisonError::into_inner).wake_by_ref();
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
