//! Against transformers' answers for the fixtures, and against malformed sources.

mod gguf;

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::{ChatMessage, ChatTemplate};

fn fixture(path: &str) -> Vec<u8> {
    let path = format!("{}/../../tests/fixtures/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("read {path}: {error}"))
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&fixture(path)).unwrap()
}

/// A model's tokenizer and template as a loader would find them in a Hugging Face folder.
fn from_folder(name: &str) -> (Tokenizer, ChatTemplate) {
    let source = TokenizerSource::Json(
        String::from_utf8(fixture(&format!("{name}/tokenizer.json"))).unwrap(),
    );
    let id = |value: &Value| u32::try_from(value.as_u64().unwrap()).unwrap();
    let generation = json(&format!("{name}/generation_config.json"));
    let special = SpecialTokens {
        bos: Some(id(&generation["bos_token_id"])),
        eos: generation["eos_token_id"].as_array().unwrap().iter().map(id).collect(),
        add_bos: false,
    };
    let config = json(&format!("{name}/tokenizer_config.json"));
    let text = |key: &str| config[key].as_str().unwrap();
    let template =
        ChatTemplate::new(text("chat_template"), text("bos_token"), text("eos_token")).unwrap();
    (Tokenizer::new(&source, special).unwrap(), template)
}

/// The same from the keys of a GGUF file.
fn from_gguf(name: &str) -> (Tokenizer, ChatTemplate) {
    let keys = gguf::keys(&fixture(name));
    let special = SpecialTokens {
        bos: keys.number("tokenizer.ggml.bos_token_id"),
        eos: keys.number("tokenizer.ggml.eos_token_id").into_iter().collect(),
        add_bos: keys.number("tokenizer.ggml.add_bos_token") == Some(1),
    };
    let tokenizer =
        Tokenizer::new(&TokenizerSource::Vocabulary(keys.vocabulary()), special).unwrap();
    let text = |id: Option<u32>| tokenizer.token_text(id.unwrap()).unwrap().to_owned();
    let bos = text(tokenizer.special().bos);
    let eos = text(tokenizer.special().eos.first().copied());
    let template =
        ChatTemplate::new(keys.text("tokenizer.chat_template").unwrap(), &bos, &eos).unwrap();
    (tokenizer, template)
}

/// Compares prompts and, if the fixture has one, the chat with transformers' answers.
fn check_answers((tokenizer, template): &(Tokenizer, ChatTemplate), expected: &str) {
    let expected = json(&format!("{expected}/expected.json"));
    let ids = |value: &Value| -> Vec<u32> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
            .collect()
    };
    let cases = expected["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let prompt = case["prompt"].as_str().unwrap();
        assert_eq!(
            tokenizer.encode_prompt(prompt).unwrap(),
            ids(&case["prompt_ids"]),
            "{prompt:?}"
        );
    }
    let Some(chat) = expected.get("chat") else { return };
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let messages: Vec<ChatMessage> = chat["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|message| ChatMessage {
            role: text(&message["role"]),
            content: text(&message["content"]),
        })
        .collect();
    let rendered = template.render(&messages, true).unwrap();
    assert_eq!(rendered, text(&chat["rendered"]));
    assert_eq!(tokenizer.encode_chat(&rendered).unwrap(), ids(&chat["ids"]));
}

#[test]
fn folders_tokenize_as_transformers() {
    for name in ["bitnet-packed", "bitnet-bf16", "demo-model"] {
        check_answers(&from_folder(name), name);
    }
}

#[test]
fn gguf_vocabulary_tokenizes_as_transformers() {
    check_answers(&from_gguf("gguf/bitnet-i2_s.gguf"), "bitnet-packed");
}

#[test]
fn both_sources_agree_on_every_token() {
    let (folder, _) = from_folder("bitnet-packed");
    let (gguf, _) = from_gguf("gguf/bitnet-i2_s.gguf");
    assert_eq!(folder.vocab_size(), gguf.vocab_size());
    assert_eq!(folder.special().bos, gguf.special().bos);
    assert!(folder.special().add_bos && gguf.special().add_bos);
    for id in (0..folder.vocab_size()).map(|id| u32::try_from(id).unwrap()) {
        assert_eq!(folder.token_text(id), gguf.token_text(id), "{id}");
        assert_eq!(folder.token_bytes(id), gguf.token_bytes(id), "{id}");
    }
}

#[test]
fn special_tokens_are_found_in_prompts_and_have_no_text() {
    for (tokenizer, _) in [from_folder("bitnet-packed"), from_gguf("gguf/bitnet-i2_s.gguf")] {
        assert_eq!(tokenizer.encode_prompt("").unwrap(), [509]);
        assert_eq!(tokenizer.encode_prompt("<|eot_id|>").unwrap(), [509, 511]);
        assert_eq!(tokenizer.encode_prompt("<|begin_of_text|>").unwrap(), [509, 509]);
        assert_eq!(tokenizer.encode_chat("<|begin_of_text|>").unwrap(), [509]);
        assert_eq!(tokenizer.encode_chat("").unwrap(), [509]);
        assert_eq!(tokenizer.token_text(511), Some("<|eot_id|>"));
        for id in [509, 510, 511, 512, u32::MAX] {
            assert_eq!(tokenizer.token_bytes(id), b"", "{id}");
        }
    }
}

proptest! {
    #[test]
    fn ids_spell_the_text(text in "(?s).{0,40}|[ \\n\\tae's1-9<|(é日🎭]{0,40}") {
        static BOTH: LazyLock<[Tokenizer; 2]> = LazyLock::new(|| {
            [from_folder("bitnet-packed").0, from_gguf("gguf/bitnet-i2_s.gguf").0]
        });
        let [folder, gguf] = &*BOTH;
        let ids = folder.encode_prompt(&text).unwrap();
        let bytes: Vec<u8> =
            ids.iter().flat_map(|id| folder.token_bytes(*id)).copied().collect();
        prop_assert_eq!(bytes, text.as_bytes());
        prop_assert_eq!(gguf.encode_prompt(&text).unwrap(), ids);
    }
}

/// A vocabulary of single letters with one merge.
fn small() -> Vocabulary {
    Vocabulary {
        model: "gpt2".to_owned(),
        pre: "llama-bpe".to_owned(),
        tokens: ["a", "b", "ab", "<s>", "a b", "[PAD]"].map(str::to_owned).to_vec(),
        token_types: [1, 1, 1, 3, 4, 5].map(TokenType::from_gguf).to_vec(),
        merges: vec!["a b".to_owned()],
        ..Vocabulary::default()
    }
}

fn build(vocabulary: Vocabulary) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::new(&TokenizerSource::Vocabulary(vocabulary), SpecialTokens::default())
}

#[test]
fn token_types_decide_recognition_and_text() {
    let tokenizer = build(small()).unwrap();
    assert_eq!(tokenizer.encode_prompt("ab<s>a bb").unwrap(), [2, 3, 4, 1]);
    assert_eq!(tokenizer.token_bytes(2), b"ab");
    assert_eq!(tokenizer.token_bytes(3), b"", "control");
    assert_eq!(tokenizer.token_bytes(4), b"a b", "added by hand");
    assert_eq!(tokenizer.token_bytes(5), b"", "unused");
    for number in 1..=6 {
        assert_eq!(i64::from(TokenType::from_gguf(number).to_gguf()), number);
    }
}

#[test]
fn texts_without_a_place_to_cut_are_refused() {
    let tokenizer = build(small()).unwrap();
    let limit = Tokenizer::MAX_STRETCH;
    let words = ("ab".repeat(limit / 2) + "\n").repeat(3);
    assert!(tokenizer.encode_prompt(&words).is_ok());
    for text in
        ["a".repeat(limit + 1), format!("a{}b", " ".repeat(limit + 1)), "é".repeat(limit + 1)]
    {
        let error = tokenizer.encode_prompt(&text).unwrap_err();
        assert!(
            matches!(error, TokenizerError::LongStretch { characters } if characters == limit + 1)
        );
        assert_eq!(
            error.to_string(),
            "the text has 131073 characters in a row that are all white space or all not: \
             expected at most 131072, break it up"
        );
    }
}

#[test]
fn bos_must_exist() {
    let source = TokenizerSource::Vocabulary(small());
    let special = |bos, add_bos| SpecialTokens { bos, eos: vec![3], add_bos };
    let error = Tokenizer::new(&source, special(Some(6), true)).unwrap_err();
    assert_eq!(error.to_string(), "the bos id 6 is not in the vocabulary of 6 ids");
    assert!(matches!(
        Tokenizer::new(&source, special(None, true)),
        Err(TokenizerError::MissingBos)
    ));
    let without = Tokenizer::new(&source, special(Some(3), false)).unwrap();
    assert_eq!(without.encode_prompt("a").unwrap(), [0]);
    assert_eq!(without.encode_chat("a").unwrap(), [0]);
}

#[test]
fn malformed_vocabularies_are_refused() {
    let text = |s: &str| s.to_owned();
    type Spoil = fn(&mut Vocabulary);
    let table: [(&str, Spoil); 10] = [
        ("tokenizer kind `t5` is not supported", |v| v.model = "t5".to_owned()),
        ("pre-tokenizer `x` is not known", |v| v.pre = "x".to_owned()),
        ("the vocabulary is empty", |v| v.tokens.clear()),
        ("token `a` has two ids, 0 and 5", |v| v.tokens[5] = "a".to_owned()),
        ("there are 5 token types for 6 tokens", |v| v.token_types.truncate(5)),
        ("merge 1 `ab` is malformed", |v| v.merges.push("ab".to_owned())),
        ("merge 1 `a b c` is malformed", |v| v.merges.push("a b c".to_owned())),
        ("merge 1 ` ` is malformed", |v| v.merges.push(" ".to_owned())),
        ("the merges do not fit the vocabulary", |v| v.merges.push("a c".to_owned())),
        ("the merges do not fit the vocabulary", |v| v.merges.push("b a".to_owned())),
    ];
    for (expected, spoil) in table {
        let mut vocabulary = small();
        spoil(&mut vocabulary);
        let error = build(vocabulary).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let mut huge = small();
    huge.token_types.clear();
    huge.tokens = (0..=Tokenizer::MAX_IDS).map(|i| text(&i.to_string())).collect();
    assert!(matches!(build(huge), Err(TokenizerError::TooManyIds { id: 4_194_304 })));
}

const BYTE_LEVEL: &str =
    r#"{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true}"#;

#[test]
fn malformed_json_is_refused() {
    let file = |model: &str, decoder: &str| {
        format!(
            r#"{{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,
                "post_processor":null,"decoder":{decoder},"model":{model}}}"#
        )
    };
    let bpe = |rest: &str| file(&format!(r#"{{"type":"BPE",{rest}}}"#), BYTE_LEVEL);
    let good = bpe(r#""vocab":{"a":0,"b":1,"ab":2},"merges":[["a","b"]]"#);
    let build =
        |text: String| Tokenizer::new(&TokenizerSource::Json(text), SpecialTokens::default());
    // Without ByteLevel as pre-tokenizer the letters still are their own bytes.
    let tokenizer = build(good.clone()).unwrap();
    assert_eq!(tokenizer.encode_prompt("abb").unwrap(), [2, 1]);
    assert_eq!(build(good.replace("\"ab\":2", "\"ab\":7")).unwrap().vocab_size(), 8);

    let vocab = r#""vocab":{"a":0},"merges":[]"#;
    for (expected, text) in [
        ("tokenizer.json does not parse: ", String::new()),
        ("tokenizer.json does not parse: ", "[]".to_owned()),
        ("tokenizer.json does not parse: ", bpe(r#""vocab":{"a":0}"#)),
        ("tokenizer.json does not parse: ", bpe(r#""vocab":{"a":-1},"merges":[]"#)),
        ("tokenizer.json does not parse: ", bpe(r#""vocab":{"a":0},"merges":["a b"]"#)),
        ("tokenizer.json does not parse: ", bpe(r#""vocab":{"a":0},"merges":["a"]"#)),
        ("the vocabulary is empty", bpe(r#""vocab":{},"merges":[]"#)),
        ("token id 0 stands for two tokens", bpe(r#""vocab":{"a":0,"b":0},"merges":[]"#)),
        ("token id 4294967295 is too large", bpe(r#""vocab":{"a":4294967295},"merges":[]"#)),
        ("tokenizer setting `model.dropout` is 0.5", bpe(&format!(r#""dropout":0.5,{vocab}"#))),
        (
            "tokenizer setting `model.continuing_subword_prefix` is `##`",
            bpe(&format!(r###""continuing_subword_prefix":"##",{vocab}"###)),
        ),
        (
            "tokenizer setting `decoder` is `{\"type\":\"Metaspace\"}`",
            file(&format!("{{{vocab}}}"), r#"{"type":"Metaspace"}"#),
        ),
        (
            "tokenizer kind `Unigram` is not supported",
            file(r#"{"type":"Unigram","unk_id":0,"vocab":[["a",0.0]]}"#, "null"),
        ),
    ] {
        let error = build(text.clone()).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error} of {text}");
    }
}

/// Files that are short and ask for work without an end.
#[test]
fn tokenizer_bombs_are_refused() {
    let regex = |expression: &str| {
        let split = serde_json::json!({"type": "Split", "pattern": {"Regex": expression},
            "behavior": "Isolated", "invert": false});
        ("pre_tokenizer", split)
    };
    let replace = |content: String| serde_json::json!({"type": "Replace", "pattern": {"String": "a"}, "content": content});
    let growing: Vec<Value> = (0..7).map(|_| replace("aa".to_owned())).collect();
    let mut deep = serde_json::json!({"type": "Sequence", "normalizers": []});
    for _ in 0..20 {
        deep = serde_json::json!({"type": "Sequence", "normalizers": [deep, {"type": "NFC"},
            {"type": "NFC"}, {"type": "NFC"}]});
    }
    let token = |id: usize, content: String| {
        serde_json::json!({"id": id, "content": content, "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false})
    };
    let piece = serde_json::json!({"SpecialToken": {"id": "a", "type_id": 0}});
    let around = serde_json::json!({"type": "TemplateProcessing", "single": vec![piece; 64],
        "pair": [], "special_tokens": {"a": {"id": "a", "ids": vec![0; 64], "tokens": vec!["a"; 64]}}});
    let bombs = [
        (regex("(a+)+(?!b)"), "pattern.Regex` is `(a+)+(?!b)`"),
        (regex("(?:a|a*)*(?=b)"), "pattern.Regex` is `(?:a|a*)*(?=b)`"),
        (regex("a*a*a*a*(?!b)"), "at most three repetitions without an end"),
        (regex(r"(a*){9}\1"), "at most three repetitions without an end"),
        (regex("(?:(?:a{50}){50}){50}"), "is repetitions of 125000 in sum, which"),
        (regex(r"\p{L}{300}"), "is repetitions of 300 in sum, which"),
        (regex(&"a|".repeat(3000)), "is 6000 bytes long, which"),
        (regex(&"(".repeat(2000)), "an expression that can be parsed"),
        (("normalizer", replace("x".repeat(1000))), "makes it 1000 times longer"),
        (
            ("normalizer", serde_json::json!({"type": "Sequence", "normalizers": growing})),
            "makes it 128 times longer",
        ),
        (("normalizer", deep), "is 81 steps, which is not supported: expected at most 64"),
        (("added_tokens", Value::from(vec![token(3, "x".repeat(2 << 20))])), "2097152 bytes"),
        (("post_processor", around), "is 4096 tokens, which is not supported"),
    ];
    let build = |file: &Value| {
        Tokenizer::new(&TokenizerSource::Json(file.to_string()), SpecialTokens::default())
    };
    let plain: Value = serde_json::from_str(&format!(
        r#"{{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,
            "post_processor":null,"decoder":{BYTE_LEVEL},
            "model":{{"type":"BPE","vocab":{{"a":0,"b":1,"ab":2}},"merges":["a b"]}}}}"#
    ))
    .unwrap();
    let with = |(key, value): (&str, Value)| {
        let mut file = plain.clone();
        file[key] = value;
        build(&file)
    };
    for (bomb, expected) in bombs {
        let error = with(bomb).unwrap_err().to_string();
        assert!(error.contains(expected) && error.len() < 700, "{expected}: {error}");
    }
    // What published files say is far from that.
    for expression in [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?:a+b?)+",
        r"(?<=a)b{1,9}",
    ] {
        assert!(with(regex(expression)).is_ok(), "{expression}");
    }
}
