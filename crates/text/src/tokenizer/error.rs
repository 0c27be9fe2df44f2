//! Why a tokenizer could not be built or used.

use super::{Tokenizer, pre};
use crate::Excerpt;

/// Why a tokenizer could not be built or used.
///
/// All but [`Encode`](Self::Encode), [`LongStretch`](Self::LongStretch) and
/// [`UnknownId`](Self::UnknownId) are the model file's fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The text is not a `tokenizer.json`.
    #[error("tokenizer.json does not parse: {reason}", reason = Excerpt(.reason))]
    Json {
        /// What the parser says.
        reason: String,
    },
    /// The kind of tokenizer is not supported.
    #[error(
        "tokenizer kind `{found}` is not supported: expected BPE (`BPE` in tokenizer.json, `gpt2` or \
         `llama` in GGUF)",
        found = Excerpt(.found),
    )]
    UnsupportedKind {
        /// The kind the model names.
        found: String,
    },
    /// A setting changes the ids or the text in a way that is not supported.
    #[error(
        "tokenizer setting `{setting}` is {found}, which is not supported: expected {expected}",
        found = Excerpt(.found),
    )]
    UnsupportedSetting {
        /// The setting's path in the file.
        setting: &'static str,
        /// Its value.
        found: String,
        /// The value that works.
        expected: &'static str,
    },
    /// The pre-tokenizer a GGUF file names is not known.
    #[error(
        "pre-tokenizer `{found}` is not known: expected one of {}",
        pre::NAMES.join(", "),
        found = Excerpt(.found),
    )]
    UnknownPreTokenizer {
        /// The name in `tokenizer.ggml.pre`.
        found: String,
    },
    /// The vocabulary has no tokens.
    #[error("the vocabulary is empty: expected at least one token")]
    Empty,
    /// There are more ids than any real vocabulary has.
    #[error("token id {id} is too large: expected less than {}", Tokenizer::MAX_IDS)]
    TooManyIds {
        /// The largest id.
        id: u64,
    },
    /// Two ids have one text.
    #[error(
        "token `{text}` has two ids, {first} and {second}: expected every token once",
        text = Excerpt(.text),
    )]
    DuplicateToken {
        /// The token.
        text: String,
        /// Its lower id.
        first: u32,
        /// Its higher id.
        second: u32,
    },
    /// Two tokens have one id.
    #[error(
        "token id {id} stands for two tokens, `{}` and `{}`: expected one",
        Excerpt(.first),
        Excerpt(.second),
    )]
    DuplicateId {
        /// The id.
        id: u32,
        /// One of its tokens.
        first: String,
        /// The other.
        second: String,
    },
    /// The token types do not match the tokens.
    #[error("there are {types} token types for {tokens} tokens: expected one each")]
    TokenTypes {
        /// How many types there are.
        types: usize,
        /// How many tokens there are.
        tokens: usize,
    },
    /// The scores do not match the tokens.
    #[error("there are {scores} scores for {tokens} tokens: expected one each")]
    Scores {
        /// How many scores there are.
        scores: usize,
        /// How many tokens there are.
        tokens: usize,
    },
    /// A score says nothing.
    #[error("the score of token id {id} is {score}: expected a number")]
    Score {
        /// The token.
        id: u32,
        /// Its score.
        score: f32,
    },
    /// A merge names no pair of tokens.
    #[error(
        "merge {rank} `{merge}` is malformed: expected two tokens with one space between",
        merge = Excerpt(.merge),
    )]
    MalformedMerge {
        /// Its place in the list.
        rank: usize,
        /// Its text.
        merge: String,
    },
    /// The merges do not fit the vocabulary.
    #[error("the merges do not fit the vocabulary: {reason}", reason = Excerpt(.reason))]
    Merges {
        /// Which token is missing.
        reason: String,
    },
    /// The id that starts a sequence is not in the vocabulary.
    #[error("the bos id {id} is not in the vocabulary of {ids} ids")]
    UnknownBos {
        /// The id.
        id: u32,
        /// The number of ids.
        ids: usize,
    },
    /// Prompts should start with an id that the model does not name.
    #[error("the model asks for bos before every prompt and names no bos id")]
    MissingBos,
    /// An id to be turned into text has no token.
    #[error("token id {id} is not in the vocabulary: expected less than {ids}, and no gap")]
    UnknownId {
        /// The id.
        id: u32,
        /// The number of ids, gaps included.
        ids: usize,
    },
    /// A text has nowhere to cut it for too long.
    #[error(
        "the text has {characters} characters in a row that are all white space or all not: \
         expected at most {}, break it up",
        Tokenizer::MAX_STRETCH
    )]
    LongStretch {
        /// The length of the stretch.
        characters: usize,
    },
    /// The tokenizer gave up on a text.
    #[error("the text cannot be tokenized: {reason}", reason = Excerpt(.reason))]
    Encode {
        /// What the tokenizer says.
        reason: String,
    },
}
