//! `polyvirt serve`.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use polyvirt_core::device::Device;
use polyvirt_devices::{blk, console, rng};
use polyvirt_transports::vhost_user::{Backend, Memory, Stop, listen, outlive_truncation};

use super::output::Output;
use super::{CliError, SUCCESS};
use crate::report::mebibytes;

/// Data segments of a request: so few that they fit into the queues that front ends have by default.
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
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Offer to have device addresses translated by the front end (VIRTIO_F_ACCESS_PLATFORM): for guests behind an IOMMU
    #[arg(long)]
    iommu: bool,
}

/// Serves what `args` say until the process is ended.
pub(super) fn run(args: &ServeArgs, output: &mut Output) -> Result<u8, CliError> {
    let mut terminal = None;
    let (device, told, At { socket, iommu }): (Box<dyn Device<Memory>>, _, _) = match &args.device {
        Served::Blk { image, read_only, queues, at } => {
            let (backend, told) = disk(image, *read_only)?;
            let options = blk::Options {
                read_only: *read_only,
                queues: *queues,
                seg_max: Some(SEG_MAX),
                ..blk::Options::default()
            };
            (Box::new(blk::Device::new(backend, options)), told, at)
        }
        Served::Console { at } => {
            let device = console::Device::new(80, 25);
            terminal = Some(device.handle());
            (Box::new(device), "console".into(), at)
        }
        Served::Rng { at } => (Box::new(rng::Device::new(rng::HostEntropy)), "rng".into(), at),
    };
    let mistake = |error: &dyn std::fmt::Display| CliError::Mistake(format!("{}: {error}", socket.display()));
    let listener = bind(socket).map_err(|error| mistake(&error))?;
    let stop = Stop::new().map_err(|error| mistake(&error))?;
    outlive_truncation().map_err(|error| mistake(&error))?;
    let mut backend = Backend::new(device, *iommu).map_err(|error| mistake(&error))?;
    output.text(&format!("{told}: ready at {}\n", socket.display()))?;
    output.flush()?;
    if let Some(handle) = terminal {
        super::terminal::connect(handle, <[u8]>::to_vec);
    }
    listen(&listener, &mut backend, &stop, |_| {}).map_err(|error| mistake(&error))?;
    Ok(SUCCESS)
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
