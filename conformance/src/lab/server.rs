//! The other half of a guest's device: this program's own `serve`, in a process of its own.

use std::env;
use std::io::{BufRead as _, BufReader, Read};
use std::path::Path;
use std::process::Command;
use std::thread;

use super::LabError;
use super::boot::Process;
use super::guests::Device;

/// How much of a line is read.
const LINE: u64 = 4096;

/// A device behind a socket.
pub(super) struct Server(Process);

impl Server {
    /// Serves `device` at the new socket `socket`, a disk with its `image` and with `queues`; returns when it is ready.
    pub(super) fn start(device: &Device, image: Option<&Path>, queues: u32, socket: &Path) -> Result<Self, LabError> {
        let this = env::current_exe().map_err(LabError::file(Path::new("/proc/self/exe")))?;
        let mut command = Command::new(this);
        command.args(["serve", device.kind.name(), "--socket"]).arg(socket);
        if let Some(image) = image {
            command.args(["--queues", &queues.to_string(), "--image"]).arg(image);
        }
        if device.behind_iommu() {
            command.arg("--iommu");
        }
        // Some drivers use packed rings whenever they can.
        command.args(["--ring", device.ring()]);
        let mut process = Process::start(&command)?;
        let [out, error] = process.streams();
        // It says one line when it is ready; it says none, and why, if it cannot be.
        let mut ready = String::new();
        _ = BufReader::new(out).take(LINE).read_line(&mut ready);
        if ready.is_empty() {
            let mut said = String::new();
            _ = error.take(LINE).read_to_string(&mut said);
            return Err(LabError::Failed { command: "polyvirt serve".to_owned(), said: said.trim().to_owned() });
        }
        thread::spawn(move || pass_on(error));
        Ok(Self(process))
    }

    /// Whether it still serves.
    pub(super) fn runs(&mut self) -> bool {
        self.0.runs()
    }
}

/// Passes the events of the process on, which would otherwise wait for a reader some day.
fn pass_on(stream: Box<dyn Read + Send>) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while matches!(stream.by_ref().take(LINE).read_line(&mut line), Ok(1..)) {
        tracing::debug!(line = line.trim_end(), "serve");
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_any_length_are_taken_to_their_end() {
        let text = format!("short\n{}\nlast", "x".repeat(3 * LINE as usize));
        pass_on(Box::new(std::io::Cursor::new(text)));
    }
}
