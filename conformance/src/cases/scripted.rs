//! A device that misbehaves on purpose, for cases about the driver: a real one behind a transport that lies.

use std::sync::Arc;
use std::time::Duration;

use polyvirt_core::hypervisor::Share;
use polyvirt_core::transport::{BlockingTransport, Interrupts, Transport, TransportError, Virtqueue};
use polyvirt_core::{Features, Status};

use crate::suite::Recorded;

/// What the transport lies about.
#[derive(Clone, Copy, Debug, Default)]
pub struct Script {
    /// What is offered.
    pub offered: Option<Features>,
    /// FEATURES_OK never stays.
    pub no_features_ok: bool,
    /// Another generation at every read; counts them.
    pub generation: Option<u32>,
    /// The largest size of every queue.
    pub max_size: Option<u16>,
}

/// A transport that lies as its script says.
pub struct Scripted {
    inner: Recorded,
    /// What it lies about.
    pub script: Script,
}

impl Scripted {
    /// Lies on behalf of `inner`.
    pub fn new(inner: Recorded, script: Script) -> Self {
        Self { inner, script }
    }
}

impl Transport for Scripted {
    fn device_type(&self) -> u32 {
        self.inner.device_type()
    }

    fn is_legacy(&self) -> bool {
        self.inner.is_legacy()
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        let offered = self.inner.device_features()?;
        Ok(self.script.offered.unwrap_or(offered))
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        self.inner.set_driver_features(features)
    }

    fn status(&mut self) -> Result<Status, TransportError> {
        let status = self.inner.status()?;
        Ok(if self.script.no_features_ok { status & !Status::FEATURES_OK } else { status })
    }

    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        self.inner.set_status(status)
    }

    fn begin_reset(&mut self) -> Result<(), TransportError> {
        self.inner.begin_reset()
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        self.inner.poll_reset()
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        match &mut self.script.generation {
            Some(generation) => {
                *generation += 1;
                Ok(*generation)
            }
            None => self.inner.config_generation(),
        }
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        match self.script.generation {
            // What is read does not matter when it never settles, and not every device has configuration.
            Some(_) => Ok(()),
            None => self.inner.read_config(offset, data),
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        self.inner.write_config(offset, data)
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        let honest = self.inner.queue_max_size(index)?;
        Ok(self.script.max_size.unwrap_or(honest))
    }

    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError> {
        self.inner.find_vq(index, size)
    }

    fn begin_vq_reset(&mut self, index: u16) -> Result<(), TransportError> {
        self.inner.begin_vq_reset(index)
    }

    fn poll_vq_reset(&mut self, index: u16) -> Result<bool, TransportError> {
        self.inner.poll_vq_reset(index)
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        self.inner.take_interrupts()
    }

    fn share(&self) -> Arc<dyn Share> {
        self.inner.share()
    }
}

impl BlockingTransport for Scripted {
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError> {
        self.inner.sleep(most)
    }

    fn pause(&mut self, time: Duration) -> Result<(), TransportError> {
        self.inner.pause(time)
    }
}
