//! Guesses of how sequences go on, which the model then verifies several at a time.
//!
//! A guess never changes what is answered, only how many tokens a step answers: the model computes
//! the rows of the drafts beside the row that is due, and tokens are sampled row after row as long
//! as they are the drafts.

mod forced;
mod lookup;

use std::fmt;

pub use self::{forced::Forced, lookup::PromptLookup};
use crate::plan::SequenceId;

/// A sequence to guess tokens for.
#[derive(Clone, Copy, Debug)]
pub struct Undrafted<'a> {
    /// Its number.
    pub sequence: SequenceId,
    /// The tokens of its prompt and its completion so far.
    pub tokens: &'a [u32],
    /// Most drafts that can be of use.
    pub most: usize,
}

/// Guesses tokens, on the compute thread.
pub trait Drafter: fmt::Debug + Send {
    /// Returns, for each of these sequences, the tokens that may come next, in order: none where it
    /// has no idea.
    fn draft(&mut self, sequences: &[Undrafted<'_>]) -> Vec<Vec<u32>>;

    /// Forgets a sequence, which is over or goes on under another number.
    fn forget(&mut self, _sequence: SequenceId) {}
}

/// Whether and how an engine guesses tokens ahead.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Speculation {
    /// It does not.
    Off,
    /// By [`PromptLookup`].
    Lookup {
        /// Most drafts of a sequence in a step.
        tokens: usize,
    },
}
