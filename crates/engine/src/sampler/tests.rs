use proptest::prelude::*;

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
        philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
    );
}

fn draw_many(logits: &[f32], params: &SamplingParams, n: usize) -> Vec<u32> {
    let mut sampler = Sampler::default();
    (0..n)
        .map(|i| sampler.sample(Kernels::detect(), logits, params, &History::default(), None, i))
        .collect()
}

#[test]
fn greedy_takes_the_lowest_of_equal_logits() {
    assert_eq!(draw_many(&[1.0, 3.0, 3.0, 2.0], &SamplingParams::greedy(), 1), [1]);
}

#[test]
fn frequencies_follow_the_softmax() {
    let logits = [0.0, 1.0, 2.0, -1.0];
    let params = SamplingParams {
        temperature: 0.7,
        top_k: 0,
        top_p: 1.0,
        seed: 3,
        ..SamplingParams::greedy()
    };
    let n = 20_000;
    let draws = draw_many(&logits, &params, n);
    let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 0.7).exp()).collect();
    let total: f64 = weights.iter().sum();
    for (id, weight) in weights.iter().enumerate() {
        let seen = draws.iter().filter(|&&draw| draw as usize == id).count() as f64;
        let expected = weight / total * n as f64;
        assert!((seen - expected).abs() < 5.0 * expected.sqrt() + 5.0, "{id}: {seen} {expected}");
    }
}

#[test]
fn top_k_keeps_the_lowest_ids_of_a_tie() {
    let params = SamplingParams {
        temperature: 5.0,
        top_k: 2,
        top_p: 1.0,
        seed: 9,
        ..SamplingParams::greedy()
    };
    let draws = draw_many(&[1.0, 2.0, 2.0, 2.0], &params, 500);
    assert!(draws.iter().all(|&id| id == 1 || id == 2));
    assert!(draws.contains(&1) && draws.contains(&2));
}

#[test]
fn top_p_equals_a_plain_sort_over_a_large_vocabulary() {
    let logits: Vec<f32> =
        (0..5_000_u16).map(|i| f32::from(i % 89) / 8.0 - f32::from(i % 7)).collect();
    for top_p in [0.05, 0.5, 0.95] {
        let params = SamplingParams {
            temperature: 1.3,
            top_k: 0,
            top_p,
            seed: 1,
            ..SamplingParams::greedy()
        };
        let mut sampler = Sampler::default();
        sampler.sample(Kernels::detect(), &logits, &params, &History::default(), None, 0);
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
    let params = SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1e-6,
        seed: 4,
        ..SamplingParams::greedy()
    };
    assert!(draw_many(&[0.0, 0.5, 0.4], &params, 100).iter().all(|&id| id == 1));
}

/// Adjusts, filters and weighs as the definition says, in f64 and without any of the shortcuts;
/// returns the ids that can be drawn.
fn kept_by_definition(
    logits: &[f32],
    params: &SamplingParams,
    tokens: (&[u32], &[u32]),
) -> Vec<u32> {
    let (prompt, completion) = tokens;
    let mut rows: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|l| f64::from(*l))).collect();
    for (id, logit) in &mut rows {
        let repetition = f64::from(params.repetition_penalty);
        let count = completion.iter().filter(|token| *token == id).count();
        if count > 0 || prompt.contains(id) {
            *logit = if *logit < 0.0 { *logit * repetition } else { *logit / repetition };
        }
        if count > 0 {
            *logit -= count as f64 * f64::from(params.frequency_penalty);
            *logit -= f64::from(params.presence_penalty);
        }
        *logit += params.logit_bias.get(id).map_or(0.0, |bias| f64::from(*bias));
    }
    rows.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        rows.truncate(params.top_k as usize);
    }
    let max = rows[0].1;
    for (_, logit) in &mut rows {
        *logit = ((*logit - max) / f64::from(params.temperature)).exp();
    }
    // 1 keeps all, also those too small to change a sum.
    if params.top_p < 1.0 {
        let wanted = f64::from(params.top_p) * rows.iter().map(|(_, weight)| weight).sum::<f64>();
        let mut reached = 0.0;
        rows.retain(|(_, weight)| {
            let open = reached < wanted;
            reached += weight;
            open
        });
    }
    rows.retain(|(_, weight)| *weight >= f64::from(params.min_p));
    let mut ids: Vec<u32> = rows.into_iter().map(|(id, _)| id).collect();
    ids.sort_unstable();
    ids
}

proptest! {
    #[test]
    fn what_can_be_drawn_is_what_the_definition_says(
        logits in prop::collection::vec((-80..80_i8).prop_map(|l| f32::from(l) / 8.0), 2..40),
        tokens in prop::collection::vec(0..40_u32, 0..30),
        split in 0..30_usize,
        temperature in 0.3..2.0_f32,
        top_k in 0..12_u32,
        top_p in prop_oneof![Just(1.0_f32), 0.2..0.99_f32],
        min_p in prop_oneof![Just(0.0_f32), 0.0..0.9_f32],
        repetition_penalty in prop_oneof![Just(1.0_f32), 0.5..2.0_f32],
        counts in (-2.0..2.0_f32, -2.0..2.0_f32),
        bias in prop::collection::btree_map(0..40_u32, -9.0..9.0_f32, 0..5),
    ) {
        let vocab = u32::try_from(logits.len()).unwrap();
        let tokens: Vec<u32> = tokens.into_iter().map(|id| id % vocab).collect();
        let (prompt, completion) = tokens.split_at(split.min(tokens.len()));
        let params = SamplingParams {
            temperature, top_k, top_p, min_p, repetition_penalty,
            frequency_penalty: counts.0,
            presence_penalty: counts.1,
            logit_bias: bias.into_iter().map(|(id, bias)| (id % vocab, bias)).collect(),
            seed: 5,
            grammar: None,
            top_logprobs: None,
        };
        let history = History::new(prompt, completion);
        let mut sampler = Sampler::default();
        let drawn = sampler.sample(Kernels::detect(), &logits, &params, &history, None, 7);
        let kept: Vec<u32> = if sampler.candidates.is_empty() {
            (0..vocab).collect()
        } else {
            sampler.candidates.iter().map(|candidate| candidate.id).collect()
        };
        let expected = kept_by_definition(&logits, &params, (prompt, completion));
        // Rounding may move one token over a threshold, no more.
        let differ = kept.iter().filter(|id| !expected.contains(id)).count()
            + expected.iter().filter(|id| !kept.contains(id)).count();
        prop_assert!(differ <= 1, "{kept:?} {expected:?}");
        prop_assert!(kept.contains(&drawn));
        let again = sampler.sample(Kernels::detect(), &logits, &params, &history, None, 7);
        prop_assert_eq!(drawn, again);
    }

    #[test]
    fn a_history_is_the_same_however_it_came_about(
        tokens in prop::collection::vec(0..9_u32, 0..40),
        prompt in 0..40_usize,
        cut in 0..40_usize,
    ) {
        let (prompt, completion) = tokens.split_at(prompt.min(tokens.len()));
        let cut = cut.min(completion.len());
        let mut grown = History::new(prompt, &completion[..cut]);
        completion[cut..].iter().for_each(|id| grown.push(*id));
        prop_assert_eq!(grown, History::new(prompt, completion));
    }
}

#[test]
fn penalties_follow_their_definitions_to_the_bit() {
    let params = SamplingParams {
        repetition_penalty: 1.3,
        frequency_penalty: 0.7,
        presence_penalty: 0.2,
        ..SamplingParams::greedy()
    };
    let mut logits = [2.0_f32, -2.0, 1.5, -1.5, 3.0];
    History::new(&[0, 1, 0], &[2, 3, 2]).penalize(&mut logits, &params);
    assert_eq!(
        logits,
        [2.0 / 1.3, -2.0 * 1.3, 1.5 / 1.3 - (2.0 * 0.7 + 0.2), -1.5 * 1.3 - (1.0 * 0.7 + 0.2), 3.0,]
    );
}

#[test]
fn the_largest_come_in_order_and_lower_ids_first() {
    let values = [1.0, 3.0, -2.0, 3.0, 0.5];
    assert_eq!(largest(&values, 0), [0_u32; 0]);
    assert_eq!(largest(&values, 1), [1]);
    assert_eq!(largest(&values, 4), [1, 3, 0, 4]);
    assert_eq!(largest(&values, 9), [1, 3, 0, 4, 2]);
}

#[test]
fn extreme_settings_keep_logits_finite() {
    let params = SamplingParams {
        temperature: 1.0,
        repetition_penalty: f32::MIN_POSITIVE,
        frequency_penalty: -2.0,
        logit_bias: [(0, 100.0), (2, -100.0)].into(),
        ..SamplingParams::greedy()
    };
    let logits = [f32::MAX, -3.0, f32::MIN, 2.0];
    let history = History::new(&[0, 1, 2], &[3, 0]);
    let mut sampler = Sampler::default();
    for position in 0..50 {
        let token = sampler.sample(Kernels::detect(), &logits, &params, &history, None, position);
        assert!([0, 3].contains(&token), "both are at the largest logit: {token}");
    }
    assert!(sampler.adjusted.iter().all(|logit| logit.is_finite()));
}
