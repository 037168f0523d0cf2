//! A process that is a domain's hands: it owns what the domain has of Xen, and does with it what the mailbox says.
//!
//! The mailbox are three connections, each for one call at a time: one for all calls that come back at once, one to
//! wait for events, one to wait for xenstored. The one who asks ends the hands by hanging up.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::spawn;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use polyvirt_core::hypervisor::HypervisorError;

use super::super::lock;
use super::super::wire::{HEADER_LEN, PAYLOAD_MAX};
use super::gntalloc::Run;
use super::{Devices, Own, refused};

/// What is asked for.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Ask {
    Grant,
    EndAccess,
    AllocUnbound,
    BindInterdomain,
    Send,
    Close,
    NextEvent,
    Unmask,
    StoreSend,
    StoreReceive,
    Stop,
}

impl Ask {
    const ALL: [(Self, &'static str); 11] = [
        (Self::Grant, "gntalloc"),
        (Self::EndAccess, "end_access"),
        (Self::AllocUnbound, "EVTCHNOP_alloc_unbound"),
        (Self::BindInterdomain, "EVTCHNOP_bind_interdomain"),
        (Self::Send, "EVTCHNOP_send"),
        (Self::Close, "EVTCHNOP_close"),
        (Self::NextEvent, "next_event"),
        (Self::Unmask, "EVTCHNOP_unmask"),
        (Self::StoreSend, "xenstore"),
        (Self::StoreReceive, "xenstore"),
        (Self::Stop, "stop"),
    ];

    /// The name of the call, for errors.
    fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// A request: what, and up to three numbers; the third of [`Ask::StoreSend`] is how many bytes follow.
type Request = [u32; 4];
/// A reply: how it went, a number, how many bytes follow.
type Reply = [u32; 3];

const DONE: u32 = 0;
/// What follows is Xen's reason.
const REFUSED: u32 = 1;
/// What follows is the address, a u64.
const IN_USE: u32 = 2;
const EXHAUSTED: u32 = 3;
/// There is nothing to wait for any more.
const ENDED: u32 = 4;

/// The most bytes that follow a request or a reply: a message of xenstore, or offsets of as many pages as gntalloc has.
const FOLLOWS_MAX: usize = 1 << 20;

/// The hands, from the side that tells them what to do.
pub(super) struct Hands {
    process: Mutex<Child>,
    calls: Mutex<UnixStream>,
    events: Mutex<UnixStream>,
    store: Mutex<UnixStream>,
}

impl Hands {
    /// Starts `program`, which is to call [`serve`]. The file is its gntalloc, to map what it grants.
    pub(super) fn start(program: &mut Command) -> Result<(Self, File), HypervisorError> {
        let failed = |error: io::Error| refused("the hands of the domain", error);
        let [calls, events, store] =
            [UnixStream::pair(), UnixStream::pair(), UnixStream::pair()].map(|pair| pair.map_err(failed));
        let ((calls, mailbox), (events, their_events), (store, their_store)) = (calls?, events?, store?);
        let process = program.stdin(OwnedFd::from(mailbox)).stdout(Stdio::null()).spawn().map_err(failed)?;
        // From here on dropping this ends the process.
        let hands =
            Self { process: Mutex::new(process), calls: calls.into(), events: events.into(), store: store.into() };
        send_files(&lock(&hands.calls), &[their_events.as_raw_fd(), their_store.as_raw_fd()]).map_err(failed)?;
        drop((their_events, their_store));
        let granting = receive_files(&lock(&hands.calls)).map_err(failed)?.into_iter().next();
        match granting {
            Some(granting) => Ok((hands, granting.into())),
            None => {
                let mut reason = String::new();
                lock(&hands.calls).read_to_string(&mut reason).map_err(failed)?;
                Err(HypervisorError::Unavailable(reason))
            }
        }
    }

    /// Asks over `stream` for `request`, after which `bytes` follow: the reply's number, and what follows it.
    fn ask(
        &self,
        stream: &Mutex<UnixStream>,
        ask: Ask,
        numbers: [u32; 2],
        bytes: &[u8],
    ) -> Result<(u32, Vec<u8>), HypervisorError> {
        let request = [ask as u32, numbers[0], numbers[1], bytes.len() as u32];
        let stream = lock(stream);
        let reply = (|| {
            (&*stream).write_all(&[&request.map(u32::to_ne_bytes).concat(), bytes].concat())?;
            let [how, number, len]: Reply = read_words(&stream)?;
            Ok((how, number, read_bytes(&stream, len)?))
        })();
        let (how, number, follows) =
            reply.map_err(|error: io::Error| refused(ask.name(), format!("the hands: {error}")))?;
        match how {
            DONE => Ok((number, follows)),
            IN_USE => Err(HypervisorError::InUse { address: words(&follows).next().unwrap_or(0) }),
            EXHAUSTED => Err(HypervisorError::Exhausted("grant references")),
            ENDED => Err(refused(ask.name(), "stopped")),
            _ => Err(refused(ask.name(), String::from_utf8_lossy(&follows))),
        }
    }

    fn call(&self, ask: Ask, numbers: [u32; 2]) -> Result<u32, HypervisorError> {
        self.ask(&self.calls, ask, numbers, &[]).map(|reply| reply.0)
    }
}

impl Devices for Hands {
    fn grant(&self, count: u32, to: u16, read_only: bool) -> Result<Run, HypervisorError> {
        let how = u32::from(to) | u32::from(read_only) << 16;
        let (first, offsets) = self.ask(&self.calls, Ask::Grant, [count, how], &[])?;
        Ok(Run { first, offsets: words(&offsets).collect() })
    }

    fn end_access(&self, first: u32, count: u32) -> Result<(), HypervisorError> {
        self.call(Ask::EndAccess, [first, count]).map(drop)
    }

    fn alloc_unbound(&self, remote: u16) -> Result<u32, HypervisorError> {
        self.call(Ask::AllocUnbound, [remote.into(), 0])
    }

    fn bind_interdomain(&self, remote: u16, port: u32) -> Result<u32, HypervisorError> {
        self.call(Ask::BindInterdomain, [remote.into(), port])
    }

    fn send(&self, port: u32) -> Result<(), HypervisorError> {
        self.call(Ask::Send, [port, 0]).map(drop)
    }

    fn close(&self, port: u32) -> Result<(), HypervisorError> {
        self.call(Ask::Close, [port, 0]).map(drop)
    }

    fn next_event(&self) -> Option<u32> {
        self.ask(&self.events, Ask::NextEvent, [0; 2], &[]).ok().map(|reply| reply.0)
    }

    fn unmask(&self, port: u32) -> Result<(), HypervisorError> {
        self.call(Ask::Unmask, [port, 0]).map(drop)
    }

    fn store_send(&self, bytes: &[u8]) -> Result<(), HypervisorError> {
        self.ask(&self.calls, Ask::StoreSend, [0; 2], bytes).map(drop)
    }

    fn store_receive(&self, bytes: &mut [u8]) -> bool {
        let received = self.ask(&self.store, Ask::StoreReceive, [bytes.len() as u32, 0], &[]);
        let Ok((_, received)) = received else { return false };
        let whole = received.len() == bytes.len();
        if whole {
            bytes.copy_from_slice(&received);
        }
        whole
    }

    fn stop(&self) {
        if let Err(error) = self.call(Ask::Stop, [0; 2]) {
            tracing::debug!(%error, "the hands are gone already");
        }
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        // They have nothing to put in order: the kernel closes and takes back what is theirs.
        let mut process = lock(&self.process);
        if let Err(error) = process.kill().and_then(|()| process.wait()) {
            tracing::warn!(%error, "the hands of a domain are not ended");
        }
    }
}

/// Is the hands: opens the devices and does what the mailbox, which standard input is, says, until it is closed.
pub fn serve() -> Result<(), HypervisorError> {
    let failed = |error: io::Error| refused("the mailbox of the hands", error);
    let calls = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
    let streams = receive_files(&calls).map_err(failed)?;
    let own = match Own::open() {
        Ok(own) => Arc::new(own),
        Err(error) => {
            (&calls).write_all(format!("\0{error}").as_bytes()).map_err(failed)?;
            return Err(error);
        }
    };
    send_files(&calls, &[own.gntalloc.file().as_raw_fd()]).map_err(failed)?;
    for stream in streams {
        let own = own.clone();
        spawn(move || answer(&stream.into(), &*own));
    }
    answer(&calls, &*own);
    Ok(())
}

/// Answers what is asked over `stream`, until that is closed.
fn answer(stream: &UnixStream, devices: &dyn Devices) {
    while let Ok(request) = read_words(stream) {
        let done = carry_out(stream, devices, request);
        let (how, number, follows) = match done {
            Ok(Some((number, follows))) => (DONE, number, follows),
            Ok(None) => (ENDED, 0, Vec::new()),
            Err(HypervisorError::Refused { reason, .. }) => (REFUSED, 0, reason.into_bytes()),
            Err(HypervisorError::InUse { address }) => (IN_USE, 0, address.to_ne_bytes().into()),
            Err(HypervisorError::Exhausted(_)) => (EXHAUSTED, 0, Vec::new()),
            Err(other) => (REFUSED, 0, other.to_string().into_bytes()),
        };
        let head: Reply = [how, number, follows.len() as u32];
        let mut stream = stream;
        if stream.write_all(&[head.map(u32::to_ne_bytes).concat(), follows].concat()).is_err() {
            return;
        }
    }
}

/// Does what is asked: a number and bytes for the reply; none if there is nothing to wait for any more.
fn carry_out(
    stream: &UnixStream,
    devices: &dyn Devices,
    [ask, a, b, len]: Request,
) -> Result<Option<(u32, Vec<u8>)>, HypervisorError> {
    let bytes = read_bytes(stream, len).map_err(|error| refused("the mailbox of the hands", error))?;
    let Some(&(ask, _)) = Ask::ALL.get(ask as usize) else { return Err(refused("the hands", "no such call")) };
    let number = |number| Some((number, Vec::new()));
    let done = |()| number(0);
    match ask {
        Ask::Grant => devices
            .grant(a, b as u16, b >> 16 != 0)
            .map(|run| Some((run.first, run.offsets.iter().flat_map(|offset| offset.to_ne_bytes()).collect()))),
        Ask::EndAccess => devices.end_access(a, b).map(done),
        Ask::AllocUnbound => devices.alloc_unbound(a as u16).map(number),
        Ask::BindInterdomain => devices.bind_interdomain(a as u16, b).map(number),
        Ask::Send => devices.send(a).map(done),
        Ask::Close => devices.close(a).map(done),
        Ask::NextEvent => Ok(devices.next_event().and_then(number)),
        Ask::Unmask => devices.unmask(a).map(done),
        Ask::StoreSend => devices.store_send(&bytes).map(done),
        Ask::StoreReceive => {
            let mut bytes = vec![0; (a as usize).min(HEADER_LEN + PAYLOAD_MAX)];
            Ok(devices.store_receive(&mut bytes).then_some((0, bytes)))
        }
        Ask::Stop => {
            devices.stop();
            Ok(done(()))
        }
    }
}

fn read_words<const N: usize>(mut stream: &UnixStream) -> io::Result<[u32; N]> {
    let mut words = [[0; 4]; N];
    stream.read_exact(words.as_flattened_mut())?;
    Ok(words.map(u32::from_ne_bytes))
}

fn read_bytes(mut stream: &UnixStream, len: u32) -> io::Result<Vec<u8>> {
    if len as usize > FOLLOWS_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; len as usize];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks().0.iter().copied().map(u64::from_ne_bytes)
}

/// Sends handles, with one byte.
fn send_files(stream: &UnixStream, files: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(files)];
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&[0])], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Receives handles, with one byte; none if the byte came alone.
fn receive_files(stream: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let (mut byte, mut space) = ([0], nix::cmsg_space!([RawFd; 2]));
    let mut parts = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    if message.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut files = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            // SAFETY: they were just received, and nobody else knows of them.
            files.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(files)
}
