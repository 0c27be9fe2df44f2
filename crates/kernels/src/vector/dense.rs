//! Products with dense matrices.
//!
//! One token: some rows at a time, dequantised into registers, since memory is the limit. More
//! tokens: a panel of rows is dequantised into the first-level cache, a stretch of columns after the
//! other, and multiplied with some tokens at a time.

mod format;

use self::format::{Bf16, F16, F32, Format, Q4_0, Q6K, Q8_0};
use super::{Lanes, Operation, prefetch_piece, reduce::fold_with_tail};
use crate::{
    ColumnsMut, DenseMatrix, DenseType, LANES,
    scalar::{self, lanes},
};

/// Rows that are read together for one token, and rows of a panel.
const ROWS: usize = 4;

/// Columns that are dequantised before they are multiplied: whole blocks of every format. A panel
/// takes 8 KB of a first-level cache.
const STRETCH: usize = 512;

/// [`Kernels::dense_row`](crate::Kernels::dense_row).
pub(crate) struct DenseRow<'a> {
    pub(crate) kind: DenseType,
    pub(crate) bytes: &'a [u8],
    pub(crate) out: &'a mut [f32],
}

impl Operation for DenseRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        row(v, self.kind, self.bytes, self.out);
    }
}

/// Dequantises consecutive weights: whole blocks of the format.
#[inline(always)]
fn row<V: Lanes>(v: V, kind: DenseType, bytes: &[u8], out: &mut [f32]) {
    match kind {
        DenseType::F32 => row_of::<V, F32>(v, bytes, out),
        DenseType::F16 => row_of::<V, F16>(v, bytes, out),
        DenseType::Bf16 => row_of::<V, Bf16>(v, bytes, out),
        DenseType::Q8_0 => row_of::<V, Q8_0>(v, bytes, out),
        DenseType::Q4_0 => row_of::<V, Q4_0>(v, bytes, out),
        DenseType::Q6K => row_of::<V, Q6K>(v, bytes, out),
    }
}

#[inline(always)]
fn row_of<V: Lanes, F: Format>(v: V, bytes: &[u8], out: &mut [f32]) {
    let blocks = bytes.chunks_exact(F::BYTES);
    let tail = blocks.remainder();
    let mut chunks = out.as_chunks_mut().0.chunks_exact_mut(F::CHUNKS);
    for (block, out) in blocks.zip(&mut chunks) {
        for (chunk, out) in out.iter_mut().enumerate() {
            v.store(out, F::weights(v, block, chunk));
        }
    }
    if !tail.is_empty() {
        let whole = bytes.len() / F::BYTES * F::CHUNKS * LANES;
        scalar::dense::row(F::KIND, tail, &mut out[whole..]);
    }
}

/// [`Kernels::dense_matmul`](crate::Kernels::dense_matmul).
pub(crate) struct DenseMatmul<'a> {
    pub(crate) w: &'a DenseMatrix,
    pub(crate) x: &'a [f32],
    pub(crate) out: ColumnsMut<'a>,
}

impl Operation for DenseMatmul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let Self { w, x, out } = self;
        if x.len() > w.cols() {
            return panels(v, w, x, out);
        }
        match w.kind() {
            _ if x.is_empty() => {}
            DenseType::F32 => direct::<V, F32>(v, w, x, out),
            DenseType::F16 => direct::<V, F16>(v, w, x, out),
            DenseType::Bf16 => direct::<V, Bf16>(v, w, x, out),
            DenseType::Q8_0 => direct::<V, Q8_0>(v, w, x, out),
            DenseType::Q4_0 => direct::<V, Q4_0>(v, w, x, out),
            DenseType::Q6K => direct::<V, Q6K>(v, w, x, out),
        }
    }
}

/// Multiplies all rows with one token.
#[inline(always)]
fn direct<V: Lanes, F: Format>(v: V, w: &DenseMatrix, x: &[f32], mut out: ColumnsMut<'_>) {
    let columns = out.columns();
    let out = out.row_mut(0);
    let mut row = columns.start;
    while row + ROWS <= columns.end {
        let mut rows: [&[u8]; ROWS] = [&[]; ROWS];
        for (r, bytes) in rows.iter_mut().enumerate() {
            *bytes = w.row_bytes(row + r);
        }
        let products = products::<V, F, ROWS>(v, rows, x);
        out[row - columns.start..][..ROWS].copy_from_slice(&products);
        row += ROWS;
    }
    while row < columns.end {
        [out[row - columns.start]] = products::<V, F, 1>(v, [w.row_bytes(row)], x);
        row += 1;
    }
}

/// Returns the products of `R` rows with one token.
#[inline(always)]
fn products<V: Lanes, F: Format, const R: usize>(v: V, rows: [&[u8]; R], x: &[f32]) -> [f32; R] {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut sums = [v.splat(0.0); R];
    for (index, x) in chunks.chunks_exact(F::CHUNKS).enumerate() {
        let mut blocks: [&[u8]; R] = [&[]; R];
        for r in 0..R {
            prefetch_piece(v, rows[0], R, R * index + r, F::BYTES);
            blocks[r] = &rows[r][index * F::BYTES..][..F::BYTES];
        }
        for (chunk, x) in x.iter().enumerate() {
            let x = v.load(x);
            for r in 0..R {
                sums[r] = v.fma(F::weights(v, blocks[r], chunk), x, sums[r]);
            }
        }
    }
    let mut weights = [0.0; LANES];
    let weights = &mut weights[..tail.len()];
    let mut products = [0.0; R];
    for r in 0..R {
        let bytes = &rows[r][rows[r].len() - F::KIND.row_bytes(tail.len())..];
        scalar::dense::row(F::KIND, bytes, weights);
        products[r] = fold_with_tail(v, sums[r], weights, tail);
    }
    products
}

/// Multiplies all rows with more than one token.
#[inline(always)]
fn panels<V: Lanes>(v: V, w: &DenseMatrix, x: &[f32], mut out: ColumnsMut<'_>) {
    let mut buffers = Buffers {
        panel: vec![0.0; ROWS * STRETCH],
        open: vec![[0.0; LANES]; ROWS * (x.len() / w.cols())],
    };
    let columns = out.columns();
    let mut row = columns.start;
    while row + ROWS <= columns.end {
        panel::<V, ROWS>(v, w, x, row, &mut buffers, &mut out);
        row += ROWS;
    }
    while row < columns.end {
        panel::<V, 1>(v, w, x, row, &mut buffers, &mut out);
        row += 1;
    }
}

/// Working memory of a product.
struct Buffers {
    /// Dequantised weights, [`STRETCH`] for each row.
    panel: Vec<f32>,
    /// Open sums: all rows of the panel for token 0, then for token 1, ...
    open: Vec<[f32; LANES]>,
}

/// Multiplies `R` rows with all tokens.
#[inline(always)]
fn panel<V: Lanes, const R: usize>(
    v: V,
    w: &DenseMatrix,
    x: &[f32],
    first: usize,
    buffers: &mut Buffers,
    out: &mut ColumnsMut<'_>,
) {
    let cols = w.cols();
    let tokens = x.len() / cols;
    let open = &mut buffers.open[..R * tokens];
    open.fill([0.0; LANES]);
    for start in (0..cols).step_by(STRETCH) {
        let end = cols.min(start + STRETCH);
        let mut rows: [&[f32]; R] = [&[]; R];
        let panel = buffers.panel.chunks_exact_mut(STRETCH);
        for (r, (panel, part)) in panel.zip(&mut rows).enumerate() {
            let bytes = &w.row_bytes(first + r)[w.kind().row_bytes(start)..];
            let panel = &mut panel[..end - start];
            row(v, w.kind(), &bytes[..w.kind().row_bytes(end - start)], panel);
            *part = panel;
        }
        let mut t = 0;
        while t < tokens {
            let open = &mut open[R * t..];
            let x = &x[t * cols + start..];
            t += match tokens - t {
                1 => stretch::<V, R, 1>(v, rows, x, cols, open),
                2 | 3 => stretch::<V, R, 2>(v, rows, x, cols, open),
                _ if V::MANY => stretch::<V, R, 4>(v, rows, x, cols, open),
                _ => stretch::<V, R, 2>(v, rows, x, cols, open),
            };
        }
    }
    let columns = out.columns();
    for (t, open) in open.chunks_exact(R).enumerate() {
        let out = &mut out.row_mut(t)[first - columns.start..];
        for (out, open) in out.iter_mut().zip(open) {
            *out = lanes::fold(*open);
        }
    }
}

/// Adds a stretch of columns to the open sums of `R` rows and of `T` tokens that are `cols` apart;
/// returns `T`.
#[inline(always)]
fn stretch<V: Lanes, const R: usize, const T: usize>(
    v: V,
    rows: [&[f32]; R],
    x: &[f32],
    cols: usize,
    open: &mut [[f32; LANES]],
) -> usize {
    let len = rows[0].len();
    let mut w: [&[[f32; LANES]]; R] = [&[]; R];
    let mut tokens: [&[[f32; LANES]]; T] = [&[]; T];
    for (w, row) in w.iter_mut().zip(rows) {
        *w = &row.as_chunks().0[..len / LANES];
    }
    for (t, token) in tokens.iter_mut().enumerate() {
        *token = &x[t * cols..][..len].as_chunks().0[..len / LANES];
    }
    let mut sums = [[v.splat(0.0); R]; T];
    for t in 0..T {
        for r in 0..R {
            sums[t][r] = v.load(&open[t * R + r]);
        }
    }
    for chunk in 0..len / LANES {
        let mut x = [v.splat(0.0); T];
        for t in 0..T {
            x[t] = v.load(&tokens[t][chunk]);
        }
        for r in 0..R {
            let w = v.load(&w[r][chunk]);
            for t in 0..T {
                sums[t][r] = v.fma(w, x[t], sums[t][r]);
            }
        }
    }
    for t in 0..T {
        for r in 0..R {
            v.store(&mut open[t * R + r], sums[t][r]);
        }
    }
    let tail = len / LANES * LANES..len;
    if !tail.is_empty() {
        for (t, open) in open.chunks_exact_mut(R).take(T).enumerate() {
            for (row, open) in rows.iter().zip(open) {
                let pairs = row[tail.clone()].iter().zip(&x[t * cols..][tail.clone()]);
                for ((w, x), open) in pairs.zip(open) {
                    *open = w.mul_add(*x, *open);
                }
            }
        }
    }
    T
}
