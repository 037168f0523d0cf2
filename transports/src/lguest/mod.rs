//! lguest's own bus: one page above RAM with a descriptor for each device, rings that the host allocates, one
//! hypercall (the launcher of Linux 2.6.25). The interface is the legacy one.

#[cfg(feature = "std")]
mod device;
mod driver;
pub mod registers;
#[cfg(all(test, feature = "std"))]
mod tests;

#[cfg(feature = "std")]
pub use device::attach;
pub use driver::Driver;
pub use registers::{GuestPlace, HostPlace};
