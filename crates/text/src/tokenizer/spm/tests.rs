use crate::{SpecialTokens, TokenType, Tokenizer, TokenizerError, TokenizerSource, Vocabulary};

/// Some pieces with scores, all bytes, and special tokens.
fn vocabulary() -> Vocabulary {
    let mut vocabulary = Vocabulary { model: "llama".to_owned(), ..Vocabulary::default() };
    let mut add = |token: &str, kind, score| {
        vocabulary.tokens.push(token.to_owned());
        vocabulary.token_types.push(kind);
        vocabulary.scores.push(score);
    };
    add("<unk>", TokenType::Unknown, 0.0);
    add("<s>", TokenType::Control, 0.0);
    add("</s>", TokenType::Control, 0.0);
    for byte in 0..=255 {
        add(&format!("<0x{byte:02X}>"), TokenType::Byte, 0.0);
    }
    let pieces = ["\u{2581}a", "ab", "bc", "aa", "aaa", "\u{2581}", "a", "b", "c"];
    for (rank, piece) in (1u8..).zip(pieces) {
        add(piece, TokenType::Normal, -f32::from(rank));
    }
    add("<tool>", TokenType::UserDefined, 0.0);
    vocabulary
}

fn build(vocabulary: Vocabulary) -> Result<Tokenizer, TokenizerError> {
    let special = SpecialTokens { bos: Some(1), eos: vec![2], add_bos: true };
    Tokenizer::new(&TokenizerSource::Vocabulary(vocabulary), special)
}

fn tokens(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode_prompt(text).unwrap();
    ids.iter().map(|id| tokenizer.token_text(*id).unwrap().replace('\u{2581}', "_")).collect()
}

#[test]
fn the_best_score_merges_first_and_ties_go_left() {
    let tokenizer = build(vocabulary()).unwrap();
    assert_eq!(tokens(&tokenizer, "abc"), ["<s>", "_a", "bc"]);
    assert_eq!(tokens(&tokenizer, "cabc"), ["<s>", "_", "c", "ab", "c"]);
    // `_a` first, then pairs from the left, then three.
    assert_eq!(tokens(&tokenizer, "aaaaaa"), ["<s>", "_a", "aa", "aaa"]);
    assert_eq!(tokens(&tokenizer, "a  a"), ["<s>", "_a", "_", "_a"]);
    assert_eq!(tokens(&tokenizer, ""), ["<s>"]);
}

#[test]
fn characters_without_a_token_are_bytes_and_special_tokens_are_whole() {
    let tokenizer = build(vocabulary()).unwrap();
    assert_eq!(tokens(&tokenizer, "é\n"), ["<s>", "_", "<0xC3>", "<0xA9>", "<0x0A>"]);
    // Each text between special tokens has a space of its own, as in llama.cpp.
    assert_eq!(tokens(&tokenizer, "a</s>a<tool>"), ["<s>", "_a", "</s>", "_a", "<tool>"]);
    let ids = tokenizer.encode_prompt("a é  b</s>").unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a é  b");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<s> a é  b</s>");
    assert_eq!(tokenizer.decode(&ids[1..], false).unwrap(), "a é  b</s>");
    assert_eq!(tokenizer.token_bytes(ids[1]), b" a", "an answer continues a text");
    let error = tokenizer.decode(&[1, 900], true).unwrap_err().to_string();
    assert_eq!(error, "token id 900 is not in the vocabulary: expected less than 269, and no gap");

    let plain = Vocabulary { add_space_prefix: Some(false), ..vocabulary() };
    let plain = build(plain).unwrap();
    assert_eq!(tokens(&plain, "a b"), ["<s>", "a", "_", "b"]);
    assert_eq!(plain.decode(&plain.encode_prompt(" a").unwrap(), true).unwrap(), " a");
}

#[test]
fn what_no_token_can_spell_is_unknown_or_refused() {
    let mut bare = vocabulary();
    for token in &mut bare.tokens[3..259] {
        token.insert(0, 'x');
    }
    assert_eq!(tokens(&build(bare.clone()).unwrap(), "aéé b"), ["<s>", "_a", "<unk>", "_", "b"]);
    bare.token_types[0] = TokenType::Normal;
    let error = build(bare).unwrap().encode_prompt("é").unwrap_err().to_string();
    assert_eq!(error, "the text cannot be tokenized: the vocabulary has no token for `é`");
}

#[test]
fn scores_must_be_numbers_one_for_each_token() {
    let mut spoilt = vocabulary();
    spoilt.scores[7] = f32::NAN;
    let error = build(spoilt).unwrap_err().to_string();
    assert_eq!(error, "the score of token id 7 is NaN: expected a number");
    let mut spoilt = vocabulary();
    spoilt.scores.pop();
    let error = build(spoilt).unwrap_err().to_string();
    assert_eq!(error, "there are 268 scores for 269 tokens: expected one each");
    let none = Vocabulary { scores: Vec::new(), ..vocabulary() };
    assert_eq!(tokens(&build(none).unwrap(), "abc"), ["<s>", "_a", "bc"]);
}
