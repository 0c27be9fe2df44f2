//! Tokenizer, special ids and chat template of a model, from whichever file holds them.

pub(crate) mod derive;
pub(crate) mod folder;

use tercet_text::{SpecialTokens, TokenType, TokenizerSource, Vocabulary};

use super::error::ModelError;
use super::gguf::Gguf;
use super::gguf::value::Value;
use super::gguf::writer::Metadata;

/// Key of a whole `tokenizer.json`, for tokenizers the other keys cannot express.
const JSON_KEY: &str = "tokenizer.huggingface.json";
/// Key of every id that ends an answer; `eos_token_id` holds only one.
const EOS_LIST_KEY: &str = "tercet.tokenizer.eos_token_ids";
/// Key of whether a SentencePiece vocabulary puts a space before every text.
const SPACE_KEY: &str = "tokenizer.ggml.add_space_prefix";
/// Keys of single ids that end an answer, for files without the list.
const EOS_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
/// Control tokens that end a turn in the chat formats in use.
///
/// Files written by older converters name only one end token; llama.cpp finds the others by their
/// text as well.
const TURN_ENDS: [&str; 6] =
    ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>"];

/// What a model knows about text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TextParts {
    pub(crate) tokenizer: TokenizerSource,
    pub(crate) special: SpecialTokens,
    pub(crate) chat_template: Option<String>,
}

impl TextParts {
    /// Reads the `tokenizer.*` keys of a GGUF file.
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let vocabulary = read_vocabulary(gguf)?;
        let special = read_special(gguf, &vocabulary)?;
        let chat_template = string(gguf, "tokenizer.chat_template")?.map(str::to_owned);
        let tokenizer = match string(gguf, JSON_KEY)? {
            Some(json) => TokenizerSource::Json(json.to_owned()),
            None => TokenizerSource::Vocabulary(vocabulary),
        };
        Ok(Self { tokenizer, special, chat_template })
    }

    /// Writes the `tokenizer.*` keys of a model with an embedding of `vocab` rows.
    pub(crate) fn write(&self, metadata: &mut Metadata, vocab: usize) {
        let vocabulary = match &self.tokenizer {
            TokenizerSource::Vocabulary(vocabulary) => Some(vocabulary.clone()),
            TokenizerSource::Json(json) => derive::vocabulary(json).or_else(|| {
                metadata.string(JSON_KEY, json);
                // For programs that do not know that key.
                derive::nearest(json)
            }),
        };
        if let Some(mut vocabulary) = vocabulary {
            pad(&mut vocabulary, vocab);
            metadata.string("tokenizer.ggml.model", &vocabulary.model);
            if !vocabulary.pre.is_empty() {
                metadata.string("tokenizer.ggml.pre", &vocabulary.pre);
            }
            metadata.strings("tokenizer.ggml.tokens", &vocabulary.tokens);
            if !vocabulary.token_types.is_empty() {
                let types: Vec<i32> =
                    vocabulary.token_types.iter().map(|kind| kind.to_gguf()).collect();
                metadata.i32s("tokenizer.ggml.token_type", &types);
            }
            if !vocabulary.scores.is_empty() {
                metadata.f32s("tokenizer.ggml.scores", &vocabulary.scores);
            }
            metadata.strings("tokenizer.ggml.merges", &vocabulary.merges);
            if let Some(add_space_prefix) = vocabulary.add_space_prefix {
                metadata.bool(SPACE_KEY, add_space_prefix);
            }
        }
        if let Some(bos) = self.special.bos {
            metadata.u32("tokenizer.ggml.bos_token_id", bos);
        }
        for (key, id) in EOS_KEYS.iter().zip(&self.special.eos) {
            metadata.u32(key, *id);
        }
        metadata.u32s(EOS_LIST_KEY, &self.special.eos);
        metadata.bool("tokenizer.ggml.add_bos_token", self.special.add_bos);
        if let Some(template) = &self.chat_template {
            metadata.string("tokenizer.chat_template", template);
        }
    }

    /// Refuses special ids that no row of the embedding belongs to.
    pub(crate) fn check(&self, file: &str, vocab: usize) -> Result<(), ModelError> {
        let ids = self.special.bos.iter().map(|id| ("bos_token_id", id));
        for (name, id) in ids.chain(self.special.eos.iter().map(|id| ("eos_token_id", id))) {
            if usize::try_from(*id).map_or(true, |id| id >= vocab) {
                let expected = format!("an id below the vocabulary size {vocab}");
                return Err(ModelError::config(file, name, id, expected));
            }
        }
        if let TokenizerSource::Vocabulary(vocabulary) = &self.tokenizer
            && vocabulary.tokens.len() > vocab
        {
            return Err(ModelError::config(
                file,
                "tokenizer.ggml.tokens",
                format!("{} tokens", vocabulary.tokens.len()),
                format!("at most the vocabulary size {vocab}"),
            ));
        }
        Ok(())
    }
}

/// Fills the rows of the embedding that have no token: llama.cpp wants as many tokens as rows.
fn pad(vocabulary: &mut Vocabulary, rows: usize) {
    let known = vocabulary.tokens.len();
    if known == 0 || known >= rows {
        return;
    }
    vocabulary.tokens.extend((known..rows).map(derive::filler));
    vocabulary.token_types.resize(known, TokenType::Normal);
    vocabulary.token_types.resize(rows, TokenType::Unused);
    if !vocabulary.scores.is_empty() {
        vocabulary.scores.resize(rows, 0.0);
    }
}

fn string<'a>(gguf: &'a Gguf, key: &str) -> Result<Option<&'a str>, ModelError> {
    gguf.value(key)
        .map(|value| value.as_str().ok_or_else(|| wrong(gguf, key, value, "text")))
        .transpose()
}

fn wrong(gguf: &Gguf, key: &str, value: &Value, expected: &str) -> ModelError {
    ModelError::config(gguf.file().label(), key, value, expected)
}

fn read_vocabulary(gguf: &Gguf) -> Result<Vocabulary, ModelError> {
    let tokens = match gguf.value("tokenizer.ggml.tokens") {
        Some(Value::Strings(tokens)) => tokens.clone(),
        Some(other) => return Err(wrong(gguf, "tokenizer.ggml.tokens", other, "strings")),
        None if gguf.value(JSON_KEY).is_some() => Vec::new(),
        None => {
            let label = gguf.file().label();
            let expected = "the vocabulary; convert the model again with its tokenizer";
            return Err(ModelError::config(label, "tokenizer.ggml.tokens", "missing", expected));
        }
    };
    let token_types: Vec<TokenType> = match gguf.value("tokenizer.ggml.token_type") {
        Some(Value::Integers(types)) => types.iter().map(|n| TokenType::from_gguf(*n)).collect(),
        Some(other) => return Err(wrong(gguf, "tokenizer.ggml.token_type", other, "integers")),
        None => Vec::new(),
    };
    if !token_types.is_empty() && token_types.len() != tokens.len() {
        return Err(ModelError::config(
            gguf.file().label(),
            "tokenizer.ggml.token_type",
            format!("{} entries", token_types.len()),
            format!("{}, one per token", tokens.len()),
        ));
    }
    let merges = match gguf.value("tokenizer.ggml.merges") {
        Some(Value::Strings(merges)) => merges.clone(),
        Some(other) => return Err(wrong(gguf, "tokenizer.ggml.merges", other, "strings")),
        None => Vec::new(),
    };
    let scores = match gguf.value("tokenizer.ggml.scores") {
        Some(Value::Floats(scores)) => scores.clone(),
        Some(other) => return Err(wrong(gguf, "tokenizer.ggml.scores", other, "numbers")),
        None => Vec::new(),
    };
    let add_space_prefix = gguf
        .value(SPACE_KEY)
        .map(|value| value.as_bool().ok_or_else(|| wrong(gguf, SPACE_KEY, value, "true or false")))
        .transpose()?;
    let model = string(gguf, "tokenizer.ggml.model")?.unwrap_or("gpt2").to_owned();
    let pre = match string(gguf, "tokenizer.ggml.pre")? {
        Some(pre) => pre.to_owned(),
        // The published BitNet files come from a converter that predates the key; their
        // vocabulary is Llama 3's, recognisable by its first control token.
        None if tokens.iter().any(|token| token == "<|begin_of_text|>") => "llama-bpe".to_owned(),
        None => String::new(),
    };
    Ok(Vocabulary { model, pre, tokens, token_types, merges, scores, add_space_prefix })
}

fn read_special(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<SpecialTokens, ModelError> {
    let id = |key: &str| -> Result<Option<u32>, ModelError> {
        let Some(value) = gguf.value(key) else { return Ok(None) };
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(Some).ok_or_else(|| wrong(gguf, key, value, "a token id"))
    };
    let bos = id("tokenizer.ggml.bos_token_id")?;
    let eos = match gguf.value(EOS_LIST_KEY) {
        Some(value @ Value::Integers(ids)) => ids
            .iter()
            .map(|id| u32::try_from(*id).map_err(|_| wrong(gguf, EOS_LIST_KEY, value, "token ids")))
            .collect::<Result<Vec<_>, _>>()?,
        Some(other) => return Err(wrong(gguf, EOS_LIST_KEY, other, "token ids")),
        None => {
            let mut ids = Vec::new();
            for key in EOS_KEYS {
                ids.extend(id(key)?);
            }
            let kinds = (0_u32..).zip(vocabulary.tokens.iter().zip(&vocabulary.token_types));
            ids.extend(
                kinds
                    .filter(|(_, (text, kind))| {
                        **kind == TokenType::Control && TURN_ENDS.contains(&text.as_str())
                    })
                    .map(|(id, _)| id),
            );
            ids
        }
    };
    let add_bos = match gguf.value("tokenizer.ggml.add_bos_token") {
        Some(value) => value
            .as_bool()
            .ok_or_else(|| wrong(gguf, "tokenizer.ggml.add_bos_token", value, "true or false"))?,
        // llama.cpp's rule for the key's absence.
        None => {
            vocabulary.model == "llama"
                || matches!(
                    vocabulary.pre.as_str(),
                    "llama-bpe"
                        | "llama3"
                        | "llama-v3"
                        | "falcon3"
                        | "falcon-h1"
                        | "pixtral"
                        | "lfm2"
                )
        }
    };
    Ok(SpecialTokens { bos, eos: sorted(eos), add_bos: add_bos && bos.is_some() })
}

/// Returns ids ascending and without repeats: the order of end ids has no meaning, and one
/// order makes equal models have equal digests.
pub(crate) fn sorted(mut ids: Vec<u32>) -> Vec<u32> {
    ids.sort_unstable();
    ids.dedup();
    ids
}
