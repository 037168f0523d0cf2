//! What the back end tells the front end without being asked.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use polyvirt_core::transport::QueueSet;

use super::connection::Connection;
use super::iommu::Iommu;
use super::link::Link;
use super::messages::{BackendRequest, Iotlb, NEED_REPLY, Payload, REPLY, Request, VringState};

/// What was told and not asked for yet.
pub(super) struct News {
    /// Readable when there is some.
    pub(super) event: EventFd,
    /// Which queues were called by a message: a [`QueueSet`].
    pub(super) called: AtomicU64,
    /// Whether the configuration changed.
    pub(super) config: AtomicBool,
    /// How often the configuration changed.
    pub(super) generation: AtomicU32,
    /// What device addresses mean, if they are translated.
    pub(super) iommu: Option<Arc<Iommu>>,
}

impl News {
    pub(super) const fn new(event: EventFd, iommu: Option<Arc<Iommu>>) -> Self {
        Self { event, called: AtomicU64::new(0), config: AtomicBool::new(false), generation: AtomicU32::new(0), iommu }
    }
}

/// A thread that listens; dropping this ends it.
pub(super) struct Listener {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Listens on `socket`; answers go over `link`.
    pub(super) fn spawn(
        socket: UnixStream,
        link: Arc<Link>,
        news: Arc<News>,
        stop: Arc<EventFd>,
    ) -> std::io::Result<Self> {
        let mut connection = Connection::new(socket).map_err(std::io::Error::other)?;
        let ended = Arc::clone(&stop);
        let thread = Builder::new().name("vhost-user".into()).spawn(move || {
            loop {
                let mut fds = [connection.as_fd(), ended.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                let waited = poll(&mut fds, PollTimeout::NONE);
                if waited.is_ok() && fds[1].any().unwrap_or(true) {
                    return;
                }
                match connection.receive() {
                    Ok(None) => {}
                    Ok(Some(message)) => {
                        let header = message.header;
                        hear(header.request, &message.payload, &link, &news);
                        if header.flags & NEED_REPLY != 0 {
                            // Who does not read its answers gets none.
                            let _ = connection.try_send(header.request, REPLY, &0u64.to_bytes());
                        }
                    }
                    Err(_) => return,
                }
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn hear(request: u32, payload: &[u8], link: &Link, news: &News) {
    match BackendRequest::from_code(request) {
        Some(BackendRequest::ConfigChange) => {
            news.generation.fetch_add(1, Ordering::AcqRel);
            news.config.store(true, Ordering::Release);
        }
        Some(BackendRequest::VringCall) => {
            let state = (payload.len() >= VringState::LEN).then(|| VringState::from_bytes(payload));
            let index = state.and_then(|state| u16::try_from(state.index).ok());
            news.called.fetch_or(index.map_or(QueueSet::ALL, QueueSet::of).bits(), Ordering::AcqRel);
        }
        Some(BackendRequest::VringErr) => news.config.store(true, Ordering::Release),
        Some(BackendRequest::IotlbMsg) if payload.len() >= Iotlb::LEN => {
            let Iotlb { iova, kind, .. } = Iotlb::from_bytes(payload);
            // What the driver did not share stays untranslated: there is no message for that.
            if kind == Iotlb::MISS
                && let Some(update) = news.iommu.as_ref().and_then(|iommu| iommu.translation(iova))
                && let Err(error) = link.tell(Request::IotlbMsg, &update.to_bytes(), &[])
            {
                tracing::debug!(%error, "a translation was not delivered");
            }
            return;
        }
        Some(BackendRequest::IotlbMsg) | None => return,
    }
    let _ = news.event.write(1);
}
