//! A process that is the hands of domains: it opens the devices, and the grants and ports are its own.
//!
//! For each domain it gets a connection, over which it does what it is told, one call at a time. The handles that it
//! opened it sends along first: for the memory behind the grants to be mapped, and for events, which are too many to be
//! passed on. What it has of Xen for a domain goes when that connection is closed, and it goes itself when the mailbox,
//! its standard input, is.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread::spawn;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use polyvirt_core::hypervisor::HypervisorError;

use super::super::lock;
use super::gntalloc::Run;
use super::{Own, Owner, refused};

/// What is asked for.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Ask {
    Grant,
    EndAccess,
    AllocUnbound,
    BindInterdomain,
    Close,
}

impl Ask {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Grant, "gntalloc"),
        (Self::EndAccess, "end_access"),
        (Self::AllocUnbound, "EVTCHNOP_alloc_unbound"),
        (Self::BindInterdomain, "EVTCHNOP_bind_interdomain"),
        (Self::Close, "EVTCHNOP_close"),
    ];

    /// The name of the call, for errors.
    fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// A request: what, and two numbers.
type Request = [u32; 3];
/// A reply: how it went, a number, how many bytes follow.
type Reply = [u32; 3];

const DONE: u32 = 0;
/// What follows is Xen's reason.
const REFUSED: u32 = 1;
/// What follows is the address, a u64.
const IN_USE: u32 = 2;
const EXHAUSTED: u32 = 3;

/// The most bytes that follow a reply: offsets of as many pages as gntalloc has.
const FOLLOWS_MAX: usize = 1 << 20;

/// The process, once there is one: it ends with this one.
static PROCESS: Mutex<Option<Process>> = Mutex::new(None);

struct Process {
    child: Child,
    mailbox: UnixStream,
}

impl Process {
    /// Starts `program`, which is to call [`serve`].
    fn start(program: &mut Command) -> io::Result<Self> {
        let (mailbox, theirs) = UnixStream::pair()?;
        let child = program.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).spawn()?;
        Ok(Self { child, mailbox })
    }

    fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

/// The hands of one domain, from the side that tells them what to do.
pub(super) struct Hands {
    calls: Mutex<UnixStream>,
}

impl Hands {
    /// The hands of a new domain: `program`, which is to call [`serve`], is started if it does not run yet. The files are
    /// gntalloc, to map what is granted, and evtchn.
    pub(super) fn start(program: &mut Command) -> Result<(Self, [File; 2]), HypervisorError> {
        let failed = |error: io::Error| refused("the hands of the domain", error);
        let (mut calls, theirs) = UnixStream::pair().map_err(failed)?;
        let mut process = lock(&PROCESS);
        if !process.as_mut().is_some_and(Process::runs) {
            *process = Some(Process::start(program).map_err(failed)?);
        }
        if let Some(process) = &*process {
            send_files(&process.mailbox, &[theirs.as_raw_fd()]).map_err(failed)?;
        }
        drop(theirs);
        let files = receive_files(&calls).map_err(failed)?.into_iter().map(File::from).collect::<Vec<_>>();
        match files.try_into() {
            Ok(files) => Ok((Self { calls: Mutex::new(calls) }, files)),
            Err(_) => {
                let mut reason = String::new();
                calls.read_to_string(&mut reason).map_err(failed)?;
                Err(HypervisorError::Unavailable(reason))
            }
        }
    }

    /// Asks for `ask` with two numbers: the reply's number, and what follows it.
    fn ask(&self, ask: Ask, a: u32, b: u32) -> Result<(u32, Vec<u8>), HypervisorError> {
        let request: Request = [ask as u32, a, b];
        let mut calls = lock(&self.calls);
        let reply = (|| {
            calls.write_all(request.map(u32::to_ne_bytes).as_flattened())?;
            let [how, number, len]: Reply = read_words(&calls)?;
            if len as usize > FOLLOWS_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut follows = vec![0; len as usize];
            calls.read_exact(&mut follows)?;
            Ok((how, number, follows))
        })();
        let (how, number, follows) =
            reply.map_err(|error: io::Error| refused(ask.name(), format!("the hands: {error}")))?;
        match how {
            DONE => Ok((number, follows)),
            IN_USE => Err(HypervisorError::InUse { address: words(&follows).next().unwrap_or(0) }),
            EXHAUSTED => Err(HypervisorError::Exhausted("grant references")),
            _ => Err(refused(ask.name(), String::from_utf8_lossy(&follows))),
        }
    }
}

impl Owner for Hands {
    fn grant(&self, count: u32, to: u16, read_only: bool) -> Result<Run, HypervisorError> {
        let (first, offsets) = self.ask(Ask::Grant, count, u32::from(to) | u32::from(read_only) << 16)?;
        Ok(Run { first, offsets: words(&offsets).collect() })
    }

    fn end_access(&self, first: u32, count: u32) -> Result<(), HypervisorError> {
        self.ask(Ask::EndAccess, first, count).map(drop)
    }

    fn alloc_unbound(&self, remote: u16) -> Result<u32, HypervisorError> {
        self.ask(Ask::AllocUnbound, remote.into(), 0).map(|reply| reply.0)
    }

    fn bind_interdomain(&self, remote: u16, port: u32) -> Result<u32, HypervisorError> {
        self.ask(Ask::BindInterdomain, remote.into(), port).map(|reply| reply.0)
    }

    fn close(&self, port: u32) -> Result<(), HypervisorError> {
        self.ask(Ask::Close, port, 0).map(drop)
    }
}

/// Is the hands of whoever holds the other end of standard input, until that is closed.
pub fn serve() -> Result<(), HypervisorError> {
    let failed = |error: io::Error| refused("the mailbox of the hands", error);
    let mailbox = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
    loop {
        match receive_files(&mailbox) {
            // One for each domain.
            Ok(files) => files.into_iter().map(UnixStream::from).for_each(|calls| drop(spawn(move || play(calls)))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Opens the devices for a domain, and answers its calls until the connection is closed.
fn play(mut calls: UnixStream) {
    let own = match Own::open() {
        Ok(own) => own,
        Err(error) => {
            // Fails only if nobody wants to know.
            let _ = calls.write_all(format!("\0{error}").as_bytes());
            return;
        }
    };
    let sent = send_files(&calls, &[own.gntalloc.file().as_raw_fd(), own.evtchn.file().as_raw_fd()]);
    if sent.is_err() {
        return;
    }
    while let Ok(request) = read_words(&calls) {
        let (how, number, follows) = match carry_out(&own, request) {
            Ok((number, follows)) => (DONE, number, follows),
            Err(HypervisorError::Refused { reason, .. }) => (REFUSED, 0, reason.into_bytes()),
            Err(HypervisorError::InUse { address }) => (IN_USE, 0, address.to_ne_bytes().into()),
            Err(HypervisorError::Exhausted(_)) => (EXHAUSTED, 0, Vec::new()),
            Err(other) => (REFUSED, 0, other.to_string().into_bytes()),
        };
        let head: Reply = [how, number, follows.len() as u32];
        if calls.write_all(&[head.map(u32::to_ne_bytes).as_flattened(), &follows].concat()).is_err() {
            return;
        }
    }
}

/// Does what is asked: a number and bytes for the reply.
fn carry_out(own: &Own, [ask, a, b]: Request) -> Result<(u32, Vec<u8>), HypervisorError> {
    let Some(&(ask, _)) = Ask::ALL.get(ask as usize) else { return Err(refused("the hands", "no such call")) };
    let number = |number| (number, Vec::new());
    match ask {
        Ask::Grant => own
            .grant(a, b as u16, b >> 16 != 0)
            .map(|run| (run.first, run.offsets.iter().flat_map(|offset| offset.to_ne_bytes()).collect())),
        Ask::EndAccess => own.end_access(a, b).map(|()| number(0)),
        Ask::AllocUnbound => own.alloc_unbound(a as u16).map(number),
        Ask::BindInterdomain => own.bind_interdomain(a as u16, b).map(number),
        Ask::Close => own.close(a).map(|()| number(0)),
    }
}

fn read_words<const N: usize>(mut stream: &UnixStream) -> io::Result<[u32; N]> {
    let mut words = [[0; 4]; N];
    stream.read_exact(words.as_flattened_mut())?;
    Ok(words.map(u32::from_ne_bytes))
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
