//! How fast a line moves, as far as it has been seen to.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Steps of the line that are remembered.
const REMEMBERED: usize = 64;

/// Fewest steps that say anything.
const FEWEST: usize = 16;

/// How long what was seen says anything.
const VALID: Duration = Duration::from_secs(30);

/// When to come back if nothing is known.
pub(super) const UNKNOWN_RETRY: Duration = Duration::from_secs(1);

/// Bounds of what a refused request is told.
const RETRY: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(30);

/// The times between requests served from a line that went on being one.
#[derive(Debug, Default)]
pub(super) struct Pace {
    gaps: VecDeque<Duration>,
    sum: Duration,
    /// When the last one was served that left others waiting.
    last: Option<Instant>,
    /// When the last gap ended.
    measured: Option<Instant>,
}

impl Pace {
    /// The first of the line got its slot; `others` tells whether more wait.
    pub(super) fn served(&mut self, now: Instant, others: bool) {
        if let Some(last) = self.last {
            let gap = now.saturating_duration_since(last);
            self.gaps.push_back(gap);
            self.sum += gap;
            if self.gaps.len() > REMEMBERED
                && let Some(oldest) = self.gaps.pop_front()
            {
                self.sum -= oldest;
            }
            self.measured = Some(now);
        }
        self.last = others.then_some(now);
    }

    /// Nobody waits: what comes next is no measure.
    pub(super) fn pause(&mut self) {
        self.last = None;
    }

    /// Returns how long it takes until that many have been served; `None` if too little is known.
    pub(super) fn wait(&self, count: usize, now: Instant) -> Option<Duration> {
        let measured = self.measured?;
        let is_known = self.gaps.len() >= FEWEST && now.saturating_duration_since(measured) < VALID;
        let gap = self.sum.checked_div(u32::try_from(self.gaps.len()).ok()?)?;
        is_known.then(|| gap.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX)))
    }

    /// Returns when a refused request should come back: while the line is being worked off, each
    /// at a time of its own, so that they do not return all at once. `salt` differs for each.
    pub(super) fn retry(&self, waiting: usize, now: Instant, salt: u64) -> Duration {
        let whole = self.wait(waiting.max(1), now).unwrap_or(UNKNOWN_RETRY);
        // From a half to all of it, in steps of golden sections: evenly whatever the count.
        let part = crate::policy::hash::section(salt);
        whole.mul_f64(0.5 + part / 2.0).clamp(*RETRY.start(), *RETRY.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_told_only_from_enough_that_was_seen() {
        let begun = Instant::now();
        let at = |millis| begun + Duration::from_millis(millis);
        let mut pace = Pace::default();
        for step in 0..16 {
            pace.served(at(step * 50), true);
            assert_eq!(pace.wait(4, at(step * 50)), None, "after {step} gaps");
        }
        pace.served(at(800), false);
        assert_eq!(pace.wait(4, at(800)), Some(Duration::from_millis(200)));
        // A pause is no gap.
        pace.served(at(9000), true);
        pace.served(at(9050), true);
        assert_eq!(pace.wait(1, at(9050)), Some(Duration::from_millis(50)));
        pace.pause();
        pace.served(at(19_000), true);
        assert_eq!(pace.wait(1, at(19_000)), Some(Duration::from_millis(50)));
        assert_eq!(pace.wait(1, at(9050 + 30_000)), None, "too long ago");
    }

    #[test]
    fn the_latest_steps_count() {
        let begun = Instant::now();
        let mut pace = Pace::default();
        let mut now = begun;
        for gap in std::iter::repeat_n(1000, 70).chain(std::iter::repeat_n(10, 65)) {
            now += Duration::from_millis(gap);
            pace.served(now, true);
        }
        assert_eq!(pace.wait(100, now), Some(Duration::from_secs(1)));
        assert_eq!(pace.gaps.len(), 64);
    }

    #[test]
    fn the_refused_come_back_one_by_one() {
        let begun = Instant::now();
        let mut pace = Pace::default();
        assert!(pace.retry(9, begun, 0) <= UNKNOWN_RETRY);
        for step in 0..=16 {
            pace.served(begun + Duration::from_secs(step), true);
        }
        let now = begun + Duration::from_secs(16);
        let mut told: Vec<_> = (0..10).map(|salt| pace.retry(10, now, salt)).collect();
        told.sort_unstable();
        assert!(told[0] >= Duration::from_secs(5) && told[9] <= Duration::from_secs(10));
        assert!(
            told.windows(2).all(|two| two[1] - two[0] > Duration::from_millis(100)),
            "{told:?}"
        );
        assert_eq!(pace.retry(1000, now, 0), Duration::from_secs(30));
    }
}
