use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
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
    /// Whether the worker said that it is about to stop. It never takes that back.
    draining: AtomicBool,
    /// Locked for single reads and writes, never across an await.
    health: Mutex<Health>,
    outstanding: Gauge,
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
            draining: AtomicBool::new(false),
            health: Mutex::default(),
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

    /// Takes no new requests from here on.
    pub(crate) fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Leaves the worker alone until then, without holding it against it.
    pub(crate) fn back_off(&self, until: Instant) {
        let mut health = self.health();
        health.ejected_until = Some(health.ejected_until.map_or(until, |now| now.max(until)));
    }

    /// Forgets past failures: the worker answers.
    pub(crate) fn set_alive(&self) {
        self.health().failures = 0;
    }

    /// Leaves the worker alone for a while, longer with each failure in a row.
    ///
    /// A broken connection breaks all its streams: only requests that began (`since`) after the
    /// last failure make it one more.
    pub(super) fn eject(&self, since: Instant, first: Duration, longest: Duration) {
        let now = Instant::now();
        let mut health = self.health();
        if health.failed_at.is_some_and(|failed_at| since <= failed_at) {
            return;
        }
        let factor = 2_u32.saturating_pow(health.failures);
        health.failures = health.failures.saturating_add(1);
        health.failed_at = Some(now);
        health.ejected_until = Some(now + first.saturating_mul(factor).min(longest));
    }

    /// Returns until when the worker is left alone; `None` if it is not.
    pub(super) fn ejected_until(&self, now: Instant) -> Option<Instant> {
        self.health().ejected_until.filter(|until| *until > now)
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

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
