//! The seam: the calls that a device model makes of Xen; and where the guest finds its bus.

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::GuestMemory;
use polyvirt_transports::pci::registers::{CONFIG_ADDRESS, CONFIG_DATA};
use polyvirt_transports::pci::{AddressMap, Message};

pub use crate::xen::sys::dm::{Kind, Range, Request};

/// Where the bus answers, besides the configuration ports: no domain of less than 3.5 GiB has memory there. There are
/// no ports: guests without an interrupt controller for pins have no use for the legacy interface.
pub const PCI: AddressMap = AddressMap { ecam: None, memory: 0xe000_0000..0xe200_0000, memory64: 0..0, io: 0..0 };

/// What every bus is asked for: the ports, the memory, and the host bridge.
pub const RANGES: [Range; 3] = [
    Range::Ports(CONFIG_ADDRESS as u16, CONFIG_DATA as u16 + 3),
    Range::Memory(PCI.memory.start, PCI.memory.end - 1),
    Range::Function(0),
];

/// What a device model asks of Xen for one domain.
pub trait Calls: Send + Sync + 'static {
    /// The domain's memory.
    type Memory: GuestMemory + Send + 'static;

    /// The domain's memory, by guest-physical addresses.
    fn memory(&self) -> Self::Memory;

    /// The domain has given pages back: whatever of its memory is mapped is to be mapped anew when it is accessed next.
    fn invalidate(&self) -> Result<(), HypervisorError>;

    /// Accesses to `range` come here, too.
    fn claim(&self, range: Range) -> Result<(), HypervisorError>;

    /// Delivers a message to the domain's processors.
    fn inject_msi(&self, message: Message) -> Result<(), HypervisorError>;

    /// Waits for a request: the processor that waits for its answer, and what it is about. None once [`Calls::stop`]
    /// was called.
    fn next(&self) -> Option<(usize, Request)>;

    /// Answers a request; `data` is what was read.
    fn answer(&self, processor: usize, data: u64) -> Result<(), HypervisorError>;

    /// Ends all waiting, for good.
    fn stop(&self);
}
