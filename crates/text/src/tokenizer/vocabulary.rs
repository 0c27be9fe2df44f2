//! A tokenizer rebuilt from the `tokenizer.ggml.*` keys of a GGUF file.

use std::collections::{HashMap, hash_map};

use tokenizers::{
    AddedToken,
    decoders::byte_level::ByteLevel,
    models::bpe::{BPE, Vocab},
};

use super::{Entry, Parts, Tokenizer, TokenizerError, byte_level, pre::PreTokenizer};

/// The `tokenizer.ggml.*` keys of a GGUF file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocabulary {
    /// `model`: the kind of tokenizer; `gpt2` is byte-level BPE.
    pub model: String,
    /// `pre`: how text is cut before merging; empty if the file has no such key.
    pub pre: String,
    /// `tokens`, by id.
    pub tokens: Vec<String>,
    /// `token_type`, by id; empty if the file has none, all tokens being normal then.
    pub token_types: Vec<TokenType>,
    /// `merges`, best first: two tokens with one space between.
    pub merges: Vec<String>,
    /// `scores`, by id, of SentencePiece vocabularies; empty otherwise.
    pub scores: Vec<f32>,
}

/// What kind of token an id is, numbered as in GGUF.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum TokenType {
    /// A piece of text.
    #[default]
    Normal,
    /// What unknown text becomes.
    Unknown,
    /// A control token such as `<|eot_id|>`: recognised in prompts, never shown.
    Control,
    /// A token added by hand: recognised as a whole in prompts, shown as it is.
    UserDefined,
    /// A row of the embedding without a meaning.
    Unused,
    /// One byte, in SentencePiece vocabularies.
    Byte,
}

impl TokenType {
    /// Returns the type of a number in `tokenizer.ggml.token_type`; numbers without a meaning are
    /// normal tokens, as in llama.cpp.
    pub fn from_gguf(number: i64) -> Self {
        match number {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }

    /// Returns the number in `tokenizer.ggml.token_type`.
    pub fn to_gguf(self) -> i32 {
        match self {
            Self::Normal => 1,
            Self::Unknown => 2,
            Self::Control => 3,
            Self::UserDefined => 4,
            Self::Unused => 5,
            Self::Byte => 6,
        }
    }
}

/// Builds the tokenizer and its table of tokens.
pub(super) fn build(vocabulary: &Vocabulary) -> Result<Parts, TokenizerError> {
    if vocabulary.model != "gpt2" {
        return Err(TokenizerError::UnsupportedKind { found: vocabulary.model.clone() });
    }
    let pre = PreTokenizer::named(&vocabulary.pre)?;
    let tokens = &vocabulary.tokens;
    if tokens.is_empty() {
        return Err(TokenizerError::Empty);
    }
    if tokens.len() > Tokenizer::MAX_IDS {
        return Err(TokenizerError::TooManyIds { id: tokens.len() as u64 - 1 });
    }
    let types = &vocabulary.token_types;
    if !types.is_empty() && types.len() != tokens.len() {
        return Err(TokenizerError::TokenTypes { types: types.len(), tokens: tokens.len() });
    }
    let types = types.iter().copied().chain(std::iter::repeat(TokenType::Normal));

    let mut ids: HashMap<String, u32> = HashMap::with_capacity(tokens.len());
    let mut added = Vec::new();
    let mut entries = Vec::with_capacity(tokens.len());
    for ((id, token), kind) in (0u32..).zip(tokens).zip(types) {
        match ids.entry(token.clone()) {
            hash_map::Entry::Vacant(free) => free.insert(id),
            hash_map::Entry::Occupied(taken) => {
                let (text, first) = (token.clone(), *taken.get());
                return Err(TokenizerError::DuplicateToken { text, first, second: id });
            }
        };
        let bytes = match kind {
            TokenType::Control => {
                added.push(AddedToken::from(token.as_str(), true));
                Vec::new()
            }
            TokenType::UserDefined => {
                added.push(AddedToken::from(token.as_str(), false).normalized(false));
                token.as_bytes().to_vec()
            }
            TokenType::Unused | TokenType::Unknown => Vec::new(),
            TokenType::Normal | TokenType::Byte => byte_level::decode(token),
        };
        entries.push(Some(Entry { text: token.as_str().into(), bytes: bytes.into() }));
    }

    let model = BPE::builder()
        .vocab_and_merges(ids.into_iter().collect::<Vocab>(), merges(&vocabulary.merges)?)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|error| TokenizerError::Merges { reason: error.to_string() })?;
    let mut inner = tokenizers::Tokenizer::new(model);
    inner.with_pre_tokenizer(Some(pre.build()?));
    inner.with_decoder(Some(ByteLevel::default()));
    inner.add_tokens(&added);
    Ok(Parts { inner, entries })
}

fn merges(lines: &[String]) -> Result<Vec<(String, String)>, TokenizerError> {
    let pair = |(rank, line): (usize, &String)| match line.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
            Ok((left.to_owned(), right.to_owned()))
        }
        _ => Err(TokenizerError::MalformedMerge { rank, merge: line.clone() }),
    };
    lines.iter().enumerate().map(pair).collect()
}
