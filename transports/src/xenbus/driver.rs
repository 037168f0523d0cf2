//! The guest's side: a driver's transport over the two directories.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Waker;
use core::time::Duration;

use polyvirt_core::hypervisor::{Share, WaitForInterrupt, WakeOnInterrupt};
use polyvirt_core::transport::{
    BlockingTransport, Interrupts, Notify, QueueSet, Transport, TransportError, Virtqueue, WakingTransport,
};
use polyvirt_core::{Features, Status};

use super::registers::{Channel, Description, Domain, GuestPlace, Operation, Reply, Setup, State, encode_request};
use crate::areas::Areas;

/// How long the other side may take to answer.
const WATCHDOG: Duration = Duration::from_secs(10);
/// How often nodes may change without the one that is waited for being among them.
const ATTEMPTS: u32 = 10_000;
/// How often the other side may close a connection that is being opened.
const ROUNDS: u32 = 10;

/// The driver side, connected to the device at a place.
///
/// What the backend's nodes say is read again only when a watch says that they changed. Operations that nobody waits for
/// the result of are posted: they go with the next request, in their order.
///
/// Whoever asks the backend for something waits for its answer: the two directories are a conversation, and most of
/// [`Transport`] is a request here. So the guest is one that can wait, and what [`Transport`] promises holds for
/// [`Transport::take_interrupts`] alone: the rest waits, at most so long.
///
/// Dropping it while queues are in use resets the device, so that their memory can return to the guest.
pub struct Driver<G: Domain + WaitForInterrupt + 'static> {
    guest: Arc<G>,
    place: GuestPlace,
    description: Description,
    /// What is asked for with the next request.
    posted: Vec<Operation>,
    /// The number of the last request.
    number: u32,
    /// Whether there was a request since the device was reset.
    asked: bool,
    lines: Lines,
    features: Features,
    queues: BTreeMap<u16, (Areas, Channel)>,
    /// The backend's `state` and `reply`, as they were when they were read last.
    backend: State,
    reply: Reply,
    /// What was last told to who waits.
    told: News,
}

/// The lines on which changes of the backend's nodes come.
#[derive(Clone, Copy)]
struct Lines {
    state: u32,
    reply: u32,
}

impl Lines {
    const fn all(self) -> [u32; 2] {
        [self.state, self.reply]
    }
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct News {
    generation: u32,
    needs_reset: bool,
}

impl<G: Domain + WaitForInterrupt + 'static> Driver<G> {
    /// Meets the device at `place`, or says why there is none.
    pub fn connect(guest: Arc<G>, place: GuestPlace) -> Result<Self, TransportError> {
        let watch = |node| guest.watch(&format!("{}/{node}", place.backend));
        // Each watch begins with an event; the reply's comes first, and is read before the state says who is there.
        let reply = watch("reply")?;
        let lines = Lines { state: watch("state")?, reply };
        let (posted, queues, features) = Default::default();
        let (description, backend, reply, told) =
            (Description::default(), State::Unknown, Reply::default(), News::default());
        let (number, asked) = (0, false);
        let mut driver =
            Self { guest, place, description, posted, number, asked, lines, features, queues, backend, reply, told };
        driver.wait_for("the backend", |driver| {
            (!matches!(driver.backend, State::Unknown | State::Initialising)).then_some(())
        })?;
        let frontend = driver.guest.store().read(&format!("{}/state", driver.place.frontend))?;
        match (driver.backend, frontend.map_or(State::Unknown, |state| State::parse(&state))) {
            // Someone was here before: the connection is taken over as it is.
            (State::Connected, State::Connected) => driver.meet(true)?,
            (State::InitWait, State::Unknown | State::Initialising) => driver.open()?,
            // Someone was, and is in the middle of something.
            _ => driver.reopen()?,
        }
        if driver.description.device_type == 0 {
            return Err(TransportError::NotADevice { expected: "a device type other than 0", found: 0 });
        }
        driver.told = driver.news();
        Ok(driver)
    }

    /// What the driver talks through.
    pub fn guest(&self) -> &Arc<G> {
        &self.guest
    }

    fn read(&self, node: &str) -> Result<Option<String>, TransportError> {
        Ok(self.guest.store().read(&format!("{}/{node}", self.place.backend))?)
    }

    fn write(&self, node: &str, value: &str) -> Result<(), TransportError> {
        Ok(self.guest.store().write(&format!("{}/{node}", self.place.frontend), value)?)
    }

    fn enter(&self, state: State) -> Result<(), TransportError> {
        self.write("state", &(state as u8).to_string())
    }

    /// Begins with what the backend says.
    fn meet(&mut self, asked: bool) -> Result<(), TransportError> {
        // It was written before the state was.
        self.read_reply()?;
        self.description = self.read("device")?.and_then(|value| Description::decode(&value)).unwrap_or_default();
        (self.number, self.asked) = (self.reply.number, asked);
        Ok(())
    }

    /// Opens the connection to a backend that waits for a frontend.
    fn open(&mut self) -> Result<(), TransportError> {
        for _ in 0..ROUNDS {
            self.enter(State::Connected)?;
            if self.backend_becomes(&[State::Connected, State::Closing, State::Closed])? == State::Connected {
                return self.meet(false);
            }
            // It has closed it meanwhile, for its own reasons or for what someone before this driver has written.
            self.close()?;
        }
        Err(TransportError::Closed)
    }

    /// Leaves whatever the two sides were in the middle of behind, until the backend waits for a frontend.
    fn close(&mut self) -> Result<(), TransportError> {
        self.enter(State::Closed)?;
        self.backend_becomes(&[State::Closed])?;
        self.enter(State::Initialising)?;
        self.backend_becomes(&[State::InitWait]).map(drop)
    }

    /// Opens the connection again, wherever the two sides are.
    fn reopen(&mut self) -> Result<(), TransportError> {
        self.close()?;
        self.open()
    }

    /// Waits until the backend is in one of these states; [`TransportError::Closed`] if it is gone.
    fn backend_becomes(&mut self, states: &[State]) -> Result<State, TransportError> {
        self.wait_for("the backend to follow", |driver| match driver.backend {
            // Its directory is gone: there is nobody who could come back.
            State::Unknown => Some(Err(TransportError::Closed)),
            state => states.contains(&state).then_some(Ok(state)),
        })?
    }

    /// Whether requests are answered.
    const fn is_open(&self) -> bool {
        matches!(self.backend, State::Connected)
    }

    fn news(&self) -> News {
        let needs_reset = self.reply.status.contains(Status::DEVICE_NEEDS_RESET) || !self.is_open();
        News { generation: self.reply.generation, needs_reset }
    }

    /// Whether there is something that was not told yet.
    fn has_news(&mut self) -> bool {
        let now = self.news();
        core::mem::replace(&mut self.told, now) != now
    }

    fn read_state(&mut self) -> Result<(), TransportError> {
        self.backend = self.read("state")?.map_or(State::Unknown, |state| State::parse(&state));
        Ok(())
    }

    fn read_reply(&mut self) -> Result<(), TransportError> {
        // Its own number, so that nobody takes it for an answer.
        let none = || Reply { number: self.reply.number, ..Reply::default() };
        self.reply = self.read("reply")?.and_then(|value| Reply::decode(&value)).unwrap_or_else(none);
        Ok(())
    }

    /// Reads the nodes that have changed.
    fn look(&mut self) -> Result<(), TransportError> {
        let (state, reply) = (self.guest.take(self.lines.state)?, self.guest.take(self.lines.reply)?);
        if state {
            self.read_state()?;
        }
        if reply {
            self.read_reply()?;
        }
        Ok(())
    }

    /// Asks for what is posted, unless nothing that is read depends on it, and looks at what has changed.
    fn catch_up(&mut self) -> Result<(), TransportError> {
        self.look()?;
        let unseen = self.posted.iter().all(|operation| matches!(operation, Operation::Queue(_)));
        if unseen || !self.is_open() { Ok(()) } else { self.request() }
    }

    /// Waits until `done` says something, looking again whenever the backend's nodes change.
    fn wait_for<T>(&mut self, what: &'static str, done: impl Fn(&Self) -> Option<T>) -> Result<T, TransportError> {
        for _ in 0..ATTEMPTS {
            if let Some(result) = done(self) {
                return Ok(result);
            }
            if !self.guest.wait(&self.lines.all(), WATCHDOG)? {
                break;
            }
            self.look()?;
        }
        Err(TransportError::Watchdog(WATCHDOG, what))
    }

    /// Has `operation` done with the next request.
    fn post(&mut self, operation: Operation) -> Result<(), TransportError> {
        self.look()?;
        if !self.is_open() {
            return Err(TransportError::Closed);
        }
        self.posted.push(operation);
        Ok(())
    }

    /// Has what is posted done.
    fn request(&mut self) -> Result<(), TransportError> {
        self.number = self.number.wrapping_add(1);
        let operations = core::mem::take(&mut self.posted);
        self.asked = true;
        self.write("request", &encode_request(self.number, &operations))?;
        self.wait_for("the answer to a request", |driver| match driver.reply.number == driver.number {
            true => Some(Ok(())),
            false => (!driver.is_open()).then_some(Err(TransportError::Closed)),
        })?
    }

    /// Asks for a reset, if there is something to reset; false if the connection is closed, or is while it is asked for.
    fn reset_through_connection(&mut self) -> Result<bool, TransportError> {
        if self.is_open() && (self.asked || !self.reply.status.is_empty()) {
            match self.carry_out(Operation::Status(Status::empty())) {
                Err(TransportError::Closed) => {}
                answer => answer?,
            }
            self.asked = false;
        }
        Ok(self.is_open())
    }

    fn carry_out(&mut self, operation: Operation) -> Result<(), TransportError> {
        self.post(operation)?;
        self.request()
    }

    fn forget_queues(&mut self) -> Result<(), TransportError> {
        for (_, channel) in core::mem::take(&mut self.queues).into_values() {
            self.guest.close_channel(channel)?;
        }
        Ok(())
    }
}

impl<G: Domain + WaitForInterrupt + 'static> Transport for Driver<G> {
    fn device_type(&self) -> u32 {
        self.description.device_type
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        Ok(self.description.features)
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        self.features = features;
        self.post(Operation::Features(features))
    }

    /// A closed connection is a device that needs a reset.
    fn status(&mut self) -> Result<Status, TransportError> {
        self.catch_up()?;
        let status = self.reply.status;
        Ok(if self.is_open() { status } else { status | Status::DEVICE_NEEDS_RESET })
    }

    /// Nobody waits for what only says that the driver is there: it is posted.
    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        let operation = Operation::Status(status);
        match (Status::ACKNOWLEDGE | Status::DRIVER).contains(status) && !status.is_empty() {
            true => self.post(operation),
            false => self.carry_out(operation),
        }
    }

    /// If the other side has closed the connection, opens it again; [`TransportError::Closed`] if it is gone. It is done when
    /// this returns.
    fn begin_reset(&mut self) -> Result<(), TransportError> {
        self.look()?;
        self.posted.clear();
        if !self.reset_through_connection()? {
            self.reopen()?;
        }
        self.features = Features::empty();
        self.forget_queues()?;
        self.told = self.news();
        Ok(())
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        Ok(self.queues.is_empty())
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        self.catch_up()?;
        Ok(self.reply.generation)
    }

    /// Bytes beyond the end of the configuration read as 0.
    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        self.catch_up()?;
        let config = self.reply.config.get(offset as usize..).unwrap_or_default();
        let len = data.len().min(config.len());
        data[..len].copy_from_slice(&config[..len]);
        data[len..].fill(0);
        Ok(())
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        self.carry_out(Operation::Config { offset, data: data.into() })
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        Ok(self.description.max_sizes.get(usize::from(index)).copied().unwrap_or(0))
    }

    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError> {
        let max = self.queue_max_size(index)?;
        if max == 0 {
            return Err(TransportError::NoQueue(index));
        }
        if self.queues.contains_key(&index) {
            return Err(TransportError::NotADevice { expected: "a queue that is not in use", found: index.into() });
        }
        let areas = Areas::allocate(&self.share(), index, size, max, self.features)?;
        let channel = self.guest.open_channel()?;
        let config = *areas.config();
        let (size, port) = (config.size.into(), channel.port);
        let setup = Setup { index, size, areas: [config.descriptors, config.driver, config.device], port };
        let doorbell = Doorbell { guest: self.guest.clone(), port };
        let virtqueue = areas.virtqueue(Box::new(doorbell));
        self.queues.insert(index, (areas, channel));
        self.post(Operation::Queue(setup))?;
        if self.reply.status.contains(Status::DRIVER_OK) {
            self.request()?;
        }
        Ok(virtqueue)
    }

    fn begin_vq_reset(&mut self, index: u16) -> Result<(), TransportError> {
        if !self.features.contains(Features::RING_RESET) {
            return Err(TransportError::Unsupported("reset of one queue without VIRTIO_F_RING_RESET"));
        }
        let Some((_, channel)) = self.queues.get(&index) else { return Err(TransportError::NoQueue(index)) };
        let channel = *channel;
        self.carry_out(Operation::Reset(index))?;
        self.guest.close_channel(channel)?;
        self.queues.remove(&index);
        Ok(())
    }

    fn poll_vq_reset(&mut self, index: u16) -> Result<bool, TransportError> {
        Ok(!self.queues.contains_key(&index))
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        let mut queues = QueueSet::NONE;
        for (&index, (_, channel)) in &self.queues {
            if self.guest.take(channel.line)? {
                queues |= QueueSet::of(index);
            }
        }
        self.look()?;
        Ok(Interrupts { queues, config: self.has_news() })
    }

    fn share(&self) -> Arc<dyn Share> {
        self.guest.clone()
    }
}

impl<G: Domain + WaitForInterrupt + 'static> BlockingTransport for Driver<G> {
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError> {
        self.catch_up()?;
        let queues: Vec<_> = self.queues.values().map(|(_, channel)| channel.line).collect();
        let lines = [&*queues, &self.lines.all()].concat();
        for _ in 0..ATTEMPTS {
            // A change may have come while an answer was waited for.
            if self.news() != self.told {
                return Ok(true);
            }
            if !self.guest.wait(&lines, most)? {
                return Ok(false);
            }
            if !queues.is_empty() && self.guest.wait(&queues, Duration::ZERO)? {
                return Ok(true);
            }
            // Not every change of a node is one that the driver is told of.
            self.look()?;
        }
        Ok(false)
    }

    fn pause(&mut self, time: Duration) -> Result<(), TransportError> {
        self.guest.wait(&[], time)?;
        Ok(())
    }
}

impl<G: Domain + WaitForInterrupt + WakeOnInterrupt + 'static> WakingTransport for Driver<G> {
    fn wake_on_interrupt(&mut self, waker: &Waker) -> Result<(), TransportError> {
        // A change may have come while an answer was waited for.
        if self.news() != self.told {
            waker.wake_by_ref();
            return Ok(());
        }
        let queues = self.queues.values().map(|(_, channel)| channel.line);
        Ok(self.guest.wake_on(&queues.chain(self.lines.all()).collect::<Vec<_>>(), waker)?)
    }
}

impl<G: Domain + WaitForInterrupt + 'static> Drop for Driver<G> {
    fn drop(&mut self) {
        if self.queues.is_empty() {
            return;
        }
        if let Err(error) = self.begin_reset() {
            // Better lost than given to someone else while the device writes to it.
            tracing::warn!(%error, "the device may still use its rings: their memory is not taken back");
            core::mem::forget(core::mem::take(&mut self.queues));
        }
    }
}

/// A queue's event channel.
struct Doorbell<G> {
    guest: Arc<G>,
    port: u32,
}

impl<G: Domain> Notify for Doorbell<G> {
    fn notify(&mut self) -> Result<(), TransportError> {
        Ok(self.guest.notify(self.port.into(), 0)?)
    }
}
