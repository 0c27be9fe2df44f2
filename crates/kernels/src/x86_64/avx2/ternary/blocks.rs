//! Products with ternary weights whose blocks have scales of their own.
//!
//! A tile is eight rows of weights times `T` rows of activations. The sums of one block over the
//! eight rows become the lanes of one vector, so that a single fused multiply-add brings the block
//! to all eight results, in the order of the blocks.
//!
//! ```text
//! of eight rows, one block each: 16 lanes of 16 bits a row
//!   add neighbours of two rows        a b a b a b a b | a b a b a b a b     four vectors
//!   of two pairs of rows              a b c d a b c d | a b c d a b c d     two vectors
//!   of two fours of rows              a b c d e f g h | a b c d e f g h     one vector
//!   add the halves, widen, convert    a b c d e f g h
//! ```
//!
//! # No sum wraps
//!
//! A whole block of the largest codes and activations is at most `64 * 3 * 127 = 24384`, so that
//! 16 bits hold every sum of the tree.

use std::arch::x86_64::{
    __m256, __m256i, _mm_add_epi16, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256,
    _mm256_castsi256_si128, _mm256_cvtepi16_epi32, _mm256_cvtepi32_ps, _mm256_extracti128_si256,
    _mm256_fmadd_ps, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_mul_ps, _mm256_set1_epi8,
    _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256,
    _mm256_srli_epi16, _mm256_sub_epi32, _mm256_unpackhi_epi16, _mm256_unpackhi_epi32,
    _mm256_unpackhi_epi64, _mm256_unpacklo_epi16, _mm256_unpacklo_epi32, _mm256_unpacklo_epi64,
};

use super::{
    super::memory::{load, load_bytes, prefetch_piece, store},
    WORST, sum_lanes,
};
use crate::{
    ColumnsMut, Int8Rows, SCALE_BLOCK, TERNARY_BLOCK, TernaryMatrix,
    pack::{BLOCK_BYTES, row_bytes},
};

/// Rows of a tile: the lanes of its results.
const ROWS: usize = 8;

const _: () = assert!(SCALE_BLOCK * WORST[0] * WORST[1] <= i16::MAX as usize);
const _: () = assert!(2 * SCALE_BLOCK == TERNARY_BLOCK);

/// What is known of a block of activations besides its values.
#[derive(Clone, Copy, Default)]
struct Facts {
    scale: f32,
    sum: i32,
}

/// Some rows of weights.
#[derive(Clone, Copy)]
struct Panel<'a> {
    weights: [&'a [[u8; BLOCK_BYTES]]; ROWS],
    /// The scales of all rows, block after block.
    scales: &'a [[f32; ROWS]],
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(in super::super) fn matmul(
    w: &TernaryMatrix,
    scales: &[f32],
    x: &Int8Rows,
    n: usize,
    mut out: ColumnsMut<'_>,
) {
    let blocks = w.cols().div_ceil(SCALE_BLOCK);
    let bytes = row_bytes(w.cols());
    let facts = facts(x, n, blocks);
    let mut turned = vec![[0.0; ROWS]; blocks];
    let columns = out.columns();
    let mut row = columns.start;
    while row < columns.end {
        let live = ROWS.min(columns.end - row);
        turn(&scales[row * blocks..][..live * blocks], &mut turned);
        let mut weights: [&[[u8; BLOCK_BYTES]]; ROWS] = [&[]; ROWS];
        for (r, weights) in weights.iter_mut().enumerate() {
            // The last row stands in for those that do not exist; its results are dropped.
            *weights = w.packed()[(row + r.min(live - 1)) * bytes..][..bytes].as_chunks().0;
        }
        let panel = Panel { weights, scales: &turned };
        let at = row - columns.start..row - columns.start + live;
        let mut t = 0;
        while t < n {
            let facts = &facts[t * blocks..];
            t += match n - t {
                1 => tokens::<1>(panel, x, facts, t, at.clone(), &mut out),
                2 => tokens::<2>(panel, x, facts, t, at.clone(), &mut out),
                3 => tokens::<3>(panel, x, facts, t, at.clone(), &mut out),
                _ => tokens::<4>(panel, x, facts, t, at.clone(), &mut out),
            };
        }
        row += live;
    }
}

/// Returns the facts of the blocks of the first `n` rows.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn facts(x: &Int8Rows, n: usize, blocks: usize) -> Vec<Facts> {
    let mut facts = vec![Facts::default(); n * blocks];
    for (t, facts) in facts.chunks_exact_mut(blocks).enumerate() {
        let whole = x.facts(t).scale;
        let scales = x.block_scales(t);
        let values = x.row(t).as_chunks::<SCALE_BLOCK>().0;
        for (block, (facts, values)) in facts.iter_mut().zip(values).enumerate() {
            let mut sums = _mm256_setzero_si256();
            for values in values.as_chunks().0 {
                let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_bytes(values));
                sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
            let scale = scales.map_or(whole, |scales| scales[block]);
            *facts = Facts { scale, sum: sum_lanes(sums) };
        }
    }
    facts
}

/// Brings the scales of up to eight rows into the order of the blocks.
fn turn(scales: &[f32], turned: &mut [[f32; ROWS]]) {
    for (r, scales) in scales.chunks_exact(turned.len()).enumerate() {
        for (turned, scale) in turned.iter_mut().zip(scales) {
            turned[r] = *scale;
        }
    }
}

/// Multiplies the panel with `T` rows of activations from `first`, whose facts are the first given;
/// writes the results to columns `at` of these rows, and returns `T`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn tokens<const T: usize>(
    panel: Panel<'_>,
    x: &Int8Rows,
    facts: &[Facts],
    first: usize,
    at: std::ops::Range<usize>,
    out: &mut ColumnsMut<'_>,
) -> usize {
    let blocks = panel.scales.len();
    let mut activations: [&[[u8; TERNARY_BLOCK]]; T] = [&[]; T];
    let mut known: [&[Facts]; T] = [&[]; T];
    for t in 0..T {
        activations[t] = x.row(first + t).as_chunks().0;
        known[t] = &facts[t * blocks..][..blocks];
    }
    let results = tile(panel, activations, known);
    for (t, results) in results.into_iter().enumerate() {
        let mut row = [0.0; ROWS];
        store(&mut row, results);
        out.row_mut(first + t)[at.clone()].copy_from_slice(&row[..at.len()]);
    }
    T
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn tile<const T: usize>(
    panel: Panel<'_>,
    activations: [&[[u8; TERNARY_BLOCK]]; T],
    facts: [&[Facts]; T],
) -> [__m256; T] {
    let stored = panel.weights[0].len();
    let row = panel.weights[0].as_flattened();
    // Equal lengths that the compiler can see.
    let mut weights = panel.weights;
    for weights in &mut weights {
        *weights = &weights[..stored];
    }
    let mut activations = activations;
    for activations in &mut activations {
        *activations = &activations[..stored];
    }
    let mut results = [_mm256_setzero_ps(); T];
    let scales = panel.scales.chunks(2);
    for (index, scales) in scales.enumerate().take(stored) {
        // Two blocks of the tile are a line.
        for pair in 0..ROWS / 2 {
            prefetch_piece::<BLOCK_BYTES>(row, ROWS, index * ROWS + 2 * pair);
        }
        let mut packed = [&[0; BLOCK_BYTES]; ROWS];
        for r in 0..ROWS {
            packed[r] = &weights[r][index];
        }
        let mut x: [&[[u8; BLOCK_BYTES]]; T] = [&[]; T];
        for t in 0..T {
            x[t] = activations[t][index].as_chunks().0;
        }
        let mut known = [Facts::default(); T];
        for t in 0..T {
            known[t] = facts[t][2 * index];
        }
        block::<6, 4, T>(packed, x, known, &scales[0], &mut results);
        if let Some(scales) = scales.get(1) {
            for t in 0..T {
                x[t] = &x[t][2..];
                known[t] = facts[t][2 * index + 1];
            }
            block::<2, 0, T>(packed, x, known, scales, &mut results);
        }
    }
    results
}

/// Adds the products of a block, whose codes are at bits `FIRST` and `SECOND` of each byte.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn block<const FIRST: i32, const SECOND: i32, const T: usize>(
    packed: [&[u8; BLOCK_BYTES]; ROWS],
    x: [&[[u8; BLOCK_BYTES]]; T],
    facts: [Facts; T],
    scales: &[f32; ROWS],
    results: &mut [__m256; T],
) {
    let mut values = [[_mm256_setzero_si256(); 2]; T];
    for t in 0..T {
        values[t] = [load_bytes(&x[t][0]), load_bytes(&x[t][1])];
    }
    let mut pairs = [[_mm256_setzero_si256(); ROWS / 2]; T];
    for pair in 0..ROWS / 2 {
        let even = codes::<FIRST, SECOND>(packed[2 * pair]);
        let odd = codes::<FIRST, SECOND>(packed[2 * pair + 1]);
        for t in 0..T {
            let [even, odd] = [products(even, values[t]), products(odd, values[t])];
            pairs[t][pair] = _mm256_add_epi16(
                _mm256_unpacklo_epi16(even, odd),
                _mm256_unpackhi_epi16(even, odd),
            );
        }
    }
    let scales = load(scales);
    for t in 0..T {
        let sums = _mm256_sub_epi32(fold(pairs[t]), _mm256_set1_epi32(facts[t].sum));
        let scales = _mm256_mul_ps(scales, _mm256_set1_ps(facts[t].scale));
        results[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scales, results[t]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn codes<const FIRST: i32, const SECOND: i32>(packed: &[u8; BLOCK_BYTES]) -> [__m256i; 2] {
    let (packed, mask) = (load_bytes(packed), _mm256_set1_epi8(3));
    [
        _mm256_and_si256(_mm256_srli_epi16::<FIRST>(packed), mask),
        _mm256_and_si256(_mm256_srli_epi16::<SECOND>(packed), mask),
    ]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn products(codes: [__m256i; 2], x: [__m256i; 2]) -> __m256i {
    _mm256_add_epi16(_mm256_maddubs_epi16(codes[0], x[0]), _mm256_maddubs_epi16(codes[1], x[1]))
}

/// Returns the sums of eight rows, given as neighbouring rows whose lanes alternate.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn fold(pairs: [__m256i; ROWS / 2]) -> __m256i {
    let [ab, cd, ef, gh] = pairs;
    let abcd = _mm256_add_epi16(_mm256_unpacklo_epi32(ab, cd), _mm256_unpackhi_epi32(ab, cd));
    let efgh = _mm256_add_epi16(_mm256_unpacklo_epi32(ef, gh), _mm256_unpackhi_epi32(ef, gh));
    let all =
        _mm256_add_epi16(_mm256_unpacklo_epi64(abcd, efgh), _mm256_unpackhi_epi64(abcd, efgh));
    _mm256_cvtepi16_epi32(_mm_add_epi16(
        _mm256_castsi256_si128(all),
        _mm256_extracti128_si256::<1>(all),
    ))
}
