//! The guest's side: a driver's transport over the two directories.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;

use polyvirt_core::hypervisor::Share;
use polyvirt_core::transport::{Interrupts, Notify, Transport, TransportError, Virtqueue};
use polyvirt_core::{Features, Status};

use super::registers::{Channel, Domain, GuestPlace, Request, State, decode_config, decode_features, encode_features};
use crate::areas::Areas;

/// How long the other side may take to answer.
const WATCHDOG: Duration = Duration::from_secs(10);
/// How often nodes may change without the one that is waited for being among them.
const ATTEMPTS: u32 = 10_000;

/// The driver side, connected to the device at a place.
///
/// Dropping it while queues are in use resets the device, so that their memory can return to the guest.
pub struct Driver<G: Domain + 'static> {
    guest: Arc<G>,
    place: GuestPlace,
    device_type: u32,
    /// The number of the last request.
    number: u32,
    /// The line on which changes of the backend's directory come.
    watch: u32,
    features: Features,
    queues: BTreeMap<u16, (Areas, Channel)>,
    /// What was last known of the backend, to tell news from what this side did itself.
    seen: Seen,
    /// Whether waiting for an answer may have taken the event of a change that nobody has looked at.
    unseen: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Seen {
    generation: u32,
    needs_reset: bool,
}

impl<G: Domain + 'static> Driver<G> {
    /// Meets the device at `place`, or says why there is none.
    pub fn connect(guest: Arc<G>, place: GuestPlace) -> Result<Self, TransportError> {
        let watch = guest.watch(&place.backend)?;
        let (queues, features, seen) = (BTreeMap::new(), Features::empty(), Seen::default());
        let mut driver = Self { guest, place, device_type: 0, number: 0, watch, features, queues, seen, unseen: false };
        driver.enter(State::Initialising)?;
        driver.wait_for("the backend", |driver| {
            Ok(driver.number::<u32>("num-queues")?.is_some() && driver.backend()? == State::InitWait)
        })?;
        driver.device_type = driver.number("device-type")?.unwrap_or(0);
        if driver.device_type == 0 {
            return Err(TransportError::NotADevice { expected: "a device type other than 0", found: 0 });
        }
        driver.number = driver.number("reply")?.unwrap_or(0);
        driver.seen = driver.look()?;
        Ok(driver)
    }

    /// What the driver talks through.
    pub fn guest(&self) -> &Arc<G> {
        &self.guest
    }

    fn read(&self, node: &str) -> Result<Option<String>, TransportError> {
        Ok(self.guest.store().read(&format!("{}/{node}", self.place.backend))?)
    }

    fn number<T: core::str::FromStr>(&self, node: &str) -> Result<Option<T>, TransportError> {
        Ok(self.read(node)?.and_then(|value| value.parse().ok()))
    }

    fn write(&self, node: &str, value: impl ToString) -> Result<(), TransportError> {
        Ok(self.guest.store().write(&format!("{}/{node}", self.place.frontend), &value.to_string())?)
    }

    fn enter(&self, state: State) -> Result<(), TransportError> {
        self.write("state", state as u8)
    }

    fn backend(&self) -> Result<State, TransportError> {
        Ok(self.read("state")?.map_or(State::Unknown, |state| State::parse(&state)))
    }

    /// Whether requests are answered.
    fn is_open(&self) -> Result<bool, TransportError> {
        Ok(matches!(self.backend()?, State::InitWait | State::Connected))
    }

    /// Waits until `done`, looking again whenever the backend's directory changes.
    fn wait_for(
        &self,
        what: &'static str,
        done: impl Fn(&Self) -> Result<bool, TransportError>,
    ) -> Result<(), TransportError> {
        for _ in 0..ATTEMPTS {
            if done(self)? {
                return Ok(());
            }
            if self.guest.wait(1 << self.watch, WATCHDOG)? == 0 {
                break;
            }
        }
        Err(TransportError::Watchdog(WATCHDOG, what))
    }

    fn request(&mut self, request: &Request) -> Result<(), TransportError> {
        if !self.is_open()? {
            return Err(TransportError::Closed);
        }
        self.number = self.number.wrapping_add(1);
        self.unseen = true;
        self.write("request", request.encode(self.number))?;
        self.wait_for("the answer to a request", |driver| {
            Ok(driver.number("reply")? == Some(driver.number) || !driver.is_open()?)
        })?;
        if self.is_open()? { Ok(()) } else { Err(TransportError::Closed) }
    }

    fn look(&self) -> Result<Seen, TransportError> {
        let (generation, _) = self.config()?;
        let status = Status::from_bits_retain(self.number("status")?.unwrap_or(0));
        Ok(Seen { generation, needs_reset: status.contains(Status::DEVICE_NEEDS_RESET) || !self.is_open()? })
    }

    /// The configuration and its generation.
    fn config(&self) -> Result<(u32, Vec<u8>), TransportError> {
        Ok(self.read("config")?.and_then(|text| decode_config(&text)).unwrap_or_default())
    }

    fn forget_queues(&mut self) -> Result<(), TransportError> {
        for (index, (_, channel)) in core::mem::take(&mut self.queues) {
            self.guest.store().remove(&format!("{}/queue-{index}", self.place.frontend))?;
            self.guest.close_channel(channel)?;
        }
        Ok(())
    }
}

impl<G: Domain + 'static> Transport for Driver<G> {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        Ok(self.read("features")?.and_then(|text| decode_features(&text)).unwrap_or_default())
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        self.features = features;
        self.write("driver-features", encode_features(features))
    }

    /// A closed connection is a device that needs a reset.
    fn status(&mut self) -> Result<Status, TransportError> {
        let status = Status::from_bits_retain(self.number("status")?.unwrap_or(0));
        Ok(if self.is_open()? { status } else { status | Status::DEVICE_NEEDS_RESET })
    }

    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        if status.contains(Status::DRIVER_OK) {
            self.enter(State::Initialised)?;
        }
        self.request(&Request::Status(status.bits()))?;
        if status.contains(Status::DRIVER_OK) { self.enter(State::Connected) } else { Ok(()) }
    }

    /// If the other side has closed the connection, opens it again; [`TransportError::Closed`] if it is gone.
    fn reset(&mut self) -> Result<(), TransportError> {
        if !self.is_open()? {
            self.enter(State::Closed)?;
            self.wait_for("the backend to close", |driver| {
                Ok(matches!(driver.backend()?, State::Closed | State::Unknown))
            })?;
            if self.backend()? == State::Unknown {
                // Its directory is gone: there is nobody who could come back.
                return Err(TransportError::Closed);
            }
            self.enter(State::Initialising)?;
            self.wait_for("the backend to come back", |driver| Ok(driver.backend()? == State::InitWait))?;
            self.number = self.number("reply")?.unwrap_or(0);
        } else {
            self.request(&Request::Status(0))?;
            self.enter(State::Initialising)?;
        }
        self.features = Features::empty();
        self.forget_queues()?;
        self.seen = self.look()?;
        Ok(())
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        Ok(self.config()?.0)
    }

    /// Bytes beyond the end of the configuration read as 0.
    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        let (_, config) = self.config()?;
        let config = config.get(offset as usize..).unwrap_or_default();
        let len = data.len().min(config.len());
        data[..len].copy_from_slice(&config[..len]);
        data[len..].fill(0);
        Ok(())
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        self.request(&Request::Config { offset, data: data.into() })
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        Ok(self.number(&format!("queue-{index}/max-size"))?.unwrap_or(0))
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
        for (name, value) in [
            ("size", config.size.into()),
            ("descriptors", config.descriptors),
            ("driver", config.driver),
            ("device", config.device),
            ("event-channel", channel.port.into()),
        ] {
            self.write(&format!("queue-{index}/{name}"), value)?;
        }
        let doorbell = Doorbell { guest: self.guest.clone(), port: channel.port };
        let virtqueue = areas.virtqueue(Box::new(doorbell));
        self.queues.insert(index, (areas, channel));
        if self.number::<u8>("status")?.is_some_and(|bits| bits & Status::DRIVER_OK.bits() != 0) {
            self.request(&Request::Enable(index))?;
        }
        Ok(virtqueue)
    }

    fn reset_vq(&mut self, index: u16) -> Result<(), TransportError> {
        if !self.features.contains(Features::RING_RESET) {
            return Err(TransportError::Unsupported("reset of one queue without VIRTIO_F_RING_RESET"));
        }
        let Some((_, channel)) = self.queues.get(&index) else { return Err(TransportError::NoQueue(index)) };
        let channel = *channel;
        self.request(&Request::Reset(index))?;
        self.guest.store().remove(&format!("{}/queue-{index}", self.place.frontend))?;
        self.guest.close_channel(channel)?;
        self.queues.remove(&index);
        Ok(())
    }

    fn wait(&mut self, watchdog: Duration) -> Result<Interrupts, TransportError> {
        let queues = self.queues.values().fold(0, |lines, (_, channel)| lines | 1 << channel.line);
        for _ in 0..ATTEMPTS {
            let unseen = core::mem::take(&mut self.unseen);
            let watchdog = if unseen { Duration::ZERO } else { watchdog };
            let pending = self.guest.wait(queues | 1 << self.watch, watchdog)?;
            let mut interrupts = Interrupts { queues: pending & queues != 0, config: false };
            if unseen || pending & (1 << self.watch) != 0 {
                let now = self.look()?;
                interrupts.config = now != self.seen;
                self.seen = now;
            }
            if interrupts != Interrupts::default() {
                return Ok(interrupts);
            }
            if pending == 0 && !unseen {
                break;
            }
        }
        Err(TransportError::Watchdog(watchdog, "an interrupt"))
    }

    fn share(&self) -> Arc<dyn Share> {
        self.guest.clone()
    }
}

impl<G: Domain + 'static> Drop for Driver<G> {
    fn drop(&mut self) {
        if self.queues.is_empty() {
            return;
        }
        if let Err(error) = self.reset() {
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
