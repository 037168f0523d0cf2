//! xenstored: the daemon that keeps the nodes, in a domain of its own.

use std::sync::Arc;
use std::thread::{JoinHandle, spawn};

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_core::memory::Access;

use super::super::abi::{Calls, DOM0};
use super::super::wire::{HEADER_LEN, PAYLOAD_MAX, header, message, parse_header};
use super::domain::Domain;
use super::grants::RESERVED_XENSTORE;
use super::ring::{Broken, Interface, REQUESTS, RESPONSES};
use super::tree::{Change, Errno, Permissions, Store, absolute, home};

/// Watches that a domain other than domain 0 may have.
const WATCHES: usize = 128;
/// Bytes that may wait for a domain to take them.
const OUTSTANDING: usize = 256 * 1024;

/// A domain as the toolstack introduces it: its port for the ring, which is under its reserved grant reference.
#[derive(Clone, Copy)]
pub(super) struct Introduced {
    pub(super) domain: u16,
    pub(super) port: u32,
}

/// The daemon; dropping this ends it.
pub(super) struct Xenstored {
    domain: Arc<Domain>,
    thread: Option<JoinHandle<()>>,
}

impl Xenstored {
    /// Starts it in `domain`, for the domains in `introduced`.
    pub(super) fn start(domain: Domain, introduced: &[Introduced]) -> Result<Self, HypervisorError> {
        let domain = Arc::new(domain);
        let mut daemon = Daemon { store: Store::new(), connections: Vec::new(), domain: domain.clone() };
        for &Introduced { domain: id, port } in introduced {
            daemon.toolstack(id);
            let page = domain.map(id, RESERVED_XENSTORE, 1, Access::READ | Access::WRITE)?;
            let port = domain.bind_interdomain(id, port)?;
            daemon.connections.push(Connection::new(id, port, Interface::new(page)?));
        }
        daemon.store.changes();
        let thread = spawn(move || {
            while let Some(port) = daemon.domain.next_event() {
                let _ = daemon.domain.unmask(port);
                daemon.serve();
            }
        });
        Ok(Self { domain, thread: Some(thread) })
    }
}

impl Drop for Xenstored {
    fn drop(&mut self) {
        self.domain.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Daemon {
    store: Store,
    connections: Vec<Connection>,
    domain: Arc<Domain>,
}

/// One domain's end.
struct Connection {
    domain: u16,
    port: u32,
    interface: Interface,
    /// What has come of a message.
    input: Vec<u8>,
    /// What is still to be sent.
    output: Vec<u8>,
    watches: Vec<Watch>,
    /// Bytes were moved, of which the domain has not been told.
    news: bool,
    broken: bool,
}

/// The four numbers of a message's header, and what follows it.
type Message = ([u32; 4], Vec<u8>);

struct Watch {
    /// As the domain wrote it, and what it means.
    asked: Vec<u8>,
    path: String,
    token: Vec<u8>,
}

impl Daemon {
    /// What the toolstack writes when it builds a domain.
    fn toolstack(&mut self, id: u16) {
        let Ok(tree) = self.store.tree(DOM0, 0) else { return };
        let readable = [format!("n{DOM0}"), format!("r{id}")];
        let own = [format!("n{id}")];
        for (node, value, permissions) in [
            ("", None, &readable[..]),
            ("/domid", Some(id.to_string()), &readable),
            ("/device", None, &readable),
            ("/device/virtio", None, &readable),
            ("/data", None, &own),
        ] {
            let path = home(id) + node;
            let _ = tree.write(DOM0, &path, value.as_deref().map(str::as_bytes));
            if let Some(permissions) = Permissions::parse(permissions.iter().map(String::as_bytes)) {
                let _ = tree.set_permissions(DOM0, &path, permissions);
            }
        }
    }

    /// Something came, or there is room again: a message of each connection in turn, until there is none.
    fn serve(&mut self) {
        let mut more = true;
        while more {
            more = false;
            for index in 0..self.connections.len() {
                self.flush(index);
                match self.connections[index].receive() {
                    Ok(Some((head, payload))) => {
                        self.answer(index, head, &payload);
                        self.fire();
                        more = true;
                    }
                    Ok(None) => {}
                    Err(why) => self.connections[index].give_up(why),
                }
                self.flush(index);
            }
        }
    }

    /// Sends what there is room for, and tells the other side whatever was moved.
    fn flush(&mut self, index: usize) {
        let connection = &mut self.connections[index];
        if let Err(why) = connection.send() {
            connection.give_up(why);
        }
        if std::mem::take(&mut connection.news) {
            // Fails only if the domain is gone.
            let _ = self.domain.send(connection.port);
        }
    }

    fn answer(&mut self, index: usize, [kind, request, transaction, _]: [u32; 4], payload: &[u8]) {
        let reply = self.carry_out(index, kind, transaction, payload).and_then(|reply| match reply.len() {
            0..=PAYLOAD_MAX => Ok(reply),
            _ => Err("E2BIG"),
        });
        let (kind, reply) = match reply {
            Ok(reply) => (kind, reply),
            Err(error) => (message::ERROR, [error.as_bytes(), b"\0"].concat()),
        };
        let connection = &mut self.connections[index];
        connection.queue(&header(kind, request, transaction, reply.len()), &reply);
        if kind == message::WATCH
            && let Some(watch) = connection.watches.last()
        {
            let event = watch.event(&watch.asked);
            connection.queue_event(&event);
        }
    }

    fn carry_out(&mut self, index: usize, kind: u32, transaction: u32, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let connection = &mut self.connections[index];
        let by = connection.domain;
        let mut words = payload.split(|&byte| byte == 0);
        let first = words.next().unwrap_or_default();
        let done = |()| b"OK\0".to_vec();
        let path = || absolute(by, first).ok_or("EINVAL");
        let tree = self.store.tree(by, transaction);
        match kind {
            message::DIRECTORY => tree?.directory(by, &path()?),
            message::READ => tree?.read(by, &path()?),
            message::GET_PERMS => tree?.permissions(by, &path()?).map(Permissions::encode),
            message::WRITE => {
                let value = payload.get(first.len() + 1..).ok_or("EINVAL")?;
                tree?.write(by, &path()?, Some(value)).map(done)
            }
            message::MKDIR => tree?.write(by, &path()?, None).map(done),
            message::RM => tree?.remove(by, &path()?).map(done),
            message::SET_PERMS => {
                let permissions = Permissions::parse(words.filter(|word| !word.is_empty())).ok_or("EINVAL")?;
                tree?.set_permissions(by, &path()?, permissions).map(done)
            }
            message::WATCH | message::UNWATCH => {
                let watch = Watch { asked: first.into(), path: path()?, token: words.next().ok_or("EINVAL")?.into() };
                connection.watch(kind == message::WATCH, watch).map(done)
            }
            message::TRANSACTION_START if transaction == 0 => Ok(format!("{}\0", self.store.start(by)?).into_bytes()),
            message::TRANSACTION_END => match first {
                b"T" => self.store.end(by, transaction, true).map(done),
                b"F" => self.store.end(by, transaction, false).map(done),
                _ => Err("EINVAL"),
            },
            message::GET_DOMAIN_PATH => {
                let id = std::str::from_utf8(first).ok().and_then(|id| id.parse().ok()).ok_or("EINVAL")?;
                Ok(format!("{}\0", home(id)).into_bytes())
            }
            _ => Err("ENOSYS"),
        }
    }

    /// Tells everyone who watches what has changed.
    fn fire(&mut self) {
        let changes = self.store.changes();
        for connection in &mut self.connections {
            let by = connection.domain;
            for change in changes.iter().filter(|change| change.permissions.readable(by)) {
                let hears = connection.watches.iter().filter(|watch| watch.hears(change));
                let events: Vec<_> = hears.map(|watch| watch.event(&watch.as_asked(&change.path))).collect();
                events.iter().for_each(|event| connection.queue_event(event));
            }
        }
    }
}

impl Watch {
    fn hears(&self, change: &Change) -> bool {
        let below = || change.path.strip_prefix(&self.path).is_some_and(|rest| rest.starts_with('/'));
        self.path == change.path || !change.exact && below()
    }

    /// `path` as the domain knows it: relative if it watches a relative one.
    fn as_asked(&self, path: &str) -> Vec<u8> {
        let base = self.path.len() - if self.asked.starts_with(b"/") { self.path.len() } else { self.asked.len() };
        path.get(base..).filter(|path| !path.is_empty()).unwrap_or("/").into()
    }

    fn event(&self, path: &[u8]) -> Vec<u8> {
        [path, b"\0", &self.token, b"\0"].concat()
    }
}

impl Connection {
    fn new(domain: u16, port: u32, interface: Interface) -> Self {
        let (input, output, watches) = Default::default();
        Self { domain, port, interface, input, output, watches, news: false, broken: false }
    }

    /// The next whole message. While the domain does not take what was sent to it, nothing is read.
    fn receive(&mut self) -> Result<Option<Message>, Broken> {
        if self.broken || !self.output.is_empty() {
            return Ok(None);
        }
        loop {
            let head = self.input.first_chunk::<HEADER_LEN>().map(parse_header);
            let len = head.map_or(0, |head| head[3] as usize);
            if len > PAYLOAD_MAX {
                return Err(Broken::Protocol);
            }
            if let Some(head) = head.filter(|_| self.input.len() == HEADER_LEN + len) {
                return Ok(Some((head, self.input.drain(..).skip(HEADER_LEN).collect())));
            }
            let missing = HEADER_LEN + len - self.input.len();
            let mut bytes = vec![0; missing];
            let count = self.interface.take(REQUESTS, &mut bytes)?;
            if count == 0 {
                return Ok(None);
            }
            self.input.extend(&bytes[..count]);
            self.news = true;
        }
    }

    fn queue(&mut self, head: &[u8], payload: &[u8]) {
        if self.output.len() > OUTSTANDING {
            self.give_up(Broken::Communication);
        }
        if !self.broken {
            self.output.extend(head);
            self.output.extend(payload);
        }
    }

    fn queue_event(&mut self, event: &[u8]) {
        self.queue(&header(message::WATCH_EVENT, 0, 0, event.len()), event);
    }

    fn send(&mut self) -> Result<(), Broken> {
        if !self.broken && !self.output.is_empty() {
            let sent = self.interface.put(RESPONSES, &self.output)?;
            self.output.drain(..sent);
            self.news |= sent > 0;
        }
        Ok(())
    }

    fn watch(&mut self, add: bool, watch: Watch) -> Result<(), Errno> {
        let there = self.watches.iter().position(|known| known.path == watch.path && known.token == watch.token);
        match (add, there) {
            (true, Some(_)) => Err("EEXIST"),
            (true, None) if self.domain != DOM0 && self.watches.len() == WATCHES => Err("E2BIG"),
            (true, None) => {
                self.watches.push(watch);
                Ok(())
            }
            (false, Some(index)) => {
                self.watches.remove(index);
                Ok(())
            }
            (false, None) => Err("ENOENT"),
        }
    }

    /// Listens no more.
    fn give_up(&mut self, why: Broken) {
        tracing::warn!(domain = self.domain, ?why, "a connection to xenstored is given up");
        (self.broken, self.news) = (true, true);
        self.output.clear();
        self.interface.give_up(why);
    }
}
