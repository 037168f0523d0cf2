//! Below the shim: Xen and xenstored, and what the kernel of a domain does for its [`Calls`](super::Calls).
//!
//! Each domain's memory is a file in memory, and only that domain has it mapped. A grant that another domain maps is a
//! mapping of just the granted pages, read-only unless write access was granted and asked for: what is not granted is
//! not reachable, by the MMU.
//!
//! | refused | what Xen says |
//! |---|---|
//! | a reference beyond the grant table | GNTST_bad_gntref (-3) |
//! | an entry that grants nothing, or grants to another domain | GNTST_general_error (-1) |
//! | a read-only grant mapped for writing | GNTST_general_error (-1) |
//! | a grant of something that is not the domain's memory | GNTST_bad_page (-9) |
//! | a domain that does not exist | GNTST_bad_domain (-2); for event channels ESRCH |
//! | a port that is closed or was never open; one to bind that is bound, or meant for another domain | EINVAL |
//! | no port left | ENOSPC |
//!
//! These are the codes of Xen's `common/grant_table.c` and `common/event_channel.c`; GNTST_permission_denied is not what
//! a read-only grant gets there. xenstored's errors are the strings of `io/xs_wire.h`.

mod domain;
mod events;
mod grants;
mod memory;
mod ring;
#[cfg(test)]
mod tests;
mod tree;
mod xenstored;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, RwLock};

use polyvirt_core::hypervisor::HypervisorError;

pub use domain::Domain;
use events::{Channels, Upcall};
use grants::Pins;
use memory::Ram;
use xenstored::Xenstored;

use super::abi::DOM0;

/// The guest's domain.
const DOMU: u16 = 1;
/// The domain that xenstored runs in: a stub domain of its own.
const XENSTORED: u16 = 2;

/// The hypervisor.
#[derive(Default)]
struct Hypervisor {
    domains: RwLock<BTreeMap<u16, Arc<Body>>>,
    channels: Mutex<Channels>,
}

/// What the hypervisor knows of a domain.
struct Body {
    ram: Arc<Ram>,
    pins: Pins,
    upcall: Arc<Upcall>,
}

/// Starts a hypervisor with xenstored and two domains: domain 0, and one that has `ram` bytes (rounded up to whole
/// pages) beside what its kernel needs.
pub fn start(ram: usize) -> Result<(Domain, Domain), HypervisorError> {
    let hypervisor = Arc::<Hypervisor>::default();
    let mut host = Domain::new(&hypervisor, DOM0, 0)?;
    let mut guest = Domain::new(&hypervisor, DOMU, ram)?;
    let stub = Domain::new(&hypervisor, XENSTORED, 0)?;
    let rings = [host.introduce(XENSTORED)?, guest.introduce(XENSTORED)?];
    let xenstored = Arc::new(Xenstored::start(stub, &rings)?);
    Ok((host.with(xenstored.clone()), guest.with(xenstored)))
}

fn refused(call: &'static str, reason: impl ToString) -> HypervisorError {
    HypervisorError::Refused { call, reason: reason.to_string() }
}
