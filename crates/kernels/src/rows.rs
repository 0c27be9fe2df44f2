//! Activations quantised to int8.

use crate::{AlignedBytes, pack};

/// Rows of activations as int8, with one scale each or one for each
/// [`SCALE_BLOCK`](crate::SCALE_BLOCK) values: a workspace to be filled by
/// [`Kernels::quantize`](crate::Kernels::quantize) again and again.
///
/// Values lie in -127..=127; each row is padded with zeros to whole blocks of
/// [`TERNARY_BLOCK`](crate::TERNARY_BLOCK).
#[derive(Clone, Debug)]
pub struct Int8Rows {
    cols: usize,
    values: AlignedBytes,
    facts: Vec<RowFacts>,
    /// Scales of the blocks, row by row; empty if rows have one scale each.
    block_scales: Vec<f32>,
    /// Scales of a row in `block_scales`.
    row_blocks: usize,
}

/// What is known of a quantised row besides its values.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RowFacts {
    /// Factor from int8 back to f32: largest magnitude / 127.
    pub(crate) scale: f32,
    /// Sum of the values, which undoes the offset of the stored weight codes.
    pub(crate) sum: i32,
}

impl Int8Rows {
    /// Returns a workspace for `rows` rows of `cols` activations, all zero.
    ///
    /// # Panics
    /// If `cols` is zero or longer than a ternary matrix may be.
    pub fn new(rows: usize, cols: usize) -> Self {
        assert!(
            (1..=pack::MAX_COLS).contains(&cols),
            "rows of {cols} activations; expected 1 to {}",
            pack::MAX_COLS
        );
        Self {
            cols,
            values: AlignedBytes::zeroed(rows * pack::padded_cols(cols)),
            facts: vec![RowFacts::default(); rows],
            block_scales: Vec::new(),
            row_blocks: 0,
        }
    }

    /// Returns a workspace whose rows have a scale for each [`SCALE_BLOCK`](crate::SCALE_BLOCK)
    /// activations, for products with matrices that have such scales too.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn with_blocks(rows: usize, cols: usize) -> Self {
        let row_blocks = cols.div_ceil(pack::SCALE_BLOCK);
        let block_scales = vec![0.0; rows * row_blocks];
        Self { block_scales, row_blocks, ..Self::new(rows, cols) }
    }

    /// Returns the number of rows there is room for.
    pub fn rows(&self) -> usize {
        self.facts.len()
    }

    /// Returns the length of a row without padding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Returns one quantised value.
    ///
    /// # Panics
    /// If the row or the column does not exist.
    pub fn value(&self, row: usize, col: usize) -> i8 {
        assert!(col < self.cols, "no column {col} in rows of {}", self.cols);
        self.row(row)[col].cast_signed()
    }

    /// Returns a row's scale: its largest magnitude, at least 1e-5, over 127. Meaningless if blocks
    /// have their own.
    ///
    /// # Panics
    /// If the row does not exist.
    pub fn scale(&self, row: usize) -> f32 {
        self.facts[row].scale
    }

    /// Returns the scales of a row's blocks, `None` if the row has one scale.
    ///
    /// # Panics
    /// If the row does not exist.
    pub fn block_scales(&self, row: usize) -> Option<&[f32]> {
        let blocks = self.row_blocks;
        (blocks > 0).then(|| &self.block_scales[row * blocks..][..blocks])
    }

    /// Returns all rows, to be filled.
    pub fn rows_mut(&mut self) -> Int8RowsMut<'_> {
        Int8RowsMut {
            cols: self.cols,
            values: &mut self.values,
            facts: &mut self.facts,
            block_scales: &mut self.block_scales,
            row_blocks: self.row_blocks,
        }
    }

    /// Returns all rows in blocks of `rows` rows, the last one maybe shorter.
    ///
    /// # Panics
    /// If `rows` is zero.
    pub fn chunks_mut(&mut self, rows: usize) -> impl Iterator<Item = Int8RowsMut<'_>> {
        assert!(rows > 0, "blocks of no row");
        let mut rest = Some(self.rows_mut());
        std::iter::from_fn(move || {
            let all = rest.take().filter(|rest| rest.rows() > 0)?;
            let length = all.rows().min(rows);
            let (chunk, others) = all.split_at(length);
            rest = Some(others);
            Some(chunk)
        })
    }

    /// Returns one row, to be filled.
    ///
    /// # Panics
    /// If the row does not exist.
    pub fn row_mut(&mut self, row: usize) -> Int8RowMut<'_> {
        let (padded, blocks) = (pack::padded_cols(self.cols), self.row_blocks);
        Int8RowMut {
            cols: self.cols,
            values: &mut self.values[row * padded..][..padded],
            facts: &mut self.facts[row],
            block_scales: &mut self.block_scales[row * blocks..][..blocks],
        }
    }

    /// Returns a padded row; the bytes are two's complement.
    pub(crate) fn row(&self, row: usize) -> &[u8] {
        let padded = pack::padded_cols(self.cols);
        &self.values[row * padded..][..padded]
    }

    pub(crate) fn facts(&self, row: usize) -> RowFacts {
        self.facts[row]
    }
}

/// A block of consecutive rows of an [`Int8Rows`], to be filled by one thread.
#[derive(Debug)]
pub struct Int8RowsMut<'a> {
    cols: usize,
    values: &'a mut [u8],
    facts: &'a mut [RowFacts],
    block_scales: &'a mut [f32],
    row_blocks: usize,
}

impl<'a> Int8RowsMut<'a> {
    /// Returns the number of rows in the block.
    pub fn rows(&self) -> usize {
        self.facts.len()
    }

    /// Splits the block into its first `rows` rows and the others.
    ///
    /// # Panics
    /// If there are fewer rows.
    pub fn split_at(self, rows: usize) -> (Self, Self) {
        let Self { cols, values, facts, block_scales, row_blocks } = self;
        let (values, other_values) = values.split_at_mut(rows * pack::padded_cols(cols));
        let (facts, other_facts) = facts.split_at_mut(rows);
        let (block_scales, other_scales) = block_scales.split_at_mut(rows * row_blocks);
        (
            Self { cols, values, facts, block_scales, row_blocks },
            Self {
                cols,
                values: other_values,
                facts: other_facts,
                block_scales: other_scales,
                row_blocks,
            },
        )
    }

    /// Returns a row of the block, counted from the block's start.
    ///
    /// # Panics
    /// If the row does not exist.
    pub fn row_mut(&mut self, row: usize) -> Int8RowMut<'_> {
        let (padded, blocks) = (pack::padded_cols(self.cols), self.row_blocks);
        Int8RowMut {
            cols: self.cols,
            values: &mut self.values[row * padded..][..padded],
            facts: &mut self.facts[row],
            block_scales: &mut self.block_scales[row * blocks..][..blocks],
        }
    }

    /// Returns every row of the block in order.
    pub fn into_rows(self) -> impl Iterator<Item = Int8RowMut<'a>> {
        let Self { cols, values, facts, mut block_scales, row_blocks } = self;
        values.chunks_exact_mut(pack::padded_cols(cols)).zip(facts).map(move |(values, facts)| {
            let (row, others) = std::mem::take(&mut block_scales).split_at_mut(row_blocks);
            block_scales = others;
            Int8RowMut { cols, values, facts, block_scales: row }
        })
    }
}

/// One row of an [`Int8Rows`], to be filled.
#[derive(Debug)]
pub struct Int8RowMut<'a> {
    cols: usize,
    values: &'a mut [u8],
    facts: &'a mut RowFacts,
    block_scales: &'a mut [f32],
}

impl Int8RowMut<'_> {
    /// Returns the length of the row without padding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Returns the values without padding (which stays zero), the place of the facts, and those of
    /// the blocks' scales, none if the row has one scale.
    pub(crate) fn parts(&mut self) -> (&mut [u8], &mut RowFacts, &mut [f32]) {
        (&mut self.values[..self.cols], self.facts, self.block_scales)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Isa, Kernels};

    #[test]
    fn blocks_of_rows_are_disjoint_and_complete() {
        let kernels = Kernels::new(Isa::Scalar).unwrap();
        let mut rows = Int8Rows::new(5, 130);
        let (first, others) = rows.rows_mut().split_at(2);
        let (empty, last) = others.split_at(0);
        let parts = [first, empty, last];
        assert_eq!(parts.each_ref().map(Int8RowsMut::rows), [2, 0, 3]);
        let mut x = vec![0.0; 130];
        x[129] = 1.0;
        let mut value = 1.0;
        for part in parts {
            for row in part.into_rows() {
                x[0] = value / 127.0;
                value += 1.0;
                kernels.quantize(&x, row).unwrap();
            }
        }
        for row in 0..5_i8 {
            let at = usize::try_from(row).unwrap();
            assert_eq!(rows.value(at, 0), row + 1);
            assert_eq!(rows.value(at, 129), 127);
            assert_eq!(rows.facts(at).sum, 128 + i32::from(row));
        }
        let chunks: Vec<_> = rows.chunks_mut(2).map(|chunk| chunk.rows()).collect();
        assert_eq!(chunks, [2, 2, 1]);
    }
}
