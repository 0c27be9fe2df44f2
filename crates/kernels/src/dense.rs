//! Dense matrices in the storage of the file they come from.

use std::{fmt, ops::Range};

use crate::{ShapeError, WeightBytes, pack::MAX_COLS};

/// How a dense matrix is stored; block formats as in GGUF files.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum DenseType {
    /// IEEE 754 single precision, little-endian.
    F32,
    /// IEEE 754 half precision, little-endian.
    F16,
    /// The upper half of a single-precision number, little-endian.
    Bf16,
    /// 34 bytes for 32 weights: `scale: f16, values: [i8; 32]`.
    Q8_0,
    /// 18 bytes for 32 weights of 4 bits.
    Q4_0,
    /// 210 bytes for 256 weights of 6 bits.
    Q6K,
}

impl DenseType {
    /// Every storage format.
    pub const ALL: [Self; 6] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q6K];

    /// Returns the number of weights that are stored together.
    pub const fn block_weights(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 => q8_0::WEIGHTS,
            Self::Q4_0 => q4_0::WEIGHTS,
            Self::Q6K => q6_k::WEIGHTS,
        }
    }

    /// Returns the bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => q8_0::BYTES,
            Self::Q4_0 => q4_0::BYTES,
            Self::Q6K => q6_k::BYTES,
        }
    }

    /// Returns the bytes of a row of `cols` weights.
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols / self.block_weights() * self.block_bytes()
    }
}

impl fmt::Display for DenseType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q6K => "Q6_K",
        })
    }
}

/// The Q8_0 block: `scale: f16`, then 32 values; `weight = scale * value`.
pub(crate) mod q8_0 {
    pub(crate) const WEIGHTS: usize = 32;
    pub(crate) const BYTES: usize = 2 + WEIGHTS;
}

/// The Q4_0 block: `scale: f16`, then 16 bytes whose low halves are the codes of weights 0 to 15,
/// the high halves those of 16 to 31; `weight = scale * (code - 8)`.
pub(crate) mod q4_0 {
    pub(crate) const WEIGHTS: usize = 32;
    pub(crate) const BYTES: usize = 2 + WEIGHTS / 2;
    /// Code of weight 0.
    pub(crate) const ZERO: i8 = 8;
}

/// The Q6_K block of 256 weights.
///
/// ```text
/// low:    [u8; 128]   four low bits  }  of two halves of 128 weights each
/// high:   [u8; 64]    two high bits  }
/// scales: [i8; 16]    one for 16 consecutive weights
/// scale:  f16         of the block
///
/// weight = scale * scales[i / 16] * (code - 32)
/// In a half, code l + 32 * j (l < 32, j < 4) has its low bits in low[l + 32 * (j % 2)], in the
/// lower nibble for j < 2, and its high bits in high[l], bits 2j and 2j + 1.
/// ```
pub(crate) mod q6_k {
    pub(crate) const WEIGHTS: usize = 256;
    pub(crate) const HALF: usize = WEIGHTS / 2;
    pub(crate) const HIGH: usize = 128;
    pub(crate) const SCALES: usize = 192;
    pub(crate) const SCALE: usize = 208;
    pub(crate) const BYTES: usize = 210;
    /// Weights that share one of the scales.
    pub(crate) const GROUP: usize = 16;
    /// Code of weight 0.
    pub(crate) const ZERO: i8 = 32;
}

/// A row-major matrix of f32 values, stored in one of the [`DenseType`]s.
///
/// A weight is its dequantised value in f32. The products that make it are exact in any order: the
/// scale of a block has 11 significant bits, a Q8_0 or Q4_0 value at most 8, and the scale of a Q6_K group
/// times a value is at most 2^12 in magnitude, which leaves 23 bits of the 24 that f32 has.
#[derive(Clone)]
pub struct DenseMatrix {
    kind: DenseType,
    rows: usize,
    cols: usize,
    bytes: WeightBytes,
}

impl DenseMatrix {
    /// Returns the matrix of `rows` rows of `cols` weights stored in `bytes`.
    pub fn new(
        kind: DenseType,
        rows: usize,
        cols: usize,
        bytes: WeightBytes,
    ) -> Result<Self, ShapeError> {
        if rows == 0 || cols == 0 || cols > MAX_COLS {
            return Err(ShapeError::Extent { rows, cols });
        }
        if !cols.is_multiple_of(kind.block_weights()) {
            return Err(ShapeError::Block { kind, cols });
        }
        let expected =
            rows.checked_mul(kind.row_bytes(cols)).ok_or(ShapeError::Extent { rows, cols })?;
        let found = bytes.len();
        if found != expected {
            return Err(ShapeError::Length { rows, cols, expected, found });
        }
        Ok(Self { kind, rows, cols, bytes })
    }

    /// Checks that every weight is a finite number; reads all bytes.
    pub fn validate(&self) -> Result<(), ShapeError> {
        self.validate_rows(0..self.rows)
    }

    /// As [`Self::validate`], of some rows only.
    ///
    /// # Panics
    /// If the rows do not exist.
    pub fn validate_rows(&self, rows: Range<usize>) -> Result<(), ShapeError> {
        for row in rows {
            let bytes = self.row_bytes(row);
            if !all_finite(self.kind, bytes) {
                let block = bytes
                    .chunks_exact(self.kind.block_bytes())
                    .position(|block| !all_finite(self.kind, block))
                    .unwrap_or_default();
                return Err(ShapeError::Weight { row, col: block * self.kind.block_weights() });
            }
        }
        Ok(())
    }

    /// Returns how the weights are stored.
    pub fn kind(&self) -> DenseType {
        self.kind
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Returns the stored bytes of all rows.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the stored bytes of one row.
    ///
    /// # Panics
    /// If the row does not exist.
    pub fn row_bytes(&self, row: usize) -> &[u8] {
        assert!(row < self.rows, "no row {row} in a matrix of {} rows", self.rows);
        let bytes = self.kind.row_bytes(self.cols);
        &self.bytes[row * bytes..][..bytes]
    }
}

impl fmt::Debug for DenseMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DenseMatrix({} x {}, {})", self.rows, self.cols, self.kind)
    }
}

/// Returns whether no number or scale among whole blocks is an infinity or a NaN.
fn all_finite(kind: DenseType, bytes: &[u8]) -> bool {
    // Without an early end, so that the plain formats are scanned in vectors.
    fn all<const N: usize>(bytes: &[u8], finite: impl Fn(&[u8; N]) -> bool) -> bool {
        bytes.as_chunks().0.iter().fold(true, |all, block| all & finite(block))
    }
    fn half(low: u8, high: u8) -> bool {
        u16::from_le_bytes([low, high]) & 0x7c00 != 0x7c00
    }
    match kind {
        DenseType::F32 => all(bytes, |b| u32::from_le_bytes(*b) & 0x7f80_0000 != 0x7f80_0000),
        DenseType::Bf16 => all(bytes, |b| u16::from_le_bytes(*b) & 0x7f80 != 0x7f80),
        DenseType::F16 => all(bytes, |b: &[u8; 2]| half(b[0], b[1])),
        DenseType::Q8_0 => all(bytes, |b: &[u8; q8_0::BYTES]| half(b[0], b[1])),
        DenseType::Q4_0 => all(bytes, |b: &[u8; q4_0::BYTES]| half(b[0], b[1])),
        DenseType::Q6K => {
            all(bytes, |b: &[u8; q6_k::BYTES]| half(b[q6_k::SCALE], b[q6_k::SCALE + 1]))
        }
    }
}

/// Returns the exact value of a half-precision number.
pub(crate) fn f16_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let exponent = u32::from(half >> 10 & 0x1f);
    let fraction = u32::from(half & 0x3ff);
    match exponent {
        // Zero and subnormal: fraction * 2^-24, exact in f32.
        0 => {
            let magnitude = f32::from(half & 0x3ff) * f32::from_bits((127 - 24) << 23);
            f32::from_bits(sign | magnitude.to_bits())
        }
        0x1f => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 127 - 15) << 23 | fraction << 13),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AlignedBytes;

    #[test]
    fn half_precision_converts_exactly() {
        for (half, value) in [
            (0x0000, 0.0),
            (0x8000, -0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0001, 5.960_464_5e-8),
            (0x83ff, -6.097_555_e-5),
            (0x0400, 6.103_515_6e-5),
            (0x7c00, f32::INFINITY),
            (0xfc00, f32::NEG_INFINITY),
        ] {
            assert_eq!(f16_to_f32(half).to_bits(), f32::to_bits(value), "{half:#06x}");
        }
        assert!(f16_to_f32(0x7e00).is_nan());
    }

    #[test]
    fn weights_that_are_not_finite_are_found() {
        // The second row of two; in the block formats, the scale of its second block.
        for (kind, cols, at, bad, col) in [
            (DenseType::F32, 9, 4 * (9 + 7), &[0, 0, 0x80, 0xff][..], 7),
            (DenseType::F32, 9, 4 * (9 + 8), &[1, 0, 0x80, 0x7f], 8),
            (DenseType::F16, 37, 2 * (37 + 36), &[0, 0x7c], 36),
            (DenseType::F16, 37, 2 * 37, &[1, 0xfe], 0),
            (DenseType::Bf16, 37, 2 * (37 + 20), &[0x80, 0x7f], 20),
            (DenseType::Q8_0, 64, 3 * 34, &[0, 0xfc], 32),
            (DenseType::Q4_0, 64, 3 * 18, &[0, 0x7e], 32),
            (DenseType::Q6K, 512, 3 * 210 + 208, &[0, 0x7c], 256),
        ] {
            let mut bytes = AlignedBytes::zeroed(2 * kind.row_bytes(cols));
            // The largest finite half, and codes of all bits; both bytes of an F32 or BF16 stay
            // below the exponent of infinity.
            bytes.as_chunks_mut().0.fill([0xff, 0x7b]);
            let matrix = |bytes: &[u8]| DenseMatrix::new(kind, 2, cols, bytes.into()).unwrap();
            assert_eq!(matrix(&bytes).validate(), Ok(()), "{kind}");
            bytes[at..][..bad.len()].copy_from_slice(bad);
            let found = matrix(&bytes).validate();
            assert_eq!(found, Err(ShapeError::Weight { row: 1, col }), "{kind}");
        }
    }

    #[test]
    fn wrong_parts_are_refused() {
        let refused = |kind, rows, cols, len| {
            let bytes = WeightBytes::owned(AlignedBytes::zeroed(len));
            DenseMatrix::new(kind, rows, cols, bytes).unwrap_err()
        };
        assert_eq!(
            refused(DenseType::Q6K, 1, 128, 105),
            ShapeError::Block { kind: DenseType::Q6K, cols: 128 }
        );
        assert_eq!(
            refused(DenseType::Q8_0, 2, 64, 64),
            ShapeError::Length { rows: 2, cols: 64, expected: 136, found: 64 }
        );
        assert_eq!(refused(DenseType::F16, 0, 64, 0), ShapeError::Extent { rows: 0, cols: 64 });
        let large = usize::MAX / 4;
        assert_eq!(
            refused(DenseType::F32, large, 64, 0),
            ShapeError::Extent { rows: large, cols: 64 }
        );
    }
}
