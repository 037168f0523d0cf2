//! `/dev/xen/evtchn`: event channels.
//!
//! Reading gives a port that has an event and is masked from then on; writing a port unmasks it.
#![allow(unsafe_code)]

use std::ffi::c_ulong;
use std::fs::File;
use std::io::{self, Read as _, Write as _};

use polyvirt_core::hypervisor::HypervisorError;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::abi::{
    BindInterdomain, BindUnboundPort, EVTCHN_BIND_INTERDOMAIN, EVTCHN_BIND_UNBOUND_PORT, EVTCHN_NOTIFY, EVTCHN_UNBIND,
    Port,
};
use super::{Stop, open, refused};

/// The device. What this handle bound is closed with it.
pub(super) struct Evtchn {
    file: File,
}

impl From<File> for Evtchn {
    fn from(file: File) -> Self {
        Self { file }
    }
}

impl Evtchn {
    pub(super) fn open() -> Result<Self, HypervisorError> {
        Ok(open("evtchn")?.into())
    }

    /// For others to send and to wait for events.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn alloc_unbound(&self, remote: u16) -> Result<u32, HypervisorError> {
        let bind = BindUnboundPort { remote_domain: remote.into() };
        self.call("EVTCHNOP_alloc_unbound", EVTCHN_BIND_UNBOUND_PORT, &bind)
    }

    pub(super) fn bind_interdomain(&self, remote: u16, port: u32) -> Result<u32, HypervisorError> {
        let bind = BindInterdomain { remote_domain: remote.into(), remote_port: port };
        self.call("EVTCHNOP_bind_interdomain", EVTCHN_BIND_INTERDOMAIN, &bind)
    }

    pub(super) fn send(&self, port: u32) -> Result<(), HypervisorError> {
        self.call("EVTCHNOP_send", EVTCHN_NOTIFY, &Port { port }).map(drop)
    }

    pub(super) fn close(&self, port: u32) -> Result<(), HypervisorError> {
        self.call("EVTCHNOP_close", EVTCHN_UNBIND, &Port { port }).map(drop)
    }

    /// Waits for an event; none once `stop` is set.
    pub(super) fn next_event(&self, stop: &Stop) -> Option<u32> {
        let mut port = [0; 4];
        while stop.wait_for(&self.file) {
            match (&self.file).read(&mut port) {
                Ok(4) => return Some(u32::from_ne_bytes(port)),
                Err(error) if again(&error) => {}
                other => {
                    tracing::error!(?other, "no event can be read any more");
                    return None;
                }
            }
        }
        None
    }

    /// A port that is not open is not refused: the kernel ignores it.
    pub(super) fn unmask(&self, port: u32) -> Result<(), HypervisorError> {
        (&self.file).write_all(&port.to_ne_bytes()).map_err(|error| refused("EVTCHNOP_unmask", error))
    }

    /// Makes an ioctl, whose result is a port or 0.
    fn call<T>(&self, name: &'static str, number: c_ulong, argument: &T) -> Result<u32, HypervisorError> {
        // SAFETY: the numbers above carry the size of the structure they are used with, and these ioctls only read it.
        let result = unsafe { ioctl_with_ref(&self.file, number, argument) };
        u32::try_from(result).map_err(|_| refused(name, io::Error::last_os_error()))
    }
}

/// Nothing was there after all, or a signal came.
pub(super) fn again(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
