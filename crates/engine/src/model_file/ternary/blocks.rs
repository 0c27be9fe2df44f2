//! Ternary matrices whose blocks have scales of their own.
//!
//! ```text
//! TQ1_0  256 weights in 54 bytes: 48 with five base-3 digits, 4 with four, then the scale (f16)
//! TQ2_0  256 weights in 66 bytes: 64 with four codes, 32 apart in a half, then the scale (f16)
//! Q2_0   64 or 128 weights in 18 or 34 bytes: the scale (f16), then four consecutive codes a byte
//! ```
//! Scales are kept for each 64 weights along a row, so that every block size ends up the same. A
//! block without weights other than 0 has the scale 0, whatever the file says.

use half::f16;
use tercet_kernels::{DenseType, SCALE_BLOCK, TernaryMatrix};

use super::master::{floats, row};
use super::{Packer, ZERO, check, finish, scaled};
use crate::model_file::config::ActivationScheme;
use crate::model_file::error::ModelError;
use crate::model_file::tensors::Tensor;

/// Weights of a TQ1_0 or TQ2_0 block.
const TQ_BLOCK: usize = 256;
/// Bytes of a TQ1_0 block's digits.
const TQ1_DIGITS: usize = 52;
/// Bytes of a TQ2_0 block's codes.
const TQ2_CODES: usize = 64;

/// Reads TQ1_0.
///
/// A byte is a base-3 fraction: multiplied by a power of 3, wrapping, the next digit comes out on
/// top. Elements 0..160 are 32 apart in a byte, 160..240 16 apart, the last 16 4 apart.
pub(crate) fn read_tq1_0(tensor: &Tensor) -> Result<TernaryMatrix, ModelError> {
    read_blocks(tensor, TQ_BLOCK, TQ1_DIGITS + 2, |block, codes| {
        let (first, rest) = codes.split_at_mut(160);
        let (second, third) = rest.split_at_mut(80);
        for (codes, bytes) in
            [(first, &block[..32]), (second, &block[32..48]), (third, &block[48..TQ1_DIGITS])]
        {
            for (codes, power) in codes.chunks_exact_mut(bytes.len()).zip([1_u8, 3, 9, 27, 81]) {
                for (code, byte) in codes.iter_mut().zip(bytes) {
                    let product = u16::from(byte.wrapping_mul(power)) * 3;
                    *code = product.to_be_bytes()[0];
                }
            }
        }
        [block[TQ1_DIGITS], block[TQ1_DIGITS + 1]]
    })
}

/// Reads TQ2_0.
pub(crate) fn read_tq2_0(tensor: &Tensor) -> Result<TernaryMatrix, ModelError> {
    read_blocks(tensor, TQ_BLOCK, TQ2_CODES + 2, |block, codes| {
        for (half, bytes) in codes.chunks_exact_mut(128).zip(block.chunks_exact(32)) {
            for (codes, shift) in half.chunks_exact_mut(32).zip([0, 2, 4, 6]) {
                for (code, byte) in codes.iter_mut().zip(bytes) {
                    *code = byte >> shift & 3;
                }
            }
        }
        [block[TQ2_CODES], block[TQ2_CODES + 1]]
    })
}

/// Reads Q2_0 in blocks of `block` weights.
pub(crate) fn read_q2_0(tensor: &Tensor, block: usize) -> Result<TernaryMatrix, ModelError> {
    read_blocks(tensor, block, 2 + block / 4, |block, codes| {
        for (codes, byte) in codes.chunks_exact_mut(4).zip(&block[2..]) {
            for (code, shift) in codes.iter_mut().zip([0, 2, 4, 6]) {
                *code = byte >> shift & 3;
            }
        }
        [block[0], block[1]]
    })
}

/// Reads numbers that are -s, 0 or s, with an s of its own for each 64 along a row.
pub(crate) fn read_groups(tensor: &Tensor, kind: DenseType) -> Result<TernaryMatrix, ModelError> {
    read_rows(tensor, |stored, codes, scales| {
        let values = floats(tensor, kind, stored)?;
        let blocks = values.chunks(SCALE_BLOCK).zip(codes.chunks_mut(SCALE_BLOCK));
        for (block, ((values, codes), scale)) in blocks.zip(scales).enumerate() {
            let largest = values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
            for (at, (code, value)) in codes.iter_mut().zip(values).enumerate() {
                let sign = u8::from(*value > 0.0);
                *code = match value.abs() {
                    0.0 => ZERO,
                    same if same.to_bits() == largest.to_bits() && same.is_finite() => 2 * sign,
                    _ => {
                        return Err(tensor.error(format!(
                            "holds {value} in row {stored}, column {}, where ternary weights \
                             would be 0 or {largest} in magnitude; use the packed model, or \
                             declare training weights by a quantization_config of quant_method \
                             bitnet, linear_class autobitlinear and quantization_mode online",
                            block * SCALE_BLOCK + at
                        )));
                    }
                };
            }
            *scale = largest;
        }
        Ok(())
    })
}

/// Reads rows of blocks of `weights` weights in `bytes` bytes. `decode` writes a block's codes and
/// returns its scale.
fn read_blocks(
    tensor: &Tensor,
    weights: usize,
    bytes: usize,
    decode: impl Fn(&[u8], &mut [u8]) -> [u8; 2],
) -> Result<TernaryMatrix, ModelError> {
    read_rows(tensor, |stored, codes, scales| {
        let blocks = row(tensor, stored).chunks_exact(bytes).zip(codes.chunks_exact_mut(weights));
        let scales = scales.chunks_exact_mut(weights / SCALE_BLOCK);
        for (at, ((block, codes), scales)) in blocks.zip(scales).enumerate() {
            let scale = f16::from_le_bytes(decode(block, codes)).to_f32();
            if !(scale.is_finite() && scale >= 0.0) {
                return Err(tensor.error(format!(
                    "has the scale {scale} in row {stored}, block {at}, expected a number of at \
                     least 0"
                )));
            }
            if let Some(col) = codes.iter().position(|code| *code == 3) {
                return Err(tensor.error(format!(
                    "is damaged: packed code 3 in row {stored}, column {}, expected 0, 1 or 2",
                    at * weights + col
                )));
            }
            scales.fill(scale);
        }
        Ok(())
    })
}

/// Reads a matrix row by row: `fill` writes the codes of a stored row and the scales of its blocks.
///
/// Where the inputs of the product have one scale a token and all blocks agree, one scale is kept
/// for the matrix.
fn read_rows(
    tensor: &Tensor,
    fill: impl Fn(usize, &mut [u8], &mut [f32]) -> Result<(), ModelError>,
) -> Result<TernaryMatrix, ModelError> {
    let blocks = tensor.cols.div_ceil(SCALE_BLOCK);
    let mut packer = Packer::new(tensor.rows, tensor.cols);
    let mut scales = vec![0.0_f32; tensor.rows * blocks];
    let mut common = Common::None;
    for (row, scales) in scales.chunks_exact_mut(blocks).enumerate() {
        packer.push(|codes| {
            fill(tensor.stored_row(row), codes, scales)?;
            for (codes, scale) in codes.chunks_mut(SCALE_BLOCK).zip(scales) {
                if *scale == 0.0 {
                    codes.fill(ZERO);
                } else if codes.iter().all(|code| *code == ZERO) {
                    *scale = 0.0;
                } else {
                    common = common.and(*scale);
                    *scale = scaled(tensor, *scale)?;
                }
            }
            Ok(())
        })?;
    }
    let packed = packer.packed.into();
    match (tensor.activations, common) {
        (ActivationScheme::Token, Common::One(scale)) => {
            // Only if it is what the blocks hold: another program may have written them anew.
            let rounds = |exact: &f32| f16::from_f32(*exact).to_f32().to_bits() == scale.to_bits();
            let exact = tensor.exact_scale.filter(rounds);
            finish(tensor, exact.unwrap_or(scale), packed)
        }
        // Without weights other than 0 any scale will do.
        (ActivationScheme::Token, Common::None) => {
            finish(tensor, tensor.exact_scale.unwrap_or(1.0), packed)
        }
        _ => {
            let (rows, cols) = (tensor.rows, tensor.cols);
            check(tensor, TernaryMatrix::from_packed_blocks(rows, cols, scales.into(), packed))
        }
    }
}

/// What the scales seen so far have in common.
#[derive(Clone, Copy)]
enum Common {
    /// None was seen.
    None,
    /// All are equal.
    One(f32),
    /// They differ.
    Many,
}

impl Common {
    fn and(self, scale: f32) -> Self {
        match self {
            Self::None => Self::One(scale),
            Self::One(known) if known.to_bits() == scale.to_bits() => self,
            _ => Self::Many,
        }
    }
}
