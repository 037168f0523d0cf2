//! Calls that wait, made from those that do not: the only place where a driver's side of a transport does.

use alloc::boxed::Box;
use core::time::Duration;

use super::{Interrupts, Transport, TransportError, negotiate};
use crate::features::Features;

/// How often it is looked whether the device did what it was asked, and how long the driver pauses in between.
const ATTEMPTS: u32 = 1000;
const PAUSE: Duration = Duration::from_millis(1);

/// A transport over a guest that can wait: what it adds is [`sleep`](Self::sleep) and [`pause`](Self::pause), and the rest
/// follows from them.
pub trait BlockingTransport: Transport {
    /// Sleeps until the device has interrupted, or may have, and leaves the interrupt to
    /// [`take_interrupts`](Transport::take_interrupts); false if nothing came in `most`. What came before ends it at once.
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError>;

    /// Sleeps for `time`, whatever comes.
    fn pause(&mut self, time: Duration) -> Result<(), TransportError>;

    /// Waits for an interrupt and takes it; [`TransportError::Watchdog`] if none comes. It may be about nothing: others
    /// may have the same line.
    fn wait(&mut self, watchdog: Duration) -> Result<Interrupts, TransportError> {
        let came = self.take_interrupts()?;
        if !came.is_empty() {
            return Ok(came);
        }
        match self.sleep(watchdog)? {
            true => self.take_interrupts(),
            false => Err(TransportError::Watchdog(watchdog, "an interrupt")),
        }
    }

    /// Resets the device and waits until it says so. Buffers are the driver's again afterwards.
    fn reset(&mut self) -> Result<(), TransportError> {
        self.begin_reset()?;
        settle(self, "the reset", |transport| transport.poll_reset())
    }

    /// Resets queue `index` alone (VIRTIO_F_RING_RESET) and waits until it is; [`Transport::find_vq`] enables it again.
    fn reset_vq(&mut self, index: u16) -> Result<(), TransportError> {
        self.begin_vq_reset(index)?;
        settle(self, "the reset of a queue", |transport| transport.poll_vq_reset(index))
    }
}

impl<T: BlockingTransport + ?Sized> BlockingTransport for Box<T> {
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError> {
        (**self).sleep(most)
    }

    fn pause(&mut self, time: Duration) -> Result<(), TransportError> {
        (**self).pause(time)
    }

    fn wait(&mut self, watchdog: Duration) -> Result<Interrupts, TransportError> {
        (**self).wait(watchdog)
    }

    fn reset(&mut self) -> Result<(), TransportError> {
        (**self).reset()
    }

    fn reset_vq(&mut self, index: u16) -> Result<(), TransportError> {
        (**self).reset_vq(index)
    }
}

/// Waits until `done`.
fn settle<T: BlockingTransport + ?Sized>(
    transport: &mut T,
    what: &'static str,
    mut done: impl FnMut(&mut T) -> Result<bool, TransportError>,
) -> Result<(), TransportError> {
    for _ in 0..ATTEMPTS {
        if done(transport)? {
            return Ok(());
        }
        transport.pause(PAUSE)?;
    }
    Err(TransportError::Watchdog(PAUSE * ATTEMPTS, what))
}

/// Initializes the device up to the point where queues are set up (3.1.1, steps 1 to 6): resets it, waits until it is, and
/// [`negotiate`]s.
pub fn initialize(
    transport: &mut (impl BlockingTransport + ?Sized),
    wanted: Features,
) -> Result<Features, TransportError> {
    transport.reset()?;
    negotiate(transport, wanted)
}
