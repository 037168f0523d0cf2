//! What a port is on a host where it cannot run: halves that cannot exist, and one sentence that says why.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use polyvirt_core::hypervisor::{self, BusDevice, HypervisorError, Interrupt, Share};
use polyvirt_core::memory::{Access, FlatMemory, Pages};
use polyvirt_transports::{mmio, pci, xenbus};

/// A host half that cannot exist, on a bus with places `P`.
pub struct Host<P>(Infallible, PhantomData<fn() -> P>);

/// A guest half that cannot exist, on a bus with places `P`.
pub struct Guest<P>(Infallible, PhantomData<fn() -> P>);

impl<P> hypervisor::Host for Host<P> {
    type Memory = Arc<FlatMemory>;
    type Place = P;

    fn memory(&self) -> Self::Memory {
        match self.0 {}
    }

    fn place(&mut self, _device_type: u32, _queues: u16) -> Result<P, HypervisorError> {
        match self.0 {}
    }

    fn interrupt(&self, _place: &P) -> Arc<dyn Interrupt> {
        match self.0 {}
    }

    fn plug(&mut self, _place: P, _device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        match self.0 {}
    }
}

impl<P> Share for Guest<P> {
    fn allocate(&self, _len: usize) -> Result<Pages, HypervisorError> {
        match self.0 {}
    }

    fn share(&self, _pages: &Pages, _access: Access) -> Result<u64, HypervisorError> {
        match self.0 {}
    }

    fn unshare(&self, _address: u64) -> Result<(), HypervisorError> {
        match self.0 {}
    }
}

impl<P> hypervisor::Guest for Guest<P> {
    type Place = P;

    fn notify(&self, _doorbell: u64, _value: u32) -> Result<(), HypervisorError> {
        match self.0 {}
    }

    fn take(&self, _line: u32) -> Result<bool, HypervisorError> {
        match self.0 {}
    }

    fn enumerate(&self) -> Result<Vec<P>, HypervisorError> {
        match self.0 {}
    }
}

impl<P> hypervisor::WaitForInterrupt for Guest<P> {
    fn wait(&self, _lines: &[u32], _most: Duration) -> Result<bool, HypervisorError> {
        match self.0 {}
    }
}

impl mmio::Registers for Guest<mmio::Place> {
    fn load(&self, _address: u64, _data: &mut [u8]) -> Result<(), HypervisorError> {
        match self.0 {}
    }

    fn store(&self, _address: u64, _data: &[u8]) -> Result<(), HypervisorError> {
        match self.0 {}
    }
}

impl pci::Platform for Host<mmio::Place> {
    type Memory = Arc<FlatMemory>;

    fn memory(&self) -> Self::Memory {
        match self.0 {}
    }

    fn forward_to(&mut self, _root: Arc<pci::Root>) {
        match self.0 {}
    }

    fn wires(&mut self, _function: u8, _queues: u16, _vectors: u16) -> Result<Arc<dyn pci::Wires>, HypervisorError> {
        match self.0 {}
    }

    fn serve(&mut self, _function: u8, _device: pci::SharedDevice) -> Result<(), HypervisorError> {
        match self.0 {}
    }
}

impl pci::Machine for Guest<mmio::Place> {
    fn address_map(&self) -> pci::AddressMap {
        match self.0 {}
    }

    fn input(&self, _port: u16, _data: &mut [u8]) -> Result<(), HypervisorError> {
        match self.0 {}
    }

    fn output(&self, _port: u16, _data: &[u8]) -> Result<(), HypervisorError> {
        match self.0 {}
    }

    fn message(&self, _line: u32) -> pci::Message {
        match self.0 {}
    }
}

impl xenbus::Domain for Guest<xenbus::GuestPlace> {
    fn store(&self) -> &dyn xenbus::Store {
        match self.0 {}
    }

    fn open_channel(&self) -> Result<xenbus::Channel, HypervisorError> {
        match self.0 {}
    }

    fn close_channel(&self, _channel: xenbus::Channel) -> Result<(), HypervisorError> {
        match self.0 {}
    }

    fn watch(&self, _path: &str) -> Result<u32, HypervisorError> {
        match self.0 {}
    }
}

/// Defines the module of a port that is not here: the port's type, its name, the places of its host and guest half.
#[cfg(any(test, not(all(target_os = "linux", target_arch = "x86_64"))))]
macro_rules! absent {
    ($module:ident: $port:ident, $name:literal, $host:ty, $guest:ty) => {
        #[doc = concat!($name, ", which is not here.")]
        pub mod $module {
            use polyvirt_core::hypervisor::{Hypervisor, HypervisorError};

            #[doc = concat!($name, ", which is not here.")]
            pub struct $port;

            impl Hypervisor for $port {
                type Host = $crate::absent::Host<$host>;
                type Guest = $crate::absent::Guest<$guest>;
            }

            /// Why no guest runs.
            pub fn available() -> Result<String, HypervisorError> {
                Err(unavailable())
            }

            /// Nothing is.
            pub fn is_real() -> bool {
                false
            }

            /// The argument with which nothing is run.
            pub const HANDS: &str = concat!(stringify!($module), "-hands");

            /// Fails as [`available`] does.
            pub fn hands() -> Result<(), HypervisorError> {
                Err(unavailable())
            }

            fn unavailable() -> HypervisorError {
                HypervisorError::Unavailable(concat!("the port to ", $name, " needs Linux on x86-64").into())
            }

            /// The two halves, which cannot exist.
            pub type Halves = (<$port as Hypervisor>::Host, <$port as Hypervisor>::Guest);

            /// Fails as [`available`] does.
            pub fn start(_ram: usize) -> Result<Halves, HypervisorError> {
                Err(unavailable())
            }
        }
    };
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub(crate) use absent;

#[cfg(test)]
#[allow(unreachable_pub, dead_code, reason = "not every port has a use for all of it")]
mod tests {
    use polyvirt_transports::mmio;

    absent!(nothing: Nothing, "nothing", super::mmio::Place, super::mmio::Place);

    #[test]
    fn a_port_that_is_not_here_says_why_in_one_sentence() {
        let reason = nothing::available().unwrap_err().to_string();
        assert_eq!(reason, "the port to nothing needs Linux on x86-64");
        assert!(nothing::start(1 << 20).is_err_and(|error| error.to_string() == reason));
    }
}
