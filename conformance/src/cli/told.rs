//! What a server says on stderr without being asked: warnings, and how sessions end. Guests and front ends decide how
//! often that is, so only so many lines are written; of the others, how many they were.

use std::io;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::debug_fn;

use super::complain;

/// So many lines may come at once, and one more in each [`PERIOD`].
const AT_ONCE: u32 = 20;
const PERIOD: Duration = Duration::from_secs(3);

static ALLOWANCE: LazyLock<Mutex<Allowance>> = LazyLock::new(|| Mutex::new(Allowance::new(Instant::now())));

/// Has warnings told in sentences.
pub(super) fn tell_warnings() {
    let fields = debug_fn(|writer, field, value| match field.name() {
        "message" => write!(writer, "{value:?}"),
        "error" | "reason" => write!(writer, ": {value:?}"),
        name => write!(writer, " ({name} {value:?})"),
    });
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::WARN)
        .fmt_fields(fields)
        .without_time()
        .with_level(false)
        .with_target(false)
        .with_writer(|| Line)
        .init();
}

/// Says `sentence`, unless there were too many.
pub(super) fn tell(sentence: &str) {
    let taken = ALLOWANCE.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
    match taken {
        Some(0) => complain(sentence),
        Some(untold) => complain(&format!("{sentence} (and {untold} more lines, untold)")),
        None => {}
    }
}

/// An event, which comes whole.
struct Line;

impl io::Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        tell(String::from_utf8_lossy(line).trim_end());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How many more lines may be written.
struct Allowance {
    left: u32,
    since: Instant,
    untold: u64,
}

impl Allowance {
    const fn new(now: Instant) -> Self {
        Self { left: AT_ONCE, since: now, untold: 0 }
    }

    /// Takes a line: how many were not written since the last; none if this is not, either.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let periods = now.duration_since(self.since).as_secs() / PERIOD.as_secs();
        if periods > 0 {
            self.left = AT_ONCE.min(self.left.saturating_add(periods.try_into().unwrap_or(AT_ONCE)));
            self.since = now;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.untold))
            }
            None => {
                self.untold += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_lines_are_counted_not_told() {
        let begun = Instant::now();
        let mut allowance = Allowance::new(begun);
        let told = (0..1000).filter_map(|_| allowance.take(begun)).count();
        assert_eq!(told, AT_ONCE as usize);
        assert_eq!((allowance.take(begun + PERIOD), allowance.take(begun + PERIOD)), (Some(980), None));
        // Long quiet does not save up more.
        let later = begun + 1000 * PERIOD;
        let told: Vec<_> = (0..1000).filter_map(|_| allowance.take(later)).collect();
        assert_eq!((told.len(), told[0], told[1]), (AT_ONCE as usize, 1, 0));
    }
}
