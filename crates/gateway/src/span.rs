//! Spans and attributes of the OpenTelemetry RPC and GenAI conventions.

use tercet_proto::{GenerateSpec, convention, v1};
use tercet_telemetry::Operation;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};
use tracing::Span;
use tracing::field::Empty;

use crate::fleet::Link;

/// Returns the span of a call by a client, part of the client's trace.
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
        gen_ai.request.model = Empty,
        gen_ai.usage.input_tokens = Empty,
        gen_ai.usage.output_tokens = Empty,
        gen_ai.response.finish_reasons = Empty,
    );
    tercet_telemetry::extract(metadata, &span);
    span
}

/// Returns the span of one attempt to have a worker generate.
pub(crate) fn generation(
    parent: &Span,
    operation: Operation,
    model: &str,
    spec: &GenerateSpec,
    link: &Link,
) -> Span {
    let (host, port) = split_address(link.address());
    let span = tracing::info_span!(
        parent: parent,
        "generation",
        otel.name = format!("{} {model}", operation.as_str()),
        otel.kind = "client",
        otel.status_code = Empty,
        error.type = Empty,
        gen_ai.operation.name = operation.as_str(),
        gen_ai.provider.name = "tercet",
        gen_ai.request.model = model,
        gen_ai.request.stream = true,
        gen_ai.request.max_tokens = spec.stop.max_tokens,
        gen_ai.request.temperature = spec.sampling.temperature,
        gen_ai.request.top_k = spec.sampling.top_k,
        gen_ai.request.top_p = spec.sampling.top_p,
        gen_ai.request.frequency_penalty = spec.sampling.frequency_penalty,
        gen_ai.request.presence_penalty = spec.sampling.presence_penalty,
        gen_ai.request.seed = spec.sampling.seed,
        gen_ai.response.model = Empty,
        gen_ai.response.finish_reasons = Empty,
        gen_ai.usage.input_tokens = Empty,
        gen_ai.usage.output_tokens = Empty,
        rpc.system.name = "grpc",
        rpc.method = "tercet.v1.Inference/Generate",
        rpc.response.status_code = Empty,
        server.address = host,
        server.port = port,
        tercet.worker = link.worker().as_str(),
        tercet.resumed_tokens = Empty,
    );
    if let Some(resume) = &spec.resume {
        span.record("tercet.resumed_tokens", resume.token_ids.len());
    }
    span
}

/// Records how a completion ended.
pub(crate) fn record_finished(span: &Span, finished: &v1::Finished) {
    let usage = finished.usage.unwrap_or_default();
    span.record("gen_ai.usage.input_tokens", usage.prompt_tokens);
    span.record("gen_ai.usage.output_tokens", usage.completion_tokens);
    span.record("gen_ai.response.finish_reasons", convention::finish_reason(finished.reason()));
    span.record("rpc.response.status_code", convention::code_name(Code::Ok));
}

/// Records the status that a call by a client ended with.
pub(crate) fn record_answered(span: &Span, status: &Status) {
    span.record("rpc.response.status_code", convention::code_name(status.code()));
    // What the caller got wrong, and overload, are no errors of a server.
    if convention::is_server_error(status.code()) {
        span.record("otel.status_code", "ERROR");
        span.record("error.type", convention::error_type(status));
    }
}

/// Records the status that a call to a worker ended with.
pub(crate) fn record_received(span: &Span, status: &Status) {
    span.record("rpc.response.status_code", convention::code_name(status.code()));
    span.record("otel.status_code", "ERROR");
    span.record("error.type", convention::error_type(status));
}

/// Splits `host:port`; an address without a port has none.
fn split_address(address: &str) -> (&str, Option<u16>) {
    match address.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().ok()),
        None => (address, None),
    }
}
