//! `polyvirt xen-refusals`: what Xen itself is to refuse.

use std::sync::Arc;

use polyvirt_core::hypervisor::{Host as _, HypervisorError, Share as _};
use polyvirt_core::memory::{Access, GuestMemory, MemoryError, ResolveError};
use polyvirt_hypervisors::xen::{self, Guest, sys};

use super::output::Output;
use super::{CliError, FAILURE, SUCCESS};

/// Bytes of a page.
const PAGE: usize = 4096;
/// A domain that is not this one.
const ANOTHER: u16 = 7;

/// Tries each; a line with its name, what is expected and what came.
pub(super) fn run(output: &mut Output) -> Result<u8, CliError> {
    let tried = tried().map_err(|error| CliError::Mistake(error.to_string()))?;
    for (name, refused, observed) in &tried {
        output.text(&format!("{name} {} {observed}\n", if *refused { "refused" } else { "allowed" }))?;
    }
    Ok(if tried.iter().all(|(_, refused, _)| *refused) { SUCCESS } else { FAILURE })
}

/// What was tried, whether it was refused as it should be, and what came.
fn tried() -> Result<Vec<(&'static str, bool, String)>, HypervisorError> {
    let (host, guest) = xen::start(16 * PAGE)?;
    let memory = host.memory();
    let resolve = |address, access| memory.resolve(address, 1, access, drop);
    let mut tried = Vec::new();

    let pages = guest.allocate(PAGE)?;
    let address = guest.share(&pages, Access::READ)?;
    let readable = resolve(address, Access::READ).is_ok();
    let written = resolve(address, Access::READ | Access::WRITE);
    let refused = readable && matches!(written, Err(ResolveError::Fault(MemoryError::Forbidden { .. })));
    tried.push(("read-only-grant", refused, format!("{written:?}")));

    // Nobody has granted the last reference of the table.
    let bad = resolve(u64::from(u32::MAX - 1) << 12, Access::READ);
    tried.push((
        "bad-reference",
        matches!(bad, Err(ResolveError::Fault(MemoryError::NotMapped { .. }))),
        format!("{bad:?}"),
    ));

    let stranger = Guest::new(Arc::new(sys::Domain::open()?), ANOTHER);
    let theirs = stranger.allocate(PAGE)?;
    let foreign = resolve(stranger.share(&theirs, Access::READ)?, Access::READ);
    tried.push((
        "foreign-domain",
        matches!(foreign, Err(ResolveError::Fault(MemoryError::NotMapped { .. }))),
        format!("{foreign:?}"),
    ));

    let mut lease = None;
    let kept = memory.resolve(address, 1, Access::READ, |part| lease = Some(part));
    let in_use = guest.unshare(address);
    drop(lease);
    let afterwards = guest.unshare(address);
    let refused = kept.is_ok() && in_use == Err(HypervisorError::InUse { address }) && afterwards.is_ok();
    tried.push(("revocation-in-use", refused, format!("{in_use:?}, then {afterwards:?}")));
    Ok(tried)
}
