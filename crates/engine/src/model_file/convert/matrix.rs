//! Ternary matrices written in the storage of each type.

use half::f16;
use tercet_kernels::{SCALE_BLOCK, TernaryMatrix};

use crate::model_file::error::ModelError;
use crate::model_file::output::OutputFile;
use crate::model_file::ternary::encode::{self, TernaryType};
use crate::model_file::ternary::{BLOCK, BLOCK_BYTES, I2S_TAIL, pack_codes, unpack_codes};

/// Bytes gathered before they are written.
const BATCH: usize = 1 << 20;

/// Writes a matrix and returns how many scales of blocks half precision cannot hold; they are
/// rounded. With `paired_heads`, the two rows of a rotated pair become neighbours in heads of that
/// width.
pub(super) fn write(
    name: &str,
    matrix: &TernaryMatrix,
    kind: TernaryType,
    paired_heads: Option<usize>,
    out: &mut OutputFile<'_>,
) -> Result<u64, ModelError> {
    match kind.block() {
        None => write_i2s(name, matrix, paired_heads, out).map(|()| 0),
        Some(block) => write_blocks(name, matrix, kind, block, paired_heads, out),
    }
}

/// Returns the row of a matrix that is stored as row `stored`; the inverse of
/// [`Tensor::stored_row`](crate::model_file::tensors::Tensor::stored_row).
fn row_stored_at(stored: usize, paired_heads: Option<usize>) -> usize {
    let Some(width) = paired_heads else { return stored };
    let (head, inside) = (stored / width, stored % width);
    let (pair, second) = (inside / 2, inside % 2);
    head * width + second * (width / 2) + pair
}

fn write_i2s(
    name: &str,
    matrix: &TernaryMatrix,
    paired_heads: Option<usize>,
    out: &mut OutputFile<'_>,
) -> Result<(), ModelError> {
    let scale = matrix.scale().ok_or_else(|| ModelError::Unwritable {
        what: format!("tensor `{name}` as i2_s"),
        problem: "its blocks have scales of their own, i2_s has one for a matrix".to_owned(),
    })?;
    let cols = matrix.cols();
    let padded = cols.next_multiple_of(BLOCK);
    if cols == padded && paired_heads.is_none() {
        out.write(matrix.packed())?;
    } else {
        // Blocks run through the flattened tensor.
        let mut row = vec![0; padded];
        let mut pending: Vec<u8> = Vec::with_capacity(BLOCK + padded);
        let mut packed = vec![0; padded / BLOCK * BLOCK_BYTES + BLOCK_BYTES];
        for stored in 0..matrix.rows() {
            unpack_row(matrix, row_stored_at(stored, paired_heads), &mut row);
            pending.extend(&row[..cols]);
            let whole = pending.len() / BLOCK * BLOCK;
            let packed = &mut packed[..whole / 4];
            pack_codes(&pending[..whole], packed);
            out.write(packed)?;
            pending.drain(..whole);
        }
    }
    let mut tail = [0; I2S_TAIL];
    tail[..4].copy_from_slice(&scale.to_le_bytes());
    out.write(&tail)
}

fn unpack_row(matrix: &TernaryMatrix, row: usize, codes: &mut [u8]) {
    let bytes = codes.len() / 4;
    unpack_codes(&matrix.packed()[row * bytes..][..bytes], codes);
}

fn write_blocks(
    name: &str,
    matrix: &TernaryMatrix,
    kind: TernaryType,
    block: usize,
    paired_heads: Option<usize>,
    out: &mut OutputFile<'_>,
) -> Result<u64, ModelError> {
    let cols = matrix.cols();
    let one = matrix.scale().map(|scale| half(name, scale, kind)).transpose()?;
    // An exact copy of a matrix's only scale is kept beside it, so that its rounding is none.
    let mut rounded = 0;
    let mut codes = vec![0; cols.next_multiple_of(BLOCK)];
    let mut scales = Vec::with_capacity(cols / block);
    let mut bytes = Vec::with_capacity(BATCH + cols);
    for stored in 0..matrix.rows() {
        let row = row_stored_at(stored, paired_heads);
        unpack_row(matrix, row, &mut codes);
        scales.clear();
        if let Some(all) = matrix.block_scales() {
            let count = cols.div_ceil(SCALE_BLOCK);
            for group in all[row * count..][..count].chunks(block / SCALE_BLOCK) {
                let scale = common(name, row, group, kind)?;
                let half = half(name, scale, kind)?;
                rounded += u64::from(half.to_f32().to_bits() != scale.to_bits());
                scales.push(half);
            }
        }
        encode::row(
            kind,
            &codes[..cols],
            |at| one.or_else(|| scales.get(at).copied()).unwrap_or(f16::ZERO),
            &mut bytes,
        );
        if bytes.len() >= BATCH {
            out.write(&bytes)?;
            bytes.clear();
        }
    }
    out.write(&bytes)?;
    Ok(rounded)
}

/// Returns the scale of a block from those of its parts; parts without weights other than 0 have
/// none.
fn common(name: &str, row: usize, parts: &[f32], kind: TernaryType) -> Result<f32, ModelError> {
    let mut scales = parts.iter().copied().filter(|scale| *scale != 0.0);
    let first = scales.next().unwrap_or(0.0);
    match scales.find(|scale| scale.to_bits() != first.to_bits()) {
        None => Ok(first),
        Some(other) => Err(ModelError::Unwritable {
            what: format!("tensor `{name}` as {kind}"),
            problem: format!("a block of row {row} has the scales {first} and {other}; use q2_0"),
        }),
    }
}

/// Rounds a scale to half precision, refusing one that would be lost.
fn half(name: &str, scale: f32, kind: TernaryType) -> Result<f16, ModelError> {
    let half = f16::from_f32(scale);
    if half.is_finite() && (half != f16::ZERO || scale == 0.0) {
        return Ok(half);
    }
    Err(ModelError::Unwritable {
        what: format!("tensor `{name}` as {kind}"),
        problem: format!("its scale {scale} is out of the range of half precision; use i2_s"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_become_neighbours_and_come_back() {
        let stored: Vec<usize> = (0..12).map(|at| row_stored_at(at, Some(6))).collect();
        assert_eq!(stored, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        assert_eq!(row_stored_at(5, None), 5);
    }

    #[test]
    fn scales_that_would_be_lost_are_refused() {
        assert!(half("x", 1e-9, TernaryType::Tq2_0).is_err());
        assert!(half("x", 1e9, TernaryType::Tq2_0).is_err());
        assert_eq!(half("x", 0.5, TernaryType::Tq2_0).unwrap().to_f32(), 0.5);
        assert_eq!(common("x", 0, &[0.0, 2.0, 0.0, 2.0], TernaryType::Tq1_0).unwrap(), 2.0);
        assert!(common("x", 0, &[1.0, 2.0], TernaryType::Tq1_0).is_err());
    }
}
