//! How the conventions of OpenTelemetry spell what a call came to.

use tonic::{Code, Status};

use crate::{Reason, v1::FinishReason};

/// Returns the most telling name of a failure, for `error.type`: its reason, else its code.
pub fn error_type(status: &Status) -> &'static str {
    Reason::of(status).map_or_else(|| code_name(status.code()), Reason::as_str)
}

/// Returns how the GenAI conventions call the end of a completion.
pub fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Unspecified => "unspecified",
        FinishReason::Eos | FinishReason::StopString | FinishReason::StopToken => "stop",
        FinishReason::MaxTokens | FinishReason::Context => "length",
    }
}

/// Returns whether a server span that ended with `code` counts as an error: what the caller got
/// wrong, and overload, do not.
pub fn is_server_error(code: Code) -> bool {
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

/// Returns the name of `code` in the gRPC specification.
pub fn code_name(code: Code) -> &'static str {
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

/// Returns the name under which `grpc.health.v1` tells whether a model can be asked for.
pub fn health_name(model: &str) -> String {
    format!("tercet.v1.Inference/{model}")
}
