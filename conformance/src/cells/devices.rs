//! The devices, and what stands behind them.

use std::fs::File;

use polyvirt_core::device::Device;
use polyvirt_core::memory::GuestMemory;
use polyvirt_devices::blk;

use super::standin;
use crate::suite::{BLK, CONSOLE, FarSide, RNG, Variant};

/// A type of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A block device.
    Blk,
    /// An entropy device.
    Rng,
    /// A console.
    Console,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 3] = [Self::Blk, Self::Rng, Self::Console];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
            Self::Rng => "rng",
            Self::Console => "console",
        }
    }

    /// Its type (chapter 5).
    pub const fn device_type(self) -> u32 {
        match self {
            Self::Blk => BLK,
            Self::Rng => RNG,
            Self::Console => CONSOLE,
        }
    }

    /// A fresh device, and what stands behind it.
    pub(super) fn device<M>(self, variant: Variant<'_>) -> Result<(Box<dyn Device<M>>, Box<dyn FarSide>), String>
    where
        M: GuestMemory + Send + 'static,
        M::Lease: Send,
    {
        match (self, variant) {
            (Self::Blk, Variant::Image(path)) => {
                let file = File::options().read(true).write(true).open(path).map_err(|error| error.to_string())?;
                let backend = blk::FileBackend::new(file).map_err(|error| error.to_string())?;
                Ok((Box::new(blk::Device::new(backend, blk::Options::default())), Box::new(())))
            }
            _ => standin::device(self, variant),
        }
    }
}
