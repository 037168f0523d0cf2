//! xenstore, as a client speaks to it.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::Duration;

use polyvirt_core::hypervisor::HypervisorError;
use polyvirt_transports::xenbus::Store;

use super::abi::Calls;
use super::lock;
use super::wire::{HEADER_LEN, PAYLOAD_MAX, header, message, parse_header};

/// How long xenstored may take to answer.
const WATCHDOG: Duration = Duration::from_secs(10);

/// A domain's connection to xenstored.
pub(super) struct Client {
    calls: Arc<dyn Calls>,
    replies: Mutex<(Receiver<Message>, u32)>,
    /// By token.
    watches: Arc<Mutex<Vec<Waker>>>,
}

struct Message {
    kind: u32,
    request: u32,
    payload: Vec<u8>,
}

impl Client {
    /// The client, and what its thread has to do: hand out what xenstored sends.
    pub(super) fn new(calls: &Arc<dyn Calls>) -> (Arc<Self>, impl FnOnce() + Send + 'static) {
        let (sender, receiver) = channel();
        let watches = Arc::default();
        let reader = (calls.clone(), Arc::clone(&watches));
        let client = Self { calls: calls.clone(), replies: Mutex::new((receiver, 0)), watches };
        (Arc::new(client), move || receive(&*reader.0, &reader.1, &sender))
    }

    /// Asks for `kind`: the reply, or none if the node does not exist.
    fn request(&self, kind: u32, payload: &str) -> Result<Option<String>, HypervisorError> {
        let refused = |reason| HypervisorError::Refused { call: "xenstore", reason };
        if payload.len() > PAYLOAD_MAX {
            return Err(refused(format!("expected a message of {PAYLOAD_MAX} bytes, got {}", payload.len())));
        }
        let mut replies = lock(&self.replies);
        replies.1 = replies.1.wrapping_add(1);
        let number = replies.1;
        self.calls.store_send(&[&header(kind, number, 0, payload.len()), payload.as_bytes()].concat())?;
        // A reply that came too late belongs to an earlier request.
        let reply = std::iter::from_fn(|| replies.0.recv_timeout(WATCHDOG).ok()).find(|it| it.request == number);
        let Some(reply) = reply else { return Err(refused("no answer".into())) };
        let text = String::from_utf8_lossy(&reply.payload).into_owned();
        tracing::trace!(kind, ?payload, reply = reply.kind, ?text, "xenstore");
        match (reply.kind, text.trim_end_matches('\0')) {
            (message::ERROR, "ENOENT") => Ok(None),
            (message::ERROR, error) => Err(refused(format!("{error}: {}", payload.replace('\0', " ")))),
            _ => Ok(Some(text)),
        }
    }

    /// Gives a node to its owner, `owner`; domain `reader` may read it. Nodes that are made below inherit this.
    pub(super) fn set_permissions(&self, path: &str, owner: u16, reader: u16) -> Result<(), HypervisorError> {
        self.request(message::SET_PERMS, &format!("{path}\0n{owner}\0r{reader}\0")).map(drop)
    }
}

impl Store for Client {
    fn read(&self, path: &str) -> Result<Option<String>, HypervisorError> {
        self.request(message::READ, &format!("{path}\0"))
    }

    fn write(&self, path: &str, value: &str) -> Result<(), HypervisorError> {
        self.request(message::WRITE, &format!("{path}\0{value}")).map(drop)
    }

    fn remove(&self, path: &str) -> Result<(), HypervisorError> {
        self.request(message::RM, &format!("{path}\0")).map(drop)
    }

    fn list(&self, path: &str) -> Result<Vec<String>, HypervisorError> {
        let names = self.request(message::DIRECTORY, &format!("{path}\0"))?.unwrap_or_default();
        Ok(names.split_terminator('\0').map(String::from).collect())
    }

    fn watch(&self, path: &str, waker: Waker) -> Result<(), HypervisorError> {
        let token = {
            let mut watches = lock(&self.watches);
            watches.push(waker);
            watches.len() - 1
        };
        self.request(message::WATCH, &format!("{path}\0{token}\0")).map(drop)
    }
}

/// Hands out messages: replies to who asked, events to who watches.
fn receive(calls: &dyn Calls, watches: &Mutex<Vec<Waker>>, replies: &Sender<Message>) {
    let mut head = [0; HEADER_LEN];
    while calls.store_receive(&mut head) {
        let [kind, request, _, len] = parse_header(&head);
        let mut payload = vec![0; (len as usize).min(PAYLOAD_MAX)];
        if payload.len() < len as usize || !calls.store_receive(&mut payload) {
            return;
        }
        if kind != message::WATCH_EVENT {
            let _ = replies.send(Message { kind, request, payload });
            continue;
        }
        let text = String::from_utf8_lossy(&payload);
        let token = text.split('\0').nth(1).and_then(|token| token.parse::<usize>().ok());
        if let Some(waker) = token.and_then(|token| lock(watches).get(token).cloned()) {
            waker.wake();
        }
    }
}
