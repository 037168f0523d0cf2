//! A split ring in memory that is rust-vmm's and ours at once.

use std::ptr::NonNull;
use std::sync::Arc;

use polyvirt_core::memory::{FlatMemory, Owner, Pages, Segment};
use polyvirt_core::queue::split::layout::{INDIRECT, NEXT, WRITE, descriptors_len, device_len, driver_len};
use polyvirt_core::queue::{self, Chain, Layout, QueueConfig};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Where the parts of the ring are.
const DESCRIPTORS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
/// Where there is memory for tables.
pub(crate) const TABLES: u64 = 0x4_0000;
/// Where there is memory for buffers: two regions that touch at [`SEAM`].
pub(crate) const BUFFERS: u64 = 0x10_0000;
pub(crate) const SEAM: u64 = 0x10_4000;
pub(crate) const END: u64 = 0x10_8000;

/// Start and length of each region.
const REGIONS: [(u64, usize); 3] = [(DESCRIPTORS, 0x4_0000), (BUFFERS, 0x4000), (SEAM, 0x4000)];

/// A descriptor: address, length, flags, next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    pub(crate) const fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A piece of a chain: address, bytes, whether the device may write it. None crosses a seam.
pub(crate) type Piece = (u64, u64, bool);

/// What rust-vmm's queue says of a chain.
pub(crate) struct Theirs {
    pub(crate) head: u16,
    pub(crate) descriptors: Vec<Descriptor>,
}

impl Theirs {
    /// The pieces of memory that its descriptors describe; none if some are not memory.
    pub(crate) fn pieces(&self) -> Option<Vec<Piece>> {
        let mut pieces = Vec::new();
        for descriptor in &self.descriptors {
            let mut address = descriptor.address;
            let end = address.checked_add(descriptor.len.into())?;
            while address < end {
                let region = REGIONS.iter().map(|&(start, len)| start..start + len as u64);
                let stop = region.clone().find(|region| region.contains(&address))?.end.min(end);
                pieces.push((address, stop - address, descriptor.has(WRITE)));
                address = stop;
            }
        }
        Some(pieces)
    }
}

/// The ring.
pub(crate) struct Ring {
    pub(crate) config: QueueConfig,
    pub(crate) theirs: Arc<GuestMemoryMmap>,
    pub(crate) ours: Arc<FlatMemory>,
    index: u16,
}

impl Ring {
    pub(crate) fn new(size: u16, event_idx: bool, indirect: bool) -> Self {
        let ranges = REGIONS.map(|(start, len)| (GuestAddress(start), len));
        let theirs = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap());
        let ours = FlatMemory::new(REGIONS.map(|(start, len)| {
            let host = NonNull::new(theirs.get_host_address(GuestAddress(start)).unwrap()).unwrap();
            // SAFETY: the region is mapped from there on for as long as its owner lives, and nobody makes references.
            (start, unsafe { Segment::new(host, len, theirs.clone() as Owner) })
        }));
        let (descriptors, driver, device) = (DESCRIPTORS, AVAILABLE, USED);
        let layout = Layout::Modern;
        let config = QueueConfig { size, descriptors, driver, device, layout, event_idx, indirect, in_order: false };
        Self { config, theirs, ours: Arc::new(ours), index: 0 }
    }

    /// Our memory from `address` on.
    pub(crate) fn pages(&self, address: u64, len: usize) -> Pages {
        self.ours.pages(address, len).unwrap()
    }

    /// The areas of the ring, for a driver: descriptors, driver area, device area.
    pub(crate) fn areas(&self) -> [Pages; 3] {
        let size = self.config.size;
        let lens = [descriptors_len(size), driver_len(size), device_len(size)];
        [0, 1, 2].map(|area| self.pages([DESCRIPTORS, AVAILABLE, USED][area], lens[area] as usize))
    }

    /// Our device role on it.
    pub(crate) fn our_device(&self) -> queue::Queue<Arc<FlatMemory>> {
        queue::Queue::new(self.ours.clone(), self.config).unwrap()
    }

    /// Theirs.
    pub(crate) fn their_device(&self) -> Queue {
        let mut queue = Queue::new(self.config.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_event_idx(self.config.event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.theirs));
        queue
    }

    pub(crate) fn put16(&self, address: u64, value: u16) {
        self.theirs.write_obj(value.to_le(), GuestAddress(address)).unwrap();
    }

    pub(crate) fn get16(&self, address: u64) -> u16 {
        u16::from_le(self.theirs.read_obj(GuestAddress(address)).unwrap())
    }

    /// Writes entry `index` of the table at `table`.
    pub(crate) fn put_in(&self, table: u64, index: u16, descriptor: Descriptor) {
        let Descriptor { address, len, flags, next } = descriptor;
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        let at = table + 16 * u64::from(index);
        self.theirs.write_obj(address.to_le(), GuestAddress(at)).unwrap();
        self.theirs.write_obj(rest.to_le(), GuestAddress(at + 8)).unwrap();
    }

    /// Writes descriptor `index` of the ring.
    pub(crate) fn put(&self, index: u16, descriptor: Descriptor) {
        self.put_in(DESCRIPTORS, index, descriptor);
    }

    /// Entry `index` of the table at `table`; none if there is no memory.
    pub(crate) fn get_from(&self, table: u64, index: u16) -> Option<Descriptor> {
        let at = table.checked_add(16 * u64::from(index))?;
        let address = u64::from_le(self.theirs.read_obj(GuestAddress(at)).ok()?);
        let rest = u64::from_le(self.theirs.read_obj(GuestAddress(at.checked_add(8)?)).ok()?);
        Some(Descriptor { address, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 })
    }

    /// The descriptors of the ring that the chain at `head` has, up to one that names a table, one that leads nowhere, or
    /// as many as there are.
    pub(crate) fn direct(&self, head: u16) -> Vec<Descriptor> {
        let mut found = Vec::new();
        let mut next = Some(head);
        while let Some(index) = next.take()
            && index < self.config.size
            && found.len() < usize::from(self.config.size)
        {
            let descriptor = self.get_from(DESCRIPTORS, index).unwrap();
            found.push(descriptor);
            if descriptor.has(NEXT) && !descriptor.has(INDIRECT) {
                next = Some(descriptor.next);
            }
        }
        found
    }

    /// Makes `heads` available.
    pub(crate) fn available(&mut self, heads: &[u16]) {
        for &head in heads {
            self.put16(AVAILABLE + 4 + 2 * u64::from(self.index % self.config.size), head);
            self.index = self.index.wrapping_add(1);
        }
        self.put16(AVAILABLE + 2, self.index);
    }

    /// Makes what was made available last another head.
    pub(crate) fn rewrite_last(&self, head: u16) {
        let last = self.index.wrapping_sub(1) % self.config.size;
        self.put16(AVAILABLE + 4 + 2 * u64::from(last), head);
    }

    /// Lets the available index be `ahead` of what was made available.
    pub(crate) fn jump(&mut self, ahead: u16) {
        self.index = self.index.wrapping_add(ahead);
        self.put16(AVAILABLE + 2, self.index);
    }

    /// The driver's wish: the flags of the available ring, and the used index at which it wants an interrupt.
    pub(crate) fn wish_for_interrupts(&self, flags: u16, event: u16) {
        self.put16(AVAILABLE, flags);
        self.put16(AVAILABLE + 4 + 2 * u64::from(self.config.size), event);
    }

    /// The device's wish: the flags of the used ring, and the available index at which it wants a kick.
    pub(crate) fn wish_for_kicks(&self) -> (u16, u16) {
        (self.get16(USED), self.get16(USED + 4 + 8 * u64::from(self.config.size)))
    }

    /// Everything that a device writes: the used ring.
    pub(crate) fn used(&self) -> Vec<u8> {
        let mut bytes = vec![0; device_len(self.config.size) as usize];
        self.theirs.read_slice(&mut bytes, GuestAddress(USED)).unwrap();
        bytes
    }

    /// Puts the used ring back to what it was.
    pub(crate) fn restore_used(&self, bytes: &[u8]) {
        self.theirs.write_slice(bytes, GuestAddress(USED)).unwrap();
    }

    /// What our chain consists of.
    pub(crate) fn pieces(&self, chain: &Chain<Arc<FlatMemory>>) -> Vec<Piece> {
        let piece = |segment: &Segment<_>, writable| {
            let at = segment.as_ptr().addr();
            let inside = |&(start, len): &(u64, usize)| {
                let base = self.ours.pages(start, len).unwrap().as_ptr().addr();
                (base..base + len).contains(&at).then(|| start + (at - base) as u64)
            };
            (REGIONS.iter().find_map(inside).expect("memory"), segment.len() as u64, writable)
        };
        let readable = chain.readable().iter().map(|segment| piece(segment, false));
        readable.chain(chain.writable().iter().map(|segment| piece(segment, true))).collect()
    }

    /// What their chain consists of.
    pub(crate) fn walk(&self, chain: DescriptorChain<&GuestMemoryMmap>) -> Theirs {
        let head = chain.head_index();
        let descriptors = chain.map(|descriptor| Descriptor {
            address: descriptor.addr().0,
            len: descriptor.len(),
            flags: descriptor.flags(),
            next: descriptor.next(),
        });
        Theirs { head, descriptors: descriptors.collect() }
    }
}
