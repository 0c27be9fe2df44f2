//! The pre-tokenizers a GGUF file can name in `tokenizer.ggml.pre`.
//!
//! Names and expressions are those of llama.cpp (`src/llama-vocab.cpp`), which wrote the key first.

use tokenizers::{
    PreTokenizerWrapper, SplitDelimiterBehavior,
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::TokenizerError;

/// The names known here.
pub(super) const NAMES: [&str; 22] = [
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "lfm2",
    "smaug-bpe",
    "dbrx",
    "qwen2",
    "qwen35",
    "deepseek-r1-qwen",
    "stablelm2",
    "gpt-2",
    "phi-2",
    "olmo",
    "mpt",
    "falcon",
    "starcoder",
    "smollm",
    "refact",
    "default",
];

/// How a text is cut before merging.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    /// Expressions applied one after the other, each to the pieces the ones before left.
    expressions: &'static [&'static str],
    /// Whether a piece that is a token as a whole is taken before any merging.
    pub(super) ignore_merges: bool,
    /// Whether text is brought into NFC before it is cut.
    pub(super) nfc: bool,
}

impl PreTokenizer {
    /// Returns the pre-tokenizer of a name; an empty name is `default`.
    pub(super) fn named(name: &str) -> Result<Self, TokenizerError> {
        let (expressions, ignore_merges, nfc) = match name {
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "lfm2" => {
                (LLAMA3, true, false)
            }
            "smaug-bpe" | "dbrx" => (LLAMA3, false, false),
            // The models of these two names were trained on text in NFC.
            "qwen2" => (QWEN2, false, true),
            "qwen35" => (QWEN35, false, true),
            "deepseek-r1-qwen" | "stablelm2" => (QWEN2, false, false),
            "gpt-2" | "phi-2" | "olmo" | "mpt" => (GPT2, false, false),
            "falcon" => (FALCON, false, false),
            "starcoder" | "smollm" | "refact" => (STARCODER, false, false),
            "default" | "" => (DEFAULT, false, false),
            _ => return Err(TokenizerError::UnknownPreTokenizer { found: name.to_owned() }),
        };
        Ok(Self { expressions, ignore_merges, nfc })
    }

    /// Returns it in the form `tokenizers` wants.
    pub(super) fn build(&self) -> Result<PreTokenizerWrapper, TokenizerError> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::with_capacity(self.expressions.len() + 1);
        for expression in self.expressions {
            let pattern = SplitPattern::Regex((*expression).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map_err(|error| TokenizerError::Encode { reason: error.to_string() })?;
            steps.push(split.into());
        }
        steps.push(ByteLevel::new(false, true, false).into());
        Ok(Sequence::new(steps).into())
    }
}

const LLAMA3: &[&str] = &[concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)];
const QWEN2: &[&str] = &[concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)];
const QWEN35: &[&str] = &[concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)];
const FALCON: &[&str] = &[
    r"[\p{P}$+<=>^~|`]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"[0-9][0-9][0-9]",
];
const STARCODER: &[&str] =
    &[r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"];
const GPT2: &[&str] =
    &[r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"];
const DEFAULT: &[&str] = &[
    r"[\p{P}$+<=>^~|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;

    fn pieces(name: &str, text: &str) -> Vec<String> {
        let pre = PreTokenizer::named(name).unwrap().build().unwrap();
        let mut cut = PreTokenizedString::from(text);
        pre.pre_tokenize(&mut cut).unwrap();
        cut.get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), _)| text[start..end].to_owned())
            .collect()
    }

    #[test]
    fn every_listed_name_is_known() {
        for name in NAMES {
            assert!(!pieces(name, "a b").is_empty(), "{name}");
        }
        let error = PreTokenizer::named("tekken").unwrap_err().to_string();
        assert_eq!(
            error,
            format!("pre-tokenizer `tekken` is not known: expected one of {}", NAMES.join(", "))
        );
    }

    #[test]
    fn names_differ_where_they_should() {
        let text = "We'LL pay  (12345)\n\nnow";
        let cut = |name| pieces(name, text).join("|");
        assert_eq!(cut("llama-bpe"), "We|'LL| pay| | (|123|45|)\n\n|now");
        assert_eq!(cut("qwen2"), "We|'LL| pay| | (|1|2|3|4|5|)\n\n|now");
        assert_eq!(cut("falcon"), "We|'|LL| pay|  |(|123|45|)|\n|\n|now");
        assert_eq!(cut("starcoder"), "We|'|LL| pay| | (|1|2|3|4|5|)|\n|\n|now");
        assert_eq!(cut("gpt-2"), "We|'|LL| pay| | (|12345|)|\n|\n|now");
        assert_eq!(cut("default"), "We|'|LL| pay|  |(|123|45|)|\n|\n|now");
    }

    /// The expressions give up without a word after a million steps back; the longest stretch that
    /// is let through must stay clear of that.
    #[test]
    fn the_longest_stretch_is_cut_to_its_end() {
        let longest = crate::Tokenizer::MAX_STRETCH;
        for name in ["llama-bpe", "qwen2", "gpt-2", "falcon"] {
            for (unit, then) in [(" ", "x"), ("\n", "x"), ("!", " x"), ("a", " x")] {
                let cut = pieces(name, &(unit.repeat(longest) + then));
                assert_eq!(cut.last().unwrap().trim(), "x", "{name} {unit:?}");
            }
        }
    }
}
