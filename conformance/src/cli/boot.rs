//! `polyvirt boot`.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use clap::{Args, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{self, SetArg, Termios};
use polyvirt_core::Features;
use polyvirt_core::device::Device;
use polyvirt_core::hypervisor::{Host as _, HypervisorError};
use polyvirt_core::memory::FlatMemory;
use polyvirt_core::queue::ByteOrder;
use polyvirt_devices::{Without, blk, console, rng};
use polyvirt_hypervisors::kvm::vmm::{Boot, Ended, SerialInput, Vmm, VmmError};
use polyvirt_hypervisors::kvm::{Host, PCI_MAP};
use polyvirt_transports::mmio;
use polyvirt_transports::pci::{self, Generation};

use super::output::Output;
use super::terminal::{connect, read_keys};
use super::{CliError, FAILURE, MISTAKE, SUCCESS, complain, files, serve};

/// Guest memory as devices see it.
type Memory = Arc<FlatMemory>;

type Devices = Vec<Box<dyn Device<Memory>>>;

/// Devices in memory have an interrupt pin each, and there are eight.
const MOST_IN_MEMORY: usize = 8;

#[derive(Args)]
pub(super) struct BootArgs {
    /// On which hypervisor
    #[arg(long, value_enum, default_value_t)]
    hypervisor: Hypervisor,
    /// The kernel: a bzImage (vmlinuz) or an ELF file (vmlinux), 64-bit
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// More of the kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "")]
    append: String,
    /// Memory, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u32).range(16..=3072))]
    mem: u32,
    /// Processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,
    /// A disk: a raw image, which the guest may write; several times for several disks
    #[arg(long, value_name = "FILE")]
    disk: Vec<PathBuf>,
    /// How devices are found and driven
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,
    /// Offer packed rings too, not only split ones
    #[arg(long)]
    packed: bool,
    /// A virtio console, which the keyboard goes to in place of the serial port
    #[arg(long)]
    console: bool,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Hypervisor {
    /// /dev/kvm
    #[default]
    Kvm,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Transport {
    /// A PCI bus with modern devices
    #[default]
    Pci,
    /// A PCI bus with transitional devices, through their legacy interface
    PciLegacy,
    /// Devices in memory, which ACPI tables tell of
    Mmio,
}

/// Boots what `args` say, until the guest ends.
pub(super) fn run(args: &BootArgs, output: &mut Output) -> Result<u8, CliError> {
    let Hypervisor::Kvm = args.hypervisor;
    let mistake = |error: &dyn std::fmt::Display| CliError::Mistake(error.to_string());
    let boot = Boot {
        kernel: open(&args.kernel)?,
        initrd: args.initrd.as_deref().map(open).transpose()?,
        command_line: command_line(args),
        pci: args.transport != Transport::Mmio,
    };
    let (devices, handle) = devices(args)?;
    if args.transport == Transport::Mmio && devices.len() > MOST_IN_MEMORY {
        let most = MOST_IN_MEMORY - (devices.len() - args.disk.len());
        return Err(CliError::Mistake(format!("{} disks, and over mmio there may be {most}", args.disk.len())));
    }
    // Before there are other threads: they inherit it.
    let signals = endings();
    signals.thread_block().map_err(|error| mistake(&error))?;
    output.flush()?;
    let (host, vmm) =
        Vmm::new((args.mem as usize) << 20, args.cpus, Box::new(io::stdout())).map_err(|error| mistake(&error))?;
    let _plugged = plug(host, args.transport, devices).map_err(|error| mistake(&error))?;
    let terminal = Arc::new(RawTerminal::enter());
    let restored = Arc::clone(&terminal);
    thread::spawn(move || {
        let ended = signals.wait().map_or(1, |signal| 128 + signal as i32);
        restored.restore();
        std::process::exit(ended);
    });
    let (mut keys, restored) = (Keys::default(), Arc::clone(&terminal));
    let heard = move |bytes: &[u8]| {
        let (typed, end) = if restored.is_raw() { keys.take(bytes) } else { (bytes.to_vec(), false) };
        if end {
            restored.restore();
            std::process::exit(SUCCESS.into());
        }
        typed
    };
    match handle {
        Some(handle) => connect(handle, heard),
        None => _ = type_into(vmm.serial_input(), heard),
    }
    let ended = vmm.run(boot, || {
        complain("nothing has come from the kernel yet: the KVM of this host may be unable to run a stock kernel");
    });
    terminal.restore();
    _ = io::stdout().flush();
    Ok(match ended {
        Ok(Ended::Off) => SUCCESS,
        Ok(Ended::Restart) => {
            complain("the guest wants to start again; it ends here");
            SUCCESS
        }
        Ok(Ended::TripleFault) => {
            complain(
                "the guest ended in a triple fault: the kernel crashed early, or the KVM of this host cannot run it",
            );
            FAILURE
        }
        Err(error @ VmmError::Stopped(_)) => {
            complain(&error.to_string());
            MISTAKE
        }
        Err(error) => return Err(mistake(&error)),
    })
}

fn open(path: &Path) -> Result<File, CliError> {
    files::open(path).map_err(|error| CliError::Mistake(format!("{}: {error}", path.display())))
}

/// Gives what standard input has to the serial port, as far as `heard` says.
fn type_into(input: SerialInput, mut heard: impl FnMut(&[u8]) -> Vec<u8> + Send + 'static) -> thread::JoinHandle<()> {
    thread::spawn(move || read_keys(|bytes| input.type_in(&heard(bytes))))
}

/// What the kernel is told: where its messages go, and what the user wants.
fn command_line(args: &BootArgs) -> String {
    let console = if args.console { "console=ttyS0 console=hvc0" } else { "console=ttyS0" };
    if args.append.is_empty() { console.into() } else { format!("{console} {}", args.append) }
}

/// The devices, and the far side of the console if there is one.
fn devices(args: &BootArgs) -> Result<(Devices, Option<console::Handle>), CliError> {
    let mut devices = Devices::new();
    for image in &args.disk {
        let (file, _) = serve::disk(image, false)?;
        let backend = blk::FileBackend::new(file).map_err(|error| serve::of_image(image, &error))?;
        devices.push(Box::new(blk::Device::new(backend, blk::Options::default())));
    }
    devices.push(Box::new(rng::Device::new(rng::HostEntropy)));
    let mut handle = None;
    if args.console {
        let device = console::Device::new(80, 25);
        handle = Some(device.handle());
        devices.push(Box::new(device));
    }
    if !args.packed {
        let split = |device| Box::new(Without::new(device, Features::RING_PACKED)) as Box<dyn Device<Memory>>;
        devices = devices.into_iter().map(split).collect();
    }
    Ok((devices, handle))
}

/// What has to stay for as long as the guest runs.
enum Plugged {
    Bus(#[expect(dead_code, reason = "its drop takes the devices away")] pci::Host<Host>),
    Memory(#[expect(dead_code, reason = "its drop takes the devices away")] Host),
}

/// Plugs `devices` into the machine.
fn plug(host: Host, transport: Transport, devices: Devices) -> Result<Plugged, HypervisorError> {
    let generation = match transport {
        Transport::Pci => Generation::Modern,
        Transport::PciLegacy => Generation::Transitional(ByteOrder::Little),
        Transport::Mmio => {
            let mut host = host;
            for device in devices {
                let memory = host.memory();
                mmio::attach(&mut host, memory, device)?;
            }
            return Ok(Plugged::Memory(host));
        }
    };
    let mut bus = pci::Host::new(host, PCI_MAP);
    for device in devices {
        let memory = bus.memory();
        pci::attach(&mut bus, memory, device, generation)?;
    }
    Ok(Plugged::Bus(bus))
}

/// The signals that end a program whose terminal has to be restored.
fn endings() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect()
}

/// The terminal, as the guest needs it: every key as it is pressed. Nothing if standard input is none.
struct RawTerminal(Mutex<Option<Termios>>);

impl RawTerminal {
    fn enter() -> Self {
        let stdin = io::stdin();
        let before = stdin.is_terminal().then(|| termios::tcgetattr(&stdin).ok()).flatten();
        if let Some(before) = &before {
            let mut raw = before.clone();
            termios::cfmakeraw(&mut raw);
            // What the guest prints is still to begin its lines at the left.
            raw.output_flags = before.output_flags;
            _ = termios::tcsetattr(&stdin, SetArg::TCSANOW, &raw);
            eprintln!("polyvirt: control-A x ends the guest");
        }
        Self(Mutex::new(before))
    }

    fn is_raw(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Gives it back as it was.
    fn restore(&self) {
        if let Some(before) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &before);
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        self.restore();
    }
}

/// What is typed, with the way out in it: control-A, then x; control-A twice is the key itself.
#[derive(Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    const ESCAPE: u8 = 1;

    /// What of `bytes` is for the guest, and whether it is to end.
    fn take(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut typed = Vec::new();
        for &byte in bytes {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, Self::ESCAPE) => self.escaped = true,
                (true, b'x') => return (typed, true),
                (_, byte) => typed.push(byte),
            }
        }
        (typed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_out_is_not_typed_and_anything_else_is() {
        let mut keys = Keys::default();
        assert_eq!(keys.take(b"ls\x01"), (b"ls".to_vec(), false));
        assert_eq!(keys.take(b"\x01x"), (b"\x01x".to_vec(), false));
        assert_eq!(keys.take(b"a\x01"), (b"a".to_vec(), false));
        assert_eq!(keys.take(b"xyz"), (vec![], true));
    }
}
