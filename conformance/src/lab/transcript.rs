//! What a guest tells on its console.

use std::collections::VecDeque;
use std::fmt::Display;
use std::time::Duration;

/// How a line that tells an event begins.
const MARK: &str = "LAB ";
/// The part of the guest that speaks of the guest as a whole.
const GUEST: &str = "guest";
/// Events and other lines that are kept. A guest tells a few dozen.
const EVENTS: usize = 1000;
const TAIL: usize = 12;

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Event {
    /// Since the boot began.
    pub(super) at: Duration,
    /// The guest, or one of its disks.
    pub(super) subject: String,
    /// What it is about.
    pub(super) word: String,
    /// The rest of the line.
    pub(super) details: String,
}

/// A whole boot.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    events: Vec<Event>,
    /// The last lines that are no events: what the kernel, or the emulator, said.
    tail: VecDeque<String>,
    /// How lines begin that are kept besides.
    watched: Option<&'static str>,
    noticed: Vec<String>,
    /// Why the guest was stopped, if it did not end by itself.
    pub(super) stopped: Option<String>,
}

impl Transcript {
    /// Nothing was told yet. Lines that begin with `watched` are kept, whatever else is told.
    pub(super) fn new(watched: Option<&'static str>) -> Self {
        Self { watched, ..Self::default() }
    }

    /// Of a guest that could not even be started.
    pub(super) fn without_a_start(why: &impl Display) -> Self {
        Self { stopped: Some(why.to_string()), ..Self::default() }
    }

    /// Takes one line of the console, and returns the event if it is one.
    pub(super) fn line(&mut self, at: Duration, line: &str) -> Option<&Event> {
        let line = line.trim_end();
        if let Some(event) = parse(at, line) {
            if self.events.len() < EVENTS {
                self.events.push(event);
                return self.events.last();
            }
        } else if !line.is_empty() {
            if self.watched.is_some_and(|watched| line.starts_with(watched)) && self.noticed.len() < EVENTS {
                self.noticed.push(line.to_owned());
            }
            self.tail.push_back(line.to_owned());
            if self.tail.len() > TAIL {
                self.tail.pop_front();
            }
        }
        None
    }

    /// The first event `word` of `subject`.
    pub(super) fn event(&self, subject: &str, word: &str) -> Option<&Event> {
        self.events.iter().find(|event| event.subject == subject && event.word == word)
    }

    /// The details of every event `word` of `subject`.
    pub(super) fn all<'a>(&'a self, subject: &'a str, word: &'a str) -> impl Iterator<Item = &'a str> {
        let these = self.events.iter().filter(move |event| event.subject == subject && event.word == word);
        these.map(|event| &*event.details)
    }

    /// The version of the guest's kernel, if it came so far.
    pub(super) fn kernel(&self) -> Option<&str> {
        self.event(GUEST, "kernel").map(|event| &*event.details)
    }

    /// Whether the guest came to its end in order.
    pub(super) fn ended(&self) -> bool {
        self.event(GUEST, "end").is_some()
    }

    /// What the guest's kernel complained of.
    pub(super) fn complaints(&self) -> Vec<&str> {
        self.all(GUEST, "complaint").collect()
    }

    /// When the event before the one at `at` happened.
    pub(super) fn before(&self, at: Duration) -> Duration {
        self.events.iter().map(|event| event.at).filter(|earlier| *earlier < at).max().unwrap_or_default()
    }

    /// The lines that were watched for.
    pub(super) fn noticed(&self) -> &[String] {
        &self.noticed
    }

    /// How it ended, in a few words.
    pub(super) fn ending(&self) -> String {
        let how =
            self.stopped.as_deref().unwrap_or(if self.ended() { "the guest had ended" } else { "the guest crashed" });
        match self.events.last() {
            Some(Event { subject, word, .. }) => format!("{how}; its last event is {subject} {word}"),
            None => format!("{how}; it told nothing"),
        }
    }

    /// The last lines of the console.
    pub(super) fn tail(&self) -> String {
        self.tail.iter().map(|line| format!("{line}\n")).collect()
    }
}

fn parse(at: Duration, line: &str) -> Option<Event> {
    // The kernel's own messages may have begun the line.
    let told = line.get(line.find(MARK)? + MARK.len()..)?;
    let mut words = told.splitn(3, ' ').map(str::to_owned);
    let (subject, word) = (words.next()?, words.next()?);
    Some(Event { at, subject, word, details: words.next().unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcript(lines: &[&str]) -> Transcript {
        let mut transcript = Transcript::default();
        for (at, line) in (1..).zip(lines) {
            transcript.line(Duration::from_secs(at), line);
        }
        transcript
    }

    #[test]
    fn events_are_found_behind_carriage_returns_and_messages() {
        let told =
            transcript(&["booting\r", "LAB guest kernel 6.1.0\r", "[ 1.0] hello LAB split read 00ff 1", "LAB x"]);
        assert_eq!(told.kernel(), Some("6.1.0"));
        assert_eq!(told.event("split", "read").unwrap().details, "00ff 1");
        assert_eq!(told.before(Duration::from_secs(3)), Duration::from_secs(2));
        assert_eq!(told.tail(), "booting\nLAB x\n");
        assert!(!told.ended());
        assert_eq!(told.ending(), "the guest crashed; its last event is split read");
    }

    #[test]
    fn a_guest_that_talks_without_end_costs_no_memory() {
        let mut told = Transcript::default();
        for _ in 0..3 * EVENTS {
            told.line(Duration::ZERO, "LAB guest complaint again");
            told.line(Duration::ZERO, "noise");
        }
        assert_eq!(told.complaints().len(), EVENTS);
        assert_eq!(told.tail().lines().count(), TAIL);
    }

    #[test]
    fn what_is_watched_for_is_kept() {
        let mut told = Transcript::new(Some("drive "));
        for line in ["drive 1: s=2", "no drive 2", "drive 3"].into_iter().chain([""; 100]).chain(["noise"; 100]) {
            told.line(Duration::ZERO, line);
        }
        assert_eq!(told.noticed(), ["drive 1: s=2", "drive 3"]);
    }

    #[test]
    fn silence_is_told() {
        assert_eq!(transcript(&[]).ending(), "the guest crashed; it told nothing");
        let mut stopped = transcript(&["LAB guest end"]);
        assert_eq!(stopped.ending(), "the guest had ended; its last event is guest end");
        stopped.stopped = Some("silent for 60 s".into());
        assert_eq!(stopped.ending(), "silent for 60 s; its last event is guest end");
    }
}
