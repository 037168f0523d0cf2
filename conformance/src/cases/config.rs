//! The device configuration.

use std::sync::mpsc;

use polyvirt_core::Features;
use polyvirt_core::transport::{BlockingTransport, CONFIG_READ_ATTEMPTS, Transport, TransportError, read_config};

use super::init::serve_next;
use super::sample::{ensure, ensure_eq, revive, serve};
use super::scripted::{Script, Scripted};
use crate::suite::{Applies, BLK, CONSOLE, Case, Finding, Objection, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new("config/before-features-ok", "the configuration can be read before FEATURES_OK", before_features_ok)
        .judges(&["N0029"])
        .once(),
    Case::new("config/stable", "the configuration stays the same while nothing changes", stable),
    Case::new("config/width-makes-no-difference", "bytes, words and the whole read the same", widths)
        .class(&[31])
        .once(),
    Case::new("config/read-only", "writing read-only fields changes nothing", read_only).class(&[31]).once(),
    Case::new("config/change-is-told", "a changed configuration is told, and read", change_told)
        .judges(&["N0801"])
        .once(),
    Case::new("config/generation", "a changed configuration has another generation", generation)
        .on(Applies::MODERN)
        .once(),
    Case::new("config/changes-while-read", "a driver never reads halves of two configurations", racing)
        .class(&[32])
        .on(Applies::MODERN)
        .once(),
    Case::new("config/change-before-driver-ok", "a change before DRIVER_OK breaks nothing", early_change).once(),
    Case::new("config/never-settles", "(driver) a configuration that never settles is given up on", never_settles)
        .class(&[104])
        .once(),
];

/// Bytes of configuration that a driver reads in any case.
fn len(session: &Session) -> u32 {
    match session.cell.device_type {
        BLK => 24,
        CONSOLE => 8,
        _ => 0,
    }
}

fn whole(session: &mut Session) -> Result<Vec<u8>, Objection> {
    let mut bytes = vec![0; len(session) as usize];
    session.transport.read_config(0, &mut bytes)?;
    Ok(bytes)
}

/// Makes the configuration change from far away. Whether the device has one that can.
pub(super) fn change(session: &mut Session, to: u16) -> Result<bool, Objection> {
    session.trace.note(format!("(the far side changes the configuration to {to})"));
    match session.cell.device_type {
        BLK => session.far_side.set_capacity(to.into())?,
        CONSOLE => session.far_side.resize(to, to)?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// The field that [`change`] changes.
pub(super) fn changing(session: &mut Session) -> Result<u64, Objection> {
    let mut bytes = [0; 8];
    let len = if session.cell.device_type == BLK { 8 } else { 4 };
    read_config(&mut session.transport, 0, &mut bytes[..len])?;
    Ok(u64::from_le_bytes(bytes))
}

/// What [`changing`] reads after `change(to)`.
pub(super) fn changed(session: &Session, to: u16) -> u64 {
    if session.cell.device_type == BLK { to.into() } else { u64::from(to) << 16 | u64::from(to) }
}

/// For cases about a change: features with which it shows.
pub(super) fn shown_by() -> Features {
    // VIRTIO_CONSOLE_F_SIZE.
    Features::bit(0)
}

fn before_features_ok(session: &mut Session) -> Verdict {
    session.transport.reset()?;
    let before = whole(session)?;
    session.bring_up(Features::empty())?;
    ensure_eq("the configuration read before FEATURES_OK", before, whole(session)?)?;
    Ok(Finding::Passed)
}

fn stable(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    let (first, generation) = (whole(session)?, session.transport.config_generation()?);
    for _ in 0..5 {
        serve_next(session, &mut rings)?;
        ensure_eq("configuration", whole(session)?, first.clone())?;
        ensure_eq("generation", session.transport.config_generation()?, generation)?;
    }
    Ok(Finding::Passed)
}

fn widths(session: &mut Session) -> Verdict {
    let reference = whole(session)?;
    let size = reference.len();
    for width in [1, 2, 4, 8] {
        for offset in (0..size).step_by(width).filter(|offset| offset + width <= size) {
            let mut part = vec![0; width];
            session.transport.read_config(offset as u32, &mut part)?;
            ensure_eq("configuration", part, reference[offset..offset + width].to_vec())?;
        }
    }
    Ok(Finding::Passed)
}

fn read_only(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(shown_by())?;
    let before = whole(session)?;
    for offset in 0..before.len() as u32 {
        session.transport.write_config(offset, &[0xff])?;
    }
    for offset in (0..before.len() as u32).step_by(4) {
        session.transport.write_config(offset, &[0x5a; 4])?;
    }
    ensure_eq("configuration", whole(session)?, before)?;
    if session.cell.device_type == CONSOLE {
        session.far_side.output()?;
    }
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn change_told(session: &mut Session) -> Verdict {
    let rings = session.bring_up(shown_by())?;
    while session.interrupted()? {}
    for to in [300, 17] {
        if !change(session, to)? {
            return Ok(Finding::Passed);
        }
        session.wait_config()?;
        let expected = changed(session, to);
        ensure_eq("the changed field", changing(session)?, expected)?;
    }
    drop(rings);
    Ok(Finding::Passed)
}

pub(super) fn generation(session: &mut Session) -> Verdict {
    let rings = session.bring_up(shown_by())?;
    let mut before = session.transport.config_generation()?;
    for to in [300, 17, 300] {
        if !change(session, to)? {
            return Ok(Finding::Passed);
        }
        session.wait_config()?;
        let after = session.transport.config_generation()?;
        ensure(before != after, format_args!("another generation than {before}"), after)?;
        before = after;
    }
    drop(rings);
    Ok(Finding::Passed)
}

fn racing(session: &mut Session) -> Verdict {
    let rings = session.bring_up(shown_by())?;
    // Both halves of either value are alike, so that a mixture shows.
    let values = [0x0101, 0x0202];
    if !change(session, values[0])? {
        return Ok(Finding::Passed);
    }
    session.wait_config()?;
    // A byte of the capacity each, or columns and rows.
    let half = if session.cell.device_type == BLK { 1 } else { 2 };
    let mut far_side = std::mem::replace(&mut session.far_side, Box::new(()));
    let device = session.cell.device_type;
    let verdict = std::thread::scope(|scope| {
        let (wanted, changes) = mpsc::channel();
        let (made, changed) = mpsc::channel();
        let changer = scope.spawn(move || {
            for to in changes {
                let done = if device == BLK { far_side.set_capacity(u64::from(to)) } else { far_side.resize(to, to) };
                if done.is_err() || made.send(()).is_err() {
                    break;
                }
            }
            far_side
        });
        let mut read = || -> Result<(), Objection> {
            let mut settled = 0;
            for turn in 0..300 {
                // Every other time a change is under way. All the time would be another case: nothing settles then.
                let raced = turn % 2 == 0;
                let under_way =
                    if raced { wanted.send(values[(turn / 2 % 2) ^ 1]).is_ok() } else { changed.recv().is_ok() };
                ensure(under_way, "the far side changes the configuration", "it does not")?;
                // Two halves, one after the other: they are of one configuration if the generation says so.
                let before = session.transport.config_generation()?;
                let (mut low, mut high) = (vec![0; half], vec![0; half]);
                session.transport.read_config(0, &mut low)?;
                session.transport.read_config(half as u32, &mut high)?;
                if session.transport.config_generation()? == before {
                    settled += 1;
                    let expected = "two halves of one configuration";
                    ensure(low == high, expected, format_args!("{low:x?} and {high:x?}"))?;
                }
            }
            ensure(settled > 0, "a configuration that settles now and then", "it never does")
        };
        let verdict = read();
        drop(wanted);
        changer.join().map(|far_side| (far_side, verdict))
    });
    let Ok((far_side, verdict)) = verdict else {
        return Err(Objection::failed("the far side changes the configuration", "it panicked"));
    };
    session.far_side = far_side;
    verdict?;
    drop(rings);
    Ok(Finding::Passed)
}

fn early_change(session: &mut Session) -> Verdict {
    session.negotiate(shown_by())?;
    if !change(session, 300)? {
        return Ok(Finding::Passed);
    }
    let mut rings = session.rings()?;
    session.go()?;
    serve(session, &mut rings)?;
    revive(session, rings)?;
    let expected = changed(session, 300);
    let mut rings = session.bring_up(shown_by())?;
    serve(session, &mut rings)?;
    ensure_eq("the changed field", changing(session)?, expected)?;
    Ok(Finding::Passed)
}

fn never_settles(session: &mut Session) -> Verdict {
    session.bring_up(Features::empty())?;
    let mut scripted = Scripted::new(session.transport.clone(), Script { generation: Some(0), ..Script::default() });
    let mut bytes = [0; 1];
    let result = read_config(&mut scripted, 0, &mut bytes);
    ensure_eq("reading a configuration that never settles:", result, Err(TransportError::ConfigUnstable))?;
    let reads = scripted.script.generation.unwrap_or(0);
    ensure(reads <= CONFIG_READ_ATTEMPTS + 1, "a bounded number of reads", reads)?;
    Ok(Finding::Passed)
}
