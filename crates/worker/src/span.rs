//! Spans and attributes of the OpenTelemetry RPC and GenAI conventions.

use tercet_proto::{Reason, v1::FinishReason};
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
        gen_ai.request.seed = Empty,
        gen_ai.response.finish_reasons = Empty,
        gen_ai.usage.input_tokens = Empty,
        gen_ai.usage.output_tokens = Empty,
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
    span.record("rpc.response.status_code", code_name(Code::Ok));
}

/// Records the status that a call ended with.
pub(crate) fn record_failed(span: &Span, status: &Status) {
    span.record("rpc.response.status_code", code_name(status.code()));
    // What the caller got wrong, and overload, are no errors of a server.
    if is_server_error(status.code()) {
        span.record("otel.status_code", "ERROR");
        span.record("error.type", error_type(status));
    }
}

/// Records that the caller did not wait for the end.
pub(crate) fn record_cancelled(span: &Span) {
    span.record("rpc.response.status_code", code_name(Code::Cancelled));
}

/// Returns the most telling name of a failure: its reason, else its code.
pub(crate) fn error_type(status: &Status) -> &'static str {
    Reason::of(status).map_or_else(|| code_name(status.code()), Reason::as_str)
}

/// Returns how the GenAI conventions call the end of a completion.
pub(crate) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Unspecified => "unspecified",
        FinishReason::Eos | FinishReason::StopString => "stop",
        FinishReason::MaxTokens | FinishReason::Context => "length",
    }
}

fn is_server_error(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
