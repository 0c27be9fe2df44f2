//! Errors of operands that do not fit.

use std::{error::Error, fmt};

use crate::DenseType;

/// A matrix whose parts do not fit each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShapeError {
    /// A matrix without rows or columns, or too large to index or to sum exactly.
    Extent {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// The byte length is not what rows and columns need.
    Length {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Bytes that these need.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// The number of unpacked weights is not rows times columns.
    TritCount {
        /// Rows times columns.
        expected: usize,
        /// Weights given.
        found: usize,
    },
    /// An unpacked weight other than -1, 0 and 1.
    Trit {
        /// Row of the weight.
        row: usize,
        /// Column of the weight.
        col: usize,
        /// The value found.
        value: i8,
    },
    /// A packed code other than 0, 1 and 2.
    Code {
        /// Row of the weight.
        row: usize,
        /// Column of the weight; at or beyond the last column it is padding.
        col: usize,
    },
    /// A scale that is not finite.
    Scale {
        /// The scale found.
        bits: u32,
    },
    /// A dense weight that is not finite, or the scale of its block.
    Weight {
        /// Row of the weight.
        row: usize,
        /// Column of the weight, or of the first of its block.
        col: usize,
    },
    /// The number of block scales is not what rows and columns need.
    ScaleCount {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Scales that these need.
        expected: usize,
        /// Scales given.
        found: usize,
    },
    /// Columns that do not fill whole blocks of a block format.
    Block {
        /// The storage format.
        kind: DenseType,
        /// Columns of the matrix.
        cols: usize,
    },
}

impl fmt::Display for ShapeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Extent { rows, cols } => write!(
                f,
                "a {rows} x {cols} matrix is empty or too large; expected 1 to {} columns",
                crate::pack::MAX_COLS
            ),
            Self::Length { rows, cols, expected, found } => {
                write!(f, "a {rows} x {cols} matrix needs {expected} bytes, found {found}")
            }
            Self::TritCount { expected, found } => {
                write!(f, "expected {expected} ternary weights, found {found}")
            }
            Self::Trit { row, col, value } => write!(
                f,
                "weight {value} at row {row}, column {col} is not ternary; expected -1, 0 or 1"
            ),
            Self::Code { row, col } => write!(
                f,
                "packed code 3 at row {row}, column {col}; expected 0, 1 or 2, the file is damaged"
            ),
            Self::Scale { bits } => {
                write!(f, "weight scale {} is not finite", f32::from_bits(bits))
            }
            Self::Weight { row, col } => {
                write!(
                    f,
                    "the weight at row {row}, column {col} is not finite, the file is damaged"
                )
            }
            Self::ScaleCount { rows, cols, expected, found } => write!(
                f,
                "a {rows} x {cols} matrix of blocks needs {expected} scales, found {found}"
            ),
            Self::Block { kind, cols } => write!(
                f,
                "{cols} columns do not fill blocks of {kind}; expected a multiple of {}",
                kind.block_weights()
            ),
        }
    }
}

impl Error for ShapeError {}

/// A row of activations that holds an infinity or a NaN, so that it cannot be quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonFinite {
    /// The first element that is not finite.
    pub index: usize,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "activation {} is not a finite number", self.index)
    }
}

impl Error for NonFinite {}
