//! The real calls.

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_transports::pci::Message;

use super::abi::{Calls, RANGES, Range, Request};
use crate::xen::sys::dm::{Foreign, Server};

/// A domain whose device model this process is.
pub struct Domain {
    server: Server,
    memory: Foreign,
}

impl Domain {
    pub(super) fn open(id: u16) -> Result<Self, HypervisorError> {
        Ok(Self { server: Server::new(id, &RANGES)?, memory: Foreign::new(id)? })
    }

    /// Waits until the domain is gone: true; or until its host half was dropped.
    pub fn wait_for_its_end(&self) -> bool {
        self.server.wait_for_its_end()
    }
}

impl Calls for Domain {
    type Memory = Foreign;

    fn memory(&self) -> Foreign {
        self.memory.clone()
    }

    fn invalidate(&self) -> Result<(), HypervisorError> {
        self.memory.invalidate()
    }

    fn claim(&self, range: Range) -> Result<(), HypervisorError> {
        self.server.claim(range)
    }

    fn inject_msi(&self, message: Message) -> Result<(), HypervisorError> {
        self.server.inject_msi(message.address, message.data)
    }

    fn next(&self) -> Option<(usize, Request)> {
        self.server.next()
    }

    fn answer(&self, processor: usize, data: u64) -> Result<(), HypervisorError> {
        self.server.answer(processor, data)
    }

    fn stop(&self) {
        self.server.stop();
    }
}
