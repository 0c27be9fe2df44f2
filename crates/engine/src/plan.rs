//! What a step computes, as said by the scheduler and followed by every stage.

use std::fmt;

use crate::sampler::SamplingParams;

/// Number of a sequence, never reused within a scheduler.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SequenceId(pub u64);

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of a KV page, the same in every stage. The scheduler says who has which.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PageId(pub u32);

impl fmt::Display for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One step: the rows to push through the stages, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    /// Number of the step, ascending by one.
    pub step: u64,
    /// Sequences that begin with this step.
    pub open: Vec<OpenSequence>,
    /// Sequences that ended, or lost their pages, before this step.
    pub close: Vec<SequenceId>,
    /// What to compute. A sequence has at most one run in a step.
    pub runs: Vec<Run>,
}

impl StepPlan {
    /// Returns the number of rows of all runs.
    pub fn rows(&self) -> usize {
        self.runs.iter().map(|run| run.rows).sum()
    }
}

/// A sequence that begins.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenSequence {
    /// Its number.
    pub id: SequenceId,
    /// How its tokens are chosen.
    pub sampling: SamplingParams,
    /// W3C trace context of its request; may be empty.
    pub traceparent: String,
    /// Pages that hold its first positions already: full, shared, never written again.
    pub pages: Vec<PageId>,
    /// Tokens of its prompt; empty unless sampling looks at them.
    pub prompt: Vec<u32>,
    /// Tokens of its completion so far; empty unless sampling looks at them.
    pub completion: Vec<u32>,
}

/// Consecutive rows of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// The sequence.
    pub sequence: SequenceId,
    /// Position of the first row, from 0.
    pub position: usize,
    /// Number of rows, at least 1.
    pub rows: usize,
    /// What the last stage returns.
    pub output: RunOutput,
    /// Pages that the sequence gets for these rows; nobody else has them.
    pub pages: Vec<PageId>,
}

impl Run {
    /// Returns how many of the last rows are drafts: the tokens may turn out to be others.
    pub fn drafts(&self) -> usize {
        match &self.output {
            RunOutput::Verify(drafts) => drafts.len(),
            RunOutput::None | RunOutput::Sample | RunOutput::Score(_) => 0,
        }
    }

    /// Returns whether the run is of a sequence that continues from its last token.
    pub fn decodes(&self) -> bool {
        match &self.output {
            RunOutput::Sample => self.rows == 1,
            RunOutput::Verify(_) => true,
            RunOutput::None | RunOutput::Score(_) => false,
        }
    }
}

/// What the last stage returns for a run.
#[derive(Clone, Debug, PartialEq)]
pub enum RunOutput {
    /// Nothing: more of the prompt follows.
    None,
    /// The token sampled after the last row.
    Sample,
    /// The rows after the first, one for each of these ids, are drafts: guesses of the tokens to
    /// come. The token sampled after the first row, and, as long as the tokens sampled are the
    /// drafts, those after the following rows.
    Verify(Vec<u32>),
    /// The log-probability of each of these tokens after its row, and the likeliest token after
    /// every row. As many targets as rows, or one less: the last token of a text has none.
    Score(Vec<u32>),
}

/// What one step produced.
#[derive(Clone, Debug, PartialEq)]
pub struct StepResult {
    /// Number of the step.
    pub step: u64,
    /// One for each run that asked for something or failed, in the order of the runs.
    pub results: Vec<RunResult>,
}

/// What one run produced.
#[derive(Clone, Debug, PartialEq)]
pub struct RunResult {
    /// The sequence.
    pub sequence: SequenceId,
    /// The answer.
    pub outcome: RunOutcome,
}

/// The answer of the last stage to one run.
#[derive(Clone, Debug, PartialEq)]
pub enum RunOutcome {
    /// The token sampled after the last row.
    Token {
        /// The token.
        id: u32,
        /// How likely it was, if the sequence asks for that.
        logprobs: Option<TokenLogprobs>,
    },
    /// The tokens sampled after the first row and drafts that were right, at least one.
    Tokens(Vec<SampledToken>),
    /// Log-probabilities of the targets and the likeliest token after every row.
    Scores(Scores),
    /// The computation gave an infinity or a NaN; the request cannot go on.
    NonFinite,
    /// The completion can no longer keep to its grammar; says why.
    Grammar(String),
}

/// A token that was sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub id: u32,
    /// How likely it was, if the sequence asks for that.
    pub logprobs: Option<TokenLogprobs>,
}

/// Log-probabilities at one place, of the model: whatever the sampling parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Natural log-probability of the token chosen.
    pub logprob: f32,
    /// The likeliest tokens and their log-probabilities, likeliest first, the lower id first on a
    /// tie.
    pub top: Vec<(u32, f32)>,
}

/// Log-probabilities of given tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    /// Natural log-probability of each target.
    pub logprobs: Vec<f32>,
    /// The likeliest token after each row, the lowest on a tie.
    pub top_ids: Vec<u32>,
}
