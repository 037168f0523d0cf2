//! Other programs that the lab starts.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use super::LabError;

/// Runs `command` to its end and returns what it printed.
pub(super) fn run(command: &mut Command) -> Result<String, LabError> {
    let program = command.get_program().to_string_lossy().into_owned();
    tracing::debug!(?command);
    let output = command
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output()
        .map_err(|error| LabError::Missing { program: program.clone(), error })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let first = command.get_args().next().unwrap_or(OsStr::new("")).to_string_lossy().into_owned();
    let said = last_words(&String::from_utf8_lossy(&output.stderr)).unwrap_or_else(|| output.status.to_string());
    Err(LabError::Failed { command: format!("{program} {first}"), said })
}

/// The first line that says it is an error (as apt and dpkg do), or else the last one.
fn last_words(told: &str) -> Option<String> {
    let mut lines = told.lines().map(str::trim).filter(|line| !line.is_empty());
    let error = lines.clone().find_map(|line| line.strip_prefix("E: "));
    error.or(lines.next_back()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = run(&mut Command::new("no-such-program")).unwrap_err();
        assert!(error.to_string().starts_with("no-such-program cannot be started: "), "{error}");
    }

    #[test]
    fn a_program_that_fails_is_quoted() {
        let error = run(Command::new("sh").args(["-c", "echo one >&2; echo 'E: two' >&2; echo three >&2; exit 3"]));
        assert_eq!(error.unwrap_err().to_string(), "sh -c: two");
        let silent = run(Command::new("sh").args(["-c", "exit 3"])).unwrap_err();
        assert_eq!(silent.to_string(), "sh -c: exit status: 3");
    }

    #[test]
    fn what_was_printed_comes_back() {
        assert_eq!(run(Command::new("echo").arg("here")).unwrap(), "here\n");
    }
}
