//! Against what transformers makes of 1,000 strings and of chats.
//!
//! `tests/fixtures/text/generate.py` has written the answers down.

#![expect(clippy::unwrap_used, reason = "a test, helpers included")]

use std::collections::HashMap;

use serde_json::Value;
use tercet_text::{
    ChatMessage, ChatTemplate, SpecialTokens, TemplateError, TemplateVariables, TokenType,
    Tokenizer, TokenizerSource, Vocabulary,
};

fn fixture(path: &str) -> String {
    let path = format!("{}/../../tests/fixtures/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {path}: {error}"))
}

fn json(path: &str) -> Value {
    serde_json::from_str(&fixture(path)).unwrap()
}

fn build(source: &TokenizerSource, special: SpecialTokens) -> Tokenizer {
    Tokenizer::new(source, special).unwrap()
}

fn from_json(text: String) -> Tokenizer {
    build(&TokenizerSource::Json(text), SpecialTokens::default())
}

/// Compares ids and decoded text of every string.
fn check(tokenizer: &Tokenizer, family: &str) {
    let strings: Vec<String> = serde_json::from_value(json("text/strings.json")).unwrap();
    assert_eq!(strings.len(), 1000);
    let answers = json(&format!("text/answers/{family}.json"));
    let ids: Vec<Vec<u32>> = serde_json::from_value(answers["ids"].clone()).unwrap();
    assert_eq!(ids.len(), strings.len());
    let again = |key: &str| -> HashMap<usize, String> {
        serde_json::from_value(answers[key].clone()).unwrap()
    };
    let (plain, whole) = (again("plain"), again("whole"));
    for (n, (text, ids)) in strings.iter().zip(&ids).enumerate() {
        assert_eq!(&tokenizer.encode_prompt(text).unwrap(), ids, "{family} {n}: {text:?}");
        for (skip, again) in [(true, &plain), (false, &whole)] {
            let decoded = tokenizer.decode(ids, skip).unwrap();
            assert_eq!(&decoded, again.get(&n).unwrap_or(text), "{family} {n}: {text:?}");
        }
    }
}

#[test]
fn models_tokenize_as_in_transformers() {
    for model in ["bitnet-bf16", "bitnet-packed", "demo-model", "llama-packed"] {
        check(&from_json(fixture(&format!("{model}/tokenizer.json"))), model);
    }
}

#[test]
fn families_tokenize_as_in_transformers() {
    for family in ["llama3", "qwen2", "gpt2", "falcon", "llama", "mistral"] {
        check(&from_json(fixture(&format!("text/{family}/tokenizer.json"))), family);
    }
}

/// The keys that a GGUF file of the same model has.
fn keys(family: &str) -> Vocabulary {
    let json = json(&format!("text/{family}/tokenizer.json"));
    let added = json["added_tokens"].as_array().unwrap();
    let id = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let size = vocab.values().chain(added.iter().map(|a| &a["id"])).map(id).max().unwrap() + 1;
    let pieces = family == "llama";
    let mut tokens = vec![String::new(); size];
    let mut token_types = vec![TokenType::Normal; size];
    for (token, at) in vocab {
        tokens[id(at)].clone_from(token);
        if pieces && token.starts_with("<0x") {
            token_types[id(at)] = TokenType::Byte;
        }
    }
    for token in added {
        tokens[id(&token["id"])] = token["content"].as_str().unwrap().to_owned();
        token_types[id(&token["id"])] = match token["special"].as_bool().unwrap() {
            true if token["content"] == "<unk>" => TokenType::Unknown,
            true => TokenType::Control,
            false => TokenType::UserDefined,
        };
    }
    let merge =
        |pair: &Value| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap());
    let merges = json["model"]["merges"].as_array().unwrap().iter().map(merge);
    let (model, pre) = match family {
        "llama" => ("llama", "default"),
        "llama3" => ("gpt2", "llama-bpe"),
        "gpt2" => ("gpt2", "gpt-2"),
        other => ("gpt2", other),
    };
    let score = |id: u16| -f32::from(id);
    Vocabulary {
        model: model.to_owned(),
        pre: pre.to_owned(),
        token_types,
        merges: if pieces { Vec::new() } else { merges.collect() },
        scores: if pieces { (0..).take(size).map(score).collect() } else { Vec::new() },
        add_space_prefix: None,
        tokens,
    }
}

#[test]
fn gguf_vocabularies_tokenize_as_in_transformers() {
    for family in ["llama3", "qwen2", "gpt2", "falcon", "llama"] {
        let vocabulary = keys(family);
        let bos = ["<|begin_of_text|>", "<s>"]
            .into_iter()
            .find_map(|bos| vocabulary.tokens.iter().position(|token| token == bos));
        let bos = bos.map(|bos| u32::try_from(bos).unwrap());
        let special = SpecialTokens { bos, eos: Vec::new(), add_bos: bos.is_some() };
        check(&build(&TokenizerSource::Vocabulary(vocabulary), special), family);
    }
}

#[test]
fn chats_render_as_in_transformers() {
    let chats = json("text/chats.json");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let conversations: Vec<Vec<ChatMessage>> = chats["chats"]
        .as_array()
        .unwrap()
        .iter()
        .map(|chat| {
            let message = |message: &Value| ChatMessage {
                role: text(&message["role"]),
                content: text(&message["content"]),
            };
            chat.as_array().unwrap().iter().map(message).collect()
        })
        .collect();
    let cases = chats["cases"].as_array().unwrap();
    assert!(cases.len() > 500);
    let mut failures = Vec::new();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let template = fixture(&format!("text/templates/{name}"));
        let template = ChatTemplate::new(&template, "<s>", "</s>").unwrap();
        let chat = usize::try_from(case["chat"].as_u64().unwrap()).unwrap();
        let variables = TemplateVariables::from_json(&case["variables"].to_string()).unwrap();
        let prompt = case["prompt"].as_bool().unwrap();
        let rendered = template.render_with(&conversations[chat], prompt, &variables);
        let same = match (&rendered, case["text"].as_str()) {
            (Ok(rendered), Some(expected)) => rendered == expected,
            (Err(TemplateError::Refused { reason }), None) => case["reason"] == reason.as_str(),
            (Err(TemplateError::Failed { .. }), None) => case["error"] == "UndefinedError",
            _ => false,
        };
        if !same {
            failures.push(format!("{case}\nours: {rendered:?}"));
        }
    }
    assert!(failures.is_empty(), "{} differ: {}", failures.len(), failures[0]);
}
