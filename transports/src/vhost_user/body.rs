//! The payload of a request, checked as it is read.

use std::os::fd::OwnedFd;

use super::error::ServeError;
use super::events::Bell;
use super::messages::*;

/// The protocol feature that a message belongs to.
pub(super) fn needs(request: Request) -> Option<ProtocolFeatures> {
    use ProtocolFeatures as P;
    Some(match request {
        Request::GetQueueNum => P::MQ,
        Request::SetLogBase | Request::SetLogFd => P::LOG_SHMFD,
        Request::SetBackendReqFd => P::BACKEND_REQ,
        Request::GetConfig | Request::SetConfig => P::CONFIG,
        Request::GetInflightFd | Request::SetInflightFd => P::INFLIGHT_SHMFD,
        Request::ResetDevice => P::RESET_DEVICE,
        Request::VringKick => P::INBAND_NOTIFICATIONS,
        Request::GetMaxMemSlots | Request::AddMemReg | Request::RemMemReg => P::CONFIGURE_MEM_SLOTS,
        Request::SetStatus | Request::GetStatus => P::STATUS,
        _ => return None,
    })
}

/// The payload of a message, and what to say about it.
pub(super) struct Body<'a> {
    pub(super) request: Request,
    pub(super) payload: &'a [u8],
}

impl Body<'_> {
    pub(super) fn refused(&self, reason: impl ToString) -> ServeError {
        ServeError::Refused { request: self.request.name(), reason: reason.to_string() }
    }

    pub(super) fn size(&self, expected: usize) -> ServeError {
        ServeError::Size { request: self.request.name(), expected, got: self.payload.len() }
    }

    pub(super) fn descriptors(&self, fds: &[OwnedFd], expected: usize) -> Result<(), ServeError> {
        if fds.len() == expected {
            return Ok(());
        }
        Err(ServeError::Descriptors { request: self.request.name(), expected, got: fds.len() })
    }

    /// What rings by the file descriptor of a message, if it has one.
    pub(super) fn bell(&self, fd: Option<OwnedFd>) -> Result<Option<Bell>, ServeError> {
        fd.map(Bell::new).transpose().map_err(|error| self.refused(error))
    }

    pub(super) fn exactly(&self, len: usize) -> Result<(), ServeError> {
        if self.payload.len() == len { Ok(()) } else { Err(self.size(len)) }
    }

    pub(super) fn empty(&self) -> Result<(), ServeError> {
        self.exactly(0)
    }

    pub(super) fn fixed<T: Payload>(&self) -> Result<T, ServeError> {
        self.exactly(T::LEN)?;
        Ok(T::from_bytes(self.payload))
    }

    pub(super) fn number(&self) -> Result<u64, ServeError> {
        self.fixed()
    }

    /// A region, behind eight bytes of padding.
    pub(super) fn region(&self) -> Result<Region, ServeError> {
        self.exactly(8 + Region::LEN)?;
        Ok(Region::from_bytes(&self.payload[8..]))
    }

    /// A piece of the configuration: where, and bytes.
    pub(super) fn config(&self) -> Result<(ConfigArea, Vec<u8>), ServeError> {
        if self.payload.len() < ConfigArea::LEN {
            return Err(self.size(ConfigArea::LEN));
        }
        let area = ConfigArea::from_bytes(self.payload);
        let ConfigArea { offset, size, .. } = area;
        if u64::from(offset) + u64::from(size) > CONFIG_MAX as u64 {
            return Err(self.refused(format!("{offset}+{size}, expected at most {CONFIG_MAX} bytes")));
        }
        self.exactly(ConfigArea::LEN + size as usize)?;
        Ok((area, self.payload[ConfigArea::LEN..].to_vec()))
    }
}
