//! The other half of a guest's device: this program's own `serve`, in a process of its own.

use std::env;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::LabError;
use super::boot::Process;
use super::guests::Kind;

/// How long it may take until somebody listens at the socket.
const PATIENCE: Duration = Duration::from_secs(30);

/// A device behind a socket.
pub(super) struct Server(Process);

impl Server {
    /// Serves a device at the new socket `socket`, a disk with its `image`; returns when somebody listens there.
    pub(super) fn start(kind: Kind, image: Option<&Path>, socket: &Path) -> Result<Self, LabError> {
        let this = env::current_exe().map_err(LabError::file(Path::new("/proc/self/exe")))?;
        let mut command = Command::new(this);
        command.args(["serve", kind.name(), "--socket"]).arg(socket);
        if let Some(image) = image {
            command.arg("--image").arg(image);
        }
        let mut process = Process::start(&mut command)?;
        let begun = Instant::now();
        while UnixStream::connect(socket).is_err() {
            if !process.runs() || begun.elapsed() > PATIENCE {
                process.stop();
                let mut said = String::new();
                for stream in process.streams() {
                    _ = stream.take(1000).read_to_string(&mut said);
                }
                return Err(LabError::Failed { command: "polyvirt serve".to_owned(), said: said.trim().to_owned() });
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(Self(process))
    }

    /// Whether it still serves.
    pub(super) fn runs(&mut self) -> bool {
        self.0.runs()
    }
}
