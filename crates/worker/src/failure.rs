//! The one place that turns what an engine says into statuses.

use tercet_engine::{SequenceFailure, SubmitError};
use tercet_proto::{InvalidRequest, Reason};
use tonic::Status;

use crate::core::Hosted;

/// Returns the status of a request that the engine did not take. `field` is where the prompt came
/// from, `prompt` its length: ids after it are resumed ones.
pub(crate) fn submit(model: &Hosted, error: &SubmitError, field: &str, prompt: usize) -> Status {
    let message = error.to_string();
    match error {
        SubmitError::EmptyPrompt => InvalidRequest::new(field, message).into(),
        SubmitError::InvalidId { index, id, vocab } => {
            let field = match index.checked_sub(prompt) {
                Some(resumed) => format!("resume.token_ids[{resumed}]"),
                None if field == "tokens.ids" => format!("{field}[{index}]"),
                None => field.to_owned(),
            };
            InvalidRequest::new(field, format!("must be below {vocab}, got {id}")).into()
        }
        SubmitError::InvalidBias { id, vocab } => {
            let what = format!("must be of an id below {vocab}");
            InvalidRequest::new(format!("sampling.logit_bias[{id}]"), what).into()
        }
        SubmitError::Sampling => InvalidRequest::new("sampling", message).into(),
        SubmitError::TooLong { tokens, limit } => too_long(field, *tokens, *limit),
        SubmitError::QueueFull { .. } => model.overloaded(message),
        SubmitError::NoPipeline => Reason::PipelineBroken.status(message),
        SubmitError::Stopped => Reason::WorkerFailed.status(message),
    }
}

/// Returns an error and its causes as one line, leaving out causes that the text before tells.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(present) = cause {
        let text = present.to_string();
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        cause = present.source();
    }
    line
}

/// Returns the status of a request longer than the context.
pub(crate) fn too_long(field: &str, tokens: usize, limit: usize) -> Status {
    let description = format!("must fit the context of {limit} tokens, got {tokens}");
    InvalidRequest::new(field, description).into()
}

/// Returns the status of a sequence that could not go on.
pub(crate) fn sequence(model: &Hosted, failure: &SequenceFailure) -> Status {
    let message = failure.to_string();
    match failure {
        SequenceFailure::NonFinite => Reason::NonFinite.status(message),
        SequenceFailure::Grammar(_) => InvalidRequest::new("grammar", message).into(),
        SequenceFailure::PipelineBroken(_) => Reason::PipelineBroken.status(message),
        SequenceFailure::Stopped => model.draining(),
    }
}

/// Returns the status of a sequence whose engine broke down.
pub(crate) fn engine_lost() -> Status {
    Reason::WorkerFailed.status("the engine dropped the sequence: a defect of the worker")
}

/// Returns the status of a call whose caller has stopped waiting.
pub(crate) fn deadline() -> Status {
    Status::deadline_exceeded("the deadline of the request has passed")
}
