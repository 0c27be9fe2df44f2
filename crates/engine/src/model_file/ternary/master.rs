//! Floating-point matrices of BitNet models.

use tercet_kernels::{DenseType, TernaryMatrix};

use super::{Packer, ZERO, finish};
use crate::model_file::error::ModelError;
use crate::model_file::folder::narrow;
use crate::model_file::tensors::{Tensor, read_floats};

/// Smallest scale absmean gives, as in training.
const MIN_ABSMEAN: f64 = 1e-5;

/// Returns the bytes of one row as stored.
pub(super) fn row(tensor: &Tensor, stored: usize) -> &[u8] {
    let length = tensor.bytes().len() / tensor.rows;
    &tensor.bytes()[stored * length..][..length]
}

/// Returns the numbers of one row as stored.
pub(crate) fn floats(
    tensor: &Tensor,
    kind: DenseType,
    stored: usize,
) -> Result<Vec<f32>, ModelError> {
    let values = read_floats(kind, row(tensor, stored));
    values.ok_or_else(|| tensor.error(format!("has type {kind}, expected F32, F16 or BF16")))
}

/// Quantises training weights: `scale = max(mean |w|, 1e-5)`, weight `clamp(round(w / scale))`,
/// ties to even.
///
/// The mean is summed in f64 by 16 lanes, lane `i` taking elements `i`, `i + 16`, ..., folded in
/// the order 8, 4, 2, 1: one fixed order that also runs at memory speed.
pub(crate) fn read(tensor: &Tensor, kind: DenseType) -> Result<TernaryMatrix, ModelError> {
    read_rows(tensor, |row| floats(tensor, kind, tensor.stored_row(row)))
}

/// [`read`] for the rows that `rows` returns.
pub(crate) fn read_rows(
    tensor: &Tensor,
    rows: impl Fn(usize) -> Result<Vec<f32>, ModelError>,
) -> Result<TernaryMatrix, ModelError> {
    let mut lanes = [0.0_f64; 16];
    let mut at = 0;
    for row in 0..tensor.rows {
        let values = rows(row)?;
        // A row may begin in any lane; from lane 0 on, whole groups go through all of them.
        let (begin, rest) = values.split_at(values.len().min((16 - at % 16) % 16));
        for (lane, value) in lanes[at % 16..].iter_mut().zip(begin) {
            *lane += f64::from(*value).abs();
        }
        for group in rest.chunks(16) {
            for (lane, value) in lanes.iter_mut().zip(group) {
                *lane += f64::from(*value).abs();
            }
        }
        at += values.len();
    }
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "a count below 2^53 is exact")]
    let mean = lanes[0] / (at as f64);
    if !mean.is_finite() {
        return Err(tensor.error(format!("has the mean magnitude {mean}, expected finite weights")));
    }
    quantized(tensor, rows, mean.max(MIN_ABSMEAN))
}

/// Makes a matrix ternary whose scale is known.
pub(crate) fn read_scaled(
    tensor: &Tensor,
    kind: DenseType,
    scale: f32,
) -> Result<TernaryMatrix, ModelError> {
    quantized(tensor, |row| floats(tensor, kind, tensor.stored_row(row)), scale.into())
}

fn quantized(
    tensor: &Tensor,
    rows: impl Fn(usize) -> Result<Vec<f32>, ModelError>,
    scale: f64,
) -> Result<TernaryMatrix, ModelError> {
    let mut packer = Packer::new(tensor.rows, tensor.cols);
    for row in 0..tensor.rows {
        let values = rows(row)?;
        packer.push(|codes| {
            for (code, value) in codes.iter_mut().zip(values) {
                *code = quantize(f64::from(value) / scale);
            }
            Ok::<_, ModelError>(())
        })?;
    }
    finish(tensor, narrow(scale), packer.packed.into())
}

/// Returns `s` if every weight is `-s`, 0 or `s` and not all are 0.
pub(crate) fn one_scale(tensor: &Tensor, kind: DenseType) -> Result<Option<f32>, ModelError> {
    let mut scale = 0.0_f32;
    for row in 0..tensor.rows {
        for value in floats(tensor, kind, row)? {
            let magnitude = value.abs();
            if magnitude == 0.0 {
                continue;
            }
            if scale == 0.0 {
                scale = magnitude;
            }
            if magnitude.to_bits() != scale.to_bits() {
                return Ok(None);
            }
        }
    }
    Ok((scale > 0.0 && scale.is_finite()).then_some(scale))
}

/// Returns the code of the nearest of -1, 0 and 1, ties to even.
fn quantize(value: f64) -> u8 {
    // Rounding half to even sends exactly the open interval above 0.5 to 1, and so below.
    ZERO + u8::from(value > 0.5) - u8::from(value < -0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantisation_rounds_half_to_even() {
        let cases = [(0.5, 1), (-0.5, 1), (0.500_001, 2), (-0.500_001, 0), (1.5, 2), (-9.0, 0)];
        for (value, code) in cases {
            assert_eq!(quantize(value), code, "{value}");
        }
    }
}
