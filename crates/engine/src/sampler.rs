//! From logits to a token: penalties, bias, temperature, top-k, top-p and min-p, with repeatable
//! draws.
//!
//! The order is fixed (penalties, bias, temperature, top_k, top_p, min_p, draw), sums have a fixed
//! order, and the random number depends on nothing but the seed and the position of the token, so
//! the same logits after the same tokens give the same token on every machine, in every batch and
//! after every resume. A grammar leaves ids out before anything is chosen.

mod history;
#[cfg(test)]
mod tests;

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

use tercet_kernels::Kernels;
use tercet_text::{Grammar, TokenMask};

pub(crate) use self::history::History;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy. Finite, not negative.
    pub temperature: f32,
    /// Keeps the k likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the smallest set of likeliest tokens that reaches this probability, in (0, 1].
    pub top_p: f32,
    /// Key of the draws.
    pub seed: u64,
    /// Keeps the tokens at least this many times as probable as the likeliest, in [0, 1].
    pub min_p: f32,
    /// Divides positive logits of tokens of prompt and completion, and multiplies negative ones; 1
    /// changes nothing. Finite, positive.
    pub repetition_penalty: f32,
    /// Taken from the logit of a token once for each time the completion has it. Finite.
    pub frequency_penalty: f32,
    /// Taken from the logit of a token that the completion has. Finite.
    pub presence_penalty: f32,
    /// Added to the logits of these ids. Finite.
    pub logit_bias: BTreeMap<u32, f32>,
    /// What the completion has to look like; ids that do not fit are never chosen.
    pub grammar: Option<Arc<Grammar>>,
    /// How many of the likeliest tokens to name beside each chosen one and its log-probability;
    /// `None` asks for no log-probabilities.
    pub top_logprobs: Option<u32>,
}

impl SamplingParams {
    /// Returns the parameters that always take the likeliest token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            grammar: None,
            top_logprobs: None,
        }
    }

    /// Returns whether a sampler can follow these parameters, whatever the logits.
    pub fn are_usable(&self) -> bool {
        self.temperature.is_finite()
            && self.temperature >= 0.0
            && self.top_p > 0.0
            && self.top_p <= 1.0
            && (0.0..=1.0).contains(&self.min_p)
            && self.repetition_penalty.is_finite()
            && self.repetition_penalty > 0.0
            && self.frequency_penalty.is_finite()
            && self.presence_penalty.is_finite()
            && self.logit_bias.values().all(|bias| bias.is_finite())
    }

    /// Returns how many of the largest logits decide a choice, if that is few of `vocab`.
    pub(crate) fn deciding(&self, vocab: usize) -> Option<usize> {
        let top_k = self.top_k as usize;
        if self.top_logprobs.is_some() {
            return None;
        }
        match top_k {
            _ if self.temperature == 0.0 => Some(1),
            1..=MOST_DECIDING if top_k < vocab => Some(top_k),
            _ => None,
        }
    }

    /// Returns whether a choice depends on the tokens of the prompt.
    pub fn looks_at_prompt(&self) -> bool {
        self.penalizes_repetition()
    }

    /// Returns whether a choice depends on the tokens of the completion.
    pub fn looks_at_completion(&self) -> bool {
        self.penalizes_repetition() || self.penalizes_counts() || self.grammar.is_some()
    }

    #[expect(clippy::float_cmp, reason = "exactly 1 changes nothing")]
    fn penalizes_repetition(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    fn penalizes_counts(&self) -> bool {
        self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }
}

/// Most logits that decide a choice without all of them being looked at.
const MOST_DECIDING: usize = 64;

/// A token that may be drawn.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    weight: f32,
}

impl Candidate {
    /// Orders by weight descending, then id ascending.
    fn likelier(a: &Self, b: &Self) -> Ordering {
        b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
    }
}

/// Buffers reused from token to token.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// Logits after penalties and bias.
    adjusted: Vec<f32>,
    weights: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Returns the token chosen from `logits` (all finite) for `position`, its absolute position in
    /// the sequence, after the tokens of `history`.
    pub(crate) fn sample(
        &mut self,
        kernels: Kernels,
        logits: &[f32],
        params: &SamplingParams,
        history: &History,
        mask: Option<&TokenMask>,
        position: usize,
    ) -> u32 {
        if !params.looks_at_completion() && params.logit_bias.is_empty() {
            return self.choose(kernels, logits, params, position);
        }
        let mut adjusted = std::mem::take(&mut self.adjusted);
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        history.penalize(&mut adjusted, params);
        for (&id, bias) in &params.logit_bias {
            shift(&mut adjusted[id as usize], *bias);
        }
        // Last: what is masked stays so whatever is added to it.
        if let Some(mask) = mask {
            mask.apply(&mut adjusted);
        }
        let token = self.choose(kernels, &adjusted, params, position);
        self.adjusted = adjusted;
        token
    }

    /// Returns the token chosen from logits that are what they should be.
    fn choose(
        &mut self,
        kernels: Kernels,
        logits: &[f32],
        params: &SamplingParams,
        position: usize,
    ) -> u32 {
        let best = kernels.argmax(logits);
        if params.temperature == 0.0 {
            return token_id(best);
        }
        self.weigh(kernels, logits, logits[best], params);
        let most = self.weights[best];
        self.draw(params, most, position)
    }

    /// Returns the token chosen from some ids, ascending, and their adjusted logits, among which are
    /// all that [decide](SamplingParams::deciding). The same token as from the logits of all ids.
    pub(crate) fn choose_among(
        &mut self,
        kernels: Kernels,
        rows: &[(u32, f32)],
        params: &SamplingParams,
        position: usize,
    ) -> u32 {
        // Where all are minus infinity, the first.
        let larger = |best: (u32, f32), row: &(u32, f32)| if row.1 > best.1 { *row } else { best };
        let first = rows.first().map_or(0, |row| row.0);
        let (best, max) = rows.iter().fold((first, f32::NEG_INFINITY), larger);
        if params.temperature == 0.0 {
            return best;
        }
        self.candidates.clear();
        self.candidates.extend(rows.iter().map(|&(id, weight)| Candidate { id, weight }));
        let k = params.top_k as usize;
        if k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, Candidate::likelier);
            self.candidates.truncate(k);
        }
        self.weights.clear();
        self.weights.extend(self.candidates.iter().map(|c| (c.weight - max) / params.temperature));
        kernels.exp(&mut self.weights);
        for (candidate, weight) in self.candidates.iter_mut().zip(&self.weights) {
            candidate.weight = *weight;
        }
        // The weight of the likeliest: exp(0).
        self.draw(params, 1.0, position)
    }

    /// Draws among `candidates`, or all `weights` if there are none; the largest weight is `most`.
    fn draw(&mut self, params: &SamplingParams, most: f32, position: usize) -> u32 {
        let draw = uniform(params.seed, position as u64);
        if params.top_p < 1.0 {
            self.keep_top_p(params.top_p);
        }
        if params.min_p > 0.0 {
            self.keep_min_p(params.min_p * most);
        }
        if self.candidates.is_empty() {
            pick(self.weights.iter().enumerate().map(|(id, &weight)| (token_id(id), weight)), draw)
        } else {
            self.candidates.sort_unstable_by_key(|candidate| candidate.id);
            pick(self.candidates.iter().map(|c| (c.id, c.weight)), draw)
        }
    }

    /// Fills `weights` with exp((logit - max) / temperature) of every id and `candidates` with the
    /// `top_k` likeliest; leaves `candidates` empty when all ids stay.
    ///
    /// Weights are not divided by their sum: nothing below needs more than their ratios.
    fn weigh(&mut self, kernels: Kernels, logits: &[f32], max: f32, params: &SamplingParams) {
        self.weights.clear();
        // Differences first: a tiny temperature then gives -inf, never inf - inf.
        self.weights.extend(logits.iter().map(|&logit| (logit - max) / params.temperature));
        kernels.exp(&mut self.weights);
        self.candidates.clear();
        let k = params.top_k as usize;
        if k == 0 || k >= logits.len() {
            return;
        }
        // Ranked by logit: two logits may round to one weight, and the rank must not change then.
        let mut ranked: Vec<Candidate> = logits
            .iter()
            .enumerate()
            .map(|(id, &logit)| Candidate { id: token_id(id), weight: logit })
            .collect();
        ranked.select_nth_unstable_by(k - 1, Candidate::likelier);
        ranked.truncate(k);
        self.candidates.extend(
            ranked.iter().map(|c| Candidate { id: c.id, weight: self.weights[c.id as usize] }),
        );
    }

    /// Keeps the shortest prefix, in order of weight, whose weights reach `top_p` of the total.
    fn keep_top_p(&mut self, top_p: f32) {
        if self.candidates.is_empty() {
            self.candidates.extend(candidates(&self.weights));
        } else {
            self.candidates.sort_unstable_by_key(|candidate| candidate.id);
        }
        let total = lane_sum(self.candidates.iter().map(|candidate| candidate.weight));
        let wanted = top_p * total;
        let mut reached = 0.0_f32;
        let mut sorted = 0;
        // Sorts only as much of the candidates as the prefix needs: most of the mass is in few.
        let mut block = 64;
        while sorted < self.candidates.len() {
            let rest = &mut self.candidates[sorted..];
            let take = block.min(rest.len());
            if take < rest.len() {
                rest.select_nth_unstable_by(take - 1, Candidate::likelier);
            }
            rest[..take].sort_unstable_by(Candidate::likelier);
            for (offset, candidate) in rest[..take].iter().enumerate() {
                reached += candidate.weight;
                if reached >= wanted {
                    self.candidates.truncate(sorted + offset + 1);
                    return;
                }
            }
            sorted += take;
            block *= 4;
        }
    }

    /// Keeps the candidates of at least this weight, which the likeliest has.
    fn keep_min_p(&mut self, least: f32) {
        if self.candidates.is_empty() {
            let kept = candidates(&self.weights).filter(|candidate| candidate.weight >= least);
            self.candidates.extend(kept);
        } else {
            self.candidates.retain(|candidate| candidate.weight >= least);
        }
    }
}

/// Returns the `n` ids of the largest values, largest first, the lower id first on a tie.
pub(crate) fn largest(values: &[f32], n: usize) -> Vec<u32> {
    let n = n.min(values.len());
    if n == 0 {
        return Vec::new();
    }
    let mut ranked: Vec<Candidate> = candidates(values).collect();
    ranked.select_nth_unstable_by(n - 1, Candidate::likelier);
    ranked.truncate(n);
    ranked.sort_unstable_by(Candidate::likelier);
    ranked.into_iter().map(|candidate| candidate.id).collect()
}

/// Returns every id with its weight, in order.
fn candidates(weights: &[f32]) -> impl Iterator<Item = Candidate> {
    weights.iter().enumerate().map(|(id, &weight)| Candidate { id: token_id(id), weight })
}

/// Returns the ids whose logits change before a choice, ascending, whatever a grammar says.
pub(crate) fn changed(params: &SamplingParams, history: &History) -> Vec<u32> {
    let penalized = params.penalizes_repetition() || params.penalizes_counts();
    let mut ids: Vec<u32> = params.logit_bias.keys().copied().collect();
    if penalized {
        ids.extend(history.ids());
        ids.sort_unstable();
        ids.dedup();
    }
    ids
}

/// Returns what becomes of one logit before a choice.
pub(crate) fn adjusted(id: u32, mut logit: f32, params: &SamplingParams, history: &History) -> f32 {
    history.penalize_one(id, &mut logit, params);
    if let Some(bias) = params.logit_bias.get(&id) {
        shift(&mut logit, *bias);
    }
    logit
}

/// Adds to a logit, which stays finite.
fn shift(logit: &mut f32, by: f32) {
    *logit = (*logit + by).clamp(f32::MIN, f32::MAX);
}

/// Sums in 16 lanes, lane i taking elements i, i + 16, ..., folded by halves.
fn lane_sum(values: impl Iterator<Item = f32>) -> f32 {
    let mut lanes = [0.0_f32; 16];
    for (index, value) in values.enumerate() {
        lanes[index % 16] += value;
    }
    let mut width = 8;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Returns the id whose share of the total covers `draw`, walking ids in ascending order.
///
/// The running sum is f64, so that a vocabulary of 2^17 small weights loses nothing that a 24-bit
/// sum would.
fn pick(weights: impl Iterator<Item = (u32, f32)> + Clone, draw: f64) -> u32 {
    let total: f64 = weights.clone().map(|(_, weight)| f64::from(weight)).sum();
    let target = draw * total;
    let mut reached = 0.0;
    let mut last = 0;
    for (id, weight) in weights {
        if weight > 0.0 {
            reached += f64::from(weight);
            last = id;
            if reached > target {
                return id;
            }
        }
    }
    last
}

/// Returns a number in [0, 1) that depends on nothing but its arguments: 53 bits of one block of
/// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
pub(crate) fn uniform(seed: u64, counter: u64) -> f64 {
    let block = philox([low(counter), high(counter), 0, 0], [low(seed), high(seed)]);
    let bits = (u64::from(block[0]) << 32 | u64::from(block[1])) >> 11;
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact in f64")]
    let value = bits as f64 * (1.0 / 9_007_199_254_740_992.0);
    value
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let left = u64::from(counter[0]) * 0xD251_1F53;
        let right = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            high(right) ^ counter[1] ^ key[0],
            low(right),
            high(left) ^ counter[3] ^ key[1],
            low(left),
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is wanted")]
fn low(value: u64) -> u32 {
    value as u32
}

fn high(value: u64) -> u32 {
    low(value >> 32)
}

pub(crate) fn token_id(index: usize) -> u32 {
    u32::try_from(index).expect("the loader bounds the vocabulary by u32")
}
