//! Three functions of both generations on a PCI bus whose every address is accessed, and whose memory is written, by a
//! hostile guest.

use std::sync::{Arc, Mutex, MutexGuard};

use polyvirt_core::hypervisor::{BusDevice, HypervisorError};
use polyvirt_core::queue::ByteOrder;
use polyvirt_core::{Features, Status};
use polyvirt_transports::pci::registers::*;
use polyvirt_transports::pci::{
    AddressMap, Doorbell, Generation, Host, Message, Platform, Root, SharedDevice, Space, Wires, attach,
};

use crate::allocations;
use crate::input::Input;
use crate::ram::{self, Memory, Ram};
use crate::registers::{Echo, SIZES, areas, burst, offer};

/// The most steps of a script that are carried out.
const STEPS: usize = 1000;
/// The generation of each device, from device 1 on.
const GENERATIONS: [Generation; 3] =
    [Generation::Modern, Generation::Transitional(ByteOrder::Little), Generation::Legacy(ByteOrder::Big)];

const ECAM: u64 = 0xb000_0000;
const MEMORY: u64 = 0xc000_0000;
const IO: u64 = 0x1000;

fn map() -> AddressMap {
    AddressMap { ecam: Some(ECAM), memory: MEMORY..MEMORY + 0x1000_0000, memory64: 1 << 36..1 << 37, io: IO..0x1_0000 }
}

/// Where the modern structures of `device` are to begin with, its table of messages, and its ports.
const fn modern(device: u8) -> u64 {
    MEMORY + 0x1_0000 * device as u64
}

const fn table(device: u8) -> u64 {
    MEMORY + 0x10_0000 + 0x1000 * device as u64
}

const fn ports(device: u8) -> u64 {
    IO + 0x100 * device as u64
}

/// The registers of a modern device that are worth writing, with their bytes.
const FIELDS: [(u64, usize); 17] = [
    (common::DEVICE_FEATURE_SELECT, 4),
    (common::DRIVER_FEATURE_SELECT, 4),
    (common::DRIVER_FEATURE, 4),
    (common::CONFIG_VECTOR, 2),
    (common::DEVICE_STATUS, 1),
    (common::QUEUE_SELECT, 2),
    (common::QUEUE_SIZE, 2),
    (common::QUEUE_VECTOR, 2),
    (common::QUEUE_ENABLE, 2),
    (common::QUEUE_RESET, 2),
    (common::QUEUE_DESC, 4),
    (common::QUEUE_DESC + 4, 4),
    (common::QUEUE_DRIVER, 4),
    (common::QUEUE_DRIVER + 4, 4),
    (common::QUEUE_DEVICE, 4),
    (common::QUEUE_DEVICE + 4, 4),
    (0x2000, 4),
];

/// Those of a legacy one.
const PORTS: [(u64, usize); 9] = [
    (legacy::DRIVER_FEATURES, 4),
    (legacy::QUEUE_ADDRESS, 4),
    (legacy::QUEUE_SELECT, 2),
    (legacy::QUEUE_NOTIFY, 2),
    (legacy::DEVICE_STATUS, 1),
    (legacy::ISR, 1),
    (legacy::CONFIG_VECTOR, 2),
    (legacy::QUEUE_VECTOR, 2),
    (24, 4),
];

/// The machine's end of a function's wires: sees that what is told is true, and counts.
#[derive(Default)]
struct Line {
    asserted: bool,
    told: usize,
}

struct Function(Arc<Mutex<Line>>, u16);

impl Function {
    /// Counts what is told, and says how the pin is.
    fn told(&self) -> bool {
        let mut line = self.0.lock().expect("one thread");
        line.told += 1;
        line.asserted
    }
}

impl Wires for Function {
    fn route(&self, vector: u16, _: Message) {
        self.told();
        assert!(vector < self.1, "vector {vector} of {}", self.1);
    }

    fn signal(&self, vector: u16) {
        let asserted = self.told();
        assert!(vector < self.1 && !asserted, "vector {vector} of {}, and the pin", self.1);
    }

    fn pin(&self, asserted: bool) {
        assert!(self.told() != asserted, "the pin is {asserted} already");
        self.0.lock().expect("one thread").asserted = asserted;
    }

    fn ring_at(&self, doorbells: &[Doorbell]) {
        self.told();
        assert!(doorbells.len() <= 2 * SIZES.len());
        for Doorbell { queue, space, address, .. } in doorbells {
            let map = map();
            let inside = match space {
                Space::Memory => map.memory.contains(address) || map.memory64.contains(address),
                Space::Io => map.io.contains(address),
            };
            assert!(inside && usize::from(*queue) < SIZES.len(), "a doorbell of queue {queue} at {address:#x}");
        }
    }
}

#[derive(Default)]
struct Board {
    devices: Arc<Mutex<Vec<SharedDevice>>>,
    lines: Arc<Mutex<Vec<Arc<Mutex<Line>>>>>,
}

impl Platform for Board {
    type Memory = Memory;

    fn forward_to(&mut self, _: Arc<Root>) {}

    fn memory(&self) -> Memory {
        Ram::new().memory()
    }

    fn wires(&mut self, _: u8, _: u16, vectors: u16) -> Result<Arc<dyn Wires>, HypervisorError> {
        let line = Arc::new(Mutex::new(Line::default()));
        self.lines.lock().expect("one thread").push(Arc::clone(&line));
        Ok(Arc::new(Function(line, vectors)))
    }

    fn serve(&mut self, _: u8, device: SharedDevice) -> Result<(), HypervisorError> {
        self.devices.lock().expect("one thread").push(device);
        Ok(())
    }
}

struct Machine {
    host: Host<Board>,
    rams: Vec<Ram>,
    devices: Vec<SharedDevice>,
    lines: Vec<Arc<Mutex<Line>>>,
}

impl Machine {
    fn new() -> Self {
        let board = Board::default();
        let (devices, lines) = (Arc::clone(&board.devices), Arc::clone(&board.lines));
        let mut host = Host::new(board, map());
        let mut rams = Vec::new();
        for generation in GENERATIONS {
            let ram = Ram::new();
            ram.allow_buffers(true);
            let echo = Box::new(Echo::<Memory>::default());
            attach(&mut host, ram.memory(), echo, generation).expect("there is room");
            rams.push(ram);
        }
        let devices = std::mem::take(&mut *devices.lock().expect("one thread"));
        let lines = std::mem::take(&mut *lines.lock().expect("one thread"));
        let new = Self { host, rams, devices, lines };
        (1..=GENERATIONS.len() as u8).for_each(|device| new.place(device));
        new
    }

    fn device(&self, device: u8) -> MutexGuard<'_, Box<dyn BusDevice>> {
        self.devices[usize::from(device) - 1].lock().expect("one thread")
    }

    fn configure(&self, device: u8, offset: u16, data: &[u8]) {
        self.host.root().write_config(device << 3, offset.into(), data);
    }

    /// Places and enables all registers of `device`, and disables its messages.
    fn place(&self, device: u8) {
        self.configure(device, COMMAND, &[0, 0]);
        for (bar, address) in [(0, ports(device)), (1, table(device)), (4, modern(device)), (5, 0)] {
            self.configure(device, BARS + 4 * bar, &(address as u32).to_le_bytes());
        }
        self.configure(device, COMMAND, &(COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER).to_le_bytes());
        let root = self.host.root();
        let mut at = [0];
        root.read_config(device << 3, CAPABILITIES.into(), &mut at);
        for _ in 0..48 {
            let mut header = [0; 2];
            root.read_config(device << 3, at[0].into(), &mut header);
            if header[0] == CAP_MSIX {
                return self.configure(device, u16::from(at[0]) + MSIX_CONTROL, &[0, 0]);
            }
            at[0] = header[1];
        }
        panic!("device {device} has no messages any more");
    }

    fn put(&self, space: Space, address: u64, data: &[u8]) {
        assert!(self.host.root().write(space, address, data), "{address:#x} is the bus's");
    }

    fn field(&self, device: u8, field: u64, data: &[u8]) {
        self.put(Space::Memory, modern(device) + field, data);
    }

    /// The status of device 1, read where it does not move.
    fn status(&self) -> Status {
        let mut status = [0];
        self.device(1).read(region(4) + common::DEVICE_STATUS, &mut status);
        Status::from_bits_retain(status[0])
    }

    /// Sets a queue of a modern device up, well or not.
    fn set_up(&self, device: u8, queue: u8, input: &mut Input<'_>) {
        let how = input.byte();
        self.field(device, common::QUEUE_SELECT, &[queue, 0]);
        if how & 1 != 0 {
            self.field(device, common::QUEUE_SIZE, &input.u16().to_le_bytes());
        }
        let places = if how & 2 != 0 { std::array::from_fn(|_| ram::address(input)) } else { areas(queue) };
        for (field, address) in [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE].into_iter().zip(places)
        {
            self.field(device, field, &(address as u32).to_le_bytes());
            self.field(device, field + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.field(device, common::QUEUE_VECTOR, &[how >> 4, 0]);
        self.field(device, common::QUEUE_ENABLE, &[1, 0]);
    }

    /// Negotiates as a driver does, with features of the script's choice, up to DRIVER_OK if the script says so.
    fn negotiate(&self, device: u8, input: &mut Input<'_>) {
        let how = input.byte();
        let chosen = [
            (1, Features::EVENT_IDX | Features::INDIRECT_DESC),
            (2, Features::RING_PACKED),
            (4, Features::RING_RESET | Features::SUSPEND),
            (8, Features::NOTIFICATION_DATA | Features::NOTIF_CONFIG_DATA),
        ];
        let chosen = chosen.into_iter().filter(|(bit, _)| how & bit != 0);
        let features = chosen.fold(Features::VERSION_1, |all, (_, features)| all | features);
        for status in [0, 3] {
            self.field(device, common::DEVICE_STATUS, &[status]);
        }
        for word in 0..Features::WORDS {
            self.field(device, common::DRIVER_FEATURE_SELECT, &word.to_le_bytes());
            self.field(device, common::DRIVER_FEATURE, &features.word(word).to_le_bytes());
        }
        self.field(device, common::DEVICE_STATUS, &[11]);
        if how & 16 != 0 {
            (0..SIZES.len() as u8).for_each(|queue| self.set_up(device, queue, &mut Input::new(&[])));
        }
        if how & 32 != 0 {
            self.field(device, common::DEVICE_STATUS, &[15]);
        }
    }

    /// A driver of the legacy interface.
    fn negotiate_legacy(&self, device: u8, input: &mut Input<'_>) {
        let how = input.byte();
        let port = |register: u64, data: &[u8]| self.put(Space::Io, ports(device) + register, data);
        port(legacy::DEVICE_STATUS, &[0]);
        port(legacy::DEVICE_STATUS, &[3]);
        port(legacy::DRIVER_FEATURES, &input.u32().to_le_bytes());
        let queues = if how & 4 != 0 { 1 } else { SIZES.len() as u8 };
        for queue in 0..queues {
            port(legacy::QUEUE_SELECT, &[queue, 0]);
            // Where the script's rings are, or anywhere.
            let page = if how & 1 != 0 { input.u32() } else { (areas(queue)[0] / legacy::PAGE) as u32 };
            port(legacy::QUEUE_ADDRESS, &page.to_le_bytes());
        }
        if how & 2 != 0 {
            port(legacy::DEVICE_STATUS, &[7]);
        }
    }
}

/// Any address, mostly one where there is something.
fn address(input: &mut Input<'_>) -> (Space, u64) {
    let how = input.byte();
    let (device, far) = (how >> 6 & 3, u64::from(input.u16()));
    match how % 8 {
        0 => (Space::Memory, ECAM + (u64::from(device) << 15) + far % 0x1008),
        1 => (Space::Memory, modern(device) + far % 0x4008),
        2 => (Space::Memory, table(device) + far % 0x1008),
        3 => (Space::Io, ports(device) + far % 0x104),
        4 => (Space::Io, CONFIG_ADDRESS + far % 10),
        5 => (Space::Io, far),
        6 => (
            Space::Memory,
            [map().memory.end, map().memory64.start, ECAM + ECAM_LEN][usize::from(device % 3)] - far % 16,
        ),
        _ => (Space::Memory, input.u64()),
    }
}

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let machine = Machine::new();
    let root = Arc::clone(machine.host.root());
    allocations::restart();
    for _ in 0..STEPS {
        let Some(step) = input.step() else { break };
        let before = machine.status();
        for ram in &machine.rams {
            ram.accesses();
        }
        // Devices 1 and 2 have the modern interface, 2 and 3 the legacy one.
        let (device, any) = (1 + (step >> 4 & 1), 1 + (step >> 4) % 3);
        match step % 16 {
            0..3 => {
                let (field, len) = FIELDS[usize::from(input.byte()) % FIELDS.len()];
                let value = if step % 16 == 0 { input.u32() } else { input.byte().into() };
                machine.field(device, field, &value.to_le_bytes()[..len]);
            }
            3 => {
                let (register, len) = PORTS[usize::from(input.byte()) % PORTS.len()];
                machine.put(Space::Io, ports(device + 1) + register, &input.u32().to_le_bytes()[..len]);
            }
            4 => machine.configure(any, input.byte().into(), input.slice()),
            5 | 6 => {
                let (space, address) = address(&mut input);
                root.write(space, address, input.slice());
            }
            7 => {
                let ((space, address), mut data) = (address(&mut input), [0; 255]);
                root.read(space, address, &mut data[..input.byte().into()]);
            }
            8 => {
                let queue = input.byte();
                machine.device(any).kick(queue.into());
            }
            9 => {
                machine.device(any).poll();
            }
            10 => machine.negotiate(device, &mut input),
            11 => machine.negotiate_legacy(device + 1, &mut input),
            12 => offer(&machine.rams[usize::from(any) - 1], input.byte() % 4, &mut input),
            13 => machine.rams[usize::from(any) - 1].poke(ram::address(&mut input), input.slice()),
            14 => machine.field(device, 0x3000 + 4 * u64::from(input.byte() % 4), &[0, 0]),
            _ => machine.place(any),
        }
        let (accesses, after) = (machine.rams[0].accesses(), machine.status());
        assert!((before | after).contains(Status::DRIVER_OK) || accesses == 0, "memory was touched before DRIVER_OK");
        for stopped in [Status::FAILED, Status::DEVICE_NEEDS_RESET, Status::SUSPEND] {
            // A negotiation resets and starts anew.
            let all_along = (before & after).contains(stopped) && step % 16 != 10;
            assert!(!all_along || accesses == 0, "memory was touched while the status said {stopped:?}");
        }
        // Twice each queue: a write may start queues and then serve them.
        let most = 2 * SIZES.map(burst).iter().sum::<usize>();
        let accesses = machine.rams[1..].iter().map(Ram::accesses).fold(accesses, usize::max);
        assert!(accesses <= most, "one step touched memory {accesses} times, more than {most}");
        for line in &machine.lines {
            let told = std::mem::take(&mut line.lock().expect("one thread").told);
            // A negotiation has some forty accesses.
            assert!(told <= 100, "the wires were told {told} things in one step");
        }
    }
    let segments: usize = SIZES.map(|size| usize::from(size) * usize::from(size) * 4).iter().sum();
    let most = 3 * (0x1_0000 + 160 * segments);
    let peak = allocations::count().peak;
    assert!(peak <= most as isize, "{peak} bytes allocated, more than {most}");
    serves(&machine);
}

/// Whatever came before: after a reset drivers that do everything right are served.
fn serves(machine: &Machine) {
    (1..=GENERATIONS.len() as u8).for_each(|device| machine.place(device));
    machine.field(1, common::DEVICE_STATUS, &[0]);
    assert_eq!(machine.status(), Status::empty());
    let [descriptors, driver, used] = areas(0);
    let chain = |ram: &Ram, available: u64, used: u64, big: bool| {
        ram.poke(available, &[0; 0x20]);
        ram.poke(used, &[0; 0x20]);
        ram.poke(0x1000, b"still");
        ram.poke(0x2000, &[0; 5]);
        // Head 2, which the device does not keep.
        for (slot, address, flags) in [(2, 0x1000u64, 1u16), (3, 0x2000, 2)] {
            let at = descriptors + 16 * slot;
            let order = |big_endian: &[u8]| {
                let mut bytes = big_endian.to_vec();
                if !big {
                    bytes.reverse();
                }
                bytes
            };
            ram.poke(at, &order(&address.to_be_bytes()));
            ram.poke(at + 8, &order(&5u32.to_be_bytes()));
            ram.poke(at + 12, &order(&flags.to_be_bytes()));
            ram.poke(at + 14, &order(&3u16.to_be_bytes()));
        }
        let one = u16::from(big) << 8 | u16::from(!big);
        ram.poke(available + 2, &one.to_le_bytes());
        ram.poke(available + 4, &(2 * one).to_le_bytes());
    };
    let ram = &machine.rams[0];
    chain(ram, driver, used, false);
    machine.negotiate(1, &mut Input::new(&[]));
    machine.set_up(1, 0, &mut Input::new(&[]));
    machine.field(1, common::DEVICE_STATUS, &[15]);
    machine.field(1, 0x3000, &[0, 0]);
    assert_eq!((ram.peek(used + 2), ram.peek(0x2000)), ([1, 0], *b"still"), "the modern device");
    for (device, big) in [(2u8, false), (3, true)] {
        let ram = &machine.rams[usize::from(device) - 1];
        // Eight descriptors, then the available ring; the used ring is on the next page.
        chain(ram, descriptors + 0x80, descriptors + 0x1000, big);
        if device == 2 {
            // A modern driver may have it.
            machine.field(2, common::DEVICE_STATUS, &[0]);
        }
        machine.negotiate_legacy(device, &mut Input::new(&[2 | 4]));
        machine.put(Space::Io, ports(device) + legacy::QUEUE_NOTIFY, &[0, 0]);
        let count = if big { [0, 1] } else { [1, 0] };
        assert_eq!((ram.peek(descriptors + 0x1002), ram.peek(0x2000)), (count, *b"still"), "legacy device {device}");
    }
}
