//! Every metric of every process, in one list.
//!
//! Names and buckets of `gen_ai_*` are those of the OpenTelemetry GenAI conventions
//! (<https://github.com/open-telemetry/semantic-conventions-genai>), spelt for Prometheus.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

mod recorder;
#[cfg(test)]
mod tests;

pub use self::recorder::RequestRecorder;

/// Most distinct values of a model label; later ones are counted as `other`.
///
/// A series lives as long as its process: names must not be able to fill the memory.
pub const MAX_MODEL_LABELS: usize = 256;

/// States of the models of a worker.
const MODEL_STATES: [&str; 4] = ["loading", "ready", "draining", "failed"];

const REQUEST_DURATION_SECONDS: [f64; 14] =
    [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
const TIME_TO_FIRST_TOKEN_SECONDS: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
const TIME_PER_OUTPUT_TOKEN_SECONDS: [f64; 13] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
/// From no wait at all to the longest that is left to wait by default.
const QUEUE_WAIT_SECONDS: [f64; 13] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// From one decode step of a tiny model to one prefill chunk of a large one.
const STEP_DURATION_SECONDS: [f64; 13] =
    [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// Declares label values: an enum and its text on the wire.
macro_rules! label_values {
    ($($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $text:literal,)+ })+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        pub enum $name { $($(#[$value_doc])* $value,)+ }

        impl $name {
            /// Returns the label's text.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$value => $text,)+ }
            }
        }

        impl EncodeLabelValue for $name {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
                self.as_str().encode(encoder)
            }
        }
    )+};
}

label_values! {
    /// Which part of the system measured: one process may be both.
    Component {
        /// The front door: durations include waiting and moves.
        Gateway = "gateway",
        /// The worker: durations of one stream on one worker.
        Worker = "worker",
    }
    /// What was asked for, as the GenAI conventions name it.
    Operation {
        /// A prompt or token ids to continue.
        TextCompletion = "text_completion",
        /// A conversation to continue.
        Chat = "chat",
    }
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
    /// Which tokens are counted.
    TokenKind {
        /// Of the prompt, as the model sees it.
        Prompt = "prompt",
        /// Of the completion.
        Completion = "completion",
    }
    /// Where a sequence is in the scheduler.
    SequenceState {
        /// Admitted, not begun.
        Waiting = "waiting",
        /// In the batch.
        Running = "running",
    }
    /// What a page of the KV pool is used for.
    PageState {
        /// Free.
        Free = "free",
        /// Held by a live sequence.
        Used = "used",
        /// Kept for a prefix that may come again.
        Cached = "cached",
    }
    /// What the row of a step is computed for.
    RowKind {
        /// Of a prompt.
        Prompt = "prompt",
        /// The last token of a stream, to choose the next.
        Decode = "decode",
        /// A guess of what follows that token, to be verified.
        Draft = "draft",
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
struct RequestLabels {
    component: Component,
    gen_ai_operation_name: Operation,
    gen_ai_provider_name: &'static str,
    gen_ai_request_model: String,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct OutcomeLabels {
    component: Component,
    gen_ai_operation_name: Operation,
    gen_ai_provider_name: &'static str,
    gen_ai_request_model: String,
    /// Empty, which Prometheus takes for absent, unless the request failed.
    error_type: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct TokenLabels {
    component: Component,
    gen_ai_request_model: String,
    kind: TokenKind,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct StreamLabels {
    component: Component,
    gen_ai_request_model: String,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct RejectionLabels {
    component: Component,
    reason: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct SequenceLabels {
    gen_ai_request_model: String,
    state: SequenceState,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ModelStateLabels {
    gen_ai_request_model: String,
    state: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct RowLabels {
    gen_ai_request_model: String,
    kind: RowKind,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct PageLabels {
    gen_ai_request_model: String,
    state: PageState,
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

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct QueueLabels {
    reason: QueueRefusal,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ModelLabels {
    gen_ai_request_model: String,
}

type HistogramFamily<L> = Family<L, Histogram, fn() -> Histogram>;

/// Every metric of the process. Clones are handles to the same values.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    /// Model labels in use. Locked for one look-up per request.
    models: Mutex<HashSet<String>>,
    request_duration: HistogramFamily<OutcomeLabels>,
    time_to_first_token: HistogramFamily<RequestLabels>,
    time_per_output_token: HistogramFamily<RequestLabels>,
    tokens: Family<TokenLabels, Counter>,
    streams: Family<StreamLabels, Gauge>,
    rejections: Family<RejectionLabels, Counter>,
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
    sequences: Family<SequenceLabels, Gauge>,
    kv_pages: Family<PageLabels, Gauge>,
    model_states: Family<ModelStateLabels, Gauge>,
    step_duration: HistogramFamily<ModelLabels>,
    step_rows: Family<RowLabels, Counter>,
    preemptions: Family<ModelLabels, Counter>,
    drafted_tokens: Family<ModelLabels, Counter>,
    accepted_tokens: Family<ModelLabels, Counter>,
    prefix_hit_tokens: Family<ModelLabels, Counter>,
    screened_tokens: Family<ModelLabels, Counter>,
    screened_rows: Family<ModelLabels, Counter>,
    screen_fallbacks: Family<ModelLabels, Counter>,
}

impl Metrics {
    /// Returns metrics that are all zero.
    pub fn new() -> Self {
        let mut inner = Inner {
            registry: Registry::default(),
            models: Mutex::default(),
            request_duration: Family::new_with_constructor(|| {
                Histogram::new(REQUEST_DURATION_SECONDS)
            }),
            time_to_first_token: Family::new_with_constructor(|| {
                Histogram::new(TIME_TO_FIRST_TOKEN_SECONDS)
            }),
            time_per_output_token: Family::new_with_constructor(|| {
                Histogram::new(TIME_PER_OUTPUT_TOKEN_SECONDS)
            }),
            tokens: Family::default(),
            streams: Family::default(),
            rejections: Family::default(),
            queue_length: Family::default(),
            queue_wait: Family::new_with_constructor(|| Histogram::new(QUEUE_WAIT_SECONDS)),
            queue_refusals: Family::default(),
            worker_outstanding: Family::default(),
            workers: Family::default(),
            stream_moves: Family::default(),
            worker_suspected: Family::default(),
            suspicions: Counter::default(),
            ejections: Family::default(),
            workers_kept: Gauge::default(),
            lone_runs: Counter::default(),
            poison: Counter::default(),
            sequences: Family::default(),
            kv_pages: Family::default(),
            model_states: Family::default(),
            step_duration: Family::new_with_constructor(|| Histogram::new(STEP_DURATION_SECONDS)),
            step_rows: Family::default(),
            preemptions: Family::default(),
            drafted_tokens: Family::default(),
            accepted_tokens: Family::default(),
            prefix_hit_tokens: Family::default(),
            screened_tokens: Family::default(),
            screened_rows: Family::default(),
            screen_fallbacks: Family::default(),
        };

        let registry = &mut inner.registry;
        registry.register_with_unit(
            "gen_ai_server_request_duration",
            "From the request to the end of its answer",
            Unit::Seconds,
            inner.request_duration.clone(),
        );
        registry.register_with_unit(
            "gen_ai_server_time_to_first_token",
            "From the request to its first token: queue and prefill",
            Unit::Seconds,
            inner.time_to_first_token.clone(),
        );
        registry.register_with_unit(
            "gen_ai_server_time_per_output_token",
            "Mean time between the tokens after the first, per request",
            Unit::Seconds,
            inner.time_per_output_token.clone(),
        );
        registry.register("tercet_tokens", "Tokens taken in and sent out", inner.tokens.clone());
        registry.register("tercet_streams", "Generations in progress", inner.streams.clone());
        registry.register(
            "tercet_rejections",
            "Requests refused for want of room or of a worker",
            inner.rejections.clone(),
        );
        registry.register(
            "tercet_queue_length",
            "Requests that wait for a slot at a worker",
            inner.queue_length.clone(),
        );
        registry.register_with_unit(
            "tercet_queue_wait",
            "From the request to its slot at a worker",
            Unit::Seconds,
            inner.queue_wait.clone(),
        );
        registry.register(
            "tercet_queue_refusals",
            "Requests that were not left to wait for a slot",
            inner.queue_refusals.clone(),
        );
        registry.register(
            "tercet_worker_outstanding",
            "Requests of this gateway in progress at a worker",
            inner.worker_outstanding.clone(),
        );
        registry.register(
            "tercet_workers",
            "Workers that requests for a model can be sent to",
            inner.workers.clone(),
        );
        registry.register(
            "tercet_stream_moves",
            "Streams that went on at another worker",
            inner.stream_moves.clone(),
        );
        registry.register(
            "tercet_worker_suspected",
            "1 for a worker that does not answer this gateway and gets no new requests",
            inner.worker_suspected.clone(),
        );
        registry.register(
            "tercet_suspicions",
            "Times that a worker stopped answering this gateway",
            inner.suspicions.clone(),
        );
        registry.register(
            "tercet_ejections",
            "Times that new requests avoided a worker for a while",
            inner.ejections.clone(),
        );
        registry.register(
            "tercet_workers_kept",
            "Workers in use that answer, though the registry has lost them",
            inner.workers_kept.clone(),
        );
        registry.register(
            "tercet_lone_runs",
            "Requests tried alone after two workers had crashed with them aboard",
            inner.lone_runs.clone(),
        );
        registry.register(
            "tercet_poison",
            "Requests ended because a worker crashed that had nothing else to compute",
            inner.poison.clone(),
        );
        registry.register(
            "tercet_sequences",
            "Sequences in the scheduler",
            inner.sequences.clone(),
        );
        registry.register("tercet_kv_pages", "Pages of the KV pool", inner.kv_pages.clone());
        registry.register(
            "tercet_model_state",
            "1 for the state that a model of this worker is in",
            inner.model_states.clone(),
        );
        registry.register_with_unit(
            "tercet_step_duration",
            "One step of the engine, all sequences of the batch",
            Unit::Seconds,
            inner.step_duration.clone(),
        );
        registry.register(
            "tercet_step_rows",
            "Rows computed by steps: prompt tokens and decoded tokens",
            inner.step_rows.clone(),
        );
        registry.register(
            "tercet_preemptions",
            "Sequences that lost their KV pages to older ones, to be computed anew",
            inner.preemptions.clone(),
        );
        registry.register(
            "tercet_prefix_hit_tokens",
            "Tokens that were not computed, since their KV pages were cached",
            inner.prefix_hit_tokens.clone(),
        );
        registry.register(
            "tercet_drafted_tokens",
            "Tokens that were guessed ahead and verified",
            inner.drafted_tokens.clone(),
        );
        registry.register(
            "tercet_accepted_tokens",
            "Tokens guessed ahead that were right, and took no step of their own",
            inner.accepted_tokens.clone(),
        );
        registry.register(
            "tercet_screened_tokens",
            "Tokens chosen with the help of the screen of the output matrix",
            inner.screened_tokens.clone(),
        );
        registry.register(
            "tercet_screened_rows",
            "Rows of the output matrix that were computed exactly for them",
            inner.screened_rows.clone(),
        );
        registry.register(
            "tercet_screen_fallbacks",
            "Tokens for which the screen could not rule out enough rows",
            inner.screen_fallbacks.clone(),
        );
        registry.register(
            "tercet_build",
            "What runs here",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        Self(Arc::new(inner))
    }

    /// Returns all metrics in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        text::encode(&mut out, &self.0.registry).expect("writing to a string cannot fail");
        out
    }

    /// Starts to measure a generation.
    ///
    /// Name only models that exist: each name is a time series for good.
    pub fn request(
        &self,
        component: Component,
        operation: Operation,
        model: &str,
    ) -> RequestRecorder {
        RequestRecorder::start(self, component, operation, &self.model_label(model))
    }

    /// Counts a request that was refused; `reason` as told to the client.
    pub fn reject(&self, component: Component, reason: &'static str) {
        self.0.rejections.get_or_create(&RejectionLabels { component, reason }).inc();
    }

    /// Tells how many requests wait for a slot at a worker with a model.
    pub fn set_queue_length(&self, model: &str, count: usize) {
        let labels = ModelLabels { gen_ai_request_model: self.model_label(model) };
        self.0.queue_length.get_or_create(&labels).set(gauge_value(count));
    }

    /// Records how long a request waited for its slot.
    pub fn queue_waited(&self, model: &str, wait: std::time::Duration) {
        let labels = ModelLabels { gen_ai_request_model: self.model_label(model) };
        self.0.queue_wait.get_or_create(&labels).observe(wait.as_secs_f64());
    }

    /// Counts a request that was not left to wait.
    pub fn queue_refused(&self, reason: QueueRefusal) {
        self.0.queue_refusals.get_or_create(&QueueLabels { reason }).inc();
    }

    /// Returns the number of requests in progress at a worker, to be kept by the gateway.
    pub fn worker_outstanding(&self, worker: &str) -> Gauge {
        let labels = WorkerLabels { worker: worker.to_owned() };
        self.0.worker_outstanding.get_or_create_owned(&labels)
    }

    /// Forgets a worker that is gone for good.
    pub fn forget_worker(&self, worker: &str) {
        let labels = WorkerLabels { worker: worker.to_owned() };
        self.0.worker_outstanding.remove(&labels);
        self.0.worker_suspected.remove(&labels);
    }

    /// Returns whether a worker does not answer, to be kept by the gateway.
    pub fn worker_suspected(&self, worker: &str) -> Gauge {
        let labels = WorkerLabels { worker: worker.to_owned() };
        self.0.worker_suspected.get_or_create_owned(&labels)
    }

    /// Counts that a worker stopped answering.
    pub fn suspicion(&self) {
        self.0.suspicions.inc();
    }

    /// Counts that new requests avoid a worker for a while.
    pub fn worker_ejected(&self, cause: EjectionCause) {
        self.0.ejections.get_or_create(&EjectionLabels { cause }).inc();
    }

    /// Tells how many workers are in use though the registry has lost them.
    pub fn set_workers_kept(&self, count: usize) {
        self.0.workers_kept.set(gauge_value(count));
    }

    /// Counts a request that is tried alone at a worker.
    pub fn lone_run(&self) {
        self.0.lone_runs.inc();
    }

    /// Counts a request that made a worker crash while it was there alone.
    pub fn poisoned(&self) {
        self.0.poison.inc();
    }

    /// Tells how many workers serve a model.
    pub fn set_workers(&self, model: &str, count: usize) {
        let labels = ModelLabels { gen_ai_request_model: self.model_label(model) };
        self.0.workers.get_or_create(&labels).set(gauge_value(count));
    }

    /// Counts a stream that went on at another worker.
    pub fn stream_moved(&self, cause: MoveCause) {
        self.0.stream_moves.get_or_create(&CauseLabels { cause }).inc();
    }

    /// Tells how many sequences of a model are in a state.
    pub fn set_sequences(&self, model: &str, state: SequenceState, count: usize) {
        let labels = SequenceLabels { gen_ai_request_model: self.model_label(model), state };
        self.0.sequences.get_or_create(&labels).set(gauge_value(count));
    }

    /// Tells how many pages of the KV pool of a model are in a state.
    pub fn set_kv_pages(&self, model: &str, state: PageState, count: usize) {
        let labels = PageLabels { gen_ai_request_model: self.model_label(model), state };
        self.0.kv_pages.get_or_create(&labels).set(gauge_value(count));
    }

    /// Tells whether a model of this worker is in a state.
    pub fn set_model_state(&self, model: &str, state: &'static str) {
        let model = self.model_label(model);
        for each in MODEL_STATES {
            let labels = ModelStateLabels { gen_ai_request_model: model.clone(), state: each };
            self.0.model_states.get_or_create(&labels).set(i64::from(each == state));
        }
    }

    /// Forgets what is told of a model of this worker that was unloaded; its counts stay.
    pub fn forget_model(&self, model: &str) {
        let gen_ai_request_model = self.model_label(model);
        let model = || gen_ai_request_model.clone();
        for state in [SequenceState::Waiting, SequenceState::Running] {
            self.0.sequences.remove(&SequenceLabels { gen_ai_request_model: model(), state });
        }
        for state in [PageState::Free, PageState::Used, PageState::Cached] {
            self.0.kv_pages.remove(&PageLabels { gen_ai_request_model: model(), state });
        }
        for state in MODEL_STATES {
            self.0.model_states.remove(&ModelStateLabels { gen_ai_request_model: model(), state });
        }
    }

    /// Records one step of the engine of a model, and the rows that it computed.
    pub fn step(&self, model: &str, duration: std::time::Duration, rows: &[(RowKind, usize)]) {
        let model = self.model_label(model);
        let labels = ModelLabels { gen_ai_request_model: model.clone() };
        self.0.step_duration.get_or_create(&labels).observe(duration.as_secs_f64());
        for &(kind, rows) in rows {
            let labels = RowLabels { gen_ai_request_model: model.clone(), kind };
            self.0.step_rows.get_or_create(&labels).inc_by(rows as u64);
        }
    }

    /// Counts sequences of a model that lost their pages to others.
    pub fn preempted(&self, model: &str, sequences: usize) {
        let labels = ModelLabels { gen_ai_request_model: self.model_label(model) };
        self.0.preemptions.get_or_create(&labels).inc_by(sequences as u64);
    }

    /// Counts tokens of a model that were not computed, since their pages were cached.
    pub fn prefix_hit(&self, model: &str, tokens: usize) {
        let labels = ModelLabels { gen_ai_request_model: self.model_label(model) };
        self.0.prefix_hit_tokens.get_or_create(&labels).inc_by(tokens as u64);
    }

    /// Counts tokens of a model that were guessed ahead, and those of them that were right.
    pub fn drafted(&self, model: &str, drafted: usize, accepted: usize) {
        let labels = ModelLabels { gen_ai_request_model: self.model_label(model) };
        self.0.drafted_tokens.get_or_create(&labels).inc_by(drafted as u64);
        self.0.accepted_tokens.get_or_create(&labels).inc_by(accepted as u64);
    }

    /// Counts tokens of a model that were chosen with the help of the screen of its output matrix,
    /// the rows computed exactly for them, and tokens for which the screen did not help.
    pub fn screened(&self, model: &str, tokens: u64, rows: u64, fallbacks: u64) {
        let labels = ModelLabels { gen_ai_request_model: self.model_label(model) };
        self.0.screened_tokens.get_or_create(&labels).inc_by(tokens);
        self.0.screened_rows.get_or_create(&labels).inc_by(rows);
        self.0.screen_fallbacks.get_or_create(&labels).inc_by(fallbacks);
    }

    fn model_label(&self, model: &str) -> String {
        let mut models = self.0.models.lock().unwrap_or_else(PoisonError::into_inner);
        if models.contains(model) {
            return model.to_owned();
        }
        if models.len() >= MAX_MODEL_LABELS {
            return "other".to_owned();
        }
        models.insert(model.to_owned());
        model.to_owned()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn gauge_value(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
