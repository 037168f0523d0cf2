//! Side by side with the peers: ours and theirs in one process, alternating, as ratios.
//!
//! A general benchmark harness measures one thing after another; machines drift meanwhile. Here short rounds of both
//! alternate, and the medians are compared, so that a drift meets both alike.

pub mod opponents;
pub mod rings;

use std::time::{Duration, Instant};

use serde::Serialize;

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Our median, in `unit`.
    pub ours: f64,
    /// The opponent's median, in `unit`.
    pub peer: f64,
    /// Who the opponent is, and its version.
    pub peer_version: String,
    /// What the figures count.
    pub unit: &'static str,
    /// Above 1: polyvirt is better.
    pub ratio: f64,
    /// The ratio that the project asks of itself; none where the row only informs.
    pub bar: Option<f64>,
}

/// How long and how often a round runs.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds of each side.
    pub rounds: usize,
    /// Time of one round.
    pub round: Duration,
}

impl Default for Effort {
    fn default() -> Self {
        Self { rounds: 41, round: Duration::from_millis(4) }
    }
}

/// Something that can be repeated: does about `count` operations and returns how many it did.
pub type Work<'w> = Box<dyn FnMut(u64) -> u64 + 'w>;

/// Runs both in alternating rounds; operations per second of each, by the median.
pub fn alternate<'w>(effort: Effort, ours: &mut Work<'w>, peer: &mut Work<'w>) -> (f64, f64) {
    let counts = [calibrate(effort, ours), calibrate(effort, peer)];
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..effort.rounds {
        for (side, work) in [&mut *ours, &mut *peer].into_iter().enumerate() {
            rates[side].push(rate(work, counts[side]));
        }
    }
    let [ours, peer] = rates.map(median);
    (ours, peer)
}

/// Operations per second of one alone.
pub fn alone(effort: Effort, work: &mut Work<'_>) -> f64 {
    let count = calibrate(effort, work);
    median((0..effort.rounds).map(|_| rate(work, count)).collect())
}

fn calibrate(effort: Effort, work: &mut Work<'_>) -> u64 {
    let mut count = 1000;
    loop {
        let per_second = rate(work, count);
        let wanted = (per_second * effort.round.as_secs_f64()) as u64;
        if wanted <= count * 2 {
            return wanted.max(1);
        }
        count = wanted;
    }
}

fn rate(work: &mut Work<'_>, count: u64) -> f64 {
    let started = Instant::now();
    let done = work(count);
    done as f64 / started.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
