//! The peers, driven as their documentation says.
//!
//! Their interfaces are unsafe where ours are not: this is the one place outside the core's memory and the hypervisors
//! where the compiler allows it.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use polyvirt_core::memory::{FlatMemory, Pages, Segment};
use virtio_drivers::device::common::Feature;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PhysAddr};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Work;
use super::rings::{AVAILABLE, DESCRIPTORS, Echo, REGION, STRIDE, Shape, USED};

/// rust-vmm's device queue and the memory it works on.
pub const VIRTIO_QUEUE: &str = "virtio-queue 0.18.0, vm-memory 0.18.0";

/// rust-vmm's device role on the same ring: pop, walk, add to the used ring; one question for a notification a batch.
pub(super) fn virtio_queue(shape: Shape) -> Work<'static> {
    let ranges: Vec<_> = (0..shape.regions).map(|region| (GuestAddress(region * STRIDE), REGION)).collect();
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    for chain in 0..shape.chains() {
        for piece in 0..shape.chain {
            let index = chain * shape.chain + piece;
            let (address, len) = shape.piece(chain, piece);
            let write = if piece > 0 || shape.chain == 1 { 2 } else { 0 };
            let last = piece + 1 == shape.chain;
            let descriptor = Descriptor::new(address, len, write | u16::from(!last), if last { 0 } else { index + 1 });
            let at = GuestAddress(DESCRIPTORS + 16 * u64::from(index));
            memory.write_obj(RawDescriptor::from(descriptor), at).unwrap();
        }
    }
    for slot in 0..shape.size {
        let head = slot % shape.chains() * shape.chain;
        memory.write_obj(head.to_le(), GuestAddress(AVAILABLE + 4 + 2 * u64::from(slot))).unwrap();
    }
    let mut queue = Queue::new(shape.size).unwrap();
    queue.set_size(shape.size);
    queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_event_idx(shape.event_idx);
    queue.set_ready(true);
    let mut index = 0u16;
    Box::new(move |count| {
        let (mut done, mut written, mut notifications) = (0, 0u64, 0u64);
        while done < count {
            index = index.wrapping_add(shape.batch);
            memory.store(index.to_le(), GuestAddress(AVAILABLE + 2), std::sync::atomic::Ordering::Release).unwrap();
            while let Some(chain) = queue.pop_descriptor_chain(&memory) {
                let (head, mut writable) = (chain.head_index(), 0);
                for descriptor in chain {
                    if descriptor.is_write_only() {
                        writable += descriptor.len();
                    }
                }
                queue.add_used(&memory, head, writable).unwrap();
                written += u64::from(writable);
                done += 1;
            }
            notifications += u64::from(queue.needs_notification(&memory).unwrap());
        }
        black_box((written, notifications));
        done
    })
}

/// The loop written by hand: one region of raw memory, no types between it and the ring.
pub const BY_HAND: &str = "the same checks by hand over raw memory";

/// A chain of [`by_hand`]: its buffers as pointers and lengths.
#[derive(Default)]
struct Taken {
    head: u16,
    writable: u32,
    pieces: Vec<(*mut u8, usize)>,
}

/// A split ring served by hand, doing what ours does: the same checks (index jump, head, links, chain length, order, lengths,
/// ranges, the same head twice), and chains that are owned, so that they may be given back later and in any order, from
/// memory that is used again. It knows neither several regions, nor tables, nor other formats.
pub(super) fn by_hand(memory: &FlatMemory, shape: Shape) -> Work<'static> {
    let base = memory.pages(0, REGION).expect("the first region");
    let mut index = 0u16;
    let (mut next, mut seen, mut used, mut signalled) = (0u16, 0u16, 0u16, 0u16);
    let mut in_flight = vec![0u64; usize::from(shape.size).div_ceil(64)];
    let mut spare: Vec<Box<Taken>> = Vec::new();
    let size = shape.size;
    let mask = size - 1;
    let raw = base.as_ptr();
    // SAFETY: in this and the next two, the ring areas are inside the region, which `base` keeps; slots are masked,
    // descriptor indices checked against the size; all are aligned, as the areas are.
    let load16 = move |at: u64| unsafe { AtomicU16::from_ptr(raw.add(at as usize).cast()) };
    // SAFETY: as above.
    let load32 = move |at: u64| unsafe { AtomicU32::from_ptr(raw.add(at as usize).cast()) };
    // SAFETY: as above.
    let load64 = move |at: u64| unsafe { AtomicU64::from_ptr(raw.add(at as usize).cast()) };
    load16(AVAILABLE + 2).store(0, Ordering::Release);
    Box::new(move |count| {
        let _owner = &base;
        let (mut done, mut written, mut interrupts) = (0, 0u64, 0u64);
        while done < count {
            index = index.wrapping_add(shape.batch);
            load16(AVAILABLE + 2).store(index, Ordering::Release);
            loop {
                if next == seen {
                    seen = load16(AVAILABLE + 2).load(Ordering::Acquire);
                    assert!(seen.wrapping_sub(next) <= size);
                    if seen == next {
                        break;
                    }
                }
                let head = load16(AVAILABLE + 4 + 2 * u64::from(next & mask)).load(Ordering::Relaxed);
                assert!(head < size);
                let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
                assert!(in_flight[word] & bit == 0);
                in_flight[word] |= bit;
                let mut chain = spare.pop().unwrap_or_default();
                let (mut at, mut left, mut readable, mut writable) = (head, size, 0u64, 0u64);
                loop {
                    assert!(left > 0);
                    left -= 1;
                    let address = load64(DESCRIPTORS + 16 * u64::from(at)).load(Ordering::Relaxed);
                    let word = load64(DESCRIPTORS + 16 * u64::from(at) + 8).load(Ordering::Relaxed);
                    let (len, flags) = (u64::from(word as u32), (word >> 32) as u16);
                    assert!(flags & 4 == 0);
                    if flags & 2 != 0 {
                        writable += len;
                    } else {
                        assert!(writable == 0);
                        readable += len;
                    }
                    assert!(readable + writable <= u64::from(u32::MAX));
                    assert!(address < REGION as u64 && len <= REGION as u64 - address);
                    // SAFETY: inside the region, checked above.
                    chain.pieces.push((unsafe { raw.add(address as usize) }, len as usize));
                    if flags & 1 == 0 {
                        break;
                    }
                    at = (word >> 48) as u16;
                    assert!(at < size);
                }
                next = next.wrapping_add(1);
                (chain.head, chain.writable) = (head, writable as u32);
                written += u64::from(chain.writable);
                let (word, bit) = (usize::from(chain.head / 64), 1u64 << (chain.head % 64));
                in_flight[word] &= !bit;
                let entry = USED + 4 + 8 * u64::from(used & mask);
                load32(entry).store(u32::from(chain.head), Ordering::Relaxed);
                load32(entry + 4).store(chain.writable, Ordering::Relaxed);
                chain.pieces.clear();
                spare.push(chain);
                used = used.wrapping_add(1);
                load16(USED + 2).store(used, Ordering::Release);
                done += 1;
            }
            if used != signalled {
                fence(Ordering::SeqCst);
                let event = load16(AVAILABLE + 4 + 2 * u64::from(size)).load(Ordering::Relaxed);
                interrupts += u64::from(used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(signalled));
                signalled = used;
            }
        }
        black_box((written, interrupts));
        done
    })
}

/// rcore-os's driver queue.
pub const VIRTIO_DRIVERS: &str = "virtio-drivers 0.13.0";

/// Memory as it is: device-visible addresses are addresses of this process.
struct Identity;

// SAFETY: memory comes zeroed and page-aligned from `Pages`, and is kept for ever.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let pages = Pages::allocate(pages * 4096);
        let start = NonNull::new(pages.as_ptr()).expect("an allocation is not null");
        std::mem::forget(pages);
        (start.as_ptr().expose_provenance() as PhysAddr, start)
    }

    unsafe fn dma_dealloc(_paddr: PhysAddr, _vaddr: NonNull<u8>, _pages: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        NonNull::new(std::ptr::with_exposed_provenance_mut(paddr as usize)).expect("an address that was shared")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.as_ptr().expose_provenance() as PhysAddr
    }

    unsafe fn unshare(_paddr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

/// A transport for virtio-drivers that takes a queue's addresses and does nothing else.
#[derive(Default)]
pub struct Catcher {
    /// Where the queue is: descriptors, driver area, device area.
    pub areas: [PhysAddr; 3],
}

impl Transport for Catcher {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }
    fn read_device_features(&mut self) -> u64 {
        Feature::VERSION_1.bits()
    }
    fn write_driver_features(&mut self, _features: u64) {}
    fn max_queue_size(&mut self, _queue: u16) -> u32 {
        32768
    }
    fn notify(&mut self, _queue: u16) {}
    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::empty()
    }
    fn set_status(&mut self, _status: DeviceStatus) {}
    fn set_guest_page_size(&mut self, _size: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(&mut self, _queue: u16, _size: u32, descriptors: PhysAddr, driver: PhysAddr, device: PhysAddr) {
        self.areas = [descriptors, driver, device];
    }
    fn queue_unset(&mut self, _queue: u16) {}
    fn queue_used(&mut self, _queue: u16) -> bool {
        false
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }
    fn read_config_generation(&self) -> u32 {
        0
    }
    fn read_config_space<T>(&self, _offset: usize) -> virtio_drivers::Result<T> {
        Err(virtio_drivers::Error::ConfigSpaceMissing)
    }
    fn write_config_space<T>(&mut self, _offset: usize, _value: T) -> virtio_drivers::Result<()> {
        Err(virtio_drivers::Error::ConfigSpaceMissing)
    }
}

/// virtio-drivers' queue of 256: add buffers of one readable and one writable piece, ask whether to notify, take back.
pub(super) fn virtio_drivers(batch: u16) -> Work<'static> {
    const SIZE: usize = 256;
    let mut catcher = Catcher::default();
    let mut queue = VirtQueue::<Identity, SIZE>::new(&mut catcher, 0, false, true).expect("a queue of 256");
    let pages = |address: PhysAddr, len: usize| {
        let start = NonNull::new(std::ptr::with_exposed_provenance_mut(address as usize)).expect("allocated above");
        // SAFETY: `Identity` never frees what it allocated, and the areas have at least these sizes.
        unsafe { Segment::new(start, len, Arc::new(()) as polyvirt_core::memory::Owner) }
    };
    let mut device =
        Echo::split(pages(catcher.areas[1], 4 + 2 * SIZE + 2), pages(catcher.areas[2], 4 + 8 * SIZE + 2), SIZE as u16);
    let header = [0u8; 16];
    let mut data = vec![0u8; 4096];
    let mut tokens = Vec::with_capacity(SIZE);
    Box::new(move |count| {
        let (mut done, mut notifications) = (0, 0u64);
        while done < count {
            for _ in 0..batch {
                // SAFETY: the buffers outlive the request, which is taken back below; nothing reads or writes them.
                tokens.push(unsafe { queue.add(&[&header], &mut [&mut data]) }.expect("room for a batch"));
            }
            notifications += u64::from(queue.should_notify());
            device.complete(batch, 4096);
            for token in tokens.drain(..) {
                // SAFETY: the same buffers as above.
                done += u64::from(unsafe { queue.pop_used(token, &[&header], &mut [&mut data]) }.expect("used") > 0);
            }
        }
        black_box(notifications);
        done
    })
}
