//! The block driver of a session, as a disk that an image is carried through.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Instant;

use polyvirt_conformance::suite::{NO_VARIANT, Target, Variant};
use polyvirt_core::transport::BlockingTransport;
use polyvirt_devices::DriverError;
use polyvirt_devices::blk::Driver;

use super::carry::{Disk, carry, failed};
use super::{Image, ImageError};
use crate::report::ImageResult;

impl<T: BlockingTransport> Disk for Driver<T> {
    type Error = DriverError;

    fn sectors(&self) -> u64 {
        self.geometry().capacity
    }

    fn read(&mut self, sector: u64, data: &mut [u8]) -> Result<(), DriverError> {
        Self::read(self, sector, data)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> Result<(), DriverError> {
        Self::write(self, sector, data)
    }

    fn flush(&mut self) -> Result<(), DriverError> {
        Self::flush(self)
    }
}

/// Carries `image` through the block device of `target`; none if the target cannot serve images. The error is one of
/// this host's files; whatever goes wrong with the device is in the result.
pub(crate) fn through(target: &dyn Target, image: &Image) -> Result<Option<ImageResult>, ImageError> {
    let served = image.copy()?;
    let begun = Instant::now();
    let carried = catch_unwind(AssertUnwindSafe(|| in_session(target, image, served.path())));
    Ok(carried.unwrap_or_else(|_| Some(failed("the driver panicked", begun.elapsed().as_secs_f64()))))
}

fn in_session(target: &dyn Target, image: &Image, served: &Path) -> Option<ImageResult> {
    let session = match target.session(Variant::Image(served)) {
        Ok(session) => session,
        Err(reason) if reason == NO_VARIANT => return None,
        Err(reason) => return Some(failed(&reason, 0.0)),
    };
    let result = match Driver::new(session.transport) {
        Ok(mut driver) => carry(image, served, &mut driver),
        Err(error) => failed(&error.to_string(), 0.0),
    };
    Some(match session.alarm.rang() {
        Some(panic) => failed(&format!("the device panicked: {panic}"), result.seconds),
        None => result,
    })
}
