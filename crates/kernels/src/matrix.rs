//! Results that several threads write at once.

use std::{marker::PhantomData, ops::Range};

/// A row-major matrix of results: one row a token, one column an output.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
}

impl<'a> MatrixMut<'a> {
    /// Returns `data` seen as `rows` rows of `cols` columns.
    ///
    /// # Panics
    /// If the length is not `rows * cols`.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(
            Some(data.len()),
            rows.checked_mul(cols),
            "a result of {rows} x {cols} in {} numbers",
            data.len()
        );
        Self { data, rows, cols }
    }

    /// Returns all columns as one part.
    pub fn into_columns(self) -> ColumnsMut<'a> {
        ColumnsMut {
            data: self.data.as_mut_ptr(),
            rows: self.rows,
            stride: self.cols,
            columns: 0..self.cols,
            owner: PhantomData,
        }
    }

    /// Splits at ascending column numbers: `n` cuts give `n + 1` parts, which together have every
    /// column.
    ///
    /// # Panics
    /// If the cuts descend or exceed the columns.
    pub fn split_columns(self, cuts: &[usize]) -> Vec<ColumnsMut<'a>> {
        assert!(
            cuts.is_sorted() && cuts.last().is_none_or(|&last| last <= self.cols),
            "column cuts {cuts:?} descend or exceed {} columns",
            self.cols
        );
        let data = self.data.as_mut_ptr();
        let starts = std::iter::once(0).chain(cuts.iter().copied());
        let ends = cuts.iter().copied().chain(std::iter::once(self.cols));
        starts
            .zip(ends)
            .map(|(start, end)| ColumnsMut {
                data,
                rows: self.rows,
                stride: self.cols,
                columns: start..end,
                owner: PhantomData,
            })
            .collect()
    }
}

/// Some columns of a [`MatrixMut`], to be written by one thread.
#[derive(Debug)]
pub struct ColumnsMut<'a> {
    /// Start of the whole matrix. Invariants: it points to `rows * stride` numbers borrowed for
    /// `'a`, `columns` ends at or before `stride`, and no other value covers these columns.
    data: *mut f32,
    rows: usize,
    stride: usize,
    columns: Range<usize>,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a part gives access to its own columns only, which no other part has; sending it is
// sending a `&mut [f32]`.
unsafe impl Send for ColumnsMut<'_> {}

// SAFETY: nothing is reachable through a shared reference except numbers of the shape.
unsafe impl Sync for ColumnsMut<'_> {}

impl ColumnsMut<'_> {
    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns which columns of the whole matrix these are.
    pub fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// Returns the same columns for a shorter time, to be given away and used again.
    pub fn reborrow(&mut self) -> ColumnsMut<'_> {
        ColumnsMut {
            data: self.data,
            rows: self.rows,
            stride: self.stride,
            columns: self.columns.clone(),
            owner: PhantomData,
        }
    }

    /// Returns these columns of one row.
    ///
    /// # Panics
    /// If the row does not exist.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "no row {row} in a result of {} rows", self.rows);
        let offset = row * self.stride + self.columns.start;
        // SAFETY: row and columns lie inside the matrix (invariants of `data`).
        let start = unsafe { self.data.add(offset) };
        // SAFETY: these numbers are inside the matrix and, by the exclusive borrow of the only
        // value that covers them, referred to by nothing else.
        unsafe { std::slice::from_raw_parts_mut(start, self.columns.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_their_columns_only() {
        let mut data = vec![0.0; 3 * 10];
        let parts = MatrixMut::new(&mut data, 3, 10).split_columns(&[1, 4, 4]);
        assert_eq!(parts.len(), 4);
        std::thread::scope(|scope| {
            for (mut part, value) in parts.into_iter().zip([1.0, 2.0, 3.0, 4.0]) {
                scope.spawn(move || {
                    for row in 0..part.rows() {
                        part.row_mut(row).fill(value);
                    }
                });
            }
        });
        for row in data.chunks_exact(10) {
            assert_eq!(row, [1.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]);
        }
    }

    #[test]
    #[should_panic(expected = "descend or exceed 10 columns")]
    fn bounds_beyond_the_matrix_are_refused() {
        MatrixMut::new(&mut [0.0; 20], 2, 10).split_columns(&[5, 11]);
    }

    #[test]
    #[should_panic(expected = "descend or exceed 10 columns")]
    fn overlapping_parts_are_refused() {
        MatrixMut::new(&mut [0.0; 20], 2, 10).split_columns(&[5, 4]);
    }

    #[test]
    #[should_panic(expected = "no row 2")]
    fn rows_beyond_the_matrix_are_refused() {
        MatrixMut::new(&mut [0.0; 20], 2, 10).into_columns().row_mut(2);
    }
}
