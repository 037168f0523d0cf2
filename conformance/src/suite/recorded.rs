//! A transport that writes down what its driver does.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polyvirt_core::hypervisor::Share;
use polyvirt_core::transport::{BlockingTransport, Interrupts, Notify, Transport, TransportError, Virtqueue};
use polyvirt_core::{Features, Status};

/// The most calls that a trace keeps; the oldest go first.
const LIMIT: usize = 4096;
/// The most lines of a reproduction.
const LINES: usize = 40;

/// One call of the driver, with what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// Reset, until the device was.
    Reset,
    /// Wrote the status.
    SetStatus(Status),
    /// Read the status.
    Status(Status),
    /// Read the offered features.
    DeviceFeatures(Features),
    /// Accepted features.
    SetDriverFeatures(Features),
    /// Read the generation of the configuration.
    Generation(u32),
    /// Read configuration: offset and bytes.
    ReadConfig(u32, Vec<u8>),
    /// Wrote configuration: offset and bytes.
    WriteConfig(u32, Vec<u8>),
    /// Asked for the most entries of a queue.
    QueueMaxSize(u16, u16),
    /// Enabled a queue, with so many entries.
    FindVq(u16, u16),
    /// Reset a queue.
    ResetVq(u16),
    /// Rang a queue's doorbell.
    Notify(u16),
    /// Was interrupted.
    Interrupted(Interrupts),
    /// A call failed.
    Failed(&'static str, TransportError),
    /// Something that is no call of the transport: a write to a ring, for example.
    Note(String),
}

impl fmt::Display for Call {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset => formatter.write_str("reset"),
            Self::SetStatus(status) => write!(formatter, "write status {:#04x}", status.bits()),
            Self::Status(status) => write!(formatter, "read status: {:#04x}", status.bits()),
            Self::DeviceFeatures(features) => write!(formatter, "read offered features: {:#x}", features.bits()),
            Self::SetDriverFeatures(features) => write!(formatter, "accept features {:#x}", features.bits()),
            Self::Generation(generation) => write!(formatter, "read configuration generation: {generation}"),
            Self::ReadConfig(offset, data) => write!(formatter, "read configuration at {offset}: {data:02x?}"),
            Self::WriteConfig(offset, data) => write!(formatter, "write configuration at {offset}: {data:02x?}"),
            Self::QueueMaxSize(index, size) => write!(formatter, "read maximum size of queue {index}: {size}"),
            Self::FindVq(index, size) => write!(formatter, "enable queue {index} with {size} entries"),
            Self::ResetVq(index) => write!(formatter, "reset queue {index}"),
            Self::Notify(index) => write!(formatter, "kick queue {index}"),
            Self::Interrupted(Interrupts { queues, config }) => {
                write!(formatter, "interrupt (queues {queues}, configuration {config})")
            }
            Self::Failed(call, error) => write!(formatter, "{call} failed: {error}"),
            Self::Note(note) => formatter.write_str(note),
        }
    }
}

/// What was called, in order.
#[derive(Clone, Default)]
pub struct Trace(Arc<Mutex<VecDeque<Call>>>);

impl Trace {
    /// Writes down `call`.
    pub fn push(&self, call: Call) {
        let mut calls = lock(&self.0);
        if calls.len() == LIMIT {
            calls.pop_front();
        }
        calls.push_back(call);
    }

    /// Writes down something that is no call of the transport.
    pub fn note(&self, note: impl Into<String>) {
        self.push(Call::Note(note.into()));
    }

    /// All that is known.
    pub fn calls(&self) -> Vec<Call> {
        lock(&self.0).iter().cloned().collect()
    }

    /// Forgets what was called.
    pub fn clear(&self) {
        lock(&self.0).clear();
    }

    /// The last calls, one a line, repetitions told once.
    pub fn reproduction(&self) -> String {
        let mut lines: Vec<(String, usize)> = Vec::new();
        for call in lock(&self.0).iter() {
            let line = call.to_string();
            match lines.last_mut() {
                Some((last, times)) if *last == line => *times += 1,
                _ => lines.push((line, 1)),
            }
        }
        let left_out = lines.len().saturating_sub(LINES);
        let mut text = if left_out > 0 { format!("({left_out} steps before)\n") } else { String::new() };
        for (line, times) in &lines[left_out..] {
            text += line;
            if *times > 1 {
                text += &format!(" ({times} times)");
            }
            text.push('\n');
        }
        text.truncate(text.trim_end().len());
        text
    }
}

/// A transport whose calls are written down: a handle, so that a case can keep one while a driver uses another.
#[derive(Clone)]
pub struct Recorded {
    inner: Arc<Mutex<Box<dyn BlockingTransport>>>,
    trace: Trace,
    hidden: Features,
    device_type: u32,
    legacy: bool,
}

impl Recorded {
    /// Writes down the calls of `inner` in `trace`.
    pub fn new(inner: Box<dyn BlockingTransport>, trace: Trace) -> Self {
        let (device_type, legacy) = (inner.device_type(), inner.is_legacy());
        Self { inner: Arc::new(Mutex::new(inner)), trace, hidden: Features::empty(), device_type, legacy }
    }

    /// Keeps from drivers that the device offers `features`.
    #[must_use]
    pub fn hiding(self, features: Features) -> Self {
        Self { hidden: features, ..self }
    }

    fn call<T>(
        &self,
        name: &'static str,
        work: impl FnOnce(&mut dyn BlockingTransport) -> Result<T, TransportError>,
        told: impl FnOnce(&T) -> Option<Call>,
    ) -> Result<T, TransportError> {
        let result = work(&mut **lock(&self.inner));
        match &result {
            Ok(value) => told(value).into_iter().for_each(|call| self.trace.push(call)),
            Err(error) => self.trace.push(Call::Failed(name, error.clone())),
        }
        result
    }
}

impl Transport for Recorded {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn is_legacy(&self) -> bool {
        self.legacy
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        let hidden = self.hidden;
        let offered =
            |inner: &mut dyn BlockingTransport| inner.device_features().map(|offered| offered.difference(hidden));
        self.call("device_features", offered, |&offered| Some(Call::DeviceFeatures(offered)))
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        self.trace.push(Call::SetDriverFeatures(features));
        self.call("set_driver_features", |inner| inner.set_driver_features(features), |()| None)
    }

    fn status(&mut self) -> Result<Status, TransportError> {
        self.call("status", |inner| inner.status(), |&status| Some(Call::Status(status)))
    }

    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        self.trace.push(Call::SetStatus(status));
        self.call("set_status", |inner| inner.set_status(status), |()| None)
    }

    fn begin_reset(&mut self) -> Result<(), TransportError> {
        self.trace.push(Call::Reset);
        self.call("begin_reset", |inner| inner.begin_reset(), |()| None)
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        self.call("poll_reset", |inner| inner.poll_reset(), |_| None)
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        self.call("config_generation", |inner| inner.config_generation(), |&value| Some(Call::Generation(value)))
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        let read = self.call(
            "read_config",
            |inner| inner.read_config(offset, data).map(|()| data.to_vec()),
            |data| Some(Call::ReadConfig(offset, data.clone())),
        );
        read.map(drop)
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        self.trace.push(Call::WriteConfig(offset, data.to_vec()));
        self.call("write_config", |inner| inner.write_config(offset, data), |()| None)
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        self.call("queue_max_size", |inner| inner.queue_max_size(index), |&size| Some(Call::QueueMaxSize(index, size)))
    }

    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError> {
        let found = self.call(
            "find_vq",
            |inner| inner.find_vq(index, size),
            |found| Some(Call::FindVq(index, found.config.size)),
        );
        found.map(|mut virtqueue| {
            let inner = virtqueue.notify;
            virtqueue.notify = Box::new(Doorbell { inner, index, trace: self.trace.clone() });
            virtqueue
        })
    }

    fn begin_vq_reset(&mut self, index: u16) -> Result<(), TransportError> {
        self.trace.push(Call::ResetVq(index));
        self.call("begin_vq_reset", |inner| inner.begin_vq_reset(index), |()| None)
    }

    fn poll_vq_reset(&mut self, index: u16) -> Result<bool, TransportError> {
        self.call("poll_vq_reset", |inner| inner.poll_vq_reset(index), |_| None)
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        let told = |&came: &Interrupts| (!came.is_empty()).then_some(Call::Interrupted(came));
        self.call("take_interrupts", |inner| inner.take_interrupts(), told)
    }

    fn share(&self) -> Arc<dyn Share> {
        lock(&self.inner).share()
    }
}

/// Each is one call to whoever reads the trace.
impl BlockingTransport for Recorded {
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError> {
        self.call("sleep", |inner| inner.sleep(most), |_| None)
    }

    fn pause(&mut self, time: Duration) -> Result<(), TransportError> {
        self.call("pause", |inner| inner.pause(time), |()| None)
    }

    fn wait(&mut self, watchdog: Duration) -> Result<Interrupts, TransportError> {
        self.call("wait", |inner| inner.wait(watchdog), |&interrupts| Some(Call::Interrupted(interrupts)))
    }

    fn reset(&mut self) -> Result<(), TransportError> {
        self.trace.push(Call::Reset);
        self.call("reset", |inner| inner.reset(), |()| None)
    }

    fn reset_vq(&mut self, index: u16) -> Result<(), TransportError> {
        self.trace.push(Call::ResetVq(index));
        self.call("reset_vq", |inner| inner.reset_vq(index), |()| None)
    }
}

struct Doorbell {
    inner: Box<dyn Notify>,
    index: u16,
    trace: Trace,
}

impl Notify for Doorbell {
    fn notify(&mut self) -> Result<(), TransportError> {
        self.trace.push(Call::Notify(self.index));
        self.inner.notify()
    }

    fn notify_at(&mut self, next: u16) -> Result<(), TransportError> {
        self.trace.push(Call::Notify(self.index));
        self.inner.notify_at(next)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
