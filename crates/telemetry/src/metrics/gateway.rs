//! What a gateway measures: its queue, and the workers that it sends requests to.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::labels::label_values;
use super::{HistogramFamily, Metrics, ModelLabels, gauge_value, registered, seconds};

/// From no wait at all to the longest that is left to wait by default.
const QUEUE_WAIT_SECONDS: [f64; 13] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

label_values! {
    /// Why a request was not left to wait for a worker.
    QueueRefusal {
        /// As many wait as may.
        Full = "full",
        /// It would have waited for longer than a request may.
        Long = "long",
        /// It did wait for as long as a request may.
        Waited = "waited",
        /// It would have waited beyond its deadline.
        Hopeless = "hopeless",
    }
    /// Why a stream went on at another worker.
    MoveCause {
        /// The connection broke or the stream ended without a word.
        Broken = "broken",
        /// No connection to the worker could be made.
        Unreachable = "unreachable",
        /// The worker is about to stop.
        Draining = "draining",
        /// The worker still loads the model.
        Loading = "loading",
        /// The worker had no room.
        Overloaded = "overloaded",
        /// A later stage of the worker's pipeline is gone.
        Pipeline = "pipeline",
        /// The worker cannot compute any more.
        Failed = "failed",
        /// The worker was silent for too long.
        Silent = "silent",
        /// The worker computed nothing for too long, though it answers.
        Stalled = "stalled",
    }
    /// Why new requests avoid a worker for a while.
    EjectionCause {
        /// Its connection broke, or none could be made.
        Broken = "broken",
        /// A model of it failed or hangs.
        Failed = "failed",
        /// It is far slower than its peers.
        Slow = "slow",
    }
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct QueueLabels {
    reason: QueueRefusal,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct WorkerLabels {
    worker: String,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct CauseLabels {
    cause: MoveCause,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct EjectionLabels {
    cause: EjectionCause,
}

/// Families of what a gateway measures.
#[derive(Debug)]
pub(super) struct GatewayFamilies {
    queue_length: Family<ModelLabels, Gauge>,
    queue_wait: HistogramFamily<ModelLabels>,
    queue_refusals: Family<QueueLabels, Counter>,
    worker_outstanding: Family<WorkerLabels, Gauge>,
    workers: Family<ModelLabels, Gauge>,
    stream_moves: Family<CauseLabels, Counter>,
    worker_suspected: Family<WorkerLabels, Gauge>,
    suspicions: Counter,
    ejections: Family<EjectionLabels, Counter>,
    workers_kept: Gauge,
    lone_runs: Counter,
    poison: Counter,
}

impl GatewayFamilies {
    pub(super) fn register(registry: &mut Registry) -> Self {
        Self {
            queue_length: registered(
                registry,
                "tercet_queue_length",
                "Requests that wait for a slot at a worker",
            ),
            queue_wait: seconds(
                registry,
                "tercet_queue_wait",
                "From the request to its slot at a worker",
                || Histogram::new(QUEUE_WAIT_SECONDS),
            ),
            queue_refusals: registered(
                registry,
                "tercet_queue_refusals",
                "Requests that were not left to wait for a slot",
            ),
            worker_outstanding: registered(
                registry,
                "tercet_worker_outstanding",
                "Requests of this gateway in progress at a worker",
            ),
            workers: registered(
                registry,
                "tercet_workers",
                "Workers that requests for a model can be sent to",
            ),
            stream_moves: registered(
                registry,
                "tercet_stream_moves",
                "Streams that went on at another worker",
            ),
            worker_suspected: registered(
                registry,
                "tercet_worker_suspected",
                "1 for a worker that does not answer this gateway and gets no new requests",
            ),
            suspicions: registered(
                registry,
                "tercet_suspicions",
                "Times that a worker stopped answering this gateway",
            ),
            ejections: registered(
                registry,
                "tercet_ejections",
                "Times that new requests avoided a worker for a while",
            ),
            workers_kept: registered(
                registry,
                "tercet_workers_kept",
                "Workers in use that answer, though the registry has lost them",
            ),
            lone_runs: registered(
                registry,
                "tercet_lone_runs",
                "Requests tried alone after two workers had crashed with them aboard",
            ),
            poison: registered(
                registry,
                "tercet_poison",
                "Requests ended because a worker crashed that had nothing else to compute",
            ),
        }
    }
}

impl Metrics {
    /// Tells how many requests wait for a slot at a worker with a model.
    pub fn set_queue_length(&self, model: &str, count: usize) {
        let labels = self.labels_of(model);
        self.0.gateway.queue_length.get_or_create(&labels).set(gauge_value(count));
    }

    /// Records how long a request waited for its slot.
    pub fn queue_waited(&self, model: &str, wait: Duration) {
        let labels = self.labels_of(model);
        self.0.gateway.queue_wait.get_or_create(&labels).observe(wait.as_secs_f64());
    }

    /// Counts a request that was not left to wait.
    pub fn queue_refused(&self, reason: QueueRefusal) {
        self.0.gateway.queue_refusals.get_or_create(&QueueLabels { reason }).inc();
    }

    /// Returns the number of requests in progress at a worker, to be kept by the gateway.
    pub fn worker_outstanding(&self, worker: &str) -> Gauge {
        let labels = WorkerLabels { worker: worker.to_owned() };
        self.0.gateway.worker_outstanding.get_or_create_owned(&labels)
    }

    /// Forgets a worker that is gone for good.
    pub fn forget_worker(&self, worker: &str) {
        let labels = WorkerLabels { worker: worker.to_owned() };
        self.0.gateway.worker_outstanding.remove(&labels);
        self.0.gateway.worker_suspected.remove(&labels);
    }

    /// Returns whether a worker does not answer, to be kept by the gateway.
    pub fn worker_suspected(&self, worker: &str) -> Gauge {
        let labels = WorkerLabels { worker: worker.to_owned() };
        self.0.gateway.worker_suspected.get_or_create_owned(&labels)
    }

    /// Counts that a worker stopped answering.
    pub fn suspicion(&self) {
        self.0.gateway.suspicions.inc();
    }

    /// Counts that new requests avoid a worker for a while.
    pub fn worker_ejected(&self, cause: EjectionCause) {
        self.0.gateway.ejections.get_or_create(&EjectionLabels { cause }).inc();
    }

    /// Tells how many workers are in use though the registry has lost them.
    pub fn set_workers_kept(&self, count: usize) {
        self.0.gateway.workers_kept.set(gauge_value(count));
    }

    /// Counts a request that is tried alone at a worker.
    pub fn lone_run(&self) {
        self.0.gateway.lone_runs.inc();
    }

    /// Counts a request that made a worker crash while it was there alone.
    pub fn poisoned(&self) {
        self.0.gateway.poison.inc();
    }

    /// Tells how many workers serve a model.
    pub fn set_workers(&self, model: &str, count: usize) {
        let labels = self.labels_of(model);
        self.0.gateway.workers.get_or_create(&labels).set(gauge_value(count));
    }

    /// Counts a stream that went on at another worker.
    pub fn stream_moved(&self, cause: MoveCause) {
        self.0.gateway.stream_moves.get_or_create(&CauseLabels { cause }).inc();
    }
}
