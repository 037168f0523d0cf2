//! A daemon as a process that the suite starts, kills and starts again.

use std::io::{self, ErrorKind, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, killpg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::suite::Objection;

/// What stands in a command for the path of the socket.
pub const SOCKET: &str = "{socket}";
/// How long a daemon may take until it listens. Far more than any needs: it only bounds a hang.
const START_WATCHDOG: Duration = Duration::from_secs(60);
/// How long it may take until one that the suite did not start does.
const DIAL_WATCHDOG: Duration = Duration::from_secs(5);
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

    /// Starts the daemon if it does not run; whether that was so.
    fn ensure_running(&self) -> io::Result<bool> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = &mut *child {
            if running.try_wait()?.is_none() {
                return Ok(false);
            }
            // There is nothing left to kill, and its number may be another's by now.
            over(running);
        }
        // The shell and what it starts are a group of processes, which is killed as one. Another of them kills it when this
        // process is gone, however it ends: nobody writes to its end of the pipe then.
        let daemon = self.command.replace(SOCKET, "\"$1\"");
        let line = format!("exec 3<&0; {{ read -r over <&3 || kill -9 0; }} & {{ {daemon}\n}} </dev/null 3<&-");
        // Who has lost its parent is given to this process, and not to one that may never ask for its end.
        set_child_subreaper(true)?;
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(line).arg("sh").arg(&self.socket).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        *child = Some(command.spawn()?);
        Ok(true)
    }

    /// Starts the daemon if it does not run, and connects as soon as it listens.
    pub fn connect(&self) -> io::Result<UnixStream> {
        let mut started = self.ensure_running()?;
        let begun = Instant::now();
        loop {
            match connect_at_once(&self.socket) {
                Err(error) if !passing(&error) => return Err(error),
                Err(_) => {
                    // One that was about to end, after its last session, is started once more.
                    if self.ensure_running()? && std::mem::replace(&mut started, true) {
                        return Err(io::Error::other(format!("'{}' ends as soon as it starts", self.command)));
                    }
                    if begun.elapsed() >= START_WATCHDOG {
                        let socket = self.socket.display();
                        return Err(io::Error::other(format!(
                            "'{}' runs, but nothing listens at {socket} after {START_WATCHDOG:?}",
                            self.command
                        )));
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
            let group = Pid::from_raw(child.id().cast_signed());
            // Not yet waited for, so its number is nobody else's.
            let _ = killpg(group, Signal::SIGKILL);
            child.wait()?;
            // What the shell started is this process's now, which waits for each: until they are gone they may hold a lock.
            let all = Pid::from_raw(-group.as_raw());
            while matches!(waitpid(all, None), Ok(_) | Err(Errno::EINTR)) {}
        }
        Ok(())
    }
}

/// Ends what would kill the daemon, which is gone or about to be.
fn over(daemon: &mut Child) {
    if let Some(mut pipe) = daemon.stdin.take() {
        // Fails only if nobody reads it any more.
        let _ = pipe.write_all(b"over\n");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Connects to the daemon at `socket`: the suite's own `process`, or whoever listens there. A socket is there before its
/// daemon listens, and some daemons take it away between two sessions, so that is tried again for a while.
pub(super) fn connect(socket: &Path, process: Option<&Arc<Process>>) -> io::Result<UnixStream> {
    if let Some(process) = process.filter(|process| process.socket == socket) {
        return process.connect();
    }
    let begun = Instant::now();
    loop {
        match connect_at_once(socket) {
            Err(error) if passing(&error) && begun.elapsed() < DIAL_WATCHDOG => thread::sleep(PAUSE),
            done => return done,
        }
    }
}

/// Whether trying again may help.
pub(super) fn passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::WouldBlock)
}

/// Connects, or says at once why not: without room in its queue a listener would hold up who connects for ever.
pub(super) fn connect_at_once(socket: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let stream = nix::sys::socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    nix::sys::socket::connect(stream.as_raw_fd(), &UnixAddr::new(socket)?)?;
    Ok(stream.into())
}

/// What a case says that has to kill a daemon which the suite did not start.
pub(super) fn not_ours() -> Objection {
    Objection::Skipped("the suite did not start the daemon, so it cannot kill it: --daemon 'COMMAND {socket}'".into())
}
