//! Version 1 of virtio-mmio register by register, and shared memory regions of version 2.

use std::sync::Arc;
use std::task::Waker;

use polyvirt_core::Features;
use polyvirt_core::device::{Device, Queues, SharedRegion};
use polyvirt_core::hypervisor::{BusDevice, Cause, HypervisorError, Interrupt};
use polyvirt_core::memory::{Access, FlatMemory, GuestMemory, Pages};
use polyvirt_core::queue::ByteOrder;
use polyvirt_transports::mmio;
use polyvirt_transports::mmio::registers::*;

const RAM: u64 = 0x10_0000;
const BASE: u64 = 0xd000_0000;

struct Nobody;

impl Interrupt for Nobody {
    fn raise(&self, _: Cause) {}
}

/// Writes a 7 to each buffer that it finds.
struct Toy(Vec<SharedRegion>);

impl<M: GuestMemory> Device<M> for Toy {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> Features {
        Features::bit(0)
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[4, 300]
    }
    fn config(&self) -> &[u8] {
        &[1, 2, 3, 4, 5, 6]
    }
    fn shared_memory(&self) -> &[SharedRegion] {
        &self.0
    }
    fn activate(&mut self, _: Features, _: Waker) {}
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        while let Some(Ok(mut chain)) = queues.get(index).map(|queue| queue.pop()) {
            chain.write(0, &[7]).unwrap();
            queues.get(index).unwrap().complete(chain).unwrap();
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {}
}

fn memory() -> Arc<FlatMemory> {
    Arc::new(FlatMemory::new([(RAM, Pages::allocate(0x10_0000))]))
}

type Registers = mmio::Device<Arc<FlatMemory>>;

fn legacy(order: ByteOrder) -> (Arc<FlatMemory>, Registers) {
    let memory = memory();
    let device = mmio::Device::new_legacy(Box::new(Toy(Vec::new())), memory.clone(), Arc::new(Nobody), order);
    (memory, device)
}

fn get(device: &mut Registers, register: u64) -> u32 {
    let mut data = [0xaa; 4];
    device.read(register, &mut data);
    u32::from_le_bytes(data)
}

fn set(device: &mut Registers, register: u64, value: u32) {
    device.write(register, &value.to_le_bytes());
}

fn peek<const N: usize>(memory: &Arc<FlatMemory>, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.resolve(address, N as u64, Access::READ, |part| part.read(0, &mut bytes).unwrap()).unwrap();
    bytes
}

fn poke(memory: &Arc<FlatMemory>, address: u64, bytes: &[u8]) {
    memory.resolve(address, bytes.len() as u64, Access::WRITE, |part| part.write(0, bytes).unwrap()).unwrap();
}

#[test]
fn version_1_says_so_and_offers_one_word_of_features() {
    let (_, mut device) = legacy(ByteOrder::Little);
    let identity = [MAGIC_VALUE, VERSION, DEVICE_ID].map(|register| get(&mut device, register));
    assert_eq!(identity, [0x7472_6976, 1, 42]);
    let words = [0, 1, 2, u32::MAX].map(|word| {
        set(&mut device, DEVICE_FEATURES_SEL, word);
        get(&mut device, DEVICE_FEATURES)
    });
    assert_eq!(words, [0x3800_0001, 0, 0, 0]);
    // What only version 2 has reads 0 and cannot be written.
    for register in [QUEUE_READY, CONFIG_GENERATION, SHM_LEN_LOW, QUEUE_DESC_LOW] {
        set(&mut device, register, 1);
        assert_eq!(get(&mut device, register), 0, "{register:#x}");
    }
}

#[test]
fn a_queues_size_is_a_power_of_two_and_its_place_a_page_of_the_guests_size() {
    let (_, mut device) = legacy(ByteOrder::Little);
    for (queue, max) in [(0, 4), (1, 256), (2, 0), (0x1_0000, 0)] {
        set(&mut device, QUEUE_SEL, queue);
        assert_eq!(get(&mut device, QUEUE_SIZE_MAX), max, "queue {queue:#x}");
    }
    for (page_size, align) in [(4096, 4096), (0x1_0000, 0x1_0000), (1, 64)] {
        set(&mut device, LEGACY_PAGE_SIZE, page_size);
        set(&mut device, QUEUE_SEL, 0);
        set(&mut device, QUEUE_SIZE, 4);
        set(&mut device, LEGACY_QUEUE_ALIGN, align);
        set(&mut device, LEGACY_QUEUE_PAGE, 0x20);
        assert_eq!(get(&mut device, LEGACY_QUEUE_PAGE), 0x20);
        // Only 0 takes it back.
        set(&mut device, LEGACY_QUEUE_PAGE, 0x30);
        assert_eq!(get(&mut device, LEGACY_QUEUE_PAGE), 0x20);
        set(&mut device, LEGACY_QUEUE_PAGE, 0);
        assert_eq!(get(&mut device, LEGACY_QUEUE_PAGE), 0);
    }
}

#[test]
fn page_size_and_alignment_outlive_a_reset_and_the_queue_does_not() {
    let (memory, mut device) = legacy(ByteOrder::Little);
    set(&mut device, LEGACY_PAGE_SIZE, 0x2000);
    set(&mut device, LEGACY_QUEUE_ALIGN, 0x100);
    for _ in 0..2 {
        set(&mut device, STATUS, 0);
        assert_eq!(get(&mut device, LEGACY_QUEUE_PAGE), 0);
        set(&mut device, QUEUE_SIZE, 4);
        serve(&memory, &mut device, 0x2000, 0x100, ByteOrder::Little);
    }
}

/// Has a buffer served on queue 0, which is placed at `RAM` with pages and alignment that the device knows.
fn serve(memory: &Arc<FlatMemory>, device: &mut Registers, page: u32, align: u64, order: ByteOrder) {
    let big = order == ByteOrder::Big;
    let bytes16 = |value: u16| if big { value.to_be_bytes() } else { value.to_le_bytes() };
    poke(memory, RAM, &[0; 0x4000]);
    let (buffer, len) = (RAM + 0x8000, 16u32);
    poke(memory, buffer, &[0]);
    poke(memory, RAM, &if big { buffer.to_be_bytes() } else { buffer.to_le_bytes() });
    poke(memory, RAM + 8, &if big { len.to_be_bytes() } else { len.to_le_bytes() });
    poke(memory, RAM + 12, &bytes16(2));
    poke(memory, RAM + 64 + 2, &bytes16(1));
    set(device, STATUS, 3);
    set(device, QUEUE_SEL, 0);
    set(device, LEGACY_QUEUE_PAGE, (RAM / u64::from(page)) as u32);
    set(device, STATUS, 7);
    set(device, QUEUE_NOTIFY, 0);
    assert_eq!(peek(memory, buffer), [7]);
    // Behind four descriptors and the available ring, at the next multiple.
    let used = RAM + (64u64 + 4 + 2 * 4 + 2).next_multiple_of(align);
    assert_eq!(peek(memory, used + 2), bytes16(1), "the used ring is at {used:#x}");
}

#[test]
fn rings_are_in_the_guests_byte_order() {
    for order in [ByteOrder::Little, ByteOrder::Big] {
        let (memory, mut device) = legacy(order);
        set(&mut device, LEGACY_PAGE_SIZE, 4096);
        set(&mut device, LEGACY_QUEUE_ALIGN, 4096);
        set(&mut device, QUEUE_SIZE, 4);
        serve(&memory, &mut device, 4096, 4096, order);
    }
}

#[test]
fn places_that_cannot_be_leave_the_queue_unused() {
    for (page_size, align) in [(0, 4096), (3, 4096), (4096, 0), (4096, 3), (u32::MAX, 4096)] {
        let (_, mut device) = legacy(ByteOrder::Little);
        set(&mut device, LEGACY_PAGE_SIZE, page_size);
        set(&mut device, LEGACY_QUEUE_ALIGN, align);
        set(&mut device, LEGACY_QUEUE_PAGE, u32::MAX);
        assert_eq!(get(&mut device, LEGACY_QUEUE_PAGE), 0, "{page_size} {align}");
    }
    // The largest that there are: far from any memory, and no sum is too large.
    let (_, mut device) = legacy(ByteOrder::Little);
    set(&mut device, LEGACY_PAGE_SIZE, 1 << 31);
    set(&mut device, LEGACY_QUEUE_ALIGN, 1 << 31);
    set(&mut device, LEGACY_QUEUE_PAGE, u32::MAX);
    assert_eq!(get(&mut device, LEGACY_QUEUE_PAGE), u32::MAX);
    set(&mut device, STATUS, 7);
    assert_ne!(get(&mut device, STATUS) & 0x40, 0, "the device needs a reset");
}

fn sharing(regions: &[(u8, usize)]) -> (Vec<Pages>, Result<Registers, HypervisorError>) {
    let regions: Vec<_> = regions.iter().map(|&(id, len)| SharedRegion { id, pages: Pages::allocate(len) }).collect();
    let pages = regions.iter().map(|region| region.pages.clone()).collect();
    let device = mmio::Device::new(Box::new(Toy(regions)), memory(), Arc::new(Nobody));
    (pages, device.with_shared_memory(BASE))
}

#[test]
fn shared_memory_is_where_the_registers_say() {
    let (pages, device) = sharing(&[(1, 0x1000), (9, 0x2000)]);
    let mut device = device.unwrap();
    let mut region = |id| {
        set(&mut device, SHM_SEL, id);
        let [low, high, base, base_high] = [SHM_LEN_LOW, SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH]
            .map(|register| u64::from(get(&mut device, register)));
        (low | high << 32, base | base_high << 32)
    };
    let (first, second) = (region(1), region(9));
    assert_eq!([first.0, second.0], [0x1000, 0x2000u64]);
    for nobody in [0, 2, 0x101, u32::MAX] {
        assert_eq!(region(nobody), (u64::MAX, u64::MAX), "region {nobody:#x}");
    }
    for ((_, base), pages) in [first, second].into_iter().zip(&pages) {
        let offset = base - BASE;
        device.write(offset + 0x10, b"from the guest");
        let mut seen = [0; 14];
        pages.read(0x10, &mut seen).unwrap();
        assert_eq!(&seen, b"from the guest");
        pages.write(pages.len() - 4, b"last").unwrap();
        let mut seen = [0xaa; 8];
        device.read(offset + pages.len() as u64 - 4, &mut seen);
        assert_eq!(&seen, b"last\0\0\0\0");
        device.write(offset + pages.len() as u64 - 2, &[9; 8]);
    }
    let mut start = [0xaa; 2];
    pages[1].read(0, &mut start).unwrap();
    assert_eq!(start, [0; 2], "what was written across the end of a region did not come there");
}

#[test]
fn shared_memory_that_does_not_fit_is_refused() {
    assert!(sharing(&[(1, 0x1000)]).1.is_ok());
    let len = usize::try_from(PLACE_SIZE).unwrap();
    assert!(matches!(sharing(&[(1, len)]).1, Err(HypervisorError::Exhausted(_))));
}

#[test]
fn two_shared_memory_regions_of_one_id_are_refused() {
    assert!(sharing(&[(1, 0x1000), (2, 0x1000)]).1.is_ok());
    let refused = sharing(&[(1, 0x1000), (1, 0x1000)]).1;
    assert!(matches!(refused, Err(HypervisorError::Refused { call: "attach", .. })));
}
