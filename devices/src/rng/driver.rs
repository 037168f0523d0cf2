//! The driver: one buffer at a time.

use alloc::boxed::Box;
use core::time::Duration;

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::queue::{Buffer, DriverQueue};
use polyvirt_core::shared::Shared;
use polyvirt_core::transport::{self, BlockingTransport, Transport, WakingTransport};

use super::wire;
use crate::driver::{DriverError, Polled, WATCHDOG, add, block_on, come, expect_type, let_go};

/// Bytes asked for at once.
const BUFFER: usize = 4096;

/// The driver of an entropy device.
pub struct Driver<T: Transport = Box<dyn BlockingTransport>> {
    transport: T,
    queue: DriverQueue<()>,
    buffer: Shared,
    /// How many bytes were asked for and have not come.
    asked: Option<usize>,
    watchdog: Duration,
}

impl<T: BlockingTransport> Driver<T> {
    /// Resets the device behind `transport`, waits until it is, and takes it into use.
    pub fn new(mut transport: T) -> Result<Self, DriverError> {
        expect_type(&transport, wire::DEVICE_TYPE)?;
        transport.reset()?;
        Self::start(transport)
    }

    /// Fills `bytes` with entropy, in as many requests as it takes.
    pub fn fill(&mut self, bytes: &mut [u8]) -> Result<(), DriverError> {
        let mut done = 0;
        while done < bytes.len() {
            self.submit(bytes.len() - done)?;
            done += block_on(self, Self::arm, |driver| driver.poll(&mut bytes[done..]))?;
        }
        Ok(())
    }
}

impl<T: WakingTransport> Driver<T> {
    /// Asks for entropy until `bytes` is full. Who drops the future before has asked for what the next call brings.
    pub async fn filled(&mut self, bytes: &mut [u8]) -> Result<(), DriverError> {
        let mut done = 0;
        while done < bytes.len() {
            self.submit(bytes.len() - done)?;
            done += come(self, Self::arm, |driver| driver.poll(&mut bytes[done..])).await?;
        }
        Ok(())
    }
}

impl<T: Transport> Driver<T> {
    /// Takes the device behind `transport` into use, whose reset is done.
    pub fn start(mut transport: T) -> Result<Self, DriverError> {
        expect_type(&transport, wire::DEVICE_TYPE)?;
        transport::negotiate(&mut transport, Features::EVENT_IDX | Features::RING_PACKED)?;
        let queue = DriverQueue::new(transport.find_vq(0, None)?)?;
        let buffer = Shared::new(&transport.share(), BUFFER, Access::WRITE)?;
        transport::driver_ok(&mut transport)?;
        Ok(Self { transport, queue, buffer, asked: None, watchdog: WATCHDOG })
    }

    /// How long calls that wait do so before they give up.
    pub fn set_watchdog(&mut self, watchdog: Duration) {
        self.watchdog = watchdog;
    }

    /// The transport, for what is not the driver's business.
    pub fn transport(&mut self) -> &mut T {
        &mut self.transport
    }

    /// Asks for `len` bytes, or as many as there are in a request. False if what was asked for before has not come yet.
    pub fn submit(&mut self, len: usize) -> Result<bool, DriverError> {
        if self.asked.is_some() {
            return Ok(false);
        }
        let len = len.min(BUFFER);
        let buffer = Buffer { address: self.buffer.address(), len: len as u32 };
        add(&mut self.queue, &[], &[buffer], ())?;
        self.asked = Some(len);
        self.queue.kick()?;
        Ok(true)
    }

    /// Takes what has come, if it has: at the beginning of `into`, so many bytes. What does not fit is thrown away.
    pub fn poll(&mut self, into: &mut [u8]) -> Result<Option<usize>, DriverError> {
        let Some(((), len)) = self.queue.get_buf()? else { return Ok(None) };
        let asked = self.asked.take().unwrap_or(0);
        // At least one byte, says 5.4.6.1; and the queue has checked that it is no more than there is room for.
        if len == 0 {
            return Err(DriverError::Status("a buffer without entropy"));
        }
        let len = (len as usize).min(asked).min(into.len());
        let _ = self.buffer.pages().read(0, &mut into[..len]);
        Ok(Some(len))
    }

    /// Asks for an interrupt when something comes. False if something has come already.
    pub fn arm(&mut self) -> bool {
        self.queue.enable_cb()
    }
}

impl<T: Transport> Polled for Driver<T> {
    type Transport = T;

    fn waits_for(&mut self) -> (&mut T, Duration) {
        (&mut self.transport, self.watchdog)
    }
}

impl<T: Transport> Drop for Driver<T> {
    fn drop(&mut self) {
        if !let_go(&mut self.transport) {
            self.buffer.leak();
        }
    }
}
