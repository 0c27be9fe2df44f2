//! What is asked of an engine, and what it tells.

use thiserror::Error;

use crate::{
    plan::{Scores, TokenLogprobs},
    sampler::SamplingParams,
};

/// A sequence to compute.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceRequest {
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// Completion tokens that an earlier, broken stream of the same request has emitted.
    pub resumed: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// What is wanted.
    pub output: Output,
    /// W3C trace context of the request; may be empty.
    pub traceparent: String,
    /// Keeps cached prefixes apart: only requests of the same salt share pages.
    pub cache_salt: String,
}

impl SequenceRequest {
    /// Returns whether the computation may begin after a cached prefix. Log-probabilities of the
    /// prompt need every row of it.
    pub fn may_skip_rows(&self) -> bool {
        match self.output {
            Output::Generate { .. } => true,
            Output::Score => false,
        }
    }
}

/// What is wanted of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// A completion.
    Generate {
        /// Most completion tokens, resumed ones included, at least 1.
        max_tokens: usize,
        /// Tokens that end the completion; empty to go on past them.
        stop_ids: Vec<u32>,
    },
    /// Log-probabilities of the prompt itself.
    Score,
}

/// What happens to a sequence.
#[derive(Clone, Debug, PartialEq)]
pub enum SequenceEvent {
    /// The sequence left the queue: its first step is computed next. Comes again when the sequence
    /// lost its KV pages to older ones and is computed anew.
    Scheduled {
        /// Tokens, of the prompt first, whose keys and values were there already.
        cached: usize,
    },
    /// The next token of the completion.
    Token {
        /// Its index in the completion, from 0.
        index: usize,
        /// The token.
        id: u32,
        /// How likely it was, if that was asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The answer to a `Score` sequence; nothing follows.
    Scores(Scores),
    /// The completion is complete; nothing follows.
    Finished(StopReason),
    /// The sequence cannot go on; nothing follows.
    Failed(SequenceFailure),
}

/// Why a completion is complete.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StopReason {
    /// One of the stop ids was sampled.
    Eos,
    /// `max_tokens` was reached.
    MaxTokens,
    /// The context is full.
    Context,
}

/// Why a sequence cannot go on.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum SequenceFailure {
    /// The fault of the request and the model together: the same everywhere.
    #[error("the model's activations became infinite or NaN")]
    NonFinite,
    /// The fault of the request and the model together: the same everywhere.
    #[error("the completion cannot keep to the grammar: {0}")]
    Grammar(String),
    /// A later stage was lost; the sequence can go on in another pipeline.
    #[error("the pipeline broke: {0}")]
    PipelineBroken(String),
    /// The engine is stopping; the sequence can go on elsewhere.
    #[error("the engine stopped")]
    Stopped,
}

/// Why a sequence was not taken.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum SubmitError {
    /// The fault of the request.
    #[error("the prompt is empty: at least one token id is needed")]
    EmptyPrompt,
    /// The fault of the request.
    #[error("token id {id} at index {index} is not below the vocabulary size {vocab}")]
    InvalidId {
        /// Index in the prompt, then the resumed ids.
        index: usize,
        /// The id.
        id: u32,
        /// Number of ids.
        vocab: usize,
    },
    /// The fault of the request.
    #[error("token id {id} with a bias is not below the vocabulary size {vocab}")]
    InvalidBias {
        /// The id.
        id: u32,
        /// Number of ids.
        vocab: usize,
    },
    /// The fault of whoever made the request: these are checked where it comes in.
    #[error("the sampling parameters are out of their bounds")]
    Sampling,
    /// The fault of the request.
    #[error("{tokens} tokens do not fit the context of {limit}")]
    TooLong {
        /// Tokens of the prompt and the resumed ids.
        tokens: usize,
        /// Most tokens.
        limit: usize,
    },
    /// Too many sequences wait.
    #[error("{waiting} sequences are waiting already")]
    QueueFull {
        /// Most waiting sequences.
        waiting: usize,
    },
    /// The engine holds the first layers of a model and no later stage is attached.
    #[error("the later stages of the pipeline are not attached")]
    NoPipeline,
    /// The engine is stopping.
    #[error("the engine is stopping")]
    Stopped,
}
