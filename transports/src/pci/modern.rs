//! The modern interface of a function: structures behind a base address register, each with its capability (4.1.4).

use polyvirt_core::Features;
use polyvirt_core::hypervisor::Cause;
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::state::{Area, Half, Interface, VirtioDevice};

use super::device::{Device, MODERN_BAR, floor_power_of_two};
use super::registers::*;

// Where what is behind the base address register.
const COMMON_AT: u64 = 0x0000;
const ISR_AT: u64 = 0x1000;
const DEVICE_AT: u64 = 0x2000;
const NOTIFY_AT: u64 = 0x3000;
/// Each queue has its own place to be notified at, wide enough for VIRTIO_F_NOTIFICATION_DATA.
const NOTIFY_MULTIPLIER: u32 = 4;

impl<M: GuestMemory> Device<M> {
    /// Adds the structures and the window to them.
    pub(super) fn add_modern(&mut self) {
        let queues = self.state.queue_count();
        let notify_len = (u64::from(queues) * u64::from(NOTIFY_MULTIPLIER)).next_multiple_of(0x1000).max(0x1000);
        let len = (NOTIFY_AT + notify_len).next_power_of_two();
        self.configuration.add_bar(MODERN_BAR, BAR_64 | BAR_PREFETCHABLE, len);
        let place = |queue| NOTIFY_AT + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER);
        self.doorbells.extend((0..queues).map(|queue| (queue, MODERN_BAR, place(queue), None)));
        self.add_structure(CAP_COMMON, MODERN_BAR, 0, COMMON_AT, common::LEN as u64, &[]);
        self.add_structure(CAP_ISR, MODERN_BAR, 0, ISR_AT, 1, &[]);
        self.add_structure(CAP_DEVICE, MODERN_BAR, 0, DEVICE_AT, NOTIFY_AT - DEVICE_AT, &[]);
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        self.add_structure(CAP_NOTIFY, MODERN_BAR, 0, NOTIFY_AT, notify_len, &multiplier);
        let window = self.add_structure(CAP_WINDOW, 0, 0, 0, 0, &[0; 4]);
        self.configuration.allow(window + CAP_BAR, &[0xff]);
        self.configuration.allow(window + CAP_OFFSET, &[0xff; 12]);
        self.window = Some(window);
    }

    /// Reads a structure, with any width.
    pub(super) fn read_modern(&mut self, offset: u64, data: &mut [u8]) {
        let used = self.use_interface(Interface::Modern);
        data.fill(0);
        if let Some(at) = offset.checked_sub(NOTIFY_AT) {
            // Doorbells are for writing.
            let _ = at;
        } else if let Some(at) = offset.checked_sub(DEVICE_AT) {
            self.see_generation();
            self.state.read_config(at, data);
        } else if let Some(at) = offset.checked_sub(ISR_AT) {
            if let (true, 0, Some(isr)) = (used, at, data.first_mut()) {
                *isr = self.interrupts.take_isr();
            }
        } else {
            let image = self.common();
            let from = usize::try_from(offset).ok().and_then(|offset| image.get(offset..)).unwrap_or_default();
            data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        }
    }

    /// Writes a structure: a field whole, the device configuration with any width.
    pub(super) fn write_modern(&mut self, offset: u64, data: &[u8]) {
        if !self.use_interface(Interface::Modern) {
            return if (offset, data) == (COMMON_AT + common::DEVICE_STATUS, &[0]) {
                self.set_status(0)
            };
        }
        if let Some(at) = offset.checked_sub(NOTIFY_AT) {
            let multiplier = u64::from(NOTIFY_MULTIPLIER);
            if at.is_multiple_of(multiplier) {
                // Which queue, its place says; what is written besides is a hint.
                self.ring((at / multiplier).min(u16::MAX.into()) as u16);
            }
        } else if let Some(at) = offset.checked_sub(DEVICE_AT) {
            self.state.write_config(at, data);
        } else if offset < ISR_AT {
            self.write_common(offset, data);
        }
    }

    /// The common configuration, as it reads.
    fn common(&mut self) -> [u8; common::LEN] {
        let queue = self.queue_select;
        let generation = self.see_generation();
        let (state, interrupts) = (&self.state, &self.interrupts);
        let mut image = [0; common::LEN];
        let mut set = |at: u64, bytes: &[u8]| image[at as usize..][..bytes.len()].copy_from_slice(bytes);
        set(common::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        set(common::DEVICE_FEATURE, &state.device_features().word(self.device_feature_select).to_le_bytes());
        set(common::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        set(common::DRIVER_FEATURE, &state.driver_features().word(self.driver_feature_select).to_le_bytes());
        set(common::CONFIG_VECTOR, &interrupts.vector(Cause::Config).to_le_bytes());
        set(common::NUM_QUEUES, &state.queue_count().to_le_bytes());
        set(common::DEVICE_STATUS, &[state.status().bits(), generation]);
        set(common::QUEUE_SELECT, &queue.to_le_bytes());
        set(common::QUEUE_SIZE, &self.shown_size(queue).to_le_bytes());
        set(common::QUEUE_VECTOR, &interrupts.vector(Cause::Queue(queue)).to_le_bytes());
        set(common::QUEUE_ENABLE, &u16::from(state.queue_enabled(queue)).to_le_bytes());
        if queue < state.queue_count() {
            set(common::QUEUE_NOTIFY_OFF, &queue.to_le_bytes());
            if state.driver_features().contains(Features::NOTIF_CONFIG_DATA) {
                let data = VirtioDevice::<M>::queue_notification_data(queue);
                set(common::QUEUE_NOTIF_CONFIG_DATA, &data.to_le_bytes());
            }
        }
        set(common::QUEUE_DESC, &state.queue_address(queue, Area::Descriptors).to_le_bytes());
        set(common::QUEUE_DRIVER, &state.queue_address(queue, Area::Driver).to_le_bytes());
        set(common::QUEUE_DEVICE, &state.queue_address(queue, Area::Device).to_le_bytes());
        // queue_reset reads 0: a queue is reset before the write returns. And there are no administration queues.
        image
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        match *data {
            [status] if offset == common::DEVICE_STATUS => self.set_status(status),
            [a, b] => self.write_common_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_common_u32(offset, u32::from_le_bytes([a, b, c, d])),
            // An address in one piece; the spec has two halves.
            [a, b, c, d, e, f, g, h] if matches!(offset, common::QUEUE_DESC..=common::QUEUE_DEVICE) => {
                self.write_common_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_common_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_common_u16(&mut self, offset: u64, value: u16) {
        let queue = self.queue_select;
        match offset {
            common::CONFIG_VECTOR => self.interrupts.set_vector(Cause::Config, value),
            common::QUEUE_SELECT => self.queue_select = value,
            common::QUEUE_SIZE => self.state.set_queue_size(queue, value.into()),
            common::QUEUE_VECTOR => self.interrupts.set_vector(Cause::Queue(queue), value),
            common::QUEUE_ENABLE if value == 1 && !self.state.queue_enabled(queue) => {
                // What the driver saw, if it did not write a size of its own.
                if self.state.queue_size(queue) == u32::from(self.state.queue_max_size(queue)) {
                    self.state.set_queue_size(queue, self.shown_size(queue).into());
                }
                self.state.enable_queue(queue);
            }
            common::QUEUE_RESET if value == 1 && self.state.driver_features().contains(Features::RING_RESET) => {
                self.state.reset_queue(queue);
                self.interrupts.reset_queue(queue);
            }
            _ => {}
        }
    }

    fn write_common_u32(&mut self, offset: u64, value: u32) {
        let (area, half) = match offset {
            common::DEVICE_FEATURE_SELECT => return self.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => return self.driver_feature_select = value,
            common::DRIVER_FEATURE => {
                let features = self.state.driver_features().with_word(self.driver_feature_select, value);
                return self.state.set_driver_features(features);
            }
            common::QUEUE_DESC => (Area::Descriptors, Half::Low),
            common::QUEUE_DRIVER => (Area::Driver, Half::Low),
            common::QUEUE_DEVICE => (Area::Device, Half::Low),
            0x24 => (Area::Descriptors, Half::High),
            0x2c => (Area::Driver, Half::High),
            0x34 => (Area::Device, Half::High),
            _ => return,
        };
        self.state.set_queue_address_half(self.queue_select, area, half, value);
    }

    /// The queue's size as the driver sees it: without packed rings a power of two, and 0 if what it wrote is none.
    fn shown_size(&self, queue: u16) -> u16 {
        let (size, max) = (self.state.queue_size(queue), self.state.queue_max_size(queue));
        let size = u16::try_from(size).unwrap_or(0);
        if self.state.driver_features().contains(Features::RING_PACKED) || size.is_power_of_two() {
            size
        } else if size == max {
            floor_power_of_two(max)
        } else {
            0
        }
    }

    /// Changes the generation if the configuration has changed since this was last called (4.1.4.3.1): however often it
    /// did, eight bits are enough to tell.
    fn see_generation(&mut self) -> u8 {
        let (shown, seen) = &mut self.generation;
        if *seen != self.state.config_generation() {
            *seen = self.state.config_generation();
            *shown = shown.wrapping_add(1);
        }
        *shown
    }
}
