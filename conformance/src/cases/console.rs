//! The console.

use std::time::Instant;

use polyvirt_core::Features;
use polyvirt_core::transport::{BlockingTransport, Transport, read_config};

use super::sample::{POISON, ensure, ensure_eq};
use crate::raw::{Memory, Ring};
use crate::suite::{Applies, CONSOLE, Case, Finding, Objection, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("console/output", "what is sent is printed, byte for byte, in order", output),
    case("console/output-in-pieces", "how output is cut into buffers and descriptors makes no difference", pieces)
        .judges(&["N0037"]),
    case("console/output-burst", "a queue full of output is printed in order", burst),
    case("console/output-long", "a buffer longer than what any console keeps is printed to its end", long),
    case("console/output-unread", "output that nobody reads for a while is printed to its end", unread),
    case("console/input", "what is typed arrives, byte for byte, in order", input),
    case("console/input-before-buffers", "what is typed before there are buffers is not lost", early_input),
    case("console/input-small-buffers", "input that does not fit a buffer goes on in the next", small_buffers),
    case("console/no-input", "buffers wait for input: none comes back empty", no_input),
    case("console/both-ways", "input and output at the same time", both_ways),
    case("console/input-after-reset", "a reset ends the old buffers; the console works on", after_reset)
        .judges(&["N0022"])
        .class(&[25]),
    case("console/size", "the configuration has the window's size", size),
    case("console/resize", "another size of the window is told, and read", resize),
    case(
        "console/emergency-write",
        "a byte written to emerg_wr is printed, on a device that is not set up too",
        emergency,
    )
    .judges(&["N0841", "N0842"]),
    case("console/emergency-write-odd", "emerg_wr in any width, at any time", emergency_odd)
        .judges(&["N0841"])
        .class(&[31]),
    case("console/readable-in-receiveq", "a device-readable buffer in the receive queue", readable_in_receiveq)
        .class(&[15]),
];

const fn case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).on(Applies::to(CONSOLE))
}

/// VIRTIO_CONSOLE_F_SIZE.
const SIZE: Features = Features::bit(0);
/// VIRTIO_CONSOLE_F_EMERG_WRITE.
const EMERG_WRITE: Features = Features::bit(2);
/// Where emerg_wr is.
const EMERG_WR: u32 = 8;

struct Console {
    receive: Ring,
    transmit: Ring,
}

fn start(session: &mut Session) -> Result<Console, Objection> {
    let mut rings = session.bring_up(SIZE | EMERG_WRITE)?;
    let transmit = rings.remove(1);
    Ok(Console { receive: rings.remove(0), transmit })
}

/// Bytes of which each tells where it is.
fn text(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

fn print(session: &mut Session, console: &mut Console, bytes: &[u8], cut: u32) -> Result<(), Objection> {
    let memory = Memory::readable(session, bytes)?;
    let mut parts = Vec::new();
    let mut at = 0;
    while at < memory.len {
        let len = cut.min(memory.len - at);
        parts.push((memory.part(at, len), false));
        at += len;
    }
    console.transmit.chain(0, &parts);
    console.transmit.offer(0);
    console.transmit.kick()?;
    let (id, len) = session.wait_used(&mut console.transmit)?;
    ensure_eq("used id", id, 0)?;
    ensure_eq("used length of output", len, 0)
}

fn printed(session: &mut Session, expected: &[u8]) -> Result<(), Objection> {
    let printed = session.far_side.output()?;
    ensure(printed == expected, format_args!("{} bytes as sent", expected.len()), Differing(&printed, expected))
}

struct Differing<'a>(&'a [u8], &'a [u8]);

impl std::fmt::Display for Differing<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = self.0.iter().zip(self.1).position(|(one, other)| one != other);
        write!(formatter, "{} bytes, first difference at {at:?}", self.0.len())
    }
}

fn output(session: &mut Session) -> Verdict {
    let mut console = start(session)?;
    for len in [1, 10, 512, 4096] {
        let bytes = text(len);
        print(session, &mut console, &bytes, u32::MAX)?;
        printed(session, &bytes)?;
    }
    Ok(Finding::Passed)
}

fn pieces(session: &mut Session) -> Verdict {
    let mut console = start(session)?;
    let bytes = text(100);
    for cut in [1, 3, 7, 50, 99] {
        print(session, &mut console, &bytes, cut)?;
        printed(session, &bytes)?;
    }
    Ok(Finding::Passed)
}

fn burst(session: &mut Session) -> Verdict {
    let mut console = start(session)?;
    let count = console.transmit.size();
    let bytes = text(usize::from(count) * 3);
    let memory = Memory::readable(session, &bytes)?;
    for number in 0..count {
        console.transmit.chain(number, &[(memory.part(u32::from(number) * 3, 3), false)]);
    }
    console.transmit.offer_all(&(0..count).collect::<Vec<_>>());
    console.transmit.kick()?;
    for _ in 0..count {
        session.wait_used(&mut console.transmit)?;
    }
    printed(session, &bytes)?;
    Ok(Finding::Passed)
}

/// More than consoles keep of what nobody has read.
const LONG: u32 = 256 * 1024;

/// Waits until `count` buffers of output were used, while someone reads, now and then.
fn read_until_used(session: &mut Session, ring: &mut Ring, count: u16) -> Result<Vec<u8>, Objection> {
    let (mut begun, mut printed, mut used) = (Instant::now(), Vec::new(), 0);
    while used < count {
        let piece = session.far_side.output()?;
        if let Some((_, len)) = ring.take() {
            ensure_eq("used length of output", len, 0)?;
            used += 1;
        } else if piece.is_empty() {
            let stuck = format_args!("{used} buffers used, {} bytes printed, and no more comes", printed.len());
            ensure(begun.elapsed() < session.watchdog, format_args!("{count} buffers used"), stuck)?;
            std::thread::yield_now();
            continue;
        }
        printed.extend(piece);
        begun = Instant::now();
    }
    printed.extend(session.far_side.output()?);
    Ok(printed)
}

fn long(session: &mut Session) -> Verdict {
    let mut console = start(session)?;
    let bytes = text(LONG as usize);
    let memory = Memory::readable(session, &bytes)?;
    // In one piece, and in pieces.
    for cut in [LONG, LONG / 3] {
        let parts: Vec<_> = (0..LONG.div_ceil(cut)).map(|part| part * cut).collect();
        let parts = parts.into_iter().map(|at| (memory.part(at, cut.min(LONG - at)), false)).collect::<Vec<_>>();
        console.transmit.chain(0, &parts);
        console.transmit.offer(0);
        console.transmit.kick()?;
        let printed = read_until_used(session, &mut console.transmit, 1)?;
        ensure(printed == bytes, format_args!("{LONG} bytes as sent"), Differing(&printed, &bytes))?;
    }
    Ok(Finding::Passed)
}

fn unread(session: &mut Session) -> Verdict {
    let mut console = start(session)?;
    let count = console.transmit.size().min(64);
    let bytes = text(LONG as usize);
    let memory = Memory::readable(session, &bytes)?;
    let each = LONG / u32::from(count);
    for number in 0..count {
        console.transmit.chain(number, &[(memory.part(u32::from(number) * each, each), false)]);
    }
    console.transmit.offer_all(&(0..count).collect::<Vec<_>>());
    console.transmit.kick()?;
    // Whatever the device can do without a reader, it has done, or is about to do.
    session.transport.status()?;
    let printed = read_until_used(session, &mut console.transmit, count)?;
    let sent = &bytes[..usize::from(count) * each as usize];
    ensure(printed == sent, format_args!("{} bytes as sent", sent.len()), Differing(&printed, sent))?;
    Ok(Finding::Passed)
}

/// Offers receive buffers of `len` bytes, as many as the queue has room for but at most `count`.
fn listen(session: &Session, console: &mut Console, count: u16, len: u32) -> Result<Vec<Memory>, Objection> {
    let count = count.min(console.receive.size());
    let buffers = (0..count).map(|_| Memory::writable(session, len, POISON)).collect::<Result<Vec<_>, _>>()?;
    for (number, buffer) in buffers.iter().enumerate() {
        console.receive.chain(number as u16, &[(buffer.clone(), true)]);
    }
    console.receive.offer_all(&(0..count).collect::<Vec<_>>());
    console.receive.kick()?;
    Ok(buffers)
}

/// Collects `len` bytes of input, giving buffers back to the device as they come.
fn hear(session: &mut Session, console: &mut Console, buffers: &[Memory], len: usize) -> Result<Vec<u8>, Objection> {
    let mut heard = Vec::new();
    while heard.len() < len {
        let (id, used) = session.wait_used(&mut console.receive)?;
        let Some(buffer) = buffers.get(id as usize) else {
            return Err(Objection::failed("a head that is in flight", id));
        };
        let fits = (1..=buffer.len).contains(&used);
        ensure(fits, format_args!("1 to {} bytes of input", buffer.len), used)?;
        heard.extend(&buffer.bytes()?[..used as usize]);
        console.receive.offer(id as u16);
        console.receive.kick()?;
    }
    Ok(heard)
}

fn typed(session: &mut Session, bytes: &[u8]) -> Result<(), Objection> {
    session.trace.note(format!("(someone types {} bytes)", bytes.len()));
    session.far_side.input(bytes)
}

fn input(session: &mut Session) -> Verdict {
    let mut console = start(session)?;
    let buffers = listen(session, &mut console, 4, 64)?;
    for len in [1, 10, 64, 200] {
        let bytes = text(len);
        typed(session, &bytes)?;
        let heard = hear(session, &mut console, &buffers, len)?;
        ensure(heard == bytes, format_args!("{len} bytes as typed"), Differing(&heard, &bytes))?;
    }
    Ok(Finding::Passed)
}

fn early_input(session: &mut Session) -> Verdict {
    let bytes = text(50);
    let mut console = start(session)?;
    typed(session, &bytes)?;
    session.transport.status()?;
    let buffers = listen(session, &mut console, 4, 64)?;
    let heard = hear(session, &mut console, &buffers, 50)?;
    ensure(heard == bytes, "50 bytes as typed", Differing(&heard, &bytes))?;
    Ok(Finding::Passed)
}

fn small_buffers(session: &mut Session) -> Verdict {
    let mut console = start(session)?;
    let bytes = text(100);
    let buffers = listen(session, &mut console, 3, 7)?;
    typed(session, &bytes)?;
    let heard = hear(session, &mut console, &buffers, 100)?;
    ensure(heard == bytes, "100 bytes as typed", Differing(&heard, &bytes))?;
    Ok(Finding::Passed)
}

fn no_input(session: &mut Session) -> Verdict {
    let mut console = start(session)?;
    let buffers = listen(session, &mut console, 4, 64)?;
    // Output behind it is the fence: the device has seen the receive queue by then.
    print(session, &mut console, b"x", u32::MAX)?;
    printed(session, b"x")?;
    ensure(!console.receive.has_used(), "nothing used in the receive queue", "something was")?;
    for buffer in &buffers {
        ensure(buffer.bytes()?.iter().all(|&byte| byte == POISON), "an untouched buffer", "it was written")?;
    }
    typed(session, b"y")?;
    let heard = hear(session, &mut console, &buffers, 1)?;
    ensure_eq("input", heard, b"y".to_vec())?;
    Ok(Finding::Passed)
}

fn both_ways(session: &mut Session) -> Verdict {
    let mut console = start(session)?;
    let buffers = listen(session, &mut console, 4, 16)?;
    for round in 0..20u8 {
        let (out, back) = ([round; 5], [round, 1, 2, 3, 4, 5, 6, 7, 8]);
        typed(session, &back)?;
        print(session, &mut console, &out, u32::MAX)?;
        printed(session, &out)?;
        let heard = hear(session, &mut console, &buffers, back.len())?;
        ensure_eq("input", heard, back.to_vec())?;
    }
    Ok(Finding::Passed)
}

fn after_reset(session: &mut Session) -> Verdict {
    let mut console = start(session)?;
    let old = listen(session, &mut console, 4, 64)?;
    session.transport.reset()?;
    typed(session, b"after")?;
    session.transport.status()?;
    for buffer in &old {
        ensure(buffer.bytes()?.iter().all(|&byte| byte == POISON), "no write to a buffer of before the reset", "one")?;
    }
    let mut fresh = start(session)?;
    // What was typed while nobody listened may be lost; what is typed now may not.
    let buffers = listen(session, &mut fresh, 4, 64)?;
    typed(session, b"!now")?;
    let mut heard = Vec::new();
    while !heard.ends_with(b"!now") {
        heard.extend(hear(session, &mut fresh, &buffers, 1)?);
    }
    for buffer in &old {
        ensure(buffer.bytes()?.iter().all(|&byte| byte == POISON), "no write to a buffer of before the reset", "one")?;
    }
    drop(console);
    Ok(Finding::Passed)
}

fn need(session: &mut Session, feature: Features, name: &str) -> Result<(), Objection> {
    match session.transport.device_features()?.contains(feature) {
        true => Ok(()),
        false => Err(Objection::Skipped(format!("the device does not offer {name}"))),
    }
}

fn window(session: &mut Session) -> Result<(u16, u16), Objection> {
    let mut bytes = [0; 4];
    read_config(&mut session.transport, 0, &mut bytes)?;
    let [a, b, c, d] = bytes;
    Ok((u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])))
}

fn size(session: &mut Session) -> Verdict {
    need(session, SIZE, "VIRTIO_CONSOLE_F_SIZE")?;
    let _console = start(session)?;
    let (columns, rows) = window(session)?;
    ensure(columns > 0 && rows > 0, "columns and rows", format_args!("{columns} × {rows}"))?;
    Ok(Finding::Passed)
}

fn resize(session: &mut Session) -> Verdict {
    need(session, SIZE, "VIRTIO_CONSOLE_F_SIZE")?;
    let _console = start(session)?;
    while session.interrupted()? {}
    for (columns, rows) in [(132, 50), (1, 1), (65535, 65535)] {
        session.trace.note(format!("(the window has {columns} × {rows} now)"));
        session.far_side.resize(columns, rows)?;
        session.wait_config()?;
        ensure_eq("the window's size", window(session)?, (columns, rows))?;
    }
    Ok(Finding::Passed)
}

/// Waits until `bytes` were printed.
fn appears(session: &mut Session, bytes: &[u8]) -> Result<(), Objection> {
    let begun = Instant::now();
    let mut printed = Vec::new();
    while printed != bytes {
        printed.extend(session.far_side.output()?);
        let differs = !bytes.starts_with(&printed) || begun.elapsed() > session.watchdog;
        ensure(!differs, format_args!("{bytes:x?} printed"), format_args!("{printed:x?}"))?;
        std::thread::yield_now();
    }
    Ok(())
}

fn emergency(session: &mut Session) -> Verdict {
    need(session, EMERG_WRITE, "VIRTIO_CONSOLE_F_EMERG_WRITE")?;
    if session.cell.legacy {
        // Without a status there is nothing that would take the bytes over.
        session.transport.set_status(polyvirt_core::Status::ACKNOWLEDGE)?;
    }
    session.transport.write_config(EMERG_WR, &u32::from(b'!').to_le_bytes())?;
    appears(session, b"!")?;
    let mut console = start(session)?;
    session.transport.write_config(EMERG_WR, &u32::from(b'?').to_le_bytes())?;
    appears(session, b"?")?;
    print(session, &mut console, b"x", u32::MAX)?;
    printed(session, b"x")?;
    Ok(Finding::Passed)
}

fn emergency_odd(session: &mut Session) -> Verdict {
    need(session, EMERG_WRITE, "VIRTIO_CONSOLE_F_EMERG_WRITE")?;
    let mut console = start(session)?;
    for (offset, len) in [(8, 1), (8, 2), (8, 4), (9, 1), (10, 2), (11, 1), (4, 4), (0, 4)] {
        session.transport.write_config(offset, &vec![0x41; len])?;
    }
    session.far_side.output()?;
    print(session, &mut console, b"x", u32::MAX)?;
    let printed = session.far_side.output()?;
    ensure(printed.ends_with(b"x"), "output goes on", format_args!("{printed:x?}"))?;
    Ok(Finding::Passed)
}

fn readable_in_receiveq(session: &mut Session) -> Verdict {
    let mut console = start(session)?;
    let memory = Memory::readable(session, b"do not write here")?;
    console.receive.chain(0, &[(memory.clone(), false)]);
    console.receive.offer(0);
    console.receive.kick()?;
    // The device may look at the queue only when there is something to put into it.
    typed(session, b"z")?;
    let begun = Instant::now();
    while !session.needs_reset()? && !console.receive.has_used() {
        ensure(begun.elapsed() < session.watchdog, "the buffer is refused", "nothing happens")?;
        std::thread::yield_now();
    }
    if let Some((_, len)) = console.receive.take() {
        ensure_eq("used length of a buffer that cannot be written", len, 0)?;
    }
    ensure_eq("the buffer", memory.bytes()?, b"do not write here".to_vec())?;
    super::sample::revive(session, vec![console.receive, console.transmit])?;
    Ok(Finding::Rejected)
}
