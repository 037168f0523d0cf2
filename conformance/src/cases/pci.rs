//! virtio-pci, field by field: identity, capabilities, base address registers, common configuration.

use polyvirt_core::transport::{BlockingTransport, Transport};
use polyvirt_core::{Features, Status};
use polyvirt_transports::pci::registers::*;

use super::init::serve_next;
use super::sample::{Sample, ensure, ensure_eq, offer, revive, serve, shown, touches};
use crate::cells::{MEMORY, PORTS};
use crate::raw::Ring;
use crate::suite::{Applies, BLK, CONSOLE, Case, Finding, Objection, RingFormat, Session, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    case("pci/identity", "vendor, device, revision and subsystem are those of a modern device", identity)
        .judges(&["N0282", "N0283", "N0285", "N0286", "N0287"])
        .once(),
    case("pci/header", "the header and the list of capabilities are as PCI has them, and read-only", header)
        .judges(&["N0281"])
        .once(),
    case("pci/bars", "base address registers tell their size, and structures are inside", bars)
        .judges(&["N0281"])
        .once(),
    case("pci/bars-move", "what is behind a base address register moves with it, doorbells too", bars_move)
        .judges(&["N0281"]),
    case("pci/capabilities", "each structure has its capability, aligned and whole", capabilities)
        .judges(&["N0303", "N0306", "N0307", "N0334", "N0345", "N0351", "N0359"])
        .once(),
    case("pci/notify-places", "every queue's place to be notified at is inside the structure", notify_places)
        .judges(&["N0340", "N0341", "N0342", "N0343", "N0344"])
        .once(),
    case("pci/configuration-mechanisms", "ports and memory lead to the same configuration space", mechanisms)
        .judges(&["N0281"])
        .once(),
    case("pci/window", "the window in configuration space reads and writes the structures", window)
        .judges(&["N0360", "N0361"])
        .once(),
    case("pci/window-anything", "a window to what is not there does no harm", window_anything).class(&[31]).once(),
    case("pci/feature-words", "features are offered and accepted by words, and none is beyond the last", feature_words)
        .judges(&["N0308", "N0309"])
        .class(&[30])
        .once(),
    case("pci/reset", "a reset brings status, queue_enable and queue_reset to 0", reset)
        .judges(&["N0312", "N0313", "N0314"])
        .once(),
    case("pci/queue-reset", "queue_reset resets one queue: it and queue_enable read 0 then", queue_reset)
        .judges(&["N0315", "N0316", "N0318"]),
    case("pci/queue-sizes", "a queue's size is a power of two, and 0 where there is no queue", queue_sizes)
        .judges(&["N0319", "N0320"])
        .class(&[30])
        .once(),
    case("pci/queue-odd", "sizes and addresses that cannot be are refused", queue_odd).class(&[13, 29]),
    case("pci/queue-frozen", "size and addresses written while a queue is enabled change nothing", frozen).class(&[28]),
    case("pci/bus-master", "without Bus Master Enable the device leaves memory alone, and with it goes on", bus_master)
        .judges(&["N0281"]),
    case("pci/config-generation", "config_generation is another after a change", super::config::generation)
        .judges(&["N0311"])
        .once(),
    case("pci/config-halves", "the halves of a 64-bit field can be read alone", config_halves)
        .judges(&["N0294"])
        .once(),
    case("pci/no-admin-queues", "without VIRTIO_F_ADMIN_VQ there are no administration queues", no_admin).once(),
    case("pci/any-access", "accesses of any width at any offset are answered", any_access).class(&[31]).once(),
];

const fn case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).on(Applies::PCI)
}

/// A structure that a capability leads to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Structure {
    /// Where its capability is.
    pub(super) at: u64,
    /// The base address register.
    pub(super) bar: u8,
    /// Where it begins there, and its bytes.
    pub(super) offset: u32,
    pub(super) length: u32,
    /// Where it begins in the session's registers.
    pub(super) base: u64,
}

impl Session {
    pub(super) fn get<const N: usize>(&self, offset: u64) -> Result<[u8; N], Objection> {
        let mut data = [0; N];
        self.registers()?.load(offset, &mut data)?;
        Ok(data)
    }

    pub(super) fn get16(&self, offset: u64) -> Result<u16, Objection> {
        self.get(offset).map(u16::from_le_bytes)
    }

    pub(super) fn get32(&self, offset: u64) -> Result<u32, Objection> {
        self.get(offset).map(u32::from_le_bytes)
    }

    pub(super) fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), Objection> {
        self.trace.note(format!("write {bytes:x?} to register {offset:#x}"));
        Ok(self.registers()?.store(offset, bytes)?)
    }

    /// The capabilities with `id`, in their order.
    pub(super) fn capabilities(&self, id: u8) -> Result<Vec<u64>, Objection> {
        let mut found = Vec::new();
        let [mut at] = self.get(CAPABILITIES.into())?;
        for _ in 0..48 {
            if at == 0 {
                return Ok(found);
            }
            ensure(at >= 0x40 && at.is_multiple_of(4), "a capability at a multiple of 4 behind the header", at)?;
            let [this, next] = self.get(at.into())?;
            if this == id {
                found.push(at.into());
            }
            at = next;
        }
        Err(Objection::failed("a list of capabilities that ends", "it does not"))
    }

    /// The first structure of type `kind`.
    pub(super) fn structure(&self, kind: u8) -> Result<Structure, Objection> {
        for at in self.capabilities(CAP_VENDOR)? {
            let ([found], [bar]) = (self.get(at + u64::from(CAP_TYPE))?, self.get(at + u64::from(CAP_BAR))?);
            if found == kind {
                let (offset, length) =
                    (self.get32(at + u64::from(CAP_OFFSET))?, self.get32(at + u64::from(CAP_LENGTH))?);
                return Ok(Structure { at, bar, offset, length, base: region(bar) + u64::from(offset) });
            }
        }
        Err(Objection::failed(format_args!("a capability of type {kind}"), "there is none"))
    }

    /// The offset of a field of the common configuration.
    pub(super) fn common(&self, field: u64) -> Result<u64, Objection> {
        Ok(self.structure(CAP_COMMON)?.base + field)
    }

    /// The place of a queue's doorbell.
    pub(super) fn doorbell(&self, queue: u16) -> Result<u64, Objection> {
        let notify = self.structure(CAP_NOTIFY)?;
        let multiplier = self.get32(notify.at + u64::from(CAP_MULTIPLIER))?;
        self.put(self.common(common::QUEUE_SELECT)?, &queue.to_le_bytes())?;
        let off = self.get16(self.common(common::QUEUE_NOTIFY_OFF)?)?;
        Ok(notify.base + u64::from(off) * u64::from(multiplier))
    }
}

fn identity(session: &mut Session) -> Verdict {
    ensure_eq("vendor", session.get16(VENDOR_ID.into())?, 0x1af4)?;
    let id = 0x1040 + session.cell.device_type as u16;
    ensure_eq("device", session.get16(DEVICE_ID.into())?, id)?;
    let [revision] = session.get(REVISION_ID.into())?;
    ensure(revision >= 1, "a revision of 1 or more", revision)?;
    let subsystem = session.get16(SUBSYSTEM_ID.into())?;
    ensure(subsystem >= 0x40, "a subsystem of 0x40 or more", subsystem)?;
    Ok(Finding::Passed)
}

fn header(session: &mut Session) -> Verdict {
    let [kind] = session.get(HEADER_TYPE.into())?;
    ensure_eq("header type", kind & 0x7f, 0)?;
    let status = session.get16(STATUS.into())?;
    ensure(status & STATUS_CAPABILITIES != 0, "a list of capabilities", format_args!("status {status:#x}"))?;
    let before: Vec<[u8; 4]> = (0..64).map(|word| session.get(word * 4)).collect::<Result<_, _>>()?;
    let written = [VENDOR_ID, REVISION_ID, SUBSYSTEM_VENDOR_ID, CAPABILITIES];
    let written = written.map(u64::from).into_iter().chain(session.capabilities(CAP_VENDOR)?);
    for at in written {
        session.put(at, &[0xff; 4])?;
        session.put(at, &[0; 4])?;
        ensure_eq("a field that cannot be written", session.get(at)?, before[at as usize / 4])?;
    }
    // What behind the capabilities is written is for the window alone.
    session.capabilities(CAP_MSIX)?;
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

/// The bytes behind base address register `bar`, and where it is; none if there is none. Nothing is decoded meanwhile.
fn size_of(session: &Session, bar: u8) -> Result<Option<(u64, u64)>, Objection> {
    let at = u64::from(BARS) + 4 * u64::from(bar);
    let command: [u8; 2] = session.get(COMMAND.into())?;
    session.put(COMMAND.into(), &[0; 2])?;
    let low = session.get32(at)?;
    let wide = low & (BAR_IO | BAR_64) == BAR_64;
    let words = if wide { 2 } else { 1 };
    let (mut mask, mut base) = (!0u64 << (32 * words - 1) << 1, 0);
    for word in 0..words {
        let flags = if word > 0 {
            0
        } else if low & BAR_IO != 0 {
            3
        } else {
            0xf
        };
        let old = session.get32(at + 4 * word)?;
        session.put(at + 4 * word, &u32::MAX.to_le_bytes())?;
        mask |= u64::from(session.get32(at + 4 * word)? & !flags) << (32 * word);
        base |= u64::from(old & !flags) << (32 * word);
        session.put(at + 4 * word, &old.to_le_bytes())?;
    }
    session.put(COMMAND.into(), &command)?;
    let len = (!mask).wrapping_add(1);
    if mask as u32 == 0 && !wide {
        return Ok(None);
    }
    ensure(len.is_power_of_two() && len >= 4, "a size that is a power of two", format_args!("{len:#x}"))?;
    Ok(Some((base, len)))
}

fn bars(session: &mut Session) -> Verdict {
    for kind in [CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_DEVICE] {
        let found = session.structure(kind)?;
        let sized = size_of(session, found.bar)?;
        let Some((base, len)) = sized else {
            return Err(Objection::failed("a base address register", format_args!("none for {found:?}")));
        };
        ensure(base.is_multiple_of(len), "a place that is a multiple of the size", format_args!("{base:#x}"))?;
        let end = u64::from(found.offset) + u64::from(found.length);
        ensure(end <= len, format_args!("an end of at most {len:#x}"), format_args!("{found:x?}"))?;
    }
    let queues = session.get16(session.common(common::NUM_QUEUES)?)?;
    ensure(queues >= session.queues(), "the device where it was before", format_args!("{queues} queues"))?;
    Ok(Finding::Passed)
}

fn bars_move(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    let sample = Sample::new(session)?;
    let (doorbell, structure) = (session.doorbell(sample.queue)?, session.structure(CAP_NOTIFY)?);
    let offset = doorbell - region(structure.bar);
    let Some((base, len)) = size_of(session, structure.bar)? else {
        return Err(Objection::failed("a base address register", "there is none"));
    };
    let there = base + len.max(0x10_0000);
    let at = u64::from(BARS) + 4 * u64::from(structure.bar);
    let low = session.get32(at)?;
    session.put(at, &(there as u32 | low & 0xf).to_le_bytes())?;
    let common = session.structure(CAP_COMMON)?;
    let field = u64::from(common.offset) + common::NUM_QUEUES;
    ensure_eq("what is read where the registers were", session.get16(MEMORY + base + field)?, 0xffff)?;
    let queues = session.get16(MEMORY + there + field)?;
    ensure(queues >= session.queues(), "the device where it is now", format_args!("{queues} queues"))?;
    let ring = &mut rings[usize::from(sample.queue)];
    let head = ring.offered % ring.size();
    ring.chain(head, &sample.pieces);
    ring.offer(head);
    session.put(MEMORY + there + offset, &sample.queue.to_le_bytes())?;
    let (_, used) = session.poll_used(ring)?;
    sample.check(session, used)?;
    session.put(at, &low.to_le_bytes())?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn capabilities(session: &mut Session) -> Verdict {
    for (kind, len, least, align) in [
        (CAP_COMMON, 16, common::LEN as u32 - 8, 4),
        (CAP_NOTIFY, 20, 2, 2),
        (CAP_ISR, 16, 1, 1),
        (CAP_DEVICE, 16, 0, 4),
        (CAP_WINDOW, 20, 0, 1),
    ] {
        let found = session.structure(kind)?;
        let [cap_len] = session.get(found.at + u64::from(CAP_LEN))?;
        ensure(cap_len >= len, format_args!("cap_len of at least {len} for type {kind}"), cap_len)?;
        ensure(found.at + u64::from(cap_len) <= 256, "a capability inside configuration space", cap_len)?;
        ensure(found.length >= least, format_args!("length of at least {least} for type {kind}"), found.length)?;
        let aligned = found.offset.is_multiple_of(align);
        ensure(aligned, format_args!("an offset that is a multiple of {align} for type {kind}"), found.offset)?;
    }
    Ok(Finding::Passed)
}

fn notify_places(session: &mut Session) -> Verdict {
    if !session.transport.device_features()?.contains(Features::NOTIFICATION_DATA) {
        return Err(Objection::Skipped("the device does not offer VIRTIO_F_NOTIFICATION_DATA".into()));
    }
    let notify = session.structure(CAP_NOTIFY)?;
    let multiplier = session.get32(notify.at + u64::from(CAP_MULTIPLIER))?;
    let right = multiplier == 0 || multiplier.is_power_of_two() && multiplier.is_multiple_of(4);
    ensure(right, "a multiplier of 0, or a power of two from 4 on", multiplier)?;
    ensure(notify.offset.is_multiple_of(4), "an offset that is a multiple of 4", notify.offset)?;
    ensure(notify.length >= 4, "a length of at least 4", notify.length)?;
    for queue in 0..session.get16(session.common(common::NUM_QUEUES)?)? {
        let place = session.doorbell(queue)? - notify.base;
        let fits = place + 4 <= u64::from(notify.length);
        ensure(fits, format_args!("a place inside {} bytes for queue {queue}", notify.length), place)?;
    }
    Ok(Finding::Passed)
}

fn mechanisms(session: &mut Session) -> Verdict {
    let identity = session.get32(VENDOR_ID.into())?;
    let through_ports = |function: u8, offset: u16| {
        session.put(PORTS + CONFIG_ADDRESS, &config_address(function, offset).to_le_bytes())?;
        session.get32(PORTS + CONFIG_DATA)
    };
    // Whichever the driver uses, one of the functions that the ports lead to is this device.
    let mut found = None;
    for device in 0..32u8 {
        let seen = through_ports(device << 3, VENDOR_ID)?;
        if seen == identity {
            found = Some(device << 3);
        } else if device > 1 && found.is_some() {
            ensure_eq("a function that is not there", seen, u32::MAX)?;
        }
    }
    let Some(function) = found else {
        return Err(Objection::failed("the device among those behind the ports", "it is not"));
    };
    for offset in (0..256).step_by(4).filter(|offset| u64::from(*offset) != u64::from(STATUS) & !3) {
        ensure_eq("configuration space", through_ports(function, offset)?, session.get32(offset.into())?)?;
        let address = config_address(function, offset);
        session.put(PORTS + CONFIG_ADDRESS, &address.to_le_bytes())?;
        ensure_eq("the address port", session.get32(PORTS + CONFIG_ADDRESS)?, address)?;
        let half = session.get16(PORTS + CONFIG_DATA + 2)?;
        ensure_eq("its upper half", half, (session.get32(offset.into())? >> 16) as u16)?;
    }
    session.put(PORTS + CONFIG_ADDRESS, &0u32.to_le_bytes())?;
    ensure_eq("configuration space while it is not enabled", session.get32(PORTS + CONFIG_DATA)?, u32::MAX)?;
    Ok(Finding::Passed)
}

/// Sets the window to `len` bytes at `offset` behind `bar`, and says where its data are.
fn aim(session: &Session, bar: u8, offset: u32, len: u32) -> Result<u64, Objection> {
    let window = session.structure(CAP_WINDOW)?.at;
    session.put(window + u64::from(CAP_BAR), &[bar])?;
    session.put(window + u64::from(CAP_OFFSET), &offset.to_le_bytes())?;
    session.put(window + u64::from(CAP_LENGTH), &len.to_le_bytes())?;
    Ok(window + u64::from(CAP_DATA))
}

fn window(session: &mut Session) -> Verdict {
    let common = session.structure(CAP_COMMON)?;
    let at = |field: u64| common.offset + field as u32;
    let data = aim(session, common.bar, at(common::NUM_QUEUES), 2)?;
    let queues = session.get16(common.base + common::NUM_QUEUES)?;
    ensure_eq("num_queues through the window", session.get16(data)?, queues)?;
    let data = aim(session, common.bar, at(common::QUEUE_SIZE), 4)?;
    let both = session.get32(common.base + common::QUEUE_SIZE)?;
    ensure_eq("queue_size and its vector through the window", session.get32(data)?, both)?;
    aim(session, common.bar, at(common::DEVICE_STATUS), 1)?;
    session.put(data, &[1, 0, 0, 0])?;
    let [status] = session.get(common.base + common::DEVICE_STATUS)?;
    ensure_eq("the status that was written through the window", status, Status::ACKNOWLEDGE.bits())?;
    aim(session, common.bar, at(common::DEVICE_FEATURE_SELECT), 4)?;
    session.put(data, &1u32.to_le_bytes())?;
    ensure_eq("the selector written through the window", session.get32(common.base)?, 1)?;
    session.put(common.base + common::DEVICE_STATUS, &[0])?;
    // A kick through the window.
    let mut rings = session.bring_up(Features::empty())?;
    let sample = Sample::new(session)?;
    let (doorbell, notify) = (session.doorbell(sample.queue)?, session.structure(CAP_NOTIFY)?);
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    aim(session, notify.bar, (doorbell - region(notify.bar)) as u32, 2)?;
    session.put(data, &u32::from(sample.queue).to_le_bytes())?;
    let (_, len) = session.poll_used(ring)?;
    sample.check(session, len)?;
    Ok(Finding::Passed)
}

fn window_anything(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    for bar in [0, 1, 2, 3, 4, 5, 6, 7, 0xff] {
        for offset in [0, 1, 0x3f, 0x1000, 0x3fff, 0x7fff_ffff, u32::MAX] {
            for len in [0, 1, 2, 3, 4, 8, 0x1000, u32::MAX] {
                let data = aim(session, bar, offset, len)?;
                // What is read from the interrupt status is gone, and nothing else.
                session.get::<4>(data)?;
                session.get::<1>(data + 3)?;
            }
        }
    }
    session.structure(CAP_COMMON)?;
    serve(session, &mut rings)?;
    Ok(Finding::Passed)
}

fn feature_words(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    session.transport.reset()?;
    let base = session.common(0)?;
    for select in [0, 1, 2, 3, 4, 5, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
        session.put(base + common::DEVICE_FEATURE_SELECT, &select.to_le_bytes())?;
        // What is hidden from drivers is offered all the same.
        let word = session.get32(base + common::DEVICE_FEATURE)? & !session.cell.ring.hidden().word(select);
        ensure_eq("device_feature", word, offered.word(select))?;
        session.put(base + common::DRIVER_FEATURE_SELECT, &select.to_le_bytes())?;
        session.put(base + common::DRIVER_FEATURE, &offered.word(select).to_le_bytes())?;
        ensure_eq("driver_feature", session.get32(base + common::DRIVER_FEATURE)?, offered.word(select))?;
        session.put(base + common::DRIVER_FEATURE, &[0; 4])?;
        ensure_eq("driver_feature", session.get32(base + common::DRIVER_FEATURE)?, 0)?;
    }
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn reset(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::RING_RESET)?;
    serve(session, &mut rings)?;
    let base = session.common(0)?;
    session.put(base + common::DEVICE_STATUS, &[0])?;
    let begun = std::time::Instant::now();
    while session.get::<1>(base + common::DEVICE_STATUS)? != [0] {
        ensure(begun.elapsed() < session.watchdog, "device_status becomes 0", "it does not")?;
    }
    for queue in 0..session.queues() {
        session.put(base + common::QUEUE_SELECT, &queue.to_le_bytes())?;
        ensure_eq("queue_enable after a reset", session.get16(base + common::QUEUE_ENABLE)?, 0)?;
        ensure_eq("queue_reset after a reset", session.get16(base + common::QUEUE_RESET)?, 0)?;
        let address: [u8; 8] = [session.get::<4>(base + common::QUEUE_DESC)?, session.get(base + 0x24)?]
            .concat()
            .try_into()
            .unwrap_or_default();
        ensure_eq("queue_desc after a reset", u64::from_le_bytes(address), 0)?;
    }
    revive(session, rings)?;
    Ok(Finding::Passed)
}

/// Fails if anything of `ring` was accessed since `mark`.
fn untouched(session: &Session, ring: &Ring, mark: crate::suite::Mark) -> Result<(), Objection> {
    for access in session.probe()?.since(mark)? {
        let touched = ring.areas().iter().any(|&(address, len, _)| touches(access, address, len));
        ensure(!touched, "no access to a queue that was reset", shown(access))?;
    }
    Ok(())
}

fn queue_reset(session: &mut Session) -> Verdict {
    if !session.transport.device_features()?.contains(Features::RING_RESET) {
        return Err(Objection::Skipped("the device does not offer VIRTIO_F_RING_RESET".into()));
    }
    let mut rings = session.bring_up(Features::RING_RESET)?;
    serve(session, &mut rings)?;
    let (queue, base) = (Sample::new(session)?.queue, session.common(0)?);
    session.put(base + common::QUEUE_SELECT, &queue.to_le_bytes())?;
    ensure_eq("queue_reset of a queue in use", session.get16(base + common::QUEUE_RESET)?, 0)?;
    session.put(base + common::QUEUE_RESET, &[1, 0])?;
    let begun = std::time::Instant::now();
    while session.get16(base + common::QUEUE_RESET)? != 0 {
        ensure(begun.elapsed() < session.watchdog, "queue_reset becomes 0", "it stays 1")?;
    }
    ensure_eq("queue_enable after a queue reset", session.get16(base + common::QUEUE_ENABLE)?, 0)?;
    let mark = session.probe()?.mark();
    rings[usize::from(queue)].kick()?;
    session.transport.status()?;
    untouched(session, &rings[usize::from(queue)], mark)?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn queue_sizes(session: &mut Session) -> Verdict {
    let base = session.common(0)?;
    let queues = session.get16(base + common::NUM_QUEUES)?;
    ensure(queues >= session.queues(), format_args!("at least {} queues", session.queues()), queues)?;
    for queue in 0..queues {
        session.put(base + common::QUEUE_SELECT, &queue.to_le_bytes())?;
        let size = session.get16(base + common::QUEUE_SIZE)?;
        ensure(size.is_power_of_two(), "a queue size that is a power of two", size)?;
    }
    for queue in [queues, queues + 16, 0x7fff, 0x8000, 0xffff] {
        session.put(base + common::QUEUE_SELECT, &queue.to_le_bytes())?;
        ensure_eq("queue_size of a queue that is not there", session.get16(base + common::QUEUE_SIZE)?, 0)?;
        session.put(base + common::QUEUE_SIZE, &[8, 0])?;
        session.put(base + common::QUEUE_ENABLE, &[1, 0])?;
        ensure_eq("queue_enable of a queue that is not there", session.get16(base + common::QUEUE_ENABLE)?, 0)?;
        ensure_eq("queue_size of a queue that is not there", session.get16(base + common::QUEUE_SIZE)?, 0)?;
    }
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

/// Sets the queue of a sample up as `change` changes it, says DRIVER_OK, makes a request and sees it refused; then the
/// device is revived.
fn bad_queue(session: &mut Session, field: u64, value: &[u8]) -> Result<(), Objection> {
    session.negotiate(Features::RING_RESET)?;
    let mut rings = session.rings()?;
    let (sample, base) = (Sample::new(session)?, session.common(0)?);
    let config = rings[usize::from(sample.queue)].config;
    session.put(base + common::QUEUE_SELECT, &sample.queue.to_le_bytes())?;
    session.put(base + common::QUEUE_RESET, &[1, 0])?;
    session.put(base + common::QUEUE_SIZE, &config.size.to_le_bytes())?;
    for (field, address) in [
        (common::QUEUE_DESC, config.descriptors),
        (common::QUEUE_DRIVER, config.driver),
        (common::QUEUE_DEVICE, config.device),
    ] {
        session.put(base + field, &(address as u32).to_le_bytes())?;
        session.put(base + field + 4, &((address >> 32) as u32).to_le_bytes())?;
    }
    session.put(base + field, value)?;
    session.put(base + common::QUEUE_ENABLE, &[1, 0])?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.chain(0, &sample.pieces);
    ring.offer(0);
    session.go()?;
    let ring = &mut rings[usize::from(sample.queue)];
    ring.kick()?;
    let refused = session.get16(base + common::QUEUE_ENABLE)? == 0 || session.needs_reset()?;
    ensure(refused, "the queue is refused: queue_enable 0 or DEVICE_NEEDS_RESET", "neither")?;
    ensure(!rings[usize::from(sample.queue)].has_used(), "nothing used", "something was")?;
    revive(session, rings)
}

fn queue_odd(session: &mut Session) -> Verdict {
    let max = session.transport.queue_max_size(0)?;
    // A packed ring may have any size.
    let odd = (session.cell.ring == RingFormat::Split).then_some(3);
    for size in [0, max + 1, 2 * max, 0x8001, 0xffff].into_iter().chain(odd) {
        bad_queue(session, common::QUEUE_SIZE, &size.to_le_bytes())?;
    }
    for (field, low) in [(common::QUEUE_DESC, 8u32), (common::QUEUE_DRIVER, 1), (common::QUEUE_DEVICE, 2)] {
        let memory = crate::raw::Memory::new(session, 0x8000, polyvirt_core::memory::Access::all())?;
        bad_queue(session, field, &(memory.address as u32 + low).to_le_bytes())?;
        bad_queue(session, field + 4, &0x7fff_ffffu32.to_le_bytes())?;
        bad_queue(session, field + 4, &u32::MAX.to_le_bytes())?;
    }
    Ok(Finding::Rejected)
}

fn frozen(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    let base = session.common(0)?;
    for queue in 0..session.queues() {
        session.put(base + common::QUEUE_SELECT, &queue.to_le_bytes())?;
        for size in [0u16, 1, 3, 0xffff] {
            session.put(base + common::QUEUE_SIZE, &size.to_le_bytes())?;
        }
        for half in (common::QUEUE_DESC..common::QUEUE_NOTIF_CONFIG_DATA).step_by(4) {
            session.put(base + half, &0xdead_0001u32.to_le_bytes())?;
        }
        session.put(base + common::QUEUE_ENABLE, &[1, 0])?;
        // Not negotiated.
        session.put(base + common::QUEUE_RESET, &[1, 0])?;
    }
    ensure(!session.needs_reset()?, "a device that goes on", "it needs a reset")?;
    for _ in 0..2 * rings[0].size() {
        serve_next(session, &mut rings)?;
    }
    Ok(Finding::Passed)
}

/// Takes Bus Master Enable away, and returns the command register as it was.
pub(super) fn no_bus_master(session: &Session) -> Result<[u8; 2], Objection> {
    let command = session.get16(COMMAND.into())?;
    session.put(COMMAND.into(), &(command & !COMMAND_MASTER).to_le_bytes())?;
    ensure_eq("Bus Master Enable", session.get16(COMMAND.into())? & COMMAND_MASTER, 0)?;
    Ok(command.to_le_bytes())
}

pub(super) fn bus_master(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    let command = no_bus_master(session)?;
    let mark = session.probe()?.mark();
    let sample = offer(session, &mut rings)?;
    // Whatever was to come of it is there when the device has answered.
    session.transport.status()?;
    let ranges = sample.ranges();
    let ring = &mut rings[usize::from(sample.queue)];
    for access in session.probe()?.since(mark)? {
        let touched = ring.areas().iter().chain(&ranges).any(|&(address, len, _)| touches(access, address, len));
        ensure(!touched, "no access to memory without Bus Master Enable", shown(access))?;
    }
    ensure(!ring.has_used(), "nothing used", "something was")?;
    session.put(COMMAND.into(), &command)?;
    ring.kick()?;
    let (_, len) = session.wait_used(ring)?;
    sample.check(session, len)?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn config_halves(session: &mut Session) -> Verdict {
    if session.cell.device_type != BLK {
        return Ok(Finding::Passed);
    }
    let device = session.structure(CAP_DEVICE)?.base;
    let mut capacity = [0; 8];
    session.transport.read_config(0, &mut capacity)?;
    let halves = [session.get::<4>(device + 4)?, session.get::<4>(device)?];
    ensure_eq("the halves of the capacity", [halves[1], halves[0]].concat(), capacity.to_vec())?;
    ensure(capacity != [0; 8], "a capacity", "0")?;
    Ok(Finding::Passed)
}

fn no_admin(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?.contains(Features::ADMIN_VQ);
    ensure(!offered, "VIRTIO_F_ADMIN_VQ is not offered", "it is")?;
    let common = session.structure(CAP_COMMON)?;
    if u64::from(common.length) > common::ADMIN_QUEUE_NUM {
        ensure_eq("admin_queue_num", session.get16(common.base + common::ADMIN_QUEUE_NUM)?, 0)?;
    }
    Ok(Finding::Passed)
}

fn any_access(session: &mut Session) -> Verdict {
    let rings = session.bring_up(Features::empty())?;
    let mut edges = Vec::new();
    for kind in [CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_DEVICE] {
        let found = session.structure(kind)?;
        let end = u64::from(found.length.min(0x1000));
        edges.extend((0..end.min(0x48)).chain([end - 1, end, end + 1]).map(|at| found.base + at));
    }
    let [table, pending] = [MSIX_TABLE, MSIX_PENDING].map(u64::from);
    for at in session.capabilities(CAP_MSIX)? {
        for place in [session.get32(at + table)?, session.get32(at + pending)?] {
            edges.extend((0..0x48).map(|at| region((place & 7) as u8) + u64::from(place & !7) + at));
        }
    }
    for width in [1usize, 2, 4, 8] {
        for &offset in &edges {
            session.registers()?.load(offset, &mut vec![0; width])?;
            for byte in [0x00, 0x01, 0xff] {
                session.registers()?.store(offset, &vec![byte; width])?;
            }
        }
    }
    // Configuration space, but for what places and enables the registers; inside words of four, as both mechanisms want.
    for at in (0..256u64).filter(|at| !(4..8).contains(at) && !(0x10..0x28).contains(at)) {
        for width in [1usize, 2, 4].into_iter().filter(|width| at % 4 + *width as u64 <= 4) {
            session.registers()?.load(at, &mut vec![0; width])?;
            session.registers()?.store(at, &vec![0xff; width])?;
        }
    }
    if session.cell.device_type == CONSOLE {
        // Emergency output may have been among it.
        session.far_side.output()?;
    }
    // A driver that finds the device now sets its interrupts up again.
    let mut again = session.registers()?.connect()?;
    again.reset()?;
    drop(again);
    revive(session, rings)?;
    Ok(Finding::Passed)
}

/// A sample that is served and not told: the ring alone is looked at.
pub(super) fn serve_silently(session: &mut Session, rings: &mut [Ring]) -> Result<(), Objection> {
    let sample = offer(session, rings)?;
    let (_, len) = session.poll_used(&mut rings[usize::from(sample.queue)])?;
    sample.check(session, len)
}
