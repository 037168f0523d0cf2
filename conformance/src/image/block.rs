//! The block driver of a session, as a disk that an image is carried through.

use polyvirt_conformance::suite::{NO_VARIANT, Target, Variant};

use super::{Image, ImageError};
use crate::report::ImageResult;

/// Carries `image` through the block device of `target`; none if the target cannot serve images.
pub(crate) fn through(target: &dyn Target, image: &Image) -> Result<Option<ImageResult>, ImageError> {
    let served = image.copy()?;
    match target.session(Variant::Image(served.path())) {
        Err(reason) if reason == NO_VARIANT => Ok(None),
        Err(reason) => Ok(Some(super::carry::failed(&reason, 0.0))),
        Ok(_session) => Ok(None),
    }
}
