//! From logits to a token: greedy, temperature, top-k and top-p, with repeatable draws.
//!
//! The order is fixed (temperature, top_k, top_p, draw), sums have a fixed order, and the random
//! number depends on nothing but the seed and the position of the token, so the same logits give
//! the same token on every machine, in every batch and after every resume.

use std::cmp::Ordering;

use tercet_kernels::Kernels;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy. Finite, not negative.
    pub temperature: f32,
    /// Keeps the k likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the smallest set of likeliest tokens that reaches this probability, in (0, 1].
    pub top_p: f32,
    /// Key of the draws.
    pub seed: u64,
}

impl SamplingParams {
    /// Returns the parameters that always take the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

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
    weights: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Returns the token chosen from `logits` (all finite) for `position`, its absolute position in
    /// the sequence.
    pub(crate) fn sample(
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
        let draw = uniform(params.seed, position as u64);
        if params.top_p < 1.0 {
            self.keep_top_p(params.top_p);
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
            self.candidates.extend(
                self.weights
                    .iter()
                    .enumerate()
                    .map(|(id, &weight)| Candidate { id: token_id(id), weight }),
            );
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_published_vectors() {
        // kat_vectors of Random123: philox4x32, 10 rounds.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    fn draw_many(logits: &[f32], params: SamplingParams, n: usize) -> Vec<u32> {
        let mut sampler = Sampler::default();
        (0..n).map(|i| sampler.sample(Kernels::detect(), logits, &params, i)).collect()
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_logits() {
        assert_eq!(draw_many(&[1.0, 3.0, 3.0, 2.0], SamplingParams::greedy(), 1), [1]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0, 1.0, 2.0, -1.0];
        let params = SamplingParams { temperature: 0.7, top_k: 0, top_p: 1.0, seed: 3 };
        let n = 20_000;
        let draws = draw_many(&logits, params, n);
        let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 0.7).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (id, weight) in weights.iter().enumerate() {
            let seen = draws.iter().filter(|&&draw| draw as usize == id).count() as f64;
            let expected = weight / total * n as f64;
            assert!(
                (seen - expected).abs() < 5.0 * expected.sqrt() + 5.0,
                "{id}: {seen} {expected}"
            );
        }
    }

    #[test]
    fn top_k_keeps_the_lowest_ids_of_a_tie() {
        let params = SamplingParams { temperature: 5.0, top_k: 2, top_p: 1.0, seed: 9 };
        let draws = draw_many(&[1.0, 2.0, 2.0, 2.0], params, 500);
        assert!(draws.iter().all(|&id| id == 1 || id == 2));
        assert!(draws.contains(&1) && draws.contains(&2));
    }

    #[test]
    fn top_p_equals_a_plain_sort_over_a_large_vocabulary() {
        let logits: Vec<f32> =
            (0..5_000_u16).map(|i| f32::from(i % 89) / 8.0 - f32::from(i % 7)).collect();
        for top_p in [0.05, 0.5, 0.95] {
            let params = SamplingParams { temperature: 1.3, top_k: 0, top_p, seed: 1 };
            let mut sampler = Sampler::default();
            sampler.sample(Kernels::detect(), &logits, &params, 0);
            let kept: Vec<u32> = sampler.candidates.iter().map(|c| c.id).collect();

            let mut sorted: Vec<Candidate> = sampler
                .weights
                .iter()
                .enumerate()
                .map(|(id, &weight)| Candidate { id: token_id(id), weight })
                .collect();
            sorted.sort_by(Candidate::likelier);
            let wanted = top_p * lane_sum(sampler.weights.iter().copied());
            let mut reached = 0.0;
            let mut expected: Vec<u32> = sorted
                .iter()
                .take_while(|c| {
                    let open = reached < wanted;
                    reached += c.weight;
                    open
                })
                .map(|c| c.id)
                .collect();
            expected.sort_unstable();
            assert_eq!(kept, expected, "top_p {top_p}");
        }
    }

    #[test]
    fn tiny_top_p_is_greedy() {
        let params = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1e-6, seed: 4 };
        assert!(draw_many(&[0.0, 0.5, 0.4], params, 100).iter().all(|&id| id == 1));
    }
}
