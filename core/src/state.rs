//! The device state machine: status, features, queues, configuration, reset (VIRTIO 1.4, chapters 2 and 3).
//!
//! Written once; every transport decodes its registers, channel programs or store nodes into it.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::mem;
use core::task::Waker;

use crate::device::{Device, Queues, SharedRegion};
use crate::features::Features;
use crate::hypervisor::{Cause, Interrupt};
use crate::memory::{GuestMemory, Pending};
use crate::queue::{
    Blocked, ByteOrder, Layout, MAX_QUEUE_SIZE, Observer, Queue, QueueConfig, QueueError, QueueState, SavedQueue,
};
use crate::status::Status;

/// How the driver talks to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    /// VIRTIO 1.0 and later.
    Modern,
    /// Before VIRTIO 1.0: no FEATURES_OK, the legacy ring layout, the guest's byte order.
    Legacy(ByteOrder),
}

/// One of the three areas of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// Descriptor area (split: descriptor table).
    Descriptors,
    /// Driver area (split: available ring).
    Driver,
    /// Device area (split: used ring).
    Device,
}

/// Half of a 64-bit address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

/// A device and its state: what a transport's device side drives.
pub struct VirtioDevice<M: GuestMemory> {
    device: Box<dyn Device<M>>,
    memory: M,
    interrupt: Arc<dyn Interrupt>,
    interface: Interface,
    transport_features: Features,
    waker: Waker,
    status: Status,
    accepted: Features,
    generation: u32,
    setups: Vec<QueueSetup>,
    queues: Vec<Option<Queue<M>>>,
    /// Who is to observe queues that do not run yet.
    observers: Vec<Option<Box<dyn Observer>>>,
    /// For each queue, whether it is to be served without a kick: the last burst did not finish it.
    unserved: Vec<bool>,
    /// The queue with which the next turn begins that no kick is the reason of.
    next: usize,
    /// Whether the driver wants the device suspended: it is once it has nothing in flight.
    suspending: bool,
    /// Whether the device is kept from guest memory.
    cut_off: bool,
    /// Whether a legacy driver uses the device before it has said DRIVER_OK.
    early: bool,
    reason: Option<QueueError>,
}

/// What the driver wrote about a queue.
#[derive(Clone, Debug, Default)]
struct QueueSetup {
    max_size: u16,
    size: u32,
    areas: [u64; 3],
    enabled: bool,
    /// Where the device goes on, if not at the beginning.
    saved: Option<SavedQueue>,
    /// Whether buffers are used in order although that was not negotiated.
    in_order: bool,
    /// What the queue waits for before it can start, though it is enabled.
    pending: Option<Pending>,
}

impl<M: GuestMemory> VirtioDevice<M> {
    /// Puts `device` into its initial state.
    pub fn new(device: Box<dyn Device<M>>, memory: M, interrupt: Arc<dyn Interrupt>, interface: Interface) -> Self {
        let setups: Vec<_> =
            device.queue_max_sizes().iter().map(|&max| QueueSetup::new(max.min(MAX_QUEUE_SIZE))).collect();
        let queues = setups.iter().map(|_| None).collect();
        let observers = setups.iter().map(|_| None).collect();
        let unserved = setups.iter().map(|_| false).collect();
        Self {
            device,
            memory,
            interrupt,
            interface,
            transport_features: Features::empty(),
            waker: Waker::noop().clone(),
            status: Status::empty(),
            accepted: Features::empty(),
            generation: 0,
            setups,
            queues,
            observers,
            unserved,
            next: 0,
            suspending: false,
            cut_off: false,
            early: false,
            reason: None,
        }
    }

    /// Offers `features` too: those that the transport carries out or leaves to the core, such as
    /// VIRTIO_F_RING_RESET and VIRTIO_F_RING_PACKED.
    #[must_use]
    pub fn with_features(mut self, features: Features) -> Self {
        self.transport_features = features;
        self
    }

    /// Lets every queue have up to `entries` entries, whatever the device says, for transports that have no way to tell
    /// the driver how many there may be.
    #[must_use]
    pub fn with_queue_max_size(mut self, entries: u16) -> Self {
        self.setups.fill(QueueSetup::new(entries.min(MAX_QUEUE_SIZE)));
        self
    }

    /// What a backend wakes when it has news; the transport's [`poll`](Self::poll) follows. Set before the driver is
    /// ready.
    pub fn set_waker(&mut self, waker: Waker) {
        self.waker = waker;
    }

    /// How the driver talks to the device.
    pub fn interface(&self) -> Interface {
        self.interface
    }

    /// The driver talks through `interface`, for transports that offer both (transitional devices, 2.2.3). Ignored while
    /// a driver uses the device: until a reset it keeps to the interface that it began with.
    pub fn set_interface(&mut self, interface: Interface) {
        if self.status.is_empty() && self.interface != interface {
            self.reset();
            self.interface = interface;
        }
    }

    /// Whether the device may access guest memory, for transports where that can be forbidden (Bus Master Enable of PCI).
    /// While it may not, it is as if it were slow: it takes, finishes and tells nothing. What came meanwhile is served
    /// when it may again. True if there is more to do, as in [`kick`](Self::kick).
    pub fn allow_memory(&mut self, allowed: bool) -> bool {
        let again = mem::replace(&mut self.cut_off, !allowed) && allowed;
        if again && self.suspending {
            self.queues.iter_mut().flatten().for_each(Queue::hold);
        }
        again && self.work(None)
    }

    /// The virtio device type (chapter 5).
    pub fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    /// The device's shared memory regions (2.10).
    pub fn shared_memory(&self) -> &[SharedRegion] {
        self.device.shared_memory()
    }

    /// The features offered: the device type's, the transport's, and those that the core carries out for every device.
    pub fn device_features(&self) -> Features {
        let rings = Features::INDIRECT_DESC | Features::EVENT_IDX;
        let core = match self.interface {
            Interface::Modern => Features::VERSION_1 | Features::IN_ORDER | Features::SUSPEND,
            Interface::Legacy(_) => Features::ANY_LAYOUT,
        };
        (self.device.features() | self.transport_features | rings | core) - self.device.withheld()
    }

    /// The features accepted so far.
    pub fn driver_features(&self) -> Features {
        self.accepted
    }

    /// The driver accepts `features`. Ignored once they are settled (FEATURES_OK; on the legacy interface DRIVER_OK).
    pub fn set_driver_features(&mut self, features: Features) {
        let settled = match self.interface {
            Interface::Modern => Status::FEATURES_OK,
            Interface::Legacy(_) => Status::DRIVER_OK,
        };
        if !self.status.intersects(settled | Status::FAILED) && !self.early {
            self.accepted = features;
        }
    }

    /// The device status.
    pub fn status(&self) -> Status {
        self.status
    }

    /// The driver writes the status field. 0 resets.
    ///
    /// Where the spec leaves the device's answer to a driver's mistake open, this is ours: bits are only ever added
    /// (a cleared bit stays set until reset); several bits may come in one write; FEATURES_OK stays away if the
    /// features are not acceptable, and DRIVER_OK without it; DEVICE_NEEDS_RESET is not the driver's to write, nor is a
    /// bit that there is no feature for; after FAILED only a reset counts. SUSPEND suspends a running device if that was
    /// negotiated, and shows in place of DRIVER_OK once it is; DRIVER_OK resumes (3.4 Device Suspend), which before that
    /// takes a write without SUSPEND.
    pub fn set_status(&mut self, status: Status) {
        if status.is_empty() {
            self.reset();
            return;
        }
        if self.status.contains(Status::FAILED) {
            return;
        }
        let before = self.status;
        self.write_suspend(status);
        // DRIVER_OK is not new when the device is suspended, nor when it is resumed.
        let mut new = status & !(before | self.status) & WRITTEN_BY_DRIVER;
        match self.interface {
            Interface::Modern => {
                if !self.features_acceptable() {
                    new &= !Status::FEATURES_OK;
                }
                if !(self.status | new).contains(Status::FEATURES_OK) {
                    new &= !Status::DRIVER_OK;
                }
            }
            Interface::Legacy(_) => new &= !Status::FEATURES_OK,
        }
        self.status |= new;
        if new.contains(Status::FEATURES_OK) {
            self.device.negotiated(self.accepted);
        }
        self.refresh();
        if new.contains(Status::FAILED) {
            self.stop();
        } else if new.contains(Status::DRIVER_OK) && !mem::take(&mut self.early) {
            self.start();
        }
    }

    /// What `status` says about SUSPEND; nothing if it is not negotiated, or the device does not run.
    fn write_suspend(&mut self, status: Status) {
        let suspended = self.status.contains(Status::SUSPEND);
        if !suspended && status.contains(Status::SUSPEND) {
            if !self.suspending && self.is_running() && self.accepted.contains(Features::SUSPEND) {
                self.suspending = true;
                if !self.cut_off {
                    self.queues.iter_mut().flatten().for_each(Queue::hold);
                }
                // What the backend has finished meanwhile goes back now.
                self.work(None);
            }
        } else if (suspended || self.suspending) && status.contains(Status::DRIVER_OK) {
            // Of a suspended device SUSPEND may be written back: drivers do not clear bits.
            self.suspending = false;
            self.status = (self.status - Status::SUSPEND) | Status::DRIVER_OK;
            self.queues.iter_mut().flatten().for_each(Queue::release);
            for index in 0..self.queue_count() {
                if self.queue_enabled(index) && self.queue(index).is_none() {
                    self.start_queue(index);
                }
            }
            self.unserved.iter_mut().zip(&self.queues).for_each(|(unserved, queue)| *unserved = queue.is_some());
            self.begin();
        }
    }

    /// Whether the driver drives the device: buffers are consumed, and guest memory is accessed, only then.
    pub fn is_running(&self) -> bool {
        let stopped = Status::FAILED | Status::DEVICE_NEEDS_RESET | Status::SUSPEND;
        (self.early || self.status.contains(Status::DRIVER_OK)) && !self.status.intersects(stopped)
    }

    /// Why the device needs a reset; none while it does not.
    pub fn needs_reset(&self) -> Option<QueueError> {
        self.reason
    }

    /// Back to the initial state. When this returns, the device does not touch guest memory any more.
    pub fn reset(&mut self) {
        self.stop();
        self.status = Status::empty();
        self.accepted = Features::empty();
        self.reason = None;
        for setup in &mut self.setups {
            *setup = QueueSetup::new(setup.max_size);
        }
        self.observers.fill_with(|| None);
    }

    /// How many queues there are.
    pub fn queue_count(&self) -> u16 {
        self.setups.len() as u16
    }

    /// The most entries of queue `index`; 0 if there is no such queue.
    pub fn queue_max_size(&self, index: u16) -> u16 {
        self.setup(index).map_or(0, |setup| setup.max_size)
    }

    /// The entries of queue `index` as the driver set them (initially the maximum); 0 if there is no such queue.
    pub fn queue_size(&self, index: u16) -> u32 {
        self.setup(index).map_or(0, |setup| setup.size)
    }

    /// The driver chooses the entries of a queue. Whether they are allowed shows when the queue starts. Ignored while
    /// the queue is enabled.
    pub fn set_queue_size(&mut self, index: u16, size: u32) {
        if let Some(setup) = self.disabled(index) {
            setup.size = size;
        }
    }

    /// The device-visible address of an area of queue `index`.
    pub fn queue_address(&self, index: u16, area: Area) -> u64 {
        self.setup(index).map_or(0, |setup| setup.areas[area as usize])
    }

    /// The driver places an area of a queue. Ignored while the queue is enabled.
    pub fn set_queue_address(&mut self, index: u16, area: Area, address: u64) {
        if let Some(setup) = self.disabled(index) {
            setup.areas[area as usize] = address;
        }
    }

    /// The driver writes one half of an area's address.
    pub fn set_queue_address_half(&mut self, index: u16, area: Area, half: Half, value: u32) {
        let old = self.queue_address(index, area);
        let new = match half {
            Half::Low => (old & !u64::from(u32::MAX)) | u64::from(value),
            Half::High => (old & u64::from(u32::MAX)) | u64::from(value) << 32,
        };
        self.set_queue_address(index, area, new);
    }

    /// Whether queue `index` is enabled.
    pub fn queue_enabled(&self, index: u16) -> bool {
        self.setup(index).is_some_and(|setup| setup.enabled)
    }

    /// The driver enables a queue: from DRIVER_OK on it runs.
    pub fn enable_queue(&mut self, index: u16) {
        let Some(setup) = self.disabled(index) else { return };
        setup.enabled = true;
        if self.is_running() {
            self.start_queue(index);
            self.begin();
        }
    }

    /// Queue `index` begins where another device side left it, for transports that hand queues over. Ignored while the
    /// queue is enabled.
    pub fn set_saved_queue(&mut self, index: u16, saved: SavedQueue) {
        if let Some(setup) = self.disabled(index) {
            setup.saved = Some(saved);
        }
    }

    /// `observer` sees what the device takes from queue `index` and gives back, once it runs and until it is reset. Ignored
    /// while the queue is enabled.
    pub fn observe_queue(&mut self, index: u16, observer: Box<dyn Observer>) {
        if self.disabled(index).is_some() {
            self.observers[usize::from(index)] = Some(observer);
        }
    }

    /// Buffers of queue `index` are used in the order in which they were made available, whether that was negotiated or
    /// not: then the used index alone tells what is in flight, to whoever goes on with the queue. Ignored while the queue
    /// is enabled.
    pub fn keep_queue_order(&mut self, index: u16) {
        if let Some(setup) = self.disabled(index) {
            setup.in_order = true;
        }
    }

    /// From now on the device takes nothing from queue `index`, but finishes what it has: poll until
    /// [nothing is in flight](Self::queue_in_flight). [`VirtioDevice::reset_queue`] ends that.
    pub fn hold_queue(&mut self, index: u16) {
        if let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) {
            queue.hold();
        }
    }

    /// How many chains of queue `index` the device has.
    pub fn queue_in_flight(&self, index: u16) -> usize {
        self.queue(index).map_or(0, Queue::in_flight)
    }

    /// Where the device is in queue `index`; none if the queue does not run.
    pub fn queue_state(&self, index: u16) -> Option<QueueState> {
        self.queue(index).map(Queue::state)
    }

    /// Why queue `index` alone is broken; none while it works.
    pub fn queue_broken(&self, index: u16) -> Option<QueueError> {
        self.queue(index)?.broken()
    }

    /// The memory that queue `index` waits for: to start, or to have its next chain taken. It is neither idle nor broken:
    /// [`VirtioDevice::memory_came`] goes on with it.
    pub fn queue_pending(&self, index: u16) -> Option<Pending> {
        self.setup(index)?.pending.or_else(|| self.queue(index)?.pending())
    }

    /// Memory that was pending may be there: queues that wait for it start, or are to be served. True if there is more to do,
    /// as in [`kick`](Self::kick).
    pub fn memory_came(&mut self) -> bool {
        if !self.is_running() {
            // A suspended device starts them when it is resumed.
            return false;
        }
        for index in 0..self.queue_count() {
            let at = usize::from(index);
            if self.setups[at].pending.is_some() {
                self.start_queue(index);
            } else if self.queue(index).is_some_and(|queue| queue.pending().is_some()) {
                self.unserved[at] = true;
            }
        }
        self.settle();
        self.work(None)
    }

    /// The device needs a reset, for a `reason` that its transport found: a queue that cannot be handed over.
    pub fn fail(&mut self, reason: QueueError) {
        self.reason = self.reason.or(Some(reason));
        self.settle();
    }

    /// The device needs no reset any more, unless a queue is still broken: for transports on which a broken queue is
    /// begun anew by a [`VirtioDevice::reset_queue`], without a reset of the device. Its other queues go on.
    pub fn recover(&mut self) {
        if self.reason.is_none() || self.queues.iter().flatten().any(|queue| queue.broken().is_some()) {
            return;
        }
        self.reason = None;
        self.status -= Status::DEVICE_NEEDS_RESET;
        self.unserved.iter_mut().zip(&self.queues).for_each(|(unserved, queue)| *unserved = queue.is_some());
        self.begin();
    }

    /// Queue `index` back to its initial state, alone (2.6.1: VIRTIO_F_RING_RESET, or QueueReady = 0 on MMIO). When this
    /// returns, the device does not touch the queue's memory any more.
    pub fn reset_queue(&mut self, index: u16) {
        let Some(setup) = self.setups.get_mut(usize::from(index)) else { return };
        *setup = QueueSetup::new(setup.max_size);
        self.device.reset_queue(index);
        self.queues[usize::from(index)] = None;
        self.observers[usize::from(index)] = None;
        self.unserved[usize::from(index)] = false;
    }

    /// Changes whenever the configuration does.
    pub fn config_generation(&self) -> u32 {
        self.generation
    }

    /// The device configuration.
    pub fn config(&self) -> &[u8] {
        self.device.config()
    }

    /// Reads the configuration, as it is by now, from `offset` on; bytes beyond its end read as 0.
    pub fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.refresh();
        let config = self.device.config();
        let from = usize::try_from(offset).map_or(config.len(), |offset| offset.min(config.len()));
        let len = data.len().min(config.len() - from);
        data[..len].copy_from_slice(&config[from..from + len]);
        data[len..].fill(0);
    }

    /// Writes the configuration from `offset` on; a write that reaches beyond its end is ignored, and so is any while the
    /// device is suspended.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.status.contains(Status::SUSPEND) {
            return;
        }
        let before = self.device.config().to_vec();
        if let Ok(offset) = usize::try_from(offset)
            && !data.is_empty()
            && offset.checked_add(data.len()).is_some_and(|end| end <= before.len())
        {
            self.device.write_config(offset, data);
            if self.device.config() != before {
                self.generation = self.generation.wrapping_add(1);
            }
        }
    }

    /// Brings the configuration up to date. The driver is told of a change once it drives the device; while it is
    /// suspended nothing changes.
    fn refresh(&mut self) {
        if !self.status.contains(Status::SUSPEND) && self.device.refresh() {
            self.generation = self.generation.wrapping_add(1);
            if self.status.contains(Status::DRIVER_OK) {
                self.interrupt.raise(Cause::Config);
            }
        }
    }

    /// What the device wants to be notified of queue `index` with, if VIRTIO_F_NOTIF_CONFIG_DATA is negotiated
    /// (4.1.4.3 queue_notif_config_data). Not the index, so that a driver that confuses the two is found out.
    pub const fn queue_notification_data(index: u16) -> u16 {
        !index
    }

    /// The queue that a driver notification of `value` is for, as far as `value` says (2.3, 4.1.5.2, 4.2.3.3): the low 16
    /// bits with VIRTIO_F_NOTIFICATION_DATA, all otherwise; the device's own data with VIRTIO_F_NOTIF_CONFIG_DATA.
    ///
    /// What else the driver tells with VIRTIO_F_NOTIFICATION_DATA, its next available entry, is a hint; the ring itself
    /// says so.
    pub fn notified_queue(&self, value: u32) -> Option<u16> {
        let named = match self.accepted.contains(Features::NOTIFICATION_DATA) {
            true => value as u16,
            false => u16::try_from(value).ok()?,
        };
        let own = self.accepted.contains(Features::NOTIF_CONFIG_DATA);
        let index = if own { Self::queue_notification_data(named) } else { named };
        (index < self.queue_count()).then_some(index)
    }

    /// The driver kicked queue `index`. True if there is more to do: call this or [`poll`](Self::poll), others in
    /// between.
    pub fn kick(&mut self, index: u16) -> bool {
        self.begin_early(index);
        self.work(Some(index))
    }

    /// A backend has news, or an earlier call said that there is more to do. True as in [`kick`](Self::kick).
    pub fn poll(&mut self) -> bool {
        if !self.is_running() {
            // The news may be of its configuration, which a driver reads before it drives the device.
            self.refresh();
        }
        self.work(None)
    }

    fn queue(&self, index: u16) -> Option<&Queue<M>> {
        self.queues.get(usize::from(index))?.as_ref()
    }

    fn setup(&self, index: u16) -> Option<&QueueSetup> {
        self.setups.get(usize::from(index))
    }

    fn disabled(&mut self, index: u16) -> Option<&mut QueueSetup> {
        self.setups.get_mut(usize::from(index)).filter(|setup| !setup.enabled)
    }

    fn features_acceptable(&self) -> bool {
        let accepted = self.accepted;
        self.device_features().contains(accepted)
            && (self.interface != Interface::Modern || accepted.contains(Features::VERSION_1))
    }

    fn start(&mut self) {
        // A legacy driver has no FEATURES_OK to see a refusal by: what was not offered does not count.
        self.accepted &= self.device_features();
        for index in 0..self.queue_count() {
            if self.queue_enabled(index) {
                self.start_queue(index);
            }
        }
        self.device.activate(self.accepted, self.waker.clone());
        self.begin();
    }

    /// A legacy driver may use the device before it says DRIVER_OK (3.1.2 Legacy Interface: Device Initialization), though
    /// not before it says that it is there: its first kick starts the device.
    fn begin_early(&mut self, index: u16) {
        let stages = Status::DRIVER | Status::DRIVER_OK | Status::DEVICE_NEEDS_RESET | Status::FAILED;
        if self.interface != Interface::Modern
            && !self.early
            && self.status & stages == Status::DRIVER
            && self.queue_enabled(index)
        {
            self.early = true;
            self.start();
        }
    }

    /// The first turn after queues were started: whoever filled them before may not kick again, and what the device
    /// had for the driver until now waited for it.
    fn begin(&mut self) {
        self.settle();
        if self.work(None) {
            self.waker.wake_by_ref();
        }
    }

    fn start_queue(&mut self, index: u16) {
        let Some(QueueSetup { max_size, size, areas, saved, in_order, .. }) = self.setup(index).cloned() else {
            return;
        };
        let layout = match self.interface {
            Interface::Modern if self.accepted.contains(Features::RING_PACKED) => Layout::Packed,
            Interface::Modern => Layout::Modern,
            Interface::Legacy(order) => Layout::Legacy(order),
        };
        let queue = match u16::try_from(size) {
            Ok(size) if size <= max_size => {
                let config = QueueConfig {
                    size,
                    descriptors: areas[Area::Descriptors as usize],
                    driver: areas[Area::Driver as usize],
                    device: areas[Area::Device as usize],
                    layout,
                    event_idx: self.accepted.contains(Features::EVENT_IDX),
                    indirect: self.accepted.contains(Features::INDIRECT_DESC),
                    in_order: in_order || self.accepted.contains(Features::IN_ORDER),
                };
                match saved {
                    Some(saved) => Queue::restore(self.memory.clone(), config, &saved),
                    None => Queue::new(self.memory.clone(), config),
                }
            }
            _ => Err(QueueError::Size { size, max: max_size }.into()),
        };
        let at = usize::from(index);
        self.setups[at].pending = None;
        match queue {
            Ok(mut queue) => {
                if let Some(observer) = self.observers[at].take() {
                    queue.observe(observer);
                }
                self.queues[at] = Some(queue);
                self.unserved[at] = true;
            }
            Err(Blocked::Pending(pending)) => self.setups[at].pending = Some(pending),
            Err(Blocked::Broken(reason)) => self.reason = self.reason.or(Some(reason)),
        }
    }

    /// Gives the device a turn: for the queue that was kicked and those that an earlier turn did not finish, or, if none was
    /// kicked, for its own news too. The turn ends with the first queue whose burst is spent; the next begins behind that,
    /// so that however many queues a driver keeps busy, a turn is soon over and every queue has its own.
    fn work(&mut self, kicked: Option<u16>) -> bool {
        if let Some(index) = kicked {
            let Some(Some(_)) = self.queues.get(usize::from(index)) else { return false };
            self.unserved[usize::from(index)] = true;
        }
        if self.cut_off {
            return false;
        }
        if self.is_running() {
            // A device may take from any queue, whichever was kicked.
            self.queues.iter_mut().flatten().for_each(Queue::begin_burst);
            let mut queues = Queues { queues: &mut self.queues, config_changed: false };
            if kicked.is_none() {
                self.device.poll(&mut queues);
            }
            let count = self.unserved.len();
            let first = kicked.map_or(self.next, usize::from);
            let mut last = first;
            for index in (first..count).chain(0..first) {
                if mem::take(&mut self.unserved[index]) {
                    self.device.kick(index as u16, &mut queues);
                    if queues.get(index as u16).is_some_and(|queue| queue.is_spent()) {
                        last = index;
                        break;
                    }
                }
            }
            if kicked.is_none() {
                self.next = if last + 1 < count { last + 1 } else { 0 };
            }
            let config_changed = queues.config_changed;
            for (queue, unserved) in self.queues.iter_mut().zip(&mut self.unserved) {
                *unserved |= queue.as_mut().is_some_and(Queue::end_burst);
            }
            if config_changed {
                self.generation = self.generation.wrapping_add(1);
                self.interrupt.raise(Cause::Config);
            }
        }
        self.settle();
        self.is_running() && self.unserved.contains(&true)
    }

    /// After any work: interrupts for what was used, and NEEDS_RESET if the driver broke a queue.
    fn settle(&mut self) {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            if !self.cut_off && queue.needs_interrupt() {
                self.interrupt.raise(Cause::Queue(index as u16));
            }
            self.reason = self.reason.or(queue.broken());
        }
        if let Some(reason) = self.reason
            && !self.status.contains(Status::DEVICE_NEEDS_RESET)
        {
            tracing::debug!(%reason, "the device needs a reset");
            self.status |= Status::DEVICE_NEEDS_RESET;
            if self.status.contains(Status::DRIVER_OK) {
                self.interrupt.raise(Cause::Config);
            }
        }
        if self.suspending && !self.cut_off && self.queues.iter().flatten().all(Queue::is_idle) {
            self.suspending = false;
            self.status = (self.status - Status::DRIVER_OK) | Status::SUSPEND;
        }
    }

    fn stop(&mut self) {
        self.suspending = false;
        self.early = false;
        self.device.reset();
        self.queues.iter_mut().for_each(|queue| *queue = None);
        self.unserved.fill(false);
    }
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        let (enabled, saved, in_order, pending) = (false, None, false, None);
        Self { max_size, size: max_size.into(), areas: [0; 3], enabled, saved, in_order, pending }
    }
}

const WRITTEN_BY_DRIVER: Status =
    Status::ACKNOWLEDGE.union(Status::DRIVER).union(Status::FEATURES_OK).union(Status::DRIVER_OK).union(Status::FAILED);

#[cfg(test)]
mod tests;
