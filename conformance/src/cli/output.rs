//! Standard output.

use std::env;
use std::io::{self, BufWriter, ErrorKind, IsTerminal, Stdout, Write};

use crate::report::Style;

/// Standard output, which a reader may close early: what cannot be told any more is dropped.
pub(super) struct Output {
    to: BufWriter<Stdout>,
    closed: bool,
    /// How text is set.
    pub(super) style: Style,
}

impl Output {
    pub(super) fn standard() -> Self {
        let stdout = io::stdout();
        // https://no-color.org: any value but an empty one.
        let unwanted = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || env::var_os("TERM").is_some_and(|terminal| terminal == "dumb");
        let style = if stdout.is_terminal() && !unwanted { Style::Coloured } else { Style::Plain };
        Self { to: BufWriter::new(stdout), closed: false, style }
    }

    /// Writes `text` as it is.
    pub(super) fn text(&mut self, text: &str) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        let done = self.to.write_all(text.as_bytes());
        self.note(done)
    }

    /// Writes `value` as JSON.
    pub(super) fn json(&mut self, value: &impl serde::Serialize) -> io::Result<()> {
        let json = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
        self.text(&json)?;
        self.text("\n")
    }

    /// What was written so far is to be seen now.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        let done = self.to.flush();
        self.note(done)
    }

    /// Everything was written.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.flush()
    }

    fn note(&mut self, done: io::Result<()>) -> io::Result<()> {
        match done {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            done => done,
        }
    }
}
