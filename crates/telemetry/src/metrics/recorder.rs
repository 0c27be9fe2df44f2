use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use tokio::time::Instant;

use super::{
    Component, Metrics, Operation, OutcomeLabels, RequestLabels, StreamLabels, TokenKind,
    TokenLabels,
};

/// `gen_ai.provider.name` of everything measured here.
const PROVIDER: &str = "tercet";

/// Error type of a request whose recorder was dropped before it finished: nobody waits for it.
const CANCELLED: &str = "CANCELLED";

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
    pub(super) fn start(
        metrics: &Metrics,
        component: Component,
        operation: Operation,
        model: &str,
    ) -> Self {
        let inner = &metrics.0;
        let labels = RequestLabels {
            component,
            gen_ai_operation_name: operation,
            gen_ai_provider_name: PROVIDER,
            gen_ai_request_model: model.to_owned(),
        };
        let counter = |kind| {
            inner.tokens.get_or_create_owned(&TokenLabels {
                component,
                gen_ai_request_model: model.to_owned(),
                kind,
            })
        };
        let streams = inner.streams.get_or_create_owned(&StreamLabels {
            component,
            gen_ai_request_model: model.to_owned(),
        });
        streams.inc();
        Self {
            metrics: metrics.clone(),
            time_to_first_token: inner.time_to_first_token.get_or_create_owned(&labels),
            time_per_output_token: inner.time_per_output_token.get_or_create_owned(&labels),
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
