//! Loads a kernel and what it is told, as the 64-bit boot protocol of Linux has it (Documentation/arch/x86/boot.rst).
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use polyvirt_core::memory::Pages;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::{Boot, VmmError, map};

/// Where the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub(super) u64);

/// The kernel can be entered in 64-bit mode, 0x200 behind where it is loaded (`XLF_KERNEL_64`).
const KERNEL_64: u16 = 1;
const PAGE: u64 = 0x1000;
/// Kinds of memory in the map that the kernel gets.
const USABLE: u32 = 1;
const RESERVED: u32 = 2;

/// Puts everything into `ram`, and says where to begin.
pub(super) fn load(ram: &Pages, boot: Boot) -> Result<Entry, VmmError> {
    let Boot { mut kernel, initrd, command_line, .. } = boot;
    let there = ram.len() as u64;
    let (entry, mut header, end) = load_kernel(ram, &mut kernel)?;
    let max = (header.cmdline_size as usize).clamp(255, map::COMMAND_LINE_MAX - 1);
    if command_line.len() > max {
        return Err(VmmError::CommandLine { len: command_line.len(), max });
    }
    ram.write(map::COMMAND_LINE as usize, command_line.as_bytes())?;
    ram.write(map::COMMAND_LINE as usize + command_line.len(), &[0])?;
    header.cmd_line_ptr = map::COMMAND_LINE as u32;
    header.type_of_loader = 0xff; // one that is not in the kernel's list
    if let Some(mut file) = initrd {
        let mut bytes = Vec::new();
        let unreadable = |error| VmmError::Read { what: "initial RAM disk", error };
        file.read_to_end(&mut bytes).map_err(unreadable)?;
        let len = bytes.len() as u64;
        // At the end of memory, in whole pages, where the kernel that is unpacked before it does not come.
        let start = there.checked_sub(len).map(|start| start & !(PAGE - 1)).filter(|start| *start >= end);
        let Some(start) = start else {
            return Err(VmmError::Room { what: "kernel with its initial RAM disk", needed: end + len + PAGE, there });
        };
        ram.write(start as usize, &bytes)?;
        (header.ramdisk_image, header.ramdisk_size) = (start as u32, len as u32);
    }
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: map::TABLES, ..boot_params::default() };
    let memory = [
        (0, map::LOW_END, USABLE),
        (map::LOW_END, map::HIGH - map::LOW_END, RESERVED),
        (map::HIGH, there - map::HIGH, USABLE),
    ];
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(memory) {
        *slot = boot_e820_entry { addr, size, r#type: kind };
    }
    params.e820_entries = memory.len() as u8;
    ram.write(map::ZERO_PAGE as usize, params.as_slice())?;
    write_tables(ram)?;
    Ok(entry)
}

/// The kernel itself: where it is entered, its header, and where the memory that it needs at first ends.
fn load_kernel(ram: &Pages, kernel: &mut File) -> Result<(Entry, setup_header, u64), VmmError> {
    let unreadable = |error| VmmError::Read { what: "kernel", error };
    let len = kernel.metadata().map_err(unreadable)?.len();
    let there = ram.len() as u64;
    if len + map::HIGH > there {
        return Err(VmmError::Room { what: "kernel", needed: len + map::HIGH, there });
    }
    let mut magic = Vec::new();
    kernel.by_ref().take(4).read_to_end(&mut magic).map_err(unreadable)?;
    kernel.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    let memory = view(ram)?;
    // The loader's errors, and those in them, all begin with the loader's name.
    let not_a_kernel =
        |error: linux_loader::loader::Error| VmmError::NotAKernel(error.to_string().replace("Kernel Loader: ", ""));
    let high = Some(GuestAddress(map::HIGH));
    if magic == *b"\x7fELF" {
        let KernelLoaderResult { kernel_load, kernel_end, .. } =
            Elf::load(&memory, None, kernel, high).map_err(not_a_kernel)?;
        // An ELF file has no header: these are what the protocol needs of it.
        let header = setup_header {
            boot_flag: 0xaa55,
            header: u32::from_le_bytes(*b"HdrS"),
            version: 0x20f,
            loadflags: 1,
            kernel_alignment: 0x100_0000,
            cmdline_size: map::COMMAND_LINE_MAX as u32 - 1,
            ..setup_header::default()
        };
        return Ok((Entry(kernel_load.0), header, kernel_end));
    }
    let loaded = BzImage::load(&memory, None, kernel, high).map_err(not_a_kernel)?;
    let header = loaded.setup_header.unwrap_or_default();
    let (flags, version) = (header.xloadflags, header.version);
    if version < 0x20c || flags & KERNEL_64 == 0 {
        return Err(VmmError::NotAKernel("it cannot be entered in 64-bit mode".into()));
    }
    // It unpacks itself to where it prefers to be, and needs this much there.
    let (preferred, unpacked) = (header.pref_address, header.init_size);
    let end = loaded.kernel_end.max(preferred.saturating_add(unpacked.into()));
    if end > there {
        return Err(VmmError::Room { what: "kernel", needed: end, there });
    }
    Ok((Entry(loaded.kernel_load.0 + 0x200), header, end))
}

/// `ram` as rust-vmm's loader wants it, from address 0 on.
fn view(ram: &Pages) -> Result<GuestMemoryMmap, VmmError> {
    let rights = (nix::libc::PROT_READ | nix::libc::PROT_WRITE, nix::libc::MAP_SHARED | nix::libc::MAP_ANONYMOUS);
    // SAFETY: mapped with these rights and this length, and `ram` outlives what is returned, which is gone when the kernel is
    // loaded; nobody has a reference to the bytes.
    let region = unsafe { MmapRegion::build_raw(ram.as_ptr(), ram.len(), rights.0, rights.1) };
    let region = region.map_err(|error| VmmError::NotAKernel(error.to_string()))?;
    let region = GuestRegionMmap::new(region, GuestAddress(0));
    let region = region.ok_or_else(|| VmmError::NotAKernel("memory that wraps around".into()))?;
    GuestMemoryMmap::from_regions(vec![region]).map_err(|error| VmmError::NotAKernel(error.to_string()))
}

/// The descriptors and page tables that the kernel is entered with: flat segments, the first 4 GiB where they are.
fn write_tables(ram: &Pages) -> Result<(), VmmError> {
    // None, none, code (64 bits), data, task.
    let descriptors = [0u64, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
    for (index, descriptor) in descriptors.into_iter().enumerate() {
        ram.write(map::GDT as usize + 8 * index, &descriptor.to_le_bytes())?;
    }
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let put = |table: u64, index: u64, entry: u64| ram.write((table + 8 * index) as usize, &entry.to_le_bytes());
    let second = map::PAGE_TABLES + PAGE;
    put(map::PAGE_TABLES, 0, second | PRESENT_WRITABLE)?;
    for gibibyte in 0..4 {
        let third = second + PAGE * (1 + gibibyte);
        put(second, gibibyte, third | PRESENT_WRITABLE)?;
        for page in 0..512 {
            put(third, page, ((gibibyte << 30) + (page << 21)) | LARGE | PRESENT_WRITABLE)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn boot(kernel: &[u8], initrd: Option<&[u8]>) -> Boot {
        let file = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            file.seek(SeekFrom::Start(0)).unwrap();
            file
        };
        Boot { kernel: file(kernel), initrd: initrd.map(file), command_line: "quiet".into(), pci: true }
    }

    /// A bzImage of `code` bytes, which unpacks itself to 1 MiB at 2 MiB.
    fn bzimage(code: usize) -> Vec<u8> {
        let mut image = vec![0; 0x400 + code];
        let header = setup_header {
            setup_sects: 1,
            boot_flag: 0xaa55,
            header: u32::from_le_bytes(*b"HdrS"),
            version: 0x20f,
            loadflags: 1,
            xloadflags: KERNEL_64,
            code32_start: map::HIGH as u32,
            pref_address: 2 << 20,
            init_size: 1 << 20,
            cmdline_size: 300,
            ..setup_header::default()
        };
        image[0x1f1..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
        image[0x400..].fill(0x90);
        image
    }

    fn word(ram: &Pages, at: u64) -> u32 {
        let mut bytes = [0; 4];
        ram.read(at as usize, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_kernel_its_command_line_and_its_ram_disk_are_where_the_header_says() {
        let ram = Pages::allocate(8 << 20);
        assert_eq!(load(&ram, boot(&bzimage(0x800), Some(&[7; 5000]))).unwrap(), Entry(map::HIGH + 0x200));
        assert_eq!(word(&ram, map::HIGH + 0x200), 0x9090_9090);
        assert_eq!(word(&ram, map::COMMAND_LINE), u32::from_le_bytes(*b"quie"));
        let (image, size) = (word(&ram, map::ZERO_PAGE + 0x218), word(&ram, map::ZERO_PAGE + 0x21c));
        assert_eq!((image % 0x1000, size), (0, 5000));
        assert_eq!((word(&ram, image.into()), image + size <= 8 << 20), (0x0707_0707, true));
        assert_eq!(word(&ram, map::ZERO_PAGE + 0x228), map::COMMAND_LINE as u32);
    }

    #[test]
    fn what_is_no_kernel_or_has_no_room_is_told_in_a_sentence() {
        let ram = Pages::allocate(4 << 20);
        let told = |boot: Boot| load(&ram, boot).unwrap_err().to_string();
        for wrong in [b"#!/bin/sh\n" as &[_], b"\x7fELF but no more", b""] {
            let told = told(boot(wrong, None));
            assert!(told.contains("neither a bzImage nor an ELF file"), "{told}");
            assert!(told.contains("failed to load") && !told.contains("Kernel Loader"), "{told}");
        }
        assert!(told(boot(&bzimage(4 << 20), None)).contains("--mem"));
        assert!(told(boot(&bzimage(0x800), Some(&vec![0; 2 << 20]))).contains("--mem"));
        let mut old = bzimage(0x800);
        old[0x236..0x238].fill(0);
        assert!(told(boot(&old, None)).contains("64-bit mode"));
        let long = Boot { command_line: "x".repeat(301), ..boot(&bzimage(0x800), None) };
        assert_eq!(told(long), "a command line of 301 bytes, and the kernel takes 300");
    }
}
