//! Targets: tokenizers, chat templates, grammars.

use std::sync::{Arc, LazyLock};

use tercet_text::{
    ChatMessage, ChatTemplate, Constraint, Grammar, Grammars, SpecialTokens, Tokenizer,
    TokenizerSource,
};

use crate::message::{check, good};

/// Texts that tokenizers and templates trip over: no text, spaces, digits, combining and joined
/// characters, controls, words that never end.
const TEXTS: [&str; 6] = [
    "",
    " \n\t  ",
    "Hello, world 1234567 it's",
    "e\u{301} \u{1f469}\u{200d}\u{1f4bb} \u{4f60}\u{597d} \u{130}\u{fb01}",
    "<s></s><|im_start|>user\u{0}\u{7f}\u{feff}\u{fffd}{{ x }}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];
/// Tokens an answer is followed for.
const STEPS: usize = 24;

/// A `tokenizer.json`, used with and without a token that begins texts.
///
/// # Panics
/// Over a defect.
pub fn tokenizer(data: &[u8]) -> bool {
    let Ok(json) = std::str::from_utf8(data) else { return false };
    let source = TokenizerSource::Json(json.to_owned());
    let plain = SpecialTokens::default();
    let begun = SpecialTokens { bos: Some(0), eos: vec![1], add_bos: true };
    let built = [plain, begun].map(|special| good(Tokenizer::new(&source, special)));
    built.iter().flatten().for_each(use_tokenizer);
    built[0].is_some()
}

/// A chat template, rendered for several conversations.
///
/// # Panics
/// Over a defect.
pub fn template(data: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(data) else { return false };
    let Some(template) = good(ChatTemplate::new(source, "<s>", "</s>")) else { return false };
    use_template(&template)
}

/// A grammar: the first byte is its kind, the second what an answer is drawn by, then comes its text.
///
/// # Panics
/// Over a defect.
pub fn grammar(data: &[u8]) -> bool {
    let [kind, seed, text @ ..] = data else { return false };
    let Ok(text) = std::str::from_utf8(text) else { return false };
    let grammar = match kind % 4 {
        0 => Grammar::JsonSchema(text.to_owned()),
        1 => Grammar::Regex(text.to_owned()),
        2 => Grammar::Choice(text.split('\n').map(str::to_owned).collect()),
        _ => Grammar::JsonObject,
    };
    let Some(constraint) = good(GRAMMARS.compile(&grammar)) else { return false };
    follow(constraint, *seed);
    true
}

/// Encodes and decodes with a tokenizer.
pub(crate) fn use_tokenizer(tokenizer: &Tokenizer) {
    for text in TEXTS {
        let ids = [tokenizer.encode_prompt(text), tokenizer.encode_chat(text)];
        for ids in ids.into_iter().filter_map(good) {
            for skip_special in [false, true] {
                good(tokenizer.decode(&ids, skip_special));
            }
        }
    }
    let ids = u32::try_from(tokenizer.vocab_size()).expect("ids have 32 bits");
    for id in (0..ids).take(512).chain([ids, u32::MAX]) {
        let known = tokenizer.token_text(id).is_some();
        assert_eq!(known, good(tokenizer.decode(&[id], false)).is_some(), "id {id}");
        assert!(known || tokenizer.token_bytes(id).is_empty(), "bytes of no token {id}");
    }
}

/// Renders conversations; returns whether all could be.
pub(crate) fn use_template(template: &ChatTemplate) -> bool {
    let message =
        |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
    let turns: Vec<ChatMessage> = TEXTS
        .iter()
        .zip(["user", "assistant"].iter().cycle())
        .map(|(t, r)| message(r, t))
        .collect();
    let conversations = [
        vec![message("user", "Hello")],
        vec![message("system", "Be brief."), message("user", "Hello")],
        turns,
    ];
    let failed = conversations
        .iter()
        .flat_map(|messages| [false, true].map(|prompt| template.render(messages, prompt)))
        .filter(|rendered| rendered.as_ref().inspect_err(|error| check(error)).is_err())
        .count();
    failed == 0
}

/// Draws an answer. What the mask allows must be accepted, and the mask may not be empty.
fn follow(mut constraint: Constraint, seed: u8) {
    let ids = VOCABULARY.vocab_size();
    let mut state = u64::from(seed);
    for _ in 0..STEPS {
        let Some(mask) = good(constraint.mask()) else { return };
        let allowed: Vec<u32> = (0..).take(ids).filter(|id| mask.allows(*id)).collect();
        assert!(!allowed.is_empty(), "a mask without any id");
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let chosen = usize::try_from(state >> 33).expect("31 bits") % allowed.len();
        let id = allowed[chosen];
        match constraint.accept(id) {
            Ok(()) if VOCABULARY.special().eos.contains(&id) => return,
            Ok(()) => {}
            Err(tercet_text::GrammarError::Rejected { id }) => panic!("{id} is in the mask"),
            Err(error) => {
                check(&error);
                return;
            }
        }
    }
}

static VOCABULARY: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let json = include_str!("../../fixtures/demo-model/tokenizer.json").to_owned();
    // The first of these is a token of text, as some models end with.
    let special = SpecialTokens { bos: None, eos: vec![0, 1022], add_bos: false };
    Arc::new(
        Tokenizer::new(&TokenizerSource::Json(json), special).expect("the fixture is a tokenizer"),
    )
});
static GRAMMARS: LazyLock<Grammars> =
    LazyLock::new(|| Grammars::new(Arc::clone(&VOCABULARY), VOCABULARY.vocab_size()));
