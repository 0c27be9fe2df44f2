//! Products with ternary weights whose blocks have scales of their own.
//!
//! A tile is 16 rows of weights times `T` rows of activations. The sums of one block over the rows
//! become the virtual lanes, so that a single fused multiply-add brings the block to all results, in
//! the order of the blocks. No sum wraps: a block is half of a packed one.

use std::ops::Range;

use super::super::{Lanes, Product, Products, prefetch_piece};
use crate::{
    ColumnsMut, Int8Rows, LANES, SCALE_BLOCK, TERNARY_BLOCK, TernaryMatrix,
    pack::{BLOCK_BYTES, row_bytes},
};

const _: () = assert!(2 * SCALE_BLOCK == TERNARY_BLOCK);

/// The product with a matrix whose blocks have scales.
pub(crate) struct TernaryMatmulBlocks<'a> {
    pub(crate) w: &'a TernaryMatrix,
    pub(crate) scales: &'a [f32],
    pub(crate) x: &'a Int8Rows,
    pub(crate) n: usize,
    pub(crate) out: ColumnsMut<'a>,
}

/// What is known of a block of activations besides its values.
#[derive(Clone, Copy, Default)]
struct Facts {
    scale: f32,
    sum: i32,
}

/// Some rows of weights.
#[derive(Clone, Copy)]
struct Panel<'a> {
    weights: [&'a [[u8; BLOCK_BYTES]]; LANES],
    /// The scales of all rows, block after block.
    scales: &'a [[f32; LANES]],
}

impl Product for TernaryMatmulBlocks<'_> {
    #[inline(always)]
    fn run<P: Products>(self, p: P) {
        let Self { w, scales, x, n, mut out } = self;
        let blocks = w.cols().div_ceil(SCALE_BLOCK);
        let bytes = row_bytes(w.cols());
        let facts = facts(x, n, blocks);
        let mut turned = vec![[0.0; LANES]; blocks];
        let columns = out.columns();
        let mut row = columns.start;
        while row < columns.end {
            let live = LANES.min(columns.end - row);
            turn(&scales[row * blocks..][..live * blocks], &mut turned);
            let mut weights: [&[[u8; BLOCK_BYTES]]; LANES] = [&[]; LANES];
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
                    1..=3 => tokens::<P, 1>(p, panel, x, facts, t, at.clone(), &mut out),
                    _ => tokens::<P, 4>(p, panel, x, facts, t, at.clone(), &mut out),
                };
            }
            row += live;
        }
    }
}

/// Returns the facts of the blocks of the first `n` rows.
#[inline(always)]
fn facts(x: &Int8Rows, n: usize, blocks: usize) -> Vec<Facts> {
    let mut facts = vec![Facts::default(); n * blocks];
    for (t, facts) in facts.chunks_exact_mut(blocks).enumerate() {
        let whole = x.facts(t).scale;
        let scales = x.block_scales(t);
        let values = x.row(t).as_chunks::<SCALE_BLOCK>().0;
        for (block, (facts, values)) in facts.iter_mut().zip(values).enumerate() {
            let mut sum = 0;
            for value in values {
                sum += i32::from(value.cast_signed());
            }
            *facts = Facts { scale: scales.map_or(whole, |scales| scales[block]), sum };
        }
    }
    facts
}

/// Brings the scales of up to 16 rows into the order of the blocks.
fn turn(scales: &[f32], turned: &mut [[f32; LANES]]) {
    for (r, scales) in scales.chunks_exact(turned.len()).enumerate() {
        for (turned, scale) in turned.iter_mut().zip(scales) {
            turned[r] = *scale;
        }
    }
}

/// Multiplies the panel with `T` rows of activations from `first`, whose facts are the first given;
/// writes the results to columns `at` of these rows, and returns `T`.
#[inline(always)]
fn tokens<P: Products, const T: usize>(
    p: P,
    panel: Panel<'_>,
    x: &Int8Rows,
    facts: &[Facts],
    first: usize,
    at: Range<usize>,
    out: &mut ColumnsMut<'_>,
) -> usize {
    let blocks = panel.scales.len();
    let mut activations: [&[[u8; TERNARY_BLOCK]]; T] = [&[]; T];
    let mut known: [&[Facts]; T] = [&[]; T];
    for t in 0..T {
        activations[t] = x.row(first + t).as_chunks().0;
        known[t] = &facts[t * blocks..][..blocks];
    }
    let results = tile(p, panel, activations, known);
    for (t, results) in results.into_iter().enumerate() {
        let mut row = [0.0; LANES];
        p.lanes().store(&mut row, results);
        out.row_mut(first + t)[at.clone()].copy_from_slice(&row[..at.len()]);
    }
    T
}

#[inline(always)]
fn tile<P: Products, const T: usize>(
    p: P,
    panel: Panel<'_>,
    activations: [&[[u8; TERNARY_BLOCK]]; T],
    facts: [&[Facts]; T],
) -> [<P::Lanes as Lanes>::Floats; T] {
    let v = p.lanes();
    let row = panel.weights[0].as_flattened();
    let mut results = [v.splat(0.0); T];
    for (index, scales) in panel.scales.chunks(2).enumerate() {
        // Two blocks of the tile are a line.
        for pair in 0..LANES / 2 {
            prefetch_piece(v, row, LANES, index * LANES + 2 * pair, BLOCK_BYTES);
        }
        let mut packed = [&[0; BLOCK_BYTES]; LANES];
        for (packed, weights) in packed.iter_mut().zip(panel.weights) {
            *packed = &weights[index];
        }
        let mut x = [&[0; TERNARY_BLOCK]; T];
        let mut known = [Facts::default(); T];
        for t in 0..T {
            x[t] = &activations[t][index];
            known[t] = facts[t][2 * index];
        }
        results = block::<P, false, T>(p, packed, x, known, &scales[0], results);
        if let Some(scales) = scales.get(1) {
            for t in 0..T {
                known[t] = facts[t][2 * index + 1];
            }
            results = block::<P, true, T>(p, packed, x, known, scales, results);
        }
    }
    results
}

/// Adds the products of the first or the second half of a packed block.
#[inline(always)]
fn block<P: Products, const SECOND: bool, const T: usize>(
    p: P,
    packed: [&[u8; BLOCK_BYTES]; LANES],
    x: [&[u8; TERNARY_BLOCK]; T],
    facts: [Facts; T],
    scales: &[f32; LANES],
    results: [<P::Lanes as Lanes>::Floats; T],
) -> [<P::Lanes as Lanes>::Floats; T] {
    let v = p.lanes();
    let mut runs = [[p.empty_run(); LANES]; T];
    for (r, packed) in packed.into_iter().enumerate() {
        let packed = p.load_packed(packed);
        match (P::PARTS, SECOND) {
            (2, false) => part::<P, 0, T>(p, packed, x, r, &mut runs),
            (2, true) => part::<P, 1, T>(p, packed, x, r, &mut runs),
            (4, false) => {
                part::<P, 0, T>(p, packed, x, r, &mut runs);
                part::<P, 1, T>(p, packed, x, r, &mut runs);
            }
            (4, true) => {
                part::<P, 2, T>(p, packed, x, r, &mut runs);
                part::<P, 3, T>(p, packed, x, r, &mut runs);
            }
            (_, false) => {
                part::<P, 0, T>(p, packed, x, r, &mut runs);
                part::<P, 1, T>(p, packed, x, r, &mut runs);
                part::<P, 2, T>(p, packed, x, r, &mut runs);
                part::<P, 3, T>(p, packed, x, r, &mut runs);
            }
            (_, true) => {
                part::<P, 4, T>(p, packed, x, r, &mut runs);
                part::<P, 5, T>(p, packed, x, r, &mut runs);
                part::<P, 6, T>(p, packed, x, r, &mut runs);
                part::<P, 7, T>(p, packed, x, r, &mut runs);
            }
        }
    }
    let scales = v.load(scales);
    let mut results = results;
    for t in 0..T {
        let sums = v.sub_ints(p.totals_of_rows(&runs[t]), v.splat_int(facts[t].sum));
        let scales = v.mul(scales, v.splat(facts[t].scale));
        results[t] = v.fma(v.to_floats(sums), scales, results[t]);
    }
    results
}

/// Adds the products of one part of a packed block of row `r`, if a block has so many.
#[inline(always)]
fn part<P: Products, const PART: usize, const T: usize>(
    p: P,
    packed: P::Packed,
    x: [&[u8; TERNARY_BLOCK]; T],
    r: usize,
    runs: &mut [[P::Run; LANES]; T],
) {
    if PART < P::PARTS {
        let codes = p.codes::<PART>(packed);
        for t in 0..T {
            runs[t][r] = p.dot(runs[t][r], codes, p.activations::<PART>(x[t]));
        }
    }
}
