use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use tercet_cluster::{WorkerId, WorkerRecord};
use tercet_proto::v1::inference_client::InferenceClient;
use tokio::time::Instant;
use tonic::transport::Channel;

/// The gateway's side of one incarnation of a worker: its channel, its load, its health.
#[derive(Debug)]
pub(crate) struct Link {
    worker: WorkerId,
    epoch: u64,
    address: String,
    client: InferenceClient<Channel>,
    /// Requests in progress.
    streams: AtomicUsize,
    /// Tokens these may still take.
    tokens: AtomicU64,
    /// Locked for single reads and writes, never across an await.
    standing: Mutex<Standing>,
    outstanding: Gauge,
}

/// What is known of a worker besides what the registry says.
#[derive(Debug, Default)]
struct Standing {
    /// Of the connection.
    health: Health,
    /// Of its models, by name.
    models: HashMap<String, ModelStanding>,
}

/// What is known of a model of a worker.
#[derive(Debug, Default)]
struct ModelStanding {
    /// The latest generation of the model that the worker said is about to go. It never takes that
    /// back.
    draining: Option<u64>,
    health: Health,
}

#[derive(Debug, Default)]
struct Health {
    /// Failures since the last sign of life.
    failures: u32,
    /// When the last of them was noticed.
    failed_at: Option<Instant>,
    /// Until when the worker is left alone.
    ejected_until: Option<Instant>,
}

impl Link {
    pub(super) fn new(record: &WorkerRecord, channel: Channel, outstanding: Gauge) -> Self {
        Self {
            worker: record.id.clone(),
            epoch: record.epoch,
            address: record.address.clone(),
            client: InferenceClient::new(channel),
            streams: AtomicUsize::new(0),
            tokens: AtomicU64::new(0),
            standing: Mutex::default(),
            outstanding,
        }
    }

    /// Returns whether this is the link to the worker of that record, not to an earlier incarnation.
    pub(super) fn leads_to(&self, record: &WorkerRecord) -> bool {
        self.epoch == record.epoch && self.address == record.address
    }

    pub(crate) fn worker(&self) -> &WorkerId {
        &self.worker
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Returns a client on the link's channel.
    pub(crate) fn client(&self) -> InferenceClient<Channel> {
        self.client.clone()
    }

    /// Takes no new requests for this generation of a model from here on.
    pub(super) fn set_draining(&self, model: &str, generation: u64) {
        self.standing().of(model).draining = Some(generation);
    }

    pub(super) fn is_draining(&self, model: &str, generation: u64) -> bool {
        let standing = self.standing();
        standing.models.get(model).is_some_and(|model| model.draining == Some(generation))
    }

    /// Leaves a model of the worker alone until then, without holding it against it.
    pub(super) fn back_off(&self, model: &str, until: Instant) {
        let mut standing = self.standing();
        let ejected = &mut standing.of(model).health.ejected_until;
        *ejected = Some(ejected.map_or(until, |present| present.max(until)));
    }

    /// Forgets past failures: the worker answers for the model.
    pub(super) fn set_alive(&self, model: &str) {
        let mut standing = self.standing();
        standing.health.failures = 0;
        if let Some(model) = standing.models.get_mut(model) {
            model.health.failures = 0;
        }
    }

    /// Leaves the worker, or only a model of it, alone for a while, longer with each failure in a
    /// row.
    pub(super) fn eject(
        &self,
        model: Option<&str>,
        since: Instant,
        first: Duration,
        longest: Duration,
    ) {
        let mut standing = self.standing();
        let health = match model {
            Some(model) => &mut standing.of(model).health,
            None => &mut standing.health,
        };
        health.fail(since, first, longest);
    }

    /// Returns until when a model of the worker is left alone; `None` if it is not.
    pub(super) fn ejected_until(&self, model: &str, now: Instant) -> Option<Instant> {
        let standing = self.standing();
        let of_model = standing.models.get(model).and_then(|model| model.health.ejected_until);
        of_model.max(standing.health.ejected_until).filter(|until| *until > now)
    }

    /// Returns requests in progress and the tokens they may still take.
    pub(super) fn load(&self) -> (usize, u64) {
        (self.streams.load(Ordering::Relaxed), self.tokens.load(Ordering::Relaxed))
    }

    pub(super) fn begin(&self, tokens: u64) {
        self.streams.fetch_add(1, Ordering::Relaxed);
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
        self.outstanding.inc();
    }

    pub(super) fn progress(&self, tokens: u64) {
        self.tokens.fetch_sub(tokens, Ordering::Relaxed);
    }

    pub(super) fn end(&self, tokens: u64) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
        self.tokens.fetch_sub(tokens, Ordering::Relaxed);
        self.outstanding.dec();
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Standing {
    /// Returns the standing of a model; only models that the registry named are asked for.
    fn of(&mut self, model: &str) -> &mut ModelStanding {
        self.models.entry(model.to_owned()).or_default()
    }
}

impl Health {
    /// Counts a failure.
    ///
    /// A broken connection breaks all its streams: only requests that began (`since`) after the
    /// last failure make it one more.
    fn fail(&mut self, since: Instant, first: Duration, longest: Duration) {
        if self.failed_at.is_some_and(|failed_at| since <= failed_at) {
            return;
        }
        let now = Instant::now();
        let factor = 2_u32.saturating_pow(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.failed_at = Some(now);
        self.ejected_until = Some(now + first.saturating_mul(factor).min(longest));
    }
}
