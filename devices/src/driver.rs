//! What all drivers share.

use core::time::Duration;

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::queue::{AddError, Buffer, DriverQueue, QueueError};
use polyvirt_core::transport::{Transport, TransportError};

/// How long a driver waits for its device before it gives up.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(10);

/// Why a driver gave up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The transport failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The device broke its queue.
    #[error("the device broke its queue: {0}")]
    Queue(#[from] QueueError),
    /// There is no memory to share.
    #[error(transparent)]
    Memory(#[from] HypervisorError),
    /// The device is of another type.
    #[error("expected a device of type {expected}, found {found}")]
    Type {
        /// What the driver drives.
        expected: u32,
        /// What is there.
        found: u32,
    },
    /// The device answered a request with an error.
    #[error("the device answered {0}")]
    Status(&'static str),
    /// The caller asked for something that the device does not have.
    #[error("{0}")]
    Unsupported(&'static str),
}

/// Fails unless `transport` leads to a device of type `expected`.
pub(crate) fn expect_type(transport: &dyn Transport, expected: u32) -> Result<(), DriverError> {
    let found = transport.device_type();
    if found == expected { Ok(()) } else { Err(DriverError::Type { expected, found }) }
}

/// Takes back a used buffer, waiting for one if there is none.
pub(crate) fn wait_used<T>(
    transport: &mut dyn Transport,
    queue: &mut DriverQueue<T>,
    watchdog: Duration,
) -> Result<(T, u32), DriverError> {
    loop {
        if let Some(used) = queue.get_buf()? {
            return Ok(used);
        }
        if queue.enable_cb() {
            transport.wait(watchdog)?;
        }
    }
}

/// Adds a buffer to a queue that has room for it.
pub(crate) fn add<T>(
    queue: &mut DriverQueue<T>,
    readable: &[Buffer],
    writable: &[Buffer],
    token: T,
) -> Result<(), DriverError> {
    queue.add_buf(readable, writable, token).map_err(|error| match error {
        AddError::Full(_) | AddError::Pieces { .. } => DriverError::Unsupported("the queue is too short"),
        AddError::Broken(reason) => reason.into(),
        AddError::Notify(error) => error.into(),
    })
}
