//! The progress line.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A line on stderr that tells how far a run is; nothing where stderr is no terminal.
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// A run of `steps` steps.
    pub(super) fn new(steps: usize, quiet: bool) -> Self {
        let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(steps as u64), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos:>4}/{len} {wide_msg}") {
            bar.set_style(style.progress_chars("━╸ "));
        }
        Self(bar)
    }

    /// What is under way.
    pub(super) fn at(&self, what: String) {
        self.0.set_message(what);
    }

    /// A step is done.
    pub(super) fn step(&self) {
        self.0.inc(1);
    }

    /// The run is over; the line goes.
    pub(super) fn finish(self) {
        self.0.finish_and_clear();
    }
}
