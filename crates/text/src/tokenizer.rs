//! Text to token ids and ids to bytes, from a `tokenizer.json` or from the vocabulary of a GGUF file.

mod byte_level;
mod error;
mod json;
mod limits;
mod pre;
mod spm;
mod vocabulary;

use std::fmt;

pub use self::{
    error::TokenizerError,
    vocabulary::{TokenType, Vocabulary},
};

/// Where a model keeps its tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenizerSource {
    /// The text of a Hugging Face `tokenizer.json`.
    Json(String),
    /// The `tokenizer.ggml.*` keys of a GGUF file.
    Vocabulary(Vocabulary),
}

/// The ids with a meaning to the generation loop.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SpecialTokens {
    /// The id that starts a sequence.
    pub bos: Option<u32>,
    /// The ids that end one; any of them does.
    pub eos: Vec<u32>,
    /// Whether `bos` goes before every prompt.
    ///
    /// A `tokenizer.json` whose post-processor adds `bos` does so whatever this says.
    pub add_bos: bool,
}

/// A model's tokenizer.
pub struct Tokenizer {
    inner: Inner,
    special: SpecialTokens,
    /// Whether the post-processor of a `tokenizer.json` adds `bos` by itself.
    post_processor_adds_bos: bool,
    /// By id; `None` where the vocabulary has a gap.
    entries: Vec<Option<Entry>>,
    start: Start,
}

/// What turns text into ids.
enum Inner {
    Library(Box<tokenizers::Tokenizer>),
    Pieces(Box<spm::Tokenizer>),
}

/// What the first token of a text loses when it is decoded: the space that encoding put there.
#[derive(Clone, Copy)]
enum Start {
    AsIs,
    /// At most this many spaces.
    WithoutSpaces(usize),
    /// All spaces of the first token.
    WithoutSpacesOfFirst,
}

/// What one id stands for.
struct Entry {
    /// The token as the vocabulary spells it.
    text: Box<str>,
    /// What it adds to the generated text.
    bytes: Box<[u8]>,
}

impl Tokenizer {
    /// The most ids a vocabulary may have; the largest known ones have about 260 thousand.
    pub const MAX_IDS: usize = 1 << 22;

    /// The most characters in a row, all of them white space or none, that a text may have.
    ///
    /// A pre-tokenizer's expression stops matching, without an error, after a million steps back
    /// in one match, and a match goes no further than two such stretches.
    pub const MAX_STRETCH: usize = 1 << 17;

    /// Builds the tokenizer of a model.
    ///
    /// # Errors
    /// The source is malformed, or of a kind that is not supported; the message says which kinds
    /// are.
    pub fn new(source: &TokenizerSource, special: SpecialTokens) -> Result<Self, TokenizerError> {
        let Parts { inner, entries, start } = match source {
            TokenizerSource::Json(text) => json::build(text)?,
            TokenizerSource::Vocabulary(vocabulary) => vocabulary::build(vocabulary)?,
        };
        let mut tokenizer = Self { inner, special, post_processor_adds_bos: false, entries, start };
        if let Some(bos) = tokenizer.special.bos {
            if tokenizer.entry(bos).is_none() {
                return Err(TokenizerError::UnknownBos { id: bos, ids: tokenizer.vocab_size() });
            }
            if tokenizer.encode("", true)?.first() == Some(&bos) {
                tokenizer.post_processor_adds_bos = true;
                tokenizer.special.add_bos = true;
            }
        } else if tokenizer.special.add_bos {
            return Err(TokenizerError::MissingBos);
        }
        Ok(tokenizer)
    }

    /// Returns the number of ids, gaps included: every id is below it.
    pub fn vocab_size(&self) -> usize {
        self.entries.len()
    }

    /// Returns the special ids; `add_bos` tells what [`Self::encode_prompt`] really does.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// Turns a plain prompt into ids, with `bos` first if the model's rule says so.
    ///
    /// The text of a special token inside the prompt becomes that token, as in `transformers`.
    ///
    /// # Errors
    /// The tokenizer gave up on this text, or would.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode(text, true)?;
        if let Some(bos) = self.special.bos
            && self.special.add_bos
            && !self.post_processor_adds_bos
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Turns a rendered chat into ids, with `bos` first if the model's rule says so and the
    /// template has not put it there.
    ///
    /// # Errors
    /// The tokenizer gave up on this text, or would.
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode(rendered, false)?;
        if let Some(bos) = self.special.bos
            && self.special.add_bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Turns ids into the text they spell as a text of its own.
    ///
    /// The text is the lossy UTF-8 reading of the tokens' bytes put together: each maximal invalid
    /// sequence is one U+FFFD, and nothing else is changed: `transformers` calls that
    /// `clean_up_tokenization_spaces=False`. Vocabularies that put a space before every text lose it
    /// here, so decoding undoes encoding; [`StreamDecoder`](crate::StreamDecoder) keeps it, since an
    /// answer continues a text. Special tokens are left out, or spelt as in the vocabulary.
    ///
    /// # Errors
    /// An id is not in the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        let mut bytes = Vec::new();
        let mut first = None;
        for id in ids {
            let unknown = || TokenizerError::UnknownId { id: *id, ids: self.vocab_size() };
            let entry = self.entry(*id).ok_or_else(unknown)?;
            // Tokens without bytes of their own are the special ones and the unused.
            let spelt = if entry.bytes.is_empty() && !skip_special {
                entry.text.as_bytes()
            } else {
                &entry.bytes
            };
            if first.is_none() && !(entry.bytes.is_empty() && skip_special) {
                first = Some(spelt.len());
            }
            bytes.extend_from_slice(spelt);
        }
        let most = match self.start {
            Start::AsIs => 0,
            Start::WithoutSpaces(most) => most,
            Start::WithoutSpacesOfFirst => first.unwrap_or(0),
        };
        let spaces = bytes.iter().take(most).take_while(|byte| **byte == b' ').count();
        Ok(String::from_utf8_lossy(&bytes[spaces..]).into_owned())
    }

    /// Returns what a token adds to the generated text: nothing for special tokens and for ids
    /// outside the vocabulary (a model may have more rows than its tokenizer has tokens).
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.entry(id).map_or(&[], |entry| &entry.bytes)
    }

    /// Returns a token as the vocabulary spells it.
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.entry(id).map(|entry| &*entry.text)
    }

    fn entry(&self, id: u32) -> Option<&Entry> {
        self.entries.get(usize::try_from(id).ok()?)?.as_ref()
    }

    fn encode(&self, text: &str, post_process: bool) -> Result<Vec<u32>, TokenizerError> {
        let characters = longest_stretch(text);
        if characters > Self::MAX_STRETCH {
            return Err(TokenizerError::LongStretch { characters });
        }
        let encoding = match &self.inner {
            Inner::Library(inner) => inner.encode_fast(text, post_process),
            Inner::Pieces(inner) => inner.encode_fast(text, post_process),
        };
        encoding
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| TokenizerError::Encode { reason: error.to_string() })
    }
}

/// Returns the most characters in a row that are all white space or all not.
fn longest_stretch(text: &str) -> usize {
    let (mut longest, mut current, mut white) = (0, 0, false);
    for c in text.chars() {
        if c.is_whitespace() != white {
            white = !white;
            current = 0;
        }
        current += 1;
        longest = longest.max(current);
    }
    longest
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("special", &self.special)
            .finish_non_exhaustive()
    }
}

/// What either source is turned into.
struct Parts {
    inner: Inner,
    entries: Vec<Option<Entry>>,
    start: Start,
}

#[cfg(test)]
mod tests;
