//! Split rings written by hand: any descriptor, any index, at any time.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use polyvirt_core::hypervisor::Share;
use polyvirt_core::memory::{Access, MemoryError, Owner, Pages, Words};
use polyvirt_core::queue::split::layout::{self, Descriptor};
use polyvirt_core::queue::{ByteOrder, Layout, QueueConfig};
use polyvirt_core::transport::{Notify, Transport, TransportError, Virtqueue, driver_ok, initialize};
use polyvirt_core::{Features, Status};

use crate::suite::{Objection, Session, Trace};

pub use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, NO_INTERRUPT, NO_NOTIFY, WRITE};

/// A piece of guest memory that the device may access.
#[derive(Clone)]
pub struct Memory {
    /// The bytes, as the driver sees them.
    pub pages: Pages,
    /// Where the device sees them.
    pub address: u64,
    /// How many of them are meant.
    pub len: u32,
    share: Arc<Shared>,
}

struct Shared(Arc<dyn Share>, u64);

impl Drop for Shared {
    fn drop(&mut self) {
        // Refused while the device uses it: then it stays shared until the machine is gone.
        let _ = self.0.unshare(self.1);
    }
}

impl Memory {
    /// Shares `len` fresh bytes, all 0.
    pub fn new(session: &Session, len: u32, access: Access) -> Result<Self, Objection> {
        let share = session.transport.share();
        let pages = share.allocate(len as usize)?;
        let address = share.share(&pages, access)?;
        Ok(Self { pages, address, len, share: Arc::new(Shared(share, address)) })
    }

    /// For the device to read: `bytes`.
    pub fn readable(session: &Session, bytes: &[u8]) -> Result<Self, Objection> {
        let memory = Self::new(session, bytes.len() as u32, Access::READ)?;
        memory.pages.write(0, bytes)?;
        Ok(memory)
    }

    /// For the device to write: `len` bytes of `poison`.
    pub fn writable(session: &Session, len: u32, poison: u8) -> Result<Self, Objection> {
        let memory = Self::new(session, len, Access::WRITE)?;
        memory.pages.fill(0, len as usize, poison)?;
        Ok(memory)
    }

    /// The `len` bytes from `offset` on.
    ///
    /// # Panics
    /// If they reach beyond the end.
    pub fn part(&self, offset: u32, len: u32) -> Self {
        assert!(offset + len <= self.len);
        let pages = self.pages.slice(offset as usize, len as usize).expect("inside, as just checked");
        Self { pages, address: self.address + u64::from(offset), len, share: Arc::clone(&self.share) }
    }

    /// What it holds.
    pub fn bytes(&self) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = vec![0; self.len as usize];
        self.pages.read(0, &mut bytes)?;
        Ok(bytes)
    }
}

/// A split ring in the driver's hands, without any rules.
pub struct Ring {
    /// Where it is.
    pub config: QueueConfig,
    /// Its index.
    pub index: u16,
    /// The next value of the available index, if the driver is honest.
    pub available: u16,
    /// The used index up to which elements were taken.
    pub taken: u16,
    descriptors: Words<u64, Owner>,
    driver: Words<u16, Owner>,
    device: Words<u32, Owner>,
    notify: Box<dyn Notify>,
    big: bool,
    trace: Trace,
}

impl Ring {
    /// Takes over `virtqueue`, and clears it.
    pub fn new(virtqueue: Virtqueue, index: u16, trace: Trace) -> Result<Self, Objection> {
        let Virtqueue { config, descriptors, driver, device, notify } = virtqueue;
        for pages in [&descriptors, &driver, &device] {
            pages.fill(0, pages.len(), 0)?;
        }
        Ok(Self {
            config,
            index,
            available: 0,
            taken: 0,
            descriptors: Words::new(descriptors)?,
            driver: Words::new(driver)?,
            device: Words::new(device)?,
            notify,
            big: config.layout == Layout::Legacy(ByteOrder::Big),
            trace,
        })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.config.size
    }

    fn u16(&self, value: u16) -> u16 {
        if self.big { value.to_be() } else { value.to_le() }
    }

    fn u32(&self, value: u32) -> u32 {
        if self.big { value.to_be() } else { value.to_le() }
    }

    /// The two words of a descriptor as they are in memory.
    pub fn words(&self, descriptor: Descriptor) -> [u64; 2] {
        let Descriptor { address, len, flags, next } = descriptor;
        let mut bytes = [0; 16];
        if self.big {
            bytes[..8].copy_from_slice(&address.to_be_bytes());
            bytes[8..12].copy_from_slice(&len.to_be_bytes());
            bytes[12..14].copy_from_slice(&flags.to_be_bytes());
            bytes[14..].copy_from_slice(&next.to_be_bytes());
        } else {
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
        }
        let (first, second) = bytes.split_at(8);
        [first, second].map(|half| u64::from_ne_bytes(half.try_into().expect("eight bytes")))
    }

    /// Writes entry `slot` of the descriptor table.
    ///
    /// # Panics
    /// If the table has no such entry.
    pub fn set_descriptor(&self, slot: u16, descriptor: Descriptor) {
        self.trace.note(format!("descriptor {slot} of queue {}: {}", self.index, shown(descriptor)));
        self.set_descriptor_quietly(slot, descriptor);
    }

    /// [`Ring::set_descriptor`] without a trace.
    pub fn set_descriptor_quietly(&self, slot: u16, descriptor: Descriptor) {
        let [first, second] = self.words(descriptor);
        self.descriptors.store(2 * usize::from(slot), first, Ordering::SeqCst);
        self.descriptors.store(2 * usize::from(slot) + 1, second, Ordering::SeqCst);
    }

    /// The descriptor table, for whoever writes it from another thread.
    pub fn descriptors(&self) -> Words<u64, Owner> {
        self.descriptors.clone()
    }

    /// The bytes of the whole descriptor table.
    pub fn descriptor_bytes(&self) -> Result<Vec<u8>, MemoryError> {
        let mut bytes = vec![0; layout::descriptors_len(self.size()) as usize];
        self.descriptors.segment().read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// The bytes of an indirect table of `descriptors`.
    pub fn table(&self, descriptors: &[Descriptor]) -> Vec<u8> {
        self.trace
            .note(format!("a table of [{}]", descriptors.iter().copied().map(shown).collect::<Vec<_>>().join("; ")));
        descriptors.iter().flat_map(|&descriptor| self.words(descriptor)).flat_map(u64::to_ne_bytes).collect()
    }

    /// Links `pieces` (memory, device-writable) to a chain in consecutive slots from `head` on.
    pub fn chain(&self, head: u16, pieces: &[(Memory, bool)]) {
        let last = pieces.len() - 1;
        for (number, (memory, writable)) in pieces.iter().enumerate() {
            let slot = (head + number as u16) % self.size();
            self.set_descriptor(slot, link(memory, *writable, (number < last).then_some((slot + 1) % self.size())));
        }
    }

    /// Writes an entry of the available ring.
    pub fn set_entry(&self, slot: u16, head: u16) {
        self.driver.store(layout::available_entry(usize::from(slot % self.size())), self.u16(head), Ordering::SeqCst);
    }

    /// Writes the available index.
    pub fn set_available(&mut self, index: u16) {
        self.trace.note(format!("available index of queue {}: {index}", self.index));
        self.available = index;
        fence(Ordering::SeqCst);
        self.driver.store(layout::INDEX, self.u16(index), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Makes the chain at `head` available.
    pub fn offer(&mut self, head: u16) {
        self.offer_all(&[head]);
    }

    /// Makes the chains at `heads` available at once.
    pub fn offer_all(&mut self, heads: &[u16]) {
        for (number, &head) in heads.iter().enumerate() {
            self.set_entry(self.available.wrapping_add(number as u16), head);
        }
        self.trace.note(format!("make {heads:?} available in queue {}", self.index));
        self.set_available(self.available.wrapping_add(heads.len() as u16));
    }

    /// Rings the doorbell.
    pub fn kick(&mut self) -> Result<(), TransportError> {
        self.notify.notify()
    }

    /// Writes the flags of the available ring.
    pub fn set_flags(&self, flags: u16) {
        self.trace.note(format!("available flags of queue {}: {flags}", self.index));
        self.driver.store(0, self.u16(flags), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Writes used_event.
    pub fn set_used_event(&self, event: u16) {
        self.trace.note(format!("used_event of queue {}: {event}", self.index));
        self.driver.store(layout::used_event(self.size()), self.u16(event), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The flags of the used ring.
    pub fn used_flags(&self) -> u16 {
        self.u16(self.device.load(0, Ordering::SeqCst))
    }

    /// The used index.
    pub fn used_index(&self) -> u16 {
        fence(Ordering::SeqCst);
        self.u16(self.device.load(layout::INDEX, Ordering::SeqCst))
    }

    /// avail_event.
    pub fn avail_event(&self) -> u16 {
        self.u16(self.device.load(layout::avail_event(self.size()), Ordering::SeqCst))
    }

    /// An element of the used ring: id and length.
    pub fn used_element(&self, slot: u16) -> (u32, u32) {
        let entry = layout::used_entry(usize::from(slot % self.size()));
        let load = |index| self.u32(self.device.load(index, Ordering::SeqCst));
        (load(entry), load(entry + 1))
    }

    /// (In the device's place) the available index.
    pub fn available_index(&self) -> u16 {
        fence(Ordering::SeqCst);
        self.u16(self.driver.load(layout::INDEX, Ordering::SeqCst))
    }

    /// (In the device's place) the flags of the available ring.
    pub fn flags(&self) -> u16 {
        self.u16(self.driver.load(0, Ordering::SeqCst))
    }

    /// (In the device's place) an entry of the available ring.
    pub fn entry(&self, slot: u16) -> u16 {
        self.u16(self.driver.load(layout::available_entry(usize::from(slot % self.size())), Ordering::SeqCst))
    }

    /// (In the device's place) an entry of the descriptor table.
    pub fn descriptor(&self, slot: u16) -> Descriptor {
        let at = 2 * usize::from(slot % self.size());
        let words: [u64; 2] = [at, at + 1].map(|at| self.descriptors.load(at, Ordering::SeqCst));
        self.parse(words)
    }

    /// The reverse of [`Ring::words`].
    pub fn parse(&self, words: [u64; 2]) -> Descriptor {
        let rest = words[1].to_ne_bytes();
        let (len, flags, next) = ([rest[0], rest[1], rest[2], rest[3]], [rest[4], rest[5]], [rest[6], rest[7]]);
        match self.big {
            true => Descriptor {
                address: u64::from_be(words[0]),
                len: u32::from_be_bytes(len),
                flags: u16::from_be_bytes(flags),
                next: u16::from_be_bytes(next),
            },
            false => Descriptor {
                address: u64::from_le(words[0]),
                len: u32::from_le_bytes(len),
                flags: u16::from_le_bytes(flags),
                next: u16::from_le_bytes(next),
            },
        }
    }

    /// (In the device's place) writes the flags of the used ring.
    pub fn set_used_flags(&self, flags: u16) {
        self.trace.note(format!("used flags of queue {}: {flags}", self.index));
        self.device.store(0, self.u16(flags), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// (In the device's place) writes avail_event.
    pub fn set_avail_event(&self, event: u16) {
        self.trace.note(format!("avail_event of queue {}: {event}", self.index));
        self.device.store(layout::avail_event(self.size()), self.u16(event), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// (In the device's place) puts an element into the used ring.
    pub fn put_used(&self, position: u16, id: u32, len: u32) {
        self.trace.note(format!("used element of queue {}: id {id}, length {len}", self.index));
        self.put_used_quietly(position, id, len);
    }

    /// [`Ring::put_used`] without a trace.
    pub fn put_used_quietly(&self, position: u16, id: u32, len: u32) {
        let entry = layout::used_entry(usize::from(position % self.size()));
        self.device.store(entry, self.u32(id), Ordering::SeqCst);
        self.device.store(entry + 1, self.u32(len), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.device.store(layout::INDEX, self.u16(position.wrapping_add(1)), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The next used element, if there is one.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.taken {
            return None;
        }
        let element = self.used_element(self.taken);
        self.taken = self.taken.wrapping_add(1);
        self.trace.note(format!("queue {}: used id {}, length {}", self.index, element.0, element.1));
        Some(element)
    }

    /// Device-visible ranges of the ring, and what the device may do there.
    pub fn areas(&self) -> [(u64, u64, Access); 3] {
        let size = self.size();
        [
            (self.config.descriptors, layout::descriptors_len(size), Access::READ),
            (self.config.driver, layout::driver_len(size), Access::READ),
            (self.config.device, layout::device_len(size), Access::READ | Access::WRITE),
        ]
    }
}

/// A descriptor of `memory`, linked to `next`.
pub fn link(memory: &Memory, writable: bool, next: Option<u16>) -> Descriptor {
    let write = if writable { WRITE } else { 0 };
    let link = if next.is_some() { NEXT } else { 0 };
    Descriptor { address: memory.address, len: memory.len, flags: write | link, next: next.unwrap_or(0) }
}

fn shown(Descriptor { address, len, flags, next }: Descriptor) -> String {
    format!("{address:#x}+{len:#x}, flags {flags}, next {next}")
}

impl Session {
    /// How many queues a case uses.
    pub fn queues(&self) -> u16 {
        if self.cell.device_type == crate::suite::CONSOLE { 2 } else { 1 }
    }

    /// Initializes the device up to FEATURES_OK, with those of `wanted` that it offers.
    pub fn negotiate(&mut self, wanted: Features) -> Result<Features, Objection> {
        Ok(initialize(&mut self.transport, wanted)?)
    }

    /// Sets up queue `index` with its largest size.
    pub fn ring(&mut self, index: u16) -> Result<Ring, Objection> {
        self.ring_of(index, None)
    }

    /// Sets up queue `index` with `size` entries.
    pub fn ring_of(&mut self, index: u16, size: Option<u16>) -> Result<Ring, Objection> {
        let virtqueue = self.transport.find_vq(index, size)?;
        Ring::new(virtqueue, index, self.trace.clone())
    }

    /// Sets up all queues.
    pub fn rings(&mut self) -> Result<Vec<Ring>, Objection> {
        (0..self.queues()).map(|index| self.ring(index)).collect()
    }

    /// Tells the device that the driver is ready.
    pub fn go(&mut self) -> Result<(), Objection> {
        Ok(driver_ok(&mut self.transport)?)
    }

    /// All of the above: a running device with those of `wanted` that it offers.
    pub fn bring_up(&mut self, wanted: Features) -> Result<Vec<Ring>, Objection> {
        self.negotiate(wanted)?;
        let rings = self.rings()?;
        self.go()?;
        Ok(rings)
    }

    /// Whether the device says that it needs a reset.
    pub fn needs_reset(&mut self) -> Result<bool, Objection> {
        Ok(self.transport.status()?.contains(Status::DEVICE_NEEDS_RESET))
    }

    /// Waits, by interrupts, for the next used element of `ring`.
    pub fn wait_used(&mut self, ring: &mut Ring) -> Result<(u32, u32), Objection> {
        let expected = "the buffer is used, and an interrupt tells so";
        loop {
            if ring.config.event_idx && ring.used_index() == ring.taken {
                ring.set_used_event(ring.taken);
            }
            if let Some(element) = ring.take() {
                return Ok(element);
            }
            match self.transport.wait(self.watchdog) {
                Ok(_) if ring.used_index() == ring.taken && self.needs_reset()? => {
                    return Err(Objection::failed(expected, "the device needs a reset"));
                }
                Ok(_) => {}
                Err(TransportError::Watchdog(..)) => {
                    let observed = match ring.take() {
                        Some(_) => "the buffer was used, but no interrupt came",
                        None => "the buffer was not used",
                    };
                    return Err(Objection::failed(expected, format!("{observed} in {:?}", self.watchdog)));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for the next used element of `ring` by looking at the ring alone.
    pub fn poll_used(&mut self, ring: &mut Ring) -> Result<(u32, u32), Objection> {
        let begun = Instant::now();
        loop {
            if let Some(element) = ring.take() {
                return Ok(element);
            }
            if begun.elapsed() > self.watchdog {
                return Err(Objection::failed("the buffer is used", format!("it was not in {:?}", self.watchdog)));
            }
            std::thread::yield_now();
        }
    }

    /// Waits for any interrupt of a queue, without looking at rings.
    pub fn wait_interrupt(&mut self) -> Result<(), Objection> {
        loop {
            match self.transport.wait(self.watchdog) {
                Ok(interrupts) if interrupts.queues => return Ok(()),
                Ok(_) => {}
                Err(TransportError::Watchdog(..)) => {
                    return Err(Objection::failed(
                        "a used buffer notification",
                        format!("none in {:?}", self.watchdog),
                    ));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for a change of the configuration to be told.
    pub fn wait_config(&mut self) -> Result<(), Objection> {
        let begun = Instant::now();
        loop {
            match self.transport.wait(self.watchdog) {
                Ok(interrupts) if interrupts.config => return Ok(()),
                Ok(_) if begun.elapsed() < self.watchdog => {}
                Ok(_) | Err(TransportError::Watchdog(..)) => {
                    let expected = "a configuration change notification";
                    return Err(Objection::failed(expected, format!("none in {:?}", self.watchdog)));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether an interrupt is pending, which is taken.
    pub fn interrupted(&mut self) -> Result<bool, Objection> {
        match self.transport.wait(Duration::ZERO) {
            Ok(interrupts) => Ok(interrupts.queues || interrupts.config),
            Err(TransportError::Watchdog(..)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
