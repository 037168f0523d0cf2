//! A server of the program under test.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

/// `polyvirt serve`, ready; it ends with this.
pub(crate) struct Server {
    child: Child,
    /// What it said when it was ready.
    pub(crate) ready: String,
    errors: BufReader<ChildStderr>,
}

impl Server {
    /// Starts `command` and waits until it says that it is ready.
    #[track_caller]
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        if ready.is_empty() {
            let mut said = String::new();
            errors.read_to_string(&mut said).unwrap();
            panic!("it does not serve: {said}");
        }
        Self { child, ready, errors }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it writes to stderr.
    pub(crate) fn said(&mut self) -> String {
        let mut line = String::new();
        self.errors.read_line(&mut line).unwrap();
        line.trim_end().into()
    }

    /// The names of its status files: one for each thread.
    pub(crate) fn threads(&self) -> Vec<PathBuf> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.id())).unwrap();
        tasks.map(|task| task.unwrap().path().join("status")).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `polyvirt serve` with `args`, at `socket`.
pub(crate) fn serve(args: &[&str], socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polyvirt"));
    command.arg("serve").args(args).arg("--socket").arg(socket).env_remove("RUST_LOG");
    command
}

/// `polyvirt serve blk` over `image`.
pub(crate) fn serve_disk(image: &Path, socket: &Path, more: &[&str]) -> Command {
    let mut command = serve(&["blk"], socket);
    command.arg("--image").arg(image).args(more);
    command
}

/// What became of a command that is not to serve.
pub(crate) fn refused(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

/// Exit code 2, nothing on stdout, one sentence on stderr with all of `parts` in it.
#[track_caller]
pub(crate) fn assert_mistake(output: &Output, parts: &[&str]) {
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(output.stdout.is_empty(), "{output:?}");
    assert_eq!(told.lines().count(), 1, "{told}");
    for part in parts {
        assert!(told.contains(part), "{part:?} is not in {told:?}");
    }
}

/// Whether this is root; if it is not, that is told.
pub(crate) fn root(what: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("skipped: {what}, for want of root");
    }
    root
}
