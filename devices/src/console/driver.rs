//! The driver: writes wait until they are out, reads take what has come.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;

use polyvirt_core::Features;
use polyvirt_core::memory::Access;
use polyvirt_core::queue::{Buffer, DriverQueue};
use polyvirt_core::shared::Shared;
use polyvirt_core::transport::{self, Transport};

use super::wire;
use crate::driver::{DriverError, WATCHDOG, add, expect_type, wait_used};

/// Bytes of a buffer.
const BUFFER: usize = 4096;
/// Receive buffers that the device always has.
const RECEIVE_BUFFERS: usize = 4;

/// The driver of a console.
pub struct Driver {
    transport: Box<dyn Transport>,
    receive: DriverQueue<usize>,
    transmit: DriverQueue<()>,
    incoming: Vec<Shared>,
    outgoing: Shared,
    received: VecDeque<u8>,
    features: Features,
    watchdog: Duration,
}

impl Driver {
    /// Takes the device behind `transport` into use.
    pub fn new(mut transport: Box<dyn Transport>) -> Result<Self, DriverError> {
        expect_type(&*transport, wire::DEVICE_TYPE)?;
        let wanted = wire::SIZE | wire::EMERG_WRITE | Features::EVENT_IDX | Features::RING_PACKED;
        let features = transport::initialize(&mut *transport, wanted)?;
        let receive = DriverQueue::new(transport.find_vq(wire::RECEIVE, None)?)?;
        let transmit = DriverQueue::new(transport.find_vq(wire::TRANSMIT, None)?)?;
        let share = transport.share();
        let incoming = (0..RECEIVE_BUFFERS).map(|_| Shared::new(&share, BUFFER, Access::WRITE));
        let incoming = incoming.collect::<Result<_, _>>()?;
        let outgoing = Shared::new(&share, BUFFER, Access::READ)?;
        transport::driver_ok(&mut *transport)?;
        let received = VecDeque::new();
        let watchdog = WATCHDOG;
        let mut driver = Self { transport, receive, transmit, incoming, outgoing, received, features, watchdog };
        for index in 0..RECEIVE_BUFFERS {
            driver.give(index)?;
        }
        driver.receive.kick()?;
        Ok(driver)
    }

    /// How long to wait before giving up.
    pub fn set_watchdog(&mut self, watchdog: Duration) {
        self.watchdog = watchdog;
    }

    /// The transport, for what is not the driver's business.
    pub fn transport(&mut self) -> &mut dyn Transport {
        &mut *self.transport
    }

    /// Columns and rows, if the device says.
    pub fn size(&mut self) -> Result<Option<(u16, u16)>, DriverError> {
        if !self.features.contains(wire::SIZE) {
            return Ok(None);
        }
        let mut bytes = [0; 4];
        transport::read_config(&mut *self.transport, wire::COLUMNS as u32, &mut bytes)?;
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

    /// Writes all of `bytes`.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), DriverError> {
        for piece in bytes.chunks(BUFFER) {
            let _ = self.outgoing.pages().write(0, piece);
            let buffer = Buffer { address: self.outgoing.address(), len: piece.len() as u32 };
            add(&mut self.transmit, &[buffer], &[], ())?;
            self.transmit.kick()?;
            wait_used(&mut *self.transport, &mut self.transmit, self.watchdog)?;
        }
        Ok(())
    }

    /// Reads what has come, at most `into.len()` bytes; waits for the first.
    pub fn read(&mut self, into: &mut [u8]) -> Result<usize, DriverError> {
        self.collect()?;
        while self.received.is_empty() && !into.is_empty() {
            if self.receive.enable_cb() {
                self.transport.wait(self.watchdog)?;
            }
            self.collect()?;
        }
        let count = into.len().min(self.received.len());
        for (to, from) in into.iter_mut().zip(self.received.drain(..count)) {
            *to = from;
        }
        Ok(count)
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

impl Drop for Driver {
    fn drop(&mut self) {
        // The device must not write to memory that goes back to the guest.
        if let Err(error) = self.transport.reset() {
            tracing::debug!(%error, "the device was not reset");
        }
    }
}
