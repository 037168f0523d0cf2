//! The driver's view of a transport: the paper's `virtio_config_ops` and `find_vq` (section 3).

mod blocking;
mod interrupts;
mod waking;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::time::Duration;

pub use blocking::{BlockingTransport, initialize};
pub use interrupts::{Interrupts, QueueSet};
pub use waking::WakingTransport;

use crate::features::Features;
use crate::hypervisor::{HypervisorError, Share};
use crate::memory::Pages;
use crate::queue::{QueueConfig, QueueError};
use crate::status::Status;

/// How many times a configuration that keeps changing is read before the driver gives up.
pub const CONFIG_READ_ATTEMPTS: u32 = 64;

/// How often a driver that is dropped looks whether its device is reset.
const RESET_POLLS: u32 = 10_000;

/// The driver side of a transport, connected to one device. None of its calls waits for the device: what takes time is
/// begun by one call, and another tells whether it is done. Waiting is the caller's; who wants to has
/// [`BlockingTransport`], and whose guest wakes tasks has [`WakingTransport`].
pub trait Transport: Send {
    /// The virtio device type (chapter 5).
    fn device_type(&self) -> u32;

    /// Whether the device is used through the legacy interface: no FEATURES_OK, legacy ring layout.
    fn is_legacy(&self) -> bool {
        false
    }

    /// The features that the device offers.
    fn device_features(&mut self) -> Result<Features, TransportError>;

    /// Accepts `features`.
    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError>;

    /// The device status.
    fn status(&mut self) -> Result<Status, TransportError>;

    /// Writes the device status; not 0, which is [`Transport::begin_reset`].
    fn set_status(&mut self, status: Status) -> Result<(), TransportError>;

    /// Begins to reset the device. Buffers are the driver's again when [`Transport::poll_reset`] says that it is done.
    fn begin_reset(&mut self) -> Result<(), TransportError>;

    /// Whether the reset that was begun is done: until then the driver does nothing else with the device (2.4). Without one,
    /// whether there is nothing to reset.
    fn poll_reset(&mut self) -> Result<bool, TransportError>;

    /// Changes whenever the configuration does; 0 for ever on transports without one (legacy).
    fn config_generation(&mut self) -> Result<u32, TransportError>;

    /// Reads the device configuration from `offset` on.
    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError>;

    /// Writes the device configuration from `offset` on.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError>;

    /// The most entries that queue `index` may have; 0 if there is no such queue.
    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError>;

    /// Sets up queue `index` with `size` entries (its maximum if none) and enables it, with the ring format of the
    /// features accepted before. Where the host allocates rings, `size` must be none or the host's.
    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError>;

    /// Begins to reset queue `index` alone (VIRTIO_F_RING_RESET).
    fn begin_vq_reset(&mut self, index: u16) -> Result<(), TransportError>;

    /// Whether the reset of queue `index` that was begun is done: then [`Transport::find_vq`] enables it again. Without one,
    /// whether the queue is not in use.
    fn poll_vq_reset(&mut self, index: u16) -> Result<bool, TransportError>;

    /// Takes what the device interrupted about since this was called last, and acknowledges it. Nothing is lost that came
    /// before the call: an interrupt handler may call it, and so may who only looks now and then.
    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError>;

    /// Where rings and buffers are allocated and shared.
    fn share(&self) -> Arc<dyn Share>;
}

impl<T: Transport + ?Sized> Transport for Box<T> {
    fn device_type(&self) -> u32 {
        (**self).device_type()
    }

    fn is_legacy(&self) -> bool {
        (**self).is_legacy()
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        (**self).device_features()
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        (**self).set_driver_features(features)
    }

    fn status(&mut self) -> Result<Status, TransportError> {
        (**self).status()
    }

    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        (**self).set_status(status)
    }

    fn begin_reset(&mut self) -> Result<(), TransportError> {
        (**self).begin_reset()
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        (**self).poll_reset()
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        (**self).config_generation()
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        (**self).read_config(offset, data)
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        (**self).write_config(offset, data)
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        (**self).queue_max_size(index)
    }

    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError> {
        (**self).find_vq(index, size)
    }

    fn begin_vq_reset(&mut self, index: u16) -> Result<(), TransportError> {
        (**self).begin_vq_reset(index)
    }

    fn poll_vq_reset(&mut self, index: u16) -> Result<bool, TransportError> {
        (**self).poll_vq_reset(index)
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        (**self).take_interrupts()
    }

    fn share(&self) -> Arc<dyn Share> {
        (**self).share()
    }
}

/// What [`Transport::find_vq`] returns: a ring in memory and a doorbell.
pub struct Virtqueue<N = Box<dyn Notify>> {
    /// Size, addresses and format.
    pub config: QueueConfig,
    /// The memory of the descriptor area.
    pub descriptors: Pages,
    /// The memory of the driver area.
    pub driver: Pages,
    /// The memory of the device area.
    pub device: Pages,
    /// The queue's doorbell.
    pub notify: N,
}

/// A queue's doorbell.
pub trait Notify: Send {
    /// Kicks the device.
    fn notify(&mut self) -> Result<(), TransportError>;

    /// Kicks the device and tells it where the driver goes on (VIRTIO_F_NOTIFICATION_DATA, 2.9): on a split ring the
    /// available index, on a packed one the place of the next descriptor, with the wrap counter in bit 15. Where that was
    /// not negotiated, or cannot be carried, it is a plain kick.
    fn notify_at(&mut self, next: u16) -> Result<(), TransportError> {
        let _ = next;
        self.notify()
    }
}

impl Notify for Box<dyn Notify> {
    fn notify(&mut self) -> Result<(), TransportError> {
        (**self).notify()
    }

    fn notify_at(&mut self, next: u16) -> Result<(), TransportError> {
        (**self).notify_at(next)
    }
}

/// Why the driver side of a transport gave up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The guest's hypervisor calls failed.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// There is no such queue.
    #[error("the device has no queue {0}")]
    NoQueue(u16),
    /// A queue cannot be set up as asked.
    #[error("queue {index}: {reason}")]
    Queue {
        /// The queue.
        index: u16,
        /// What is wrong.
        reason: QueueError,
    },
    /// What answers is not the device that was expected.
    #[error("expected {expected}, found {found:#x}")]
    NotADevice {
        /// What was expected.
        expected: &'static str,
        /// What came.
        found: u64,
    },
    /// The device did not accept the features.
    #[error("the device refused the features {0:?}")]
    FeaturesRefused(Features),
    /// The device does not offer what the driver cannot do without.
    #[error("the device lacks {0:?}")]
    FeaturesMissing(Features),
    /// The configuration changed at every attempt to read it.
    #[error("the configuration kept changing for {CONFIG_READ_ATTEMPTS} reads")]
    ConfigUnstable,
    /// Nothing happened within the watchdog's time.
    #[error("nothing happened in {0:?} while waiting for {1}")]
    Watchdog(Duration, &'static str),
    /// The device's side has closed the connection; a reset opens it again.
    #[error("the device's side has closed the connection")]
    Closed,
    /// The transport cannot do this.
    #[error("this transport has no {0}")]
    Unsupported(&'static str),
}

/// Resets the device as far as that goes without waiting: looks often, but not for ever. False if it is not done yet: then
/// the device may still use whatever was shared with it. For who is dropped; all others wait, or look again.
pub fn try_reset(transport: &mut (impl Transport + ?Sized)) -> Result<bool, TransportError> {
    transport.begin_reset()?;
    for _ in 0..RESET_POLLS {
        if transport.poll_reset()? {
            return Ok(true);
        }
        core::hint::spin_loop();
    }
    Ok(false)
}

/// Initializes a device that was reset, up to the point where queues are set up (3.1.1, steps 2 to 6): ACKNOWLEDGE,
/// DRIVER, features, FEATURES_OK. Returns what was accepted: `wanted` where the device offers it, and VERSION_1 always on
/// a modern interface. The caller sets up queues and then calls [`driver_ok`].
pub fn negotiate(transport: &mut (impl Transport + ?Sized), wanted: Features) -> Result<Features, TransportError> {
    transport.set_status(Status::ACKNOWLEDGE)?;
    transport.set_status(Status::ACKNOWLEDGE | Status::DRIVER)?;
    let offered = transport.device_features()?;
    let mut accepted = offered & wanted;
    if transport.is_legacy() {
        transport.set_driver_features(accepted)?;
        return Ok(accepted);
    }
    if !offered.contains(Features::VERSION_1) {
        return Err(TransportError::FeaturesMissing(Features::VERSION_1));
    }
    accepted |= Features::VERSION_1;
    transport.set_driver_features(accepted)?;
    let status = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
    transport.set_status(status)?;
    if !transport.status()?.contains(Status::FEATURES_OK) {
        transport.set_status(status | Status::FAILED)?;
        return Err(TransportError::FeaturesRefused(accepted));
    }
    Ok(accepted)
}

/// Tells the device that the driver is ready (3.1.1, step 8).
pub fn driver_ok(transport: &mut (impl Transport + ?Sized)) -> Result<(), TransportError> {
    let status = transport.status()?;
    transport.set_status(status | Status::DRIVER_OK)
}

/// Wants the device suspended, if VIRTIO_F_SUSPEND was accepted (3.4 Device Suspend): from now on until
/// [`resume`] the driver makes nothing available, notifies no queue and writes no configuration. Whether the device is
/// suspended, which may take until it has finished what is in flight: read the status until SUSPEND shows, or
/// DEVICE_NEEDS_RESET says that it failed.
pub fn suspend(transport: &mut (impl Transport + ?Sized)) -> Result<(), TransportError> {
    let status = transport.status()?;
    transport.set_status(status | Status::SUSPEND)
}

/// Wants a suspended device to run again; it does when DRIVER_OK shows again and SUSPEND does not.
pub fn resume(transport: &mut (impl Transport + ?Sized)) -> Result<(), TransportError> {
    let status = transport.status()?;
    transport.set_status(status | Status::DRIVER_OK)
}

/// Reads configuration that the device may change meanwhile (2.5.1): reads again until the generation stays the same,
/// at most [`CONFIG_READ_ATTEMPTS`] times.
pub fn read_config(
    transport: &mut (impl Transport + ?Sized),
    offset: u32,
    data: &mut [u8],
) -> Result<(), TransportError> {
    let mut before = transport.config_generation()?;
    for _ in 0..CONFIG_READ_ATTEMPTS {
        transport.read_config(offset, data)?;
        let after = transport.config_generation()?;
        if before == after {
            return Ok(());
        }
        before = after;
    }
    Err(TransportError::ConfigUnstable)
}
