//! Structured answers: which tokens may come next so that the text keeps to a grammar.
//!
//! ```text
//! Grammar --Grammars::compile--> Constraint --mask--> ids allowed next
//!                                    ^------accept(id)---- the id that was chosen
//! ```
//!
//! A constraint's state depends on the grammar and the accepted ids alone, so an answer that was
//! broken off is continued exactly by accepting its ids again. Tokens are never forced: of several
//! spellings that the grammar allows, the model chooses.

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
};
use toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie};

use crate::{Excerpt, Tokenizer};

#[cfg(test)]
mod tests;

/// Compiled grammars kept for the requests that come again.
const KEPT: usize = 64;
/// Stack for compiling and following: the library recurses over the grammar, so that a large schema
/// would overflow the stack of a thread. Only what is used of it becomes memory.
const STACK: usize = 256 << 20;
/// White space between the parts of a JSON value: a space, or a line break and an indentation.
const WHITE_SPACE: &str = r" |\n[ \t]{0,20}";
/// Longest message of the library that is passed on, in characters.
const MESSAGE: usize = 300;

/// What an answer has to look like.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Grammar {
    /// A JSON value that fits this JSON Schema (draft 2020-12 unless it says otherwise; `$ref`
    /// within the schema only). Between its parts there is at most a space, or a line break with an
    /// indentation.
    JsonSchema(String),
    /// Any JSON object.
    JsonObject,
    /// The whole answer matches this regular expression (syntax of the `regex` crate, without
    /// anchors and look-around).
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
}

impl Grammar {
    /// Returns the size of what the caller wrote.
    fn bytes(&self) -> usize {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) => text.len(),
            Self::JsonObject => 0,
            Self::Choice(texts) => texts.iter().map(String::len).sum(),
        }
    }
}

/// A grammar could not be compiled or followed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// The grammar is malformed, asks for something that is not supported, or is too large.
    #[error("the grammar cannot be used: {}", Excerpt(.0))]
    Invalid(String),
    /// The answer could never end: the model has no end-of-sequence token.
    #[error("structured output needs an end-of-sequence token and the model has none")]
    NoEnd,
    /// There is nothing to compile it for.
    #[error("structured output needs a tokenizer and none is set up")]
    NoTokenizer,
    /// Following the grammar takes more work per token than is allowed.
    #[error("the grammar is too complex to follow: {}", Excerpt(.0))]
    TooComplex(String),
    /// A token does not fit the grammar.
    #[error("token {id} does not fit the grammar at this place")]
    Rejected {
        /// The token.
        id: u32,
    },
    /// The model's vocabulary has no way to spell what the grammar demands next.
    #[error("no token of the model fits the grammar at this place")]
    DeadEnd,
}

/// Compiles grammars for the vocabulary of one model.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    ids: usize,
    /// Made for the first request that needs it: that takes in the order of a second for the largest
    /// vocabularies.
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    /// Most recently used last.
    compiled: Mutex<Vec<(Grammar, Matcher)>>,
}

impl Grammars {
    /// Most bytes of a grammar.
    pub const MAX_BYTES: usize = 64 << 10;

    /// Returns a compiler for the vocabulary of `tokenizer`, in a model whose logits have `ids`
    /// entries.
    pub fn new(tokenizer: Arc<Tokenizer>, ids: usize) -> Self {
        Self { tokenizer, ids, factory: OnceLock::new(), compiled: Mutex::new(Vec::new()) }
    }

    fn factory(&self) -> Result<&ParserFactory, GrammarError> {
        self.factory.get_or_init(|| self.prepare()).as_ref().map_err(GrammarError::clone)
    }

    fn prepare(&self) -> Result<ParserFactory, GrammarError> {
        let Self { tokenizer, ids, .. } = self;
        let ends: Vec<u32> = tokenizer
            .special()
            .eos
            .iter()
            .copied()
            .filter(|end| usize::try_from(*end).is_ok_and(|end| end < *ids))
            .collect();
        let (Some(&end), Ok(count)) = (ends.first(), u32::try_from(*ids)) else {
            return Err(GrammarError::NoEnd);
        };
        let words: Vec<Vec<u8>> = (0..count)
            .map(|id| match tokenizer.token_bytes(id) {
                // Special tokens and gaps stand for no text, nor do tokens that end it, which a
                // model may spell: a name that no text contains keeps them out of every grammar.
                bytes if bytes.is_empty() || ends.contains(&id) => {
                    let mut name = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                    name.extend(format!("<[{id}]>").into_bytes());
                    name
                }
                bytes => bytes.to_vec(),
            })
            .collect();
        let trie = TokTrie::from(&TokRxInfo::new(count, end), &words).with_eos_tokens(&ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|error| GrammarError::Invalid(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(factory)
    }

    /// Compiles `grammar`, or takes it from those compiled before.
    ///
    /// # Errors
    /// The grammar is malformed, not supported or too large, or the model cannot end an answer.
    pub fn compile(&self, grammar: &Grammar) -> Result<Constraint, GrammarError> {
        if let Some(matcher) = self.recall(grammar) {
            return Ok(Constraint { matcher, ids: self.ids });
        }
        let bytes = grammar.bytes();
        if bytes > Self::MAX_BYTES {
            let most = Self::MAX_BYTES;
            return Err(GrammarError::Invalid(format!("it has {bytes} bytes, at most {most} fit")));
        }
        let matcher = stacker::grow(STACK, || self.compile_new(grammar))?;
        self.remember(grammar, &matcher);
        Ok(Constraint { matcher, ids: self.ids })
    }

    fn recall(&self, grammar: &Grammar) -> Option<Matcher> {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let index = compiled.iter().position(|(known, _)| known == grammar)?;
        let entry = compiled.remove(index);
        let matcher = entry.1.clone();
        compiled.push(entry);
        Some(matcher)
    }

    fn remember(&self, grammar: &Grammar, matcher: &Matcher) {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if compiled.len() >= KEPT {
            compiled.remove(0);
        }
        compiled.push((grammar.clone(), matcher.clone()));
    }

    fn compile_new(&self, grammar: &Grammar) -> Result<Matcher, GrammarError> {
        let invalid = |error: &dyn fmt::Display| GrammarError::Invalid(error.to_string());
        let top = match grammar {
            Grammar::JsonSchema(schema) => json(
                serde_json::from_str(schema)
                    .map_err(|error| invalid(&format_args!("the schema is no JSON: {error}")))?,
            ),
            Grammar::JsonObject => json(serde_json::json!({ "type": "object" })),
            Grammar::Regex(expression) => TopLevelGrammar::from_regex(expression),
            Grammar::Choice(texts) => {
                if texts.is_empty() || texts.iter().any(String::is_empty) {
                    return Err(invalid(&"a choice needs at least one text, none of them empty"));
                }
                TopLevelGrammar::from_lark(choice(texts))
            }
        };
        let parser = self.factory()?.create_parser(top);
        let mut matcher = Matcher::new(parser);
        if let Some(error) = matcher.get_error() {
            return Err(invalid(&first_line(&error)));
        }
        // A grammar that nothing can begin is better refused than followed.
        let mask = matcher.compute_mask_or_eos().map_err(|error| too_complex(&error))?;
        if mask.is_zero() {
            return Err(GrammarError::DeadEnd);
        }
        Ok(matcher)
    }
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("ids", &self.ids).finish_non_exhaustive()
    }
}

/// A grammar together with the part of an answer that has been accepted.
#[derive(Clone)]
pub struct Constraint {
    matcher: Matcher,
    ids: usize,
}

impl Constraint {
    /// Returns the ids that may come next: end-of-sequence tokens where the answer may end, and
    /// nothing else once it is complete.
    ///
    /// # Errors
    /// Nothing fits, or the grammar turned out too complex.
    pub fn mask(&mut self) -> Result<TokenMask, GrammarError> {
        let mask = stacker::grow(STACK, || self.matcher.compute_mask_or_eos())
            .map_err(|error| too_complex(&error))?;
        if mask.is_zero() {
            return Err(GrammarError::DeadEnd);
        }
        debug_assert!(mask.len() >= self.ids, "the mask covers every id");
        Ok(TokenMask(mask))
    }

    /// Takes the id that was chosen. End-of-sequence tokens are accepted where the answer may end
    /// and change nothing after it.
    ///
    /// # Errors
    /// The id does not fit.
    pub fn accept(&mut self, id: u32) -> Result<(), GrammarError> {
        if self.matcher.is_stopped() {
            return if self.mask()?.allows(id) {
                Ok(())
            } else {
                Err(GrammarError::Rejected { id })
            };
        }
        match stacker::grow(STACK, || self.matcher.try_consume_tokens(&[id])) {
            Ok(1) => Ok(()),
            // The library also says so of a token that would exceed a limit of its lexer.
            Ok(_) if self.mask()?.allows(id) => {
                let why = format!("token {id} fits and takes more work than is allowed");
                Err(GrammarError::TooComplex(why))
            }
            Ok(_) => Err(GrammarError::Rejected { id }),
            Err(error) => Err(too_complex(&error)),
        }
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint")
            .field("stopped", &self.matcher.is_stopped())
            .finish_non_exhaustive()
    }
}

/// A set of token ids.
#[derive(Clone, Debug)]
pub struct TokenMask(SimpleVob);

impl TokenMask {
    /// Returns whether `id` is in the set.
    pub fn allows(&self, id: u32) -> bool {
        usize::try_from(id).is_ok_and(|index| index < self.0.len()) && self.0.is_allowed(id)
    }

    /// Sets the logits of all ids outside the set to minus infinity.
    pub fn apply(&self, logits: &mut [f32]) {
        for (word, logits) in self.0.as_slice().iter().zip(logits.chunks_mut(32)) {
            if *word == u32::MAX {
                continue;
            }
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let covered = 32 * self.0.as_slice().len();
        if let Some(rest) = logits.get_mut(covered..) {
            rest.fill(f32::NEG_INFINITY);
        }
    }
}

/// The work that one request may cause: about 20 ms to compile, about 20 ms for a token, some tens
/// of megabytes. A hostile schema meets these and not the machine's.
fn limits() -> ParserLimits {
    ParserLimits {
        step_lexer_fuel: 300_000,
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Returns the grammar of a schema with bounded white space, unless it has a rule of its own: a
/// model that may go on with spaces for ever does.
fn json(mut schema: serde_json::Value) -> TopLevelGrammar {
    if let Some(schema) = schema.as_object_mut() {
        let rule = || serde_json::json!({ "whitespace_pattern": WHITE_SPACE });
        schema.entry("x-guidance").or_insert_with(rule);
    }
    TopLevelGrammar::from_json_schema(schema)
}

/// Writes a choice as a grammar of literal alternatives.
fn choice(texts: &[String]) -> String {
    let literals: Vec<String> =
        texts.iter().map(|text| serde_json::Value::from(text.as_str()).to_string()).collect();
    format!("start: {}", literals.join(" | "))
}

fn too_complex(error: &dyn fmt::Display) -> GrammarError {
    GrammarError::TooComplex(first_line(&error.to_string()))
}

/// Returns what a reader can act on: the library repeats the grammar, and appends its internal
/// state on further lines.
fn first_line(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    match line.char_indices().nth(MESSAGE) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None => line.to_owned(),
    }
}
