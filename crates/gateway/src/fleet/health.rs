//! How long a worker that failed is left alone.

use std::time::Duration;

use tokio::time::Instant;

/// How long a worker is left alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ejection {
    /// After the first failure; doubles with each further one in a row.
    pub(crate) first: Duration,
    /// At most.
    pub(crate) longest: Duration,
}

/// The failures of a worker, or of one model there.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// Failures since the last sign of life.
    failures: u32,
    /// When the last of them was noticed.
    failed_at: Option<Instant>,
    /// Until when it is left alone.
    ejected_until: Option<Instant>,
}

impl Health {
    /// Counts a failure, and returns whether it is left alone for it.
    ///
    /// A broken connection breaks all its streams: only requests that began (`since`) after the
    /// last failure make it one more.
    pub(super) fn fail(&mut self, since: Instant, now: Instant, ejection: Ejection) -> bool {
        if self.failed_at.is_some_and(|failed_at| since <= failed_at) {
            return false;
        }
        let factor = 2_u32.saturating_pow(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.failed_at = Some(now);
        let Ejection { first, longest } = ejection;
        self.ejected_until = Some(now + first.saturating_mul(factor).min(longest));
        true
    }

    /// Leaves it alone until then, without holding it against it.
    pub(super) fn back_off(&mut self, until: Instant) {
        self.ejected_until = Some(self.ejected_until.map_or(until, |present| present.max(until)));
    }

    /// Forgets past failures: it answers.
    pub(super) fn forget(&mut self) {
        self.failures = 0;
    }

    /// Leaves it alone no longer, if it has failed only once: a new connection shows that there is
    /// nothing to wait for.
    pub(super) fn reconnect(&mut self) {
        if self.failures <= 1 {
            self.ejected_until = None;
        }
    }

    pub(super) fn ejected_until(&self) -> Option<Instant> {
        self.ejected_until
    }
}
