//! The legacy interface of a function: registers in ports, the paper's of 2008 to the byte (4.1.4.10).

use polyvirt_core::hypervisor::Cause;
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::queue::split;
use polyvirt_core::state::{Area, Interface};
use polyvirt_core::{Features, Status};

use super::device::{Device, floor_power_of_two};
use super::registers::legacy::*;
use super::registers::{COMMAND, COMMAND_MASTER};

/// Bytes of the registers with those of MSI-X.
const HEADER: usize = config(true) as usize;

impl<M: GuestMemory> Device<M> {
    /// Reads ports, with any width (4.1.4.10).
    pub(super) fn read_legacy(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(order) = self.legacy else { return };
        let used = self.use_interface(Interface::Legacy(order));
        let (header, start) = (self.legacy_header(), config(self.interrupts.messages()));
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(index as u64);
            if at == ISR {
                *byte = if used { self.interrupts.take_isr() } else { 0 };
            } else if let Some(at) = at.checked_sub(start) {
                self.state.read_config(at, std::slice::from_mut(byte));
            } else {
                *byte = header[at as usize];
            }
        }
    }

    /// Writes ports. A register is written whole; the configuration with any width.
    pub(super) fn write_legacy(&mut self, offset: u64, data: &[u8]) {
        let Some(order) = self.legacy else { return };
        if !self.use_interface(Interface::Legacy(order)) {
            return if (offset, data) == (DEVICE_STATUS, &[0]) {
                self.set_status(0)
            };
        }
        let messages = self.interrupts.messages();
        if let Some(at) = offset.checked_sub(config(messages)) {
            return self.state.write_config(at, data);
        }
        let queue = self.queue_select;
        match (offset, data) {
            (DRIVER_FEATURES, &[a, b, c, d]) => {
                let features = u32::from_le_bytes([a, b, c, d]);
                self.state.set_driver_features(Features::from_bits_retain(features.into()));
            }
            (QUEUE_ADDRESS, &[a, b, c, d]) => self.place_queue(u32::from_le_bytes([a, b, c, d])),
            (QUEUE_SELECT, &[a, b]) => self.queue_select = u16::from_le_bytes([a, b]),
            (QUEUE_NOTIFY, &[a, b]) => self.ring(u16::from_le_bytes([a, b])),
            (DEVICE_STATUS, &[status]) => {
                if Status::from_bits_retain(status) == Status::ACKNOWLEDGE | Status::DRIVER {
                    self.become_bus_master();
                }
                self.set_status(status);
            }
            (CONFIG_VECTOR, &[a, b]) => self.interrupts.set_vector(Cause::Config, u16::from_le_bytes([a, b])),
            (QUEUE_VECTOR, &[a, b]) => self.interrupts.set_vector(Cause::Queue(queue), u16::from_le_bytes([a, b])),
            _ => {}
        }
    }

    /// The registers, as they read without side effects.
    fn legacy_header(&self) -> [u8; HEADER] {
        let (state, queue) = (&self.state, self.queue_select);
        let mut header = [0; HEADER];
        let mut set = |at: u64, bytes: &[u8]| header[at as usize..][..bytes.len()].copy_from_slice(bytes);
        set(DEVICE_FEATURES, &state.device_features().word(0).to_le_bytes());
        set(DRIVER_FEATURES, &state.driver_features().word(0).to_le_bytes());
        let page = if state.queue_enabled(queue) { state.queue_address(queue, Area::Descriptors) / PAGE } else { 0 };
        set(QUEUE_ADDRESS, &(page as u32).to_le_bytes());
        set(QUEUE_SIZE, &floor_power_of_two(state.queue_max_size(queue)).to_le_bytes());
        set(QUEUE_SELECT, &queue.to_le_bytes());
        set(DEVICE_STATUS, &[state.status().bits()]);
        set(CONFIG_VECTOR, &self.interrupts.vector(Cause::Config).to_le_bytes());
        set(QUEUE_VECTOR, &self.interrupts.vector(Cause::Queue(queue)).to_le_bytes());
        header
    }

    /// Drivers of before 2010 (Linux 2.6.33) leave Bus Master Enable to firmware, and firmware to them: as other
    /// implementations do, it is set for a legacy driver that says that it is there.
    fn become_bus_master(&mut self) {
        let command = self.configuration.u16(COMMAND);
        if command & COMMAND_MASTER == 0 {
            self.configuration.set(COMMAND, &(command | COMMAND_MASTER).to_le_bytes());
            self.configured();
        }
    }

    /// The driver places the selected queue at `page`, or at 0 takes it back.
    fn place_queue(&mut self, page: u32) {
        let queue = self.queue_select;
        if page == 0 {
            self.state.reset_queue(queue);
            self.interrupts.reset_queue(queue);
        } else if !self.state.queue_enabled(queue) {
            let (size, start) = (floor_power_of_two(self.state.queue_max_size(queue)), u64::from(page) * PAGE);
            let (driver, device, _) = split::layout::legacy(size);
            self.state.set_queue_size(queue, size.into());
            for (area, offset) in [(Area::Descriptors, 0), (Area::Driver, driver), (Area::Device, device)] {
                self.state.set_queue_address(queue, area, start + offset);
            }
            self.state.enable_queue(queue);
        }
    }
}
