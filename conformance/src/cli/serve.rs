//! `polyvirt serve`.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use polyvirt_core::Features;
use polyvirt_core::device::Device;
use polyvirt_core::memory::GuestMemory;
use polyvirt_devices::{blk, console, rng};
use polyvirt_transports::vhost_user::{Backend, Memory, Stop, listen, outlive_truncation};

use super::output::Output;
use super::{CliError, SUCCESS};
use crate::report::mebibytes;

/// Data segments of a request: so few that they fit into the queues that front ends have by default, for drivers without
/// indirect descriptors. With them any queue takes so many.
const SEG_MAX: u16 = 126;

#[derive(Args)]
pub(super) struct ServeArgs {
    #[command(subcommand)]
    device: Served,
}

/// What is served.
#[derive(Subcommand)]
enum Served {
    /// A block device over a raw image
    Blk {
        /// The image; bytes beyond its last whole sector of 512 are not part of the disk
        #[arg(long, value_name = "FILE")]
        image: PathBuf,
        /// The guest cannot write
        #[arg(long)]
        read_only: bool,
        /// How many queues there are
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
        queues: u16,
        /// The serial number that the guest sees, at most 20 characters; by default one that the image keeps as long as it
        /// is the same file
        #[arg(long, value_name = "TEXT", value_parser = serial)]
        serial: Option<String>,
        #[command(flatten)]
        at: At,
    },
    /// A console: what the guest writes goes to standard output, what standard input has goes to the guest
    Console {
        #[command(flatten)]
        at: At,
    },
    /// An entropy device over the host's random numbers
    Rng {
        #[command(flatten)]
        at: At,
    },
}

/// Where.
#[derive(Args)]
struct At {
    /// The socket that front ends connect to, one after another; one that nobody listens on is replaced
    #[arg(long, value_name = "PATH", required_unless_present_any = ["xen_domain", "xenbus"])]
    socket: Option<PathBuf>,
    /// Offer to have device addresses translated by the front end (VIRTIO_F_ACCESS_PLATFORM): for guests behind an IOMMU
    #[arg(long, conflicts_with = "xen_domain")]
    iommu: bool,
    /// In domain 0 of Xen, in place of a socket: put the device on a PCI bus of this PVH domain, which must not run yet
    /// (xl create -p), and serve it until the domain is gone
    #[arg(long, value_name = "ID", conflicts_with = "socket")]
    xen_domain: Option<u16>,
    /// In domain 0 of Xen, in place of a socket: serve domains over grants, event channels and xenstore, one after
    /// another, each until it is gone; their numbers come on standard input, one a line
    #[arg(long, conflicts_with_all = ["socket", "xen_domain", "iommu"])]
    xenbus: bool,
    /// The newest format of rings to offer: front ends such as User Mode Linux use packed rings whenever they can
    #[arg(long, value_name = "FORMAT", default_value = "packed", value_parser = ["split", "packed"])]
    ring: String,
}

/// Serves what `args` say until the process is ended, or the domain is gone.
pub(super) fn run(args: &ServeArgs, output: &mut Output) -> Result<u8, CliError> {
    let (Served::Blk { at, .. } | Served::Console { at } | Served::Rng { at }) = &args.device;
    if at.xenbus {
        return xenbus(args, output);
    }
    match (&at.socket, at.xen_domain) {
        (_, Some(domain)) => xen(args, domain, output),
        (Some(socket), None) => vhost_user(args, socket, at, output),
        (None, None) => Err(CliError::Mistake("none of --socket, --xen-domain and --xenbus says for whom".into())),
    }
}

/// Serves whoever connects to `socket`.
fn vhost_user(args: &ServeArgs, socket: &Path, at: &At, output: &mut Output) -> Result<u8, CliError> {
    let (device, told, terminal) = device::<Memory>(args)?;
    let mistake = |error: &dyn std::fmt::Display| CliError::Mistake(format!("{}: {error}", socket.display()));
    let listener = bind(socket).map_err(|error| mistake(&error))?;
    let stop = Stop::new().map_err(|error| mistake(&error))?;
    outlive_truncation().map_err(|error| mistake(&error))?;
    let mut features = if at.ring == "packed" { Features::RING_PACKED } else { Features::empty() };
    features.set(Features::ACCESS_PLATFORM, at.iommu);
    let mut backend = Backend::new(device, features).map_err(|error| mistake(&error))?;
    ready(&told, &socket.display(), terminal, output)?;
    listen(&listener, &mut backend, &stop, |_| {}).map_err(|error| mistake(&error))?;
    Ok(SUCCESS)
}

/// Serves domain `id` of Xen, until it is gone.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn xen(args: &ServeArgs, id: u16, output: &mut Output) -> Result<u8, CliError> {
    use polyvirt_core::hypervisor::{Host as _, HypervisorError};
    use polyvirt_hypervisors::xen_hvm;
    use polyvirt_transports::pci::{Generation, attach};

    let (device, told, terminal) = device(args)?;
    let mistake = |error: HypervisorError| CliError::Mistake(format!("Xen's domain {id}: {error}"));
    let (domain, mut host) = xen_hvm::open(id).map_err(mistake)?;
    let memory = host.memory();
    attach(&mut host, memory, device, Generation::Modern).map_err(mistake)?;
    ready(&told, &format_args!("domain {id}"), terminal, output)?;
    domain.wait_for_its_end();
    Ok(SUCCESS)
}

/// Serves domains of Xen over its own bus, one after another.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn xenbus(args: &ServeArgs, output: &mut Output) -> Result<u8, CliError> {
    use polyvirt_core::hypervisor::{Host as _, HypervisorError};
    use polyvirt_hypervisors::xen;
    use polyvirt_transports::xenbus::attach;

    for line in std::io::stdin().lines() {
        let line = line.map_err(|error| CliError::Mistake(format!("standard input: {error}")))?;
        let id = line.trim().parse::<u16>();
        let id = id.map_err(|error| CliError::Mistake(format!("'{line}' is no number of a domain: {error}")))?;
        let mistake = |error: HypervisorError| CliError::Mistake(format!("Xen's domain {id}: {error}"));
        let (device, told, terminal) = device(args)?;
        let mut host = xen::serve(id).map_err(mistake)?;
        let memory = host.memory();
        attach(&mut host, memory, device).map_err(mistake)?;
        ready(&told, &format_args!("domain {id}"), terminal, output)?;
        xen::wait_for_its_end(&host).map_err(mistake)?;
        drop(host);
        output.text(&format!("domain {id} is gone\n"))?;
        output.flush()?;
    }
    Ok(SUCCESS)
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn xenbus(_: &ServeArgs, _: &mut Output) -> Result<u8, CliError> {
    Err(CliError::Mistake("--xenbus needs Linux on x86_64".into()))
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn xen(_: &ServeArgs, _: u16, _: &mut Output) -> Result<u8, CliError> {
    Err(CliError::Mistake("--xen-domain needs Linux on x86_64".into()))
}

/// Says that a device can be used at `place`, and lends it the terminal if it wants one.
fn ready(
    told: &str,
    place: &dyn std::fmt::Display,
    terminal: Option<console::Handle>,
    output: &mut Output,
) -> Result<(), CliError> {
    output.text(&format!("{told}: ready at {place}\n"))?;
    output.flush()?;
    if let Some(handle) = terminal {
        super::terminal::connect(handle, <[u8]>::to_vec);
    }
    Ok(())
}

/// The device that `args` ask for, a few words about it, and what a terminal is connected to.
#[allow(clippy::type_complexity)]
fn device<M: GuestMemory + Send + 'static>(
    args: &ServeArgs,
) -> Result<(Box<dyn Device<M>>, String, Option<console::Handle>), CliError> {
    Ok(match &args.device {
        Served::Blk { image, read_only, queues, serial, .. } => {
            let (backend, told) = disk(image, *read_only)?;
            let options = blk::Options {
                read_only: *read_only,
                queues: *queues,
                id: serial.clone(),
                seg_max: Some(SEG_MAX),
                ..blk::Options::default()
            };
            (Box::new(blk::Device::new(backend, options)), told, None)
        }
        Served::Console { .. } => {
            let device = console::Device::new(80, 25);
            let terminal = device.handle();
            (Box::new(device), "console".into(), Some(terminal))
        }
        Served::Rng { .. } => (Box::new(rng::Device::new(rng::HostEntropy)), "rng".into(), None),
    })
}

/// What GET_ID can answer: 20 bytes, that guests show and make file names of.
fn serial(text: &str) -> Result<String, String> {
    match text.len() {
        1..=20 if text.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(text.into()),
        len @ (0 | 21..) => Err(format!("expected 1 to 20 characters, found {len}")),
        _ => Err("expected visible ASCII characters".into()),
    }
}

/// The image as a backend, and a few words about it.
pub(super) fn disk(image: &Path, read_only: bool) -> Result<(blk::FileBackend, String), CliError> {
    let mistake = |error: io::Error| CliError::Mistake(format!("image {}: {error}", image.display()));
    let file = File::options().read(true).write(!read_only).open(image).map_err(mistake)?;
    let metadata = file.metadata().map_err(mistake)?;
    if !metadata.is_file() {
        return Err(CliError::Mistake(format!("image {}: not a regular file", image.display())));
    }
    let rights = if read_only { "read-only" } else { "read and write" };
    let told = format!("blk, {}, {:.1} MiB, {rights}", image.display(), mebibytes(metadata.len()));
    Ok((blk::FileBackend::new(file).map_err(mistake)?, told))
}

/// Listens at `path`. A socket that nobody listens on any more is replaced; anything else that is there stays.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            let left_behind = fs::symlink_metadata(path)?.file_type().is_socket()
                && UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
            if !left_behind {
                return Err(error);
            }
            fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        done => done,
    }
}
