//! Spans and attributes of the OpenTelemetry RPC and GenAI conventions.

use tercet_proto::convention;
use tonic::{Code, Status, metadata::MetadataMap};
use tracing::{Span, field::Empty};

/// Returns the span of a call, part of the caller's trace.
pub(crate) fn server(method: &'static str, metadata: &MetadataMap) -> Span {
    let span = tracing::info_span!(
        "rpc",
        otel.name = method,
        otel.kind = "server",
        otel.status_code = Empty,
        rpc.system.name = "grpc",
        rpc.method = method,
        rpc.response.status_code = Empty,
        error.type = Empty,
        gen_ai.operation.name = Empty,
        gen_ai.provider.name = Empty,
        gen_ai.request.model = Empty,
        gen_ai.response.model = Empty,
        gen_ai.request.max_tokens = Empty,
        gen_ai.request.temperature = Empty,
        gen_ai.request.top_k = Empty,
        gen_ai.request.top_p = Empty,
        gen_ai.request.frequency_penalty = Empty,
        gen_ai.request.presence_penalty = Empty,
        gen_ai.request.seed = Empty,
        gen_ai.output.type = Empty,
        gen_ai.response.finish_reasons = Empty,
        gen_ai.usage.input_tokens = Empty,
        gen_ai.usage.output_tokens = Empty,
        gen_ai.usage.cache_read.input_tokens = Empty,
        // What the conventions have no names for.
        tercet.request.min_p = Empty,
        tercet.request.repetition_penalty = Empty,
        tercet.request.logit_biases = Empty,
        tercet.request.top_logprobs = Empty,
        tercet.request.grammar = Empty,
        tercet.resumed_tokens = Empty,
    );
    tercet_telemetry::extract(metadata, &span);
    span
}

/// Returns the span of one phase of a generation.
pub(crate) fn phase(parent: &Span, phase: Phase) -> Span {
    // The name of a span must be a literal.
    match phase {
        Phase::Queue => tracing::info_span!(parent: parent, "queue"),
        Phase::Prefill => tracing::info_span!(parent: parent, "prefill"),
        Phase::Decode => tracing::info_span!(parent: parent, "decode"),
    }
}

/// Where a generation is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Phase {
    /// Submitted.
    Queue,
    /// Left the queue.
    Prefill,
    /// Has a first token.
    Decode,
}

/// Returns the span of a sequence in a later stage of a pipeline, part of its request's trace.
pub(crate) fn stage(traceparent: &str, model: &str, layers: &str, sequence: u64) -> Span {
    let span = tracing::info_span!(
        "stage",
        otel.name = format!("stage {layers}"),
        otel.kind = "server",
        gen_ai.request.model = model,
        tercet.layers = layers,
        tercet.sequence = sequence,
    );
    tercet_telemetry::set_parent(&span, traceparent);
    span
}

/// Records that a call was answered.
pub(crate) fn record_ok(span: &Span) {
    span.record("rpc.response.status_code", convention::code_name(Code::Ok));
}

/// Records the status that a call ended with.
pub(crate) fn record_failed(span: &Span, status: &Status) {
    span.record("rpc.response.status_code", convention::code_name(status.code()));
    // What the caller got wrong, and overload, are no errors of a server.
    if convention::is_server_error(status.code()) {
        span.record("otel.status_code", "ERROR");
        span.record("error.type", convention::error_type(status));
    }
}

/// Records that the caller did not wait for the end.
pub(crate) fn record_cancelled(span: &Span) {
    span.record("rpc.response.status_code", convention::code_name(Code::Cancelled));
}
