//! The guests: what each is made of.

/// A guest: one boot of one kernel, with one or several disks.
#[derive(Debug)]
pub(crate) struct Guest {
    /// Its name on the command line, and its row in the report.
    pub(crate) name: &'static str,
    /// What is special about it, in a few words.
    pub(crate) about: &'static str,
    /// How its driver reaches the device.
    pub(super) transport: &'static str,
    /// Whose driver it is.
    pub(super) kernel: &'static Kernel,
    /// What runs the kernel.
    pub(super) machine: Machine,
    /// What it finds there, each a device of its own.
    pub(super) disks: &'static [Disk],
}

/// A kernel as Debian ships it.
#[derive(Debug, PartialEq)]
pub(super) struct Kernel {
    /// The package, or a package without content that depends on the current one.
    pub(super) package: &'static str,
    /// The architecture by Debian's name.
    pub(super) architecture: &'static str,
    /// The release it is from.
    pub(super) suite: &'static str,
    /// Where the package keeps the kernel: a folder and how the file's name begins.
    pub(super) image: (&'static str, &'static str),
    /// What has to be loaded, in this order, if it is not built in; what a module depends on comes before it by itself.
    pub(super) modules: &'static [&'static str],
}

/// What runs a kernel.
#[derive(Debug)]
pub(super) enum Machine {
    /// A machine that QEMU emulates instruction by instruction.
    Qemu(Qemu),
    /// The kernel is a process of the host: User Mode Linux.
    UserMode,
}

/// A machine of QEMU's.
#[derive(Debug)]
pub(super) struct Qemu {
    /// Debian's package.
    pub(super) package: &'static str,
    /// The program in it.
    pub(super) program: &'static str,
    /// `-M`, without the memory's name.
    pub(super) machine: &'static str,
    /// `-cpu`.
    pub(super) cpu: &'static str,
    /// MiB of memory.
    pub(super) memory: u32,
    /// What else the machine needs.
    pub(super) arguments: &'static [&'static str],
    /// How the machine's console is wired to the character device `console`.
    pub(super) console: [&'static str; 2],
    /// The console by the kernel's name.
    pub(super) tty: &'static str,
    /// The device that has its other half behind a socket.
    pub(super) device: &'static str,
    /// Whether a disk needs a function of System z's PCI in front of it.
    pub(super) zpci: bool,
}

/// One disk: a device, and what is asked of its driver.
#[derive(Debug)]
pub(super) struct Disk {
    /// Its name within the guest.
    pub(super) name: &'static str,
    /// Added to the machine's device.
    pub(super) options: &'static str,
    /// Feature bits that the driver has to have accepted.
    pub(super) features: &'static [u32],
}

/// VIRTIO_F_VERSION_1, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED (6).
const VERSION_1: u32 = 32;
const ACCESS_PLATFORM: u32 = 33;
const RING_PACKED: u32 = 34;

const SPLIT: Disk = Disk { name: "split", options: "", features: &[VERSION_1] };
const PACKED: Disk = Disk { name: "packed", options: ",packed=on", features: &[VERSION_1, RING_PACKED] };
const IOMMU: Disk = Disk { name: "iommu", options: ",iommu_platform=on", features: &[VERSION_1, ACCESS_PLATFORM] };

const STABLE: &str = "bookworm";
/// The first release with riscv64.
const NEXT: &str = "trixie";

static UML: Kernel = Kernel {
    package: "user-mode-linux",
    architecture: "amd64",
    suite: STABLE,
    image: ("usr/bin", "linux"),
    modules: &["virtio_blk"],
};
static X86: Kernel = Kernel {
    package: "linux-image-cloud-amd64",
    architecture: "amd64",
    suite: STABLE,
    image: ("boot", "vmlinuz-"),
    modules: &["virtio_pci", "virtio_mmio", "virtio_blk"],
};
static S390X: Kernel = Kernel {
    package: "linux-image-s390x",
    architecture: "s390x",
    suite: STABLE,
    image: ("boot", "vmlinuz-"),
    modules: &["crc32c_generic", "ext4", "virtio_pci", "virtio_blk"],
};
static PPC64LE: Kernel = Kernel {
    package: "linux-image-powerpc64le",
    architecture: "ppc64el",
    suite: STABLE,
    image: ("boot", "vmlinux-"),
    modules: &["crc32c_generic", "ext4", "virtio_pci", "virtio_blk"],
};
static AARCH64: Kernel = Kernel {
    package: "linux-image-cloud-arm64",
    architecture: "arm64",
    suite: STABLE,
    image: ("boot", "vmlinuz-"),
    modules: &["virtio_mmio", "virtio_blk"],
};
static RISCV64: Kernel = Kernel {
    package: "linux-image-riscv64",
    architecture: "riscv64",
    suite: NEXT,
    image: ("boot", "vmlinu"),
    modules: &["crc32c_generic", "ext4", "virtio_mmio", "virtio_blk"],
};

/// virtio-mmio of version 2: version 1 has only the legacy interface (4.2.4).
const MODERN_MMIO: [&str; 2] = ["-global", "virtio-mmio.force-legacy=false"];
const SERIAL: [&str; 2] = ["-serial", "chardev:console"];
const PCI_DISK: &str = "vhost-user-blk-pci,disable-legacy=on";
const MMIO_DISK: &str = "vhost-user-blk";

static GUESTS: [Guest; 7] = [
    Guest {
        name: "uml",
        about: "User Mode Linux: the kernel is a process, and speaks vhost-user itself",
        transport: "vhost-user",
        kernel: &UML,
        machine: Machine::UserMode,
        disks: &[SPLIT],
    },
    Guest {
        name: "x86-pc",
        about: "the firmware's own driver comes first, then Linux virtio-pci",
        transport: "pci",
        kernel: &X86,
        machine: Machine::Qemu(Qemu {
            package: "qemu-system-x86",
            program: "qemu-system-x86_64",
            machine: "pc",
            cpu: "max",
            memory: 512,
            arguments: &[],
            console: SERIAL,
            tty: "ttyS0",
            device: PCI_DISK,
            zpci: false,
        }),
        disks: &[SPLIT, PACKED],
    },
    Guest {
        name: "x86-microvm",
        about: "virtio-mmio",
        transport: "mmio",
        kernel: &X86,
        machine: Machine::Qemu(Qemu {
            package: "qemu-system-x86",
            program: "qemu-system-x86_64",
            // ACPI is how a stock kernel finds virtio-mmio. qboot, since SeaBIOS's driver puts its buffers where the
            // machine has no shared memory.
            machine: "microvm,acpi=on",
            cpu: "max",
            memory: 512,
            arguments: &["-bios", "qboot.rom", MODERN_MMIO[0], MODERN_MMIO[1]],
            console: SERIAL,
            tty: "ttyS0",
            device: MMIO_DISK,
            zpci: false,
        }),
        disks: &[SPLIT, PACKED],
    },
    Guest {
        name: "s390x",
        about: "big-endian, with little-endian rings",
        transport: "pci",
        kernel: &S390X,
        machine: Machine::Qemu(Qemu {
            package: "qemu-system-s390x",
            program: "qemu-system-s390x",
            machine: "s390-ccw-virtio",
            cpu: "max",
            memory: 512,
            arguments: &[],
            console: ["-device", "sclpconsole,chardev=console"],
            tty: "ttysclp0",
            device: PCI_DISK,
            zpci: true,
        }),
        disks: &[SPLIT, PACKED],
    },
    Guest {
        name: "ppc64le",
        about: "pseries; once with every access through the IOMMU",
        transport: "pci",
        kernel: &PPC64LE,
        machine: Machine::Qemu(Qemu {
            package: "qemu-system-ppc",
            program: "qemu-system-ppc64",
            // x-vof: no firmware to run. The other options are mitigations that TCG does not have and warns about.
            machine: "pseries,x-vof=on,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
            cpu: "power9",
            memory: 1024,
            arguments: &[],
            console: ["-device", "spapr-vty,chardev=console"],
            tty: "hvc0",
            device: PCI_DISK,
            zpci: false,
        }),
        disks: &[SPLIT, PACKED, IOMMU],
    },
    Guest {
        name: "aarch64",
        about: "virtio-mmio found in the device tree",
        transport: "mmio",
        kernel: &AARCH64,
        machine: Machine::Qemu(Qemu {
            package: "qemu-system-arm",
            program: "qemu-system-aarch64",
            machine: "virt",
            cpu: "cortex-a57",
            memory: 512,
            arguments: &MODERN_MMIO,
            console: SERIAL,
            tty: "ttyAMA0",
            device: MMIO_DISK,
            zpci: false,
        }),
        disks: &[SPLIT, PACKED],
    },
    Guest {
        name: "riscv64",
        about: "virtio-mmio found in the device tree, and a newer kernel",
        transport: "mmio",
        kernel: &RISCV64,
        machine: Machine::Qemu(Qemu {
            package: "qemu-system-riscv",
            program: "qemu-system-riscv64",
            machine: "virt",
            cpu: "rv64",
            memory: 1024,
            arguments: &MODERN_MMIO,
            console: SERIAL,
            tty: "ttyS0",
            device: MMIO_DISK,
            zpci: false,
        }),
        disks: &[SPLIT, PACKED],
    },
];

/// All of them, in the order in which they are run.
pub(crate) fn guests() -> &'static [Guest] {
    &GUESTS
}
