//! Int8 activations and their products with ternary weights.
//!
//! A tile is `R` rows of weights times `T` rows of activations. A vector of 32 packed bytes is
//! unpacked by three shifts and four masks into four vectors of codes 0, 1, 2, each multiplied with
//! 32 activations by `vpmaddubsw`, which adds two neighbouring products into 16 bits.
//!
//! # No sum wraps
//!
//! Two bits hold at most 3 (a damaged file; valid codes are at most 2) and activations lie in
//! -127..=127, so one `vpmaddubsw` lane is at most `2 * 3 * 127 = 762` in magnitude, and does not
//! saturate. A block adds four of them to each 16-bit lane. [`RUN`] blocks are at most
//! `10 * 4 * 762 = 30480 < 32768`; then the lanes are widened to 32 bits, where
//! [`MAX_COLS`](crate::pack::MAX_COLS) is the bound.

pub(super) mod blocks;
mod table;

use std::arch::x86_64::{
    __m256i, _mm_add_epi32, _mm_cvtsi128_si32, _mm_shuffle_epi32, _mm256_add_epi16,
    _mm256_add_epi32, _mm256_and_si256, _mm256_castps_si256, _mm256_castsi256_si128,
    _mm256_cvtps_epi32, _mm256_extracti128_si256, _mm256_madd_epi16, _mm256_maddubs_epi16,
    _mm256_max_epi32, _mm256_mul_ps, _mm256_packs_epi16, _mm256_packs_epi32,
    _mm256_permutevar8x32_epi32, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32,
    _mm256_set1_ps, _mm256_setr_epi32, _mm256_setzero_si256, _mm256_srli_epi16,
};

use super::memory::{load, load_bytes, prefetch_piece, store_bytes, store_ints};
use crate::{
    ColumnsMut, Int8Rows, TERNARY_BLOCK, TernaryMatrix, TernaryScratch,
    pack::{BLOCK_BYTES, row_bytes},
    rows::RowFacts,
    scalar::ternary::{LEAST, LEVELS, finish},
    scratch::TOKENS,
};

/// Blocks whose products are summed in 16 bits.
const RUN: usize = 10;

/// Largest code of two bits, and largest activation.
const WORST: [usize; 2] = [3, 127];
const _: () = assert!(RUN * 4 * 2 * WORST[0] * WORST[1] <= i16::MAX as usize);
const _: () = assert!((RUN + 1) * 4 * 2 * WORST[0] * WORST[1] > i16::MAX as usize);

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn quantize(x: &[f32], values: &mut [u8]) -> Option<RowFacts> {
    let magnitude = magnitude(x)?.max(LEAST);
    let factor = LEVELS / magnitude;
    let (chunks, tail) = x.as_chunks::<32>();
    let (value_chunks, value_tail) = values.as_chunks_mut::<32>();
    let factors = _mm256_set1_ps(factor);
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let mut sums = _mm256_setzero_si256();
    for (x, values) in chunks.iter().zip(value_chunks) {
        // The conversion rounds ties to even. The specification's clamp changes nothing: a product
        // exceeds 127 by two roundings at most.
        let mut ints = [_mm256_setzero_si256(); 4];
        for (x, ints) in x.as_chunks().0.iter().zip(&mut ints) {
            *ints = _mm256_cvtps_epi32(_mm256_mul_ps(load(x), factors));
        }
        let [a, b, c, d] = ints;
        let sum = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
        sums = _mm256_add_epi32(sums, sum);
        // Packing works in 128-bit halves, which leaves groups of four out of order.
        let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        store_bytes(values, _mm256_permutevar8x32_epi32(bytes, order));
    }
    let mut sum = sum_lanes(sums);
    for (x, value) in tail.iter().zip(value_tail) {
        #[expect(clippy::cast_possible_truncation, reason = "a whole number of magnitude <= 127")]
        let quantized = (x * factor).round_ties_even().clamp(-LEVELS, LEVELS) as i8;
        *value = quantized.cast_unsigned();
        sum += i32::from(quantized);
    }
    Some(RowFacts { scale: magnitude / LEVELS, sum })
}

/// Returns the largest magnitude, `None` if a value is not finite.
///
/// Without their sign, floats order as their bits do, infinity and NaN above all others.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn magnitude(x: &[f32]) -> Option<f32> {
    const MAGNITUDE: i32 = i32::MAX;
    let (chunks, tail) = x.as_chunks::<32>();
    let mut largest = [_mm256_setzero_si256(); 4];
    for x in chunks {
        for (x, largest) in x.as_chunks().0.iter().zip(&mut largest) {
            let bits = _mm256_and_si256(_mm256_castps_si256(load(x)), _mm256_set1_epi32(MAGNITUDE));
            *largest = _mm256_max_epi32(*largest, bits);
        }
    }
    let [a, b, c, d] = largest;
    let mut lanes = [0; 8];
    store_ints(&mut lanes, _mm256_max_epi32(_mm256_max_epi32(a, b), _mm256_max_epi32(c, d)));
    let bits = tail
        .iter()
        .map(|x| x.abs().to_bits())
        .chain(lanes.map(i32::cast_unsigned))
        .fold(0, u32::max);
    let magnitude = f32::from_bits(bits);
    magnitude.is_finite().then_some(magnitude)
}

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn matmul(
    w: &TernaryMatrix,
    scale: f32,
    x: &Int8Rows,
    n: usize,
    mut out: ColumnsMut<'_>,
    scratch: &mut TernaryScratch,
) {
    let rows = Rows { packed: w.packed(), bytes: row_bytes(w.cols()), scale };
    let mut t = 0;
    let blocks = if n % TOKENS < TABLE_TOKENS { n - n % TOKENS } else { n };
    if blocks > 0 && w.is_checked() && out.columns().len() >= TABLE_ROWS {
        table::multiply(rows, x, [0, blocks], &mut out, scratch);
        t = blocks;
    }
    while t < n {
        t += match n - t {
            1 => tokens::<4, 1>(rows, x, t, &mut out),
            2 => tokens::<4, 2>(rows, x, t, &mut out),
            3 => tokens::<2, 3>(rows, x, t, &mut out),
            _ => tokens::<2, 4>(rows, x, t, &mut out),
        };
    }
}

/// Rows from which on tables pay: they are made anew for each call.
const TABLE_ROWS: usize = 256;

/// Tokens of an incomplete block of [`TOKENS`] from which on tables are faster than products.
const TABLE_TOKENS: usize = 11;

/// The weights as rows of bytes.
#[derive(Clone, Copy)]
struct Rows<'a> {
    packed: &'a [u8],
    bytes: usize,
    scale: f32,
}

impl<'a> Rows<'a> {
    fn row(&self, row: usize) -> &'a [[u8; BLOCK_BYTES]] {
        self.packed[row * self.bytes..][..self.bytes].as_chunks().0
    }
}

/// Multiplies all rows with `T` rows of activations from `first`; returns `T`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn tokens<const R: usize, const T: usize>(
    rows: Rows<'_>,
    x: &Int8Rows,
    first: usize,
    out: &mut ColumnsMut<'_>,
) -> usize {
    let columns = out.columns();
    let mut activations: [&[[u8; TERNARY_BLOCK]]; T] = [&[]; T];
    for (t, activations) in activations.iter_mut().enumerate() {
        *activations = x.row(first + t).as_chunks().0;
    }
    let mut row = columns.start;
    while row + R <= columns.end {
        let mut weights: [&[[u8; BLOCK_BYTES]]; R] = [&[]; R];
        for (r, weights) in weights.iter_mut().enumerate() {
            *weights = rows.row(row + r);
        }
        write(tile(weights, activations), rows.scale, x, [first, row - columns.start], out);
        row += R;
    }
    while row < columns.end {
        let sums = tile([rows.row(row)], activations);
        write(sums, rows.scale, x, [first, row - columns.start], out);
        row += 1;
    }
    T
}

/// Writes the sums of a tile whose first token and column are given.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn write<const R: usize, const T: usize>(
    sums: [[i32; T]; R],
    scale: f32,
    x: &Int8Rows,
    [first, column]: [usize; 2],
    out: &mut ColumnsMut<'_>,
) {
    for t in 0..T {
        let facts = x.facts(first + t);
        let out = &mut out.row_mut(first + t)[column..column + R];
        for (out, sums) in out.iter_mut().zip(&sums) {
            *out = finish(sums[t] - facts.sum, scale, facts.scale);
        }
    }
}

/// Returns the sums of code times activation of a tile.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn tile<const R: usize, const T: usize>(
    weights: [&[[u8; BLOCK_BYTES]]; R],
    activations: [&[[u8; TERNARY_BLOCK]]; T],
) -> [[i32; T]; R] {
    let blocks = weights[0].len();
    let row = weights[0].as_flattened();
    // Equal lengths that the compiler can see.
    let mut weights = weights;
    for weights in &mut weights {
        *weights = &weights[..blocks];
    }
    let mut activations = activations;
    for activations in &mut activations {
        *activations = &activations[..blocks];
    }
    let mut sums = [[_mm256_setzero_si256(); T]; R];
    let mut start = 0;
    while start < blocks {
        let end = blocks.min(start + RUN);
        let mut run = [[_mm256_setzero_si256(); T]; R];
        for block in start..end {
            // Two blocks of the tile are a line.
            for pair in 0..R.div_ceil(2) {
                prefetch_piece::<32>(row, R, block * R + 2 * pair);
            }
            let mut packed = [_mm256_setzero_si256(); R];
            for r in 0..R {
                packed[r] = load_bytes(&weights[r][block]);
            }
            let mut x: [&[[u8; 32]]; T] = [&[]; T];
            for t in 0..T {
                x[t] = activations[t][block].as_chunks().0;
            }
            quarter::<6, R, T>(packed, x, &mut run);
            quarter::<4, R, T>(packed, x, &mut run);
            quarter::<2, R, T>(packed, x, &mut run);
            quarter::<0, R, T>(packed, x, &mut run);
        }
        for (sums, run) in sums.iter_mut().zip(run) {
            for (sum, run) in sums.iter_mut().zip(run) {
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(run, _mm256_set1_epi16(1)));
            }
        }
        start = end;
    }
    let mut totals = [[0; T]; R];
    for (totals, sums) in totals.iter_mut().zip(sums) {
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total = sum_lanes(sum);
        }
    }
    totals
}

/// Adds the products of the codes at bit `SHIFT` of each byte.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn quarter<const SHIFT: i32, const R: usize, const T: usize>(
    packed: [__m256i; R],
    x: [&[[u8; 32]]; T],
    run: &mut [[__m256i; T]; R],
) {
    let at = match SHIFT {
        6 => 0,
        4 => 1,
        2 => 2,
        _ => 3,
    };
    let mut codes = [_mm256_setzero_si256(); R];
    for r in 0..R {
        codes[r] = _mm256_and_si256(_mm256_srli_epi16::<SHIFT>(packed[r]), _mm256_set1_epi8(3));
    }
    for t in 0..T {
        let x = load_bytes(&x[t][at]);
        for r in 0..R {
            run[r][t] = _mm256_add_epi16(run[r][t], _mm256_maddubs_epi16(codes[r], x));
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn sum_lanes(x: __m256i) -> i32 {
    let four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
}
