//! A device behind virtio-mmio whose registers and memory are written by a hostile guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Waker;

use polyvirt_core::device::{Device, Queues};
use polyvirt_core::hypervisor::{BusDevice, Cause, Interrupt};
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::queue::Chain;
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio;
use polyvirt_transports::mmio::registers::*;

use crate::allocations;
use crate::input::Input;
use crate::ram::{self, Memory, Ram};

/// The most steps of a script that are carried out.
const STEPS: usize = 1000;
/// The largest size of each queue.
pub(crate) const SIZES: [u16; 3] = [8, 64, 5];
/// The most bytes that the device copies for a chain.
const COPIED: usize = 32;

/// The bits that a status may have.
const STATUSES: Status = Status::ACKNOWLEDGE
    .union(Status::DRIVER)
    .union(Status::DRIVER_OK)
    .union(Status::FEATURES_OK)
    .union(Status::SUSPEND)
    .union(Status::DEVICE_NEEDS_RESET)
    .union(Status::FAILED);

/// The registers that are worth writing.
const REGISTERS: [u64; 18] = [
    DEVICE_FEATURES_SEL,
    DRIVER_FEATURES_SEL,
    DRIVER_FEATURES,
    QUEUE_SEL,
    QUEUE_SIZE,
    QUEUE_READY,
    QUEUE_NOTIFY,
    INTERRUPT_ACK,
    STATUS,
    QUEUE_DESC_LOW,
    QUEUE_DESC_HIGH,
    QUEUE_DRIVER_LOW,
    QUEUE_DRIVER_HIGH,
    QUEUE_DEVICE_LOW,
    QUEUE_DEVICE_HIGH,
    QUEUE_RESET,
    SHM_SEL,
    CONFIG,
];

/// Counts.
#[derive(Default)]
struct Line(AtomicUsize);

impl Interrupt for Line {
    fn raise(&self, _cause: Cause) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Copies what it can read to where it can write; keeps some chains until it is polled.
pub(crate) struct Echo<M: GuestMemory> {
    config: [u8; 6],
    held: Vec<(u16, Chain<M::Lease>)>,
}

impl<M: GuestMemory> Default for Echo<M> {
    fn default() -> Self {
        Self { config: [0; 6], held: Vec::new() }
    }
}

impl<M: GuestMemory> Echo<M> {
    fn finish(&mut self, index: u16, mut chain: Chain<M::Lease>, queues: &mut Queues<'_, M>) {
        let mut bytes = [0; COPIED];
        let len = chain.readable_len().min(chain.writable_len()).min(COPIED as u32) as usize;
        chain.read(0, &mut bytes[..len]).expect("as long as it says");
        chain.write(0, &bytes[..len]).expect("as long as it says");
        if let Some(queue) = queues.get(index) {
            // Fails on a broken queue.
            let _ = queue.complete(chain);
        }
    }
}

impl<M: GuestMemory> Device<M> for Echo<M>
where
    M::Lease: Send,
{
    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> Features {
        Features::bit(0)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config[offset..offset + data.len()].copy_from_slice(data);
    }

    fn activate(&mut self, _features: Features, _waker: Waker) {}

    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        while let Some(Ok(chain)) = queues.get(index).map(|queue| queue.pop()) {
            let known = self.held.iter().any(|(queue, other)| (*queue, other.head()) == (index, chain.head()));
            assert!(!known, "a head twice in flight");
            if chain.head() % 3 == 0 {
                self.held.push((index, chain));
            } else {
                self.finish(index, chain, queues);
            }
        }
    }

    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        for (index, chain) in std::mem::take(&mut self.held) {
            self.finish(index, chain, queues);
        }
    }

    fn reset_queue(&mut self, index: u16) {
        self.held.retain(|(queue, _)| *queue != index);
    }

    fn reset(&mut self) {
        self.held.clear();
    }
}

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let ram = Ram::new();
    ram.allow_buffers(true);
    allocations::restart();
    let echo = Echo::<Memory>::default();
    let line = Arc::new(Line::default());
    let mut device = mmio::Device::new(Box::new(echo), ram.memory(), line.clone());
    let mut queue = 0u8;
    for _ in 0..STEPS {
        let Some(step) = input.step() else { break };
        let before = status(&mut device);
        ram.accesses();
        match step % 16 {
            0..3 => {
                let register = REGISTERS[usize::from(input.byte()) % REGISTERS.len()];
                let value = input.u32();
                write(&mut device, register, value);
            }
            3 => {
                let register = REGISTERS[usize::from(input.byte()) % REGISTERS.len()];
                write(&mut device, register, input.byte().into());
            }
            4 => device.write(input.u64(), input.slice()),
            5 => device.write(input.u16().into(), input.slice()),
            6 => {
                let (offset, mut data) = (input.u64(), [0; 255]);
                device.read(offset, &mut data[..input.byte().into()]);
            }
            7 => drop(device.kick(input.byte().into())),
            8 => drop(device.poll()),
            9 => {
                queue = input.byte() % 4;
                set_up(&mut device, queue, &mut input);
            }
            10 => negotiate(&mut device, &mut input),
            11 => offer(&ram, queue, &mut input),
            12 => {
                let at = areas(queue)[0] + 16 * u64::from(input.byte() % 64);
                let (address, len, flags, next) = (ram::address(&mut input), input.len(), input.byte(), input.byte());
                let rest = u64::from(len) | u64::from(flags & 7) << 32 | u64::from(next) << 48;
                ram.poke(at, &address.to_le_bytes());
                ram.poke(at + 8, &rest.to_le_bytes());
            }
            13 => ram.poke(ram::address(&mut input), input.slice()),
            14 => write(&mut device, QUEUE_NOTIFY, queue.into()),
            _ => write(&mut device, STATUS, u32::from(input.byte()) & 0xdf),
        }
        let accesses = ram.accesses();
        let after = status(&mut device);
        assert!((before | after).contains(Status::DRIVER_OK) || accesses == 0, "memory was touched before DRIVER_OK");
        for stopped in [Status::FAILED, Status::DEVICE_NEEDS_RESET, Status::SUSPEND] {
            // A negotiation resets and starts anew.
            let all_along = (before & after).contains(stopped) && step % 16 != 10;
            assert!(!all_along || accesses == 0, "memory was touched while the status said {stopped:?}");
        }
        assert!(!after.contains(Status::DRIVER_OK) || after.contains(Status::FEATURES_OK), "{after:?}");
        assert!(STATUSES.contains(after), "{after:?}");
        // Each queue, the configuration, and what an acknowledgement left; twice, because a write may start queues and
        // then find one broken.
        let raised = line.0.swap(0, Ordering::Relaxed);
        assert!(raised <= 2 * (SIZES.len() + 2), "{raised} interrupts for one access to a register");
        let most = 2 * SIZES.map(burst).iter().sum::<usize>();
        assert!(accesses <= most, "one access to a register touched memory {accesses} times, more than {most}");
    }
    // Chains of as many descriptors as the queue is long, each in as many segments as there are regions.
    let segments: usize = SIZES.map(|size| usize::from(size) * usize::from(size) * 4).iter().sum();
    let most = 0x1_0000 + 160 * segments;
    let peak = allocations::count().peak;
    assert!(peak <= most as isize, "{peak} bytes allocated, more than {most}");
    serves(&mut device, &ram);
}

/// Whatever came before: after a reset a driver that does everything right is served.
fn serves(device: &mut mmio::Device<Memory>, ram: &Ram) {
    write(device, STATUS, 0);
    assert_eq!(status(device), Status::empty());
    ram.accesses();
    let [descriptors, driver, used] = areas(0);
    for area in [driver, used] {
        ram.poke(area, &[0; 0x100]);
    }
    let (from, to) = (0x1000, 0x2000);
    ram.poke(from, b"still");
    ram.poke(to, &[0; 5]);
    // Head 0, which the device keeps until it is polled, and head 2, which it does not.
    for head in [0, 2] {
        for (index, address, flags) in [(head, from, 1), (head + 1, to, 2)] {
            let rest = 5 | flags << 32 | (head + 1) << 48;
            ram.poke(descriptors + 16 * index, &u64::to_le_bytes(address));
            ram.poke(descriptors + 16 * index + 8, &u64::to_le_bytes(rest));
        }
    }
    ram.poke(driver, &[0, 0, 2, 0, 0, 0, 2, 0]);
    negotiate(device, &mut Input::new(&[]));
    set_up(device, 0, &mut Input::new(&[]));
    write(device, STATUS, 15);
    assert_eq!(status(device).bits(), 15);
    write(device, QUEUE_NOTIFY, 0);
    device.poll();
    assert_eq!(ram.peek(used + 2), [2, 0], "a used index");
    let mut heads = [ram.peek::<8>(used + 4), ram.peek::<8>(used + 12)];
    heads.sort_unstable();
    assert_eq!(heads, [[0, 0, 0, 0, 5, 0, 0, 0], [2, 0, 0, 0, 5, 0, 0, 0]]);
    assert_eq!(&ram.peek(to), b"still");
    write(device, STATUS, 0);
    ram.accesses();
    device.kick(0);
    device.poll();
    assert_eq!(ram.accesses(), 0, "memory was touched after a reset");
}

/// The most accesses that one burst of a queue makes: it pops as many chains as it is long, copies, completes.
pub(crate) fn burst(size: u16) -> usize {
    let size = usize::from(size);
    size * (4 + 5 * size + 2 * COPIED + 3) + 4
}

fn write(device: &mut mmio::Device<Memory>, register: u64, value: u32) {
    device.write(register, &value.to_le_bytes());
}

fn status(device: &mut mmio::Device<Memory>) -> Status {
    let mut bytes = [0; 4];
    device.read(STATUS, &mut bytes);
    Status::from_bits_retain(bytes[0])
}

/// Where a well-placed queue is.
pub(crate) const fn areas(queue: u8) -> [u64; 3] {
    let start = 0x10_0000 + queue as u64 * 0x1000;
    [start, start + 0x400, start + 0x800]
}

/// Sets a queue up, well or not.
fn set_up(device: &mut mmio::Device<Memory>, queue: u8, input: &mut Input<'_>) {
    let how = input.byte();
    write(device, QUEUE_SEL, queue.into());
    if how & 1 != 0 {
        write(device, QUEUE_SIZE, input.u16().into());
    }
    let places = if how & 2 != 0 { std::array::from_fn(|_| ram::address(input)) } else { areas(queue) };
    for (low, address) in [QUEUE_DESC_LOW, QUEUE_DRIVER_LOW, QUEUE_DEVICE_LOW].into_iter().zip(places) {
        write(device, low, address as u32);
        write(device, low + 4, (address >> 32) as u32);
    }
    write(device, QUEUE_READY, 1);
}

/// Negotiates as a driver does, with features of the script's choice, up to DRIVER_OK if the script says so.
fn negotiate(device: &mut mmio::Device<Memory>, input: &mut Input<'_>) {
    let how = input.byte();
    let mut features = Features::VERSION_1;
    for (bit, feature) in [
        (1, Features::EVENT_IDX),
        (2, Features::INDIRECT_DESC),
        (4, Features::RING_PACKED),
        (8, Features::RING_RESET),
        (8, Features::IN_ORDER),
        (64, Features::SUSPEND),
        (128, Features::NOTIFICATION_DATA),
    ] {
        if how & bit != 0 {
            features |= feature;
        }
    }
    for status in [0, 3] {
        write(device, STATUS, status);
    }
    for word in 0..Features::WORDS {
        write(device, DRIVER_FEATURES_SEL, word);
        write(device, DRIVER_FEATURES, features.word(word));
    }
    write(device, STATUS, 11);
    if how & 16 != 0 {
        for queue in 0..SIZES.len() as u8 {
            // All at the right place, of their largest size.
            set_up(device, queue, &mut Input::new(&[]));
        }
    }
    if how & 32 != 0 {
        write(device, STATUS, 15);
    }
}

/// Makes something available in a queue of 8 entries at its right place: the next entry of a split ring, or a
/// descriptor of a packed one.
pub(crate) fn offer(ram: &Ram, queue: u8, input: &mut Input<'_>) {
    let [descriptors, driver, _] = areas(queue);
    let how = input.byte();
    if how & 1 != 0 {
        let size = SIZES.get(usize::from(queue)).map_or(8, |size| u64::from(*size));
        let index = u16::from_le_bytes(ram.peek(driver + 2));
        ram.poke(driver + 4 + 2 * (u64::from(index) % size), &u16::from(input.byte()).to_le_bytes());
        ram.poke(driver + 2, &index.wrapping_add(1).to_le_bytes());
    } else {
        let (index, id) = (u64::from(how >> 4), input.byte());
        let (address, len, flags) = (ram::address(input), input.len(), input.byte());
        let ring = if how & 2 != 0 { 1 << 15 } else { 1 << 7 };
        let rest = u64::from(len) | u64::from(id) << 32 | (u64::from(flags & 7) | ring) << 48;
        ram.poke(descriptors + 16 * index, &address.to_le_bytes());
        ram.poke(descriptors + 16 * index + 8, &rest.to_le_bytes());
    }
}
