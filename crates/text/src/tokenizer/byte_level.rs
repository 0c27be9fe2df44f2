//! The byte-level alphabet of GPT-2: every byte is spelt as one printable character.
//!
//! Printable Latin-1 bytes stand for themselves; the other 68 take the characters from U+0100 up,
//! in ascending order.

/// Returns the bytes that a token of a byte-level vocabulary stands for.
///
/// A token with a character outside the alphabet stands for its own UTF-8, as in `tokenizers`.
pub(super) fn decode(token: &str) -> Vec<u8> {
    token.chars().map(byte).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Returns the byte that a character spells.
fn byte(c: char) -> Option<u8> {
    match c {
        '!'..='~' | '\u{a1}'..='\u{ac}' | '\u{ae}'..='\u{ff}' => u8::try_from(c).ok(),
        '\u{100}'..='\u{120}' => u8::try_from(u32::from(c) - 0x100).ok(),
        '\u{121}'..='\u{142}' => u8::try_from(u32::from(c) - 0x121 + 0x7f).ok(),
        '\u{143}' => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_spells_every_byte_once() {
        let mut bytes: Vec<u8> = ('\0'..='\u{200}').filter_map(byte).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        for c in tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet() {
            assert!(byte(c).is_some(), "{c:?} is in the alphabet");
        }
    }

    #[test]
    fn tokens_outside_the_alphabet_stand_for_themselves() {
        assert_eq!(decode("Ġthe"), b" the");
        assert_eq!(decode("Ċ"), b"\n");
        assert_eq!(decode("â"), [0xe2]);
        assert_eq!(decode("two words"), b"two words");
        assert_eq!(decode("日本"), "日本".as_bytes());
    }
}
