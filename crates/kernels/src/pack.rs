//! Ternary matrices, four weights a byte.

use std::{fmt, sync::Arc};

use crate::{AlignedBytes, ShapeError, WeightBytes};

/// Weights of one block; rows are padded to whole blocks.
pub const TERNARY_BLOCK: usize = 128;

/// Weights along a row that share a scale, in a matrix with more than one.
pub const SCALE_BLOCK: usize = 64;

/// Bytes of one block.
pub(crate) const BLOCK_BYTES: usize = TERNARY_BLOCK / 4;

/// Longest row whose sum surely fits 32 bits: 3 (the largest code that two bits can hold, even in
/// a damaged file) * 127 * 2^22 < 2^31.
pub(crate) const MAX_COLS: usize = 1 << 22;

/// Stored code of weight 0, which also fills padding.
const ZERO: u8 = 1;

/// A row-major ternary matrix, packed as drawn in the [crate] documentation, with one scale or one
/// for each [`SCALE_BLOCK`] weights of a row.
#[derive(Clone)]
pub struct TernaryMatrix {
    rows: usize,
    cols: usize,
    scales: Scales,
    packed: WeightBytes,
    checked: bool,
}

#[derive(Clone)]
enum Scales {
    One(f32),
    Blocks(Arc<[f32]>),
}

impl TernaryMatrix {
    /// Returns the matrix of bytes that are packed already, each row padded to whole blocks.
    ///
    /// The codes are not read here, so that a mapped file stays unread; [`Self::validate`] does.
    /// Code 3 would count as weight 2, in every variant alike.
    pub fn from_packed(
        rows: usize,
        cols: usize,
        scale: f32,
        packed: WeightBytes,
    ) -> Result<Self, ShapeError> {
        Self::new(rows, cols, Scales::One(scale), packed)
    }

    /// Returns the matrix of bytes that are packed already, with a scale for each [`SCALE_BLOCK`]
    /// weights of a row; the last block of a row may be shorter.
    pub fn from_packed_blocks(
        rows: usize,
        cols: usize,
        scales: Arc<[f32]>,
        packed: WeightBytes,
    ) -> Result<Self, ShapeError> {
        Self::new(rows, cols, Scales::Blocks(scales), packed)
    }

    fn new(
        rows: usize,
        cols: usize,
        scales: Scales,
        packed: WeightBytes,
    ) -> Result<Self, ShapeError> {
        let expected = packed_len(rows, cols)?;
        let found = packed.len();
        if found != expected {
            return Err(ShapeError::Length { rows, cols, expected, found });
        }
        let values = match &scales {
            Scales::One(scale) => std::slice::from_ref(scale),
            Scales::Blocks(scales) => {
                let (expected, found) = (rows * cols.div_ceil(SCALE_BLOCK), scales.len());
                if found != expected {
                    return Err(ShapeError::ScaleCount { rows, cols, expected, found });
                }
                scales
            }
        };
        if let Some(scale) = values.iter().find(|scale| !scale.is_finite()) {
            return Err(ShapeError::Scale { bits: scale.to_bits() });
        }
        Ok(Self { rows, cols, scales, packed, checked: false })
    }

    /// Packs `rows * cols` weights of -1, 0 and 1, given row by row.
    pub fn from_trits(
        rows: usize,
        cols: usize,
        scale: f32,
        trits: &[i8],
    ) -> Result<Self, ShapeError> {
        let mut packed = AlignedBytes::zeroed(packed_len(rows, cols)?);
        if trits.len() != rows * cols {
            return Err(ShapeError::TritCount { expected: rows * cols, found: trits.len() });
        }
        let rows_of_bytes = packed.chunks_exact_mut(row_bytes(cols));
        for (row, (bytes, trits)) in rows_of_bytes.zip(trits.chunks_exact(cols)).enumerate() {
            bytes.fill(ZERO * 0b0101_0101);
            for (col, &value) in trits.iter().enumerate() {
                let code = match value {
                    -1 => 0_u8,
                    0 => 1,
                    1 => 2,
                    _ => return Err(ShapeError::Trit { row, col, value }),
                };
                let (byte, shift) = place(col);
                bytes[byte] = bytes[byte] & !(0b11 << shift) | code << shift;
            }
        }
        let matrix = Self::from_packed(rows, cols, scale, packed.into())?;
        Ok(Self { checked: true, ..matrix })
    }

    /// Checks that every code is 0, 1 or 2, padding included; reads all bytes.
    ///
    /// Only a matrix so checked is multiplied in the fastest way.
    pub fn validate(&mut self) -> Result<(), ShapeError> {
        for (row, bytes) in self.packed.chunks_exact(row_bytes(self.cols)).enumerate() {
            // A code is 3 exactly when both of its bits are set. Without an early end, so that
            // rows, whole blocks all of them, are scanned in vectors.
            let words = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
            let damaged = words.fold(0, |all, word| all | word & (word >> 1));
            if damaged & 0x5555_5555_5555_5555 != 0 {
                let padded = padded_cols(self.cols);
                let col = (0..padded).find(|&col| code(bytes, col) == 3).unwrap_or(padded);
                return Err(ShapeError::Code { row, col });
            }
        }
        self.checked = true;
        Ok(())
    }

    /// Returns the matrix as [`Self::validate`] leaves it, without a look at the codes. If some are
    /// not valid, products are wrong.
    #[must_use]
    pub fn trusted(self) -> Self {
        Self { checked: true, ..self }
    }

    /// Returns the matrix with its bytes where `place` puts the same bytes, if it does.
    ///
    /// # Panics
    /// If the bytes it returns are not as many.
    #[must_use]
    pub fn moved(self, place: impl FnOnce(&[u8]) -> Option<WeightBytes>) -> Self {
        let Some(packed) = place(&self.packed) else { return self };
        assert_eq!(packed.len(), self.packed.len(), "the same bytes elsewhere");
        Self { packed, ..self }
    }

    /// Returns whether every code is known to be valid.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "the variants there have no tables")
    )]
    pub(crate) fn is_checked(&self) -> bool {
        self.checked
    }

    /// Returns the number of rows: outputs of the product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns without padding: inputs of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Returns the scale that every weight is multiplied with, `None` if blocks have their own.
    pub fn scale(&self) -> Option<f32> {
        match self.scales {
            Scales::One(scale) => Some(scale),
            Scales::Blocks(_) => None,
        }
    }

    /// Returns the scales of the blocks, row by row, `None` if there is one scale.
    pub fn block_scales(&self) -> Option<&[f32]> {
        match &self.scales {
            Scales::One(_) => None,
            Scales::Blocks(scales) => Some(scales),
        }
    }

    /// Returns the packed bytes of all rows.
    pub fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// Returns one weight, unscaled.
    ///
    /// # Panics
    /// If the row or the column does not exist.
    pub fn trit(&self, row: usize, col: usize) -> i8 {
        assert!(
            row < self.rows && col < self.cols,
            "no weight at row {row}, column {col} of a {} x {} matrix",
            self.rows,
            self.cols
        );
        let bytes = row_bytes(self.cols);
        code(&self.packed[row * bytes..][..bytes], col).cast_signed() - ZERO.cast_signed()
    }
}

impl fmt::Debug for TernaryMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rows, cols) = (self.rows, self.cols);
        match &self.scales {
            Scales::One(scale) => write!(f, "TernaryMatrix({rows} x {cols}, scale {scale})"),
            Scales::Blocks(scales) => {
                write!(f, "TernaryMatrix({rows} x {cols}, {} scales)", scales.len())
            }
        }
    }
}

/// Returns `cols` rounded up to whole blocks.
pub(crate) const fn padded_cols(cols: usize) -> usize {
    cols.next_multiple_of(TERNARY_BLOCK)
}

/// Returns the bytes of one packed row.
pub(crate) const fn row_bytes(cols: usize) -> usize {
    padded_cols(cols) / 4
}

/// Returns one code of a packed row.
pub(crate) const fn code(row: &[u8], col: usize) -> u8 {
    let (byte, shift) = place(col);
    row[byte] >> shift & 0b11
}

/// Returns the byte of a row and the bit position in it where a column is stored.
const fn place(col: usize) -> (usize, usize) {
    let (block, inside) = (col / TERNARY_BLOCK, col % TERNARY_BLOCK);
    (block * BLOCK_BYTES + inside % BLOCK_BYTES, 6 - 2 * (inside / BLOCK_BYTES))
}

fn packed_len(rows: usize, cols: usize) -> Result<usize, ShapeError> {
    if rows == 0 || cols == 0 || cols > MAX_COLS {
        return Err(ShapeError::Extent { rows, cols });
    }
    // Four times the bytes must be countable too, so that `rows * cols` never overflows.
    rows.checked_mul(padded_cols(cols))
        .map(|weights| weights / 4)
        .ok_or(ShapeError::Extent { rows, cols })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_bit_order_holds() {
        // 130 columns: weight 1 at columns 0, 33, 66, 99 and 129, everything else -1.
        let mut trits = [-1_i8; 130];
        for col in [0, 33, 66, 99, 129] {
            trits[col] = 1;
        }
        let matrix = TernaryMatrix::from_trits(1, 130, 1.0, &trits).unwrap();
        let mut expected = [0_u8; 64];
        expected[0] = 0b1000_0000;
        expected[1] = 0b0010_0000;
        expected[2] = 0b0000_1000;
        expected[3] = 0b0000_0010;
        // In the second block only columns 128 and 129 exist; the rest is padding.
        expected[32..].fill(0b0101_0101);
        expected[32] = 0b0001_0101;
        expected[33] = 0b1001_0101;
        assert_eq!(matrix.packed(), expected);
    }

    #[test]
    fn trits_round_trip() {
        for cols in [1, 31, 127, 128, 129, 300] {
            let trits: Vec<i8> = (0..3 * cols).map(|i| [-1, 0, 1, 1][(i * 7) % 4]).collect();
            let mut matrix = TernaryMatrix::from_trits(3, cols, 0.5, &trits).unwrap();
            for (i, &trit) in trits.iter().enumerate() {
                assert_eq!(matrix.trit(i / cols, i % cols), trit);
            }
            assert_eq!(matrix.validate(), Ok(()));
        }
    }

    #[test]
    fn wrong_parts_are_refused() {
        let bytes = |len| WeightBytes::owned(AlignedBytes::zeroed(len));
        let refused =
            |rows, cols, len| TernaryMatrix::from_packed(rows, cols, 1.0, bytes(len)).unwrap_err();
        assert_eq!(
            refused(2, 129, 32),
            ShapeError::Length { rows: 2, cols: 129, expected: 128, found: 32 }
        );
        assert_eq!(refused(0, 128, 0), ShapeError::Extent { rows: 0, cols: 128 });
        assert_eq!(refused(1, 0, 0), ShapeError::Extent { rows: 1, cols: 0 });
        let large = usize::MAX / 256;
        assert_eq!(refused(large, 512, 0), ShapeError::Extent { rows: large, cols: 512 });
        assert!(TernaryMatrix::from_packed(1, 128, f32::NAN, bytes(32)).is_err());
        assert_eq!(
            TernaryMatrix::from_trits(2, 2, 1.0, &[0, 0, 0, 2]).unwrap_err(),
            ShapeError::Trit { row: 1, col: 1, value: 2 }
        );
        assert_eq!(
            TernaryMatrix::from_trits(2, 2, 1.0, &[0]).unwrap_err(),
            ShapeError::TritCount { expected: 4, found: 1 }
        );
    }

    #[test]
    fn damaged_codes_are_found() {
        let mut packed = AlignedBytes::zeroed(128);
        packed[64 + 32 + 5] = 0b0000_1100;
        let mut matrix = TernaryMatrix::from_packed(2, 140, 1.0, packed.into()).unwrap();
        assert_eq!(matrix.validate(), Err(ShapeError::Code { row: 1, col: 128 + 64 + 5 }));
    }
}
