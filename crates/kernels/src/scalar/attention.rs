//! Attention, exactly as the pseudo-code of [`crate::attention`] has it.

use crate::{
    AttentionScratch, BLOCK_POSITIONS,
    attention::{Partial, SEGMENT_BLOCKS, Shape},
    scalar::{exp::exp_one, lanes},
};

pub(crate) fn attend<'a>(
    q: &[f32],
    kv: impl Fn(usize) -> (&'a [f32], &'a [f32]),
    shape: Shape,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let Shape { group, head_dim, positions, .. } = shape;
    let AttentionScratch { scores, part, total } = scratch;
    let blocks = positions.div_ceil(BLOCK_POSITIONS);
    for segment in (0..blocks).step_by(SEGMENT_BLOCKS) {
        part.reset(group, head_dim);
        for block in segment..(segment + SEGMENT_BLOCKS).min(blocks) {
            let (keys, values) = kv(block);
            let live = shape.live(block);
            for head in 0..group {
                let q = &q[head * head_dim..][..head_dim];
                let scores = &mut scores[..live];
                for (score, key) in scores.iter_mut().zip(keys.chunks_exact(head_dim)) {
                    *score = lanes::dot(q, key) * shape.scale;
                }
                add_block(part, head, scores, values);
            }
        }
        for head in 0..group {
            merge(total, part, head, head_dim);
        }
    }
    for head in 0..group {
        let at = head * head_dim..(head + 1) * head_dim;
        for (out, value) in out[at.clone()].iter_mut().zip(&total.values[at]) {
            *out = value / total.sum[head];
        }
    }
}

/// Adds a block's values, weighted by its scores, to the segment.
fn add_block(part: &mut Partial, head: usize, scores: &mut [f32], values: &[f32]) {
    let head_dim = values.len() / BLOCK_POSITIONS;
    let max = scores.iter().fold(part.max[head], |max, &score| larger(max, score));
    let shrink = exp_one(part.max[head] - max);
    for score in &mut *scores {
        *score = exp_one(*score - max);
    }
    part.max[head] = max;
    part.sum[head] = part.sum[head].mul_add(shrink, lanes::sum(scores));
    let sums = &mut part.values[head * head_dim..][..head_dim];
    for sum in &mut *sums {
        *sum *= shrink;
    }
    for (weight, value) in scores.iter().zip(values.chunks_exact(head_dim)) {
        for (sum, value) in sums.iter_mut().zip(value) {
            *sum = weight.mul_add(*value, *sum);
        }
    }
}

/// Adds a finished segment to the total.
fn merge(total: &mut Partial, part: &Partial, head: usize, head_dim: usize) {
    let max = larger(total.max[head], part.max[head]);
    let old = exp_one(total.max[head] - max);
    let new = exp_one(part.max[head] - max);
    total.max[head] = max;
    total.sum[head] = total.sum[head].mul_add(old, part.sum[head] * new);
    let at = head * head_dim..(head + 1) * head_dim;
    for (total, part) in total.values[at.clone()].iter_mut().zip(&part.values[at]) {
        *total = total.mul_add(old, part * new);
    }
}

/// Returns the larger number. A NaN may get lost here: its own weight, computed from the score,
/// still is NaN. Inlined into the other variants.
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}
