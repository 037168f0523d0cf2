//! The registers that only the legacy interface has, or that it has instead of others (4.2.4).

use alloc::vec;
use alloc::vec::Vec;

use polyvirt_core::memory::GuestMemory;
use polyvirt_core::queue::split::layout;
use polyvirt_core::state::Area;

use super::device::Device;
use super::registers::*;

/// What a legacy driver writes, and a reset of the device does not undo: it may say so before it resets.
pub(super) struct Legacy {
    page_size: u32,
    /// Of each queue.
    aligns: Vec<u32>,
}

impl Legacy {
    /// For a device with `queues` queues.
    pub(super) fn new(queues: u16) -> Self {
        let page = layout::LEGACY_ALIGN as u32;
        Self { page_size: page, aligns: vec![page; queues.into()] }
    }
}

impl<M: GuestMemory> Device<M> {
    /// What a register reads, if it is another than the modern interface's.
    pub(super) fn read_legacy(&self, offset: u64) -> Option<u32> {
        let legacy = self.legacy.as_ref()?;
        let queue = self.queue();
        match offset {
            VERSION => Some(VERSION_1),
            QUEUE_SIZE_MAX => Some(self.state.queue_max_size(queue).checked_ilog2().map_or(0, |log| 1 << log)),
            LEGACY_QUEUE_PAGE if self.state.queue_enabled(queue) => {
                let start = self.state.queue_address(queue, Area::Descriptors);
                start.checked_div(legacy.page_size.into()).map(|page| page as u32)
            }
            // The legacy interface knows the first word only.
            DEVICE_FEATURES if self.device_features_sel != 0 => Some(0),
            MAGIC_VALUE | DEVICE_ID | VENDOR_ID | DEVICE_FEATURES | INTERRUPT_STATUS | STATUS => None,
            _ => Some(0),
        }
    }

    /// Writes a register. False if it is as on the modern interface.
    pub(super) fn write_legacy(&mut self, offset: u64, value: u32) -> bool {
        let queue = self.queue();
        let Some(legacy) = &mut self.legacy else { return false };
        match offset {
            LEGACY_PAGE_SIZE => legacy.page_size = value,
            LEGACY_QUEUE_ALIGN => {
                if let Some(align) = legacy.aligns.get_mut(usize::from(queue)) {
                    *align = value;
                }
            }
            LEGACY_QUEUE_PAGE => self.place_queue(queue, value),
            DRIVER_FEATURES if self.driver_features_sel != 0 => {}
            DEVICE_FEATURES_SEL | DRIVER_FEATURES_SEL | DRIVER_FEATURES | QUEUE_SEL | QUEUE_SIZE | QUEUE_NOTIFY
            | INTERRUPT_ACK | STATUS => return false,
            _ => {}
        }
        true
    }

    /// The driver places `queue` at `page`, or at 0 takes it back. A page size or alignment with which there is no such
    /// place leaves the queue unused, which shows when the driver reads.
    fn place_queue(&mut self, queue: u16, page: u32) {
        let Some(legacy) = &self.legacy else { return };
        if page == 0 {
            return self.state.reset_queue(queue);
        }
        let align = legacy.aligns.get(usize::from(queue)).copied().unwrap_or_default();
        let start = u64::from(page) * u64::from(legacy.page_size);
        let Ok(size) = u16::try_from(self.state.queue_size(queue)) else { return };
        if self.state.queue_enabled(queue) || !align.is_power_of_two() || !legacy.page_size.is_power_of_two() {
            return;
        }
        let driver = start + layout::descriptors_len(size);
        let device = (driver + layout::driver_len(size)).next_multiple_of(align.into());
        for (area, address) in [(Area::Descriptors, start), (Area::Driver, driver), (Area::Device, device)] {
            self.state.set_queue_address(queue, area, address);
        }
        self.state.enable_queue(queue);
    }
}
