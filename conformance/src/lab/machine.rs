//! The command that boots a guest.

use std::env::consts;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::guests::{Bus, Device, Guest, Kind, Machine, Qemu};
use super::parts::Part;
use super::{Cache, LabError, libraries, tool};

/// What a boot needs besides the machine.
pub(super) struct Boot<'a> {
    /// The kernel's image.
    pub(super) kernel: &'a Path,
    /// Its first file system.
    pub(super) initramfs: &'a Path,
    /// Each device with the socket behind which it is served.
    pub(super) devices: &'a [(&'a Device, PathBuf)],
    /// A folder for what the machine writes.
    pub(super) folder: &'a Path,
}

/// The command that boots `guest`.
pub(super) fn command(guest: &Guest, cache: &Cache, boot: &Boot<'_>) -> Result<Command, LabError> {
    match &guest.machine {
        Machine::Qemu(machine) => Ok(qemu(machine, cache, boot)),
        Machine::Xen(_) | Machine::Dom0(_) | Machine::DomU(_) => {
            Err(LabError::Host("domain 0 serves the devices of a guest on Xen".to_owned()))
        }
        Machine::Nested(_) | Machine::KvmHost(_) => {
            Err(LabError::Host("the host serves the devices of a guest on KVM".to_owned()))
        }
        Machine::Firmware(_) => Err(LabError::Host("a firmware boots no kernel".to_owned())),
        Machine::UserMode if consts::ARCH == "x86_64" => Ok(user_mode(boot)),
        Machine::UserMode => {
            Err(LabError::Host(format!("Debian's User Mode Linux runs on x86_64, not on {}", consts::ARCH)))
        }
    }
}

/// The name and version of what emulates the machine; none for a kernel that is a process.
pub(super) fn version(guest: &Guest, cache: &Cache) -> Option<String> {
    let mut emulator = match &guest.machine {
        Machine::Qemu(machine) | Machine::Dom0(machine) | Machine::DomU(machine) => {
            emulator(&machine.emulator(), machine.program, cache)
        }
        Machine::Firmware(machine) => emulator(&machine.qemu.emulator(), machine.qemu.program, cache),
        Machine::Xen(machine) => emulator(&machine.emulator(), machine.program, cache),
        Machine::Nested(machine) | Machine::KvmHost(machine) => emulator(&machine.emulator(), machine.program, cache),
        Machine::UserMode => return None,
    };
    let told = tool::run(emulator.arg("--version")).ok()?;
    // "QEMU emulator version 10.0.2 (Debian …)"
    Some(format!("QEMU {}", told.split_whitespace().nth(3)?))
}

/// A program out of an unpacked package, with the libraries and the loader that came along: none of the host's is used.
pub(super) fn program(part: &Part, program: &str, cache: &Cache) -> Command {
    let root = part.place(cache);
    let libraries = libraries::folders(&root);
    let loader = match consts::ARCH {
        "aarch64" => "ld-linux-aarch64.so.1",
        _ => "ld-linux-x86-64.so.2",
    };
    let mut places = libraries.iter().map(|folder| folder.join(loader));
    let mut command = Command::new(places.find(|path| path.exists()).unwrap_or_else(|| loader.into()));
    let program = root.join("usr/bin").join(program);
    // No error: the folders' names hold no colon unless the cache's does, and then nothing is found.
    command.arg("--inhibit-cache").arg("--library-path").arg(std::env::join_paths(&libraries).unwrap_or_default());
    command.arg("--argv0").arg(&program).arg(&program);
    command
}

/// QEMU, which looks for firmware and modules where it was unpacked.
pub(super) fn emulator(emulator: &Part, program: &str, cache: &Cache) -> Command {
    let mut command = self::program(emulator, program, cache);
    let root = emulator.place(cache);
    command.env("QEMU_MODULE_DIR", libraries::folders(&root)[0].join("qemu"));
    for firmware in ["qemu", "seabios"] {
        command.arg("-L").arg(root.join("usr/share").join(firmware));
    }
    command
}

/// A machine of QEMU's with nothing to boot and no devices.
pub(super) fn bare(machine: &Qemu, cache: &Cache) -> Command {
    let mut command = emulator(&machine.emulator(), machine.program, cache);
    // The device's process maps the guest's memory.
    let memory = machine.memory;
    command
        .args(["-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-M", &format!("{},memory-backend=mem", machine.machine), "-cpu", machine.cpu])
        .args(["-smp", &machine.processors.to_string(), "-m", &format!("{memory}M")])
        .args(["-object", &format!("memory-backend-memfd,id=mem,size={memory}M,share=on")])
        .args(machine.arguments)
        .args(["-chardev", "stdio,id=console,signal=off"])
        .args(machine.console);
    command
}

/// Connects to `socket`, behind which a device is served: the character device `socketNUMBER`.
pub(super) fn connect(command: &mut Command, number: usize, socket: &Path) {
    let mut chardev = OsString::from(format!("socket,id=socket{number},path="));
    chardev.push(socket);
    command.arg("-chardev").arg(chardev);
}

fn qemu(machine: &Qemu, cache: &Cache, boot: &Boot<'_>) -> Command {
    let mut command = bare(machine, cache);
    command
        .arg("-kernel")
        .arg(boot.kernel)
        .arg("-initrd")
        .arg(boot.initramfs)
        .args(["-append", &format!("console={} rdinit=/init quiet panic=-1", machine.tty)]);
    for (number, (device, socket)) in (1..).zip(boot.devices) {
        connect(&mut command, number, socket);
        if machine.bus == Bus::Zpci {
            command.args(["-device", &format!("zpci,uid={number},target=device{number}")]);
        }
        let bus = match (machine.bus, device.kind) {
            (Bus::Pci | Bus::Zpci, Kind::Blk) => "-pci-non-transitional",
            (Bus::Pci | Bus::Zpci, Kind::Rng) => "-pci",
            (Bus::Mmio, _) => "",
        };
        let Device { kind, options, .. } = device;
        let device = format!("vhost-user-{}{bus},id=device{number},chardev=socket{number}{options}", kind.name());
        command.args(["-device", &device]);
    }
    command
}

/// User Mode Linux. The number behind a socket is the device's type.
fn user_mode(boot: &Boot<'_>) -> Command {
    let argument = |name: &str, value: &Path| {
        let mut argument = OsString::from(name);
        argument.push(value);
        argument
    };
    let mut command = Command::new(boot.kernel);
    command
        .args(["mem=128M", "con=null", "con0=fd:0,fd:1", "umid=lab", "rdinit=/init", "quiet", "panic=-1"])
        .arg(argument("initrd=", boot.initramfs))
        // Ends with a slash.
        .arg(argument("uml_dir=", &boot.folder.join("")));
    for (device, socket) in boot.devices {
        let mut place = argument("virtio_uml.device=", socket);
        place.push(format!(":{}", device.kind.id()));
        command.arg(place);
    }
    // Where it keeps its memory.
    command.env("TMPDIR", boot.folder);
    command
}

#[cfg(test)]
mod tests {
    use super::super::guests::guests;
    use super::*;

    fn told(name: &str) -> String {
        let guest = guests().iter().find(|guest| guest.name == name).unwrap();
        let devices: Vec<_> =
            guest.devices.iter().map(|device| (device, PathBuf::from(format!("/run/{device}")))).collect();
        let boot = Boot {
            kernel: Path::new("/kernel"),
            initramfs: Path::new("/initramfs"),
            devices: &devices,
            folder: Path::new("/run"),
        };
        let command = command(guest, &Cache::at(Path::new("/lab")), &boot).unwrap();
        format!("{command:?}").replace('"', "")
    }

    #[test]
    fn every_device_has_a_socket_and_its_options() {
        let command = told("ppc64le");
        assert!(command.contains("-chardev socket,id=socket2,path=/run/blk-packed"), "{command}");
        let device = "vhost-user-blk-pci-non-transitional,id=device2,chardev=socket2,packed=on";
        assert!(command.contains(device), "{command}");
    }

    #[test]
    fn a_device_on_system_z_has_a_function_in_front_of_it() {
        assert!(told("s390x").contains("-device zpci,uid=2,target=device2 -device vhost-user-blk-pci"));
    }

    #[test]
    fn user_mode_linux_is_told_sockets_and_device_types() {
        if consts::ARCH != "x86_64" {
            println!("skipped: User Mode Linux runs on x86_64 only");
            return;
        }
        let command = told("uml");
        assert!(
            command.contains("virtio_uml.device=/run/blk-packed:2") && command.contains("uml_dir=/run/"),
            "{command}"
        );
    }
}
