//! Which workers are far slower than their peers. State machines without clocks.
//!
//! A worker is slow when both hold, against the medians of the others that serve the same model:
//! its streams wait `factor` times as long for a token, and it generates as many times fewer tokens
//! per second of computing. The first alone is so for a worker that has many streams, the second
//! for one that has few.

use std::time::Duration;

use tokio::time::Instant;

/// Time that one sample is about, and between two verdicts.
pub(super) const WINDOW: Duration = Duration::from_secs(1);
/// Slow windows in a row after which a worker is avoided.
const STRIKES: u32 = 3;
/// How long it is avoided the first time; doubles each time it is found slow again.
const AVOIDED: Duration = Duration::from_secs(5);
/// Longest that it is avoided before it is tried again.
const LONGEST_AVOIDED: Duration = Duration::from_secs(60);

/// What a worker did for one model in a window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    /// Seconds that a stream waited for a token; infinite if none came.
    pub(super) gap: f64,
    /// Tokens per second of computing, as reported.
    pub(super) rate: f64,
}

impl Sample {
    /// Returns the sample of a window in which so many streams got so many tokens, together.
    #[expect(clippy::cast_precision_loss, reason = "tokens of one second")]
    pub(super) fn new(streams: usize, tokens: u64, window: Duration, rate: f64) -> Option<Self> {
        (streams > 0 && rate > 0.0)
            .then(|| Self { gap: streams as f64 * window.as_secs_f64() / tokens as f64, rate })
    }
}

/// Returns, for each worker with a sample, whether it is slow among them.
pub(super) fn verdicts(samples: &[Option<Sample>], factor: f64) -> Vec<Option<bool>> {
    let slow = |of: usize, sample: &Sample| {
        let others = || samples.iter().enumerate().filter(|(nth, _)| *nth != of);
        let gap = median(others().filter_map(|(_, sample)| Some(sample.as_ref()?.gap)))?;
        let rate = median(others().filter_map(|(_, sample)| Some(sample.as_ref()?.rate)))?;
        Some(sample.gap > gap * factor && sample.rate * factor < rate)
    };
    samples.iter().enumerate().map(|(of, sample)| slow(of, sample.as_ref()?)).collect()
}

/// Returns the lower median; `None` of nothing.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().checked_sub(1)? / 2).copied()
}

/// What the verdicts have come to for one worker.
#[derive(Debug, Default)]
pub(super) struct Pace {
    strikes: u32,
    /// Times in a row that it was found slow.
    marks: u32,
    avoided_until: Option<Instant>,
}

impl Pace {
    /// Takes a verdict; `None` says nothing. Returns whether the worker is avoided from now on.
    pub(super) fn judge(&mut self, slow: Option<bool>, now: Instant) -> bool {
        match slow {
            None => return false,
            Some(true) => self.strikes += 1,
            Some(false) => {
                self.strikes = 0;
                // Was tried again and did well.
                if !self.is_avoided(now) {
                    self.marks = 0;
                }
            }
        }
        if self.strikes < STRIKES || self.is_avoided(now) {
            return false;
        }
        let factor = 2_u32.saturating_pow(self.marks);
        self.marks = self.marks.saturating_add(1);
        self.strikes = 0;
        self.avoided_until = Some(now + AVOIDED.saturating_mul(factor).min(LONGEST_AVOIDED));
        true
    }

    pub(super) fn is_avoided(&self, now: Instant) -> bool {
        self.avoided_until.is_some_and(|until| until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(streams: usize, tokens: u64, rate: f64) -> Option<Sample> {
        Sample::new(streams, tokens, WINDOW, rate)
    }

    #[test]
    fn only_who_is_slow_in_both_ways_is_slow() {
        let judged = |samples: &[Option<Sample>]| verdicts(samples, 4.0);
        let fine = sample(4, 400, 400.0);
        assert_eq!(judged(&[fine]), [None], "nobody to compare with");
        assert_eq!(judged(&[fine, None, fine]), [Some(false), None, Some(false)]);
        // Five times slower in every way.
        let slow = sample(4, 80, 80.0);
        assert_eq!(judged(&[fine, slow, fine]), [Some(false), Some(true), Some(false)]);
        assert_eq!(judged(&[slow, fine]), [Some(true), Some(false)]);
        // Nothing comes at all.
        let stuck = sample(4, 0, 10.0);
        assert_eq!(judged(&[fine, stuck, fine])[1], Some(true));
        // Forty streams share what four have elsewhere.
        let full = sample(40, 400, 400.0);
        assert_eq!(judged(&[fine, full, fine])[1], Some(false));
        // One stream has no batch that would raise the rate.
        let few = sample(1, 90, 90.0);
        assert_eq!(judged(&[fine, few, fine])[1], Some(false));
        // Clients that do not read make no slow worker.
        let unread = sample(4, 2, 400.0);
        assert_eq!(judged(&[fine, unread, fine])[1], Some(false));
        // Three times is not enough.
        let slower = sample(4, 133, 133.0);
        assert_eq!(judged(&[fine, slower, fine])[1], Some(false));
        assert_eq!(sample(0, 0, 10.0), None);
        assert_eq!(sample(1, 5, 0.0), None, "an unknown rate");
    }

    #[test]
    fn it_takes_a_while_to_be_avoided_and_to_be_forgiven() {
        let mut now = Instant::now();
        let mut pace = Pace::default();
        let mut judge = |slow, pace: &mut Pace| {
            now += WINDOW;
            (pace.judge(slow, now), now)
        };
        for verdict in [Some(true), Some(true), Some(false), Some(true), None, Some(true)] {
            let (avoided, at) = judge(verdict, &mut pace);
            assert!(!avoided && !pace.is_avoided(at), "{verdict:?}");
        }
        let (avoided, at) = judge(Some(true), &mut pace);
        assert!(avoided);
        assert!(pace.is_avoided(at + AVOIDED - WINDOW / 2));
        assert!(!pace.is_avoided(at + AVOIDED));
        // Its running streams stay slow meanwhile: that is no second time.
        for _ in 0..4 {
            assert!(!judge(Some(true), &mut pace).0);
        }
        // Tried again, and found slow again: for twice as long.
        let (avoided, at) = judge(Some(true), &mut pace);
        assert!(avoided);
        assert!(pace.is_avoided(at + 2 * AVOIDED - WINDOW / 2));
        assert!(!pace.is_avoided(at + 2 * AVOIDED));
        for _ in 0..11 {
            judge(Some(false), &mut pace);
        }
        for _ in 0..2 {
            assert!(!judge(Some(true), &mut pace).0);
        }
        let (avoided, at) = judge(Some(true), &mut pace);
        assert!(avoided && !pace.is_avoided(at + AVOIDED), "it did well in between");
    }
}
