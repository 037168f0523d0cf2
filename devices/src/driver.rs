//! What all drivers share.

use core::future::poll_fn;
use core::task::{Context, Poll};
use core::time::Duration;

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::queue::{AddError, Buffer, DriverQueue, QueueError};
use polyvirt_core::transport::{BlockingTransport, Transport, TransportError, WakingTransport, try_reset};

/// How long a driver waits for its device before it gives up.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(10);

/// How often a future looks again, in one turn, for something that a device said is there.
const TURNS: u32 = 16;

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
pub(crate) fn expect_type(transport: &impl Transport, expected: u32) -> Result<(), DriverError> {
    let found = transport.device_type();
    if found == expected { Ok(()) } else { Err(DriverError::Type { expected, found }) }
}

/// Takes the device of a driver that is dropped away from its memory. False if that takes longer than there is time for:
/// then the memory must not go back to the guest.
pub(crate) fn let_go(transport: &mut impl Transport) -> bool {
    match try_reset(transport) {
        Ok(done) => done,
        // There is no device any more that could use it.
        Err(error) => {
            tracing::debug!(%error, "the device was not reset");
            true
        }
    }
}

/// A driver of whose calls that do not wait others are made that do.
pub(crate) trait Polled {
    /// What it drives through.
    type Transport;

    /// What interrupts it, and how long it waits for that at most.
    fn waits_for(&mut self) -> (&mut Self::Transport, Duration);
}

/// Calls `poll` until something has come, and waits in between: for the interrupt that `arm` asks for, unless something has
/// come already.
pub(crate) fn block_on<D: Polled<Transport: BlockingTransport>, R>(
    driver: &mut D,
    arm: impl Fn(&mut D) -> bool,
    mut poll: impl FnMut(&mut D) -> Result<Option<R>, DriverError>,
) -> Result<R, DriverError> {
    loop {
        if let Some(result) = poll(driver)? {
            return Ok(result);
        }
        if arm(driver) {
            let (transport, watchdog) = driver.waits_for();
            transport.wait(watchdog)?;
        }
    }
}

/// As [`block_on`], but a task is woken where that waits. Who drops the future loses nothing: what has not come yet comes to
/// whoever polls next.
pub(crate) async fn come<D: Polled<Transport: WakingTransport>, R>(
    driver: &mut D,
    arm: impl Fn(&mut D) -> bool,
    mut poll: impl FnMut(&mut D) -> Result<Option<R>, DriverError>,
) -> Result<R, DriverError> {
    let mut step = |context: &mut Context<'_>| {
        for _ in 0..TURNS {
            // What came before it is asked for the next interrupt is not the one that is slept for.
            driver.waits_for().0.take_interrupts()?;
            if let Some(result) = poll(driver)? {
                return Ok(Poll::Ready(result));
            }
            if arm(driver) {
                driver.waits_for().0.wake_on_interrupt(context.waker())?;
                return Ok(Poll::Pending);
            }
        }
        // A device that always has something, but never anything of use: the other tasks have a turn.
        context.waker().wake_by_ref();
        Ok(Poll::Pending)
    };
    poll_fn(|context| step(context).map_or_else(|error| Poll::Ready(Err(error)), |done| done.map(Ok))).await
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
