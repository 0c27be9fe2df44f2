//! What makes a stream leave a worker that does not end it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{self, Instant};

use crate::fleet::{Answer, Link, Want};
use crate::service::Shared;

/// Looks at a stream per `progress_timeout`.
const LOOKS: u32 = 4;

/// Why a stream should leave its worker.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Trouble {
    /// The worker does not answer, and another can take the stream.
    Silent,
    /// The worker answers, but computes nothing for the stream's model.
    Stalled,
}

/// Resolves when a stream should leave its worker. `heard` counts the messages of the stream.
pub(super) async fn trouble(
    shared: Arc<Shared>,
    link: Arc<Link>,
    want: Want,
    heard: Arc<AtomicU64>,
) -> Trouble {
    let timeout = shared.config.progress_timeout;
    let mut watchdog = Watchdog::new(timeout, Instant::now());
    let stalled = async {
        loop {
            time::sleep(timeout / LOOKS).await;
            let now = Instant::now();
            if watchdog.look(now, heard.load(Ordering::Relaxed), link.steps(&want.model, now)) {
                return;
            }
        }
    };
    let silent = async {
        let mut answers = link.answers();
        loop {
            // The senders are in the link. Streams of a connection that is lost break by themselves,
            // and then say more.
            drop(answers.wait_for(|answer| *answer == Answer::Silent).await);
            tokio::select! {
                () = shared.fleet.room(&want) => return,
                back = answers.wait_for(|answer| *answer != Answer::Silent) => drop(back),
            }
        }
    };
    tokio::select! {
        () = silent => Trouble::Silent,
        () = stalled => Trouble::Stalled,
    }
}

/// Returns when a worker that was suspect answers again.
pub(super) async fn answers_again(link: &Link) {
    drop(link.answers().wait_for(|answer| *answer == Answer::Answering).await);
}

/// Notices that neither a stream nor its model makes progress.
#[derive(Debug)]
struct Watchdog {
    timeout: Duration,
    heard: u64,
    steps: Option<u64>,
    /// When the last progress was noticed.
    since: Instant,
}

impl Watchdog {
    fn new(timeout: Duration, now: Instant) -> Self {
        Self { timeout, heard: 0, steps: None, since: now }
    }

    /// Returns whether there was no progress for too long. Of a worker that does not tell its
    /// steps nothing is known: the stream may wait for its turn.
    fn look(&mut self, now: Instant, heard: u64, steps: Option<u64>) -> bool {
        let stands = steps.is_some() && (heard, steps) == (self.heard, self.steps);
        (self.heard, self.steps) = (heard, steps);
        if !stands {
            self.since = now;
        }
        now - self.since >= self.timeout
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_stream_and_a_model_that_both_stand_still_are_stalled() {
        let timeout = Duration::from_secs(10);
        let begun = Instant::now();
        let mut watchdog = Watchdog::new(timeout, begun);
        let mut seconds = 0;
        let mut look = |heard, steps| {
            seconds += 5;
            watchdog.look(begun + Duration::from_secs(seconds), heard, steps)
        };
        for heard in 0..5 {
            assert!(!look(heard, Some(7)), "messages come");
        }
        for steps in 7..12 {
            assert!(!look(4, Some(steps)), "others are computed");
        }
        for _ in 0..5 {
            assert!(!look(4, None), "nothing is known");
        }
        assert!(!look(4, Some(20)));
        assert!(!look(4, Some(20)));
        assert!(look(4, Some(20)));
    }
}
