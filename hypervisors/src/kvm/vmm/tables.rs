//! The ACPI tables: processors, interrupt controllers, power control, the PCI bus or the memory-mapped devices.

use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use polyvirt_core::memory::Pages;
use polyvirt_transports::mmio::Place;
use polyvirt_transports::mmio::registers::PLACE_SIZE;
use polyvirt_transports::pci::registers::pin_line;

use super::super::abi::{APIC, PCI};
use super::super::machine::pin_of_line;
use super::{VmmError, map};

const OEM: [u8; 6] = *b"PLYVRT";
const OEM_TABLE: [u8; 8] = *b"POLYVIRT";
const REVISION: u32 = 1;
/// FADT: there is no VGA, no CMOS clock, and (bit 1) no keyboard controller; what is on ISA there is (bit 0).
const BOOT_ARCHITECTURE: u16 = 1 | 1 << 2 | 1 << 5;

/// Writes the tables of a machine with `cpus` processors into `ram`: with a PCI bus, or with devices at `places`.
pub(super) fn write(ram: &Pages, cpus: u8, places: Option<&[Place]>) -> Result<(), VmmError> {
    // The pointer to all others comes first, where it is looked for.
    let mut next = map::TABLES + 0x40;
    let mut put = |table: &dyn Aml| {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = next;
        next = (at + bytes.len() as u64).next_multiple_of(64);
        if next > map::TABLES_END {
            return Err(VmmError::Room { what: "ACPI tables", needed: next, there: map::TABLES_END });
        }
        ram.write(at as usize, &bytes)?;
        Ok(at)
    };
    let facs = put(&FACS::new())?;
    let dsdt = put(&dsdt(places))?;
    let fadt = put(&fadt(facs, dsdt))?;
    let madt = put(&madt(cpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    [fadt, madt].into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = put(&xsdt)?;
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    ram.write(map::TABLES as usize, &root)?;
    Ok(())
}

fn fadt(facs: u64, dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .firmware_ctrl_32(facs as u32)
        .dsdt_32(dsdt as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = map::PM_LINE.into();
    (fadt.pm1a_evt_blk, fadt.pm1_evt_len) = (u32::from(map::PM_EVENTS).into(), 4);
    (fadt.pm1a_cnt_blk, fadt.pm1_cnt_len) = (u32::from(map::PM_CONTROL).into(), 2);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, map::KEYBOARD.into());
    fadt.reset_value = map::KEYBOARD_RESET;
    fadt.finalize()
}

fn madt(cpus: u8) -> impl Aml {
    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(APIC as u32));
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(cpus, map::IOAPIC, 0));
    madt
}

/// What is there, in ACPI's own language.
fn dsdt(places: Option<&[Place]>) -> impl Aml {
    let mut body = Vec::new();
    let sleep: [&dyn Aml; 4] = [&map::SLEEP_OFF, &map::SLEEP_OFF, &aml::ZERO, &aml::ZERO];
    Name::new("_S5_".into(), &Package::new(sleep.to_vec())).to_aml_bytes(&mut body);
    serial(&mut body);
    match places {
        None => pci_bus(&mut body),
        Some(places) => places.iter().for_each(|place| memory_mapped(*place, &mut body)),
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&body);
    dsdt
}

fn in_system_bus(name: &str, children: Vec<&dyn Aml>, sink: &mut dyn AmlSink) {
    Scope::new("_SB_".into(), vec![&Device::new(name.into(), children)]).to_aml_bytes(sink);
}

fn serial(sink: &mut dyn AmlSink) {
    let resources: [&dyn Aml; 2] =
        [&Interrupt::new(true, true, false, false, map::SERIAL_LINE), &IO::new(map::SERIAL, map::SERIAL, 0, 8)];
    let (id, number) = (Name::new("_HID".into(), &EISAName::new("PNP0501")), Name::new("_UID".into(), &aml::ZERO));
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(resources.to_vec()));
    in_system_bus("COM1", vec![&id, &number, &resources], sink);
}

/// A virtio device in memory, as QEMU's virt machines have them too.
fn memory_mapped(place: Place, sink: &mut dyn AmlSink) {
    let (line, base) = (pin_of_line(place.line), place.base as u32);
    let resources: [&dyn Aml; 2] =
        [&Memory32Fixed::new(true, base, PLACE_SIZE as u32), &Interrupt::new(true, true, false, false, line)];
    let (id, number) = (Name::new("_HID".into(), &"LNRO0005"), Name::new("_UID".into(), &place.line));
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(resources.to_vec()));
    in_system_bus(&format!("V{:03}", place.line), vec![&id, &number, &resources], sink);
}

fn pci_bus(sink: &mut dyn AmlSink) {
    let (io, memory) = (PCI.io, PCI.memory);
    let read_write = true;
    let resources: [&dyn Aml; 5] = [
        &AddressSpace::new_bus_number(0u16, 0u16),
        &IO::new(0xcf8, 0xcf8, 1, 8),
        &AddressSpace::new_io(0u16, 0xcf7, None),
        &AddressSpace::new_io(io.start as u16, (io.end - 1) as u16, None),
        &AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            read_write,
            memory.start as u32,
            (memory.end - 1) as u32,
            None,
        ),
    ];
    // Pin A of each device: where its interrupt goes.
    let pins: Vec<_> = (1..32u32).map(|device| (device << 16 | 0xffff, pin_of_line(pin_line(device as u8)))).collect();
    let routes: Vec<_> =
        pins.iter().map(|(device, pin)| Package::new(vec![device, &aml::ZERO, &aml::ZERO, pin])).collect();
    let routes = Package::new(routes.iter().map(|route| route as &dyn Aml).collect());
    in_system_bus(
        "PCI0",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_BBN".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources.to_vec())),
            &Name::new("_PRT".into(), &routes),
        ],
        sink,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(ram: &Pages, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.read(at as usize, &mut bytes).unwrap();
        bytes
    }

    /// The table at `at`; its bytes add up to 0.
    fn table(ram: &Pages, at: u64) -> Vec<u8> {
        let len = u32::from_le_bytes(bytes(ram, at + 4, 4).try_into().unwrap());
        let table = bytes(ram, at, len as usize);
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        table
    }

    fn pointers(table: &[u8]) -> Vec<u64> {
        table[36..].chunks_exact(8).map(|pointer| u64::from_le_bytes(pointer.try_into().unwrap())).collect()
    }

    #[test]
    fn every_table_is_found_from_the_first_and_adds_up() {
        let place = Place { base: 0xd000_0000, line: 0 };
        for places in [None, Some(&[place, Place { base: 0xd000_1000, line: 1 }][..])] {
            let ram = Pages::allocate(1 << 20);
            write(&ram, 3, places).unwrap();
            let root = bytes(&ram, map::TABLES, 36);
            assert_eq!(&root[..8], b"RSD PTR ");
            assert_eq!(root.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            let xsdt = table(&ram, u64::from_le_bytes(root[24..32].try_into().unwrap()));
            let [fadt, madt] = pointers(&xsdt)[..] else { panic!("two tables") };
            let (fadt, madt) = (table(&ram, fadt), table(&ram, madt));
            assert_eq!((&fadt[..4], &madt[..4]), (&b"FACP"[..], &b"APIC"[..]));
            assert_eq!(madt.len(), 44 + 3 * 8 + 12, "three processors and an I/O APIC");
            let dsdt = table(&ram, u32::from_le_bytes(fadt[40..44].try_into().unwrap()).into());
            assert_eq!(&dsdt[..4], b"DSDT");
            let count = |name: &[u8]| dsdt.windows(name.len()).filter(|window| *window == name).count();
            assert_eq!((count(b"PCI0"), count(b"LNRO0005")), if places.is_none() { (1, 0) } else { (0, 2) });
        }
    }
}
