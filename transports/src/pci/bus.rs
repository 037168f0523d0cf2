//! The bus as the guest sees it: finds functions and places what is behind their base address registers, as firmware does.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::task::Waker;
use core::time::Duration;

use polyvirt_core::hypervisor::{Guest, HypervisorError, Share, WaitForInterrupt, WakeOnInterrupt};
use polyvirt_core::memory::{Access, Pages};

use super::function::{Config, MSIX_LINES};
use super::registers::*;
use crate::mmio;

/// A guest whose machine has a PCI bus: what [`Bus`] needs of a port.
pub trait Machine: mmio::Registers {
    /// Where the PCI host answers.
    fn address_map(&self) -> AddressMap;

    /// Reads `data.len()` (1, 2 or 4) bytes from `port`, in one access.
    fn input(&self, port: u16, data: &mut [u8]) -> Result<(), HypervisorError>;

    /// Writes `data` (1, 2 or 4 bytes) to `port`, in one access.
    fn output(&self, port: u16, data: &[u8]) -> Result<(), HypervisorError>;

    /// The message that arrives as interrupt line `line`.
    fn message(&self, line: u32) -> Message;
}

/// A guest that can reach the functions of a bus.
pub trait Functions: Guest<Place = GuestPlace> {
    /// Reads `data.len()` (1, 2 or 4) bytes of configuration space, inside an aligned word of four, in one access.
    fn read_config(&self, function: u8, offset: u16, data: &mut [u8]) -> Result<(), HypervisorError>;

    /// Writes configuration space, as [`Functions::read_config`] reads it.
    fn write_config(&self, function: u8, offset: u16, data: &[u8]) -> Result<(), HypervisorError>;

    /// Reads `data.len()` (1, 2 or 4, from memory also 8) bytes at `address`, in one access.
    fn load(&self, space: Space, address: u64, data: &mut [u8]) -> Result<(), HypervisorError>;

    /// Writes `data` to `address`, as [`Functions::load`] reads.
    fn store(&self, space: Space, address: u64, data: &[u8]) -> Result<(), HypervisorError>;

    /// The message that arrives as interrupt line `line`.
    fn message(&self, line: u32) -> Message;
}

/// The bus of machine `G`: a guest whose places are functions.
///
/// Configuration space is accessed through memory where the machine has that, and through ports otherwise; a pair of
/// port accesses is not protected against another of a second thread.
pub struct Bus<G> {
    machine: Arc<G>,
    map: AddressMap,
}

impl<G: Machine> Bus<G> {
    /// The bus of `machine`.
    pub fn new(machine: Arc<G>) -> Self {
        let map = machine.address_map();
        Self { machine, map }
    }

    /// What the bus is part of.
    pub const fn machine(&self) -> &Arc<G> {
        &self.machine
    }

    /// The functions there are, by number.
    fn functions(&self) -> Result<Vec<u8>, HypervisorError> {
        let mut found = Vec::new();
        for device in 0..32u8 {
            for number in 0..8 {
                let config = Config { guest: self, function: device << 3 | number };
                let there = config.u16(VENDOR_ID)? != u16::MAX;
                if there {
                    found.push(config.function);
                }
                // Function 0 says whether there are others; these need not follow one another.
                if number == 0 && !(there && config.u8(HEADER_TYPE)? & 0x80 != 0) {
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Places what is behind the base address registers of `function`, if nobody did before, and has it decoded.
    fn place(&self, function: u8) -> Result<(), HypervisorError> {
        let config = Config { guest: self, function };
        let command = config.u16(COMMAND)?;
        if command & (COMMAND_IO | COMMAND_MEMORY) != 0 {
            return Ok(());
        }
        let mut rooms = [&self.map.io, &self.map.memory, &self.map.memory64].map(|range| room(range, function));
        let mut bar = 0;
        while bar < BAR_COUNT {
            let at = BARS + 4 * u16::from(bar);
            bar += 1;
            config.set_u32(at, u32::MAX)?;
            let sized = config.u32(at)?;
            let (mask, room) = match sized {
                0 => continue,
                _ if sized & BAR_IO != 0 => (u64::from(sized & !3) | !0xffff, &mut rooms[0]),
                _ if sized & BAR_64 != 0 => {
                    config.set_u32(at + 4, u32::MAX)?;
                    let high = config.u32(at + 4)?;
                    bar += 1;
                    let wide = if rooms[2].is_empty() { &mut rooms[1] } else { &mut rooms[2] };
                    (u64::from(high) << 32 | u64::from(sized & !0xf), wide)
                }
                _ => (u64::from(sized & !0xf) | !u64::from(u32::MAX), &mut rooms[1]),
            };
            let len = (!mask).wrapping_add(1);
            let start = room.start.checked_next_multiple_of(len.max(1)).unwrap_or(u64::MAX);
            let end = start.saturating_add(len);
            if len == 0 || end > room.end {
                return Err(HypervisorError::Exhausted("addresses for what is behind base address registers"));
            }
            room.start = end;
            config.set_u32(at, start as u32)?;
            if sized & (BAR_IO | BAR_64) == BAR_64 {
                config.set_u32(at + 4, (start >> 32) as u32)?;
            }
        }
        config.set_u16(COMMAND, command | COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER)
    }
}

/// What of `range` is for `function`: each device has its own part, so that finding them again changes nothing.
fn room(range: &Range<u64>, function: u8) -> Range<u64> {
    let len = range.end.saturating_sub(range.start) / 32;
    let len = len.checked_ilog2().map_or(0, |log| 1 << log);
    let start = range.start + len * u64::from(function >> 3);
    start..start + len
}

impl<G: Machine> Share for Bus<G> {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        self.machine.allocate(len)
    }

    fn share(&self, pages: &Pages, access: Access) -> Result<u64, HypervisorError> {
        self.machine.share(pages, access)
    }

    fn unshare(&self, address: u64) -> Result<(), HypervisorError> {
        self.machine.unshare(address)
    }
}

impl<G: Machine> Guest for Bus<G> {
    type Place = GuestPlace;

    fn notify(&self, doorbell: u64, value: u32) -> Result<(), HypervisorError> {
        self.machine.notify(doorbell, value)
    }

    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        self.machine.take(line)
    }

    /// Finds the virtio devices of the bus, and places all functions.
    fn enumerate(&self) -> Result<Vec<GuestPlace>, HypervisorError> {
        let mut places = Vec::new();
        let mut line = 0;
        for function in self.functions()? {
            let config = Config { guest: self, function };
            self.place(function)?;
            let id = config.u16(DEVICE_ID)?;
            if config.u16(VENDOR_ID)? != VIRTIO_VENDOR || !IDS.contains(&id) {
                continue;
            }
            let lines = u32::from(config.vectors()?).min(MSIX_LINES).min(MESSAGE_LINES - line);
            places.push(GuestPlace { function, pin: pin_line(function >> 3), line, lines });
            line += lines;
        }
        Ok(places)
    }
}

impl<G: Machine + WaitForInterrupt> WaitForInterrupt for Bus<G> {
    fn wait(&self, lines: &[u32], most: Duration) -> Result<bool, HypervisorError> {
        self.machine.wait(lines, most)
    }
}

impl<G: Machine + WakeOnInterrupt> WakeOnInterrupt for Bus<G> {
    fn wake_on(&self, lines: &[u32], waker: &Waker) -> Result<(), HypervisorError> {
        self.machine.wake_on(lines, waker)
    }
}

impl<G: Machine> Functions for Bus<G> {
    fn read_config(&self, function: u8, offset: u16, data: &mut [u8]) -> Result<(), HypervisorError> {
        match self.map.ecam {
            Some(start) => self.machine.load(start + ECAM_STRIDE * u64::from(function) + u64::from(offset), data),
            None => {
                self.machine.output(CONFIG_ADDRESS as u16, &config_address(function, offset).to_le_bytes())?;
                self.machine.input(CONFIG_DATA as u16 + offset % 4, data)
            }
        }
    }

    fn write_config(&self, function: u8, offset: u16, data: &[u8]) -> Result<(), HypervisorError> {
        match self.map.ecam {
            Some(start) => self.machine.store(start + ECAM_STRIDE * u64::from(function) + u64::from(offset), data),
            None => {
                self.machine.output(CONFIG_ADDRESS as u16, &config_address(function, offset).to_le_bytes())?;
                self.machine.output(CONFIG_DATA as u16 + offset % 4, data)
            }
        }
    }

    fn load(&self, space: Space, address: u64, data: &mut [u8]) -> Result<(), HypervisorError> {
        match space {
            Space::Memory => self.machine.load(address, data),
            Space::Io => self.machine.input(port(address)?, data),
        }
    }

    fn store(&self, space: Space, address: u64, data: &[u8]) -> Result<(), HypervisorError> {
        match space {
            Space::Memory => self.machine.store(address, data),
            Space::Io => self.machine.output(port(address)?, data),
        }
    }

    fn message(&self, line: u32) -> Message {
        self.machine.message(line)
    }
}

fn port(address: u64) -> Result<u16, HypervisorError> {
    let reason = || alloc::format!("{address:#x} is no port");
    u16::try_from(address).map_err(|_| HypervisorError::Refused { call: "port", reason: reason() })
}
