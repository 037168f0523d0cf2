//! What a connection begins with: features, the guest's memory, the socket for the back end's requests.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use polyvirt_core::Features;
use polyvirt_core::hypervisor::{HypervisorError, Share};
use polyvirt_core::memory::Pages;
use polyvirt_core::transport::TransportError;

use super::connection::Connection;
use super::iommu::Iommu;
use super::link::{Link, refused};
use super::listener::{Listener, News};
use super::messages::*;

/// What is accepted if it is offered, unless told otherwise.
const WANTED: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

/// The memory of the guest, for handing over.
pub struct Guest {
    /// Where rings and buffers are allocated: out of the regions.
    pub share: Arc<dyn Share>,
    /// Guest-physical start, file, and the memory as it is mapped here.
    pub regions: Vec<(u64, OwnedFd, Pages)>,
}

/// How to talk to the back end.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Protocol features to accept, as far as they are offered.
    pub protocol: ProtocolFeatures,
    /// How many queues there are, if the back end cannot be asked.
    pub queues: u16,
    /// Whether device addresses are translated: only for drivers that accept VIRTIO_F_ACCESS_PLATFORM.
    pub iommu: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { protocol: WANTED, queues: 1, iommu: false }
    }
}

/// How to get a connection.
pub type Dial = Box<dyn Fn() -> std::io::Result<UnixStream> + Send>;

/// What belongs to one connection.
pub(super) struct Session {
    pub(super) link: Arc<Link>,
    pub(super) news: Arc<News>,
    _listener: Option<Listener>,
    pub(super) offered: u64,
    pub(super) protocol: ProtocolFeatures,
    pub(super) queues: u16,
}

impl Session {
    /// The features that the device offers, without those of the protocol.
    pub(super) fn features(&self) -> Features {
        Features::from_bits_retain((self.offered & !(LOG_ALL | PROTOCOL_FEATURES)).into())
    }

    pub(super) fn open(
        dial: &Dial,
        guest: &Guest,
        options: Options,
        iommu: Option<Arc<Iommu>>,
    ) -> Result<Self, TransportError> {
        let system = |call| move |reason: String| HypervisorError::Refused { call, reason };
        let socket = dial().map_err(|error| system("connect")(error.to_string()))?;
        let connection = Connection::new(socket).map_err(|error| system("connect")(error.to_string()))?;
        let link = Arc::new(Link::new(connection).map_err(|error| system("dup")(error.to_string()))?);
        if let Some(iommu) = &iommu {
            iommu.connect(&link);
        }
        let news = Arc::new(News::new(event()?, iommu));
        link.tell(Request::SetOwner, &[], &[])?;
        let offered: u64 = link.ask_for(Request::GetFeatures, &[])?;
        let mut protocol = ProtocolFeatures::empty();
        if offered & PROTOCOL_FEATURES != 0 {
            let theirs: u64 = link.ask_for(Request::GetProtocolFeatures, &[])?;
            protocol = ProtocolFeatures::from_bits_retain(theirs) & options.protocol;
            link.tell(Request::SetProtocolFeatures, &protocol.bits().to_bytes(), &[])?;
        }
        let has = |feature| protocol.contains(feature);
        if has(ProtocolFeatures::REPLY_ACK) {
            link.acknowledge();
        }
        let mut queues = options.queues;
        if has(ProtocolFeatures::MQ) {
            let theirs: u64 = link.ask_for(Request::GetQueueNum, &[])?;
            queues = u16::try_from(theirs).map_err(|_| refused(Request::GetQueueNum, format!("{theirs} queues")))?;
        }
        let mut listener = None;
        if has(ProtocolFeatures::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair().map_err(|error| system("socketpair")(error.to_string()))?;
            link.tell(Request::SetBackendReqFd, &[], &[theirs.as_fd()])?;
            let stop = Arc::new(event()?);
            let spawned = Listener::spawn(ours, Arc::clone(&link), Arc::clone(&news), stop);
            listener = Some(spawned.map_err(|error| system("thread")(error.to_string()))?);
        }
        guest.hand_over(&link, has(ProtocolFeatures::CONFIGURE_MEM_SLOTS))?;
        Ok(Self { link, news, _listener: listener, offered, protocol, queues })
    }
}

impl Guest {
    fn hand_over(&self, link: &Link, one_by_one: bool) -> Result<(), TransportError> {
        let regions = self.regions.iter().map(|(guest, file, pages)| {
            let region = Region { guest: *guest, size: pages.len() as u64, user: place(pages), offset: 0 };
            (region, file.as_fd())
        });
        if one_by_one {
            for (region, file) in regions {
                link.tell(Request::AddMemReg, &[0u64.to_bytes(), region.to_bytes()].concat(), &[file])?;
            }
            return Ok(());
        }
        let mut payload = (self.regions.len() as u64).to_bytes();
        let mut files = Vec::new();
        for (region, file) in regions {
            payload.extend(region.to_bytes());
            files.push(file);
        }
        link.tell(Request::SetMemTable, &payload, &files)
    }

    /// What a ring's address is for the back end: ours, but a device address if those are translated.
    pub(super) fn user(&self, address: u64, accepted: Features) -> Result<u64, TransportError> {
        if accepted.contains(Features::ACCESS_PLATFORM) {
            return Ok(address);
        }
        let of = |(guest, _, pages): &(u64, OwnedFd, Pages)| {
            let offset = address.checked_sub(*guest)?;
            (offset < pages.len() as u64).then(|| place(pages) + offset)
        };
        let found = self.regions.iter().find_map(of);
        let reason = || format!("{address:#x} is not guest memory");
        found.ok_or_else(|| HypervisorError::Refused { call: "SET_VRING_ADDR", reason: reason() }.into())
    }
}

/// Where `pages` are, as the back end is told.
fn place(pages: &Pages) -> u64 {
    pages.as_ptr().addr() as u64
}

pub(super) fn event() -> Result<EventFd, HypervisorError> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|error| HypervisorError::Refused { call: "eventfd", reason: error.to_string() })
}
