//! The lines in which requests wait for a slot at a worker: one per model, first come first served.
//!
//! ```text
//! nobody waits, a slot is free ----------------------------> the worker
//! else: at the end of the line, or refused if that is too long or would take too long
//!       the first one looks, whenever something changes ---> the worker, and the next one looks
//! ```
//!
//! Only the first of a line looks for a slot, so one change wakes one request per line, and nobody
//! is overtaken. A stream that lost its worker waits in a line of its own, before all new requests
//! for the same workers: its client has begun to read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tercet_telemetry::{Metrics, QueueRefusal};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::Want;

mod pace;

use self::pace::Pace;

/// What a line is for: a model, and for streams that have begun the identity they need.
type Key = (String, Option<String>);

/// How long lines may get.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Most new requests that wait for one model.
    pub(super) length: usize,
    /// Longest wait for a slot.
    pub(super) wait: Duration,
}

/// All lines of a gateway.
#[derive(Debug)]
pub(crate) struct Lines {
    limits: Limits,
    metrics: Metrics,
    /// Position of the next request among all that ever came.
    next: AtomicU64,
    /// Locked for single operations, never across an await.
    open: Mutex<BTreeMap<Key, Line>>,
    /// Grows with every change that may make room, for those that wait for something else.
    changes: watch::Sender<u64>,
}

/// The requests that wait for the same.
#[derive(Debug, Default)]
struct Line {
    waiting: BTreeMap<u64, Arc<Notify>>,
    pace: Pace,
}

/// A place in a line, until dropped.
#[derive(Debug)]
pub(super) struct Place<'a> {
    lines: &'a Lines,
    key: Key,
    number: u64,
    wake: Arc<Notify>,
}

/// Why a request does not wait.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Refusal {
    /// Nobody's fault.
    #[error("{waiting} requests wait already, which is all that may")]
    Full { waiting: usize, retry: Duration },
    /// Nobody's fault.
    #[error("it would wait for about {wait:.1?}, longer than a request may")]
    Long { wait: Duration, retry: Duration },
    /// Nobody's fault.
    #[error("no worker had room for {wait:.1?}")]
    Waited { wait: Duration, retry: Duration },
    /// Nobody's fault: the caller cannot wait that long.
    #[error("it would wait for about {wait:.1?}, longer than the deadline of the call allows")]
    Hopeless { wait: Duration },
}

impl Lines {
    pub(super) fn new(limits: Limits, metrics: Metrics) -> Self {
        Self {
            limits,
            metrics,
            next: AtomicU64::new(0),
            open: Mutex::default(),
            changes: watch::Sender::new(0),
        }
    }

    /// Returns the next number: who has a lower one goes first.
    pub(super) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Tells that a worker may have room, or may have gone.
    pub(super) fn call(&self) {
        self.changes.send_modify(|changes| *changes += 1);
        let open = self.open();
        // Streams that have begun look first.
        for line in open.values().rev() {
            line.wake();
        }
    }

    /// Forgets what is known of models that are gone, unless somebody still waits for them.
    pub(super) fn forget(&self, is_gone: impl Fn(&str) -> bool) {
        self.open().retain(|(model, _), line| !line.waiting.is_empty() || !is_gone(model));
    }

    /// Returns how many requests wait for a model.
    pub(super) fn waiting(&self, model: &str) -> usize {
        length(&self.open(), model)
    }

    /// Returns a receiver that changes with every change that may make room.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Returns whether nobody waits who goes before that request.
    pub(super) fn is_first(&self, want: &Want) -> bool {
        let open = self.open();
        let line = open.get(&key(want));
        line.is_none_or(|line| line.waiting.range(..want.number).next().is_none())
    }

    /// Returns whether streams that have begun wait for the workers of an identity.
    pub(super) fn has_begun(&self, model: &str, identity: &str) -> bool {
        let key = (model.to_owned(), Some(identity.to_owned()));
        self.open().get(&key).is_some_and(|line| !line.waiting.is_empty())
    }

    /// Returns why a new request that came now would be refused, if others wait. Costs next to
    /// nothing: for the time before any work is done.
    pub(super) fn refusal(&self, want: &Want, deadline: Option<Instant>) -> Option<Refusal> {
        let open = self.open();
        let line = open.get(&key(want)).filter(|line| !line.waiting.is_empty())?;
        let refusal = self.judge(line, deadline, Instant::now());
        drop(open);
        self.count(refusal.as_ref());
        refusal
    }

    /// Returns a place in the line, unless that is too long for the request. One that had a worker
    /// already is not sent away.
    pub(super) fn enter(
        &self,
        want: &Want,
        deadline: Option<Instant>,
    ) -> Result<Place<'_>, Refusal> {
        let key = key(want);
        let mut open = self.open();
        let line = open.entry(key.clone()).or_default();
        if !want.admitted
            && let Some(refusal) = self.judge(line, deadline, Instant::now())
        {
            drop(open);
            self.count(Some(&refusal));
            return Err(refusal);
        }
        let wake = Arc::new(Notify::new());
        line.waiting.insert(want.number, Arc::clone(&wake));
        self.metrics.set_queue_length(&key.0, length(&open, &key.0));
        Ok(Place { lines: self, key, number: want.number, wake })
    }

    /// Returns why a request has waited long enough, and counts that.
    pub(super) fn waited(&self, want: &Want) -> Refusal {
        let retry = self.open().get(&key(want)).map_or(pace::UNKNOWN_RETRY, |line| {
            line.pace.retry(line.waiting.len(), Instant::now(), want.number)
        });
        let refusal = Refusal::Waited { wait: self.limits.wait, retry };
        self.count(Some(&refusal));
        refusal
    }

    fn judge(&self, line: &Line, deadline: Option<Instant>, now: Instant) -> Option<Refusal> {
        let waiting = line.waiting.len();
        let retry = || line.pace.retry(waiting, now, self.next.load(Ordering::Relaxed));
        if waiting >= self.limits.length {
            return Some(Refusal::Full { waiting, retry: retry() });
        }
        let wait = line.pace.wait(waiting + 1, now)?;
        let left = deadline.map(|deadline| deadline.saturating_duration_since(now));
        if left.is_some_and(|left| wait > left) {
            return Some(Refusal::Hopeless { wait });
        }
        (wait > self.limits.wait).then(|| Refusal::Long { wait, retry: retry() })
    }

    fn count(&self, refusal: Option<&Refusal>) {
        let Some(refusal) = refusal else { return };
        self.metrics.queue_refused(match refusal {
            Refusal::Full { .. } => QueueRefusal::Full,
            Refusal::Long { .. } => QueueRefusal::Long,
            Refusal::Waited { .. } => QueueRefusal::Waited,
            Refusal::Hopeless { .. } => QueueRefusal::Hopeless,
        });
    }

    fn open(&self) -> MutexGuard<'_, BTreeMap<Key, Line>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    /// Has the first one look.
    fn wake(&self) {
        if let Some(first) = self.waiting.values().next() {
            first.notify_one();
        }
    }
}

impl Place<'_> {
    /// Resolves when the request should look for a slot: something changed while it was the first.
    pub(super) async fn called(&self) {
        self.wake.notified().await;
    }

    /// Tells that the request has got its slot.
    pub(super) fn served(&self) {
        let mut open = self.lines.open();
        if let Some(line) = open.get_mut(&self.key) {
            line.pace.served(Instant::now(), line.waiting.len() > 1);
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut open = self.lines.open();
        let Some(line) = open.get_mut(&self.key) else { return };
        let was_first = line.waiting.keys().next() == Some(&self.number);
        line.waiting.remove(&self.number);
        if !line.waiting.is_empty() {
            if was_first {
                // There may be room for more than one.
                line.wake();
            }
        } else if self.key.1.is_some() {
            open.remove(&self.key);
            // New requests stood behind this line.
            for (_, line) in open.iter().filter(|((model, _), _)| *model == self.key.0) {
                line.wake();
            }
        } else {
            line.pace.pause();
        }
        self.lines.metrics.set_queue_length(&self.key.0, length(&open, &self.key.0));
    }
}

fn key(want: &Want) -> Key {
    (want.model.clone(), want.identity.clone())
}

/// Returns how many requests wait for a model.
fn length(open: &BTreeMap<Key, Line>, model: &str) -> usize {
    let lines = open.range((model.to_owned(), None)..).take_while(|((name, _), _)| name == model);
    lines.map(|(_, line)| line.waiting.len()).sum()
}
