//! `/dev/xen/xenbus`: xenstore, through the kernel, which passes messages on as they are.

use std::fs::File;
use std::io::{Read as _, Write as _};

use polyvirt_core::hypervisor::HypervisorError;

use super::evtchn::again;
use super::{Stop, open, refused};

/// A connection to xenstored. Its watches end with it.
pub(super) struct Xenbus {
    file: File,
}

impl Xenbus {
    pub(super) fn open() -> Result<Self, HypervisorError> {
        Ok(Self { file: open("xenbus")? })
    }

    pub(super) fn send(&self, bytes: &[u8]) -> Result<(), HypervisorError> {
        (&self.file).write_all(bytes).map_err(|error| refused("xenstore", error))
    }

    /// Waits for as many bytes as `bytes` holds; false once `stop` is set, or if no more will come.
    pub(super) fn receive(&self, bytes: &mut [u8], stop: &Stop) -> bool {
        let mut rest = bytes;
        while !rest.is_empty() {
            if !stop.wait_for(&self.file) {
                return false;
            }
            match (&self.file).read(rest) {
                Ok(0) => return false,
                Ok(count) => rest = &mut std::mem::take(&mut rest)[count..],
                Err(error) if again(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "xenstored cannot be heard any more");
                    return false;
                }
            }
        }
        true
    }
}
