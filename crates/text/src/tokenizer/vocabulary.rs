//! A tokenizer rebuilt from the `tokenizer.ggml.*` keys of a GGUF file.

use std::collections::{HashMap, hash_map};

use tokenizers::{
    AddedToken,
    models::bpe::{BPE, Vocab},
    normalizers::unicode::NFC,
};

use super::{
    Entry, Inner, Parts, Start, Tokenizer, TokenizerError, byte_level, pre::PreTokenizer, spm,
};

/// The `tokenizer.ggml.*` keys of a GGUF file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocabulary {
    /// `model`: the kind of tokenizer; `gpt2` is byte-level BPE, `llama` is SentencePiece's BPE.
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
    /// `add_space_prefix`: whether a `llama` vocabulary puts a space before every text; absent in
    /// most files, and true then.
    pub add_space_prefix: Option<bool>,
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
    let byte_level = match vocabulary.model.as_str() {
        "gpt2" => true,
        "llama" => false,
        other => return Err(TokenizerError::UnsupportedKind { found: other.to_owned() }),
    };
    let table = Table::read(vocabulary, byte_level)?;
    if byte_level { byte_pairs(vocabulary, table) } else { pieces(vocabulary, table) }
}

/// The vocabulary, checked.
struct Table {
    ids: HashMap<String, u32>,
    /// What is recognised as a whole, before anything is merged.
    added: Vec<AddedToken>,
    entries: Vec<Option<Entry>>,
    /// What unknown text becomes.
    unknown: Option<u32>,
}

impl Table {
    fn read(vocabulary: &Vocabulary, byte_level: bool) -> Result<Self, TokenizerError> {
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
        let mut table = Self {
            ids: HashMap::with_capacity(tokens.len()),
            added: Vec::new(),
            entries: Vec::with_capacity(tokens.len()),
            unknown: None,
        };
        for ((id, token), kind) in (0u32..).zip(tokens).zip(types) {
            match table.ids.entry(token.clone()) {
                hash_map::Entry::Vacant(free) => free.insert(id),
                hash_map::Entry::Occupied(taken) => {
                    let (text, first) = (token.clone(), *taken.get());
                    return Err(TokenizerError::DuplicateToken { text, first, second: id });
                }
            };
            let whole = |special| AddedToken::from(token.as_str(), special).normalized(false);
            let bytes = match kind {
                TokenType::Control | TokenType::Unknown => {
                    table.added.push(whole(true));
                    if kind == TokenType::Unknown {
                        table.unknown.get_or_insert(id);
                    }
                    Vec::new()
                }
                TokenType::UserDefined => {
                    table.added.push(whole(false));
                    if byte_level { token.as_bytes().to_vec() } else { spm::decode(token) }
                }
                TokenType::Unused => Vec::new(),
                TokenType::Normal | TokenType::Byte if byte_level => byte_level::decode(token),
                TokenType::Normal | TokenType::Byte => spm::decode(token),
            };
            table.entries.push(Some(Entry { text: token.as_str().into(), bytes: bytes.into() }));
        }
        // An empty token would be found between any two characters.
        table.added.retain(|added| !added.content.is_empty());
        Ok(table)
    }
}

/// Builds byte-level BPE.
fn byte_pairs(vocabulary: &Vocabulary, table: Table) -> Result<Parts, TokenizerError> {
    let pre = PreTokenizer::named(&vocabulary.pre)?;
    let model = BPE::builder()
        .vocab_and_merges(table.ids.into_iter().collect::<Vocab>(), merges(&vocabulary.merges)?)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|error| TokenizerError::Merges { reason: error.to_string() })?;
    let mut inner = tokenizers::Tokenizer::new(model);
    if pre.nfc {
        inner.with_normalizer(Some(NFC));
    }
    inner.with_pre_tokenizer(Some(pre.build()?));
    inner.add_tokens(&table.added);
    let inner = Inner::Library(Box::new(inner));
    Ok(Parts { inner, entries: table.entries, start: Start::AsIs })
}

/// Builds SentencePiece's BPE.
fn pieces(vocabulary: &Vocabulary, table: Table) -> Result<Parts, TokenizerError> {
    let prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let model = spm::Model::new(table.ids, &vocabulary.scores, table.unknown)?;
    let inner = Inner::Pieces(Box::new(spm::tokenizer(model, prefix, &table.added)?));
    let start = if prefix { Start::WithoutSpaces(1) } else { Start::AsIs };
    Ok(Parts { inner, entries: table.entries, start })
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
