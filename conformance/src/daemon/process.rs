//! A daemon as a process that the suite starts, kills and starts again.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::suite::Objection;

/// What stands in a command for the path of the socket.
pub const SOCKET: &str = "{socket}";
/// How long a daemon may take until it listens. Far more than any needs: it only bounds a hang.
const START_WATCHDOG: Duration = Duration::from_secs(60);
/// How often that is tried.
const PAUSE: Duration = Duration::from_millis(5);

/// A daemon's command, and its process while it runs.
pub struct Process {
    command: String,
    socket: PathBuf,
    child: Mutex<Option<Child>>,
}

impl Process {
    /// A daemon that `command`, a line for the shell, starts at `socket`: [`SOCKET`] in it stands for that path. It is
    /// started by the first [`Process::connect`], and ends when this is dropped.
    pub const fn new(command: String, socket: PathBuf) -> Self {
        Self { command, socket, child: Mutex::new(None) }
    }

    /// Starts the daemon if it does not run.
    fn ensure_running(&self) -> io::Result<()> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = &mut *child
            && running.try_wait()?.is_none()
        {
            return Ok(());
        }
        // The shell gives its process to the daemon, so that this one is killed and not only the shell.
        let line = format!("exec {}", self.command.replace(SOCKET, "\"$1\""));
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(line).arg("sh").arg(&self.socket).stdin(Stdio::null()).stdout(Stdio::null());
        *child = Some(command.spawn()?);
        Ok(())
    }

    /// Starts the daemon if it does not run, and connects as soon as it listens.
    pub fn connect(&self) -> io::Result<UnixStream> {
        self.ensure_running()?;
        let begun = Instant::now();
        loop {
            match UnixStream::connect(&self.socket) {
                Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                    return Err(error);
                }
                Err(error) => {
                    if let Some(child) = &mut *self.child.lock().unwrap_or_else(PoisonError::into_inner)
                        && let Some(status) = child.try_wait()?
                    {
                        return Err(io::Error::other(format!("'{}' ended: {status}", self.command)));
                    }
                    if begun.elapsed() >= START_WATCHDOG {
                        return Err(error);
                    }
                    thread::sleep(PAUSE);
                }
                connected => return connected,
            }
        }
    }

    /// Kills the daemon (SIGKILL), and returns when it is gone.
    pub fn kill(&self) -> io::Result<()> {
        if let Some(mut child) = self.child.lock().unwrap_or_else(PoisonError::into_inner).take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Connects to the daemon at `socket`: the suite's own `process`, or whoever listens there.
pub(super) fn connect(socket: &Path, process: Option<&Arc<Process>>) -> io::Result<UnixStream> {
    match process {
        Some(process) if process.socket == socket => process.connect(),
        _ => super::dial(socket, &[ErrorKind::NotFound, ErrorKind::ConnectionRefused]),
    }
}

/// What a case says that has to kill a daemon which the suite did not start.
pub(super) fn not_ours() -> Objection {
    Objection::Skipped("the suite did not start the daemon, so it cannot kill it: --daemon 'COMMAND {socket}'".into())
}
