//! What sampling remembers of the tokens before.

use std::collections::BTreeMap;

use super::SamplingParams;

/// The tokens that penalties look at: which there are, and how often in the completion.
///
/// A function of the tokens alone, so that a resumed, preempted or moved sequence is penalised as if
/// nothing had happened.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct History {
    /// Tokens of prompt and completion, and how often the completion has them.
    counts: BTreeMap<u32, u32>,
}

impl History {
    /// Returns the history of these tokens.
    pub(crate) fn new(prompt: &[u32], completion: &[u32]) -> Self {
        let mut history = Self { counts: prompt.iter().map(|id| (*id, 0)).collect() };
        for id in completion {
            history.push(*id);
        }
        history
    }

    /// Adds a token of the completion.
    pub(crate) fn push(&mut self, id: u32) {
        *self.counts.entry(id).or_default() += 1;
    }

    /// Returns the tokens, ascending.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> {
        self.counts.keys().copied()
    }

    /// Applies the penalties to `logits`, which stay finite: first the repetition penalty, then, of
    /// tokens that the completion has, count times frequency penalty plus presence penalty.
    pub(super) fn penalize(&self, logits: &mut [f32], params: &SamplingParams) {
        for (&id, &count) in &self.counts {
            penalize(&mut logits[id as usize], count, params);
        }
    }

    /// Applies the penalties to the logit of one token.
    pub(super) fn penalize_one(&self, id: u32, logit: &mut f32, params: &SamplingParams) {
        if let Some(count) = self.counts.get(&id) {
            penalize(logit, *count, params);
        }
    }
}

fn penalize(logit: &mut f32, count: u32, params: &SamplingParams) {
    let repetition = params.repetition_penalty;
    let mut penalized = if *logit < 0.0 { *logit * repetition } else { *logit / repetition };
    if count > 0 {
        #[expect(clippy::cast_precision_loss, reason = "the same loss everywhere")]
        let count = count as f32;
        penalized -= count * params.frequency_penalty + params.presence_penalty;
    }
    *logit = penalized.clamp(f32::MIN, f32::MAX);
}
