//! `polyvirt serve`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;

use polyvirt_core::Features;
use polyvirt_core::device::Device;
use polyvirt_core::memory::GuestMemory;
use polyvirt_devices::{blk, console, rng};
use polyvirt_transports::vhost_user::{Backend, Ended, Memory, ServeError, Stop, listen, outlive_truncation};

use super::image_lock::{self, Unlocked};
use super::limits::raise_open_files;
use super::output::Output;
use super::resize::Watch;
use super::sandbox::{self, SandboxError, User};
use super::told::tell;
use super::{CliError, SUCCESS, complain, files, socket};
use crate::report::mebibytes;

/// Data segments of a request: so few that they fit into the queues that front ends have by default, for drivers without
/// indirect descriptors. With them any queue takes so many.
const SEG_MAX: u16 = 126;
/// Bytes of a sector (5.2.4).
const SECTOR: u64 = 512;

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
        /// The image, a file or a block device; bytes beyond its last whole sector of 512 are not part of the disk. A
        /// file that becomes longer or shorter is noticed; to have a block device looked at, send SIGUSR1
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

/// Where, and to whom.
#[derive(Args)]
struct At {
    /// The socket that front ends connect to, one after another; one that nobody listens on is replaced
    #[arg(long, value_name = "PATH", required_unless_present_any = ["xen_domain", "xenbus"])]
    socket: Option<PathBuf>,
    /// Who may connect: the rights of the socket, in octal
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = socket::mode, conflicts_with_all = ["xen_domain", "xenbus"])]
    socket_mode: u32,
    /// Become this user, without other groups, once everything is open; the socket is given to it
    #[arg(long, value_name = "UID[:GID]", conflicts_with_all = ["xen_domain", "xenbus"])]
    uid: Option<User>,
    /// Keep all rights: to debug. Otherwise nothing more can be opened or run once the device is served
    #[arg(long)]
    no_sandbox: bool,
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
        return xenbus(args, at, output);
    }
    match (&at.socket, at.xen_domain) {
        (_, Some(domain)) => xen(args, at, domain, output),
        (Some(socket), None) => vhost_user(args, socket, at, output),
        (None, None) => Err(CliError::Mistake("none of --socket, --xen-domain and --xenbus says for whom".into())),
    }
}

/// Serves whoever connects to `socket`.
fn vhost_user(args: &ServeArgs, socket: &Path, at: &At, output: &mut Output) -> Result<u8, CliError> {
    let mistake = |error: &dyn std::fmt::Display| CliError::Mistake(format!("{}: {error}", socket.display()));
    // Regions of memory and queues are descriptors: a front end may have many of them.
    raise_open_files();
    let opened = Opened::new(args)?;
    let watch = opened.watch()?;
    let listener = socket::bind(socket, at.socket_mode, at.uid).map_err(|error| mistake(&error))?;
    let stop = Stop::new().map_err(|error| mistake(&error))?;
    outlive_truncation().map_err(|error| mistake(&error))?;
    // Everything is open, and there are no other threads yet.
    if let Err(error) = confine(at) {
        // Nobody is going to listen. If it stays even so, it is replaced the next time.
        _ = fs::remove_file(socket);
        return Err(error);
    }
    let (device, told, far_side) = opened.device::<Memory>(args)?;
    let image = far_side.image();
    let mut features = if at.ring == "packed" { Features::RING_PACKED } else { Features::empty() };
    features.set(Features::ACCESS_PLATFORM, at.iommu);
    let mut backend = Backend::new(device, features).map_err(|error| mistake(&error))?;
    ready(&told, &socket.display(), far_side, watch.map(|watch| (watch, backend.waker())), output)?;
    let ended = |how: &Result<Ended, ServeError>| {
        // A block device tells nobody that it became larger: the next front end is to see it.
        let _ = image.as_ref().and_then(look_again);
        // Any other end is a warning.
        if let Ok(Ended::Closed) = how {
            tell("the front end left");
        }
    };
    listen(&listener, &mut backend, &stop, ended).map_err(|error| mistake(&error))?;
    Ok(SUCCESS)
}

/// Gives up what is not needed to serve, as far as `at` wants it and this kernel can.
fn confine(at: &At) -> Result<(), CliError> {
    let mistake = |error: SandboxError| CliError::Mistake(error.to_string());
    if at.no_sandbox {
        return sandbox::become_user(at.uid).map_err(mistake);
    }
    sandbox::enter(at.uid).map_err(mistake)?.into_iter().for_each(complain);
    Ok(())
}

/// Xen's calls go through devices that are opened for each domain.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn not_confined(at: &At) {
    if !at.no_sandbox {
        complain("there is no sandbox for Xen's domains: the process keeps its rights");
    }
}

/// Serves domain `id` of Xen, until it is gone.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn xen(args: &ServeArgs, at: &At, id: u16, output: &mut Output) -> Result<u8, CliError> {
    use polyvirt_core::hypervisor::{Host as _, HypervisorError};
    use polyvirt_hypervisors::xen_hvm;
    use polyvirt_transports::pci::{Generation, attach};

    let opened = Opened::new(args)?;
    let watch = opened.watch()?;
    let (device, told, far_side) = opened.device(args)?;
    let mistake = |error: HypervisorError| CliError::Mistake(format!("Xen's domain {id}: {error}"));
    let (domain, mut host) = xen_hvm::open(id).map_err(mistake)?;
    let memory = host.memory();
    attach(&mut host, memory, device, Generation::Modern).map_err(mistake)?;
    not_confined(at);
    let watch = watch.map(|watch| (watch, Waker::noop().clone()));
    ready(&told, &format_args!("domain {id}"), far_side, watch, output)?;
    domain.wait_for_its_end();
    Ok(SUCCESS)
}

/// Serves domains of Xen over its own bus, one after another.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn xenbus(args: &ServeArgs, at: &At, output: &mut Output) -> Result<u8, CliError> {
    use polyvirt_core::hypervisor::{Host as _, HypervisorError};
    use polyvirt_hypervisors::xen;
    use polyvirt_transports::xenbus::attach;

    not_confined(at);
    for line in std::io::stdin().lines() {
        let line = line.map_err(|error| CliError::Mistake(format!("standard input: {error}")))?;
        let id = line.trim().parse::<u16>();
        let id = id.map_err(|error| CliError::Mistake(format!("'{line}' is no number of a domain: {error}")))?;
        let mistake = |error: HypervisorError| CliError::Mistake(format!("Xen's domain {id}: {error}"));
        // The image is opened for each domain, and its size is what it is then.
        let (device, told, far_side) = Opened::new(args)?.device(args)?;
        let mut host = xen::serve(id).map_err(mistake)?;
        let memory = host.memory();
        attach(&mut host, memory, device).map_err(mistake)?;
        ready(&told, &format_args!("domain {id}"), far_side, None, output)?;
        xen::wait_for_its_end(&host).map_err(mistake)?;
        drop(host);
        output.text(&format!("domain {id} is gone\n"))?;
        output.flush()?;
    }
    Ok(SUCCESS)
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn xenbus(_: &ServeArgs, _: &At, _: &mut Output) -> Result<u8, CliError> {
    Err(CliError::Mistake("--xenbus needs Linux on x86_64".into()))
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn xen(_: &ServeArgs, _: &At, _: u16, _: &mut Output) -> Result<u8, CliError> {
    Err(CliError::Mistake("--xen-domain needs Linux on x86_64".into()))
}

/// Says that a device can be used at `place`, and connects its far side.
fn ready(
    told: &str,
    place: &dyn std::fmt::Display,
    far_side: FarSide,
    watch: Option<(Watch, Waker)>,
    output: &mut Output,
) -> Result<(), CliError> {
    output.text(&format!("{told}: ready at {place}\n"))?;
    output.flush()?;
    match (far_side, watch) {
        (FarSide::Terminal(handle), _) => super::terminal::connect(handle, <[u8]>::to_vec),
        (FarSide::Image(image), Some((watch, waker))) => {
            let known = AtomicU64::new(0);
            let spawned = watch.spawn(move || {
                let size = look_again(&image);
                // The device wakes its own once its driver is ready: a front end wants to hear of it before that.
                if size.is_some_and(|size| known.swap(size, Ordering::Relaxed) != size) {
                    waker.wake_by_ref();
                }
            });
            spawned.map_err(|error| CliError::Mistake(format!("no thread to watch the image: {error}")))?;
        }
        (FarSide::Image(_), None) | (FarSide::None, _) => {}
    }
    Ok(())
}

/// How large the image is by now, in sectors.
fn look_again(image: &blk::FileHandle) -> Option<u64> {
    let size = image.refresh();
    size.inspect_err(|error| tracing::warn!(%error, "the image's size cannot be told")).ok()
}

/// What a device needs of the host, open.
enum Opened {
    Image { file: File, told: String },
    Nothing,
}

/// What stands behind a device.
enum FarSide {
    Image(blk::FileHandle),
    Terminal(console::Handle),
    None,
}

impl FarSide {
    fn image(&self) -> Option<blk::FileHandle> {
        match self {
            Self::Image(image) => Some(image.clone()),
            _ => None,
        }
    }
}

impl Opened {
    fn new(args: &ServeArgs) -> Result<Self, CliError> {
        match &args.device {
            Served::Blk { image, read_only, .. } => {
                let (file, told) = disk(image, *read_only)?;
                Ok(Self::Image { file, told })
            }
            Served::Console { .. } | Served::Rng { .. } => Ok(Self::Nothing),
        }
    }

    /// What tells that the image became longer or shorter.
    fn watch(&self) -> Result<Option<Watch>, CliError> {
        let Self::Image { file, .. } = self else { return Ok(None) };
        Watch::new(file).map(Some).map_err(|error| CliError::Mistake(format!("no watch over the image: {error}")))
    }

    /// The device that `args` ask for, a few words about it, and its far side.
    #[allow(clippy::type_complexity)]
    fn device<M: GuestMemory + Send + 'static>(
        self,
        args: &ServeArgs,
    ) -> Result<(Box<dyn Device<M>>, String, FarSide), CliError> {
        Ok(match (self, &args.device) {
            (Self::Image { file, told }, Served::Blk { image, read_only, queues, serial, .. }) => {
                let backend = blk::FileBackend::new(file).map_err(|error| of_image(image, &error))?;
                let far_side = FarSide::Image(backend.handle());
                let options = blk::Options {
                    read_only: *read_only,
                    queues: *queues,
                    id: serial.clone(),
                    seg_max: Some(SEG_MAX),
                    ..blk::Options::default()
                };
                (Box::new(blk::Device::new(backend, options)), told, far_side)
            }
            (_, Served::Console { .. }) => {
                let device = console::Device::new(80, 25);
                let terminal = device.handle();
                (Box::new(device), "console".into(), FarSide::Terminal(terminal))
            }
            _ => (Box::new(rng::Device::new(rng::HostEntropy)), "rng".into(), FarSide::None),
        })
    }
}

/// What GET_ID can answer: 20 bytes, that guests show and make file names of.
fn serial(text: &str) -> Result<String, String> {
    match text.len() {
        1..=20 if text.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(text.into()),
        len @ (0 | 21..) => Err(format!("expected 1 to 20 characters, found {len}")),
        _ => Err("expected visible ASCII characters".into()),
    }
}

/// What is wrong with `image`.
pub(super) fn of_image(image: &Path, error: &dyn std::fmt::Display) -> CliError {
    CliError::Mistake(format!("image {}: {error}", image.display()))
}

/// The image, open and kept from others, and a few words about it.
pub(super) fn disk(image: &Path, read_only: bool) -> Result<(File, String), CliError> {
    let mistake = |error: io::Error| of_image(image, &error);
    let (file, size) = files::open_disk(image, !read_only).map_err(mistake)?;
    if size < SECTOR {
        return Err(of_image(image, &format_args!("{size} bytes, and a disk has at least a sector of {SECTOR}")));
    }
    match image_lock::lock(&file, !read_only) {
        Ok(()) => {}
        Err(Unlocked::Taken) => {
            return Err(of_image(image, &"in use by another process that writes, or counts on nobody to write"));
        }
        Err(Unlocked::Failed(error)) => {
            complain(&format!(
                "image {}: it cannot be locked ({error}): see to it that nobody else writes",
                image.display()
            ));
        }
    }
    let rights = if read_only { "read-only" } else { "read and write" };
    Ok((file, format!("blk, {}, {:.1} MiB, {rights}", image.display(), mebibytes(size))))
}
