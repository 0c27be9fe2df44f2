//! What a completion is: a pure function of the request and the ids sampled.

use tercet_proto::v1::FinishReason;
use tercet_text::StreamDecoder;

/// When a completion ends, besides stop strings.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    /// Most completion tokens.
    pub(crate) max_tokens: usize,
    /// Tokens that end it.
    pub(crate) stop_ids: Vec<u32>,
    /// Further tokens that end it, by the wish of the caller.
    pub(crate) stop_tokens: Vec<u32>,
    /// Most tokens of prompt and completion.
    pub(crate) context: usize,
}

/// A completion in the making: counts, text, end.
///
/// The text that the id which ends the completion releases includes everything withheld before. So
/// what has been released after `n` ids depends on these ids alone, also at the end, and a resume
/// after any number of ids repeats nothing and leaves nothing out.
#[derive(Clone, Debug)]
pub(crate) struct Completion {
    decoder: StreamDecoder,
    limits: Limits,
    prompt_tokens: usize,
    tokens: usize,
    ended: Option<FinishReason>,
    matched: Option<Matched>,
}

/// What ended a completion.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Matched {
    /// The stop string at this place of the list.
    String(usize),
    /// This token.
    Token(u32),
}

impl Completion {
    /// Returns the completion of a prompt that fits the context, before its first token.
    pub(crate) fn new(decoder: StreamDecoder, prompt_tokens: usize, limits: Limits) -> Self {
        let ended = (prompt_tokens >= limits.context).then_some(FinishReason::Context);
        Self { decoder, limits, prompt_tokens, tokens: 0, ended, matched: None }
    }

    /// Takes the next token and returns the text it releases.
    pub(crate) fn push(&mut self, id: u32) -> String {
        let piece = self.decoder.push(id);
        self.tokens += 1;
        let mut text = piece.text;
        self.ended = if let Some(nth) = piece.stopped {
            self.matched = Some(Matched::String(nth));
            Some(FinishReason::StopString)
        } else if self.limits.stop_ids.contains(&id) {
            self.matched = Some(Matched::Token(id));
            Some(FinishReason::Eos)
        } else if self.limits.stop_tokens.contains(&id) {
            self.matched = Some(Matched::Token(id));
            Some(FinishReason::StopToken)
        } else if self.tokens >= self.limits.max_tokens {
            Some(FinishReason::MaxTokens)
        } else if self.prompt_tokens + self.tokens >= self.limits.context {
            Some(FinishReason::Context)
        } else {
            None
        };
        if self.ended.is_some() {
            text.push_str(&self.decoder.finish());
        }
        text
    }

    /// Takes tokens that an earlier stream has told. The error is the index of one that ended the
    /// completion although more follow.
    pub(crate) fn replay(&mut self, ids: &[u32]) -> Result<(), usize> {
        for (index, id) in ids.iter().enumerate() {
            if self.ended.is_some() {
                return Err(index.saturating_sub(1));
            }
            self.push(*id);
        }
        Ok(())
    }

    /// Returns how the completion ended, once it has.
    pub(crate) fn ended(&self) -> Option<FinishReason> {
        self.ended
    }

    /// Returns what ended the completion, where its reason alone does not say.
    pub(crate) fn matched(&self) -> Option<Matched> {
        self.matched
    }

    /// Returns the number of tokens so far.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Returns the number of tokens of the prompt.
    pub(crate) fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, LazyLock};

    use proptest::prelude::*;
    use tercet_text::{SpecialTokens, TokenType, Tokenizer, TokenizerSource, Vocabulary};

    use super::*;

    const EOS: u32 = 7;

    /// A vocabulary whose stop strings and characters straddle tokens: `é` is two bytes of the
    /// byte-level alphabet.
    static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
        let tokens = ["a", "b", "ab", "Ã", "©", "c", "ba", "<end>"];
        let mut token_types = vec![TokenType::Normal; tokens.len()];
        token_types[EOS as usize] = TokenType::Control;
        let vocabulary = Vocabulary {
            model: "gpt2".to_owned(),
            pre: "llama-bpe".to_owned(),
            tokens: tokens.map(str::to_owned).to_vec(),
            token_types,
            merges: vec!["a b".to_owned(), "b a".to_owned()],
            scores: Vec::new(),
            add_space_prefix: None,
        };
        let special = SpecialTokens { bos: None, eos: vec![EOS], add_bos: false };
        Arc::new(Tokenizer::new(&TokenizerSource::Vocabulary(vocabulary), special).unwrap())
    });

    fn completion(stops: &[&str], limits: Limits) -> Completion {
        let stops = stops.iter().map(|&stop| stop.to_owned()).collect();
        Completion::new(StreamDecoder::new(Arc::clone(&TOKENIZER), stops), 3, limits)
    }

    fn limits() -> Limits {
        Limits { max_tokens: 100, stop_ids: vec![EOS], stop_tokens: vec![5], context: 1000 }
    }

    #[test]
    fn each_end_has_its_reason() {
        let mut stopped = completion(&["ba"], limits());
        assert_eq!((stopped.push(2), stopped.ended()), ("a".to_owned(), None));
        assert_eq!(
            (stopped.push(0).as_str(), stopped.ended()),
            ("", Some(FinishReason::StopString))
        );
        assert_eq!(stopped.matched(), Some(Matched::String(0)));

        let mut token = completion(&["cb"], limits());
        assert_eq!((token.push(5).as_str(), token.ended()), ("c", Some(FinishReason::StopToken)));
        assert_eq!(token.matched(), Some(Matched::Token(5)));

        let mut eos = completion(&["bax"], limits());
        assert_eq!(eos.push(6), "");
        assert_eq!(eos.push(EOS), "ba", "the end releases what was withheld");
        assert_eq!(eos.ended(), Some(FinishReason::Eos));
        assert_eq!(eos.matched(), Some(Matched::Token(EOS)));

        let mut ignored = completion(&[], Limits { stop_ids: Vec::new(), ..limits() });
        ignored.push(EOS);
        assert_eq!(ignored.ended(), None);

        let mut counted = completion(&[], Limits { max_tokens: 2, ..limits() });
        assert_eq!((counted.push(0), counted.ended()), ("a".to_owned(), None));
        assert_eq!(counted.push(3), "\u{fffd}", "half a character at the end");
        assert_eq!(counted.ended(), Some(FinishReason::MaxTokens));

        let mut full = completion(&[], Limits { context: 4, ..limits() });
        full.push(0);
        assert_eq!(full.ended(), Some(FinishReason::Context));
        let no_room = completion(&[], Limits { context: 3, ..limits() });
        assert_eq!(no_room.ended(), Some(FinishReason::Context));
    }

    #[test]
    fn ids_after_the_end_are_no_resume() {
        let mut resumed = completion(&[], limits());
        assert_eq!(resumed.replay(&[0, EOS, 0, 1]), Err(1));
        let mut resumed = completion(&["ab"], limits());
        assert_eq!(resumed.replay(&[0, 1, 1]), Err(1));
        let mut resumed = completion(&[], limits());
        assert_eq!(resumed.replay(&[0, 1, EOS]), Ok(()));
        assert_eq!(resumed.ended(), Some(FinishReason::Eos));
    }

    proptest! {
        #[test]
        fn a_resume_at_any_index_goes_on_as_if_undisturbed(
            ids in prop::collection::vec(0..8_u32, 1..24),
            stops in prop::collection::vec("[abcé]{1,3}", 0..3),
            max_tokens in 1..24_usize,
            ignore_eos: bool,
            stop_tokens in prop::collection::vec(0..7_u32, 0..2),
        ) {
            let limits = Limits {
                max_tokens,
                stop_ids: if ignore_eos { Vec::new() } else { vec![EOS] },
                stop_tokens,
                context: 20,
            };
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut whole = completion(&stops, limits.clone());
            let mut texts = Vec::new();
            for id in &ids {
                if whole.ended().is_some() {
                    break;
                }
                texts.push(whole.push(*id));
            }
            for cut in 0..=texts.len() {
                let mut resumed = completion(&stops, limits.clone());
                prop_assert_eq!(resumed.replay(&ids[..cut]), Ok(()));
                for (id, text) in ids.iter().zip(&texts).skip(cut) {
                    prop_assert_eq!(resumed.ended(), None);
                    prop_assert_eq!(&resumed.push(*id), text);
                }
                prop_assert_eq!(resumed.ended(), whole.ended());
                prop_assert_eq!(resumed.tokens(), whole.tokens());
                prop_assert_eq!(resumed.matched(), whole.matched());
            }
        }
    }
}
