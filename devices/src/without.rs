//! Any device, with features withheld.

use std::task::Waker;

use polyvirt_core::Features;
use polyvirt_core::device::{Device, Queues, SharedRegion};
use polyvirt_core::memory::GuestMemory;

/// The device `device` without `features`, whoever would carry them out.
pub struct Without<M> {
    device: Box<dyn Device<M>>,
    features: Features,
}

impl<M: GuestMemory> Without<M> {
    /// `device`, which does not offer `features` any more.
    pub fn new(device: Box<dyn Device<M>>, features: Features) -> Self {
        Self { device, features }
    }
}

impl<M: GuestMemory> Device<M> for Without<M> {
    fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    fn features(&self) -> Features {
        self.device.features()
    }

    fn withheld(&self) -> Features {
        self.device.withheld() | self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.device.queue_max_sizes()
    }

    fn config(&self) -> &[u8] {
        self.device.config()
    }

    fn refresh(&mut self) -> bool {
        self.device.refresh()
    }

    fn negotiated(&mut self, features: Features) {
        self.device.negotiated(features);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    fn shared_memory(&self) -> &[SharedRegion] {
        self.device.shared_memory()
    }

    fn activate(&mut self, features: Features, waker: Waker) {
        self.device.activate(features, waker);
    }

    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        self.device.kick(index, queues);
    }

    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        self.device.poll(queues);
    }

    fn reset_queue(&mut self, index: u16) {
        self.device.reset_queue(index);
    }

    fn reset(&mut self) {
        self.device.reset();
    }
}
