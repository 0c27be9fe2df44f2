//! Products with dense matrices.
//!
//! A few tokens: some rows at a time, dequantised into registers, since memory is the limit. More
//! tokens: a panel of four rows is dequantised into the first-level cache, a stretch of columns
//! after the other, and multiplied with three tokens at a time.

mod decode;
mod direct;
mod q6_k;

use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_setzero_ps};

use super::{
    lanes::{halves, halves_mut},
    memory::{load, prefetch, store},
};
use crate::{ColumnsMut, DenseMatrix, DenseType, LANES, scalar::lanes};

/// Rows of a panel.
const PANEL: usize = 4;

/// Columns that are dequantised before they are multiplied: whole blocks of every format. A panel
/// takes 8 KB, and three tokens 6 KB, of a first-level cache of 32.
const STRETCH: usize = 512;

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn matmul(w: &DenseMatrix, x: &[f32], mut out: ColumnsMut<'_>) {
    // The dequantisation of Q6_K fills the registers: one row at a time.
    match (x.len() / w.cols(), w.kind()) {
        (0, _) => return,
        (1, DenseType::Q6K) => return direct::matmul::<1, 1>(w, x, out),
        (2, DenseType::Q6K) => return direct::matmul::<1, 2>(w, x, out),
        (3, DenseType::Q6K) => return direct::matmul::<1, 3>(w, x, out),
        (1, _) => return direct::matmul::<4, 1>(w, x, out),
        (2, _) => return direct::matmul::<2, 2>(w, x, out),
        (3, _) => return direct::matmul::<2, 3>(w, x, out),
        (4, _) => return direct::matmul::<1, 4>(w, x, out),
        _ => {}
    }
    let mut buffers = Buffers {
        panel: vec![0.0; PANEL * STRETCH],
        open: vec![[0.0; LANES]; PANEL * (x.len() / w.cols())],
        factors: q6_k::Factors::default(),
    };
    let columns = out.columns();
    let mut row = columns.start;
    while row + PANEL <= columns.end {
        panel::<PANEL>(w, x, row, &mut buffers, &mut out);
        row += PANEL;
    }
    while row < columns.end {
        panel::<1>(w, x, row, &mut buffers, &mut out);
        row += 1;
    }
}

/// Working memory of a product.
struct Buffers {
    /// Dequantised weights, [`STRETCH`] for each row.
    panel: Vec<f32>,
    /// Open sums: all rows of the panel for token 0, then for token 1, ...
    open: Vec<[f32; LANES]>,
    factors: q6_k::Factors,
}

/// Multiplies some rows with one token.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn rows(w: &DenseMatrix, rows: &[u32], x: &[f32], out: &mut [f32]) {
    direct::rows(w, rows, x, out);
}

/// Dequantises a row.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn row(kind: DenseType, bytes: &[u8], out: &mut [f32]) {
    decode::row(kind, bytes, out, &mut q6_k::Factors::default());
}

/// Multiplies `R` rows with all tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn panel<const R: usize>(
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
        for (r, (panel, row)) in panel.zip(&mut rows).enumerate() {
            let bytes = &w.row_bytes(first + r)[w.kind().row_bytes(start)..];
            let panel = &mut panel[..end - start];
            let bytes = &bytes[..w.kind().row_bytes(end - start)];
            decode::row(w.kind(), bytes, panel, &mut buffers.factors);
            *row = panel;
        }
        let token = |t: usize| &x[t * cols + start..t * cols + end];
        // The same stretch of the next panel, a part with each tile of tokens.
        let here = w.row_bytes(first);
        let mut wanted = R * (here.len() + w.kind().row_bytes(start));
        let part = (R * w.kind().row_bytes(end - start)).div_ceil(tokens.div_ceil(3));
        let mut t = 0;
        while t < tokens {
            prefetch(here, wanted, part);
            wanted += part;
            let open = &mut open[R * t..];
            // Never a lone last token after three: it would leave half of the units idle.
            t += match tokens - t {
                1 => stretch(rows, [token(t)], open),
                2 | 4 => stretch(rows, [token(t), token(t + 1)], open),
                _ => stretch(rows, [token(t), token(t + 1), token(t + 2)], open),
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

/// Adds a stretch of columns to the open sums of `R` rows and `T` tokens; returns `T`.
///
/// The low eight lanes of all sums come first, then the high eight: so 12 sums fit the registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn stretch<const R: usize, const T: usize>(
    rows: [&[f32]; R],
    tokens: [&[f32]; T],
    open: &mut [[f32; LANES]],
) -> usize {
    let mut w: [&[[f32; LANES]]; R] = [&[]; R];
    let mut x: [&[[f32; LANES]]; T] = [&[]; T];
    let chunks = rows[0].len() / LANES;
    for (w, row) in w.iter_mut().zip(rows) {
        *w = &row.as_chunks().0[..chunks];
    }
    for (x, token) in x.iter_mut().zip(tokens) {
        *x = &token.as_chunks().0[..chunks];
    }
    half::<0, R, T>(w, x, open);
    half::<1, R, T>(w, x, open);
    let tail = chunks * LANES..rows[0].len();
    if !tail.is_empty() {
        for (token, open) in tokens.iter().zip(open.chunks_exact_mut(R)) {
            for (row, open) in rows.iter().zip(open) {
                let pairs = row[tail.clone()].iter().zip(&token[tail.clone()]);
                for ((w, x), open) in pairs.zip(open) {
                    *open = w.mul_add(*x, *open);
                }
            }
        }
    }
    T
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn half<const HIGH: usize, const R: usize, const T: usize>(
    rows: [&[[f32; LANES]]; R],
    tokens: [&[[f32; LANES]]; T],
    open: &mut [[f32; LANES]],
) {
    let chunks = rows[0].len();
    let mut sums = [[_mm256_setzero_ps(); R]; T];
    for (sums, open) in sums.iter_mut().zip(open.chunks_exact(R)) {
        for (sum, open) in sums.iter_mut().zip(open) {
            *sum = load(half_of::<HIGH>(open));
        }
    }
    for chunk in 0..chunks {
        let mut x = [_mm256_setzero_ps(); T];
        for t in 0..T {
            x[t] = load(half_of::<HIGH>(&tokens[t][chunk]));
        }
        for r in 0..R {
            let w = load(half_of::<HIGH>(&rows[r][chunk]));
            for t in 0..T {
                sums[t][r] = _mm256_fmadd_ps(w, x[t], sums[t][r]);
            }
        }
    }
    for (sums, open) in sums.iter().zip(open.chunks_exact_mut(R)) {
        for (sum, open) in sums.iter().zip(open) {
            let (low, high) = halves_mut(open);
            store(if HIGH == 0 { low } else { high }, *sum);
        }
    }
}

#[inline]
fn half_of<const HIGH: usize>(x: &[f32; LANES]) -> &[f32; 8] {
    let (low, high) = halves(x);
    if HIGH == 0 { low } else { high }
}
