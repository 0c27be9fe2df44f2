//! A byte-level BPE vocabulary of any size that tokenises any text.

use tercet_text::{SpecialTokens, TokenType, TokenizerSource, Vocabulary};

use crate::model_file::error::ModelError;
use crate::model_file::tokenizer::TextParts;

/// Control tokens at the end of the vocabulary.
const CONTROL: [&str; 3] = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"];
/// A chat format like that of microsoft/bitnet-b1.58-2B-4T.
const TEMPLATE: &str = "{% for message in messages %}{{ message['role'] | capitalize + ': ' + \
                        message['content'] | trim + '<|eot_id|>' }}{% endfor %}\
                        {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// Returns tokenizer, special ids and chat template for `size` tokens: all bytes, then groups of
/// two, three and four small letters with and without a space before, then control tokens.
pub(super) fn text(size: usize) -> Result<TextParts, ModelError> {
    let merged = size.checked_sub(256 + CONTROL.len());
    let pairs: Vec<(String, String)> = merges().take(merged.unwrap_or(0)).collect();
    if merged != Some(pairs.len()) {
        return Err(ModelError::Unwritable {
            what: format!("a vocabulary of {size}"),
            problem: format!("it needs 256 bytes and {} control tokens at least", CONTROL.len()),
        });
    }
    let mut tokens: Vec<String> = (0..=255).map(|byte| byte_char(byte).to_string()).collect();
    tokens.extend(pairs.iter().map(|(left, right)| format!("{left}{right}")));
    let mut token_types = vec![TokenType::Normal; tokens.len()];
    tokens.extend(CONTROL.map(str::to_owned));
    token_types.resize(tokens.len(), TokenType::Control);
    let id = |back: usize| u32::try_from(size - back).unwrap_or(u32::MAX);
    Ok(TextParts {
        tokenizer: TokenizerSource::Vocabulary(Vocabulary {
            model: "gpt2".to_owned(),
            pre: "llama-bpe".to_owned(),
            tokens,
            token_types,
            merges: pairs.iter().map(|(left, right)| format!("{left} {right}")).collect(),
            scores: Vec::new(),
            add_space_prefix: None,
        }),
        special: SpecialTokens { bos: Some(id(3)), eos: vec![id(2), id(1)], add_bos: true },
        chat_template: Some(TEMPLATE.to_owned()),
    })
}

/// Returns pairs to merge, best first; their results are all different.
fn merges() -> impl Iterator<Item = (String, String)> {
    let space = byte_char(b' ').to_string();
    let spaced = space.clone();
    let two = words(1).flat_map(extended);
    let after_space = words(1).map(move |letter| (spaced.clone(), letter));
    let three = words(2).flat_map(extended);
    let two_after_space = words(2).map(move |word| (space.clone(), word));
    let four = words(3).flat_map(extended);
    two.chain(after_space).chain(three).chain(two_after_space).chain(four)
}

/// Returns all words of `length` small letters.
fn words(length: u32) -> impl Iterator<Item = String> {
    (0..26_u32.pow(length)).map(move |number| {
        let digit = |place| number / 26_u32.pow(place) % 26;
        (0..length)
            .rev()
            .filter_map(|place| char::from_u32(u32::from(b'a') + digit(place)))
            .collect()
    })
}

/// Returns a word with each letter after it.
fn extended(word: String) -> impl Iterator<Item = (String, String)> {
    ('a'..='z').map(move |letter| (word.clone(), letter.to_string()))
}

/// Returns the character that stands for a byte in byte-level vocabularies: itself if it prints,
/// else one from U+0100 on, as GPT-2 numbered them.
fn byte_char(byte: u8) -> char {
    let prints = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if prints(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|byte| !prints(*byte)).count();
    u32::try_from(before).ok().and_then(|n| char::from_u32(0x100 + n)).unwrap_or('\u{100}')
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tercet_text::Tokenizer;

    use super::*;

    #[test]
    fn any_text_round_trips() {
        for size in [259, 1000, 50_304, 151_936] {
            let parts = text(size).unwrap();
            let TokenizerSource::Vocabulary(vocabulary) = &parts.tokenizer else { unreachable!() };
            assert_eq!(vocabulary.tokens.len(), size);
            assert_eq!(vocabulary.tokens.iter().collect::<HashSet<_>>().len(), size);
            let tokenizer = Tokenizer::new(&parts.tokenizer, parts.special.clone()).unwrap();
            let said = "Hello, wörld!\n\u{0}\u{1f600} the end";
            let ids = tokenizer.encode_prompt(said).unwrap();
            assert_eq!(ids.first(), parts.special.bos.as_ref());
            let bytes: Vec<u8> =
                ids.iter().flat_map(|id| tokenizer.token_bytes(*id).to_vec()).collect();
            assert_eq!(String::from_utf8(bytes).unwrap(), said);
        }
        assert!(text(258).is_err());
        assert!(text(10_000_000).is_err());
    }
}
