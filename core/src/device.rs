//! What a device is, to the core.

use core::task::Waker;

use crate::features::Features;
use crate::memory::{GuestMemory, Pages};
use crate::queue::Queue;

/// A device: turns descriptor chains into requests for its backend, and completions into used buffers.
///
/// It knows no transport and no hypervisor, and never waits: what a backend has not finished, it finishes in
/// [`Device::poll`] after waking its [`Waker`].
pub trait Device<M: GuestMemory>: Send {
    /// The virtio device type (chapter 5).
    fn device_type(&self) -> u32;

    /// The device type's own features that it offers; the core adds those of rings and transports.
    fn features(&self) -> Features;

    /// Features that are not offered, although the core or the transport could carry them out: for drivers that are to
    /// show what they do without.
    fn withheld(&self) -> Features {
        Features::empty()
    }

    /// The most entries of each queue; its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// The device configuration, as the driver reads it with no byte missing.
    fn config(&self) -> &[u8];

    /// The driver is about to read the configuration, or goes on with setting the device up: brings [`Device::config`] up
    /// to date with what it is about. True if that changed it.
    fn refresh(&mut self) -> bool {
        false
    }

    /// The driver's choice of `features` is settled (FEATURES_OK; on the legacy interface that is [`Device::activate`]):
    /// what the configuration makes depend on it counts from now on.
    fn negotiated(&mut self, features: Features) {
        let _ = features;
    }

    /// The driver wrote `data` at `offset` of the configuration, inside it. Read-only fields ignore it.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The memory that the device shares with its driver (2.10): the same regions for as long as the device lives.
    fn shared_memory(&self) -> &[SharedRegion] {
        &[]
    }

    /// The driver is ready (DRIVER_OK), with `features` accepted. Buffers may follow; `waker` asks for
    /// [`Device::poll`].
    fn activate(&mut self, features: Features, waker: Waker);

    /// The driver kicked queue `index`, which is one of `queues`.
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>);

    /// The waker fired, or queues were started.
    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        let _ = queues;
    }

    /// Forgets queue `index`: chains of it are dropped, and nothing touches guest memory on its behalf afterwards.
    fn reset_queue(&mut self, index: u16);

    /// Back to the state before [`Device::activate`], as [`Device::reset_queue`] for all queues.
    fn reset(&mut self);
}

/// A shared memory region (2.10): memory of the device that its driver sees.
#[derive(Clone, Debug)]
pub struct SharedRegion {
    /// Which one, in the numbering of the device type.
    pub id: u8,
    /// The memory.
    pub pages: Pages,
}

/// The running queues of a device, and its line to the driver, while it works.
pub struct Queues<'a, M: GuestMemory> {
    pub(crate) queues: &'a mut [Option<Queue<M>>],
    pub(crate) config_changed: bool,
}

impl<M: GuestMemory> Queues<'_, M> {
    /// Queue `index`; none if the driver has not enabled it.
    pub fn get(&mut self, index: u16) -> Option<&mut Queue<M>> {
        self.queues.get_mut(usize::from(index))?.as_mut()
    }

    /// The configuration is not what it was: the generation changes and the driver is interrupted.
    pub fn config_changed(&mut self) {
        self.config_changed = true;
    }
}
