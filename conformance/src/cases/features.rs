//! Feature bits and their negotiation.

use polyvirt_core::queue::split::layout::INDIRECT;
use polyvirt_core::transport::{BlockingTransport, Transport, TransportError, initialize};
use polyvirt_core::{Features, Status};

use super::sample::{Sample, descriptor, ensure, ensure_eq, revive, serve};
use crate::raw::Memory;
use crate::suite::{Applies, BLK, CONSOLE, Call, Case, Finding, Objection, RNG, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new("features/version-1", "the device offers VIRTIO_F_VERSION_1", version_1)
        .judges(&["N1586"])
        .on(Applies::MODERN)
        .once(),
    Case::new("features/legacy-word", "a legacy device offers bits 0 to 31 only", legacy_word)
        .on(Applies { legacy: Some(true), ..Applies::ANY }),
    Case::new("features/known-only", "the device offers no bit that its type and VIRTIO 1.4 do not name", known_only)
        .judges(&["N0019"])
        .once(),
    Case::new("features/dependencies", "no offered feature needs one that is not offered", dependencies)
        .judges(&["N0016", "N0757"])
        .once(),
    Case::new("features/all-offered", "a driver that accepts all that is offered is accepted, and served", all_offered)
        .judges(&["N0019", "N0018"]),
    Case::new("features/each-alone", "each offered feature is accepted alone, with what it needs", each_alone)
        .judges(&["N0017"])
        .once(),
    Case::new("features/none", "a driver that accepts nothing but VERSION_1 is accepted, and served", none)
        .judges(&["N0017"]),
    Case::new("features/not-offered", "accepting what is not offered keeps FEATURES_OK from being set", not_offered)
        .judges(&["N0018"])
        .class(&[33])
        .on(Applies::MODERN)
        .once(),
    Case::new(
        "features/without-version-1",
        "a modern driver without VERSION_1 is refused or served",
        without_version_1,
    )
    .judges(&["N1587"])
    .on(Applies::MODERN),
    Case::new("features/frozen", "features written after FEATURES_OK change nothing", frozen)
        .class(&[33])
        .on(Applies::MODERN),
    Case::new("features/again", "features once accepted are accepted again after a reset", again).judges(&["N0020"]),
    Case::new("features/driver-subset", "the driver accepts nothing that is not offered", driver_subset)
        .judges(&["N0008", "N0012", "N0010"]),
    Case::new(
        "features/driver-version-1",
        "the driver accepts VERSION_1 although nobody asked it to",
        driver_version_1,
    )
    .judges(&["N1573"])
    .on(Applies::MODERN),
];

/// What each bit of a device type needs: bit, and the bits of which it needs one.
const NEEDS: &[(u32, u32, &[u32])] = &[
    // VIRTIO_BLK_F_CONFIG_WCE needs VIRTIO_BLK_F_FLUSH.
    (BLK, 11, &[9]),
];

/// Bits that VIRTIO 1.4 and its legacy interface name for each type.
fn named(device_type: u32) -> Features {
    let bits: &[u32] = match device_type {
        // BARRIER 0, SIZE_MAX 1, SEG_MAX 2, GEOMETRY 4, RO 5, BLK_SIZE 6, SCSI 7, FLUSH 9, TOPOLOGY 10, CONFIG_WCE 11,
        // MQ 12, DISCARD 13, WRITE_ZEROES 14, LIFETIME 15, SECURE_ERASE 16, ZONED 17.
        BLK => &[0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17],
        // SIZE 0, MULTIPORT 1, EMERG_WRITE 2.
        CONSOLE => &[0, 1, 2],
        RNG => &[],
        _ => return Features::all(),
    };
    let reserved = [24, 27, 28, 29, 30, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 43];
    bits.iter().chain(&reserved).fold(Features::empty(), |all, &bit| all | Features::bit(bit))
}

fn version_1(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    ensure(offered.contains(Features::VERSION_1), "VERSION_1", format_args!("{:#x}", offered.bits()))?;
    Ok(Finding::Passed)
}

fn legacy_word(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    ensure_eq("offered features beyond bit 31:", offered.bits() >> 32, 0)?;
    Ok(Finding::Passed)
}

fn known_only(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    let unknown = offered & !named(session.cell.device_type);
    ensure_eq("unknown features", unknown.bits(), 0)?;
    Ok(Finding::Passed)
}

fn dependencies(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for &(device, bit, needs) in NEEDS {
        if device == session.cell.device_type && offered.contains(Features::bit(bit)) {
            let met = needs.iter().any(|&need| offered.contains(Features::bit(need)));
            ensure(met, format_args!("one of the bits {needs:?} with bit {bit}"), format_args!("{offered:?}"))?;
        }
    }
    Ok(Finding::Passed)
}

/// Features that change the ring's format or what a kick says: other cases are about them.
pub fn framing() -> Features {
    Features::RING_PACKED | Features::NOTIFICATION_DATA | Features::NOTIF_CONFIG_DATA | Features::IN_ORDER
}

fn all_offered(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    let accepted = session.negotiate(offered)?;
    ensure_eq("accepted features", accepted, offered)?;
    let mut rings = session.bring_up(offered & !framing())?;
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn each_alone(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for feature in (0..128).map(Features::bit).filter(|&feature| offered.contains(feature)) {
        let mut wanted = feature;
        for &(device, bit, needs) in NEEDS {
            if device == session.cell.device_type && Features::bit(bit) == feature {
                wanted |= Features::bit(needs[0]);
            }
        }
        let accepted = session.negotiate(wanted)?;
        ensure(accepted.contains(wanted), format_args!("{wanted:?} accepted"), format_args!("{accepted:?}"))?;
    }
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn none(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

/// The steps before FEATURES_OK, with exactly `features`; then FEATURES_OK. Whether it stays.
fn accept(session: &mut Session, features: Features) -> Result<bool, Objection> {
    session.transport.reset()?;
    session.transport.set_status(Status::ACKNOWLEDGE)?;
    session.transport.set_status(Status::ACKNOWLEDGE | Status::DRIVER)?;
    session.transport.set_driver_features(features)?;
    session.transport.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK)?;
    Ok(session.transport.status()?.contains(Status::FEATURES_OK))
}

fn not_offered(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for bit in [0, 3, 8, 18, 23, 24, 26, 28, 31, 33, 37, 41, 42, 50, 63, 64, 95, 96, 127] {
        let feature = Features::bit(bit);
        if !offered.contains(feature) {
            let set = accept(session, Features::VERSION_1 | feature)?;
            ensure(!set, format_args!("FEATURES_OK stays 0 with bit {bit}, which was not offered"), "it is 1")?;
        }
    }
    revive(session, Vec::new())?;
    Ok(Finding::Rejected)
}

fn without_version_1(session: &mut Session) -> Verdict {
    if !accept(session, Features::empty())? {
        revive(session, Vec::new())?;
        return Ok(Finding::Rejected);
    }
    let mut rings = session.rings()?;
    session.go()?;
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn frozen(session: &mut Session) -> Verdict {
    session.negotiate(Features::empty())?;
    let offered = session.transport.device_features()?;
    let before = Features::VERSION_1 | session.cell.ring.feature();
    session.transport.set_driver_features(before | offered & Features::INDIRECT_DESC)?;
    ensure(session.transport.status()?.contains(Status::FEATURES_OK), "FEATURES_OK stays", "it is gone")?;
    // Whether indirect descriptors are in force shows by using one.
    let sample = Sample::new(session)?;
    let mut rings = session.rings()?;
    session.go()?;
    let ring = &mut rings[usize::from(sample.queue)];
    let table = Memory::readable(session, &ring.table(&sample.entries()))?;
    ring.set_descriptor(0, descriptor(table.address, table.len, INDIRECT, 0));
    ring.offer(0);
    ring.kick()?;
    session.wait_config()?;
    ensure(session.needs_reset()?, "an indirect descriptor is refused: it was not negotiated in time", "it is served")?;
    revive(session, rings)?;
    Ok(Finding::Rejected)
}

fn again(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    let first = session.negotiate(offered & !framing())?;
    let mut rings = session.rings()?;
    session.go()?;
    serve(session, &mut rings)?;
    let second = session.negotiate(first)?;
    ensure_eq("features accepted again", second, first)?;
    let mut rings = session.rings()?;
    session.go()?;
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

/// What the driver accepts when it is asked for `wanted`.
fn accepted(session: &mut Session, wanted: Features) -> Result<Features, Objection> {
    session.trace.clear();
    match initialize(&mut session.transport, wanted) {
        Ok(_) | Err(TransportError::FeaturesRefused(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let calls = session.trace.calls();
    let told = calls.iter().rev().find_map(|call| match call {
        Call::SetDriverFeatures(features) => Some(*features),
        _ => None,
    });
    told.ok_or_else(|| Objection::failed("the driver writes the features it accepts", "it does not"))
}

fn driver_subset(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    for wanted in [Features::all(), !offered, Features::empty(), Features::EVENT_IDX] {
        let accepted = accepted(session, wanted)?;
        ensure(offered.contains(accepted), format_args!("nothing but {offered:?}"), format_args!("{accepted:?}"))?;
    }
    Ok(Finding::Passed)
}

fn driver_version_1(session: &mut Session) -> Verdict {
    let accepted = accepted(session, Features::empty())?;
    ensure_eq("accepted features", accepted, Features::VERSION_1)?;
    Ok(Finding::Passed)
}
