//! What xenstored tells of domains that end.

use polyvirt_core::hypervisor::HypervisorError;

use super::super::xenbus::Xenbus;
use super::super::{Stop, refused};
use crate::xen::wire::{HEADER_LEN, PAYLOAD_MAX, header, message, parse_header};

/// The watch: a name that is no node, and a token.
const WATCH: &[u8] = b"@releaseDomain\0release\0";

/// A connection of its own to xenstored, on which nothing comes but that some domain has ended.
pub(super) struct Releases {
    xenbus: Xenbus,
}

impl Releases {
    pub(super) fn open() -> Result<Self, HypervisorError> {
        let xenbus = Xenbus::open()?;
        xenbus.send(&[&header(message::WATCH, 0, 0, WATCH.len()), WATCH].concat())?;
        Ok(Self { xenbus })
    }

    /// Waits until a domain, whichever, has ended; it may also return for nothing. False once `stop` is set, or if
    /// xenstored cannot be heard any more.
    pub(super) fn wait(&self, stop: &Stop) -> bool {
        let mut head = [0; HEADER_LEN];
        if !self.xenbus.receive(&mut head, stop) {
            return false;
        }
        let [kind, _, _, len] = parse_header(&head);
        let mut payload = vec![0; (len as usize).min(PAYLOAD_MAX)];
        if payload.len() < len as usize || !self.xenbus.receive(&mut payload, stop) {
            return false;
        }
        if kind == message::ERROR {
            let error = refused("XS_WATCH", String::from_utf8_lossy(&payload));
            tracing::error!(%error, "the domain's end will not be noticed");
            return false;
        }
        true
    }
}
