use proptest::prelude::*;
use tercet_kernels::{AttentionScratch, BLOCK_POSITIONS, Kernels, SEGMENT_POSITIONS};

use crate::support::{Random, assert_bits, scalar, variants};

/// Keys and values of one head, in blocks.
struct Cache {
    head_dim: usize,
    blocks: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Cache {
    fn random(random: &mut Random, head_dim: usize, positions: usize) -> Self {
        let len = BLOCK_POSITIONS * head_dim;
        let blocks = (0..positions.div_ceil(BLOCK_POSITIONS))
            .map(|_| (random.floats(len), random.floats(len)))
            .collect();
        Self { head_dim, blocks }
    }

    fn key(&self, position: usize) -> &[f32] {
        let at = position % BLOCK_POSITIONS * self.head_dim;
        &self.blocks[position / BLOCK_POSITIONS].0[at..at + self.head_dim]
    }

    fn value(&self, position: usize) -> &[f32] {
        let at = position % BLOCK_POSITIONS * self.head_dim;
        &self.blocks[position / BLOCK_POSITIONS].1[at..at + self.head_dim]
    }

    fn attend(
        &self,
        kernels: Kernels,
        scratch: &mut AttentionScratch,
        q: &[f32],
        positions: usize,
    ) -> Vec<f32> {
        let mut out = vec![f32::NAN; q.len()];
        let kv = |block: usize| {
            let (keys, values) = &self.blocks[block];
            (keys.as_slice(), values.as_slice())
        };
        kernels.attend(q, kv, positions, 0.3, scratch, &mut out);
        out
    }
}

fn compare(random: &mut Random, group: usize, head_dim: usize, positions: usize) {
    let cache = Cache::random(random, head_dim, positions);
    let q: Vec<f32> = random.floats(group * head_dim).iter().map(|q| q * 20.0).collect();
    let expected = cache.attend(scalar(), &mut AttentionScratch::default(), &q, positions);
    for kernels in variants() {
        // The second time with a used scratch.
        let mut scratch = AttentionScratch::default();
        for _ in 0..2 {
            let found = cache.attend(kernels, &mut scratch, &q, positions);
            assert_bits(kernels, &found, &expected, (group, head_dim, positions));
        }
    }
}

#[test]
fn attention_equals_on_every_shape() {
    let mut random = Random(7);
    for head_dim in [1, 4, 16, 20, 32, 64, 100, 128] {
        for group in [1, 2, 3, 4, 5, 8] {
            for positions in [1, 2, 3, 4, 5, 8, 63, 64, 65, 130] {
                compare(&mut random, group, head_dim, positions);
            }
        }
    }
    for positions in [511, 512, 513, 575, 576, 577, 1024, 1025, 1700] {
        compare(&mut random, 4, 32, positions);
    }
}

#[test]
fn the_order_is_the_documented_one() {
    // Straight from the pseudo-code, one head, with the public operations only.
    assert_eq!((BLOCK_POSITIONS, SEGMENT_POSITIONS), (64, 512), "part of the numerics version");
    let kernels = scalar();
    let (head_dim, positions) = (16, 1100);
    let mut random = Random(8);
    let cache = Cache::random(&mut random, head_dim, positions);
    let q: Vec<f32> = random.floats(head_dim).iter().map(|q| q * 20.0).collect();
    let exp = |x: f32| {
        let mut x = [x];
        kernels.exp(&mut x);
        x[0]
    };
    let all: Vec<usize> = (0..positions).collect();
    let (mut max, mut sum, mut values) = (f32::NEG_INFINITY, 0.0_f32, vec![0.0_f32; head_dim]);
    for segment in all.chunks(SEGMENT_POSITIONS) {
        let mut part = (f32::NEG_INFINITY, 0.0_f32, vec![0.0_f32; head_dim]);
        for block in segment.chunks(BLOCK_POSITIONS) {
            let scores: Vec<f32> =
                block.iter().map(|&p| kernels.dot(&q, cache.key(p)) * 0.3).collect();
            let m = scores.iter().copied().fold(part.0, f32::max);
            let shrink = exp(part.0 - m);
            part.1 = part.1.mul_add(shrink, kernels.sum_exp(&scores, m));
            for (d, sum) in part.2.iter_mut().enumerate() {
                *sum *= shrink;
                for (&p, score) in block.iter().zip(&scores) {
                    *sum = exp(score - m).mul_add(cache.value(p)[d], *sum);
                }
            }
            part.0 = m;
        }
        let m = max.max(part.0);
        let (a, b) = (exp(max - m), exp(part.0 - m));
        max = m;
        sum = sum.mul_add(a, part.1 * b);
        for (total, part) in values.iter_mut().zip(part.2) {
            *total = total.mul_add(a, part * b);
        }
    }
    let expected: Vec<f32> = values.iter().map(|value| value / sum).collect();
    let found = cache.attend(kernels, &mut AttentionScratch::default(), &q, positions);
    assert_bits(kernels, &found, &expected, positions);
}

#[test]
fn attention_is_near_the_textbook_softmax() {
    let (head_dim, positions) = (64, 700);
    let mut random = Random(9);
    let cache = Cache::random(&mut random, head_dim, positions);
    let q: Vec<f32> = random.floats(head_dim).iter().map(|q| q * 20.0).collect();
    let scores: Vec<f64> = (0..positions)
        .map(|p| {
            let pairs = q.iter().zip(cache.key(p));
            0.3 * pairs.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
        })
        .collect();
    let max = scores.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
    let found = cache.attend(scalar(), &mut AttentionScratch::default(), &q, positions);
    for (d, found) in found.into_iter().enumerate() {
        let exact: f64 = (0..positions)
            .map(|p| (scores[p] - max).exp() / sum * f64::from(cache.value(p)[d]))
            .sum();
        assert!((f64::from(found) - exact).abs() < 1e-5, "{found} for {exact}");
    }
}

#[test]
fn positions_behind_the_last_are_not_read() {
    let (head_dim, positions) = (32, 70);
    let mut random = Random(10);
    let mut cache = Cache::random(&mut random, head_dim, 128);
    let q = random.floats(4 * head_dim);
    for kernels in variants().into_iter().chain([scalar()]) {
        let mut scratch = AttentionScratch::default();
        let expected = cache.attend(kernels, &mut scratch, &q, positions);
        let (keys, values) = &mut cache.blocks[1];
        keys[(positions - 64) * head_dim..].fill(f32::NAN);
        values[(positions - 64) * head_dim..].fill(f32::NAN);
        let found = cache.attend(kernels, &mut scratch, &q, positions);
        assert_bits(kernels, &found, &expected, positions);
    }
}

#[test]
fn a_poisoned_key_poisons_the_result_in_every_variant() {
    let (head_dim, positions) = (32, 100);
    let mut random = Random(11);
    for bad in [f32::NAN, f32::INFINITY] {
        for position in [0, 3, 63, 64, 99] {
            let mut cache = Cache::random(&mut random, head_dim, positions);
            let at = position % BLOCK_POSITIONS * head_dim;
            cache.blocks[position / BLOCK_POSITIONS].0[at] = bad;
            let q = vec![1.0; 2 * head_dim];
            for kernels in variants().into_iter().chain([scalar()]) {
                let found = cache.attend(kernels, &mut AttentionScratch::default(), &q, positions);
                assert!(found.iter().all(|x| x.is_nan()), "{kernels:?} at {position}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn attention_equals_on_random_shapes(
        group in 1_usize..7,
        head_dim in 1_usize..140,
        positions in 1_usize..700,
        seed: u64,
    ) {
        compare(&mut Random(seed), group, head_dim, positions);
    }
}
