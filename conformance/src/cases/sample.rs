//! What cases of all devices share: a request that any device of its type serves, and the judgement of bad input.

use std::time::Instant;

use polyvirt_core::Features;
use polyvirt_core::memory::{Access, Accessed};
use polyvirt_core::transport::{BlockingTransport, Transport, TransportError};

use crate::raw::{Descriptor, Memory, Ring, link};
use crate::suite::{BLK, CONSOLE, Finding, Mark, Objection, Session, Verdict};

/// A block request's type: read.
pub const BLK_IN: u32 = 0;
/// A block request's type: write.
pub const BLK_OUT: u32 = 1;
/// A block request's status: done.
pub const BLK_OK: u8 = 0;
/// What buffers hold before the device writes.
pub const POISON: u8 = 0xa5;
/// What is printed.
pub const TEXT: &[u8] = b"polyvirt";

/// Fails unless `condition` holds.
pub fn ensure(
    condition: bool,
    expected: impl std::fmt::Display,
    observed: impl std::fmt::Display,
) -> Result<(), Objection> {
    if condition { Ok(()) } else { Err(Objection::failed(expected, observed)) }
}

/// Fails unless `observed` is `expected`; `what` says of what.
pub fn ensure_eq<T: PartialEq + std::fmt::Debug>(what: &str, observed: T, expected: T) -> Result<(), Objection> {
    ensure(observed == expected, format_args!("{what} {expected:x?}"), format_args!("{observed:x?}"))
}

/// The header of a block request.
pub fn blk_header(session: &Session, kind: u32, sector: u64) -> Vec<u8> {
    // Byte order: all guests of the legacy interface so far are little-endian.
    let _ = session;
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// A request that the device serves: for a block device a read of sector 0, for a console some text to print, for
/// anything else a buffer to fill.
pub struct Sample {
    /// The queue that it belongs in.
    pub queue: u16,
    /// Memory, and whether the device writes it.
    pub pieces: Vec<(Memory, bool)>,
}

impl Sample {
    /// A fresh one.
    pub fn new(session: &Session) -> Result<Self, Objection> {
        Ok(match session.cell.device_type {
            BLK => Self {
                queue: 0,
                pieces: vec![
                    (Memory::readable(session, &blk_header(session, BLK_IN, 0))?, false),
                    (Memory::writable(session, 512, POISON)?, true),
                    (Memory::writable(session, 1, POISON)?, true),
                ],
            },
            CONSOLE => Self { queue: 1, pieces: vec![(Memory::readable(session, TEXT)?, false)] },
            _ => Self { queue: 0, pieces: vec![(Memory::writable(session, 64, POISON)?, true)] },
        })
    }

    /// The device-writable bytes.
    pub fn writable(&self) -> u32 {
        self.pieces.iter().filter(|(_, writable)| *writable).map(|(memory, _)| memory.len).sum()
    }

    /// Checks what came of it: the device wrote `len` bytes.
    pub fn check(&self, session: &mut Session, len: u32) -> Result<(), Objection> {
        match session.cell.device_type {
            BLK => {
                ensure_eq("status", self.last_byte()?, BLK_OK)?;
                ensure_eq("used length", len, 513)
            }
            CONSOLE => {
                ensure_eq("used length", len, 0)?;
                // Of a daemon's far side nothing is seen.
                match printed(session)? {
                    Some(printed) => {
                        ensure(printed == TEXT, format_args!("{TEXT:?} printed"), format_args!("{printed:?}"))
                    }
                    None => Ok(()),
                }
            }
            _ => {
                ensure((1..=64).contains(&len), "1 to 64 bytes written", len)?;
                let bytes = self.pieces[0].0.bytes()?;
                let touched = bytes[..len as usize].iter().any(|&byte| byte != POISON);
                ensure(len < 16 || touched, "bytes in the buffer", "it is as it was")
            }
        }
    }

    /// Checks what came of it, whatever the device says of its length.
    pub fn check_memory(&self) -> Result<(), Objection> {
        let Some((memory, _)) = self.pieces.last().filter(|(_, writable)| *writable) else { return Ok(()) };
        ensure(memory.bytes()?.iter().any(|&byte| byte != POISON), "bytes in the buffer", "it is as it was")
    }

    fn last_byte(&self) -> Result<u8, Objection> {
        let (memory, _) = self.pieces.last().expect("a sample has pieces");
        Ok(*memory.bytes()?.last().expect("a piece has bytes"))
    }

    /// Its descriptors, as an indirect table has them.
    pub fn entries(&self) -> Vec<Descriptor> {
        entries(&self.pieces)
    }

    /// (Block) where the status goes.
    pub fn status(&self, session: &Session) -> Option<Memory> {
        (session.cell.device_type == BLK).then(|| self.pieces[self.pieces.len() - 1].0.clone())
    }

    /// Ranges, and what the device may do there.
    pub fn ranges(&self) -> Vec<(u64, u64, Access)> {
        let access = |writable: bool| if writable { Access::WRITE } else { Access::READ };
        self.pieces.iter().map(|(memory, writable)| (memory.address, memory.len.into(), access(*writable))).collect()
    }
}

/// What a console has printed, where that can be seen.
fn printed(session: &mut Session) -> Result<Option<Vec<u8>>, Objection> {
    match session.far_side.output() {
        Err(Objection::Skipped(_)) => Ok(None),
        printed => printed.map(Some),
    }
}

/// The descriptors of `pieces`, as an indirect table has them.
pub fn entries(pieces: &[(Memory, bool)]) -> Vec<Descriptor> {
    let next = |number: usize| (number + 1 < pieces.len()).then_some(number as u16 + 1);
    pieces.iter().enumerate().map(|(number, (memory, writable))| link(memory, *writable, next(number))).collect()
}

/// Puts a sample into its ring and kicks, without waiting.
pub fn offer(session: &Session, rings: &mut [Ring]) -> Result<Sample, Objection> {
    let sample = Sample::new(session)?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    ring.kick()?;
    Ok(sample)
}

/// Lets the device serve a sample that it has to tell of: only the interrupt says that there is something, so that none
/// is on its way any more.
pub fn serve_told(session: &mut Session, rings: &mut [Ring]) -> Result<(), Objection> {
    let sample = offer(session, rings)?;
    let ring = &mut rings[usize::from(sample.queue)];
    session.wait_interrupt()?;
    let mut used = ring.take();
    if used.is_none() {
        // A device that served something before may have looked at the driver's wish only after this one had been written.
        session.wait_interrupt()?;
        used = ring.take();
    }
    let Some((id, len)) = used else {
        return Err(Objection::failed("a used buffer with the interrupt", "the used ring is empty"));
    };
    ensure_eq("used id", id, 0)?;
    sample.check(session, len)
}

/// Lets the device serve a sample.
pub fn serve(session: &mut Session, rings: &mut [Ring]) -> Result<(), Objection> {
    let sample = offer(session, rings)?;
    let (id, len) = session.wait_used(&mut rings[usize::from(sample.queue)])?;
    ensure_eq("used id", id, 0)?;
    sample.check(session, len)
}

/// Waits until the device has looked at `range` since `mark`, and is done with what it was called for then. A kick alone
/// says nothing of when it is heard.
pub fn looked(session: &mut Session, mark: Mark, (address, len): (u64, u64)) -> Result<(), Objection> {
    let begun = Instant::now();
    while !session.probe()?.since(mark)?.iter().any(|&access| touches(access, address, len)) {
        let observed = format_args!("it did not in {:?}", session.watchdog);
        ensure(
            begun.elapsed() < session.watchdog,
            format_args!("the device looks at {address:#x}+{len:#x}"),
            observed,
        )?;
        std::thread::yield_now();
    }
    // The calls of a device come one after the other.
    session.transport.status()?;
    Ok(())
}

/// Resets the device, drops its rings, sets it up again, and lets it serve a sample: it is alive.
pub fn revive(session: &mut Session, rings: Vec<Ring>) -> Result<(), Objection> {
    session.transport.reset()?;
    drop(rings);
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)
}

/// What a bad input may lead to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Tolerance {
    /// It makes no sense: refuse it.
    None,
    /// It can be given a sense: refuse it or carry it out.
    Lenient,
}

/// A bad input that is on its way.
pub struct Attack {
    /// The queue.
    pub queue: u16,
    /// How many chains were made available.
    pub chains: u16,
    /// What the device may touch besides its rings.
    pub ranges: Vec<(u64, u64, Access)>,
    /// What it may do.
    pub tolerance: Tolerance,
    /// Where a block request's status goes.
    pub status: Option<Memory>,
    /// Memory that has to stay until the attack is over.
    pub kept: Vec<Memory>,
}

impl Attack {
    /// One chain, made of what `sample` holds.
    pub fn new(session: &Session, sample: &Sample, tolerance: Tolerance) -> Self {
        let status = sample.status(session);
        // A device hears of it later than the case is done: what would not be there any more would be refused for that.
        let kept = sample.pieces.iter().map(|(memory, _)| memory.clone()).collect();
        Self { queue: sample.queue, chains: 1, ranges: sample.ranges(), tolerance, status, kept }
    }

    /// The attack, with as many chains.
    #[must_use]
    pub fn chains(self, chains: u16) -> Self {
        Self { chains, ..self }
    }

    /// The attack, on further memory.
    #[must_use]
    pub fn and(mut self, memory: &Memory, access: Access) -> Self {
        self.ranges.push((memory.address, memory.len.into(), access));
        self.keeping([memory.clone()])
    }

    /// The attack, with memory that has to be there, and that the device must not touch.
    #[must_use]
    pub fn keeping(mut self, memory: impl IntoIterator<Item = Memory>) -> Self {
        self.kept.extend(memory);
        self
    }
}

/// Makes `attack` on a running device and judges what it does: it refuses or carries out, touches nothing that it was
/// not given, and is alive after a reset.
pub fn attack(
    session: &mut Session,
    wanted: Features,
    attack: impl FnOnce(&mut Session, &mut [Ring], &Sample) -> Result<Attack, Objection>,
) -> Verdict {
    let rings = session.bring_up(wanted)?;
    attack_on(session, rings, attack)
}

/// The same, on a device that runs with `rings`.
pub fn attack_on(
    session: &mut Session,
    mut rings: Vec<Ring>,
    attack: impl FnOnce(&mut Session, &mut [Ring], &Sample) -> Result<Attack, Objection>,
) -> Verdict {
    let sample = Sample::new(session)?;
    let mark = session.probe.as_ref().map(crate::suite::Probe::mark);
    let made = attack(session, &mut rings, &sample)?;
    let ring = &mut rings[usize::from(made.queue)];
    ring.kick()?;
    let mut finding = Finding::Rejected;
    let mut used = 0;
    let mut idle = 0;
    loop {
        // Looked at first: what was used before the device gave up is there then.
        let over = session.needs_reset()?;
        while let Some((id, len)) = ring.take() {
            used += 1;
            ensure(ring.knows(id), "a used id that the queue has", id)?;
            let done =
                len > 0 && made.status.as_ref().is_none_or(|status| status.bytes().is_ok_and(|byte| byte == [BLK_OK]));
            let printed =
                session.cell.device_type == CONSOLE && printed(session)?.is_some_and(|printed| !printed.is_empty());
            if done || printed {
                let expected = "the malformed request is refused";
                ensure(made.tolerance == Tolerance::Lenient, expected, format_args!("used with length {len}"))?;
                finding = Finding::Passed;
            }
        }
        if used >= made.chains || over {
            break;
        }
        // An interrupt for one of several chains may come before the others are done.
        match session.transport.wait(session.watchdog) {
            Ok(_) if idle < 1000 => idle += 1,
            Ok(_) | Err(TransportError::Watchdog(..)) => {
                let expected = "the device says that it needs a reset, or uses the chain";
                return Err(Objection::failed(expected, format!("neither in {:?}", session.watchdog)));
            }
            Err(error) => return Err(error.into()),
        }
    }
    if let Some(mark) = mark {
        only_allowed(session, mark, &rings, &made.ranges)?;
    }
    revive(session, rings)?;
    Ok(finding)
}

/// Fails if the device touched anything since `mark` but its rings and `ranges`, as it may.
pub fn only_allowed(
    session: &Session,
    mark: Mark,
    rings: &[Ring],
    ranges: &[(u64, u64, Access)],
) -> Result<(), Objection> {
    let areas: Vec<_> = rings.iter().flat_map(Ring::areas).collect();
    for access in session.probe()?.since(mark)? {
        let allowed = areas.iter().chain(ranges).any(|&range| inside(access, range));
        ensure(allowed, "the device keeps to its rings and buffers", shown(access))?;
    }
    Ok(())
}

/// Whether `access` is within a range and does what may be done there.
pub fn inside(access: Accessed, (address, len, right): (u64, u64, Access)) -> bool {
    right.contains(access.direction)
        && access.address >= address
        && access.address.saturating_add(access.len) <= address.saturating_add(len)
}

/// Whether `access` touches a range at all.
pub fn touches(access: Accessed, address: u64, len: u64) -> bool {
    access.address < address.saturating_add(len) && address < access.address.saturating_add(access.len)
}

/// An access in words.
pub fn shown(Accessed { address, len, direction, .. }: Accessed) -> String {
    let done = if direction == Access::READ { "read" } else { "wrote" };
    format!("it {done} {address:#x}+{len:#x}")
}

/// A descriptor.
pub const fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, len, flags, next }
}
