//! The host's side: registers decoded into the device state machine.

use alloc::boxed::Box;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};
use core::task::Waker;

use polyvirt_core::device::{self, SharedRegion};
use polyvirt_core::hypervisor::{BusDevice, Cause, Host, HypervisorError, Interrupt};
use polyvirt_core::memory::{GuestMemory, Pages};
use polyvirt_core::queue::ByteOrder;
use polyvirt_core::state::{Area, Half, Interface, VirtioDevice};
use polyvirt_core::{Features, Status};

use super::legacy::Legacy;
use super::registers::*;

/// Puts `device` onto the bus of `host`. `memory` is [`Host::memory`], perhaps wrapped.
pub fn attach<H, M>(host: &mut H, memory: M, device: Box<dyn device::Device<M>>) -> Result<(), HypervisorError>
where
    H: Host<Place = Place>,
    M: GuestMemory + Send + 'static,
{
    put(host, device, |device, interrupt, base| Device::new(device, memory, interrupt).with_shared_memory(base))
}

/// As [`attach`], with the legacy interface (version 1), for guests whose byte order is `order`.
pub fn attach_legacy<H, M>(
    host: &mut H,
    memory: M,
    device: Box<dyn device::Device<M>>,
    order: ByteOrder,
) -> Result<(), HypervisorError>
where
    H: Host<Place = Place>,
    M: GuestMemory + Send + 'static,
{
    put(host, device, |device, interrupt, _| Ok(Device::new_legacy(device, memory, interrupt, order)))
}

fn put<H, M>(
    host: &mut H,
    device: Box<dyn device::Device<M>>,
    make: impl FnOnce(Box<dyn device::Device<M>>, Arc<dyn Interrupt>, u64) -> Result<Device<M>, HypervisorError>,
) -> Result<(), HypervisorError>
where
    H: Host<Place = Place>,
    M: GuestMemory + Send + 'static,
{
    let queues = device.queue_max_sizes().len();
    let queues = u16::try_from(queues).map_err(|_| HypervisorError::Exhausted("queue indices"))?;
    let place = host.place(device.device_type(), queues)?;
    let device = make(device, host.interrupt(&place), place.base)?;
    host.plug(place, Box::new(device))
}

/// A device behind a register block.
///
/// Any access is answered: one that is not 32 bits wide, not aligned, or not of a register reads 0 and writes nothing.
pub struct Device<M: GuestMemory> {
    pub(super) state: VirtioDevice<M>,
    interrupts: Arc<InterruptStatus>,
    waker: Waker,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    queue_sel: u32,
    shm_sel: u32,
    /// Where shared memory is: the offset of each region, and the guest-physical address of offset 0.
    shared: Vec<(u64, SharedRegion)>,
    base: u64,
    pub(super) legacy: Option<Legacy>,
}

impl<M: GuestMemory> Device<M> {
    /// Puts `device` behind a register block; `interrupt` is its line.
    pub fn new(device: Box<dyn device::Device<M>>, memory: M, interrupt: Arc<dyn Interrupt>) -> Self {
        let mut new = Self::with_interface(device, memory, interrupt, Interface::Modern);
        let offered = Features::RING_RESET | Features::RING_PACKED | Features::NOTIFICATION_DATA;
        new.state = new.state.with_features(offered);
        new
    }

    /// As [`Device::new`], behind the registers of the legacy interface, for guests whose byte order is `order`.
    pub fn new_legacy(
        device: Box<dyn device::Device<M>>,
        memory: M,
        interrupt: Arc<dyn Interrupt>,
        order: ByteOrder,
    ) -> Self {
        let mut new = Self::with_interface(device, memory, interrupt, Interface::Legacy(order));
        new.legacy = Some(Legacy::new(new.state.queue_count()));
        new
    }

    fn with_interface(
        device: Box<dyn device::Device<M>>,
        memory: M,
        interrupt: Arc<dyn Interrupt>,
        interface: Interface,
    ) -> Self {
        let interrupts = Arc::new(InterruptStatus { bits: AtomicU32::new(0), line: interrupt });
        let state = VirtioDevice::new(device, memory, interrupts.clone(), interface);
        Self {
            state,
            interrupts,
            waker: Waker::noop().clone(),
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            shm_sel: 0,
            shared: Vec::new(),
            base: 0,
            legacy: None,
        }
    }

    /// Shows the device's shared memory behind the registers, which are at guest-physical `base`. Fails if it does not
    /// fit there, or if two regions have one id.
    pub fn with_shared_memory(mut self, base: u64) -> Result<Self, HypervisorError> {
        let mut end = BLOCK_SIZE;
        for region in self.state.shared_memory() {
            if self.shared.iter().any(|(_, other)| other.id == region.id) {
                let reason = format!("two shared memory regions have the id {}", region.id);
                return Err(HypervisorError::Refused { call: "attach", reason });
            }
            self.shared.push((end, region.clone()));
            end = (end + region.pages.len() as u64).next_multiple_of(0x1000);
        }
        self.base = base;
        if end > PLACE_SIZE { Err(HypervisorError::Exhausted("shared memory of a place")) } else { Ok(self) }
    }

    /// The selected shared memory region: address and length.
    fn shared_memory(&self) -> Option<(u64, u64)> {
        let (offset, region) = self.shared.iter().find(|(_, region)| u32::from(region.id) == self.shm_sel)?;
        Some((self.base + offset, region.pages.len() as u64))
    }

    /// The shared memory at `offset`, and where in it.
    fn shared_at(&self, offset: u64) -> Option<(&Pages, usize)> {
        self.shared.iter().find_map(|(start, region)| {
            let at = usize::try_from(offset.checked_sub(*start)?).ok()?;
            (at < region.pages.len()).then_some((&region.pages, at))
        })
    }

    /// The selected queue. What does not fit an index becomes the index that no queue can have.
    pub(super) fn queue(&self) -> u16 {
        u16::try_from(self.queue_sel).unwrap_or(u16::MAX)
    }

    fn read_register(&self, offset: u64) -> u32 {
        if let Some(value) = self.read_legacy(offset) {
            return value;
        }
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION => VERSION_2,
            DEVICE_ID => self.state.device_type(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => self.state.device_features().word(self.device_features_sel),
            QUEUE_SIZE_MAX => self.state.queue_max_size(self.queue()).into(),
            QUEUE_READY => self.state.queue_enabled(self.queue()).into(),
            INTERRUPT_STATUS => self.interrupts.bits.load(Ordering::Acquire),
            STATUS => self.state.status().bits().into(),
            // All ones if there is no such region.
            SHM_LEN_LOW => self.shared_memory().map_or(u32::MAX, |(_, len)| len as u32),
            SHM_LEN_HIGH => self.shared_memory().map_or(u32::MAX, |(_, len)| (len >> 32) as u32),
            SHM_BASE_LOW => self.shared_memory().map_or(u32::MAX, |(address, _)| address as u32),
            SHM_BASE_HIGH => self.shared_memory().map_or(u32::MAX, |(address, _)| (address >> 32) as u32),
            CONFIG_GENERATION => self.state.config_generation(),
            // QueueReset among them: a queue is reset before the write returns.
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        if self.write_legacy(offset, value) {
            return;
        }
        match offset {
            DEVICE_FEATURES_SEL => self.device_features_sel = value,
            DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            DRIVER_FEATURES => {
                let features = self.state.driver_features().with_word(self.driver_features_sel, value);
                self.state.set_driver_features(features);
            }
            QUEUE_SEL => self.queue_sel = value,
            SHM_SEL => self.shm_sel = value,
            QUEUE_SIZE => self.state.set_queue_size(self.queue(), value),
            QUEUE_READY => match value {
                0 if self.state.queue_enabled(self.queue()) => self.state.reset_queue(self.queue()),
                1 => self.state.enable_queue(self.queue()),
                _ => {}
            },
            QUEUE_NOTIFY => {
                if let Some(index) = self.state.notified_queue(value)
                    && self.state.kick(index)
                {
                    // The write has to return: the rest is served when the host polls.
                    self.waker.wake_by_ref();
                }
            }
            INTERRUPT_ACK => self.interrupts.acknowledge(value),
            STATUS => self.write_status(value),
            QUEUE_DESC_LOW => self.set_address(Area::Descriptors, Half::Low, value),
            QUEUE_DESC_HIGH => self.set_address(Area::Descriptors, Half::High, value),
            QUEUE_DRIVER_LOW => self.set_address(Area::Driver, Half::Low, value),
            QUEUE_DRIVER_HIGH => self.set_address(Area::Driver, Half::High, value),
            QUEUE_DEVICE_LOW => self.set_address(Area::Device, Half::Low, value),
            QUEUE_DEVICE_HIGH => self.set_address(Area::Device, Half::High, value),
            QUEUE_RESET if value == 1 && self.state.driver_features().contains(Features::RING_RESET) => {
                self.state.reset_queue(self.queue());
            }
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        // Only 0 resets: a value whose low byte alone is 0 sets no bit there is.
        match value as u8 {
            0 if value != 0 => {}
            bits => self.state.set_status(Status::from_bits_retain(bits)),
        }
        if value == 0 {
            self.interrupts.bits.store(0, Ordering::Release);
            (self.device_features_sel, self.driver_features_sel, self.queue_sel, self.shm_sel) = (0, 0, 0, 0);
        }
    }

    fn set_address(&mut self, area: Area, half: Half, value: u32) {
        self.state.set_queue_address_half(self.queue(), area, half, value);
    }
}

impl<M: GuestMemory + Send> BusDevice for Device<M> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some((pages, at)) = self.shared_at(offset) {
            let (there, beyond) = data.split_at_mut(data.len().min(pages.len() - at));
            // Inside the region, so it is there.
            let _ = pages.read(at, there);
            beyond.fill(0);
        } else if let Some(offset) = offset.checked_sub(CONFIG) {
            self.state.read_config(offset, data);
        } else if data.len() == 4 {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        } else {
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((pages, at)) = self.shared_at(offset) {
            let _ = pages.write(at, &data[..data.len().min(pages.len() - at)]);
        } else if let Some(offset) = offset.checked_sub(CONFIG) {
            self.state.write_config(offset, data);
        } else if let Ok(value) = data.try_into() {
            self.write_register(offset, u32::from_le_bytes(value));
        }
    }

    fn kick(&mut self, queue: u16) -> bool {
        self.state.kick(queue)
    }

    fn poll(&mut self) -> bool {
        self.state.poll()
    }

    fn set_waker(&mut self, waker: Waker) {
        self.waker = waker.clone();
        self.state.set_waker(waker);
    }
}

/// The register InterruptStatus, and the line behind it.
struct InterruptStatus {
    bits: AtomicU32,
    line: Arc<dyn Interrupt>,
}

impl InterruptStatus {
    /// Clears `bits`. What came meanwhile, or was not acknowledged, is worth another interrupt.
    fn acknowledge(&self, bits: u32) {
        let left = self.bits.fetch_and(!bits, Ordering::AcqRel) & !bits;
        // One line serves all causes, so the queue does not matter.
        if left & CONFIG_CHANGE != 0 {
            self.line.raise(Cause::Config);
        } else if left != 0 {
            self.line.raise(Cause::Queue(0));
        }
    }
}

impl Interrupt for InterruptStatus {
    fn raise(&self, cause: Cause) {
        let bit = match cause {
            Cause::Queue(_) => USED_BUFFER,
            Cause::Config => CONFIG_CHANGE,
        };
        // The bit first: who is interrupted finds it.
        self.bits.fetch_or(bit, Ordering::AcqRel);
        self.line.raise(cause);
    }
}
