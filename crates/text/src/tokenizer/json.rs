//! A tokenizer from the text of a Hugging Face `tokenizer.json`.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::{Entry, Inner, Parts, Start, Tokenizer, TokenizerError, byte_level, limits, spm};

/// The settings that decide whether this crate understands the file.
///
/// `tokenizers` reads all the rest. It also accepts settings that would break a promise made here:
/// dropout makes ids random, and its merge prefix slices strings without looking.
#[derive(Deserialize)]
struct File {
    model: Model,
    decoder: Option<Value>,
    #[serde(default)]
    added_tokens: Value,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
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
    if text.len() > limits::MAX_BYTES {
        return Err(TokenizerError::UnsupportedSetting {
            setting: "tokenizer.json",
            found: format!("{} bytes long", text.len()),
            expected: "at most 64 MiB",
        });
    }
    let Decoder { byte_level, start } = check(serde_json::from_str(text).map_err(malformed)?)?;
    let mut inner: tokenizers::Tokenizer = text.parse().map_err(malformed)?;
    // Both are settings of a training run that the file carries along; transformers drops them.
    inner.with_padding(None);
    inner.with_truncation(None).map_err(malformed)?;
    if let Some(processor) = inner.get_post_processor() {
        check_pieces(&serde_json::to_value(processor).map_err(malformed)?)?;
    }

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
            let bytes = match special {
                true => Vec::new(),
                false if byte_level => byte_level::decode(&token),
                false => spm::decode(&token),
            };
            Entry { text: token.into(), bytes: bytes.into() }
        });
        entries.push(entry);
    }
    Ok(Parts { inner: Inner::Library(Box::new(inner)), entries, start })
}

/// How tokens become text.
struct Decoder {
    /// In the byte-level alphabet, or else as SentencePiece does.
    byte_level: bool,
    start: Start,
}

impl Decoder {
    /// Reads the decoders that the supported vocabularies come with.
    fn read(value: &Value) -> Option<Self> {
        let steps: Vec<&Value> = match value["type"].as_str()? {
            "Sequence" => value["decoders"].as_array()?.iter().collect(),
            _ => vec![value],
        };
        let kinds: Option<Vec<&str>> = steps.iter().map(|step| step["type"].as_str()).collect();
        let (byte_level, start) = match kinds?.as_slice() {
            ["ByteLevel"] => (true, Start::AsIs),
            ["Metaspace"] | ["ByteFallback", "Metaspace"] => {
                let metaspace = steps.last()?;
                let spelt_so = metaspace["replacement"].as_str()? == spm::SPACE;
                // Files of old versions say `add_prefix_space` instead of the scheme.
                let never = metaspace["prepend_scheme"] == "never"
                    || metaspace["prepend_scheme"].is_null()
                        && metaspace["add_prefix_space"] == false;
                let start = if never { Start::AsIs } else { Start::WithoutSpacesOfFirst };
                return spelt_so.then_some(Self { byte_level: false, start });
            }
            ["Replace", "ByteFallback", "Fuse"] => (false, Start::AsIs),
            ["Replace", "ByteFallback", "Fuse", "Strip"] => {
                let strip = steps.last()?;
                let start = usize::try_from(strip["start"].as_u64()?).ok()?;
                if strip["content"] != " " || strip["stop"] != 0 {
                    return None;
                }
                (false, Start::WithoutSpaces(start))
            }
            _ => return None,
        };
        let replace = steps[0];
        let spaces =
            byte_level || replace["pattern"]["String"] == spm::SPACE && replace["content"] == " ";
        spaces.then_some(Self { byte_level, start })
    }
}

/// Refuses what would give other ids or another text than the model was trained with.
fn check(file: File) -> Result<Decoder, TokenizerError> {
    limits::check(&limits::Pipeline {
        added_tokens: &file.added_tokens,
        normalizer: &file.normalizer,
        pre_tokenizer: &file.pre_tokenizer,
        post_processor: &file.post_processor,
    })?;
    let unsupported = |setting, found: String, expected| {
        let found = found.chars().take(MAX_QUOTED).collect();
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
    let decoder = file.decoder.unwrap_or_default();
    let Some(decoder) = Decoder::read(&decoder) else {
        return unsupported(
            "decoder",
            format!("`{decoder}`"),
            "`ByteLevel`, `Metaspace`, or Replace, ByteFallback, Fuse and Strip as SentencePiece's",
        );
    };
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
    Ok(decoder)
}

/// Refuses a template that puts around a text what is not there: the library would panic over it.
fn check_pieces(processor: &Value) -> Result<(), TokenizerError> {
    processor["processors"].as_array().into_iter().flatten().try_for_each(check_pieces)?;
    for piece in processor["single"].as_array().into_iter().flatten() {
        let known = match piece["SpecialToken"]["id"].as_str() {
            Some(name) => processor["special_tokens"].get(name).is_some(),
            None => piece["Sequence"]["id"] == "A",
        };
        if !known {
            return Err(TokenizerError::UnsupportedSetting {
                setting: "post_processor.single",
                found: format!("`{piece}`"),
                expected: "the sequence `A` and tokens of its `special_tokens`",
            });
        }
    }
    Ok(())
}

#[expect(clippy::needless_pass_by_value, reason = "the shape `map_err` wants")]
fn malformed(error: impl ToString) -> TokenizerError {
    TokenizerError::Json { reason: error.to_string() }
}

/// The most characters of a setting that an error quotes.
const MAX_QUOTED: usize = 200;
