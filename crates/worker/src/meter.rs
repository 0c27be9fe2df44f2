//! How much a model has to do, and how fast it does it.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

use tercet_engine::StepReport;

/// Computing time after which what was measured counts e times less: long enough to even out single
/// steps, short enough to follow a machine that gets slower.
const MEMORY_SECONDS: f64 = 5.0;

/// Least part of a mixed step that is taken for its prompts, however long the estimate says that
/// its other rows take.
const LEAST_PROMPT_PART: f64 = 0.1;

/// Measures one model. Clones measure the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Meter(Arc<Gauges>);

#[derive(Debug, Default)]
struct Gauges {
    admitted: AtomicUsize,
    outstanding: AtomicU64,
    /// Locked once per step by the compute thread, and for a copy by those who report.
    speed: Mutex<Speed>,
}

/// What was computed, and how fast.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Speed {
    /// Steps so far.
    pub(crate) steps: u64,
    decode: Rate,
    prefill: Rate,
}

/// Tokens and seconds, the older ones counting less.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rate {
    tokens: f64,
    seconds: f64,
}

/// What one request may still take; nothing any more when dropped.
#[derive(Debug)]
pub(crate) struct Debt {
    gauges: Arc<Gauges>,
    /// Tokens of the prompt and of what is resumed, until the first new one.
    prompt: u64,
    completion: u64,
}

impl Meter {
    /// Counts an admitted request that still takes nothing that is known.
    pub(crate) fn admit(&self) -> Debt {
        self.0.admitted.fetch_add(1, Ordering::Relaxed);
        Debt { gauges: Arc::clone(&self.0), prompt: 0, completion: 0 }
    }

    /// Returns the number of requests admitted.
    pub(crate) fn admitted(&self) -> usize {
        self.0.admitted.load(Ordering::Relaxed)
    }

    /// Returns the tokens that these may still take.
    pub(crate) fn outstanding(&self) -> u64 {
        self.0.outstanding.load(Ordering::Relaxed)
    }

    /// Returns what was computed so far.
    pub(crate) fn speed(&self) -> Speed {
        *self.lock()
    }

    /// Counts a step.
    pub(crate) fn step(&self, report: &StepReport) {
        let StepReport { shape, tally, elapsed, screen: _ } = report;
        // Drafts of the step before that were right are tokens of this one.
        let tokens = shape.decode_rows + tally.accepted;
        self.lock().step(tokens, shape.prompt_rows, elapsed.as_secs_f64());
    }

    fn lock(&self) -> MutexGuard<'_, Speed> {
        // Numbers are whole whoever panics.
        self.0.speed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Speed {
    /// Returns the tokens generated per second of computing; 0 until known.
    pub(crate) fn decode(&self) -> f64 {
        self.decode.per_second()
    }

    /// Returns the tokens of prompts read per second of computing; 0 until known.
    pub(crate) fn prefill(&self) -> f64 {
        self.prefill.per_second()
    }

    #[expect(clippy::cast_precision_loss, reason = "rows of a step are few")]
    fn step(&mut self, decode_rows: usize, prompt_rows: usize, seconds: f64) {
        self.steps += 1;
        let (decode, prompt) = (decode_rows as f64, prompt_rows as f64);
        if prompt_rows == 0 {
            self.decode.add(decode, seconds);
            return;
        }
        let known = self.decode();
        let of_decode = if known > 0.0 { decode / known } else { 0.0 };
        self.prefill.add(prompt, (seconds - of_decode).max(seconds * LEAST_PROMPT_PART));
    }
}

impl Rate {
    fn add(&mut self, tokens: f64, seconds: f64) {
        let kept = (-seconds / MEMORY_SECONDS).exp();
        self.tokens = self.tokens * kept + tokens;
        self.seconds = self.seconds * kept + seconds;
    }

    fn per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens / self.seconds } else { 0.0 }
    }
}

impl Debt {
    /// Counts the tokens to read and those to generate at most.
    pub(crate) fn owe(&mut self, prompt: usize, completion: u64) {
        let prompt = u64::try_from(prompt).unwrap_or(u64::MAX);
        self.prompt += prompt;
        self.completion += completion;
        self.gauges.outstanding.fetch_add(prompt + completion, Ordering::Relaxed);
    }

    /// Counts tokens that were generated as owed no longer.
    pub(crate) fn pay(&mut self, tokens: usize) {
        // A request that takes more than was assumed still takes something.
        let most = self.completion.saturating_sub(1);
        let paid = u64::try_from(tokens).unwrap_or(u64::MAX).min(most);
        self.completion -= paid;
        let prompt = std::mem::take(&mut self.prompt);
        self.gauges.outstanding.fetch_sub(prompt + paid, Ordering::Relaxed);
    }
}

impl Drop for Debt {
    fn drop(&mut self) {
        self.gauges.admitted.fetch_sub(1, Ordering::Relaxed);
        self.gauges.outstanding.fetch_sub(self.prompt + self.completion, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debts_are_paid_token_by_token() {
        let meter = Meter::default();
        let mut debt = meter.admit();
        assert_eq!((meter.admitted(), meter.outstanding()), (1, 0));
        debt.owe(100, 5);
        assert_eq!(meter.outstanding(), 105);
        debt.pay(1);
        assert_eq!(meter.outstanding(), 4, "the prompt was read");
        debt.pay(2);
        assert_eq!(meter.outstanding(), 2);
        debt.pay(50);
        assert_eq!(meter.outstanding(), 1, "more than was assumed");
        let mut other = meter.admit();
        other.owe(7, 0);
        assert_eq!((meter.admitted(), meter.outstanding()), (2, 8));
        drop((debt, other));
        assert_eq!((meter.admitted(), meter.outstanding()), (0, 0));
    }

    #[test]
    fn rates_follow_what_is_measured() {
        let near = |rate: f64, expected: f64| (rate / expected - 1.0).abs() < 0.01;
        let mut speed = Speed::default();
        assert_eq!((speed.decode(), speed.prefill()), (0.0, 0.0), "unknown");
        for _ in 0..100 {
            speed.step(4, 0, 0.1);
        }
        assert!(near(speed.decode(), 40.0), "{speed:?}");
        // A mixed step: a tenth of a second is what four decoding rows take.
        for _ in 0..10 {
            speed.step(4, 64, 0.9);
        }
        assert!(near(speed.prefill(), 80.0), "{speed:?}");
        assert!(near(speed.decode(), 40.0), "mixed steps do not tell: {speed:?}");
        // The machine gets four times slower: known after some seconds.
        for _ in 0..75 {
            speed.step(4, 0, 0.4);
        }
        assert!(near(speed.decode(), 10.0), "{speed:?}");
        assert_eq!(speed.steps, 185);
    }
}
