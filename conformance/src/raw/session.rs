//! What cases do with a device and its raw rings.

use std::time::{Duration, Instant};

use polyvirt_core::transport::{BlockingTransport, Transport, TransportError, driver_ok, initialize};
use polyvirt_core::{Features, Status};

use super::Ring;
use crate::suite::{Objection, Session};

impl Session {
    /// How many queues a case uses.
    pub fn queues(&self) -> u16 {
        if self.cell.device_type == crate::suite::CONSOLE { 2 } else { 1 }
    }

    /// Initializes the device up to FEATURES_OK, with those of `wanted` that it offers and with the cell's format of
    /// rings.
    pub fn negotiate(&mut self, wanted: Features) -> Result<Features, Objection> {
        let format = self.cell.ring.feature();
        let accepted = initialize(&mut self.transport, wanted.difference(Features::RING_PACKED) | format)?;
        match accepted.contains(format) {
            true => Ok(accepted),
            false => Err(Objection::failed("the device offers VIRTIO_F_RING_PACKED", "it does not")),
        }
    }

    /// Sets up queue `index` with its largest size.
    pub fn ring(&mut self, index: u16) -> Result<Ring, Objection> {
        self.ring_of(index, None)
    }

    /// Sets up queue `index` with `size` entries.
    pub fn ring_of(&mut self, index: u16, size: Option<u16>) -> Result<Ring, Objection> {
        let virtqueue = self.transport.find_vq(index, size)?;
        Ring::new(virtqueue, index, self.trace.clone())
    }

    /// Sets up all queues.
    pub fn rings(&mut self) -> Result<Vec<Ring>, Objection> {
        (0..self.queues()).map(|index| self.ring(index)).collect()
    }

    /// Tells the device that the driver is ready.
    pub fn go(&mut self) -> Result<(), Objection> {
        Ok(driver_ok(&mut self.transport)?)
    }

    /// All of the above: a running device with those of `wanted` that it offers.
    pub fn bring_up(&mut self, wanted: Features) -> Result<Vec<Ring>, Objection> {
        self.negotiate(wanted)?;
        let rings = self.rings()?;
        self.go()?;
        Ok(rings)
    }

    /// Whether the device says that it needs a reset.
    pub fn needs_reset(&mut self) -> Result<bool, Objection> {
        Ok(self.transport.status()?.contains(Status::DEVICE_NEEDS_RESET))
    }

    /// Waits, by interrupts, for the next used element of `ring`.
    pub fn wait_used(&mut self, ring: &mut Ring) -> Result<(u32, u32), Objection> {
        let expected = "the buffer is used, and an interrupt tells so";
        loop {
            if ring.config.event_idx && !ring.has_used() {
                ring.want_interrupt_after(0, 1);
            }
            if let Some(element) = ring.take() {
                return Ok(element);
            }
            match self.transport.wait(self.watchdog) {
                // Looked at again behind the status: what was used before the device gave up is there then.
                Ok(_) if !ring.has_used() && self.needs_reset()? && !ring.has_used() => {
                    return Err(Objection::failed(expected, "the device needs a reset"));
                }
                Ok(_) => {}
                Err(TransportError::Watchdog(..)) => {
                    let observed = match ring.take() {
                        Some(_) => "the buffer was used, but no interrupt came",
                        None => "the buffer was not used",
                    };
                    return Err(Objection::failed(expected, format!("{observed} in {:?}", self.watchdog)));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for the next used element of `ring` by looking at the ring alone.
    pub fn poll_used(&mut self, ring: &mut Ring) -> Result<(u32, u32), Objection> {
        let begun = Instant::now();
        loop {
            if let Some(element) = ring.take() {
                return Ok(element);
            }
            if begun.elapsed() > self.watchdog {
                return Err(Objection::failed("the buffer is used", format!("it was not in {:?}", self.watchdog)));
            }
            std::thread::yield_now();
        }
    }

    /// Waits for any interrupt of a queue, without looking at rings.
    pub fn wait_interrupt(&mut self) -> Result<(), Objection> {
        loop {
            match self.transport.wait(self.watchdog) {
                Ok(interrupts) if !interrupts.queues.is_empty() => return Ok(()),
                Ok(_) => {}
                Err(TransportError::Watchdog(..)) => {
                    return Err(Objection::failed(
                        "a used buffer notification",
                        format!("none in {:?}", self.watchdog),
                    ));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for a change of the configuration to be told.
    pub fn wait_config(&mut self) -> Result<(), Objection> {
        let begun = Instant::now();
        loop {
            match self.transport.wait(self.watchdog) {
                Ok(interrupts) if interrupts.config => return Ok(()),
                Ok(_) if begun.elapsed() < self.watchdog => {}
                Ok(_) | Err(TransportError::Watchdog(..)) => {
                    let expected = "a configuration change notification";
                    return Err(Objection::failed(expected, format!("none in {:?}", self.watchdog)));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether an interrupt is pending, which is taken.
    pub fn interrupted(&mut self) -> Result<bool, Objection> {
        match self.transport.wait(Duration::ZERO) {
            Ok(interrupts) => Ok(!interrupts.is_empty()),
            Err(TransportError::Watchdog(..)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
