//! Int8 activations and their products with ternary weights.

use crate::{
    ColumnsMut, Int8Rows, TernaryMatrix,
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

pub(crate) fn matmul(w: &TernaryMatrix, x: &Int8Rows, n: usize, mut out: ColumnsMut<'_>) {
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
            out.row_mut(t)[index] = finish(coded - facts.sum, w.scale(), facts.scale);
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
