//! Int8 activations and their products with ternary weights.

use crate::{
    ColumnsMut, Int8Rows, SCALE_BLOCK, TernaryMatrix,
    pack::{code, row_bytes},
    rows::RowFacts,
};

/// Largest quantised magnitude.
pub(crate) const LEVELS: f32 = 127.0;

/// Least magnitude that is quantised to full range.
pub(crate) const LEAST: f32 = 1e-5;

/// Returns the scale and the sum of the quantised row, `None` if a value is not finite.
pub(crate) fn quantize(x: &[f32], values: &mut [u8]) -> Option<RowFacts> {
    let mut magnitude = 0.0_f32;
    for x in x {
        if !x.is_finite() {
            return None;
        }
        magnitude = magnitude.max(x.abs());
    }
    let magnitude = magnitude.max(LEAST);
    let factor = LEVELS / magnitude;
    let mut sum = 0;
    for (x, value) in x.iter().zip(values) {
        let rounded = (x * factor).round_ties_even().clamp(-LEVELS, LEVELS);
        #[expect(clippy::cast_possible_truncation, reason = "a whole number of magnitude <= 127")]
        let quantized = rounded as i8;
        *value = quantized.cast_unsigned();
        sum += i32::from(quantized);
    }
    Some(RowFacts { scale: magnitude / LEVELS, sum })
}

pub(crate) fn matmul(
    w: &TernaryMatrix,
    scale: f32,
    x: &Int8Rows,
    n: usize,
    mut out: ColumnsMut<'_>,
) {
    let packed = w.packed();
    let bytes = row_bytes(w.cols());
    for (index, row) in out.columns().enumerate() {
        let weights = &packed[row * bytes..][..bytes];
        for t in 0..n {
            let facts = x.facts(t);
            let coded: i32 = x
                .row(t)
                .iter()
                .enumerate()
                .map(|(col, q)| i32::from(code(weights, col)) * i32::from(q.cast_signed()))
                .sum();
            out.row_mut(t)[index] = finish(coded - facts.sum, scale, facts.scale);
        }
    }
}

/// The product with a matrix whose blocks have their own scales, added up by fused multiply-add in
/// the order of the blocks.
pub(crate) fn matmul_blocks(
    w: &TernaryMatrix,
    scales: &[f32],
    x: &Int8Rows,
    n: usize,
    mut out: ColumnsMut<'_>,
) {
    let (packed, cols) = (w.packed(), w.cols());
    let (bytes, blocks) = (row_bytes(cols), cols.div_ceil(SCALE_BLOCK));
    let mut trits = vec![0_i8; cols];
    for (index, row) in out.columns().enumerate() {
        let weights = &packed[row * bytes..][..bytes];
        for (col, trit) in trits.iter_mut().enumerate() {
            *trit = code(weights, col).cast_signed() - 1;
        }
        let scales = &scales[row * blocks..][..blocks];
        for t in 0..n {
            let whole = x.facts(t).scale;
            let mut y = 0.0_f32;
            let pairs = x.row(t)[..cols].chunks(SCALE_BLOCK).zip(trits.chunks(SCALE_BLOCK));
            for (block, (values, trits)) in pairs.enumerate() {
                let products = values.iter().zip(trits);
                let sum: i32 =
                    products.map(|(q, trit)| i32::from(q.cast_signed()) * i32::from(*trit)).sum();
                let scale = x.block_scales(t).map_or(whole, |scales| scales[block]);
                #[expect(clippy::cast_precision_loss, reason = "at most 64 * 2 * 127: exact")]
                let sum = sum as f32;
                y = sum.mul_add(scales[block] * scale, y);
            }
            out.row_mut(t)[index] = y;
        }
    }
}

/// Turns the integer sum into the result; inlined into the other variants, so that the formula is
/// written once.
#[inline(always)]
pub(crate) fn finish(sum: i32, weight_scale: f32, activation_scale: f32) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "the rounding is part of the formula")]
    let sum = sum as f32;
    sum * (weight_scale * activation_scale)
}
