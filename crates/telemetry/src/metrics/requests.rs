//! What a gateway and a worker both measure: requests, from their start to their end.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::time::Instant;

use super::labels::label_values;
use super::{HistogramFamily, Metrics, registered, seconds};

/// `gen_ai.provider.name` of everything measured here.
const PROVIDER: &str = "tercet";

/// Error type of a request whose recorder was dropped before it finished: nobody waits for it.
const CANCELLED: &str = "CANCELLED";

const REQUEST_DURATION_SECONDS: [f64; 14] =
    [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
const TIME_TO_FIRST_TOKEN_SECONDS: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
const TIME_PER_OUTPUT_TOKEN_SECONDS: [f64; 13] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];

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
    /// Which tokens are counted.
    TokenKind {
        /// Of the prompt, as the model sees it.
        Prompt = "prompt",
        /// Of the completion.
        Completion = "completion",
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

/// Families of what is measured of requests.
#[derive(Debug)]
pub(super) struct RequestFamilies {
    request_duration: HistogramFamily<OutcomeLabels>,
    time_to_first_token: HistogramFamily<RequestLabels>,
    time_per_output_token: HistogramFamily<RequestLabels>,
    tokens: Family<TokenLabels, Counter>,
    streams: Family<StreamLabels, Gauge>,
    rejections: Family<RejectionLabels, Counter>,
}

impl RequestFamilies {
    pub(super) fn register(registry: &mut Registry) -> Self {
        Self {
            request_duration: seconds(
                registry,
                "gen_ai_server_request_duration",
                "From the request to the end of its answer",
                || Histogram::new(REQUEST_DURATION_SECONDS),
            ),
            time_to_first_token: seconds(
                registry,
                "gen_ai_server_time_to_first_token",
                "From the request to its first token: queue and prefill",
                || Histogram::new(TIME_TO_FIRST_TOKEN_SECONDS),
            ),
            time_per_output_token: seconds(
                registry,
                "gen_ai_server_time_per_output_token",
                "Mean time between the tokens after the first, per request",
                || Histogram::new(TIME_PER_OUTPUT_TOKEN_SECONDS),
            ),
            tokens: registered(registry, "tercet_tokens", "Tokens taken in and sent out"),
            streams: registered(registry, "tercet_streams", "Generations in progress"),
            rejections: registered(
                registry,
                "tercet_rejections",
                "Requests refused for want of room or of a worker",
            ),
        }
    }
}

impl Metrics {
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
        self.0.requests.rejections.get_or_create(&RejectionLabels { component, reason }).inc();
    }
}

/// Measures one generation. Its series are looked up once, not per token.
#[derive(Debug)]
pub struct RequestRecorder {
    metrics: Metrics,
    /// Labels of the outcome; its error type is known at the end.
    labels: OutcomeLabels,
    started: Instant,
    /// When the first and the latest token came.
    tokens: Option<(Instant, Instant)>,
    completion_tokens: u64,
    time_to_first_token: Histogram,
    time_per_output_token: Histogram,
    prompt_counter: Counter,
    completion_counter: Counter,
    streams: Gauge,
    finished: bool,
}

impl RequestRecorder {
    fn start(metrics: &Metrics, component: Component, operation: Operation, model: &str) -> Self {
        let families = &metrics.0.requests;
        let labels = RequestLabels {
            component,
            gen_ai_operation_name: operation,
            gen_ai_provider_name: PROVIDER,
            gen_ai_request_model: model.to_owned(),
        };
        let counter = |kind| {
            families.tokens.get_or_create_owned(&TokenLabels {
                component,
                gen_ai_request_model: model.to_owned(),
                kind,
            })
        };
        let streams = families.streams.get_or_create_owned(&StreamLabels {
            component,
            gen_ai_request_model: model.to_owned(),
        });
        streams.inc();
        Self {
            metrics: metrics.clone(),
            time_to_first_token: families.time_to_first_token.get_or_create_owned(&labels),
            time_per_output_token: families.time_per_output_token.get_or_create_owned(&labels),
            prompt_counter: counter(TokenKind::Prompt),
            completion_counter: counter(TokenKind::Completion),
            labels: OutcomeLabels {
                component,
                gen_ai_operation_name: operation,
                gen_ai_provider_name: PROVIDER,
                gen_ai_request_model: labels.gen_ai_request_model,
                error_type: "",
            },
            started: Instant::now(),
            tokens: None,
            completion_tokens: 0,
            streams,
            finished: false,
        }
    }

    /// Records the length of the prompt.
    pub fn prompt(&self, tokens: u32) {
        self.prompt_counter.inc_by(u64::from(tokens));
    }

    /// Records completion tokens that have just come.
    pub fn completion(&mut self, tokens: usize) {
        if tokens == 0 {
            return;
        }
        let now = Instant::now();
        let tokens = u64::try_from(tokens).unwrap_or(u64::MAX);
        self.completion_counter.inc_by(tokens);
        self.completion_tokens += tokens;
        match &mut self.tokens {
            Some((_, latest)) => *latest = now,
            none => {
                *none = Some((now, now));
                self.time_to_first_token.observe((now - self.started).as_secs_f64());
            }
        }
    }

    /// Records that the whole answer was given.
    pub fn succeed(mut self) {
        self.finish("");
    }

    /// Records that the request failed; `error_type` as told to the client.
    pub fn fail(mut self, error_type: &'static str) {
        self.finish(error_type);
    }

    fn finish(&mut self, error_type: &'static str) {
        self.finished = true;
        self.streams.dec();
        self.labels.error_type = error_type;
        self.metrics
            .0
            .requests
            .request_duration
            .get_or_create(&self.labels)
            .observe(self.started.elapsed().as_secs_f64());
        if let Some((first, latest)) = self.tokens
            && self.completion_tokens > 1
        {
            #[expect(clippy::cast_precision_loss, reason = "a count of tokens, far below 2^52")]
            let gaps = (self.completion_tokens - 1) as f64;
            self.time_per_output_token.observe((latest - first).as_secs_f64() / gaps);
        }
    }
}

impl Drop for RequestRecorder {
    fn drop(&mut self) {
        if !self.finished {
            self.finish(CANCELLED);
        }
    }
}
