//! The guests: what each is made of.

use std::fmt::{self, Display, Formatter};

use super::parts::{EMULATORS, Part};

/// A guest: one boot of one kernel, with one or several devices.
#[derive(Debug)]
pub(crate) struct Guest {
    /// Its name on the command line, and its row in the report.
    pub(crate) name: &'static str,
    /// What is special about it, in a few words.
    pub(crate) about: &'static str,
    /// How its driver reaches the device.
    pub(super) transport: &'static str,
    /// Whose driver it is, but where it is the firmware's.
    pub(super) kernel: &'static Kernel,
    /// What runs the kernel.
    pub(super) machine: Machine,
    /// What it finds there.
    pub(super) devices: &'static [Device],
}

/// A kernel as Debian ships it.
#[derive(Debug, PartialEq)]
pub(super) struct Kernel {
    /// The package, or a package without content that depends on the current one.
    pub(super) package: &'static str,
    /// What is special about its modules, so that it is kept beside others of its package.
    pub(super) purpose: &'static str,
    /// The architecture by Debian's name.
    pub(super) architecture: &'static str,
    /// The release it is from.
    pub(super) suite: &'static str,
    /// Where the package keeps the kernel: a folder and how the file's name begins.
    pub(super) image: (&'static str, &'static str),
    /// What has to be loaded, in this order, if it is not built in; what a module depends on comes before it by itself.
    /// The devices' own drivers come after these.
    pub(super) modules: &'static [&'static str],
}

impl Guest {
    /// The queues of each of its disks.
    pub(super) fn queues(&self) -> u32 {
        match &self.machine {
            Machine::Qemu(machine) => machine.processors,
            Machine::Xen(_)
            | Machine::Dom0(_)
            | Machine::DomU(_)
            | Machine::Nested(_)
            | Machine::KvmHost(_)
            | Machine::Firmware(_)
            | Machine::UserMode => 1,
        }
    }
}

/// What runs a kernel.
#[derive(Debug)]
pub(super) enum Machine {
    /// A machine that QEMU emulates instruction by instruction.
    Qemu(Qemu),
    /// A machine of QEMU's whose kernel is Xen: domain 0 serves the guest, which is another domain.
    Xen(Xen),
    /// A machine of QEMU's whose kernel is Xen: the suite runs in domain 0, cell by cell.
    Dom0(Qemu),
    /// A machine of QEMU's whose kernel is Xen: domain 0 serves PV domains, which have our own drivers.
    DomU(Qemu),
    /// A machine of QEMU's whose kernel has KVM: this program's VMM runs the guest there.
    Nested(Nested),
    /// A machine of QEMU's whose kernel has KVM: the suite runs there.
    KvmHost(Nested),
    /// A machine of QEMU's without a kernel: its firmware uses the disk.
    Firmware(Firmware),
    /// The kernel is a process of the host: User Mode Linux.
    UserMode,
}

/// A machine of QEMU's.
#[derive(Debug)]
pub(super) struct Qemu {
    /// Debian's package.
    pub(super) package: &'static str,
    /// The release that it is from.
    pub(super) suite: &'static str,
    /// The program in it.
    pub(super) program: &'static str,
    /// `-M`, without the memory's name.
    pub(super) machine: &'static str,
    /// `-cpu`.
    pub(super) cpu: &'static str,
    /// Processors, each with a queue of its own on every disk.
    pub(super) processors: u32,
    /// MiB of memory.
    pub(super) memory: u32,
    /// What else the machine needs.
    pub(super) arguments: &'static [&'static str],
    /// How the machine's console is wired to the character device `console`.
    pub(super) console: [&'static str; 2],
    /// The console by the kernel's name.
    pub(super) tty: &'static str,
    /// What the devices are plugged into.
    pub(super) bus: Bus,
    /// How the line begins in which firmware with a virtio driver of its own tells a disk that it has set up; it ends
    /// with `s=` and the disk's sectors.
    pub(super) firmware: Option<&'static str>,
}

impl Qemu {
    /// What emulates it.
    pub(super) fn emulator(&self) -> Part {
        Part::Emulator(self.package, self.suite)
    }
}

/// A machine of QEMU's that runs Xen.
#[derive(Debug)]
pub(super) struct Xen {
    /// Debian's package.
    pub(super) package: &'static str,
    /// The release that it is from.
    pub(super) suite: &'static str,
    /// The program in it.
    pub(super) program: &'static str,
    /// `-cpu`.
    pub(super) cpu: &'static str,
    /// The guest's configuration, as xl has it.
    pub(super) domain: &'static str,
}

impl Xen {
    /// What emulates it.
    pub(super) fn emulator(&self) -> Part {
        Part::Emulator(self.package, self.suite)
    }
}

/// A machine of QEMU's whose firmware has a virtio driver of its own.
#[derive(Debug)]
pub(super) struct Firmware {
    /// What it runs on.
    pub(super) qemu: Qemu,
    /// The package with an UEFI firmware, and the file in it; without one, QEMU's own Open Firmware.
    pub(super) uefi: Option<(&'static str, &'static str)>,
}

/// A machine of QEMU's that is a host with KVM.
#[derive(Debug)]
pub(super) struct Nested {
    /// Debian's package.
    pub(super) package: &'static str,
    /// The program in it.
    pub(super) program: &'static str,
    /// `-cpu`.
    pub(super) cpu: &'static str,
    /// The host's kernel.
    pub(super) kernel: &'static Kernel,
    /// Whether the guest's devices offer packed rings.
    pub(super) packed: bool,
}

impl Nested {
    /// What emulates it.
    pub(super) fn emulator(&self) -> Part {
        Part::Emulator(self.package, EMULATORS)
    }
}

/// What a machine's devices are plugged into.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Bus {
    /// virtio over PCI, without the legacy interface.
    Pci,
    /// The same, with a function of System z's PCI in front of each device.
    Zpci,
    /// virtio over MMIO.
    Mmio,
}

/// One device, and what is asked of its driver.
#[derive(Debug)]
pub(super) struct Device {
    /// What it is.
    pub(super) kind: Kind,
    /// What is special about it, within the guest.
    pub(super) variant: &'static str,
    /// Added to the machine's device.
    pub(super) options: &'static str,
    /// Feature bits that the driver has to have accepted.
    pub(super) features: &'static [u32],
}

/// The devices of the lab.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// A disk.
    Blk,
    /// A source of entropy.
    Rng,
}

impl Kind {
    /// All of them.
    pub(super) const ALL: [Self; 2] = [Self::Blk, Self::Rng];

    /// As `polyvirt serve` and the report call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
            Self::Rng => "rng",
        }
    }

    /// The number of its type (5).
    pub(super) fn id(self) -> u32 {
        match self {
            Self::Blk => 2,
            Self::Rng => 4,
        }
    }

    /// The module of Linux that drives it.
    pub(super) fn driver(self) -> &'static str {
        match self {
            Self::Blk => "virtio_blk",
            Self::Rng => "virtio_rng",
        }
    }
}

impl Device {
    /// The format of its rings.
    pub(super) fn ring(&self) -> &'static str {
        if self.features.contains(&RING_PACKED) { "packed" } else { "split" }
    }

    /// Whether an IOMMU is between it and the guest's memory.
    pub(super) fn behind_iommu(&self) -> bool {
        self.features.contains(&ACCESS_PLATFORM)
    }

    /// How its driver reaches it, with an IOMMU in between or not.
    pub(super) fn transport(&self, guest: &Guest) -> String {
        let iommu = if self.behind_iommu() { "-iommu" } else { "" };
        format!("{}{iommu}", guest.transport)
    }
}

impl Display for Device {
    /// As the guest calls it: no other device of the guest has this name.
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}-{}", self.kind.name(), self.variant)
    }
}

/// VIRTIO_F_VERSION_1, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED (6).
pub(super) const VERSION_1: u32 = 32;
const ACCESS_PLATFORM: u32 = 33;
const RING_PACKED: u32 = 34;

const SPLIT: Device = blk("split", "", &[VERSION_1]);
const IOMMU: Device = blk("split", ",iommu_platform=on", &[VERSION_1, ACCESS_PLATFORM]);
const IOMMU_PACKED: Device = blk("packed", ",iommu_platform=on,packed=on", &[VERSION_1, ACCESS_PLATFORM, RING_PACKED]);
const PACKED: Device = blk("packed", ",packed=on", &[VERSION_1, RING_PACKED]);
/// User Mode Linux takes whatever is offered, and so does virtio-pci on Xen.
pub(super) const OFFERED_PACKED: Device = blk("packed", "", &[VERSION_1, RING_PACKED]);
/// And so does QEMU for this one.
const RNG: Device = Device { kind: Kind::Rng, variant: "packed", options: "", features: &[VERSION_1, RING_PACKED] };

const SPLIT_RNG: Device = Device { variant: "split", features: &[VERSION_1], ..RNG };
/// Without VERSION_1.
const LEGACY: Device = blk("split", "", &[]);
const LEGACY_RNG: Device = Device { features: &[], ..SPLIT_RNG };

const fn blk(variant: &'static str, options: &'static str, features: &'static [u32]) -> Device {
    Device { kind: Kind::Blk, variant, options, features }
}

pub(super) const STABLE: &str = "bookworm";
/// The first release with riscv64.
const NEXT: &str = "trixie";

static UML: Kernel = Kernel {
    package: "user-mode-linux",
    purpose: "",
    architecture: "amd64",
    suite: STABLE,
    image: ("usr/bin", "linux"),
    modules: &[],
};
static X86: Kernel = CLOUD;
const CLOUD: Kernel = Kernel {
    package: "linux-image-cloud-amd64",
    purpose: "",
    architecture: "amd64",
    suite: STABLE,
    image: ("boot", "vmlinuz-"),
    modules: &["virtio_pci", "virtio_mmio"],
};
/// A host with KVM. It has NVMe built in.
static KVM: Kernel = Kernel { purpose: "kvm", modules: &["irqbypass", "kvm", "kvm_amd"], ..CLOUD };
/// Of both domains.
static XEN: Kernel = Kernel {
    package: "linux-image-amd64",
    purpose: "",
    architecture: "amd64",
    suite: STABLE,
    image: ("boot", "vmlinuz-"),
    modules: &[
        "xen_privcmd",
        "xen_evtchn",
        "xen_gntdev",
        "xen_gntalloc",
        "xenfs",
        "nvme",
        "crc32c_generic",
        "ext4",
        "virtio_pci",
    ],
};
static S390X: Kernel = Kernel {
    package: "linux-image-s390x",
    purpose: "",
    architecture: "s390x",
    suite: STABLE,
    image: ("boot", "vmlinuz-"),
    modules: &["crc32c_generic", "ext4", "virtio_pci"],
};
static PPC64LE: Kernel = Kernel {
    package: "linux-image-powerpc64le",
    purpose: "",
    architecture: "ppc64el",
    suite: STABLE,
    image: ("boot", "vmlinux-"),
    modules: &["crc32c_generic", "ext4", "virtio_pci"],
};
static AARCH64: Kernel = Kernel {
    package: "linux-image-cloud-arm64",
    purpose: "",
    architecture: "arm64",
    suite: STABLE,
    image: ("boot", "vmlinuz-"),
    modules: &["virtio_mmio"],
};
static RISCV64: Kernel = Kernel {
    package: "linux-image-riscv64",
    purpose: "",
    architecture: "riscv64",
    suite: NEXT,
    image: ("boot", "vmlinu"),
    modules: &["crc32c_generic", "ext4", "virtio_mmio"],
};

/// virtio-mmio of version 2: version 1 has only the legacy interface (4.2.4).
const MODERN_MMIO: [&str; 2] = ["-global", "virtio-mmio.force-legacy=false"];
const SERIAL: [&str; 2] = ["-serial", "chardev:console"];
/// The guest's clock counts instructions. Linux on x86 measures its clocks against each other while it boots; on a busy
/// host, clocks that go by the host's do not agree, and it hangs.
pub(super) const OWN_TIME: [&str; 2] = ["-icount", "shift=2"];

const PSERIES: Qemu = Qemu {
    package: "qemu-system-ppc",
    suite: EMULATORS,
    program: "qemu-system-ppc64",
    // x-vof: no firmware to run. The other options are mitigations that TCG does not have and warns about.
    machine: "pseries,x-vof=on,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
    cpu: "power9",
    processors: 1,
    memory: 1024,
    arguments: &[],
    console: ["-device", "spapr-vty,chardev=console"],
    tty: "hvc0",
    bus: Bus::Pci,
    firmware: None,
};

const VIRT: Qemu = Qemu {
    package: "qemu-system-arm",
    suite: EMULATORS,
    program: "qemu-system-aarch64",
    machine: "virt",
    cpu: "cortex-a57",
    processors: 1,
    memory: 512,
    arguments: &MODERN_MMIO,
    console: SERIAL,
    tty: "ttyAMA0",
    bus: Bus::Mmio,
    firmware: None,
};

/// With Xen in place of a kernel.
const DOM0: Qemu = Qemu {
    package: "qemu-system-x86",
    // It takes a sixth less time for the many small steps of a PV domain than the one of backports.
    suite: STABLE,
    program: "qemu-system-x86_64",
    machine: "pc",
    // A plain one: with the large registers or the SHA instructions of others, two domains spoil each other's registers.
    // With random numbers, since domain 0 has no other source so early; by the name that says it is emulated.
    cpu: "qemu64,+rdrand,model-id=QEMU TCG CPU",
    processors: 1,
    memory: 768,
    arguments: &[],
    console: SERIAL,
    tty: "hvc0",
    bus: Bus::Pci,
    firmware: None,
};

const KVM_HOST: Nested = Nested {
    package: "qemu-system-x86",
    program: "qemu-system-x86_64",
    // Without nested page tables Linux does not start as a guest. With `max` an interrupt now and then comes to a guest
    // that has them off. Random numbers: nothing else gives any so early.
    cpu: "qemu64,+svm,+npt,+rdrand",
    kernel: &KVM,
    packed: false,
};

static GUESTS: [Guest; 18] = [
    Guest {
        name: "uml",
        about: "User Mode Linux: the kernel is a process, and speaks vhost-user itself",
        transport: "vhost-user",
        kernel: &UML,
        machine: Machine::UserMode,
        devices: &[SPLIT, OFFERED_PACKED, RNG],
    },
    Guest {
        name: "x86-pc",
        about: "the firmware's own driver comes first, then Linux virtio-pci",
        transport: "pci",
        kernel: &X86,
        machine: Machine::Qemu(Qemu {
            package: "qemu-system-x86",
            suite: EMULATORS,
            program: "qemu-system-x86_64",
            machine: "pc",
            cpu: "max",
            processors: 2,
            memory: 512,
            // The second and third line are what SeaBIOS tells, at a port of its own.
            arguments: &[
                OWN_TIME[0],
                OWN_TIME[1],
                "-chardev",
                "file,id=firmware,path=/dev/stderr",
                "-device",
                "isa-debugcon,iobase=0x402,chardev=firmware",
            ],
            console: SERIAL,
            tty: "ttyS0",
            bus: Bus::Pci,
            firmware: Some("drive "),
        }),
        devices: &[SPLIT, PACKED, RNG],
    },
    Guest {
        name: "x86-microvm",
        about: "virtio-mmio",
        transport: "mmio",
        kernel: &X86,
        machine: Machine::Qemu(Qemu {
            package: "qemu-system-x86",
            suite: EMULATORS,
            program: "qemu-system-x86_64",
            // ACPI is how a stock kernel finds virtio-mmio. qboot, since SeaBIOS's driver puts its buffers where the
            // machine has no shared memory.
            machine: "microvm,acpi=on",
            cpu: "max",
            processors: 1,
            memory: 512,
            arguments: &["-bios", "qboot.rom", MODERN_MMIO[0], MODERN_MMIO[1], OWN_TIME[0], OWN_TIME[1]],
            console: SERIAL,
            tty: "ttyS0",
            bus: Bus::Mmio,
            firmware: None,
        }),
        devices: &[SPLIT, PACKED],
    },
    Guest {
        name: "s390x",
        about: "big-endian, with little-endian rings",
        transport: "pci",
        kernel: &S390X,
        machine: Machine::Qemu(Qemu {
            package: "qemu-system-s390x",
            suite: EMULATORS,
            program: "qemu-system-s390x",
            machine: "s390-ccw-virtio",
            cpu: "max",
            processors: 1,
            memory: 512,
            arguments: &[],
            console: ["-device", "sclpconsole,chardev=console"],
            tty: "ttysclp0",
            bus: Bus::Zpci,
            firmware: None,
        }),
        devices: &[SPLIT, PACKED],
    },
    Guest {
        name: "ppc64le",
        about: "pseries",
        transport: "pci",
        kernel: &PPC64LE,
        machine: Machine::Qemu(PSERIES),
        devices: &[SPLIT, PACKED],
    },
    Guest {
        name: "ppc64le-iommu",
        about: "pseries, with every access through the IOMMU",
        transport: "pci",
        kernel: &PPC64LE,
        machine: Machine::Qemu(PSERIES),
        devices: &[IOMMU, IOMMU_PACKED],
    },
    Guest {
        name: "aarch64",
        about: "virtio-mmio found in the device tree",
        transport: "mmio",
        kernel: &AARCH64,
        machine: Machine::Qemu(VIRT),
        devices: &[SPLIT, PACKED],
    },
    Guest {
        name: "riscv64",
        about: "virtio-mmio found in the device tree, and a newer kernel",
        transport: "mmio",
        kernel: &RISCV64,
        machine: Machine::Qemu(Qemu {
            package: "qemu-system-riscv",
            suite: EMULATORS,
            program: "qemu-system-riscv64",
            machine: "virt",
            cpu: "rv64",
            processors: 1,
            memory: 1024,
            arguments: &MODERN_MMIO,
            console: SERIAL,
            tty: "ttyS0",
            bus: Bus::Mmio,
            firmware: None,
        }),
        devices: &[SPLIT, PACKED],
    },
    Guest {
        name: "xen-dom0",
        about: "the suite in domain 0 of Xen, whose two halves grant to each other through the hypervisor",
        transport: "xenbus",
        kernel: &XEN,
        machine: Machine::Dom0(DOM0),
        // Its cells are those of the suite.
        devices: &[],
    },
    Guest {
        name: "xen-domu",
        about: "a PV domain of Xen's with our own driver, destroyed while it writes, and the next one",
        transport: "xenbus",
        kernel: &XEN,
        machine: Machine::DomU(Qemu { memory: 2048, ..DOM0 }),
        devices: &[],
    },
    Guest {
        name: "xen-pvh",
        about: "a PVH domain of Xen's, served by its device model in domain 0",
        transport: "pci",
        kernel: &XEN,
        machine: Machine::Xen(Xen {
            package: "qemu-system-x86",
            // Later ones cannot run PVH domains: a read of CR2 is taken for one of CR0.
            suite: STABLE,
            program: "qemu-system-x86_64",
            // Without these, domain 0 starts, and PVH domains run.
            cpu: "qemu64,+svm,+npt",
            domain: include_str!("scripts/pvh.cfg"),
        }),
        devices: &[OFFERED_PACKED],
    },
    Guest {
        name: "kvm-nested",
        about: "our VMM on KVM, with a PCI bus of modern devices",
        transport: "pci",
        kernel: &X86,
        machine: Machine::Nested(Nested { packed: true, ..KVM_HOST }),
        devices: &[OFFERED_PACKED, RNG],
    },
    Guest {
        name: "kvm-nested",
        about: "our VMM on KVM, with a PCI bus of devices driven by their legacy interface",
        transport: "pci-legacy",
        kernel: &X86,
        machine: Machine::Nested(KVM_HOST),
        devices: &[LEGACY, LEGACY_RNG],
    },
    Guest {
        name: "kvm-nested",
        about: "our VMM on KVM, with devices in memory, found by ACPI",
        transport: "mmio",
        kernel: &X86,
        machine: Machine::Nested(KVM_HOST),
        devices: &[SPLIT, SPLIT_RNG],
    },
    Guest {
        name: "kvm-nested-suite",
        about: "the suite on KVM",
        transport: "pci",
        kernel: &KVM,
        machine: Machine::KvmHost(KVM_HOST),
        // Its cells are those of the suite.
        devices: &[],
    },
    Guest {
        name: "slof",
        about: "the Open Firmware of pseries, which reads the disk and writes on it",
        transport: "pci",
        kernel: &PPC64LE,
        machine: Machine::Firmware(Firmware {
            qemu: Qemu {
                machine: "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
                ..PSERIES
            },
            uefi: None,
        }),
        devices: &[],
    },
    Guest {
        name: "ovmf",
        about: "UEFI on x86-64, whose shell runs a script off the disk and copies a file there",
        transport: "pci",
        kernel: &X86,
        machine: Machine::Firmware(Firmware {
            qemu: Qemu {
                package: "qemu-system-x86",
                suite: EMULATORS,
                program: "qemu-system-x86_64",
                machine: "q35",
                cpu: "max",
                processors: 1,
                memory: 512,
                arguments: &[],
                console: SERIAL,
                tty: "",
                bus: Bus::Pci,
                firmware: None,
            },
            uefi: Some(("ovmf", "usr/share/ovmf/OVMF.fd")),
        }),
        devices: &[],
    },
    Guest {
        name: "aavmf",
        about: "UEFI on aarch64, whose shell runs a script off the disk and copies a file there",
        transport: "pci",
        kernel: &AARCH64,
        machine: Machine::Firmware(Firmware {
            qemu: Qemu { arguments: &[], tty: "", bus: Bus::Pci, ..VIRT },
            uefi: Some(("qemu-efi-aarch64", "usr/share/qemu-efi-aarch64/QEMU_EFI.fd")),
        }),
        devices: &[],
    },
];

/// All of them, in the order in which they are run.
pub(crate) fn guests() -> &'static [Guest] {
    &GUESTS
}
