//! The memory of a virtqueue where the guest allocates it.

use alloc::boxed::Box;
use alloc::sync::Arc;

use polyvirt_core::Features;
use polyvirt_core::hypervisor::Share;
use polyvirt_core::memory::Access;
use polyvirt_core::queue::{Layout, MAX_QUEUE_SIZE, QueueConfig, QueueError, packed, split};
use polyvirt_core::shared::Shared;
use polyvirt_core::transport::{Notify, TransportError, Virtqueue};

/// The three areas of a queue, each an allocation of its own, shared with the device until this is dropped.
pub(crate) struct Areas {
    config: QueueConfig,
    descriptors: Shared,
    driver: Shared,
    device: Shared,
}

impl Areas {
    /// Allocates and shares what queue `index` needs with `features` accepted: `size` entries, or as many as there can
    /// be if none.
    pub(crate) fn allocate(
        share: &Arc<dyn Share>,
        index: u16,
        size: Option<u16>,
        max: u16,
        features: Features,
    ) -> Result<Self, TransportError> {
        let packed = features.contains(Features::RING_PACKED);
        let max = max.min(MAX_QUEUE_SIZE);
        // A device may say any maximum; what is above the last power of two is of no use to a split ring.
        let largest = if packed || max == 0 { max } else { 1 << max.ilog2() };
        let size = size.unwrap_or(largest);
        if size == 0 || size > max || !(packed || size.is_power_of_two()) {
            return Err(TransportError::Queue { index, reason: QueueError::Size { size: size.into(), max } });
        }
        let both = Access::READ | Access::WRITE;
        let (descriptors, driver, device) = if packed {
            use packed::layout::{DESCRIPTOR_LEN, EVENT_LEN};
            ((DESCRIPTOR_LEN * u64::from(size), both), EVENT_LEN, (EVENT_LEN, Access::WRITE))
        } else {
            use split::layout::{descriptors_len, device_len, driver_len};
            ((descriptors_len(size), Access::READ), driver_len(size), (device_len(size), both))
        };
        let descriptors = Shared::new(share, descriptors.0 as usize, descriptors.1)?;
        let driver = Shared::new(share, driver as usize, Access::READ)?;
        let device = Shared::new(share, device.0 as usize, device.1)?;
        let config = QueueConfig {
            size,
            descriptors: descriptors.address(),
            driver: driver.address(),
            device: device.address(),
            layout: if packed { Layout::Packed } else { Layout::Modern },
            event_idx: features.contains(Features::EVENT_IDX),
            indirect: features.contains(Features::INDIRECT_DESC),
            in_order: features.contains(Features::IN_ORDER),
        };
        Ok(Self { config, descriptors, driver, device })
    }

    /// What the registers are told.
    pub(crate) const fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// The queue in these areas, with its doorbell.
    pub(crate) fn virtqueue(&self, notify: Box<dyn Notify>) -> Virtqueue {
        Virtqueue {
            config: self.config,
            descriptors: self.descriptors.pages().clone(),
            driver: self.driver.pages().clone(),
            device: self.device.pages().clone(),
            notify,
        }
    }
}
