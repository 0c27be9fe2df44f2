//! Int8 activations and their products with ternary weights.
//!
//! A tile is `R` rows of weights times `T` rows of activations. A packed block is unpacked by shifts
//! and masks into vectors of codes 0, 1, 2 in the order of the columns, each multiplied with as many
//! activations. An instruction that sums in 16 bits does so for a run of as many blocks as surely
//! fit; then the lanes are widened to 32 bits, where [`MAX_COLS`](crate::pack::MAX_COLS) is the
//! bound.

pub(super) mod blocks;

use super::{Lanes, Operation, Product, Products, Tile, prefetch_piece};
use crate::{
    ColumnsMut, Int8Rows, LANES, TERNARY_BLOCK, TernaryMatrix,
    pack::{BLOCK_BYTES, row_bytes},
    rows::RowFacts,
    scalar::ternary::{LEAST, LEVELS, finish},
};

/// Quantises one row, or one block of a row, as
/// [`Kernels::quantize`](crate::Kernels::quantize) does.
pub(crate) struct Quantize<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) values: &'a mut [u8],
}

impl Operation for Quantize<'_> {
    type Output = Option<RowFacts>;

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) -> Option<RowFacts> {
        let (chunks, tail) = self.x.as_chunks();
        let magnitude = magnitude(v, chunks, tail)?.max(LEAST);
        let factor = LEVELS / magnitude;
        let (value_chunks, value_tail) = self.values.as_chunks_mut();
        let factors = v.splat(factor);
        let mut sums = v.splat_int(0);
        for (x, values) in chunks.iter().zip(value_chunks) {
            // The specification's clamp changes nothing: a product exceeds 127 by two roundings at
            // most.
            let ints = v.to_ints(v.mul(v.load(x), factors));
            sums = v.add_ints(sums, ints);
            v.store_as_bytes(values, ints);
        }
        let mut lanes = [0; LANES];
        v.store_ints(&mut lanes, sums);
        let mut sum: i32 = lanes.iter().sum();
        for (x, value) in tail.iter().zip(value_tail) {
            let rounded = (x * factor).round_ties_even().clamp(-LEVELS, LEVELS);
            #[expect(clippy::cast_possible_truncation, reason = "a whole number up to 127")]
            let quantized = rounded as i8;
            *value = quantized.cast_unsigned();
            sum += i32::from(quantized);
        }
        Some(RowFacts { scale: magnitude / LEVELS, sum })
    }
}

/// Returns the largest magnitude, `None` if a value is not finite.
///
/// Without their sign, floats order as their bits do, infinity and NaN above all others.
#[inline(always)]
fn magnitude<V: Lanes>(v: V, chunks: &[[f32; LANES]], tail: &[f32]) -> Option<f32> {
    let mut largest = v.splat(0.0);
    for x in chunks {
        largest = v.larger_magnitude(largest, v.load(x));
    }
    let mut lanes = [0.0; LANES];
    v.store(&mut lanes, largest);
    let mut bits = 0;
    for x in lanes.iter().chain(tail) {
        bits = x.abs().to_bits().max(bits);
    }
    let magnitude = f32::from_bits(bits);
    magnitude.is_finite().then_some(magnitude)
}

/// The product with a matrix that has one scale.
pub(crate) struct TernaryMatmul<'a> {
    pub(crate) w: &'a TernaryMatrix,
    pub(crate) scale: f32,
    pub(crate) x: &'a Int8Rows,
    pub(crate) n: usize,
    pub(crate) out: ColumnsMut<'a>,
}

impl Product for TernaryMatmul<'_> {
    #[inline(always)]
    fn run<P: Products>(self, p: P) {
        let Self { w, scale, x, n, mut out } = self;
        let rows = Rows { packed: w.packed(), bytes: row_bytes(w.cols()), scale };
        let mut t = 0;
        while t < n {
            let (left, out) = (n - t, &mut out);
            t += match P::TILE {
                Tile::Paired if left >= 8 => tokens::<P, 4, 8>(p, rows, x, t, out),
                Tile::Paired | Tile::Large if left >= 4 => tokens::<P, 4, 4>(p, rows, x, t, out),
                Tile::Small if left >= 4 => tokens::<P, 2, 4>(p, rows, x, t, out),
                Tile::Small if left == 3 => tokens::<P, 2, 3>(p, rows, x, t, out),
                Tile::Paired | Tile::Large if left == 3 => tokens::<P, 4, 3>(p, rows, x, t, out),
                _ if left == 2 => tokens::<P, 4, 2>(p, rows, x, t, out),
                _ => tokens::<P, 4, 1>(p, rows, x, t, out),
            };
        }
    }
}

/// The weights as rows of bytes.
#[derive(Clone, Copy)]
struct Rows<'a> {
    packed: &'a [u8],
    bytes: usize,
    scale: f32,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn row(&self, row: usize) -> &'a [[u8; BLOCK_BYTES]] {
        self.packed[row * self.bytes..][..self.bytes].as_chunks().0
    }
}

/// Multiplies all rows with `T` rows of activations from `first`; returns `T`.
#[inline(always)]
fn tokens<P: Products, const R: usize, const T: usize>(
    p: P,
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
        let sums = tile(p, weights, activations);
        write(sums, rows.scale, x, [first, row - columns.start], out);
        row += R;
    }
    while row < columns.end {
        let sums = tile(p, [rows.row(row)], activations);
        write(sums, rows.scale, x, [first, row - columns.start], out);
        row += 1;
    }
    T
}

/// Writes the sums of a tile whose first token and column are given.
#[inline(always)]
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
#[inline(always)]
fn tile<P: Products, const R: usize, const T: usize>(
    p: P,
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
    let mut sums = [[p.empty_sums(); T]; R];
    let mut start = 0;
    while start < blocks {
        let end = blocks.min(start.saturating_add(P::BLOCKS));
        let mut run = [[p.empty_run(); T]; R];
        for block in start..end {
            // Two blocks of the tile are a line.
            for pair in 0..R.div_ceil(2) {
                prefetch_piece(p.lanes(), row, R, block * R + 2 * pair, BLOCK_BYTES);
            }
            let mut packed = [p.load_packed(&weights[0][block]); R];
            for r in 1..R {
                packed[r] = p.load_packed(&weights[r][block]);
            }
            let mut x = [&[0; TERNARY_BLOCK]; T];
            for t in 0..T {
                x[t] = &activations[t][block];
            }
            part::<P, 0, R, T>(p, packed, x, &mut run);
            part::<P, 1, R, T>(p, packed, x, &mut run);
            part::<P, 2, R, T>(p, packed, x, &mut run);
            part::<P, 3, R, T>(p, packed, x, &mut run);
            part::<P, 4, R, T>(p, packed, x, &mut run);
            part::<P, 5, R, T>(p, packed, x, &mut run);
            part::<P, 6, R, T>(p, packed, x, &mut run);
            part::<P, 7, R, T>(p, packed, x, &mut run);
        }
        for r in 0..R {
            for t in 0..T {
                sums[r][t] = p.add_run(sums[r][t], run[r][t]);
            }
        }
        start = end;
    }
    p.totals(sums)
}

/// Adds the products of one part of a block, if it has so many.
#[inline(always)]
fn part<P: Products, const PART: usize, const R: usize, const T: usize>(
    p: P,
    packed: [P::Packed; R],
    x: [&[u8; TERNARY_BLOCK]; T],
    run: &mut [[P::Run; T]; R],
) {
    if PART >= P::PARTS {
        return;
    }
    let mut codes = [p.codes::<PART>(packed[0]); R];
    for r in 1..R {
        codes[r] = p.codes::<PART>(packed[r]);
    }
    let mut values = [p.activations::<PART>(x[0]); T];
    for t in 1..T {
        values[t] = p.activations::<PART>(x[t]);
    }
    p.multiply(run, codes, values);
}
