//! An ioreq server: what a guest does where no memory is comes to it as a request, one at a time for each virtual
//! processor, and the processor goes on when it has answered.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::{Owner, Pages, Words};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use super::super::evtchn::Evtchn;
use super::super::{Stop, open, refused};
use super::abi::{
    CreateServer, DATA_IS_PTR, DIR_READ, DOWNWARDS, DestroyServer, DmOp, DmOpBuffer, DmOpCall, FRAME_IOREQ, InjectMsi,
    MmapResource, Operation, PRIVCMD_DM_OP, PRIVCMD_MMAP_RESOURCE, RESOURCE_IOREQ_SERVER, SLOT, SLOT_ADDR, SLOT_DATA,
    SLOT_SIZE, SLOT_STATE, STATE_ANSWERED, STATE_INPROCESS, STATE_READY, STATE_SHIFT, ServerRange, ServerState,
    TYPE_COPY, TYPE_INVALIDATE, TYPE_PCI_CONFIG, TYPE_PIO,
};
use super::releases::Releases;
use crate::mapping::Mapping;
use crate::xen::abi::PAGE_SIZE;

/// What a server may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// `XEN_DMOP_IO_RANGE_PORT`: from this port to that one.
    Ports(u16, u16),
    /// `XEN_DMOP_IO_RANGE_MEMORY`: from this guest-physical address to that one.
    Memory(u64, u64),
    /// `XEN_DMOP_IO_RANGE_PCI`: configuration space of this function (device × 8 + function) of bus 0.
    Function(u8),
}

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ports, from `address` on.
    Port,
    /// Memory that is none, from `address` on.
    Memory,
    /// Configuration space: `address` is (segment × 2^16 + bus × 2^8 + function) × 2^32 + offset.
    Config,
    /// The domain's pages have changed.
    Invalidate,
    /// Anything else, by number.
    Other(u8),
}

/// A request: `count` accesses of `size` bytes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it is about.
    pub kind: Kind,
    /// Where.
    pub address: u64,
    /// What is written; if `indirect`, where in the guest's memory it is, or is to go.
    pub data: u64,
    /// Whether `data` is a guest-physical address.
    pub indirect: bool,
    /// Bytes of one access.
    pub size: u32,
    /// Accesses.
    pub count: u32,
    /// Whether addresses go down from one access to the next.
    pub downwards: bool,
    /// Whether the guest reads.
    pub read: bool,
}

/// An ioreq server of a domain. It goes with this value.
pub struct Server {
    domain: u16,
    id: u16,
    privcmd: File,
    page: Words<u64, Owner>,
    events: Evtchn,
    releases: Releases,
    /// By port on this side, the virtual processor.
    processors: BTreeMap<u32, usize>,
    stop: Stop,
}

impl Server {
    /// A server for `ranges` of domain `domain`. From now on each access there waits for an answer.
    pub fn new(domain: u16, ranges: &[Range]) -> Result<Self, HypervisorError> {
        super::super::available()?;
        let (privcmd, events) = (open("privcmd")?, Evtchn::open()?);
        let (releases, stop) = (Releases::open()?, Stop::new()?);
        let mut create = CreateServer::default();
        dm_op(&privcmd, domain, &mut create)?;
        let id = create.id;
        let page = map_requests(&privcmd, domain, id).inspect_err(|_| destroy(&privcmd, domain, id))?;
        let mut new = Self { domain, id, privcmd, page, events, releases, processors: BTreeMap::new(), stop };
        for range in ranges {
            new.claim(*range)?;
        }
        new.enable()?;
        for processor in 0..PAGE_SIZE / size_of::<[u64; SLOT]>() {
            // One for each processor that the domain has.
            let remote = new.word(processor, SLOT_STATE) as u32;
            if remote != 0 {
                let port = new.events.bind_interdomain(domain, remote)?;
                new.processors.insert(port, processor);
            }
        }
        Ok(new)
    }

    /// The server is asked for this, too.
    pub fn claim(&self, range: Range) -> Result<(), HypervisorError> {
        let (kind, start, end) = match range {
            Range::Ports(start, end) => (0, start.into(), end.into()),
            Range::Memory(start, end) => (1, start, end),
            Range::Function(function) => (2, function.into(), function.into()),
        };
        self.dm_op(ServerRange { id: self.id, pad: 0, kind, start, end })
    }

    /// Does what a write of `data` to `address` by a device would do, where the interrupt controllers of processors are.
    pub fn inject_msi(&self, address: u64, data: u32) -> Result<(), HypervisorError> {
        self.dm_op(InjectMsi { data, pad: 0, addr: address })
    }

    /// Waits for a request: the virtual processor that waits for its [answer](Self::answer), and what it is about. None
    /// once [`Server::stop`] was called.
    pub fn next(&self) -> Option<(usize, Request)> {
        loop {
            let port = self.events.next_event(&self.stop)?;
            // Before the slot is looked at, so that an event that comes now is not lost.
            self.events.unmask(port).ok()?;
            // An event may also come for nothing.
            let Some(&processor) = self.processors.get(&port) else { continue };
            if let Some(request) = self.take(processor) {
                return Some((processor, request));
            }
        }
    }

    fn take(&self, processor: usize) -> Option<Request> {
        let state = self.page.load::<u64>(processor * SLOT + SLOT_STATE, Ordering::Acquire);
        if state >> STATE_SHIFT & 0xf != STATE_READY {
            return None;
        }
        self.set_state(processor, state, STATE_INPROCESS);
        let size = self.word(processor, SLOT_SIZE);
        Some(Request {
            kind: match (state >> 56) as u8 {
                TYPE_PIO => Kind::Port,
                TYPE_COPY => Kind::Memory,
                TYPE_PCI_CONFIG => Kind::Config,
                TYPE_INVALIDATE => Kind::Invalidate,
                other => Kind::Other(other),
            },
            address: self.word(processor, SLOT_ADDR),
            data: self.word(processor, SLOT_DATA),
            indirect: state & DATA_IS_PTR != 0,
            size: (size >> 32) as u32,
            count: size as u32,
            downwards: state & DOWNWARDS != 0,
            read: state & DIR_READ != 0,
        })
    }

    /// Answers the request of `processor`, which goes on; if it read, it has read `data`.
    pub fn answer(&self, processor: usize, data: u64) -> Result<(), HypervisorError> {
        let state = self.word(processor, SLOT_STATE);
        self.page.store(processor * SLOT + SLOT_DATA, data, Ordering::Relaxed);
        self.set_state(processor, state, STATE_ANSWERED);
        let port = self.processors.iter().find(|(_, slot)| **slot == processor);
        port.map_or(Ok(()), |(port, _)| self.events.send(*port))
    }

    /// Waits until the domain is gone: true; or until [`Server::stop`] was called, or xenstored cannot be heard any more.
    pub fn wait_for_its_end(&self) -> bool {
        loop {
            // A server goes when its domain does, whatever of the domain is still mapped.
            if self.enable().is_err() {
                return true;
            }
            if !self.releases.wait(&self.stop) {
                return false;
            }
        }
    }

    /// Ends all waiting, for good.
    pub fn stop(&self) {
        self.stop.set();
    }

    fn enable(&self) -> Result<(), HypervisorError> {
        self.dm_op(ServerState { id: self.id, enabled: 1, pad: 0 })
    }

    fn dm_op<T: Operation>(&self, mut argument: T) -> Result<(), HypervisorError> {
        dm_op(&self.privcmd, self.domain, &mut argument)
    }

    fn word(&self, processor: usize, word: usize) -> u64 {
        self.page.load(processor * SLOT + word, Ordering::Relaxed)
    }

    fn set_state(&self, processor: usize, was: u64, state: u64) {
        let new = was & !(0xf << STATE_SHIFT) | state << STATE_SHIFT;
        self.page.store(processor * SLOT + SLOT_STATE, new, Ordering::Release);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        destroy(&self.privcmd, self.domain, self.id);
    }
}

fn destroy(privcmd: &File, domain: u16, id: u16) {
    // Fails if the domain is gone, and the server with it.
    if let Err(error) = dm_op(privcmd, domain, &mut DestroyServer { id, pad: 0 }) {
        tracing::debug!(%error, "an ioreq server is gone already");
    }
}

/// Makes a call about `domain`; what comes out is in `argument`.
fn dm_op<T: Operation>(privcmd: &File, domain: u16, argument: &mut T) -> Result<(), HypervisorError> {
    let mut op = DmOp { op: T::NUMBER, pad: 0, u: *argument };
    let buffer = DmOpBuffer { uptr: (&raw mut op).cast::<c_void>(), size: size_of_val(&op) };
    let call = DmOpCall { dom: domain, num: 1, ubufs: &raw const buffer };
    // SAFETY: Xen reads and writes the operation, whose size it is told; the kernel keeps it where it is meanwhile.
    let result = unsafe { ioctl_with_ref(privcmd, PRIVCMD_DM_OP, &call) };
    let error = io::Error::last_os_error();
    *argument = op.u;
    if result == 0 { Ok(()) } else { Err(refused(T::NAME, error)) }
}

/// Maps the page of requests of server `id`.
fn map_requests(privcmd: &File, domain: u16, id: u16) -> Result<Words<u64, Owner>, HypervisorError> {
    const CALL: &str = "XENMEM_acquire_resource";
    let size = NonZeroUsize::new(PAGE_SIZE).ok_or(HypervisorError::Exhausted("memory"))?;
    let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping wherever there is room harms nobody.
    let start = unsafe { mmap(None, size, rights, MapFlags::MAP_SHARED, privcmd, 0) };
    let start = start.map_err(|error| refused("mmap of /dev/xen/privcmd", error))?;
    let mapping = Mapping(start, PAGE_SIZE);
    let mut resource = MmapResource {
        dom: domain,
        kind: RESOURCE_IOREQ_SERVER,
        id: id.into(),
        idx: FRAME_IOREQ,
        num: 1,
        addr: start.addr().get() as u64,
    };
    // SAFETY: the new mapping is a page, which nobody uses yet.
    if unsafe { ioctl_with_mut_ref(privcmd, PRIVCMD_MMAP_RESOURCE, &mut resource) } != 0 {
        return Err(refused(CALL, io::Error::last_os_error()));
    }
    // SAFETY: mapped until the owner is dropped.
    let page = unsafe { Pages::new(start.cast(), PAGE_SIZE, Arc::new(mapping)) };
    Words::new(page).map_err(|error| refused(CALL, error))
}
