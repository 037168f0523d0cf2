//! The driver: one buffer at a time.

use alloc::boxed::Box;
use core::time::Duration;

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::queue::{Buffer, DriverQueue};
use polyvirt_core::shared::Shared;
use polyvirt_core::transport::{self, Transport};

use super::wire;
use crate::driver::{DriverError, WATCHDOG, add, expect_type, wait_used};

/// Bytes asked for at once.
const BUFFER: usize = 4096;

/// The driver of an entropy device.
pub struct Driver {
    transport: Box<dyn Transport>,
    queue: DriverQueue<()>,
    buffer: Shared,
    watchdog: Duration,
}

impl Driver {
    /// Takes the device behind `transport` into use.
    pub fn new(mut transport: Box<dyn Transport>) -> Result<Self, DriverError> {
        expect_type(&*transport, wire::DEVICE_TYPE)?;
        transport::initialize(&mut *transport, Features::EVENT_IDX | Features::RING_PACKED)?;
        let queue = DriverQueue::new(transport.find_vq(0, None)?)?;
        let buffer = Shared::new(&transport.share(), BUFFER, Access::WRITE)?;
        transport::driver_ok(&mut *transport)?;
        Ok(Self { transport, queue, buffer, watchdog: WATCHDOG })
    }

    /// How long to wait for an answer before giving up.
    pub fn set_watchdog(&mut self, watchdog: Duration) {
        self.watchdog = watchdog;
    }

    /// The transport, for what is not the driver's business.
    pub fn transport(&mut self) -> &mut dyn Transport {
        &mut *self.transport
    }

    /// Fills `bytes` with entropy, in as many requests as it takes.
    pub fn fill(&mut self, bytes: &mut [u8]) -> Result<(), DriverError> {
        let mut done = 0;
        while done < bytes.len() {
            let want = (bytes.len() - done).min(BUFFER);
            let buffer = Buffer { address: self.buffer.address(), len: want as u32 };
            add(&mut self.queue, &[], &[buffer], ())?;
            self.queue.kick()?;
            let ((), len) = wait_used(&mut *self.transport, &mut self.queue, self.watchdog)?;
            // At least one byte, says 5.4.6.1; and the queue has checked that it is no more than there is room for.
            if len == 0 {
                return Err(DriverError::Status("a buffer without entropy"));
            }
            let len = (len as usize).min(want);
            let _ = self.buffer.pages().read(0, &mut bytes[done..done + len]);
            done += len;
        }
        Ok(())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The device must not write to memory that goes back to the guest.
        if let Err(error) = self.transport.reset() {
            tracing::debug!(%error, "the device was not reset");
        }
    }
}
