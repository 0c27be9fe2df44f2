//! Tokens and how likely they were, a line for each.

use tercet_proto::v1::{Delta, Prompt, TopLogprob};

/// Writes the prompt: its number of tokens and its text.
pub(super) fn prompt(prompt: &Prompt) -> String {
    format!("prompt {} tokens {}", prompt.token_ids.len(), quoted(prompt.text.as_bytes()))
}

/// Writes new tokens: log-probability, id, what the token stands for, and the likeliest ones.
pub(super) fn tokens(delta: &Delta) -> String {
    let mut lines = String::new();
    for (id, of) in delta.token_ids.iter().zip(&delta.logprobs) {
        let top: String = of.top.iter().map(likeliest).collect();
        let token = quoted(&of.token);
        lines.push_str(&format!("{:9.4} {id:>6} {token}{top}\n", of.logprob));
    }
    lines
}

fn likeliest(top: &TopLogprob) -> String {
    format!("  {} {:.4}", quoted(&top.token), top.logprob)
}

/// Puts the bytes of a text between quotes; those that are no text, such as parts of a character,
/// become `\xNN`.
fn quoted(bytes: &[u8]) -> String {
    let mut text = String::from("\"");
    for chunk in bytes.utf8_chunks() {
        text.extend(chunk.valid().escape_debug());
        text.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
    }
    text.push('"');
    text
}

#[cfg(test)]
mod tests {
    use tercet_proto::v1::TokenLogprob;

    use super::*;

    #[test]
    fn bytes_are_told_apart() {
        assert_eq!(quoted("a\"\n\u{1b} é".as_bytes()), r#""a\"\n\u{1b} é""#);
        assert_eq!(quoted(b"\xe2\x82 x\xff"), r#""\xe2\x82 x\xff""#);
    }

    #[test]
    fn tokens_come_with_their_alternatives() {
        let top = |id, logprob, token: &str| TopLogprob { id, logprob, token: token.into() };
        let of = TokenLogprob {
            logprob: -1.5,
            top: vec![top(5, -0.25, " a"), top(7, -1.5, " b")],
            token: b" b".to_vec(),
        };
        let end = TokenLogprob { logprob: -0.125, ..TokenLogprob::default() };
        let delta = Delta { token_ids: vec![7, 2], logprobs: vec![of, end], ..Delta::default() };
        let expected =
            "  -1.5000      7 \" b\"  \" a\" -0.2500  \" b\" -1.5000\n  -0.1250      2 \"\"\n";
        assert_eq!(tokens(&delta), expected);
    }
}
