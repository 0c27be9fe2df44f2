//! Attention: the keys and values of a block are read once for several heads.

use std::arch::x86_64::{
    __m128, _mm_fmadd_ps, _mm_mul_ps, _mm_set1_ps, _mm_setzero_ps, _mm256_fmadd_ps, _mm256_max_ps,
    _mm256_mul_ps, _mm256_set1_ps, _mm256_sub_ps,
};

use super::{
    exp::exp_lanes,
    lanes::{self, Lanes, fold_four, halves, halves_mut},
    memory::{load, load_four, store, store_four},
};
use crate::{
    AttentionScratch, BLOCK_POSITIONS, LANES,
    attention::{Partial, SEGMENT_BLOCKS, Shape},
    scalar::{attention::larger, exp::exp_one},
};

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn attend<'a>(
    q: &[f32],
    kv: impl Fn(usize) -> (&'a [f32], &'a [f32]),
    shape: Shape,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) {
    let AttentionScratch { scores, part, total } = scratch;
    let blocks = shape.positions.div_ceil(BLOCK_POSITIONS);
    for segment in (0..blocks).step_by(SEGMENT_BLOCKS) {
        part.reset(shape.group, shape.head_dim);
        for block in segment..(segment + SEGMENT_BLOCKS).min(blocks) {
            let (keys, values) = kv(block);
            let live = shape.live(block);
            score(q, keys, shape, live, scores);
            for head in 0..shape.group {
                let scores = &mut scores[head * BLOCK_POSITIONS..][..live];
                weigh(scores, &mut part.max[head], &mut part.sum[head], {
                    &mut part.values[head * shape.head_dim..][..shape.head_dim]
                });
            }
            add_values(scores, values, shape, live, &mut part.values);
        }
        for head in 0..shape.group {
            merge(total, part, head, shape.head_dim);
        }
    }
    for head in 0..shape.group {
        let at = head * shape.head_dim..(head + 1) * shape.head_dim;
        let sum = total.sum[head];
        for (out, value) in out[at.clone()].iter_mut().zip(&total.values[at]) {
            *out = value / sum;
        }
    }
}

/// Computes the scores of a block for every head.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn score(q: &[f32], keys: &[f32], shape: Shape, live: usize, scores: &mut [f32]) {
    let Shape { group, head_dim, scale, .. } = shape;
    for head in 0..group {
        let q = &q[head * head_dim..][..head_dim];
        let scores = &mut scores[head * BLOCK_POSITIONS..][..live];
        let keys = &keys[..live * head_dim];
        let (fours, rest) = scores.as_chunks_mut::<4>();
        let (four_keys, rest_keys) = keys.split_at(fours.len() * 4 * head_dim);
        for (scores, keys) in fours.iter_mut().zip(four_keys.chunks_exact(4 * head_dim)) {
            let products = dot_four(q, keys);
            store_four(scores, _mm_mul_ps(products, _mm_set1_ps(scale)));
        }
        for (score, key) in rest.iter_mut().zip(rest_keys.chunks_exact(head_dim)) {
            *score = lanes::dot(q, key) * scale;
        }
    }
}

/// Returns the products of a query with four consecutive keys.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn dot_four(q: &[f32], keys: &[f32]) -> __m128 {
    let (a, rest) = keys.split_at(q.len());
    let (b, rest) = rest.split_at(q.len());
    let (c, d) = rest.split_at(q.len());
    let (q, q_tail) = q.as_chunks::<LANES>();
    let [(a, a_tail), (b, b_tail), (c, c_tail), (d, d_tail)] = [a, b, c, d].map(<[f32]>::as_chunks);
    let mut sums = [Lanes::zero(); 4];
    for ((((q, a), b), c), d) in q.iter().zip(a).zip(b).zip(c).zip(d) {
        let q = halves(q);
        let (low, high) = (load(q.0), load(q.1));
        for (sum, key) in sums.iter_mut().zip([a, b, c, d]) {
            let key = halves(key);
            sum.low = _mm256_fmadd_ps(low, load(key.0), sum.low);
            sum.high = _mm256_fmadd_ps(high, load(key.1), sum.high);
        }
    }
    if !q_tail.is_empty() {
        for (sum, tail) in sums.iter_mut().zip([a_tail, b_tail, c_tail, d_tail]) {
            *sum = sum.add_tail(q_tail, tail);
        }
    }
    fold_four(sums)
}

/// Turns the scores of a block into weights and makes the head's sums ready for its values.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn weigh(scores: &mut [f32], max: &mut f32, sum: &mut f32, values: &mut [f32]) {
    let (chunks, tail) = scores.as_chunks_mut();
    let mut largest = _mm256_set1_ps(*max);
    for scores in &*chunks {
        largest = _mm256_max_ps(largest, load(scores));
    }
    let mut lanes = [0.0; 8];
    store(&mut lanes, largest);
    let new = lanes.into_iter().chain(tail.iter().copied()).fold(*max, larger);
    let shrink = exp_one(*max - new);
    for scores in chunks {
        store(scores, exp_lanes(_mm256_sub_ps(load(scores), _mm256_set1_ps(new))));
    }
    for score in tail {
        *score = exp_one(*score - new);
    }
    *max = new;
    *sum = sum.mul_add(shrink, lanes::sum(scores));
    let (chunks, tail) = values.as_chunks_mut();
    for values in chunks {
        store(values, _mm256_mul_ps(load(values), _mm256_set1_ps(shrink)));
    }
    for value in tail {
        *value *= shrink;
    }
}

/// Adds the values of a block to the sums of every head, position by position.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn add_values(weights: &[f32], values: &[f32], shape: Shape, live: usize, sums: &mut [f32]) {
    let Shape { group, head_dim, .. } = shape;
    let values = &values[..live * head_dim];
    let mut head = 0;
    while head < group {
        let weights = &weights[head * BLOCK_POSITIONS..];
        let sums = &mut sums[head * head_dim..];
        head += match group - head {
            1 => add_values_of::<1>(weights, values, head_dim, sums),
            2 => add_values_of::<2>(weights, values, head_dim, sums),
            3 => add_values_of::<3>(weights, values, head_dim, sums),
            _ => add_values_of::<4>(weights, values, head_dim, sums),
        };
    }
}

/// Does the first `H` heads; returns `H`.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn add_values_of<const H: usize>(
    weights: &[f32],
    values: &[f32],
    head_dim: usize,
    sums: &mut [f32],
) -> usize {
    let mut rows: [&[f32]; H] = [&[]; H];
    let live = values.len() / head_dim;
    for (head, row) in rows.iter_mut().enumerate() {
        *row = &weights[head * BLOCK_POSITIONS..][..live];
    }
    let whole = head_dim / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        let mut open = [Lanes::zero(); H];
        for (head, open) in open.iter_mut().enumerate() {
            let sums = halves(sixteen(&sums[head * head_dim..], at));
            *open = Lanes { low: load(sums.0), high: load(sums.1) };
        }
        for (position, value) in values.chunks_exact(head_dim).enumerate() {
            let value = halves(sixteen(value, at));
            let (low, high) = (load(value.0), load(value.1));
            for (open, row) in open.iter_mut().zip(rows) {
                let weight = _mm256_set1_ps(row[position]);
                open.low = _mm256_fmadd_ps(weight, low, open.low);
                open.high = _mm256_fmadd_ps(weight, high, open.high);
            }
        }
        for (head, open) in open.into_iter().enumerate() {
            let Some(sums) = sums[head * head_dim + at..].first_chunk_mut() else { continue };
            let (low, high) = halves_mut(sums);
            store(low, open.low);
            store(high, open.high);
        }
    }
    let fours = whole + (head_dim - whole) / 4 * 4;
    for at in (whole..fours).step_by(4) {
        let mut open = [_mm_setzero_ps(); H];
        for (head, open) in open.iter_mut().enumerate() {
            *open = load_four(four(&sums[head * head_dim..], at));
        }
        for (position, value) in values.chunks_exact(head_dim).enumerate() {
            let value = load_four(four(value, at));
            for (open, row) in open.iter_mut().zip(rows) {
                *open = _mm_fmadd_ps(_mm_set1_ps(row[position]), value, *open);
            }
        }
        for (head, open) in open.into_iter().enumerate() {
            let Some(sums) = sums[head * head_dim + at..].first_chunk_mut() else { continue };
            store_four(sums, open);
        }
    }
    for (head, row) in rows.into_iter().enumerate() {
        for at in fours..head_dim {
            let sum = &mut sums[head * head_dim + at];
            for (weight, value) in row.iter().zip(values.chunks_exact(head_dim)) {
                *sum = weight.mul_add(value[at], *sum);
            }
        }
    }
    H
}

/// Returns the 16 numbers from `at`.
#[inline]
fn sixteen(x: &[f32], at: usize) -> &[f32; LANES] {
    x[at..].first_chunk().expect("`at` steps by 16 below a multiple of 16")
}

/// Returns the four numbers from `at`.
#[inline]
fn four(x: &[f32], at: usize) -> &[f32; 4] {
    x[at..].first_chunk().expect("`at` steps by 4 below a multiple of 4")
}

/// Adds a finished segment to the total.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn merge(total: &mut Partial, part: &Partial, head: usize, head_dim: usize) {
    let max = larger(total.max[head], part.max[head]);
    let old = exp_one(total.max[head] - max);
    let new = exp_one(part.max[head] - max);
    total.max[head] = max;
    total.sum[head] = total.sum[head].mul_add(old, part.sum[head] * new);
    let at = head * head_dim..(head + 1) * head_dim;
    let (totals, total_tail) = total.values[at.clone()].as_chunks_mut();
    let (parts, part_tail) = part.values[at].as_chunks();
    for (total, part) in totals.iter_mut().zip(parts) {
        let added = _mm256_mul_ps(load(part), _mm256_set1_ps(new));
        store(total, _mm256_fmadd_ps(load(total), _mm256_set1_ps(old), added));
    }
    for (total, part) in total_tail.iter_mut().zip(part_tail) {
        *total = total.mul_add(old, part * new);
    }
}
