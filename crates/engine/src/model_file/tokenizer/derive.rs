//! A GGUF vocabulary from a `tokenizer.json`, when that loses nothing.

use std::collections::HashMap;

use serde_json::Value;
use tercet_text::{TokenType, Vocabulary};

/// The pre-tokenizer expressions GGUF has names for, and whether the name implies that a piece
/// found whole in the vocabulary skips merging.
const NAMED: [(&str, &str, bool); 2] = [
    (
        concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        "llama-bpe",
        true,
    ),
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "gpt-2", false),
];
/// The expression and the name of Qwen's pre-tokenizer; its normalizer has none.
const QWEN2: (&str, &str) = (
    concat!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2",
);
/// Ids beyond this are refused; a sparse table must not become a huge dense one.
const MAX_IDS: usize = 1 << 22;

/// Tokens longer than this are taken to be out of reach of merging, so that a hostile file cannot
/// make the check quadratic in megabytes; the longest real ones are 128 spaces.
const MAX_MERGED: usize = 1024;

/// Returns the vocabulary that tokenises exactly as `json` does, `None` if GGUF cannot say it.
pub(crate) fn vocabulary(json: &str) -> Option<Vocabulary> {
    let json: Value = serde_json::from_str(json).ok()?;
    let model = &json["model"];
    let plain = json["normalizer"].is_null()
        && model["type"].as_str().is_none_or(|kind| kind == "BPE")
        && falsy(&model["dropout"])
        && falsy(&model["unk_token"])
        && falsy(&model["continuing_subword_prefix"])
        && falsy(&model["end_of_word_suffix"])
        && falsy(&model["byte_fallback"])
        && json["decoder"]["type"] == "ByteLevel";
    if !plain {
        return None;
    }
    let (pre, implied) = pre_tokenizer(&json["pre_tokenizer"])?;
    let table = Table::read(model, &json["added_tokens"], true)?;
    let ignore_merges = model["ignore_merges"].as_bool().unwrap_or(false);
    if ignore_merges != implied && !table.merges_reach_every_token() {
        return None;
    }
    Some(table.into_vocabulary(pre))
}

/// Returns the vocabulary that comes nearest to `json`, for programs that cannot read it: normalizers
/// and the finer rules of added tokens are lost. `None` if it is no byte-level BPE.
pub(crate) fn nearest(json: &str) -> Option<Vocabulary> {
    let json: Value = serde_json::from_str(json).ok()?;
    let model = &json["model"];
    if model["type"].as_str().is_some_and(|kind| kind != "BPE")
        || json["decoder"]["type"] != "ByteLevel"
    {
        return None;
    }
    let steps = json["pre_tokenizer"]["pretokenizers"].as_array();
    let patterns = steps.into_iter().flatten().filter_map(|s| s["pattern"]["Regex"].as_str());
    let known = |pattern| {
        let named = NAMED.iter().map(|(known, name, _)| (*known, *name));
        named.chain([QWEN2]).find(|(known, _)| *known == pattern)
    };
    let pre = patterns.filter_map(known).next().map_or("default", |(_, name)| name);
    let table = Table::read(model, &json["added_tokens"], false)?;
    Some(table.into_vocabulary(pre))
}

/// Returns the token of a row without one, named as llama.cpp's converter does.
pub(crate) fn filler(id: usize) -> String {
    format!("[PAD{id}]")
}

/// Whether a setting is absent or off.
fn falsy(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Number(number) => number.as_f64() == Some(0.0),
        _ => false,
    }
}

/// Returns the GGUF name of a pre-tokenizer and whether it implies `ignore_merges`.
fn pre_tokenizer(value: &Value) -> Option<(&'static str, bool)> {
    let named = |pattern: &str| {
        NAMED.iter().find(|(known, ..)| *known == pattern).map(|(_, name, skip)| (*name, *skip))
    };
    let byte_level = |value: &Value, use_regex: bool| {
        value["type"] == "ByteLevel"
            && value["add_prefix_space"] == false
            // The library's default is true.
            && value["use_regex"].as_bool().unwrap_or(true) == use_regex
    };
    if byte_level(value, true) {
        return NAMED.iter().find(|(_, name, _)| *name == "gpt-2").map(|(_, n, skip)| (*n, *skip));
    }
    let [split, last] = value["pretokenizers"].as_array()?.as_slice() else { return None };
    let isolated = value["type"] == "Sequence"
        && split["type"] == "Split"
        && split["behavior"] == "Isolated"
        && split["invert"] == false
        && byte_level(last, false);
    isolated.then(|| named(split["pattern"]["Regex"].as_str()?)).flatten()
}

/// Tokens by id, their types, and merges best first.
struct Table {
    tokens: Vec<String>,
    types: Vec<TokenType>,
    merges: Vec<(String, String)>,
}

impl Table {
    /// With `strict`, only added tokens that are found exactly as they are written are taken.
    fn read(model: &Value, added: &Value, strict: bool) -> Option<Self> {
        let mut entries: Vec<(usize, &str, TokenType)> = Vec::new();
        for (token, id) in model["vocab"].as_object()? {
            entries.push((usize::try_from(id.as_u64()?).ok()?, token, TokenType::Normal));
        }
        let mut by_id: HashMap<usize, (&str, TokenType)> = HashMap::new();
        for token in added.as_array().into_iter().flatten() {
            let exact = ["single_word", "lstrip", "rstrip"].iter().all(|flag| falsy(&token[*flag]));
            if strict && !exact {
                return None;
            }
            let special = token["special"].as_bool().unwrap_or(false);
            let kind = if special { TokenType::Control } else { TokenType::UserDefined };
            let id = usize::try_from(token["id"].as_u64()?).ok()?;
            by_id.insert(id, (token["content"].as_str()?, kind));
        }
        entries.retain(|(id, ..)| !by_id.contains_key(id));
        entries.extend(by_id.into_iter().map(|(id, (token, kind))| (id, token, kind)));
        let size = entries.iter().map(|(id, ..)| *id).max()?.checked_add(1)?;
        if size > MAX_IDS || size > entries.len().saturating_mul(2).saturating_add(1024) {
            return None;
        }
        let mut tokens: Vec<String> = (0..size).map(filler).collect();
        let mut types = vec![TokenType::Unused; size];
        for (id, token, kind) in entries {
            if types[id] != TokenType::Unused {
                return None;
            }
            tokens[id] = token.to_owned();
            types[id] = kind;
        }
        let mut merges = Vec::new();
        for merge in model["merges"].as_array()? {
            let (left, right) = match merge {
                Value::String(text) => text.split_once(' ')?,
                Value::Array(pair) => match pair.as_slice() {
                    [Value::String(left), Value::String(right)] => (left.as_str(), right.as_str()),
                    _ => return None,
                },
                _ => return None,
            };
            if left.contains(' ') || right.contains(' ') {
                return None;
            }
            merges.push((left.to_owned(), right.to_owned()));
        }
        Some(Self { tokens, types, merges })
    }

    fn into_vocabulary(self, pre: &str) -> Vocabulary {
        Vocabulary {
            model: "gpt2".to_owned(),
            pre: pre.to_owned(),
            tokens: self.tokens,
            token_types: self.types,
            merges: self.merges.iter().map(|(left, right)| format!("{left} {right}")).collect(),
            scores: Vec::new(),
            add_space_prefix: None,
        }
    }

    /// Whether merging the characters of any token gives that token: then taking whole tokens
    /// first and merging from characters are the same tokenizer.
    fn merges_reach_every_token(&self) -> bool {
        let mut ranks: HashMap<(&str, &str), usize> = HashMap::with_capacity(self.merges.len());
        for (rank, (left, right)) in self.merges.iter().enumerate() {
            // The library lets a later copy of a pair win.
            ranks.insert((left, right), rank);
        }
        let normal = self.tokens.iter().zip(&self.types);
        normal
            .filter(|(_, kind)| **kind == TokenType::Normal)
            .all(|(token, _)| merges_to_one(token, &ranks))
    }
}

/// Whether byte-pair merging of `token`'s characters ends with one piece.
fn merges_to_one(token: &str, ranks: &HashMap<(&str, &str), usize>) -> bool {
    if token.len() > MAX_MERGED {
        return false;
    }
    let mut bounds: Vec<usize> = token.char_indices().map(|(at, _)| at).collect();
    bounds.push(token.len());
    while bounds.len() > 2 {
        let best = bounds
            .windows(3)
            .enumerate()
            .filter_map(|(at, w)| {
                ranks.get(&(&token[w[0]..w[1]], &token[w[1]..w[2]])).map(|rank| (rank, at))
            })
            .min();
        let Some((_, at)) = best else { return false };
        bounds.remove(at + 1);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(ignore_merges: bool, extra_token: Option<&str>) -> String {
        let mut vocab = serde_json::json!({"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4});
        if let Some(token) = extra_token {
            vocab[token] = 5.into();
        }
        serde_json::json!({
            "normalizer": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": NAMED[0].0}, "behavior": "Isolated",
                 "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false},
            ]},
            "decoder": {"type": "ByteLevel"},
            "added_tokens": [{"id": 7, "content": "<|x|>", "special": true}],
            "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", ["ab", "c"]],
                      "ignore_merges": ignore_merges},
        })
        .to_string()
    }

    #[test]
    fn reads_both_merge_spellings_and_fills_gaps() {
        let vocabulary = vocabulary(&json(true, None)).unwrap();
        assert_eq!(vocabulary.pre, "llama-bpe");
        assert_eq!(vocabulary.merges, ["a b", "ab c"]);
        assert_eq!(vocabulary.tokens[4..], ["abc", "[PAD5]", "[PAD6]", "<|x|>"]);
        assert_eq!(
            vocabulary.token_types[4..],
            [TokenType::Normal, TokenType::Unused, TokenType::Unused, TokenType::Control]
        );
    }

    #[test]
    fn merging_rule_matters_only_if_a_token_is_out_of_reach() {
        assert!(vocabulary(&json(false, None)).is_some());
        // "cab" is in the vocabulary, but merging its characters stops at "c", "ab".
        assert!(vocabulary(&json(true, Some("cab"))).is_some());
        assert!(vocabulary(&json(false, Some("cab"))).is_none());
    }

    #[test]
    fn the_nearest_vocabulary_leaves_out_what_keys_cannot_say() {
        let mut other: Value = serde_json::from_str(&json(false, None)).unwrap();
        other["normalizer"] = serde_json::json!({"type": "NFC"});
        other["added_tokens"][0]["lstrip"] = true.into();
        other["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = QWEN2.0.into();
        assert!(vocabulary(&other.to_string()).is_none());
        let found = nearest(&other.to_string()).unwrap();
        assert_eq!((found.pre.as_str(), found.tokens[7].as_str()), ("qwen2", "<|x|>"));
        assert_eq!(found.merges, ["a b", "ab c"]);
        other["decoder"]["type"] = "Fuse".into();
        assert!(nearest(&other.to_string()).is_none());
    }

    #[test]
    fn refuses_what_the_keys_cannot_say() {
        let base: Value = serde_json::from_str(&json(true, None)).unwrap();
        let changes: [(&str, Value); 5] = [
            ("/normalizer", serde_json::json!({"type": "NFC"})),
            ("/pre_tokenizer/pretokenizers/0/pattern/Regex", "x".into()),
            ("/added_tokens/0/lstrip", true.into()),
            ("/model/dropout", 0.1.into()),
            ("/decoder/type", "Fuse".into()),
        ];
        for (pointer, value) in changes {
            let mut changed = base.clone();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            match changed.pointer_mut(parent).unwrap() {
                Value::Object(map) => drop(map.insert(key.to_owned(), value)),
                _ => *changed.as_object_mut().unwrap().get_mut(&key[1..]).unwrap() = value,
            }
            assert!(vocabulary(&changed.to_string()).is_none(), "{pointer}");
        }
    }
}
