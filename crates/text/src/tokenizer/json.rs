//! A tokenizer from the text of a Hugging Face `tokenizer.json`.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::{Entry, Parts, Tokenizer, TokenizerError, byte_level};

/// The settings that decide whether this crate understands the file.
///
/// `tokenizers` reads all the rest. It also accepts settings that would break a promise made here:
/// dropout makes ids random, and its merge prefix slices strings without looking.
#[derive(Deserialize)]
struct File {
    model: Model,
    decoder: Option<Value>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    vocab: Value,
}

/// Builds the tokenizer and its table of tokens.
pub(super) fn build(text: &str) -> Result<Parts, TokenizerError> {
    check(serde_json::from_str(text).map_err(malformed)?)?;
    let mut inner: tokenizers::Tokenizer = text.parse().map_err(malformed)?;
    // Both are settings of a training run that the file carries along; transformers drops them.
    inner.with_padding(None);
    inner.with_truncation(None).map_err(malformed)?;

    let mut texts = HashMap::new();
    for (token, id) in inner.get_vocab(true) {
        if let Some(first) = texts.insert(id, token) {
            let second = texts.remove(&id).unwrap_or_default();
            return Err(TokenizerError::DuplicateId { id, first, second });
        }
    }
    let last = *texts.keys().max().ok_or(TokenizerError::Empty)?;
    let ids = usize::try_from(last).map_or(usize::MAX, |last| last.saturating_add(1));
    if ids > Tokenizer::MAX_IDS {
        return Err(TokenizerError::TooManyIds { id: last.into() });
    }
    let added = inner.get_added_tokens_decoder();
    let mut entries: Vec<Option<Entry>> = Vec::with_capacity(ids);
    for id in 0..=last {
        let entry = texts.remove(&id).map(|token| {
            let special = added.get(&id).is_some_and(|added| added.special);
            let bytes = if special { Vec::new() } else { byte_level::decode(&token) };
            Entry { text: token.into(), bytes: bytes.into() }
        });
        entries.push(entry);
    }
    Ok(Parts { inner, entries })
}

/// Refuses what would give other ids or another text than the model was trained with.
fn check(file: File) -> Result<(), TokenizerError> {
    let unsupported = |setting, found: String, expected| {
        Err(TokenizerError::UnsupportedSetting { setting, found, expected })
    };
    // Files of old versions leave the type out; `merges` then tells a BPE model.
    if let Some(kind) = file.model.kind.filter(|kind| kind != "BPE") {
        return Err(TokenizerError::UnsupportedKind { found: kind });
    }
    if let Some(dropout) = file.model.dropout.filter(|dropout| *dropout != 0.0) {
        return unsupported("model.dropout", dropout.to_string(), "none");
    }
    for (setting, value) in [
        ("model.continuing_subword_prefix", file.model.continuing_subword_prefix),
        ("model.end_of_word_suffix", file.model.end_of_word_suffix),
    ] {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            return unsupported(setting, format!("`{value}`"), "none");
        }
    }
    let decoder = file.decoder.as_ref().and_then(|decoder| decoder.get("type"));
    let decoder = decoder.and_then(Value::as_str).unwrap_or("none");
    if decoder != "ByteLevel" {
        return unsupported("decoder.type", format!("`{decoder}`"), "`ByteLevel`");
    }
    // The library keeps one of two tokens with the same id and says nothing.
    let mut by_id: HashMap<u64, &String> = HashMap::new();
    for (token, id) in file.model.vocab.as_object().into_iter().flatten() {
        let Some(id) = id.as_u64() else { continue };
        if let Some(first) = by_id.insert(id, token) {
            return Err(match u32::try_from(id) {
                Ok(id) => {
                    TokenizerError::DuplicateId { id, first: first.clone(), second: token.clone() }
                }
                Err(_) => TokenizerError::TooManyIds { id },
            });
        }
    }
    Ok(())
}

#[expect(clippy::needless_pass_by_value, reason = "the shape `map_err` wants")]
fn malformed(error: impl ToString) -> TokenizerError {
    TokenizerError::Json { reason: error.to_string() }
}
