//! Daemons that are broken on purpose: an honest one, and somebody between it and its front end who changes the messages.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Connection, ConnectionError, Message, map, memory_file};

use crate::daemon::Process;
use crate::daemon::front::{SIZE, event};
use crate::suite::RingFormat;

/// A daemon that does one thing wrong.
#[derive(Clone, Copy)]
pub struct BrokenDaemon {
    /// What it does wrong.
    pub name: &'static str,
    /// The formats of rings with which the cases have to notice.
    pub formats: &'static [RingFormat],
    /// The cases that have to fail.
    pub breaks: &'static [&'static str],
    rule: Rule,
}

/// What is done to messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Only the first connection is served.
    OneConnection,
    /// GET_VRING_BASE tells one more.
    BaseAhead,
    /// GET_VRING_BASE tells what SET_VRING_BASE said.
    StaleBase,
    /// A ring goes on after GET_VRING_BASE.
    RunsOn,
    /// A ring begins again where it began before it is stopped.
    DoneTwice,
    /// A descriptor for calls counts only if it comes before the kick.
    LateCallIgnored,
    /// A ring stays where it was first.
    FirstAddresses,
    /// A ring can be started once.
    StartsOnce,
    /// The first call after a start is lost.
    FirstCallLost,
    /// A ring without a descriptor for kicks is not served, and that is not said.
    PolledKicksIgnored,
    /// A ring without a descriptor for calls is not served.
    PolledCallsDisable,
    /// An address outside memory ends the connection.
    ClosesOnBadAddress,
    /// A ring that was disabled stays so.
    EnableIgnored,
    /// A further memory slot takes the place of the first.
    SlotReplaces,
    /// A new table of memory while rings run is not taken.
    TableIgnored,
    /// Of a new table of memory only the last region is taken.
    TableTruncated,
    /// Nothing is logged.
    LogIgnored,
    /// The record of what is in flight is not looked at.
    RecordIgnored,
    /// What a record that is shorter than the ring has no room for is not in flight.
    RecordStretched,
    /// The last completion of the record counts whether it was shown or not.
    RecordForgetsLast,
    /// The last completion of the record does not count even if it was shown.
    RecordRepeatsLast,
    /// What was used last is in flight once more.
    RecordRepeatsFirst,
}

const BOTH: &[RingFormat] = &[RingFormat::Split, RingFormat::Packed];
const SPLIT: &[RingFormat] = &[RingFormat::Split];
const PACKED: &[RingFormat] = &[RingFormat::Packed];

const fn broken(
    name: &'static str,
    rule: Rule,
    formats: &'static [RingFormat],
    breaks: &'static [&'static str],
) -> BrokenDaemon {
    BrokenDaemon { name, formats, breaks, rule }
}

/// All of them.
pub const DAEMONS: &[BrokenDaemon] = &[
    broken("serves one connection and no other", Rule::OneConnection, BOTH, &["life/reconnect"]),
    broken(
        "tells a base that is one too far",
        Rule::BaseAhead,
        BOTH,
        &["life/base-handed-back", "life/base-of-a-ring-that-never-ran"],
    ),
    broken("tells the base that it was told", Rule::StaleBase, BOTH, &["life/base-handed-back"]),
    broken("goes on with a ring that was stopped", Rule::RunsOn, BOTH, &["life/stopped-is-stopped"]),
    broken("does everything twice", Rule::DoneTwice, SPLIT, &["life/stop-finishes"]),
    broken("takes a short record for a whole one", Rule::RecordStretched, SPLIT, &["life/record-too-short"]),
    broken("tells the base of the beginning", Rule::StaleBase, PACKED, &["life/stop-finishes"]),
    broken("forgets what calls go to if it hears of it late", Rule::LateCallIgnored, BOTH, &["life/any-order"]),
    broken("leaves a ring where it was first", Rule::FirstAddresses, BOTH, &["life/begins-anew"]),
    broken(
        "starts a ring once and never again",
        Rule::StartsOnce,
        BOTH,
        &["life/begins-anew", "life/broken-ring-begins-anew"],
    ),
    broken("loses the first call after a start", Rule::FirstCallLost, BOTH, &["life/killed-before-the-call"]),
    broken("does not poll for kicks, and says nothing", Rule::PolledKicksIgnored, BOTH, &["life/polled-kicks"]),
    broken("serves only rings that it can call", Rule::PolledCallsDisable, BOTH, &["life/polled-calls"]),
    broken("gives up at a ring outside memory", Rule::ClosesOnBadAddress, BOTH, &["life/ring-outside-memory"]),
    broken("enables a ring once", Rule::EnableIgnored, BOTH, &["life/enabled-again"]),
    broken("has one memory slot", Rule::SlotReplaces, BOTH, &["life/slots-under-load"]),
    broken("keeps the first table of memory", Rule::TableIgnored, BOTH, &["life/table-of-another-file"]),
    broken("takes the last region of a table", Rule::TableTruncated, BOTH, &["life/table-again"]),
    broken("does not log", Rule::LogIgnored, BOTH, &["life/dirty-log"]),
    broken(
        "does not look at the record",
        Rule::RecordIgnored,
        SPLIT,
        &["life/record-in-flight", "life/record-crossed-out", "life/record-behind-the-index"],
    ),
    broken("does not look at the record", Rule::RecordIgnored, PACKED, &["life/killed"]),
    broken("loses what it was about to show", Rule::RecordForgetsLast, SPLIT, &["life/record-before-the-index"]),
    broken("repeats what it had just shown", Rule::RecordRepeatsLast, SPLIT, &["life/record-behind-the-index"]),
    broken("repeats what it used", Rule::RecordRepeatsFirst, SPLIT, &["life/killed"]),
];

impl BrokenDaemon {
    /// Listens at `path` in the place of the daemon that `process` is, for as long as this process lives.
    pub fn listen(&self, path: &Path, process: Arc<Process>) -> io::Result<()> {
        let listener = UnixListener::bind(path)?;
        let rule = self.rule;
        thread::Builder::new().name(self.name.into()).spawn(move || {
            for (number, front) in listener.incoming().enumerate() {
                let Ok(front) = front else { return };
                if rule == Rule::OneConnection && number > 0 {
                    continue;
                }
                let process = Arc::clone(&process);
                thread::spawn(move || {
                    // However it ends, both connections end with it.
                    let _ = process.connect().map(|back| Session::run(rule, front, back));
                });
            }
        })?;
        Ok(())
    }
}

/// A connection from one to the other.
struct Session {
    rule: Rule,
    front: Connection,
    back: Connection,
    rings: BTreeMap<u32, Ring>,
    /// The first region, and whether there was a table already.
    first: Option<Region>,
}

/// What was said of a ring.
#[derive(Default)]
struct Ring {
    base: u32,
    addressed: bool,
    started: bool,
    enabled: bool,
    kick: Option<OwnedFd>,
    /// The front end's descriptor for calls.
    call: Option<OwnedFd>,
}

type Done = Result<(), ConnectionError>;

impl Session {
    fn run(rule: Rule, front: UnixStream, back: UnixStream) -> Done {
        let (front, back) = (Connection::new(front)?, Connection::new(back)?);
        let mut session = Self { rule, front, back, rings: BTreeMap::new(), first: None };
        loop {
            let input = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut fds = [input(session.front.as_fd()), input(session.back.as_fd())];
            let _ = poll(&mut fds, PollTimeout::NONE);
            if let Some(message) = session.front.receive()? {
                session.asked(message)?;
            }
            if let Some(message) = session.back.receive()? {
                session.answered(message)?;
            }
        }
    }

    fn answered(&mut self, mut message: Message) -> Done {
        if message.header.request == Request::GetVringBase as u32 && message.payload.len() == VringState::LEN {
            let mut state = VringState::from_bytes(&message.payload);
            let base = self.rings.entry(state.index).or_default().base;
            match self.rule {
                Rule::BaseAhead => state.num = state.num.wrapping_add(1),
                Rule::StaleBase => state.num = base,
                Rule::RunsOn => self.restart(state.index, state.num)?,
                _ => {}
            }
            message.payload = state.to_bytes();
        }
        pass(&self.front, &message)
    }

    fn asked(&mut self, mut message: Message) -> Done {
        use Request as R;
        let Some(request) = Request::from_code(message.header.request) else { return pass(&self.back, &message) };
        let number = |payload: &[u8]| if payload.len() < 8 { 0 } else { u64::from_bytes(payload) };
        let first = number(&message.payload);
        // A ring's number is in the low bits of whatever begins with it.
        let index = (first & VRING_INDEX_MASK) as u32;
        let nofd = first & VRING_NOFD != 0;
        match (request, self.rule) {
            (R::SetVringBase, _) => self.ring(index).base = VringState::from_bytes(&message.payload).num,
            (R::SetVringAddr, Rule::ClosesOnBadAddress)
                if VringAddr::from_bytes(&message.payload).descriptors < 1 << 20 =>
            {
                return Err(ConnectionError::Closed);
            }
            (R::SetVringAddr, Rule::FirstAddresses) if std::mem::replace(&mut self.ring(index).addressed, true) => {
                return self.ignore(&message);
            }
            (R::SetVringKick, rule) => {
                if nofd && rule == Rule::PolledKicksIgnored {
                    return self.ignore(&message);
                }
                let started = std::mem::replace(&mut self.ring(index).started, true);
                if started && rule == Rule::StartsOnce {
                    return self.ignore(&message);
                }
                self.ring(index).kick = message.fds.first().and_then(|fd| fd.try_clone().ok());
                if rule == Rule::FirstCallLost {
                    self.replace_call(index)?;
                }
            }
            (R::SetVringCall, Rule::LateCallIgnored) if self.ring(index).started => return self.ignore(&message),
            (R::SetVringCall, Rule::FirstCallLost) => {
                self.ring(index).call = message.fds.pop();
                return self.ignore(&message);
            }
            (R::SetVringCall, Rule::PolledCallsDisable) if nofd => {
                self.inject(R::SetVringEnable, &VringState { index, num: 0 }.to_bytes(), &[])?;
            }
            (R::SetVringEnable, Rule::EnableIgnored)
                if VringState::from_bytes(&message.payload).num == 1
                    && std::mem::replace(&mut self.ring(index).enabled, true) =>
            {
                return self.ignore(&message);
            }
            (R::GetVringBase, Rule::DoneTwice) => self.do_again(index)?,
            (R::SetMemTable, rule) => {
                let regions: Vec<_> = message.payload[8..].chunks_exact(Region::LEN).map(Region::from_bytes).collect();
                let again = self.first.is_some();
                self.first = self.first.or(regions.first().copied());
                if again && rule == Rule::TableIgnored {
                    return self.ignore(&message);
                }
                if regions.len() > 1 && rule == Rule::TableTruncated {
                    message.fds.drain(..regions.len() - 1);
                    message.payload = [1u64.to_bytes(), regions[regions.len() - 1].to_bytes()].concat();
                }
            }
            (R::AddMemReg, Rule::SlotReplaces) => {
                if let Some(first) = self.first {
                    self.inject(R::RemMemReg, &[0u64.to_bytes(), first.to_bytes()].concat(), &[])?;
                }
            }
            (R::SetLogBase, Rule::LogIgnored) => return self.front.send(R::SetLogBase as u32, REPLY, &[0; 8], &[]),
            (R::SetInflightFd, Rule::RecordIgnored) => return self.ignore(&message),
            (R::SetInflightFd, Rule::RecordStretched) => stretch(&mut message),
            (R::SetInflightFd, rule) => tamper(rule, &message),
            _ => {}
        }
        pass(&self.back, &message)
    }

    fn ring(&mut self, index: u32) -> &mut Ring {
        self.rings.entry(index).or_default()
    }

    /// The front end takes `message` for carried out.
    fn ignore(&self, message: &Message) -> Done {
        match message.header.flags & NEED_REPLY != 0 {
            true => self.front.send(message.header.request, REPLY, &0u64.to_bytes(), &[]),
            false => Ok(()),
        }
    }

    /// Says something that the front end does not.
    fn inject(&self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Done {
        self.back.send(request as u32, 0, payload, fds)
    }

    /// Starts ring `index` once more, at `base`.
    fn restart(&mut self, index: u32, base: u32) -> Done {
        self.inject(Request::SetVringBase, &VringState { index, num: base }.to_bytes(), &[])?;
        let Some(kick) = self.rings.get(&index).and_then(|ring| ring.kick.as_ref()) else { return Ok(()) };
        self.inject(Request::SetVringKick, &u64::from(index).to_bytes(), &[kick.as_fd()])
    }

    /// Lets ring `index` begin again where it began, before it is stopped.
    fn do_again(&mut self, index: u32) -> Done {
        let base = self.ring(index).base;
        self.inject(Request::GetVringBase, &VringState { index, num: 0 }.to_bytes(), &[])?;
        let watchdog = std::time::Duration::from_secs(20);
        self.back.wait(watchdog)?;
        self.restart(index, base)
    }

    /// Calls of ring `index` go to the front end but for the first.
    fn replace_call(&mut self, index: u32) -> Done {
        let Some(call) = self.ring(index).call.as_ref().and_then(|call| call.try_clone().ok()) else { return Ok(()) };
        let Ok(ours) = event() else { return Err(ConnectionError::Closed) };
        self.inject(Request::SetVringCall, &u64::from(index).to_bytes(), &[ours.as_fd()])?;
        thread::spawn(move || {
            let mut first = true;
            loop {
                let waited = poll(&mut [PollFd::new(ours.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
                if waited.is_err() || read(&ours, &mut [0; 8]).is_err() {
                    return;
                }
                if !std::mem::take(&mut first) && write(&call, &1u64.to_ne_bytes()).is_err() {
                    return;
                }
            }
        });
        Ok(())
    }
}

fn pass(to: &Connection, message: &Message) -> Done {
    let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
    to.send(message.header.request, message.header.flags & !VERSION_MASK, &message.payload, &fds)
}

/// Changes the record of a split ring, which is the last queue's, on its way.
fn tamper(rule: Rule, message: &Message) {
    let area = InflightArea::from_bytes(&message.payload);
    let Some(pages) = message.fds.first().and_then(|fd| map(fd.try_clone().ok()?, area.offset, area.size).ok()) else {
        return;
    };
    let part = area.size as usize / usize::from(area.queues) * usize::from(area.queues - 1);
    let (mut head, mut used) = ([0; 2], [0; 2]);
    let looked = pages.read(part + 12, &mut head).and_then(|()| pages.read(part + 14, &mut used));
    if looked.is_err() {
        return;
    }
    let entry = |head: u16| part + 16 + 16 * usize::from(head);
    let _ = match rule {
        Rule::RecordForgetsLast => pages.write(entry(u16::from_ne_bytes(head)), &[0]),
        Rule::RecordRepeatsLast => pages.write(part + 14, &(u16::from_ne_bytes(used).wrapping_add(1)).to_ne_bytes()),
        // Not at the beginning, when nothing was used yet.
        Rule::RecordRepeatsFirst if used != [0; 2] => pages.write(entry(0), &[1]),
        _ => Ok(()),
    };
}

/// Puts a record in the place of a shorter one, which has what that has and room for a whole ring of one queue.
fn stretch(message: &mut Message) {
    let mut area = InflightArea::from_bytes(&message.payload);
    let short = message.fds.pop().and_then(|fd| map(fd, area.offset, area.size).ok());
    let mut bytes = vec![0; area.size as usize];
    (area.size, area.offset, area.entries) = ((16 + 16 * u64::from(SIZE)).next_multiple_of(64), 0, SIZE);
    let Ok((file, long)) = memory_file("record", area.size) else { return };
    let _ = short.map(|short| short.read(0, &mut bytes));
    bytes[10..12].copy_from_slice(&SIZE.to_ne_bytes());
    let _ = long.write(0, &bytes);
    (message.payload, message.fds) = (area.to_bytes(), vec![file]);
}
