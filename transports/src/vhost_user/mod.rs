//! vhost-user: a device in another process than its driver's VMM, behind a socket.
//!
//! The front end hands guest memory, queues and doorbells over as file descriptors. A [`Backend`] is the device's side,
//! which serves any front end: QEMU, User Mode Linux, our own. A [`Driver`] is the guest's side, which drives any back end.

mod body;
mod calls;
mod change;
mod connection;
mod device;
mod driver;
mod error;
mod events;
mod guard;
mod inflight;
mod iommu;
mod link;
mod listener;
mod log;
mod map;
mod memory;
pub mod messages;
mod misses;
mod regions;
mod relay;
mod rings;
mod serve;
mod session;
mod signals;

pub use connection::{Connection, ConnectionError, Message};
pub use device::Backend;
pub use driver::Driver;
pub use error::ServeError;
pub use guard::outlive_truncation;
pub use map::{MapError, map, memory_file};
pub use memory::{Mapped, Memory};
pub use regions::RegionError;
pub use serve::{Ended, Stop, listen};
pub use session::{Dial, Guest, Options};
