//! The host's side: a function whose registers are decoded into the device state machine.

use std::sync::Arc;
use std::task::Waker;

use polyvirt_core::device::{self, SharedRegion};
use polyvirt_core::hypervisor::{BusDevice, Host, HypervisorError, Interrupt};
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::queue::ByteOrder;
use polyvirt_core::state::{Interface, VirtioDevice};
use polyvirt_core::{Features, Status};

use super::configuration::{Configuration, Identity};
use super::host::HostPlace;
use super::interrupts::Interrupts;
use super::registers::*;
use super::root::Slot;

/// Which interfaces a device has.
///
/// The byte order of a legacy guest is that of its rings. The configuration of a device and its requests are as the device
/// has them; those of ours are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// That of VIRTIO 1.0 and later.
    Modern,
    /// Both; legacy guests have this byte order.
    Transitional(ByteOrder),
    /// That from before VIRTIO 1.0, for guests of this byte order.
    Legacy(ByteOrder),
}

/// Puts `device` onto the bus of `host`. `memory` is [`Host::memory`], perhaps wrapped.
///
/// Fails if the bus is full, or if the device has a type that there is no id for, or two shared memory regions of one id.
pub fn attach<H, M>(
    host: &mut H,
    memory: M,
    device: Box<dyn device::Device<M>>,
    generation: Generation,
) -> Result<(), HypervisorError>
where
    H: Host<Place = HostPlace>,
    M: GuestMemory + Send + 'static,
{
    let queues = device.queue_max_sizes().len();
    let queues = u16::try_from(queues).map_err(|_| HypervisorError::Exhausted("queue indices"))?;
    let identity = identity(device.device_type(), generation)?;
    let place = host.place(device.device_type(), queues)?;
    let interrupt = host.interrupt(&place);
    let device = Device::new(device, memory, &place, interrupt, &identity, generation)?;
    host.plug(place, Box::new(device))
}

// Where what is: base address registers, and offsets behind them.
pub(super) const LEGACY_BAR: u8 = 0;
const MSIX_BAR: u8 = 1;
const SHARED_BAR: u8 = 2;
pub(super) const MODERN_BAR: u8 = 4;

/// Ports of the legacy interface: registers, then all the configuration that any device type has.
const LEGACY_LEN: u64 = 256;

/// A device behind a function of a PCI bus.
///
/// Its offsets are those of [`region`]s: configuration space, then what is behind each base address register. Any access
/// is answered: reads of any width give what is there, and 0 where nothing is; a write that is not that of a whole field
/// changes nothing, but for configuration space, the MSI-X table and shared memory, which are memory.
pub struct Device<M: GuestMemory> {
    pub(super) configuration: Configuration,
    pub(super) state: VirtioDevice<M>,
    pub(super) interrupts: Arc<Interrupts>,
    pub(super) waker: Waker,
    pub(super) queue_select: u16,
    pub(super) legacy: Option<ByteOrder>,
    modern: bool,
    slot: Arc<Slot>,
    /// For each: queue, base address register, offset, value if not any.
    pub(super) doorbells: Vec<(u16, u8, u64, Option<u16>)>,
    msix: u16,
    pending_at: u64,
    pub(super) window: Option<u16>,
    shared: Vec<(u64, SharedRegion)>,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    /// The generation that the driver sees, and what the device's was when it last changed.
    pub(super) generation: (u8, u32),
}

impl<M: GuestMemory> Device<M> {
    fn new(
        device: Box<dyn device::Device<M>>,
        memory: M,
        place: &HostPlace,
        interrupt: Arc<dyn Interrupt>,
        identity: &Identity,
        generation: Generation,
    ) -> Result<Self, HypervisorError> {
        let (modern, legacy) = match generation {
            Generation::Modern => (true, None),
            Generation::Transitional(order) => (true, Some(order)),
            Generation::Legacy(order) => (false, Some(order)),
        };
        let interface = if modern { Interface::Modern } else { legacy.map_or(Interface::Modern, Interface::Legacy) };
        let offered =
            Features::RING_RESET | Features::RING_PACKED | Features::NOTIFICATION_DATA | Features::NOTIF_CONFIG_DATA;
        let state = VirtioDevice::new(device, memory, interrupt, interface).with_features(offered);
        let mut new = Self {
            configuration: Configuration::new(identity).with_pin(),
            state,
            interrupts: Arc::clone(&place.interrupts),
            waker: Waker::noop().clone(),
            queue_select: 0,
            legacy,
            modern,
            slot: Arc::clone(&place.slot),
            doorbells: Vec::new(),
            msix: 0,
            pending_at: 0,
            window: None,
            shared: Vec::new(),
            device_feature_select: 0,
            driver_feature_select: 0,
            generation: (0, 0),
        };
        if legacy.is_some() {
            new.configuration.add_bar(LEGACY_BAR, BAR_IO, LEGACY_LEN);
            let queues = 0..new.state.queue_count();
            new.doorbells.extend(queues.map(|queue| (queue, LEGACY_BAR, legacy::QUEUE_NOTIFY, Some(queue))));
        }
        if modern {
            new.add_modern();
            new.add_shared_memory()?;
        }
        new.add_messages();
        new.configured();
        Ok(new)
    }

    fn add_messages(&mut self) {
        let vectors = self.interrupts.vectors();
        self.pending_at = (u64::from(vectors) * MSIX_ENTRY).max(0x800);
        let len = (self.pending_at + u64::from(vectors).div_ceil(64) * 8).next_power_of_two().max(0x1000);
        self.configuration.add_bar(MSIX_BAR, 0, len);
        let mut body = vec![0; 10];
        let at = u32::from(MSIX_BAR);
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&at.to_le_bytes());
        body[6..].copy_from_slice(&(self.pending_at as u32 | at).to_le_bytes());
        self.msix = self.configuration.add_capability(CAP_MSIX, &body);
        self.configuration.allow(self.msix + MSIX_CONTROL, &(MSIX_ENABLE | MSIX_MASK).to_le_bytes());
    }

    /// Adds a capability of virtio's, and says where.
    pub(super) fn add_structure(&mut self, kind: u8, bar: u8, id: u8, offset: u64, length: u64, more: &[u8]) -> u16 {
        let mut body = vec![16 + more.len() as u8, kind, bar, id, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        body.extend(more);
        self.configuration.add_capability(CAP_VENDOR, &body)
    }

    fn add_shared_memory(&mut self) -> Result<(), HypervisorError> {
        let mut end = 0u64;
        for region in self.state.shared_memory() {
            if self.shared.iter().any(|(_, other)| other.id == region.id) {
                return Err(refused(format!("two shared memory regions have the id {}", region.id)));
            }
            self.shared.push((end, region.clone()));
            end = (end + region.pages.len() as u64).next_multiple_of(0x1000);
        }
        if end == 0 {
            return Ok(());
        }
        self.configuration.add_bar(SHARED_BAR, BAR_64 | BAR_PREFETCHABLE, end.next_power_of_two());
        for (offset, SharedRegion { id, pages }) in self.shared.clone() {
            let high = [(offset >> 32) as u32, (pages.len() as u64 >> 32) as u32].map(u32::to_le_bytes);
            self.add_structure(CAP_SHARED_MEMORY, SHARED_BAR, id, offset, pages.len() as u64, high.as_flattened());
        }
        Ok(())
    }

    fn read_configuration(&mut self, offset: u64, data: &mut [u8]) {
        let pin = if self.interrupts.wants_pin() { STATUS_INTERRUPT } else { 0 };
        self.configuration.set(STATUS, &(STATUS_CAPABILITIES | pin).to_le_bytes());
        if let Some((bar, at, len)) = self.window_access(offset, data.len()) {
            let mut through = [0; 4];
            self.read_bar(bar, at, &mut through[..len]);
            self.configuration.set(self.window.unwrap_or_default() + CAP_DATA, &through);
        }
        self.configuration.read(offset, data);
    }

    fn write_configuration(&mut self, offset: u64, data: &[u8]) {
        self.configuration.write(offset, data);
        if let Some((bar, at, len)) = self.window_access(offset, data.len()) {
            let through = self.configuration.u32(self.window.unwrap_or_default() + CAP_DATA).to_le_bytes();
            self.write_bar(bar, at, &through[..len]);
        }
        self.configured();
    }

    /// Does as configuration space says now.
    pub(super) fn configured(&mut self) {
        let command = self.configuration.u16(COMMAND);
        let control = self.configuration.u16(self.msix + MSIX_CONTROL);
        self.interrupts.configure(control, command);
        self.slot.decode(self.configuration.decoded(), &self.doorbells);
        // What came while the device could not reach memory is done when the host polls.
        if self.state.allow_memory(command & COMMAND_MASTER != 0) {
            self.waker.wake_by_ref();
        }
    }

    /// Which access behind a base address register an access to configuration space causes, if it touches the window's
    /// data and the window is set to what there is (4.1.4.9).
    fn window_access(&self, offset: u64, len: usize) -> Option<(u8, u64, usize)> {
        let window = self.window?;
        let data = u64::from(window + CAP_DATA);
        if offset >= data + 4 || offset.saturating_add(len as u64) <= data {
            return None;
        }
        let bar = self.configuration.u8(window + CAP_BAR);
        let at = u64::from(self.configuration.u32(window + CAP_OFFSET));
        let len = self.configuration.u32(window + CAP_LENGTH);
        let fits = at + u64::from(len) <= self.configuration.bar_len(bar)?;
        (fits && matches!(len, 1 | 2 | 4) && at.is_multiple_of(len.into())).then_some((bar, at, len as usize))
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        match bar {
            LEGACY_BAR => self.read_legacy(offset, data),
            MSIX_BAR if offset >= self.pending_at => self.interrupts.read_pending(offset - self.pending_at, data),
            MSIX_BAR => self.interrupts.read_table(offset, data),
            SHARED_BAR => self.read_shared(offset, data),
            MODERN_BAR => self.read_modern(offset, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        match bar {
            LEGACY_BAR => self.write_legacy(offset, data),
            MSIX_BAR if offset < self.pending_at => self.interrupts.write_table(offset, data),
            SHARED_BAR => self.write_shared(offset, data),
            MODERN_BAR => self.write_modern(offset, data),
            _ => {}
        }
    }

    fn read_shared(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((at, pages)) = self.shared_at(offset) {
            let len = data.len().min(pages.len() - at);
            // Inside the region, so it is there.
            let _ = pages.read(at, &mut data[..len]);
        }
    }

    fn write_shared(&self, offset: u64, data: &[u8]) {
        if let Some((at, pages)) = self.shared_at(offset) {
            let _ = pages.write(at, &data[..data.len().min(pages.len() - at)]);
        }
    }

    fn shared_at(&self, offset: u64) -> Option<(usize, &polyvirt_core::memory::Pages)> {
        self.shared.iter().find_map(|(start, region)| {
            let at = usize::try_from(offset.checked_sub(*start)?).ok()?;
            (at < region.pages.len()).then_some((at, &region.pages))
        })
    }

    /// The driver accesses the device through `interface`. Whether it is the one in use: that is the first one used after a
    /// reset, and what is done through the other one does not concern its driver, but for a reset.
    pub(super) fn use_interface(&mut self, interface: Interface) -> bool {
        let has = match interface {
            Interface::Modern => self.modern,
            Interface::Legacy(_) => self.legacy.is_some(),
        };
        if has {
            self.state.set_interface(interface);
        }
        self.state.interface() == interface
    }

    pub(super) fn set_status(&mut self, status: u8) {
        self.state.set_status(Status::from_bits_retain(status));
        if status == 0 {
            self.interrupts.reset();
            (self.device_feature_select, self.driver_feature_select, self.queue_select) = (0, 0, 0);
        }
    }

    /// The doorbell of `queue`, written as a register: what is left to do is done when the host polls.
    pub(super) fn ring(&mut self, queue: u16) {
        if self.state.kick(queue) {
            self.waker.wake_by_ref();
        }
    }
}

impl<M: GuestMemory + Send> BusDevice for Device<M> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match region_of(offset) {
            (None, offset) => self.read_configuration(offset, data),
            (Some(bar), offset) => self.read_bar(bar, offset, data),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match region_of(offset) {
            (None, offset) => self.write_configuration(offset, data),
            (Some(bar), offset) => self.write_bar(bar, offset, data),
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

/// Which base address register an offset is behind, none for configuration space; and the offset there.
fn region_of(offset: u64) -> (Option<u8>, u64) {
    let region = (offset >> REGION_SHIFT) as u8;
    (region.checked_sub(1), offset & ((1 << REGION_SHIFT) - 1))
}

/// The largest power of two up to `max`; 0 for 0.
pub(super) fn floor_power_of_two(max: u16) -> u16 {
    max.checked_ilog2().map_or(0, |log| 1 << log)
}

fn identity(device_type: u32, generation: Generation) -> Result<Identity, HypervisorError> {
    let modern = || u16::try_from(device_type).ok().filter(|id| *id < 0x40).map(|id| MODERN_ID + id);
    let transitional = || transitional_id(device_type);
    let (device, revision, subsystem) = match generation {
        Generation::Modern => (modern(), 1, modern()),
        Generation::Transitional(_) | Generation::Legacy(_) => (transitional(), 0, u16::try_from(device_type).ok()),
    };
    match (device, subsystem) {
        (Some(device), Some(subsystem)) => Ok(Identity {
            vendor: VIRTIO_VENDOR,
            device,
            revision,
            // In no class: the ids say what it is.
            class: 0xff_0000,
            subsystem: (VIRTIO_VENDOR, subsystem),
        }),
        _ => Err(refused(format!("device type {device_type} has no PCI id in this generation"))),
    }
}

fn refused(reason: String) -> HypervisorError {
    HypervisorError::Refused { call: "attach", reason }
}
