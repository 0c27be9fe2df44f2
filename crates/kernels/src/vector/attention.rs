//! Attention: the keys and values of a block are read once for several heads.

use super::{
    Lanes, Operation,
    exp::exp_lanes,
    reduce::{dot, fold_with_tail, sum},
};
use crate::{
    AttentionScratch, BLOCK_POSITIONS, LANES,
    attention::{Partial, SEGMENT_BLOCKS, Shape},
    scalar::{attention::larger, exp::exp_one},
};

/// [`Kernels::attend`](crate::Kernels::attend).
pub(crate) struct Attend<'a, F> {
    pub(crate) q: &'a [f32],
    pub(crate) kv: F,
    pub(crate) shape: Shape,
    pub(crate) scratch: &'a mut AttentionScratch,
    pub(crate) out: &'a mut [f32],
}

impl<'kv, F: Fn(usize) -> (&'kv [f32], &'kv [f32])> Operation for Attend<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let Self { q, kv, shape, scratch, out } = self;
        let AttentionScratch { scores, part, total } = scratch;
        let blocks = shape.positions.div_ceil(BLOCK_POSITIONS);
        for segment in (0..blocks).step_by(SEGMENT_BLOCKS) {
            part.reset(shape.group, shape.head_dim);
            for block in segment..(segment + SEGMENT_BLOCKS).min(blocks) {
                let (keys, values) = kv(block);
                let live = shape.live(block);
                for head in 0..shape.group {
                    let q = &q[head * shape.head_dim..][..shape.head_dim];
                    let scores = &mut scores[head * BLOCK_POSITIONS..][..live];
                    score(v, q, keys, shape.scale, scores);
                    let values = &mut part.values[head * shape.head_dim..][..shape.head_dim];
                    weigh(v, scores, &mut part.max[head], &mut part.sum[head], values);
                }
                add_values(v, scores, values, shape, live, &mut part.values);
            }
            for head in 0..shape.group {
                merge(v, total, part, head, shape.head_dim);
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
}

/// Computes the scores of a head for the first keys of a block.
#[inline(always)]
fn score<V: Lanes>(v: V, q: &[f32], keys: &[f32], scale: f32, scores: &mut [f32]) {
    let (fours, rest) = scores.as_chunks_mut::<4>();
    let (four_keys, rest_keys) = keys.split_at(fours.len() * 4 * q.len());
    for (scores, keys) in fours.iter_mut().zip(four_keys.chunks_exact(4 * q.len())) {
        let products = dot_four(v, q, keys);
        for (score, product) in scores.iter_mut().zip(products) {
            *score = product * scale;
        }
    }
    for (score, key) in rest.iter_mut().zip(rest_keys.chunks_exact(q.len())) {
        *score = dot(v, q, key) * scale;
    }
}

/// Returns the products of a query with four consecutive keys.
#[inline(always)]
fn dot_four<V: Lanes>(v: V, q: &[f32], keys: &[f32]) -> [f32; 4] {
    let (q, q_tail) = q.as_chunks::<LANES>();
    let mut rows: [&[[f32; LANES]]; 4] = [&[]; 4];
    let mut tails: [&[f32]; 4] = [&[]; 4];
    let len = q.len() * LANES + q_tail.len();
    for ((row, tail), key) in rows.iter_mut().zip(&mut tails).zip(keys.chunks_exact(len)) {
        let (chunks, rest) = key.as_chunks();
        (*row, *tail) = (&chunks[..q.len()], rest);
    }
    let mut sums = [v.splat(0.0); 4];
    for (at, q) in q.iter().enumerate() {
        let q = v.load(q);
        for key in 0..4 {
            sums[key] = v.fma(q, v.load(&rows[key][at]), sums[key]);
        }
    }
    let mut products = [0.0; 4];
    for key in 0..4 {
        products[key] = fold_with_tail(v, sums[key], q_tail, tails[key]);
    }
    products
}

/// Turns the scores of a block into weights and makes the head's sums ready for its values.
#[inline(always)]
fn weigh<V: Lanes>(v: V, scores: &mut [f32], max: &mut f32, total: &mut f32, values: &mut [f32]) {
    let (chunks, tail) = scores.as_chunks_mut();
    let mut largest = v.splat(*max);
    for scores in &*chunks {
        largest = v.larger(largest, v.load(scores));
    }
    let mut lanes = [0.0; LANES];
    v.store(&mut lanes, largest);
    let mut new = *max;
    for &score in lanes.iter().chain(&*tail) {
        new = larger(new, score);
    }
    let shrink = exp_one(*max - new);
    for scores in chunks {
        v.store(scores, exp_lanes(v, v.sub(v.load(scores), v.splat(new))));
    }
    for score in tail {
        *score = exp_one(*score - new);
    }
    *max = new;
    *total = total.mul_add(shrink, sum(v, scores));
    let (chunks, tail) = values.as_chunks_mut();
    for values in chunks {
        v.store(values, v.mul(v.load(values), v.splat(shrink)));
    }
    for value in tail {
        *value *= shrink;
    }
}

/// Adds the values of a block to the sums of every head, position by position.
#[inline(always)]
fn add_values<V: Lanes>(
    v: V,
    weights: &[f32],
    values: &[f32],
    shape: Shape,
    live: usize,
    sums: &mut [f32],
) {
    let Shape { group, head_dim, .. } = shape;
    let values = &values[..live * head_dim];
    let mut head = 0;
    while head < group {
        let weights = &weights[head * BLOCK_POSITIONS..];
        let sums = &mut sums[head * head_dim..];
        head += match group - head {
            1 => add_values_of::<V, 1>(v, weights, values, head_dim, sums),
            2 | 3 => add_values_of::<V, 2>(v, weights, values, head_dim, sums),
            _ => add_values_of::<V, 4>(v, weights, values, head_dim, sums),
        };
    }
}

/// Does the first `H` heads; returns `H`.
#[inline(always)]
fn add_values_of<V: Lanes, const H: usize>(
    v: V,
    weights: &[f32],
    values: &[f32],
    head_dim: usize,
    sums: &mut [f32],
) -> usize {
    let live = values.len() / head_dim;
    let mut rows: [&[f32]; H] = [&[]; H];
    for (head, row) in rows.iter_mut().enumerate() {
        *row = &weights[head * BLOCK_POSITIONS..][..live];
    }
    let whole = head_dim / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        let mut open = [v.splat(0.0); H];
        for head in 0..H {
            open[head] = v.load(sixteen(&sums[head * head_dim + at..]));
        }
        for (position, value) in values.chunks_exact(head_dim).enumerate() {
            let value = v.load(sixteen(&value[at..]));
            for head in 0..H {
                open[head] = v.fma(v.splat(rows[head][position]), value, open[head]);
            }
        }
        for head in 0..H {
            let sums = sums[head * head_dim + at..].first_chunk_mut();
            v.store(sums.expect("`at` steps by 16 below a multiple of 16"), open[head]);
        }
    }
    for head in 0..H {
        for at in whole..head_dim {
            let sum = &mut sums[head * head_dim + at];
            for (weight, value) in rows[head].iter().zip(values.chunks_exact(head_dim)) {
                *sum = weight.mul_add(value[at], *sum);
            }
        }
    }
    H
}

/// Returns the first 16 numbers.
#[inline(always)]
fn sixteen(x: &[f32]) -> &[f32; LANES] {
    x.first_chunk().expect("rows are cut at multiples of 16 below their length")
}

/// Adds a finished segment to the total.
#[inline(always)]
fn merge<V: Lanes>(v: V, total: &mut Partial, part: &Partial, head: usize, head_dim: usize) {
    let max = larger(total.max[head], part.max[head]);
    let old = exp_one(total.max[head] - max);
    let new = exp_one(part.max[head] - max);
    total.max[head] = max;
    total.sum[head] = total.sum[head].mul_add(old, part.sum[head] * new);
    let at = head * head_dim..(head + 1) * head_dim;
    let (totals, total_tail) = total.values[at.clone()].as_chunks_mut();
    let (parts, part_tail) = part.values[at].as_chunks();
    for (total, part) in totals.iter_mut().zip(parts) {
        let added = v.mul(v.load(part), v.splat(new));
        v.store(total, v.fma(v.load(total), v.splat(old), added));
    }
    for (total, part) in total_tail.iter_mut().zip(part_tail) {
        *total = total.mul_add(old, part * new);
    }
}
