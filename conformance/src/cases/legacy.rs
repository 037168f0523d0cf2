//! The legacy interface: over PCI and over MMIO register by register, and what a driver may do on any bus.
//!
//! The spec has no numbered statements about it.

use polyvirt_core::queue::Layout;
use polyvirt_core::transport::{BlockingTransport, Transport};
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio::registers as mmio;
use polyvirt_transports::pci::registers::*;

use super::init::serve_next;
use super::pci::{bus_master, serve_silently};
use super::sample::{Sample, ensure, ensure_eq, offer, revive, serve};
use crate::raw::Ring;
use crate::suite::{Applies, BLK, CONSOLE, Case, Finding, Objection, Session, Variant, Verdict};

/// The cases of this area.
pub const CASES: &[Case] = &[
    Case::new("legacy/used-before-driver-ok", "a driver may use the device before it says DRIVER_OK", early)
        .on(Applies::LEGACY),
    pci(
        "pci-legacy/identity",
        "a transitional id, revision 0, the type as subsystem, ports in the first region",
        identity,
    ),
    pci("pci-legacy/registers", "registers are where the paper has them", registers),
    pci("pci-legacy/isr", "reading the interrupt status clears it", isr),
    pci("pci-legacy/vectors-move-configuration", "with messages enabled the configuration moves by four bytes", moves),
    pci("pci-legacy/any-width", "the configuration reads the same by any width", any_width),
    pci("pci-legacy/any-access", "accesses of any width to any port are answered", any_access).class(&[30, 31]),
    pci(
        "pci-legacy/bus-master",
        "without Bus Master Enable the device leaves memory alone, and with it goes on",
        bus_master,
    ),
    pci(
        "pci-legacy/other-interface",
        "what is written through the interface that is not in use changes nothing",
        other,
    ),
    pci("pci-legacy/shared-line", "devices on one interrupt line are each told, in any order", shared_line)
        .with(Variant::Crowd),
    mmio_case("mmio-legacy/identity", "magic value, version 1 and type", mmio_identity),
    mmio_case("mmio-legacy/queue-page", "QueuePFN says where a queue is, and 0 takes it back", queue_page),
    mmio_case("mmio-legacy/odd-places", "page sizes and alignments that cannot be do no harm", odd_places).class(&[29]),
    mmio_case("mmio-legacy/any-access", "accesses of any width at any offset are answered", mmio_any_access)
        .class(&[31]),
];

const fn pci(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).on(Applies::PCI_LEGACY)
}

const fn mmio_case(name: &'static str, about: &'static str, run: fn(&mut Session) -> Verdict) -> Case {
    Case::new(name, about, run).on(Applies::MMIO_LEGACY)
}

fn shared_line(session: &mut Session) -> Verdict {
    let neighbour = session.neighbour.take();
    let mut other = neighbour.ok_or_else(|| Objection::Skipped("no two devices share an interrupt line".into()))?;
    let mut rings = session.bring_up(Features::empty())?;
    let mut others = other.bring_up(Features::empty())?;
    for turn in 0..6 {
        // Both have something to tell before one of them is asked.
        let sample = offer(session, &mut rings)?;
        let of_other = offer(&other, &mut others)?;
        if turn % 2 == 0 {
            told(session, &mut rings, &sample)?;
            told(&mut other, &mut others, &of_other)?;
        } else {
            told(&mut other, &mut others, &of_other)?;
            told(session, &mut rings, &sample)?;
        }
    }
    Ok(Finding::Passed)
}

/// Waits for the interrupt of a sample, and takes it.
fn told(session: &mut Session, rings: &mut [Ring], sample: &Sample) -> Result<(), Objection> {
    session.wait_interrupt()?;
    let (id, len) = session.wait_used(&mut rings[usize::from(sample.queue)])?;
    ensure_eq("used id", id, 0)?;
    sample.check(session, len)
}

fn early(session: &mut Session) -> Verdict {
    session.negotiate(Features::empty())?;
    let mut rings = session.rings()?;
    serve(session, &mut rings)?;
    let status = session.transport.status()?;
    ensure(!status.contains(Status::DRIVER_OK), "a status without DRIVER_OK", format_args!("{status:?}"))?;
    session.go()?;
    serve_next(session, &mut rings)?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

/// The ports of the legacy interface.
const PORTS: u64 = region(0);

fn identity(session: &mut Session) -> Verdict {
    ensure_eq("vendor", session.get16(VENDOR_ID.into())?, 0x1af4)?;
    let id = session.get16(DEVICE_ID.into())?;
    ensure((0x1000..0x1040).contains(&id), "a device from 0x1000 to 0x103f", format_args!("{id:#x}"))?;
    ensure_eq("device", Some(id), transitional_id(session.cell.device_type))?;
    ensure_eq("revision", session.get(REVISION_ID.into())?, [0])?;
    ensure_eq("subsystem", session.get16(SUBSYSTEM_ID.into())?, session.cell.device_type as u16)?;
    let bar = session.get32(BARS.into())?;
    ensure(bar & BAR_IO != 0, "ports in the first region", format_args!("{bar:#x}"))?;
    Ok(Finding::Passed)
}

fn registers(session: &mut Session) -> Verdict {
    let offered = session.transport.device_features()?;
    let mut rings = session.bring_up(Features::EVENT_IDX)?;
    ensure_eq("features offered", session.get32(PORTS)?, offered.word(0))?;
    ensure_eq("features accepted", session.get32(PORTS + 4)?, (offered & Features::EVENT_IDX).word(0))?;
    for (queue, ring) in rings.iter().enumerate() {
        session.put(PORTS + 14, &(queue as u16).to_le_bytes())?;
        ensure_eq("queue select", session.get16(PORTS + 14)?, queue as u16)?;
        ensure_eq("the page of a queue", u64::from(session.get32(PORTS + 8)?) * 4096, ring.config.descriptors)?;
        ensure_eq("the size of a queue", session.get16(PORTS + 12)?, ring.config.size)?;
        ensure(
            matches!(ring.config.layout, Layout::Legacy(_)),
            "the legacy layout",
            format_args!("{:?}", ring.config),
        )?;
    }
    ensure_eq("status", session.get(PORTS + 18)?, [7])?;
    session.put(PORTS + 14, &0xffffu16.to_le_bytes())?;
    ensure_eq("the size of a queue that is not there", session.get16(PORTS + 12)?, 0)?;
    session.put(PORTS + 8, &1u32.to_le_bytes())?;
    ensure_eq("the page of a queue that is not there", session.get32(PORTS + 8)?, 0)?;
    serve(session, &mut rings)?;
    session.put(PORTS + 14, &[0, 0])?;
    session.put(PORTS + 8, &[0; 4])?;
    ensure_eq("the page of a queue that was taken back", session.get32(PORTS + 8)?, 0)?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

/// Waits until `bit` of the interrupt status shows in the header, and reads it.
fn take_isr(session: &Session) -> Result<u8, Objection> {
    let begun = std::time::Instant::now();
    while session.get16(STATUS.into())? & STATUS_INTERRUPT == 0 {
        ensure(begun.elapsed() < session.watchdog, "the interrupt bit in the header's status", "it stays 0")?;
        std::thread::yield_now();
    }
    session.get(PORTS + 19).map(|[isr]| isr)
}

fn isr(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::bit(0))?;
    serve_silently(session, &mut rings)?;
    ensure_eq("the interrupt status", take_isr(session)?, ISR_QUEUE)?;
    ensure_eq("the interrupt status, read again", session.get(PORTS + 19)?, [0])?;
    match session.cell.device_type {
        BLK => session.far_side.set_capacity(300)?,
        CONSOLE => session.far_side.resize(30, 30)?,
        _ => return Ok(Finding::Passed),
    }
    ensure_eq("the interrupt status", take_isr(session)?, ISR_CONFIG)?;
    ensure_eq("the interrupt status, read again", session.get(PORTS + 19)?, [0])?;
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn moves(session: &mut Session) -> Verdict {
    let found = session.capabilities(CAP_MSIX)?;
    let Some(at) = found.first() else { return Err(Objection::Skipped("the device has no MSI-X".into())) };
    let at = at + u64::from(MSIX_CONTROL);
    let control = session.get16(at)?;
    let before: [u8; 4] = session.get(PORTS + 20)?;
    session.put(at, &(control | MSIX_ENABLE).to_le_bytes())?;
    ensure_eq("the configuration at 24", session.get(PORTS + 24)?, before)?;
    ensure_eq("the vector of the configuration", session.get16(PORTS + 20)?, NO_VECTOR)?;
    session.put(PORTS + 20, &1u16.to_le_bytes())?;
    session.put(PORTS + 22, &0u16.to_le_bytes())?;
    ensure_eq("the vectors that were mapped", session.get32(PORTS + 20)?, 1)?;
    session.put(PORTS + 22, &0x7ffu16.to_le_bytes())?;
    ensure_eq("a vector that does not exist", session.get16(PORTS + 22)?, NO_VECTOR)?;
    session.put(at, &control.to_le_bytes())?;
    ensure_eq("the configuration at 20 again", session.get(PORTS + 20)?, before)?;
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn any_width(session: &mut Session) -> Verdict {
    let start = PORTS + 20;
    let words: [[u8; 4]; 2] = [session.get(start)?, session.get(start + 4)?];
    let halves: [[u8; 2]; 4] =
        [session.get(start)?, session.get(start + 2)?, session.get(start + 4)?, session.get(start + 6)?];
    ensure_eq("the configuration by 16 bits", halves.concat(), words.concat())?;
    let bytes: Vec<u8> = (0..8).map(|at| session.get::<1>(start + at).map(|[byte]| byte)).collect::<Result<_, _>>()?;
    ensure_eq("the configuration by bytes", bytes, words.concat())?;
    let odd: [[u8; 2]; 3] = [session.get(start + 1)?, session.get(start + 3)?, session.get(start + 5)?];
    ensure_eq("the configuration at odd ports", odd.concat(), words.concat()[1..7].to_vec())?;
    Ok(Finding::Passed)
}

fn any_access(session: &mut Session) -> Verdict {
    let rings = session.bring_up(Features::empty())?;
    for width in [1usize, 2, 4] {
        for at in (0..0x40).chain([0xfc, 0xff - width as u64]) {
            session.registers()?.load(PORTS + at, &mut vec![0; width])?;
            for byte in [0xff, 0x01, 0x00] {
                session.registers()?.store(PORTS + at, &vec![byte; width])?;
            }
        }
    }
    if session.cell.device_type == CONSOLE {
        // Emergency output may have been among it.
        session.far_side.output()?;
    }
    revive(session, rings)?;
    Ok(Finding::Passed)
}

/// What is written to modern registers while the ports are in use.
const TO_MODERN: [(u64, &[u8]); 6] = [
    (common::QUEUE_SELECT, &[0, 0]),
    (common::QUEUE_SIZE, &[1, 0]),
    (common::QUEUE_RESET, &[1, 0]),
    (common::QUEUE_DESC, &[0; 4]),
    (common::DRIVER_FEATURE, &[0xff; 4]),
    (common::DEVICE_STATUS, &[0x80]),
];
/// What is written to ports while the modern registers are in use.
const TO_PORTS: [(u64, &[u8]); 6] = [
    (legacy::QUEUE_SELECT, &[0, 0]),
    (legacy::QUEUE_ADDRESS, &[0; 4]),
    (legacy::QUEUE_ADDRESS, &[1, 0, 0, 0]),
    (legacy::DRIVER_FEATURES, &[0xff; 4]),
    (legacy::DEVICE_STATUS, &[0x80]),
    (legacy::QUEUE_SELECT, &[0xff; 2]),
];

fn other(session: &mut Session) -> Verdict {
    if session.capabilities(CAP_VENDOR)?.is_empty() {
        return Err(Objection::Skipped("the device has no other interface".into()));
    }
    let common = session.common(0)?;
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    let words = |session: &Session, start: u64, end: u64| -> Result<Vec<u32>, Objection> {
        (start..end).step_by(4).map(|at| session.get32(at)).collect()
    };
    // Up to the doorbell, and the status.
    let ports =
        |session: &Session| Ok::<_, Objection>((words(session, PORTS, PORTS + 16)?, session.get::<1>(PORTS + 18)?));
    let before = ports(session)?;
    for (field, data) in TO_MODERN {
        session.put(common + field, data)?;
        ensure_eq("the ports, which are in use,", ports(session)?, before.clone())?;
    }
    serve_next(session, &mut rings)?;

    session.transport.reset()?;
    drop(rings);
    let queue = crate::raw::Memory::new(session, 0x4000, polyvirt_core::memory::Access::all())?;
    let start = queue.address.next_multiple_of(0x1000);
    for (field, data) in [
        (common::DEVICE_STATUS, &[3][..]),
        (common::DRIVER_FEATURE_SELECT, &[0; 4]),
        (common::DRIVER_FEATURE, &[0; 4]),
        // VIRTIO_F_VERSION_1.
        (common::DRIVER_FEATURE_SELECT, &[1, 0, 0, 0]),
        (common::DRIVER_FEATURE, &[1, 0, 0, 0]),
        (common::DEVICE_STATUS, &[11]),
        (common::QUEUE_SELECT, &[0, 0]),
        (common::QUEUE_SIZE, &[4, 0]),
        (common::QUEUE_DESC, &(start as u32).to_le_bytes()),
        (common::QUEUE_DESC + 4, &((start >> 32) as u32).to_le_bytes()),
        (common::QUEUE_DRIVER, &(start as u32 + 0x1000).to_le_bytes()),
        (common::QUEUE_DRIVER + 4, &((start >> 32) as u32).to_le_bytes()),
        (common::QUEUE_DEVICE, &(start as u32 + 0x2000).to_le_bytes()),
        (common::QUEUE_DEVICE + 4, &((start >> 32) as u32).to_le_bytes()),
        (common::QUEUE_ENABLE, &[1, 0]),
        (common::DEVICE_STATUS, &[15]),
    ] {
        session.put(common + field, data)?;
    }
    let before = words(session, common, common + common::QUEUE_NOTIF_CONFIG_DATA)?;
    ensure_eq("device_status", session.get(common + common::DEVICE_STATUS)?, [15])?;
    ensure_eq("queue_enable", session.get16(common + common::QUEUE_ENABLE)?, 1)?;
    for (register, data) in TO_PORTS {
        session.put(PORTS + register, data)?;
        let now = words(session, common, common + common::QUEUE_NOTIF_CONFIG_DATA)?;
        ensure_eq("the modern registers, which are in use,", now, before.clone())?;
    }
    // A legacy driver begins with a reset, which has to count.
    revive(session, Vec::new())?;
    Ok(Finding::Passed)
}

fn mmio_identity(session: &mut Session) -> Verdict {
    ensure_eq("MagicValue", session.get32(mmio::MAGIC_VALUE)?, 0x7472_6976)?;
    ensure_eq("Version", session.get32(mmio::VERSION)?, 1)?;
    ensure_eq("DeviceID", session.get32(mmio::DEVICE_ID)?, session.cell.device_type)?;
    session.put(mmio::DEVICE_FEATURES_SEL, &1u32.to_le_bytes())?;
    ensure_eq("HostFeatures beyond the first word", session.get32(mmio::DEVICE_FEATURES)?, 0)?;
    Ok(Finding::Passed)
}

fn queue_page(session: &mut Session) -> Verdict {
    let mut rings = session.bring_up(Features::empty())?;
    serve(session, &mut rings)?;
    for (queue, ring) in rings.iter().enumerate() {
        session.put(mmio::QUEUE_SEL, &(queue as u32).to_le_bytes())?;
        let page = session.get32(mmio::LEGACY_QUEUE_PAGE)?;
        ensure_eq("the page of a queue", u64::from(page) * 4096, ring.config.descriptors)?;
    }
    session.put(mmio::LEGACY_QUEUE_PAGE, &[0; 4])?;
    ensure_eq("the page of a queue that was taken back", session.get32(mmio::LEGACY_QUEUE_PAGE)?, 0)?;
    session.transport.reset()?;
    for queue in 0..session.queues() {
        session.put(mmio::QUEUE_SEL, &u32::from(queue).to_le_bytes())?;
        ensure_eq("the page of a queue after a reset", session.get32(mmio::LEGACY_QUEUE_PAGE)?, 0)?;
    }
    revive(session, rings)?;
    Ok(Finding::Passed)
}

fn odd_places(session: &mut Session) -> Verdict {
    for (page_size, align) in [(0, 4096u32), (3, 4096), (4096, 0), (4096, 3), (u32::MAX, 1), (1 << 31, 1 << 31), (1, 1)]
    {
        session.negotiate(Features::empty())?;
        session.put(mmio::LEGACY_PAGE_SIZE, &page_size.to_le_bytes())?;
        session.put(mmio::QUEUE_SEL, &[0; 4])?;
        session.put(mmio::LEGACY_QUEUE_ALIGN, &align.to_le_bytes())?;
        session.put(mmio::LEGACY_QUEUE_PAGE, &u32::MAX.to_le_bytes())?;
        session.get32(mmio::LEGACY_QUEUE_PAGE)?;
        session.go()?;
        session.put(mmio::QUEUE_NOTIFY, &[0; 4])?;
        session.get32(mmio::STATUS)?;
        revive(session, Vec::new())?;
        session.transport.reset()?;
    }
    Ok(Finding::Rejected)
}

fn mmio_any_access(session: &mut Session) -> Verdict {
    let rings = session.bring_up(Features::empty())?;
    for width in [1usize, 2, 4, 8] {
        for offset in (0..0x140).step_by(width).chain((1..0x140).step_by(9)).chain([mmio::BLOCK_SIZE - 8]) {
            session.registers()?.load(offset, &mut vec![0; width])?;
            for byte in [0x00, 0x01, 0xff] {
                session.registers()?.store(offset, &vec![byte; width])?;
            }
        }
    }
    if session.cell.device_type == CONSOLE {
        // Emergency output may have been among it.
        session.far_side.output()?;
    }
    revive(session, rings)?;
    Ok(Finding::Passed)
}
