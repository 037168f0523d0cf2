//! A machine with a PCI bus: what its devices do to the wires, and accesses as a processor makes them.

use std::mem;
use std::sync::{Arc, Mutex, OnceLock};

use polyvirt_core::Features;
use polyvirt_core::device::{Device, Queues, SharedRegion};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{Access, FlatMemory, GuestMemory, Pages};
use polyvirt_transports::pci::registers::*;
use polyvirt_transports::pci::{
    AddressMap, Doorbell, Generation, Host, Message, Platform, Root, SharedDevice, Space, Wires, attach,
};

pub(crate) const RAM: u64 = 0x10_0000;
pub(crate) const ECAM: u64 = 0xb000_0000;
pub(crate) const TYPE: u32 = 42;
/// The first device.
pub(crate) const FIRST: u8 = 1 << 3;

/// What a function did to its wires.
#[derive(Debug, PartialEq)]
pub(crate) enum Wire {
    Route(u16, Message),
    Signal(u16),
    Pin(bool),
    Bells(Vec<Doorbell>),
}

type Log = Arc<Mutex<Vec<(u8, Wire)>>>;

/// What the host stands on.
pub(crate) struct Board {
    memory: Arc<FlatMemory>,
    root: Arc<OnceLock<Arc<Root>>>,
    log: Log,
    pub(crate) served: Arc<Mutex<Vec<(u8, SharedDevice)>>>,
}

impl Platform for Board {
    type Memory = Arc<FlatMemory>;

    fn forward_to(&mut self, root: Arc<Root>) {
        assert!(self.root.set(root).is_ok(), "one root");
    }
    fn memory(&self) -> Self::Memory {
        self.memory.clone()
    }
    fn wires(&mut self, function: u8, _: u16, _: u16) -> Result<Arc<dyn Wires>, HypervisorError> {
        Ok(Arc::new(Logged { function, log: self.log.clone() }))
    }
    fn serve(&mut self, function: u8, device: SharedDevice) -> Result<(), HypervisorError> {
        self.served.lock().unwrap().push((function, device));
        Ok(())
    }
}

struct Logged {
    function: u8,
    log: Log,
}

impl Logged {
    fn push(&self, wire: Wire) {
        self.log.lock().unwrap().push((self.function, wire));
    }
}

impl Wires for Logged {
    fn route(&self, vector: u16, message: Message) {
        self.push(Wire::Route(vector, message));
    }
    fn signal(&self, vector: u16) {
        self.push(Wire::Signal(vector));
    }
    fn pin(&self, asserted: bool) {
        self.push(Wire::Pin(asserted));
    }
    fn ring_at(&self, doorbells: &[Doorbell]) {
        self.push(Wire::Bells(doorbells.to_vec()));
    }
}

pub(crate) fn map() -> AddressMap {
    AddressMap {
        ecam: Some(ECAM),
        memory: 0xc000_0000..0xe000_0000,
        memory64: 0x10_0000_0000..0x20_0000_0000,
        io: 0x1000..0x1_0000,
    }
}

/// The machine.
pub(crate) struct Machine {
    pub(crate) host: Host<Board>,
    pub(crate) root: Arc<Root>,
    pub(crate) memory: Arc<FlatMemory>,
    pub(crate) served: Arc<Mutex<Vec<(u8, SharedDevice)>>>,
    log: Log,
}

impl Machine {
    pub(crate) fn empty() -> Self {
        let memory = Arc::new(FlatMemory::new([(RAM, Pages::allocate(0x10_0000))]));
        let (log, served) = (Log::default(), Arc::default());
        let board =
            Board { memory: memory.clone(), root: Arc::default(), log: log.clone(), served: Arc::clone(&served) };
        let host = Host::new(board, map());
        let root = Arc::clone(host.root());
        Self { host, root, memory, served, log }
    }

    /// With a [`Toy`] for each.
    pub(crate) fn with(generations: &[Generation]) -> Self {
        let mut new = Self::empty();
        for &generation in generations {
            new.attach(Toy::new(TYPE), generation).unwrap();
        }
        new
    }

    pub(crate) fn attach(&mut self, toy: Toy, generation: Generation) -> Result<(), HypervisorError> {
        let memory = self.memory.clone();
        attach(&mut self.host, memory, Box::new(toy), generation)
    }

    /// What was done to the wires since this was last called.
    pub(crate) fn wires(&self) -> Vec<(u8, Wire)> {
        mem::take(&mut self.log.lock().unwrap())
    }

    pub(crate) fn get<const N: usize>(&self, space: Space, address: u64) -> [u8; N] {
        let mut data = [0xaa; N];
        assert!(self.root.read(space, address, &mut data), "{address:#x} is the bus's");
        data
    }

    pub(crate) fn put(&self, space: Space, address: u64, data: &[u8]) {
        assert!(self.root.write(space, address, data), "{address:#x} is the bus's");
    }

    pub(crate) fn config<const N: usize>(&self, function: u8, offset: u16) -> [u8; N] {
        let mut data = [0xaa; N];
        self.root.read_config(function, offset.into(), &mut data);
        data
    }

    pub(crate) fn config16(&self, function: u8, offset: u16) -> u16 {
        u16::from_le_bytes(self.config(function, offset))
    }

    pub(crate) fn config32(&self, function: u8, offset: u16) -> u32 {
        u32::from_le_bytes(self.config(function, offset))
    }

    pub(crate) fn set_config(&self, function: u8, offset: u16, data: &[u8]) {
        self.root.write_config(function, offset.into(), data);
    }

    /// Places a base address register of 32 bits, or of 64.
    pub(crate) fn place(&self, function: u8, bar: u8, address: u64) {
        let at = BARS + 4 * u16::from(bar);
        let wide = self.config32(function, at) & (BAR_IO | BAR_64) == BAR_64;
        self.set_config(function, at, &(address as u32).to_le_bytes());
        if wide {
            self.set_config(function, at + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    pub(crate) fn enable(&self, function: u8, command: u16) {
        self.set_config(function, COMMAND, &command.to_le_bytes());
    }

    /// The capabilities: id, and where.
    pub(crate) fn capabilities(&self, function: u8) -> Vec<(u8, u16)> {
        let mut found = Vec::new();
        let [mut at] = self.config(function, CAPABILITIES);
        while at != 0 {
            let [id, next] = self.config(function, at.into());
            assert!(found.len() < 48 && at >= 0x40 && at.is_multiple_of(4), "a list that is none");
            found.push((id, at.into()));
            at = next;
        }
        found
    }

    pub(crate) fn msix(&self, function: u8) -> u16 {
        self.capabilities(function).iter().find(|(id, _)| *id == CAP_MSIX).unwrap().1
    }

    pub(crate) fn poke(&self, address: u64, bytes: &[u8]) {
        self.memory.resolve(address, bytes.len() as u64, Access::WRITE, |part| part.write(0, bytes).unwrap()).unwrap();
    }

    pub(crate) fn peek<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.resolve(address, N as u64, Access::READ, |part| part.read(0, &mut bytes).unwrap()).unwrap();
        bytes
    }
}

/// Writes a 7 to each buffer that it finds; its configuration can be written.
pub(crate) struct Toy {
    device_type: u32,
    config: [u8; 6],
    pub(crate) shared: Vec<SharedRegion>,
}

impl Toy {
    pub(crate) fn new(device_type: u32) -> Self {
        Self { device_type, config: [1, 2, 3, 4, 5, 6], shared: Vec::new() }
    }

    /// With a shared memory region of so many bytes for each id.
    pub(crate) fn sharing(regions: &[(u8, usize)]) -> Self {
        let shared = regions.iter().map(|&(id, len)| SharedRegion { id, pages: Pages::allocate(len) }).collect();
        Self { shared, ..Self::new(TYPE) }
    }
}

impl<M: GuestMemory> Device<M> for Toy {
    fn device_type(&self) -> u32 {
        self.device_type
    }
    fn features(&self) -> Features {
        Features::bit(0)
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[4, 300]
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config[offset..offset + data.len()].copy_from_slice(data);
    }
    fn shared_memory(&self) -> &[SharedRegion] {
        &self.shared
    }
    fn activate(&mut self, _: Features, _: std::task::Waker) {}
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        let Some(queue) = queues.get(index) else { return };
        while let Ok(mut chain) = queue.pop() {
            if chain.writable_len() > 0 {
                chain.write(0, &[7]).unwrap();
            }
            let _ = queue.complete(chain);
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {}
}
