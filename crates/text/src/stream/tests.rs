//! The decoder against a pure function of the whole text.

use std::sync::LazyLock;

use proptest::{collection::vec, prelude::*, sample::select};

use super::*;
use crate::{SpecialTokens, TokenType, TokenizerSource, Vocabulary};

/// A vocabulary with every byte, so that any sequence of bytes is a sequence of ids, a few longer
/// tokens and one special token.
static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let mut tokens: Vec<String> = (0..=255).map(|byte: u8| spelling(&[byte])).collect();
    for bytes in [b"abc".as_slice(), b"\xc3\xa9b", b"\xa9a\xf0\x9f", b"\x8e\xad", b"cab\xe2\x82"] {
        tokens.push(spelling(bytes));
    }
    tokens.push("<end>".to_owned());
    let mut token_types = vec![TokenType::Normal; tokens.len()];
    token_types[tokens.len() - 1] = TokenType::Control;
    let vocabulary =
        Vocabulary { model: "gpt2".to_owned(), tokens, token_types, ..Vocabulary::default() };
    let source = TokenizerSource::Vocabulary(vocabulary);
    Arc::new(Tokenizer::new(&source, SpecialTokens::default()).unwrap())
});

/// Spells bytes in the byte-level alphabet, written down here a second time.
fn spelling(bytes: &[u8]) -> String {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let spell = |byte: &u8| {
        if printable(*byte) {
            return char::from(*byte);
        }
        let place = (0..*byte).filter(|byte| !printable(*byte)).count();
        char::from_u32(0x100 + u32::try_from(place).unwrap()).unwrap()
    };
    bytes.iter().map(spell).collect()
}

/// The text of ids, read as a whole.
fn whole(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Cuts a text before the stop string that ends first, the longest of those that do.
fn cut<'a>(text: &'a str, stops: &[String]) -> (&'a str, Option<usize>) {
    for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
        let ends = |(_, stop): &(usize, &String)| !stop.is_empty() && text[..end].ends_with(*stop);
        // The first of equal ones, as listed: `max_by_key` alone would take the last.
        let longest = stops.iter().enumerate().filter(ends).rev().max_by_key(|(_, s)| s.len());
        if let Some((index, stop)) = longest {
            return (&text[..end - stop.len()], Some(index));
        }
    }
    (text, None)
}

/// What may be shown of a text whose continuation is not known.
fn shown<'a>(text: &'a str, stops: &[String]) -> &'a str {
    let (text, stopped) = cut(text, stops);
    if stopped.is_some() {
        return text;
    }
    let may_become_a_stop = |start: &usize| {
        text.is_char_boundary(*start) && stops.iter().any(|stop| stop.starts_with(&text[*start..]))
    };
    &text[..(0..text.len()).find(may_become_a_stop).unwrap_or(text.len())]
}

/// The text of ids without the unfinished character at the end.
fn whole_characters(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
    let unfinished = (1..=3.min(bytes.len())).find(|n| {
        std::str::from_utf8(&bytes[bytes.len() - n..])
            .is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
    });
    String::from_utf8_lossy(&bytes[..bytes.len() - unfinished.unwrap_or(0)]).into_owned()
}

fn stop_strings() -> impl Strategy<Value = Vec<String>> {
    let alphabet = vec!["a", "b", "c", "é", "🎭", "€", "\u{fffd}"];
    vec(vec(select(alphabet), 0..5).prop_map(|parts| parts.concat()), 0..4)
}

fn ids() -> impl Strategy<Value = Vec<u32>> {
    // Mostly the bytes of the stop strings, so that they meet often.
    let likely = select(b"abc\xc3\xa9\xf0\x9f\x8e\xad\xe2\x82\xac".map(u32::from).to_vec());
    vec(prop_oneof![6 => likely, 3 => 256_u32..264, 1 => 0_u32..256], 0..24)
}

/// Checks a decoder against the whole text after every id.
fn check(tokenizer: &Arc<Tokenizer>, ids: &[u32], stops: &[String]) -> Result<(), TestCaseError> {
    let mut decoder = StreamDecoder::new(Arc::clone(tokenizer), stops.to_vec());
    let mut released = String::new();
    for (n, id) in ids.iter().enumerate() {
        let piece = decoder.push(*id);
        released.push_str(&piece.text);
        let so_far = whole_characters(tokenizer, &ids[..=n]);
        prop_assert_eq!(&released, shown(&so_far, stops), "after {} ids", n + 1);
        prop_assert_eq!(piece.stopped, cut(&so_far, stops).1);
    }
    released.push_str(&decoder.finish());
    let whole = whole(tokenizer, ids);
    prop_assert_eq!(&released, cut(&whole, stops).0);
    let complete = |stop: &String| !stop.is_empty() && released.contains(stop.as_str());
    prop_assert!(!stops.iter().any(complete), "a stop string in {:?}", released);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn text_is_a_function_of_the_ids_so_far(ids in ids(), stops in stop_strings()) {
        check(&TOKENIZER, &ids, &stops)?;
    }

    #[test]
    fn text_of_byte_fallback_is_a_function_of_the_ids_so_far(
        ids in fallback_ids(),
        stops in stop_strings(),
    ) {
        check(&FALLBACK, &ids, &stops)?;
    }

    /// However a text is split into tokens, it comes back, as one text and piece by piece.
    #[test]
    fn every_split_of_a_text_gives_the_text(
        text in vec(select("ab\u{e9}\u{1f3ad}\u{20ac} \u{2581}".chars().collect::<Vec<_>>()), 0..16),
        cuts in vec(any::<bool>(), 64),
    ) {
        let text = String::from_iter(text);
        let ids = split(&text, &cuts);
        let mut decoder = StreamDecoder::new(Arc::clone(&FALLBACK), Vec::new());
        let mut pieces: Vec<String> = ids.iter().map(|id| decoder.push(*id).text).collect();
        pieces.push(decoder.finish());
        // The vocabulary's sign for a space is a space.
        let expected = text.replace('\u{2581}', " ");
        prop_assert_eq!(pieces.concat(), &*expected);
        let broken = pieces.iter().any(|piece| piece.contains('\u{fffd}'));
        prop_assert!(!broken, "half a character in {:?}", pieces);
        // As a text of its own it loses the space that its encoding would put before it.
        let own = expected.strip_prefix(' ').unwrap_or(&expected);
        prop_assert_eq!(FALLBACK.decode(&ids, false).unwrap(), own);
    }
}

/// SentencePiece's way: one token for each byte, and a few pieces of text.
static FALLBACK: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let mut tokens: Vec<String> = (0..=255).map(|byte: u8| format!("<0x{byte:02X}>")).collect();
    tokens.extend(PIECES.map(str::to_owned));
    let mut token_types = vec![TokenType::Byte; 256];
    token_types.extend(PIECES.map(|_| TokenType::Normal));
    token_types[256] = TokenType::Control;
    let vocabulary =
        Vocabulary { model: "llama".to_owned(), tokens, token_types, ..Vocabulary::default() };
    let source = TokenizerSource::Vocabulary(vocabulary);
    Arc::new(Tokenizer::new(&source, SpecialTokens::default()).unwrap())
});

/// The tokens after those of bytes; the first is a special one.
const PIECES: [&str; 9] = ["</s>", "\u{2581}", "\u{2581}a", "ab", "a", "b", "é", "🎭", "€b"];

/// Cuts a text into pieces of the vocabulary, or into bytes where it is told to.
fn split(text: &str, bytes: &[bool]) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut rest = text;
    for bytes in bytes.iter().cycle() {
        let spelt = rest.replacen(' ', "\u{2581}", 2);
        let Some(first) = rest.chars().next() else { break };
        let piece = (1..PIECES.len()).find(|at| spelt.starts_with(PIECES[*at])).filter(|_| !bytes);
        let taken = match piece {
            Some(at) => {
                ids.push(256 + u32::try_from(at).unwrap());
                PIECES[at].chars().count()
            }
            None => {
                let sign = if first == '\u{2581}' { ' ' } else { first };
                ids.extend(sign.to_string().bytes().map(u32::from));
                1
            }
        };
        rest = rest.char_indices().nth(taken).map_or("", |(at, _)| &rest[at..]);
    }
    ids
}

fn fallback_ids() -> impl Strategy<Value = Vec<u32>> {
    let likely = select(b"abc\xc3\xa9\xf0\x9f\x8e\xad\xe2\x82\xac".map(u32::from).to_vec());
    vec(prop_oneof![4 => likely, 4 => 256_u32..266, 1 => 0_u32..256], 0..24)
}

fn decode(pieces: &[&[u8]], stops: &[&str]) -> Vec<Piece> {
    let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
    let mut decoder = StreamDecoder::new(Arc::clone(&TOKENIZER), stops);
    let mut out = Vec::new();
    for bytes in pieces {
        // Several single bytes stand for one longer token.
        let mut piece = Piece::default();
        for byte in *bytes {
            let Piece { text, stopped } = decoder.push(u32::from(*byte));
            piece.text.push_str(&text);
            piece.stopped = stopped;
        }
        out.push(piece);
    }
    out.push(Piece { text: decoder.finish(), stopped: None });
    out
}

fn texts(pieces: &[&[u8]], stops: &[&str]) -> Vec<String> {
    decode(pieces, stops).into_iter().map(|piece| piece.text).collect()
}

#[test]
fn characters_come_whole() {
    assert_eq!(texts(&[b"\xf0\x9f", b"\x8e", b"\xad!"], &[]), ["", "", "🎭!", ""]);
    assert_eq!(texts(&[b"\xe2\x82", b"a"], &[]), ["", "\u{fffd}a", ""]);
    assert_eq!(texts(&[b"a\xe2\x82"], &[]), ["a", "\u{fffd}"]);
    assert_eq!(texts(&[b"\xff\xfea"], &[]), ["\u{fffd}\u{fffd}a", ""]);
}

#[test]
fn stop_strings_are_withheld_until_they_cannot_match() {
    assert_eq!(texts(&[b"one\n", b"U", b"s", b"e"], &["\nUser:"]), ["one", "", "", "", "\nUse"]);
    assert_eq!(texts(&[b"one\n", b"Us", b"ing"], &["\nUser:"]), ["one", "", "\nUsing", ""]);
    let stopped = decode(&[b"one\nU", b"ser: two", b"three"], &["zzz", "\nUser:"]);
    assert_eq!(stopped[0], Piece { text: "one".to_owned(), stopped: None });
    assert_eq!(stopped[1], Piece { text: String::new(), stopped: Some(1) });
    assert_eq!(stopped[2], Piece { text: String::new(), stopped: Some(1) });
    assert_eq!(stopped[3].text, "");
}

#[test]
fn the_stop_that_ends_first_wins() {
    // `bc` is complete before `abcd`; of two that end together the longer one counts.
    assert_eq!(texts(&[b"xabcd"], &["abcd", "bc"]), ["xa", ""]);
    assert_eq!(decode(&[b"xabc"], &["bc", "abc"])[0].stopped, Some(1));
    assert_eq!(texts(&[b"xabc"], &["bc", "abc"]), ["x", ""]);
    assert_eq!(texts(&[b"aaab"], &["aab"]), ["a", ""]);
    assert_eq!(texts(&[b"ab"], &[""]), ["ab", ""]);
}
