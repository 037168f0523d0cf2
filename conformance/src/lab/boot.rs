//! Runs a guest and listens to its console.

use std::io::{self, BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::LabError;
use super::transcript::{Event, Transcript};

/// A guest that says nothing for so long hangs. Nothing that a guest does takes a tenth of it.
const SILENCE: Duration = Duration::from_secs(120);
/// A guest that still talks after so long is stopped too.
const LIMIT: Duration = Duration::from_secs(900);
/// How long a process has that was asked to end.
const GRACE: Duration = Duration::from_secs(5);
/// The longest line that is taken as one.
const LINE: u64 = 4096;

/// Runs `command` until it ends; `told` hears each event, and lines that begin with `watched` are kept.
pub(super) fn boot(
    command: &Command,
    watched: Option<&'static str>,
    told: &mut dyn FnMut(&Event),
) -> Result<Transcript, LabError> {
    tracing::debug!(?command);
    let begun = Instant::now();
    let mut process = Process::start(command)?;
    let (sender, lines) = sync_channel(64);
    for stream in process.streams() {
        let sender = sender.clone();
        thread::spawn(move || forward(stream, &sender));
    }
    drop(sender);
    let mut transcript = Transcript::new(watched);
    loop {
        if begun.elapsed() > LIMIT {
            transcript.stopped = Some(format!("stopped after {} s", LIMIT.as_secs()));
            break;
        }
        let patience = if transcript.ended() { GRACE } else { SILENCE };
        match lines.recv_timeout(patience) {
            Ok(line) => {
                tracing::debug!(line, "console");
                if let Some(event) = transcript.line(begun.elapsed(), &line) {
                    told(event);
                }
            }
            // It told everything; what still holds the console is not waited for.
            Err(RecvTimeoutError::Timeout) if transcript.ended() => break,
            Err(RecvTimeoutError::Timeout) => {
                transcript.stopped = Some(format!("silent for {} s", SILENCE.as_secs()));
                break;
            }
            // Nobody holds the console any more.
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    process.stop();
    Ok(transcript)
}

/// Sends every line of `stream`, until it ends or nobody listens.
fn forward(stream: Box<dyn Read + Send>, lines: &SyncSender<String>) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        match stream.by_ref().take(LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) if lines.send(String::from_utf8_lossy(&line).into_owned()).is_err() => return,
            Ok(_) => {}
        }
    }
}

/// A process that outlives neither its value nor this program.
pub(super) struct Process(Child);

impl Process {
    /// Starts `command`, with both its outputs in pipes.
    pub(super) fn start(command: &Command) -> Result<Self, LabError> {
        // setpriv (of util-linux, which every Debian has) lets the kernel end it when this program is gone, however
        // that ended, and then becomes the program.
        let mut tied = Command::new("setpriv");
        tied.args(["--pdeathsig", "TERM", "--"]).arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => tied.env(name, value),
                None => tied.env_remove(name),
            };
        }
        tied.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let missing = |error| LabError::Missing { program: "setpriv".to_owned(), error };
        tied.spawn().map(Self).map_err(missing)
    }

    /// Its output and its error output; they are handed out once, later they are empty.
    pub(super) fn streams(&mut self) -> [Box<dyn Read + Send>; 2] {
        let out = self.0.stdout.take().map(|stream| Box::new(stream) as Box<dyn Read + Send>);
        let error = self.0.stderr.take().map(|stream| Box::new(stream) as Box<dyn Read + Send>);
        [out, error].map(|stream| stream.unwrap_or_else(|| Box::new(io::empty())))
    }

    /// Whether it still runs.
    pub(super) fn runs(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }

    /// Asks it to end, and ends it if it does not. (User Mode Linux ends its own children only if it is asked.)
    pub(super) fn stop(&mut self) {
        if !self.runs() {
            return;
        }
        if let Ok(id) = i32::try_from(self.0.id()) {
            // It may just have ended.
            _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        }
        let asked = Instant::now();
        while self.runs() && asked.elapsed() < GRACE {
            thread::sleep(Duration::from_millis(10));
        }
        if self.runs() {
            _ = self.0.kill();
            _ = self.0.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn events_are_heard_while_the_guest_runs_and_both_outputs_count() {
        let mut heard = Vec::new();
        let told = boot(&shell("echo LAB guest kernel 6.1; echo broken >&2; echo LAB guest end"), None, &mut |event| {
            heard.push(event.word.clone());
        })
        .unwrap();
        assert_eq!(heard, ["kernel", "end"]);
        assert!(told.ended() && told.stopped.is_none());
        assert_eq!(told.tail(), "broken\n");
    }

    #[test]
    fn a_machine_that_is_not_there_is_told() {
        let told = boot(&Command::new("no-such-machine"), None, &mut |_| ()).unwrap();
        assert!(!told.ended());
        assert!(told.tail().contains("no-such-machine"), "{}", told.tail());
    }

    #[test]
    fn a_process_ends_with_the_program_that_started_it() {
        let mut outer = Command::new("sh");
        // Stands for this program: it starts a process as `start` does, which says its id.
        outer.args(["-c", "setpriv --pdeathsig TERM -- sh -c 'echo $$; exec sleep 1000' & wait"]);
        let mut outer = outer.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(outer.stdout.take().unwrap()).read_line(&mut line).unwrap();
        outer.kill().unwrap();
        outer.wait().unwrap();
        let inner = Pid::from_raw(line.trim().parse().unwrap());
        let begun = Instant::now();
        while kill(inner, None).is_ok() && !is_zombie(inner) {
            assert!(begun.elapsed() < SILENCE, "{inner} is still there");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn is_zombie(process: Pid) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let told =
            boot(&shell("head -c 100000 /dev/zero | tr '\\0' x; echo; echo LAB guest end"), None, &mut |_| ()).unwrap();
        assert!(told.ended());
        assert!(told.tail().lines().all(|line| line.len() as u64 <= LINE));
    }

    #[test]
    fn a_process_ends_with_its_value() {
        let mut process = Process::start(&shell("exec sleep 1000")).unwrap();
        assert!(process.runs());
        process.stop();
        assert!(!process.runs());
    }
}
