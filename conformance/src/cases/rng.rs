//! The entropy device.

use polyvirt_core::Features;

use super::sample::{POISON, ensure, ensure_eq};
use crate::raw::{Memory, Ring};
use crate::suite::{Applies, Case, Finding, Objection, RNG, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("rng/at-least-a-byte", "a buffer comes back with at least one byte in it", at_least_one).judges(&["N0853"]),
    case("rng/any-size", "buffers of any size are filled up to the used length, and no further", any_size)
        .judges(&["N0853", "N0067"])
        .packed_judges(&["N0853"]),
    case("rng/random", "no two buffers are alike, and no byte is missing", random).judges(&["N0853"]),
    case("rng/many", "many buffers at once, each with bytes of its own", many).judges(&["N0853"]),
    case("rng/large", "a buffer of a mebibyte", large).judges(&["N0854"]),
];

const fn case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).on(Applies::to(RNG))
}

fn start(session: &mut Session) -> Result<Ring, Objection> {
    let mut rings = session.bring_up(Features::empty())?;
    Ok(rings.remove(0))
}

/// Lets the device fill a buffer of `len`; what it says that it wrote, and all bytes.
fn fill(session: &mut Session, ring: &mut Ring, len: u32) -> Result<(u32, Vec<u8>), Objection> {
    let buffer = Memory::writable(session, len, POISON)?;
    ring.chain(0, &[(buffer.clone(), true)]);
    ring.offer(0);
    ring.kick()?;
    let (id, used) = session.wait_used(ring)?;
    ensure_eq("used id", id, 0)?;
    ensure((1..=len).contains(&used), format_args!("1 to {len} bytes"), used)?;
    Ok((used, buffer.bytes()?))
}

fn at_least_one(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    for _ in 0..10 {
        fill(session, &mut ring, 1)?;
    }
    Ok(Finding::Passed)
}

fn any_size(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    for len in [1, 2, 3, 7, 8, 9, 63, 64, 65, 511, 4095, 4096, 4097, 65536] {
        let (used, bytes) = fill(session, &mut ring, len)?;
        // Small buffers prove nothing: random bytes may be those that were there.
        let end = used as usize;
        let touched = bytes[end.saturating_sub(16)..end].iter().any(|&byte| byte != POISON);
        ensure(used < 16 || touched, "bytes up to the used length", "the last ones are as they were")?;
        let beyond = bytes[end..].iter().all(|&byte| byte == POISON);
        ensure(end + 16 > bytes.len() || beyond, "nothing beyond the used length", "something")?;
    }
    Ok(Finding::Passed)
}

fn random(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let mut seen = Vec::new();
    for _ in 0..20 {
        let (used, mut bytes) = fill(session, &mut ring, 64)?;
        bytes.truncate(used as usize);
        if bytes.len() >= 16 {
            ensure(!seen.contains(&bytes), "bytes that did not come before", "the same as before")?;
            seen.push(bytes);
        }
    }
    // Of so many random bytes not one value is left out: the chance is below 2^-90.
    let mut all = Vec::new();
    while all.len() < 16384 {
        let (used, bytes) = fill(session, &mut ring, 4096)?;
        all.extend(&bytes[..used as usize]);
    }
    let missing = (0..=255u8).find(|byte| !all.contains(byte));
    ensure(missing.is_none(), "every value among 16384 bytes", format_args!("not {missing:?}"))?;
    Ok(Finding::Passed)
}

fn many(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let count = ring.size().min(32);
    let memory = Memory::writable(session, u32::from(count) * 32, POISON)?;
    for number in 0..count {
        ring.chain(number, &[(memory.part(u32::from(number) * 32, 32), true)]);
    }
    ring.offer_all(&(0..count).collect::<Vec<_>>());
    ring.kick()?;
    let mut seen = Vec::new();
    for _ in 0..count {
        let (id, used) = session.wait_used(&mut ring)?;
        ensure(id < count.into(), format_args!("a head below {count}"), id)?;
        ensure((1..=32).contains(&used), "1 to 32 bytes", used)?;
        let bytes = memory.part(id * 32, 32).bytes()?;
        if used >= 16 {
            ensure(!seen.contains(&bytes), "bytes of its own in each buffer", "the same in two")?;
        }
        seen.push(bytes);
    }
    Ok(Finding::Passed)
}

fn large(session: &mut Session) -> Verdict {
    let mut ring = start(session)?;
    let (used, bytes) = fill(session, &mut ring, 1 << 20)?;
    let from = (used as usize).saturating_sub(16);
    let touched = bytes[from..used as usize].iter().any(|&byte| byte != POISON);
    ensure(used < 16 || touched, "bytes up to the used length", "the last ones are as they were")?;
    Ok(Finding::Passed)
}
