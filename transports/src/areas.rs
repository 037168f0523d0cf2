//! The memory of a virtqueue where the guest allocates it.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use polyvirt_core::Features;
use polyvirt_core::hypervisor::{HypervisorError, Share};
use polyvirt_core::memory::{Access, Pages};
use polyvirt_core::queue::{ByteOrder, Layout, MAX_QUEUE_SIZE, QueueConfig, QueueError, packed, split};
use polyvirt_core::shared::Shared;
use polyvirt_core::transport::{Notify, TransportError, Virtqueue};

/// The three areas of a queue, shared with the device until this is dropped.
pub(crate) struct Areas {
    config: QueueConfig,
    descriptors: Pages,
    driver: Pages,
    device: Pages,
    _shared: Vec<Shared>,
}

/// The byte order of this guest, which is that of its legacy devices.
pub(crate) const NATIVE: ByteOrder = if cfg!(target_endian = "big") { ByteOrder::Big } else { ByteOrder::Little };

impl Areas {
    /// Allocates and shares what queue `index` needs with `features` accepted: `size` entries, or as many as there can
    /// be if none. Each area is an allocation of its own.
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
        Ok(Self {
            config,
            descriptors: descriptors.pages().clone(),
            driver: driver.pages().clone(),
            device: device.pages().clone(),
            _shared: vec![descriptors, driver, device],
        })
    }

    /// As [`Areas::allocate`], in the legacy layout: all in one piece, with `size` entries.
    pub(crate) fn contiguous(
        share: &Arc<dyn Share>,
        index: u16,
        size: u16,
        max: u16,
        features: Features,
    ) -> Result<Self, TransportError> {
        if !size.is_power_of_two() || size > max.min(MAX_QUEUE_SIZE) {
            return Err(TransportError::Queue { index, reason: QueueError::Size { size: size.into(), max } });
        }
        let (driver, device, end) = split::layout::legacy(size);
        let whole = Shared::new(share, end as usize, Access::READ | Access::WRITE)?;
        let part = |from: u64, to: u64| {
            let part = whole.pages().slice(from as usize, (to - from) as usize);
            part.ok_or(TransportError::Hypervisor(HypervisorError::Exhausted("guest memory")))
        };
        let start = whole.address();
        let config = QueueConfig {
            size,
            descriptors: start,
            driver: start + driver,
            device: start + device,
            layout: Layout::Legacy(NATIVE),
            event_idx: features.contains(Features::EVENT_IDX),
            indirect: features.contains(Features::INDIRECT_DESC),
            in_order: false,
        };
        let (descriptors, driver, device) = (part(0, driver)?, part(driver, device)?, part(device, end)?);
        Ok(Self { config, descriptors, driver, device, _shared: vec![whole] })
    }

    /// What the registers are told.
    pub(crate) const fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// Whether the driver has made something available already, in a queue that the device has yet to begin with.
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(crate) fn has_available(&self) -> bool {
        let (area, offset) = match self.config.layout {
            Layout::Packed => (&self.descriptors, packed::layout::DESCRIPTOR_LEN as usize - 2),
            Layout::Modern | Layout::Legacy(_) => (&self.driver, 2 * split::layout::INDEX),
        };
        let mut value = [0; 2];
        // In a new ring this is 0: no index, no flags.
        area.read(offset, &mut value).is_ok() && value != [0; 2]
    }

    /// The queue in these areas, with its doorbell.
    pub(crate) fn virtqueue(&self, notify: Box<dyn Notify>) -> Virtqueue {
        Virtqueue {
            config: self.config,
            descriptors: self.descriptors.clone(),
            driver: self.driver.clone(),
            device: self.device.clone(),
            notify,
        }
    }
}
