//! Tells whoever started a server why sessions end.

use std::time::{Duration, Instant};

use polyvirt_transports::vhost_user::{Ended, ServeError};

use super::complain;

/// So many lines may come at once, and one more in each [`PERIOD`]: front ends decide how often they come and go.
const AT_ONCE: u32 = 20;
const PERIOD: Duration = Duration::from_secs(3);

/// A line on stderr for each session that ends, as long as there are not too many.
pub(super) struct Sessions {
    allowed: u32,
    since: Instant,
    untold: u64,
}

impl Sessions {
    pub(super) fn new(now: Instant) -> Self {
        Self { allowed: AT_ONCE, since: now, untold: 0 }
    }

    /// Tells how a session ended.
    pub(super) fn tell(&mut self, how: &Result<Ended, ServeError>) {
        if let Some(line) = self.line(how, Instant::now()) {
            complain(&line);
        }
    }

    fn line(&mut self, how: &Result<Ended, ServeError>, now: Instant) -> Option<String> {
        let periods = now.duration_since(self.since).as_secs() / PERIOD.as_secs();
        if periods > 0 {
            self.allowed = AT_ONCE.min(self.allowed.saturating_add(periods.try_into().unwrap_or(AT_ONCE)));
            self.since = now;
        }
        let Some(left) = self.allowed.checked_sub(1) else {
            self.untold += 1;
            return None;
        };
        self.allowed = left;
        let told = match how {
            Ok(Ended::Closed) => "the front end left".into(),
            Ok(Ended::Stopped) => "the session was stopped".into(),
            Err(error) => format!("the front end was shown out: {error}"),
        };
        Some(match std::mem::take(&mut self.untold) {
            0 => told,
            untold => format!("{told} (and {untold} more sessions ended, untold)"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_sessions_are_counted_not_told() {
        let begun = Instant::now();
        let mut sessions = Sessions::new(begun);
        let told = (0..1000).filter_map(|_| sessions.line(&Ok(Ended::Closed), begun)).count();
        assert_eq!(told, AT_ONCE as usize);
        let refused = ServeError::Unknown { request: 99 };
        let line = sessions.line(&Err(refused), begun + PERIOD).unwrap();
        assert_eq!(line, "the front end was shown out: request 99 is not known (and 980 more sessions ended, untold)");
        assert_eq!(sessions.line(&Ok(Ended::Closed), begun + PERIOD), None);
        // Long quiet does not save up more.
        let later = begun + 1000 * PERIOD;
        let told = (0..1000).filter_map(|_| sessions.line(&Ok(Ended::Closed), later)).count();
        assert_eq!(told, AT_ONCE as usize);
    }
}
