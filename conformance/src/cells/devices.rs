//! The devices, and what stands behind them.

use std::fs::File;

use polyvirt_core::device::Device;
use polyvirt_core::memory::GuestMemory;
use polyvirt_devices::{blk, console, rng};

use crate::suite::{BLK, CONSOLE, FarSide, NO_VARIANT, Objection, RNG, Variant};

/// A device, and what stands behind it.
pub(super) type Made<M> = (Box<dyn Device<M>>, Box<dyn FarSide>);

/// Bytes of a disk that is not an image.
const DISK: usize = 1 << 20;

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
    pub(super) fn device<M>(self, variant: Variant<'_>) -> Result<Made<M>, String>
    where
        M: GuestMemory + Send + 'static,
    {
        Ok(match (self, variant) {
            (_, Variant::Undriven) => return Err(NO_VARIANT.into()),
            (Self::Blk, Variant::Image(path)) => {
                let file = File::options().read(true).write(true).open(path).map_err(|error| error.to_string())?;
                let backend = blk::FileBackend::new(file).map_err(|error| error.to_string())?;
                (Box::new(blk::Device::new(backend, blk::Options::default())), Box::new(()))
            }
            (Self::Blk, _) => {
                let backend = blk::MemoryBackend::new(vec![0; DISK]);
                let disk = backend.handle();
                let read_only = variant == Variant::ReadOnly;
                let options = blk::Options { read_only, ..blk::Options::default() };
                (Box::new(blk::Device::new(backend, options)), Box::new(disk))
            }
            (_, Variant::ReadOnly | Variant::Image(_)) => return Err(NO_VARIANT.into()),
            (Self::Rng, _) => (Box::new(rng::Device::new(rng::HostEntropy)), Box::new(())),
            (Self::Console, _) => {
                let device = console::Device::new(80, 25);
                let far_side = device.handle();
                (Box::new(device), Box::new(far_side))
            }
        })
    }
}

impl FarSide for blk::MemoryHandle {
    fn fail_next_io(&mut self) -> Result<(), Objection> {
        self.fail(1);
        Ok(())
    }

    fn set_capacity(&mut self, sectors: u64) -> Result<(), Objection> {
        Self::resize(self, sectors);
        Ok(())
    }

    fn hang_io(&mut self, hangs: bool) -> Result<(), Objection> {
        self.hang(hangs);
        Ok(())
    }

    fn held_io(&mut self) -> Result<usize, Objection> {
        Ok(self.held())
    }

    fn flushes(&mut self) -> Result<u64, Objection> {
        Ok(Self::flushes(self))
    }

    fn read_disk(&mut self, offset: u64, data: &mut [u8]) -> Result<(), Objection> {
        let bytes = self.bytes();
        let part = bytes.get(offset as usize..).and_then(|bytes| bytes.get(..data.len()));
        data.copy_from_slice(part.ok_or_else(|| Objection::Skipped("the disk is not that large".into()))?);
        Ok(())
    }
}

impl FarSide for console::Handle {
    fn input(&mut self, bytes: &[u8]) -> Result<(), Objection> {
        self.type_in(bytes);
        Ok(())
    }

    fn output(&mut self) -> Result<Vec<u8>, Objection> {
        Ok(self.take_output())
    }

    fn resize(&mut self, columns: u16, rows: u16) -> Result<(), Objection> {
        Self::resize(self, columns, rows);
        Ok(())
    }
}
