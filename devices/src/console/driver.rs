//! The driver: one piece at a time goes out, and what has come waits to be taken.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::queue::{Buffer, DriverQueue};
use polyvirt_core::shared::Shared;
use polyvirt_core::transport::{self, BlockingTransport, Transport, WakingTransport};

use super::wire;
use crate::driver::{DriverError, Polled, WATCHDOG, add, block_on, come, expect_type, let_go};

/// Bytes of a buffer.
const BUFFER: usize = 4096;
/// Receive buffers that the device always has.
const RECEIVE_BUFFERS: usize = 4;

/// The driver of a console.
pub struct Driver<T: Transport = Box<dyn BlockingTransport>> {
    transport: T,
    receive: DriverQueue<usize>,
    transmit: DriverQueue<()>,
    incoming: Vec<Shared>,
    outgoing: Shared,
    /// Whether something is on its way out.
    sending: bool,
    received: VecDeque<u8>,
    features: Features,
    watchdog: Duration,
}

impl<T: BlockingTransport> Driver<T> {
    /// Resets the device behind `transport`, waits until it is, and takes it into use.
    pub fn new(mut transport: T) -> Result<Self, DriverError> {
        expect_type(&transport, wire::DEVICE_TYPE)?;
        transport.reset()?;
        Self::start(transport)
    }

    /// Writes all of `bytes`, and waits until they are out.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), DriverError> {
        let mut rest = bytes;
        loop {
            // What was submitted before is out first.
            block_on(self, Self::arm_sent, |driver| Ok(driver.poll_sent()?.then_some(())))?;
            if rest.is_empty() {
                return Ok(());
            }
            rest = &rest[self.submit(rest)?..];
        }
    }

    /// Reads what has come, at most `into.len()` bytes; waits for the first.
    pub fn read(&mut self, into: &mut [u8]) -> Result<usize, DriverError> {
        if into.is_empty() {
            return self.poll(into);
        }
        block_on(self, Self::arm, |driver| Ok(Some(driver.poll(into)?).filter(|&count| count > 0)))
    }
}

impl<T: WakingTransport> Driver<T> {
    /// Sends all of `bytes`, until they are out. Who drops the future before does not know how much of it is.
    pub async fn sent(&mut self, bytes: &[u8]) -> Result<(), DriverError> {
        let mut rest = bytes;
        loop {
            // What was submitted before is out first.
            come(self, Self::arm_sent, |driver| Ok(driver.poll_sent()?.then_some(()))).await?;
            if rest.is_empty() {
                return Ok(());
            }
            rest = &rest[self.submit(rest)?..];
        }
    }

    /// What has come, at most `into.len()` bytes, as soon as something has.
    pub async fn received(&mut self, into: &mut [u8]) -> Result<usize, DriverError> {
        if into.is_empty() {
            return self.poll(into);
        }
        come(self, Self::arm, |driver| Ok(Some(driver.poll(into)?).filter(|&count| count > 0))).await
    }
}

impl<T: Transport> Driver<T> {
    /// Takes the device behind `transport` into use, whose reset is done.
    pub fn start(mut transport: T) -> Result<Self, DriverError> {
        expect_type(&transport, wire::DEVICE_TYPE)?;
        let wanted = wire::SIZE | wire::EMERG_WRITE | Features::EVENT_IDX | Features::RING_PACKED;
        let features = transport::negotiate(&mut transport, wanted)?;
        let receive = DriverQueue::new(transport.find_vq(wire::RECEIVE, None)?)?;
        let transmit = DriverQueue::new(transport.find_vq(wire::TRANSMIT, None)?)?;
        let share = transport.share();
        let incoming = (0..RECEIVE_BUFFERS).map(|_| Shared::new(&share, BUFFER, Access::WRITE));
        let incoming = incoming.collect::<Result<_, _>>()?;
        let outgoing = Shared::new(&share, BUFFER, Access::READ)?;
        transport::driver_ok(&mut transport)?;
        let (sending, received, watchdog) = (false, VecDeque::new(), WATCHDOG);
        let mut driver =
            Self { transport, receive, transmit, incoming, outgoing, sending, received, features, watchdog };
        for index in 0..RECEIVE_BUFFERS {
            driver.give(index)?;
        }
        driver.receive.kick()?;
        Ok(driver)
    }

    /// How long calls that wait do so before they give up.
    pub fn set_watchdog(&mut self, watchdog: Duration) {
        self.watchdog = watchdog;
    }

    /// The transport, for what is not the driver's business.
    pub fn transport(&mut self) -> &mut T {
        &mut self.transport
    }

    /// Columns and rows, if the device says.
    pub fn size(&mut self) -> Result<Option<(u16, u16)>, DriverError> {
        if !self.features.contains(wire::SIZE) {
            return Ok(None);
        }
        let mut bytes = [0; 4];
        transport::read_config(&mut self.transport, wire::COLUMNS as u32, &mut bytes)?;
        let [a, b, c, d] = bytes;
        Ok(Some((u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))))
    }

    /// Writes one character through the configuration, which needs no queue.
    pub fn emergency_write(&mut self, character: u8) -> Result<(), DriverError> {
        if !self.features.contains(wire::EMERG_WRITE) {
            return Err(DriverError::Unsupported("the device has no emergency write"));
        }
        Ok(self.transport.write_config(wire::EMERGENCY as u32, &u32::from(character).to_le_bytes())?)
    }

    /// Sends the beginning of `bytes`, and says how much that is: nothing while what was sent before is not out.
    pub fn submit(&mut self, bytes: &[u8]) -> Result<usize, DriverError> {
        let len = bytes.len().min(BUFFER);
        if len == 0 || !self.poll_sent()? {
            return Ok(0);
        }
        let _ = self.outgoing.pages().write(0, &bytes[..len]);
        let buffer = Buffer { address: self.outgoing.address(), len: len as u32 };
        add(&mut self.transmit, &[buffer], &[], ())?;
        self.sending = true;
        self.transmit.kick()?;
        Ok(len)
    }

    /// Whether all that was sent is out.
    pub fn poll_sent(&mut self) -> Result<bool, DriverError> {
        if self.sending && self.transmit.get_buf()?.is_some() {
            self.sending = false;
        }
        Ok(!self.sending)
    }

    /// Asks for an interrupt when what was sent is out. False if it is out already.
    pub fn arm_sent(&mut self) -> bool {
        self.transmit.enable_cb()
    }

    /// Takes what has come, at most `into.len()` bytes.
    pub fn poll(&mut self, into: &mut [u8]) -> Result<usize, DriverError> {
        self.collect()?;
        let count = into.len().min(self.received.len());
        for (to, from) in into.iter_mut().zip(self.received.drain(..count)) {
            *to = from;
        }
        Ok(count)
    }

    /// Asks for an interrupt when something comes. False if something has come already.
    pub fn arm(&mut self) -> bool {
        self.receive.enable_cb()
    }

    /// Takes what is in used receive buffers, and gives them back to the device.
    fn collect(&mut self) -> Result<(), DriverError> {
        let mut any = false;
        // What the device can give at once is bounded by the buffers it has.
        for _ in 0..RECEIVE_BUFFERS {
            let Some((index, len)) = self.receive.get_buf()? else { break };
            let mut bytes = vec![0; len as usize];
            let _ = self.incoming[index].pages().read(0, &mut bytes);
            self.received.extend(bytes);
            self.give(index)?;
            any = true;
        }
        if any {
            self.receive.kick()?;
        }
        Ok(())
    }

    fn give(&mut self, index: usize) -> Result<(), DriverError> {
        let buffer = Buffer { address: self.incoming[index].address(), len: BUFFER as u32 };
        add(&mut self.receive, &[], &[buffer], index)
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
            self.incoming.iter_mut().chain([&mut self.outgoing]).for_each(Shared::leak);
        }
    }
}
