//! What a synthetic worker answers.

use tercet_proto::{
    StopSpec,
    v1::{FinishReason, finished::Matched},
};

/// Number of token ids.
pub(super) const VOCABULARY: u32 = 32_000;
/// Ends a completion, about once in [`EOS_ONCE_IN`] tokens.
const EOS: u32 = 2;
const EOS_ONCE_IN: u64 = 1024;
/// Ids below are special and have no text.
const FIRST_PLAIN: u32 = 3;

/// The completion of one request, without end.
#[derive(Clone, Copy, Debug)]
pub struct Formula {
    key: u64,
}

/// When it ends.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    pub(super) stop: StopSpec,
    pub(super) prompt_tokens: u32,
    /// Most tokens of prompt and completion.
    pub(super) context: u32,
}

impl Formula {
    /// Returns the completion of a prompt under a seed.
    pub fn new(prompt: &[u32], seed: u64) -> Self {
        let key = prompt.iter().fold(mix(seed), |key, id| mix(key ^ u64::from(*id)));
        Self { key }
    }

    /// Returns the token at an index.
    pub fn id(&self, index: u32) -> u32 {
        let hash = mix(self.key ^ mix(u64::from(index)));
        if hash.is_multiple_of(EOS_ONCE_IN) {
            return EOS;
        }
        let plain = u64::from(VOCABULARY - FIRST_PLAIN);
        FIRST_PLAIN + u32::try_from((hash >> 16) % plain).expect("below the size of a vocabulary")
    }

    /// Returns the text that the token at an index releases. That of every third token is withheld
    /// until the next one, or the end.
    pub fn text(&self, index: u32, is_last: bool) -> String {
        match index % 3 {
            1 if !is_last => String::new(),
            2 => self.piece(index - 1) + &self.piece(index),
            _ => self.piece(index),
        }
    }

    fn piece(&self, index: u32) -> String {
        match self.id(index) {
            EOS => String::new(),
            id => format!(" w{id}"),
        }
    }
}

impl Limits {
    /// Returns whether and how a completion of `tokens` tokens that ends on `id` has ended.
    pub(super) fn ended(&self, tokens: u32, id: u32) -> Option<(FinishReason, Option<Matched>)> {
        if id == EOS && !self.stop.ignore_eos {
            Some((FinishReason::Eos, Some(Matched::StopToken(id))))
        } else if self.stop.token_ids.contains(&id) {
            Some((FinishReason::StopToken, Some(Matched::StopToken(id))))
        } else if self.stop.max_tokens.is_some_and(|most| tokens >= most) {
            Some((FinishReason::MaxTokens, None))
        } else if self.prompt_tokens.saturating_add(tokens) >= self.context {
            Some((FinishReason::Context, None))
        } else {
            None
        }
    }

    /// Returns the tokens that a completion may still take at most.
    pub(super) fn left(&self, tokens: u32) -> u32 {
        let room = self.context.saturating_sub(self.prompt_tokens);
        self.stop.max_tokens.map_or(room, |most| most.min(room)).saturating_sub(tokens)
    }
}

/// Spreads a number over all bits (the finalizer of `SplitMix64`).
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_changes_the_completion() {
        let ids = |prompt: &[u32], seed| {
            let formula = Formula::new(prompt, seed);
            (0..16).map(|index| formula.id(index)).collect::<Vec<_>>()
        };
        assert_eq!(ids(&[1, 2], 7), ids(&[1, 2], 7));
        assert_ne!(ids(&[1, 2], 7), ids(&[1, 2], 8));
        assert_ne!(ids(&[1, 2], 7), ids(&[2, 1], 7));
        assert!(ids(&[1, 2], 7).iter().all(|id| *id < VOCABULARY));
    }

    #[test]
    fn withheld_text_comes_out_once() {
        let formula = Formula::new(&[1], 1);
        for length in 1..8 {
            let whole: String = (0..length).map(|index| formula.piece(index)).collect();
            let told: String =
                (0..length).map(|index| formula.text(index, index + 1 == length)).collect();
            assert_eq!(told, whole);
        }
    }

    #[test]
    fn each_limit_ends_it() {
        let stop = StopSpec { max_tokens: Some(5), token_ids: vec![9], ..StopSpec::default() };
        let limits = Limits { stop, prompt_tokens: 3, context: 100 };
        assert_eq!(limits.ended(1, 10), None);
        assert_eq!(limits.ended(5, 10), Some((FinishReason::MaxTokens, None)));
        assert_eq!(limits.ended(1, EOS).map(|(reason, _)| reason), Some(FinishReason::Eos));
        assert_eq!(limits.ended(1, 9).map(|(reason, _)| reason), Some(FinishReason::StopToken));
        let short = Limits { context: 4, ..limits };
        assert_eq!(short.ended(1, 10), Some((FinishReason::Context, None)));
        assert_eq!((short.left(0), short.left(1)), (1, 0));
    }
}
