//! What a worker measures: the schedulers of its models, their steps, and their states.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::labels::label_values;
use super::{HistogramFamily, Metrics, ModelLabels, gauge_value, registered, seconds};

/// States of the models of a worker.
const MODEL_STATES: [&str; 4] = ["loading", "ready", "draining", "failed"];

/// From one decode step of a tiny model to one prefill chunk of a large one.
const STEP_DURATION_SECONDS: [f64; 13] =
    [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

label_values! {
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
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct SequenceLabels {
    gen_ai_request_model: String,
    state: SequenceState,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct PageLabels {
    gen_ai_request_model: String,
    state: PageState,
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

/// Families of what a worker measures.
#[derive(Debug)]
pub(super) struct WorkerFamilies {
    sequences: Family<SequenceLabels, Gauge>,
    kv_pages: Family<PageLabels, Gauge>,
    model_states: Family<ModelStateLabels, Gauge>,
    step_duration: HistogramFamily<ModelLabels>,
    step_rows: Family<RowLabels, Counter>,
    preemptions: Family<ModelLabels, Counter>,
    prefix_hit_tokens: Family<ModelLabels, Counter>,
    drafted_tokens: Family<ModelLabels, Counter>,
    accepted_tokens: Family<ModelLabels, Counter>,
    screened_tokens: Family<ModelLabels, Counter>,
    screened_rows: Family<ModelLabels, Counter>,
    screen_fallbacks: Family<ModelLabels, Counter>,
}

impl WorkerFamilies {
    pub(super) fn register(registry: &mut Registry) -> Self {
        Self {
            sequences: registered(registry, "tercet_sequences", "Sequences in the scheduler"),
            kv_pages: registered(registry, "tercet_kv_pages", "Pages of the KV pool"),
            model_states: registered(
                registry,
                "tercet_model_state",
                "1 for the state that a model of this worker is in",
            ),
            step_duration: seconds(
                registry,
                "tercet_step_duration",
                "One step of the engine, all sequences of the batch",
                || Histogram::new(STEP_DURATION_SECONDS),
            ),
            step_rows: registered(
                registry,
                "tercet_step_rows",
                "Rows computed by steps: prompt tokens and decoded tokens",
            ),
            preemptions: registered(
                registry,
                "tercet_preemptions",
                "Sequences that lost their KV pages to older ones, to be computed anew",
            ),
            prefix_hit_tokens: registered(
                registry,
                "tercet_prefix_hit_tokens",
                "Tokens that were not computed, since their KV pages were cached",
            ),
            drafted_tokens: registered(
                registry,
                "tercet_drafted_tokens",
                "Tokens that were guessed ahead and verified",
            ),
            accepted_tokens: registered(
                registry,
                "tercet_accepted_tokens",
                "Tokens guessed ahead that were right, and took no step of their own",
            ),
            screened_tokens: registered(
                registry,
                "tercet_screened_tokens",
                "Tokens chosen with the help of the screen of the output matrix",
            ),
            screened_rows: registered(
                registry,
                "tercet_screened_rows",
                "Rows of the output matrix that were computed exactly for them",
            ),
            screen_fallbacks: registered(
                registry,
                "tercet_screen_fallbacks",
                "Tokens for which the screen could not rule out enough rows",
            ),
        }
    }
}

impl Metrics {
    /// Tells how many sequences of a model are in a state.
    pub fn set_sequences(&self, model: &str, state: SequenceState, count: usize) {
        let labels = SequenceLabels { gen_ai_request_model: self.model_label(model), state };
        self.0.worker.sequences.get_or_create(&labels).set(gauge_value(count));
    }

    /// Tells how many pages of the KV pool of a model are in a state.
    pub fn set_kv_pages(&self, model: &str, state: PageState, count: usize) {
        let labels = PageLabels { gen_ai_request_model: self.model_label(model), state };
        self.0.worker.kv_pages.get_or_create(&labels).set(gauge_value(count));
    }

    /// Tells whether a model of this worker is in a state.
    pub fn set_model_state(&self, model: &str, state: &'static str) {
        let model = self.model_label(model);
        for each in MODEL_STATES {
            let labels = ModelStateLabels { gen_ai_request_model: model.clone(), state: each };
            self.0.worker.model_states.get_or_create(&labels).set(i64::from(each == state));
        }
    }

    /// Forgets what is told of a model of this worker that was unloaded; its counts stay.
    pub fn forget_model(&self, model: &str) {
        let gen_ai_request_model = self.model_label(model);
        let model = || gen_ai_request_model.clone();
        for state in [SequenceState::Waiting, SequenceState::Running] {
            self.0
                .worker
                .sequences
                .remove(&SequenceLabels { gen_ai_request_model: model(), state });
        }
        for state in [PageState::Free, PageState::Used, PageState::Cached] {
            self.0.worker.kv_pages.remove(&PageLabels { gen_ai_request_model: model(), state });
        }
        for state in MODEL_STATES {
            self.0
                .worker
                .model_states
                .remove(&ModelStateLabels { gen_ai_request_model: model(), state });
        }
    }

    /// Records one step of the engine of a model, and the rows that it computed.
    pub fn step(&self, model: &str, duration: Duration, rows: &[(RowKind, usize)]) {
        let model = self.model_label(model);
        let labels = ModelLabels { gen_ai_request_model: model.clone() };
        self.0.worker.step_duration.get_or_create(&labels).observe(duration.as_secs_f64());
        for &(kind, rows) in rows {
            let labels = RowLabels { gen_ai_request_model: model.clone(), kind };
            self.0.worker.step_rows.get_or_create(&labels).inc_by(rows as u64);
        }
    }

    /// Counts sequences of a model that lost their pages to others.
    pub fn preempted(&self, model: &str, sequences: usize) {
        let labels = self.labels_of(model);
        self.0.worker.preemptions.get_or_create(&labels).inc_by(sequences as u64);
    }

    /// Counts tokens of a model that were not computed, since their pages were cached.
    pub fn prefix_hit(&self, model: &str, tokens: usize) {
        let labels = self.labels_of(model);
        self.0.worker.prefix_hit_tokens.get_or_create(&labels).inc_by(tokens as u64);
    }

    /// Counts tokens of a model that were guessed ahead, and those of them that were right.
    pub fn drafted(&self, model: &str, drafted: usize, accepted: usize) {
        let labels = self.labels_of(model);
        self.0.worker.drafted_tokens.get_or_create(&labels).inc_by(drafted as u64);
        self.0.worker.accepted_tokens.get_or_create(&labels).inc_by(accepted as u64);
    }

    /// Counts tokens of a model that were chosen with the help of the screen of its output matrix,
    /// the rows computed exactly for them, and tokens for which the screen did not help.
    pub fn screened(&self, model: &str, tokens: u64, rows: u64, fallbacks: u64) {
        let labels = self.labels_of(model);
        self.0.worker.screened_tokens.get_or_create(&labels).inc_by(tokens);
        self.0.worker.screened_rows.get_or_create(&labels).inc_by(rows);
        self.0.worker.screen_fallbacks.get_or_create(&labels).inc_by(fallbacks);
    }
}
