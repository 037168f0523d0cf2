//! `/dev/xen/xenbus`: xenstore, through the kernel, which passes messages on as they are.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::sync::Mutex;

use polyvirt_core::hypervisor::HypervisorError;

use super::super::lock;
use super::super::wire::{HEADER_LEN, PAYLOAD_MAX};
use super::evtchn::again;
use super::{Stop, open, refused};

/// A connection to xenstored. Its watches end with it.
pub(super) struct Xenbus {
    file: File,
    /// What was read and nobody has taken yet.
    read: Mutex<VecDeque<u8>>,
}

impl Xenbus {
    pub(super) fn open() -> Result<Self, HypervisorError> {
        Ok(Self { file: open("xenbus")?, read: Mutex::default() })
    }

    pub(super) fn send(&self, bytes: &[u8]) -> Result<(), HypervisorError> {
        (&self.file).write_all(bytes).map_err(|error| refused("xenstore", error))
    }

    /// Waits for as many bytes as `bytes` holds; false once `stop` is set, or if no more will come.
    pub(super) fn receive(&self, bytes: &mut [u8], stop: &Stop) -> bool {
        let mut read = lock(&self.read);
        let mut piece = [0; HEADER_LEN + PAYLOAD_MAX];
        while read.len() < bytes.len() {
            if !stop.wait_for(&self.file) {
                return false;
            }
            match (&self.file).read(&mut piece) {
                Ok(0) => return false,
                Ok(count) => read.extend(&piece[..count]),
                Err(error) if again(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "xenstored cannot be heard any more");
                    return false;
                }
            }
        }
        bytes.fill_with(|| read.pop_front().unwrap_or(0));
        true
    }
}
