use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::{SpecialTokens, TokenType, TokenizerSource, Vocabulary};

/// Printable ASCII, some longer tokens, two bytes of `é`, a special token, two ends.
static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| tokenizer(true));
static GRAMMARS: LazyLock<Grammars> =
    LazyLock::new(|| Grammars::new(Arc::clone(&TOKENIZER), TOKENIZER.vocab_size() + 5));

fn tokenizer(with_ends: bool) -> Arc<Tokenizer> {
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    tokens.extend(["Ġ", "{\"", "\":", "true", "name", "age\"", "12", "Ã", "©"].map(str::to_owned));
    let normal = tokens.len();
    tokens.extend(["<unused>", "<end>", "<turn>"].map(str::to_owned));
    let mut token_types = vec![TokenType::Normal; normal];
    token_types.resize(tokens.len(), TokenType::Control);
    let ends = u32::try_from(normal).unwrap() + 1..u32::try_from(tokens.len()).unwrap();
    let vocabulary = Vocabulary {
        model: "gpt2".to_owned(),
        pre: "llama-bpe".to_owned(),
        tokens,
        token_types,
        ..Vocabulary::default()
    };
    let special = SpecialTokens {
        bos: None,
        eos: if with_ends { ends.collect() } else { Vec::new() },
        add_bos: false,
    };
    Arc::new(Tokenizer::new(&TokenizerSource::Vocabulary(vocabulary), special).unwrap())
}

fn is_end(id: u32) -> bool {
    TOKENIZER.special().eos.contains(&id)
}

fn allowed(mask: &TokenMask) -> Vec<u32> {
    (0..u32::try_from(GRAMMARS.ids).unwrap()).filter(|id| mask.allows(*id)).collect()
}

/// Follows `grammar` by the choices until an end token, or for as long as there are choices.
fn walk(grammar: &Grammar, choices: &[prop::sample::Index]) -> (Vec<u32>, Vec<Vec<u32>>) {
    let mut constraint = GRAMMARS.compile(grammar).unwrap();
    let mut ids = Vec::new();
    let mut masks = Vec::new();
    for choice in choices {
        let open = allowed(&constraint.mask().unwrap());
        let id = open[choice.index(open.len())];
        constraint.accept(id).unwrap();
        ids.push(id);
        masks.push(open);
        if is_end(id) {
            break;
        }
    }
    (ids, masks)
}

fn text(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| TOKENIZER.token_bytes(*id)).copied().collect();
    String::from_utf8(bytes).unwrap()
}

fn schema() -> Grammar {
    Grammar::JsonSchema(
        r##"{"type":"object","properties":{"name":{"enum":["ann","bob"]},"age":{"$ref":"#/$defs/age"}},
            "required":["name","age"],"additionalProperties":false,
            "$defs":{"age":{"type":"integer","minimum":0,"maximum":120}}}"##
            .to_owned(),
    )
}

fn choices() -> impl Strategy<Value = Vec<prop::sample::Index>> {
    prop::collection::vec(any::<prop::sample::Index>(), 400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_walk_through_a_schema_is_a_value_of_it(choices in choices()) {
        let (ids, _) = walk(&schema(), &choices);
        prop_assert!(ids.last().copied().is_some_and(is_end), "{}", text(&ids));
        let value: serde_json::Value = serde_json::from_str(&text(&ids)).unwrap();
        let fields = value.as_object().unwrap();
        prop_assert_eq!(fields.len(), 2);
        prop_assert!(["ann", "bob"].contains(&fields["name"].as_str().unwrap()));
        prop_assert!(fields["age"].as_u64().unwrap() <= 120);
    }

    #[test]
    fn a_replay_to_any_index_allows_what_was_allowed(choices in choices()) {
        let grammar = schema();
        let (ids, masks) = walk(&grammar, &choices);
        for cut in 0..masks.len() {
            let mut constraint = GRAMMARS.compile(&grammar).unwrap();
            for id in &ids[..cut] {
                constraint.accept(*id).unwrap();
            }
            prop_assert_eq!(&allowed(&constraint.mask().unwrap()), &masks[cut]);
        }
    }

    #[test]
    fn expressions_and_choices_match_as_a_whole(choices in choices()) {
        let (ids, _) = walk(&Grammar::Regex("[a-c]{2,4}é?(-[0-9]{1,2})?".to_owned()), &choices);
        prop_assert!(ids.last().copied().is_some_and(is_end));
        let shown = text(&ids);
        let letters = shown.chars().take_while(|c| ('a'..='c').contains(c)).count();
        prop_assert!((2..=4).contains(&letters), "{}", shown);

        let texts = ["yes", "no", "say \"é\"\n/*"].map(str::to_owned);
        let (ids, _) = walk(&Grammar::Choice(texts[..2].to_vec()), &choices);
        prop_assert!(texts.contains(&text(&ids)), "{}", text(&ids));
    }
}

#[test]
fn a_json_object_is_open_to_any_fields_and_nothing_else() {
    let mut constraint = GRAMMARS.compile(&Grammar::JsonObject).unwrap();
    let spelled = allowed(&constraint.mask().unwrap());
    assert!(spelled.iter().all(|id| TOKENIZER.token_bytes(*id).first() == Some(&b'{')));
    assert_eq!(spelled.len(), 2, "`{{` and `{{\"`");
}

#[test]
fn special_tokens_and_ids_beyond_the_vocabulary_never_fit() {
    let mut constraint = GRAMMARS.compile(&Grammar::Regex("(?s:.*)".to_owned())).unwrap();
    let mask = constraint.mask().unwrap();
    let unused = u32::try_from(TOKENIZER.vocab_size() - 3).unwrap();
    assert_eq!(TOKENIZER.token_text(unused), Some("<unused>"));
    for id in std::iter::once(unused).chain(unused + 3..unused + 8) {
        assert!(!mask.allows(id), "{id}");
        assert_eq!(constraint.accept(id), Err(GrammarError::Rejected { id }));
    }
    assert!(mask.allows(unused + 1) && mask.allows(unused + 2), "both ends do");
    let mut logits = vec![1.0; GRAMMARS.ids + 40];
    mask.apply(&mut logits);
    for (id, logit) in (0..).zip(&logits) {
        let expected = if mask.allows(id) { 1.0 } else { f32::NEG_INFINITY };
        assert_eq!(*logit, expected, "{id}");
    }
}

#[test]
fn a_complete_answer_allows_its_end_and_nothing_else() {
    let mut constraint = GRAMMARS.compile(&Grammar::Choice(vec!["no".to_owned()])).unwrap();
    for id in ["n", "o"].map(|c| TOKENIZER.encode_prompt(c).unwrap()[0]) {
        constraint.accept(id).unwrap();
    }
    for _ in 0..2 {
        let ends = allowed(&constraint.mask().unwrap());
        assert_eq!(ends, TOKENIZER.special().eos);
        constraint.accept(ends[0]).unwrap();
    }
    assert_eq!(constraint.accept(0), Err(GrammarError::Rejected { id: 0 }));
}

#[test]
fn a_model_without_an_end_is_refused() {
    let endless = tokenizer(false);
    let ids = endless.vocab_size();
    // Ends beyond the logits can never be chosen.
    for (tokenizer, ids) in [(endless, ids), (Arc::clone(&TOKENIZER), 3)] {
        let compiled = Grammars::new(tokenizer, ids).compile(&Grammar::JsonObject);
        assert_eq!(compiled.map(|_| ()), Err(GrammarError::NoEnd));
    }
}

#[test]
fn bad_and_hostile_grammars_are_refused_with_a_reason() {
    let schema = |text: &str| Grammar::JsonSchema(text.to_owned());
    let nested = format!("{}true{}", "{\"items\":".repeat(5_000), "}".repeat(5_000));
    for (grammar, reason) in [
        (schema("{"), "no JSON"),
        (schema(r#"{"type":"strong"}"#), "strong"),
        (schema(r##"{"$ref":"#/$defs/absent"}"##), "absent"),
        (schema(r#"{"$ref":"https://example.com/schema"}"#), "example.com"),
        (schema(r#"{"type":"string","pattern":"(?=a)b"}"#), ""),
        (schema(&nested), "recursion"),
        (Grammar::Regex("a(".to_owned()), ""),
        (Grammar::Regex("(?=a)b".to_owned()), ""),
        (Grammar::Regex(format!("{}a{}", "(".repeat(20_000), ")".repeat(20_000))), "invalid regex"),
        (Grammar::Regex("a".repeat(Grammars::MAX_BYTES + 1)), "65537 bytes, at most 65536"),
        (Grammar::Choice(Vec::new()), "at least one"),
        (Grammar::Choice(vec![String::new()]), "none of them empty"),
    ] {
        let error = GRAMMARS.compile(&grammar).map(|_| ()).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(reason), "{message}");
        assert!(message.len() < 1_000, "{} bytes", message.len());
    }
}

#[test]
fn the_work_for_a_hostile_grammar_is_bounded() {
    let product = format!("({}){{1000}}", "(a|b|c){1000}".repeat(40));
    let overlapping =
        format!("({})*x", (1..200).map(|n| format!("a{{{n}}}")).collect::<Vec<_>>().join("|"));
    let many: Vec<String> =
        (0..400).map(|n| format!("\"f{n}\":{{\"enum\":[{n},\"{n}\"]}}")).collect();
    let wide = format!(
        "{{\"anyOf\":[{{\"properties\":{{{0}}}}},{{\"properties\":{{{0}}}}}]}}",
        many.join(",")
    );
    let a = TOKENIZER.encode_prompt("a").unwrap()[0];
    for grammar in [Grammar::Regex(product), Grammar::Regex(overlapping), Grammar::JsonSchema(wide)]
    {
        // Whether it is taken, and how far it is followed, is the limits' business; that it ends is
        // the point: a hang fails the test run.
        let Ok(mut constraint) = GRAMMARS.compile(&grammar) else { continue };
        for _ in 0..500 {
            if constraint.mask().is_err() || constraint.accept(a).is_err() {
                break;
            }
        }
    }
}

#[test]
fn grammars_that_come_again_are_not_compiled_again() {
    let grammars = Grammars::new(Arc::clone(&TOKENIZER), TOKENIZER.vocab_size());
    for nth in 0..2 * KEPT {
        grammars.compile(&Grammar::Regex(format!("a{{{}}}", nth + 1))).unwrap();
        grammars.compile(&Grammar::JsonObject).unwrap();
    }
    let compiled = grammars.compiled.lock().unwrap();
    assert_eq!(compiled.len(), KEPT);
    assert!(compiled.iter().any(|(grammar, _)| *grammar == Grammar::JsonObject));
}
