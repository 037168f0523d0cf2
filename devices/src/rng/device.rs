//! The device: fills buffers from a source.

use std::task::Waker;

use polyvirt_core::Features;
use polyvirt_core::device::{self, Queues};
use polyvirt_core::memory::GuestMemory;

use super::wire;

/// The most bytes of one buffer that are filled; a driver that wants more asks again.
const FILL: usize = 64 * 1024;
/// Bytes that are taken from the source at once.
const PIECE: usize = 4096;

/// Where entropy comes from.
pub trait Source: Send {
    /// Fills `bytes` completely, or fails. Does not wait.
    fn fill(&mut self, bytes: &mut [u8]) -> std::io::Result<()>;
}

/// The host's own random number generator.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostEntropy;

impl Source for HostEntropy {
    fn fill(&mut self, bytes: &mut [u8]) -> std::io::Result<()> {
        getrandom::fill(bytes).map_err(std::io::Error::other)
    }
}

/// An entropy device.
#[derive(Debug)]
pub struct Device<S> {
    source: S,
}

impl<S: Source> Device<S> {
    /// A device that passes on what `source` gives.
    pub const fn new(source: S) -> Self {
        Self { source }
    }
}

impl<S: Source, M: GuestMemory> device::Device<M> for Device<S> {
    fn device_type(&self) -> u32 {
        wire::DEVICE_TYPE
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[64]
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, _features: Features, _waker: Waker) {}

    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        let Some(queue) = queues.get(index) else { return };
        while let Ok(mut chain) = queue.pop() {
            let wanted = (chain.writable_len() as usize).min(FILL);
            let mut piece = [0; PIECE];
            let mut done = 0;
            while done < wanted {
                let piece = &mut piece[..PIECE.min(wanted - done)];
                if let Err(error) = self.source.fill(piece) {
                    tracing::warn!(%error, "the source of entropy failed");
                    break;
                }
                if chain.write(done as u32, piece).is_err() {
                    break;
                }
                done += piece.len();
            }
            // Fails only on a queue that is broken, which has its reason already.
            let _ = queue.complete(chain);
        }
    }

    fn reset_queue(&mut self, _index: u16) {}

    fn reset(&mut self) {}
}
