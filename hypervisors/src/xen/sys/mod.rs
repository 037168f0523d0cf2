//! The real calls, through the devices that Linux has in a Xen domain: `/dev/xen/{gntalloc,gntdev,evtchn,xenbus,privcmd}`.
//!
//! | [`Calls`] | device | call of Xen's |
//! |---|---|---|
//! | `allocate` | – | – |
//! | `grant` | gntalloc | – (the kernel writes the grant table) |
//! | `end_access` | gntalloc; privcmd tells what is in use | GNTTABOP_swap_grant_ref |
//! | `map` | gntdev | GNTTABOP_map_grant_ref, GNTTABOP_unmap_grant_ref |
//! | `alloc_unbound`, `bind_interdomain`, `send`, `close`, `next_event`, `unmask` | evtchn | EVTCHNOP_… |
//! | `store_send`, `store_receive` | xenbus | – (the kernel moves messages over the ring) |
//!
//! A domain's part is played by one process, or by two: one that has the memory mapped and the connection to xenstored,
//! and one, its [`hands`], that owns the grants and the ports.

mod abi;
mod arena;
pub mod dm;
mod evtchn;
mod gntalloc;
mod gntdev;
pub mod hands;
mod heap;
mod privcmd;
mod xenbus;

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::Command;

use nix::libc::O_NONBLOCK;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{Access, Pages};

use super::abi::Calls;
use evtchn::Evtchn;
use gntalloc::{Gntalloc, Run};
use hands::Hands;
use heap::Heap;
use xenbus::Xenbus;

/// What has to be there.
const DEVICES: [&str; 6] = ["gntalloc", "gntdev", "evtchn", "xenbus", "privcmd", "hypercall"];

/// Whether this is a domain of Xen's whose kernel has all devices: the version of Xen, or one sentence that says what
/// is missing.
pub fn available() -> Result<String, HypervisorError> {
    let read = |name: &str| fs::read_to_string(Path::new("/sys/hypervisor").join(name)).unwrap_or_default();
    if read("type").trim() != "xen" {
        return Err(HypervisorError::Unavailable(
            "not a domain of Xen's: /sys/hypervisor/type does not say xen".into(),
        ));
    }
    for device in DEVICES.map(|name| format!("/dev/xen/{name}")) {
        File::options().read(true).write(true).open(&device).map_err(|error| {
            HypervisorError::Unavailable(format!(
                "{device}: {error} (modules xen-gntalloc, xen-gntdev, xen-evtchn and xen-privcmd make them, for root)"
            ))
        })?;
    }
    let [major, minor, extra] = ["version/major", "version/minor", "version/extra"].map(read);
    Ok(format!("Xen {}.{}{}", major.trim(), minor.trim(), extra.trim()))
}

/// A domain that makes real calls.
pub struct Domain {
    heap: Heap,
    /// gntalloc's handle that owns the grants.
    granting: File,
    /// The handle that has the ports.
    events: Evtchn,
    store: Xenbus,
    stop: Stop,
    owner: Box<dyn Owner>,
}

impl Domain {
    /// This process plays the domain's part alone.
    pub fn open() -> Result<Self, HypervisorError> {
        let own = Own::open()?;
        let clone = |file: &File| file.try_clone().map_err(|error| refused("a device of Xen's", error));
        let files = [clone(own.gntalloc.file())?, clone(own.evtchn.file())?];
        Self::new(files, Box::new(own))
    }

    /// Two processes play the domain's part: this one has the memory; `program`, started as a child whose standard input
    /// is its mailbox unless it runs already, is to call [`hands::serve`].
    pub fn with_hands(program: &mut Command) -> Result<Self, HypervisorError> {
        let (hands, files) = Hands::start(program)?;
        Self::new(files, Box::new(hands))
    }

    fn new([granting, events]: [File; 2], owner: Box<dyn Owner>) -> Result<Self, HypervisorError> {
        let (heap, events, store, stop) = (Heap::default(), events.into(), Xenbus::open()?, Stop::new()?);
        Ok(Self { heap, granting, events, store, stop, owner })
    }
}

impl Calls for Domain {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        self.heap.allocate(len)
    }

    fn grant(&self, pages: &Pages, to: u16, read_only: bool) -> Result<u32, HypervisorError> {
        let count = self.heap.grantable(pages)?;
        let run = self.owner.grant(count, to, read_only)?;
        self.heap.cover(pages, &self.granting, &run).inspect_err(|_| {
            let _ = self.owner.end_access(run.first, count);
        })?;
        Ok(run.first)
    }

    fn end_access(&self, first: u32, count: u32) -> Result<(), HypervisorError> {
        self.owner.end_access(first, count)?;
        self.heap.uncover(first..first.saturating_add(count));
        Ok(())
    }

    fn map(&self, of: u16, first: u32, count: u32, access: Access) -> Result<Pages, HypervisorError> {
        gntdev::map(of, first, count, access)
    }

    fn alloc_unbound(&self, remote: u16) -> Result<u32, HypervisorError> {
        self.owner.alloc_unbound(remote)
    }

    fn bind_interdomain(&self, remote: u16, port: u32) -> Result<u32, HypervisorError> {
        self.owner.bind_interdomain(remote, port)
    }

    fn send(&self, port: u32) -> Result<(), HypervisorError> {
        self.events.send(port)
    }

    fn close(&self, port: u32) -> Result<(), HypervisorError> {
        self.owner.close(port)
    }

    fn next_event(&self) -> Option<u32> {
        self.events.next_event(&self.stop)
    }

    fn unmask(&self, port: u32) -> Result<(), HypervisorError> {
        self.events.unmask(port)
    }

    fn store_send(&self, bytes: &[u8]) -> Result<(), HypervisorError> {
        self.store.send(bytes)
    }

    fn store_receive(&self, bytes: &mut [u8]) -> bool {
        self.store.receive(bytes, &self.stop)
    }

    fn stop(&self) {
        self.stop.set();
    }
}

/// What the process does that has the devices open. As in [`Calls`], but that grants are of new pages.
trait Owner: Send + Sync {
    fn grant(&self, count: u32, to: u16, read_only: bool) -> Result<Run, HypervisorError>;
    fn end_access(&self, first: u32, count: u32) -> Result<(), HypervisorError>;
    fn alloc_unbound(&self, remote: u16) -> Result<u32, HypervisorError>;
    fn bind_interdomain(&self, remote: u16, port: u32) -> Result<u32, HypervisorError>;
    fn close(&self, port: u32) -> Result<(), HypervisorError>;
}

/// The devices, opened by this process.
struct Own {
    gntalloc: Gntalloc,
    evtchn: Evtchn,
}

impl Own {
    fn open() -> Result<Self, HypervisorError> {
        Ok(Self { gntalloc: Gntalloc::open()?, evtchn: Evtchn::open()? })
    }
}

impl Owner for Own {
    fn grant(&self, count: u32, to: u16, read_only: bool) -> Result<Run, HypervisorError> {
        self.gntalloc.grant(count, to, read_only)
    }

    fn end_access(&self, first: u32, count: u32) -> Result<(), HypervisorError> {
        self.gntalloc.end_access(first, count)
    }

    fn alloc_unbound(&self, remote: u16) -> Result<u32, HypervisorError> {
        self.evtchn.alloc_unbound(remote)
    }

    fn bind_interdomain(&self, remote: u16, port: u32) -> Result<u32, HypervisorError> {
        self.evtchn.bind_interdomain(remote, port)
    }

    fn close(&self, port: u32) -> Result<(), HypervisorError> {
        self.evtchn.close(port)
    }
}

/// Ends all waiting.
struct Stop(EventFd);

impl Stop {
    fn new() -> Result<Self, HypervisorError> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self(event.map_err(|error| refused("eventfd", error))?))
    }

    fn set(&self) {
        if let Err(error) = self.0.write(1) {
            tracing::error!(%error, "a domain does not stop");
        }
    }

    /// Waits until there is something to read from `file`; false once this is set.
    fn wait_for(&self, file: &File) -> bool {
        let mut fds = [self.0.as_fd(), file.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => return fds[0].revents().is_none_or(|events| events.is_empty()),
                Err(nix::Error::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "poll");
                    return false;
                }
            }
        }
    }
}

/// Opens a device of `/dev/xen`. Reading does not block.
fn open(name: &str) -> Result<File, HypervisorError> {
    let path = format!("/dev/xen/{name}");
    let file = OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open(&path);
    file.map_err(|error| HypervisorError::Unavailable(format!("{path}: {error}")))
}

fn refused(call: &'static str, reason: impl ToString) -> HypervisorError {
    HypervisorError::Refused { call, reason: reason.to_string() }
}
