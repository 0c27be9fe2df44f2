//! Products with a few tokens: rows are read once and never stored dequantised.

use std::arch::x86_64::{__m256, _mm256_fmadd_ps};

use super::{
    super::{
        lanes::{Lanes, halves},
        memory::{load, load_half, prefetch_piece},
    },
    decode::{SMALL_BLOCK, bf16, block_scale, f16, sixteen},
    q6_k::{self, Factors},
};
use crate::{
    ColumnsMut, DenseMatrix, DenseType, LANES,
    dense::{q4_0, q8_0},
    scalar,
};

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Multiplies all rows with `T` tokens, `R` rows at a time: as many sums as hide the latency of
/// the additions and fit the registers.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn matmul<const R: usize, const T: usize>(
    w: &DenseMatrix,
    x: &[f32],
    mut out: ColumnsMut<'_>,
) {
    let mut factors = Factors::default();
    let mut tokens: [&[f32]; T] = [&[]; T];
    for (token, x) in tokens.iter_mut().zip(x.chunks_exact(w.cols())) {
        *token = x;
    }
    let columns = out.columns();
    let mut row = columns.start;
    while row + R <= columns.end {
        let mut rows: [&[u8]; R] = [&[]; R];
        for (r, bytes) in rows.iter_mut().enumerate() {
            *bytes = w.row_bytes(row + r);
        }
        let products = products(w.kind(), rows, tokens, &mut factors);
        for t in 0..T {
            let out = &mut out.row_mut(t)[row - columns.start..];
            for (out, products) in out.iter_mut().zip(&products) {
                *out = products[t];
            }
        }
        row += R;
    }
    while row < columns.end {
        let [products] = products(w.kind(), [w.row_bytes(row)], tokens, &mut factors);
        for (t, product) in products.into_iter().enumerate() {
            out.row_mut(t)[row - columns.start] = product;
        }
        row += 1;
    }
}

/// Multiplies some rows with one token, each as [`matmul`] does.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn rows(w: &DenseMatrix, rows: &[u32], x: &[f32], out: &mut [f32]) {
    let mut factors = Factors::default();
    for (row, out) in rows.iter().zip(out) {
        [[*out]] = products(w.kind(), [w.row_bytes(*row as usize)], [x], &mut factors);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn products<const R: usize, const T: usize>(
    kind: DenseType,
    rows: [&[u8]; R],
    tokens: [&[f32]; T],
    factors: &mut Factors,
) -> [[f32; T]; R] {
    let sums = match kind {
        DenseType::F32 => plain::<F32, 64, R, T>(rows, tokens),
        DenseType::F16 => plain::<F16, 32, R, T>(rows, tokens),
        DenseType::Bf16 => plain::<BF16, 32, R, T>(rows, tokens),
        DenseType::Q8_0 => small_blocks::<{ q8_0::BYTES }, R, T>(rows, tokens),
        DenseType::Q4_0 => small_blocks::<{ q4_0::BYTES }, R, T>(rows, tokens),
        DenseType::Q6K => q6_k::products(rows, tokens, factors),
    };
    let cols = tokens[0].len();
    let whole = cols / LANES * LANES;
    let mut products = [[0.0; T]; R];
    for ((products, sums), row) in products.iter_mut().zip(sums).zip(rows) {
        for ((product, sum), token) in products.iter_mut().zip(sums).zip(tokens) {
            *product =
                if whole == cols { sum.fold() } else { finish(kind, sum, row, &token[whole..]) };
        }
    }
    products
}

/// Adds the weights that fill no register, which only formats without blocks have.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn finish(kind: DenseType, sum: Lanes, row: &[u8], tail: &[f32]) -> f32 {
    let mut weights = [0.0; LANES];
    let weights = &mut weights[..tail.len()];
    scalar::dense::row(kind, &row[row.len() - kind.row_bytes(tail.len())..], weights);
    let mut lanes = sum.to_array();
    for ((w, x), lane) in weights.iter().zip(tail).zip(&mut lanes) {
        *lane = w.mul_add(*x, *lane);
    }
    scalar::lanes::fold(lanes)
}

/// Sums a format without blocks, whose 16 weights take `BYTES`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn plain<const KIND: u8, const BYTES: usize, const R: usize, const T: usize>(
    rows: [&[u8]; R],
    tokens: [&[f32]; T],
) -> [[Lanes; T]; R] {
    let count = tokens[0].len() / LANES;
    let mut x: [&[[f32; LANES]]; T] = [&[]; T];
    for (x, token) in x.iter_mut().zip(tokens) {
        *x = &token.as_chunks().0[..count];
    }
    let mut chunks: [&[[u8; BYTES]]; R] = [&[]; R];
    for (chunks, row) in chunks.iter_mut().zip(rows) {
        *chunks = &row.as_chunks().0[..count];
    }
    let mut sums = [[Lanes::zero(); T]; R];
    for i in 0..count {
        for r in 0..R {
            prefetch_piece::<BYTES>(rows[0], R, R * i + r);
        }
        for r in 0..R {
            let low = plain_eight::<KIND, BYTES>(&chunks[r][i], 0);
            let high = plain_eight::<KIND, BYTES>(&chunks[r][i], 1);
            for t in 0..T {
                let x = halves(&x[t][i]);
                let sum = &mut sums[r][t];
                sum.low = _mm256_fmadd_ps(low, load(x.0), sum.low);
                sum.high = _mm256_fmadd_ps(high, load(x.1), sum.high);
            }
        }
    }
    sums
}

/// Returns the low or the high eight of 16 weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn plain_eight<const KIND: u8, const BYTES: usize>(bytes: &[u8; BYTES], half: usize) -> __m256 {
    match KIND {
        F32 => {
            let bytes = &bytes.as_chunks::<32>().0[half];
            let mut weights = [0.0; 8];
            for (bytes, weight) in bytes.as_chunks().0.iter().zip(&mut weights) {
                *weight = f32::from_le_bytes(*bytes);
            }
            load(&weights)
        }
        F16 => f16(load_half(&bytes.as_chunks().0[half])),
        _ => bf16(load_half(&bytes.as_chunks().0[half])),
    }
}

/// Sums Q8_0 or Q4_0, which the size of a block tells apart.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn small_blocks<const BYTES: usize, const R: usize, const T: usize>(
    rows: [&[u8]; R],
    tokens: [&[f32]; T],
) -> [[Lanes; T]; R] {
    let count = tokens[0].len() / SMALL_BLOCK;
    let mut x: [&[[f32; SMALL_BLOCK]]; T] = [&[]; T];
    for (x, token) in x.iter_mut().zip(tokens) {
        *x = &token.as_chunks().0[..count];
    }
    let mut blocks: [&[[u8; BYTES]]; R] = [&[]; R];
    for (blocks, row) in blocks.iter_mut().zip(rows) {
        *blocks = &row.as_chunks().0[..count];
    }
    let mut sums = [[Lanes::zero(); T]; R];
    for i in 0..count {
        for r in 0..R {
            prefetch_piece::<BYTES>(rows[0], R, R * i + r);
        }
        for r in 0..R {
            let scale = block_scale(&blocks[r][i]);
            for chunk in 0..SMALL_BLOCK / LANES {
                let [low, high] = sixteen(&blocks[r][i], scale, chunk);
                for t in 0..T {
                    let x = halves(&x[t][i].as_chunks().0[chunk]);
                    let sum = &mut sums[r][t];
                    sum.low = _mm256_fmadd_ps(low, load(x.0), sum.low);
                    sum.high = _mm256_fmadd_ps(high, load(x.1), sum.high);
                }
            }
        }
    }
    sums
}
